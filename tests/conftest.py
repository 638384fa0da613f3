"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

# Before huggingface_hub is imported, which reads this once: no test may depend on a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import shape_checks  # isort: skip (before what it checks is imported)

import transformers

from cli_for_tests import Rarefy
from models_for_tests import build, make_model, save_folder
from rarefy.cli import main
from rarefy.sweeps.options import Options

transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def checked_shapes() -> Iterator[None]:
    """Types and shapes are checked against the annotations of the mathematics in every call."""
    shape_checks.turn(on=True)
    yield
    shape_checks.turn(on=bool(os.environ.get("CHECK_SHAPES")))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a small model with tokenizer, by architecture; tests must not write into it."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_folder(make_model(architecture), tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return folder


@pytest.fixture(scope="session", autouse=True)
def frozen_imports() -> None:
    """What is imported is left out of garbage collections, of which each would take a quarter of a second."""
    import transformers.models.llama.modeling_llama  # noqa: F401 (as most tests do)

    import rarefy.runs.run  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture
def rarefy_(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rarefy:
    """Runs the command line within this process, in an empty folder: ``.status``, ``.out``, ``.err``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return run


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Path:
    """A folder with a model, texts and recipes, good and bad; tests must not write into it."""
    folder = tmp_path_factory.mktemp("shelf")
    shutil.copytree(model_folder("llama"), folder / "model")
    shutil.copytree(model_folder("llama"), folder / "truncated")
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(model_folder("llama"), folder / "mute", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    wide = make_model("llama").config
    wide.vocab_size = 200
    save_folder(build(wide), folder / "wide")
    (folder / "no_model").mkdir()
    (folder / "no_model" / "letter.txt").write_text("Dear reader")
    (folder / "file").touch()
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 200)
    (folder / "rows.csv").write_text('id,body\n1,"' + (folder / "text.txt").read_text() + '"\n')
    (folder / "short.txt").write_text("the end")
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (folder / "unknown_key.yaml").write_text("sparsity: 0.5\nshots: 3\n")
    (folder / "wrong.yaml").write_text("sparsity: 1.5\n")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file, for calibration and perplexity."""
    file = tmp_path / "words.txt"
    file.write_text("The rain in the north is another thing than the rain at sea. " * 12)
    return file


@pytest.fixture
def sweep_options(model_folder: Callable[[str], Path], text: Path) -> Options:
    """A comparison of which methods or systems are to be said."""
    return Options(
        model=str(model_folder("llama")),
        sparsities=["0.5"],
        patterns=["2:4"],
        calibration=str(text),
        num_samples=4,
        sequence_length=16,
        texts=[str(text)],
        eval_length=32,
        max_windows=3,
    )
