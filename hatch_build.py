"""Compiles the kernel of packed weights when Rarefy is built, and takes it into the wheel.

Where there is no C compiler, or it fails, the wheel is pure and torch does the kernel's work. ``CC`` names the
compiler, as ever; ``CC=false`` builds without. An editable installation gets the library beside its source.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("src/rarefy/packing/kernel.c")
#: By no suffix of Python's extension modules, which tools that import all of a package would take it for.
LIBRARY = "kernel.shared"

# Threads by OpenMP where the compiler has it; torch brings the library that runs them.
_FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
_THREADS = (("-fopenmp",), ())


class KernelHook(BuildHookInterface[Any]):
    """Adds the compiled kernel to a wheel, and with it the platform to the wheel's name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; ``version`` is "editable" where the source itself is to be installed."""
        source = Path(self.root) / SOURCE
        if version == "editable":
            compile_kernel(source, source.with_name(LIBRARY), self.app.display_warning)
            return
        self._folder = tempfile.mkdtemp(prefix="rarefy-")
        library = Path(self._folder) / LIBRARY
        if compile_kernel(source, library, self.app.display_warning):
            build_data["force_include"][str(library)] = f"rarefy/packing/{LIBRARY}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what is in the wheel now."""
        if version != "editable":
            shutil.rmtree(self._folder, ignore_errors=True)


def compile_kernel(source: Path, library: Path, warn: Any = print) -> bool:
    """Compile ``source`` into ``library``; whether it is there. Where it is not, ``warn`` is told why."""
    library.unlink(missing_ok=True)
    reason = "there is no C compiler (CC, cc, gcc or clang)"
    for compiler in _compilers():
        for threads in _THREADS:
            command = [*compiler, *_FLAGS, *threads, str(source), "-o", str(library), "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                reason = f"{compiler[0]} cannot be started ({error.strerror})"
                break
            if done.returncode == 0 and library.is_file():
                return True
            lines = done.stderr.strip().splitlines()
            reason = f"{shlex.join(compiler)} failed" + (f" ({lines[-1]})" if lines else "")
    warn(f"Rarefy is built without its kernel, so torch will multiply packed weights, slowly: {reason}.")
    return False


def _compilers() -> list[list[str]]:
    """The compiler that CC names, or else those that there are."""
    if chosen := os.environ.get("CC"):
        return [shlex.split(chosen)]
    return [[name] for name in ("cc", "gcc", "clang") if shutil.which(name)]


def _platform() -> str:
    """The platform in a wheel's name, such as linux_x86_64."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


if __name__ == "__main__":
    here = Path(__file__).parent / SOURCE
    sys.exit(not compile_kernel(here, here.with_name(LIBRARY)))
