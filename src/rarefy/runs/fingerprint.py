"""The fingerprint of a run: all that its result depends on, so that a run goes on only with its own blocks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rarefy import __version__

if TYPE_CHECKING:
    from torch import Tensor


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
    """The SHA-256 digest of each file that a model's weights depend on: of its config, of the index, of the weights.

    ``model`` is a folder, or one file. A merged or retrained checkpoint has the sizes, headers and embeddings of the
    one that it was made from, so nothing less than all bytes tells them apart. A processor hashes 0.5 to 2 GB a
    second, and a run takes minutes for as much; a file that has not changed since is hashed once in a process.
    Raises ModelError for an index that is none.
    """
    from rarefy.models.weight_files import find_weight_files

    if model.is_file():
        files = [model]
    else:
        found = find_weight_files(model)
        weights = found.files if found is not None else ()
        files = [file for file in (model / "config.json", found.index if found else None, *weights) if file]
    files = [file for file in files if file.is_file()]
    states = [file.stat() for file in files]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets other threads run
        digests = pool.map(_digest, files, [one.st_size for one in states], [one.st_mtime_ns for one in states])
    return {file.name: digest for file, digest in zip(files, digests)}


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, modified: int) -> str:
    """The digest of a file of which ``size`` in bytes and time of change are known."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


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
