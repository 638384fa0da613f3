"""Finds the files that hold a model's weights, and checks them: the one reader of an index of weights.

A model's weights are in one file, or in several with an index that says which tensor is in which. An index
comes with the model, from whoever made it, so what it names must lie in its own folder.
"""

from __future__ import annotations

import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rarefy.errors import ModelError
from rarefy.models.links import refuse_outside
from rarefy.models.quiet import first_line
from rarefy.models.settings import read_json

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
#: What transformers looks for, in this order: the file, or else its index.
NAMES = (SAFETENSORS, PICKLED)
INDEX = ".index.json"


@dataclass(frozen=True)
class WeightFiles:
    """The files of a model's weights in the order in which they are read, and their index where there is one.

    ``tensors`` are the names that the index says are in each file.
    """

    folder: Path
    files: tuple[Path, ...]
    index: Path | None = None
    tensors: dict[Path, frozenset[str]] = field(default_factory=dict, repr=False)

    def check(self) -> None:
        """Raise ModelError unless all files are there and whole; reads their headers only."""
        for file in self.files:
            _check_file(file, self.tensors.get(file, frozenset()))


def find_weight_files(folder: Path) -> WeightFiles | None:
    """The files of weights in a model's folder that transformers would read; None where there are none.

    Raises ModelError for an index that is none, and for files that lie outside of the folder.
    """
    for files in possible_files(folder):
        if files.index is not None or files.files[0].is_file():
            for file in files.files:
                refuse_outside(folder, file)
            return files
    if (named := _named(folder)) is not None:
        raise ModelError.sentence(f"{named} is missing, although config.json names it.")
    return None


def unnamed_files(files: WeightFiles) -> list[Path]:
    """Files of weights beside those of a model, of which nothing is loaded: another format of it, or more."""
    if files.files[0].suffix == ".bin":
        return []
    return sorted({*files.folder.glob("*.safetensors")} - {*files.files})


def possible_files(folder: Path) -> Iterator[WeightFiles]:
    """The files that a model's weights may be in, in transformers' order: those that an index names, or one file.

    Raises ModelError for an index that is none, or that names what is not in its folder.
    """
    if (named := _named(folder)) is not None:
        yield _indexed(named) if named.name.endswith(INDEX) else WeightFiles(folder, (named,))
        return
    for name in NAMES:
        index = folder / (name + INDEX)
        only_index = index.is_file() and not (folder / name).is_file()
        yield _indexed(index) if only_index else WeightFiles(folder, (folder / name,))


def _named(folder: Path) -> Path | None:
    """The file of weights, or the index, that a model's config names itself; None where it names none."""
    config = folder / "config.json"
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    return None if named is None else folder / _checked_name(config, named)


def _indexed(index: Path) -> WeightFiles:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError.sentence(f"{index} names no files of weights.")
    tensors: dict[str, set[str]] = defaultdict(set)
    for tensor, name in weight_map.items():
        tensors[_checked_name(index, name)].add(tensor)
    files = {name: index.parent / name for name in sorted(tensors)}
    return WeightFiles(
        index.parent, tuple(files.values()), index, {file: frozenset(tensors[name]) for name, file in files.items()}
    )


def _checked_name(file: Path, name: object) -> str:
    """A name of a file in the folder of ``file``, which says it. Raises ModelError for anything else."""
    if not isinstance(name, str) or not name:
        raise ModelError.sentence(f"{file} names {name!r}, which is no name of a file.")
    if Path(name).name != name or name == ".." or "\\" in name or "\0" in name:
        raise ModelError.sentence(f"{file} names {name}, which is not in its own folder.")
    return name


def _check_file(path: Path, expected: frozenset[str]) -> None:
    """Raise ModelError unless ``path`` is a whole file of weights, with all tensors of ``expected``."""
    missing: set[str] = set()
    try:
        with path.open("rb") as file:
            start = file.read(24)
        if start == b"version https://git-lfs.":
            raise ModelError.sentence(f"{path} is a pointer of Git LFS: `git lfs pull` fetches the weights.")
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:  # compares its header with the file's size
                missing = {*expected} - {*tensors.keys()}
        elif not start or (start[:2] == b"PK" and not zipfile.is_zipfile(path)):
            raise ModelError.sentence(f"{path} is damaged or cut off.")
    except FileNotFoundError as error:
        raise ModelError.sentence(f"{path} is missing, although the index of weights names it.") from error
    except (SafetensorError, OSError) as error:
        raise ModelError.sentence(f"{path} is damaged or cut off: {first_line(error)}.") from error
    if missing:
        raise ModelError.sentence(f"{path} lacks {min(missing)}, although the index of weights names it.")
