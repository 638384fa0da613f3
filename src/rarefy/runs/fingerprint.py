"""The fingerprint of a run: all that its result depends on, so that a run goes on only with its own blocks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rarefy import __version__

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes at the beginning and at the end of a file by which it is known, besides its size.
_SAMPLE = 2**20
_MODEL_FILES = (".safetensors", ".bin", ".gguf")
_MODEL_SETTINGS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


def versions() -> dict[str, str]:
    """The versions of Rarefy, Python and the libraries that results depend on, as far as they are installed."""
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


@dataclass(frozen=True)
class Fingerprint:
    """All that the result of a run depends on; runs with equal ones can go on with each other's blocks.

    ``recipe`` is every setting by name, as plain values; ``model`` a digest of each of its files; ``text``
    a digest of the calibration windows.
    """

    recipe: dict[str, Any]
    model: dict[str, str]
    text: str

    @classmethod
    def of(cls, recipe: Mapping[str, Any], model: Path, windows: Tensor) -> Self:
        """The fingerprint of a recipe, a model's folder or file, and the token ids of all windows."""
        content = repr(tuple(windows.shape)).encode() + windows.numpy().tobytes()
        plain = json.loads(json.dumps(dict(recipe)))  # as it is read back: lists for tuples
        return cls(plain, file_digests(model), hashlib.sha256(content).hexdigest())

    def difference(self, other: Fingerprint) -> str | None:
        """The first thing in which ``other`` differs, in words; None where nothing does."""
        for key in (*self.recipe, *other.recipe):
            mine, theirs = self.recipe.get(key), other.recipe.get(key)
            if mine != theirs:
                return f"with {key} {_shown(mine)}, not {_shown(theirs)}"
        for name in (*self.model, *other.model):
            if self.model.get(name) != other.model.get(name):
                return f"of another model: {name} is not the same file"
        return None if self.text == other.text else "on another calibration text"


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
