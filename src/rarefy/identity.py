"""What a result depends on besides its settings: the versions of libraries, and the files of a model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

from rarefy import __version__

#: Bytes at the beginning and at the end of a file by which it is known, besides its size.
_SAMPLE = 2**20
_MODEL_FILES = (".safetensors", ".bin", ".gguf")
_MODEL_SETTINGS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


def versions() -> dict[str, str]:
    """Of Rarefy, Python and the libraries that results depend on, as far as they are installed."""
    found = {"rarefy": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors", "lm_eval"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def file_digests(model: Path) -> dict[str, str]:
    """A digest of each file of a model that its weights depend on: of its size, beginning and end."""
    files = [model] if model.is_file() else sorted(model.iterdir())
    digests = {}
    for file in files:
        if file.is_file() and (file.suffix in _MODEL_FILES or file.name in _MODEL_SETTINGS):
            size = file.stat().st_size
            with file.open("rb") as opened:
                digest = hashlib.sha256(f"{size} ".encode() + opened.read(_SAMPLE))
                opened.seek(max(0, size - _SAMPLE))
                digest.update(opened.read())
            digests[file.name] = digest.hexdigest()
    return digests
