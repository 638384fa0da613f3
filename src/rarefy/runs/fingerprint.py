"""The fingerprint of a run: all that its result depends on, so that a run goes on only with its own blocks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rarefy import __version__

if TYPE_CHECKING:
    from torch import Tensor

#: Files of weights are read whole where they have so many bytes together at most: a second or two.
_WHOLE = 2 * 2**30
#: Of larger ones, the beginning, which has the header of a safetensors file, and a sample of every stretch.
_BEGINNING, _STRETCH, _SAMPLE = 2**20, 16 * 2**20, 2**16
_CHUNK = 4 * 2**20


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
    """A digest of each file that a model's weights depend on: of its config, of the index, of the weights.

    ``model`` is a folder, or one file. Of weights of more than 2 GiB, which would take long to read, each digest
    is of the size, the beginning, and a sample of every 16 MiB, so that a model that was merged or trained further,
    whose files have the same header and other bytes everywhere, is another one; a change of a few bytes may not
    be seen. Raises ModelError for an index that is none.
    """
    from rarefy.models.weight_files import find_weight_files

    if model.is_file():
        files = [model]
    else:
        found = find_weight_files(model)
        weights = found.files if found is not None else ()
        files = [file for file in (model / "config.json", found.index if found else None, *weights) if file]
    files = [file for file in files if file.is_file()]
    whole = sum(file.stat().st_size for file in files) <= _WHOLE
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets other threads run
        digests = pool.map(lambda file: _digest(file, whole), files)
    return {file.name: digest for file, digest in zip(files, digests)}


def _digest(file: Path, whole: bool) -> str:
    """The digest of all of a file, or of samples of it."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with file.open("rb", buffering=0) as opened:
        for start, length in [(0, size)] if whole else _samples(size):
            opened.seek(start)
            while length > 0 and (part := opened.read(min(_CHUNK, length))):
                digest.update(part)
                length -= len(part)
    return digest.hexdigest()


def _samples(size: int) -> list[tuple[int, int]]:
    """Where the samples of a file of that size are, and how long each is."""
    starts = [*range(_BEGINNING, size - _SAMPLE, _STRETCH), size - _SAMPLE]
    return [(0, _BEGINNING), *((max(0, start), _SAMPLE) for start in starts)]


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
