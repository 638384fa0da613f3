"""Building the package: with a C compiler the kernel is in the wheel, without one the wheel is pure and says why."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="pip install -e '.[dev]' brings what builds the package")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import hatch_build  # noqa: E402

from rarefy.packing.kernel import LIBRARY  # noqa: E402

needs_compiler = pytest.mark.skipif(not hatch_build._compilers(), reason="there is no C compiler")


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_compiler_that_fails_is_no_error(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "kernel.shared"
    library.write_text("of an earlier time")
    monkeypatch.setenv("CC", "false")
    assert not hatch_build.compile_kernel(ROOT / hatch_build.SOURCE, library, said.append)
    assert not library.exists()
    assert said == [
        "Rarefy is built without its kernel, so torch will multiply packed weights, slowly: false failed."
    ]


def test_a_machine_without_a_compiler(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not hatch_build.compile_kernel(ROOT / hatch_build.SOURCE, tmp_path / "kernel.shared", said.append)
    assert "there is no C compiler" in said[0]
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    assert not hatch_build.compile_kernel(ROOT / hatch_build.SOURCE, tmp_path / "kernel.shared", said.append)
    assert "no-such-compiler cannot be started" in said[1]


@needs_compiler
def test_without_openmp_it_is_compiled_for_one_thread(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    real = shutil.which(hatch_build._compilers()[0][0])
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {real} -O0 "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert hatch_build.compile_kernel(ROOT / hatch_build.SOURCE, tmp_path / "kernel.shared", said.append)
    assert said == []


def build(folder: Path, target: str, out: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl" if target == "wheel" else "*.tar.gz"))


@pytest.mark.slow
@needs_compiler
def test_wheels_with_and_without_the_kernel_are_built_from_the_sdist(tmp_path: Path) -> None:
    with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as archive:
        assert not [name for name in archive.getnames() if name.endswith(".so")]
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.name.startswith("rarefy-"))
    (source / hatch_build.SOURCE).with_name(hatch_build.LIBRARY).write_text("of an editable installation")
    wheel = build(source, "wheel", tmp_path / "with")
    assert wheel.name.startswith("rarefy-")
    assert f"-py3-none-{hatch_build._platform()}.whl" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"rarefy/packing/{hatch_build.LIBRARY}")[:4] == b"\x7fELF"
    pure = build(source, "wheel", tmp_path / "without", CC="false")
    assert pure.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure) as archive:
        names = archive.namelist()
    assert "rarefy/packing/kernel.c" in names
    assert not [name for name in names if name.endswith(".so")]


def test_the_library_is_not_taken_for_a_module() -> None:
    assert inspect.getmodulename(hatch_build.LIBRARY) is None
    assert LIBRARY.name == hatch_build.LIBRARY
