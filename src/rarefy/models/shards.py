"""Reads single tensors of a safetensors checkpoint, and replaces them in a copy of it.

A safetensors file is a header in JSON, which says where the bytes of each tensor are, and those bytes. So a
tensor is read into memory of its own, without a mapping of the file, whose pages would count as memory of
this process for as long as it is open. And a checkpoint with other values in some of its tensors is a copy
of its files with other bytes in those places: names, dtypes, order, metadata and index stay what they were.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.errors import ModelError, OutputError
from rarefy.models.atomic import CHUNK, copy_file, refusals, remove_partial

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# The format allows no longer header.
_LONGEST_HEADER = 100_000_000
# What the format calls the dtypes that torch has; there are others, which no weight of a dense model has.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: ``size`` bytes from ``start`` on in ``file``, counted from the file's beginning."""

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def known(self) -> bool:
        """Whether torch has the dtype."""
        return self.code in _DTYPES

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in torch. Raises ModelError for one that only the format has."""
        if not self.known:
            raise ModelError.sentence(f"{self.name} in {self.file} is of type {self.code}, which cannot be read.")
        return _DTYPES[self.code]

    def read(self) -> Tensor:
        """The tensor, in memory of its own on the CPU. Raises ModelError where the file has changed."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._read_into(_bytes_of(tensor), 0)
        return tensor

    def same_as(self, other: StoredTensor) -> bool:
        """Whether both are the same tensor, compared in pieces."""
        if (self.code, self.shape) != (other.code, other.shape):
            return False
        piece, piece_of_other = (bytearray(min(CHUNK, self.size)) for _ in range(2))
        for done in range(0, self.size, CHUNK):
            count = min(CHUNK, self.size - done)
            self._read_into(memoryview(piece)[:count], done)
            other._read_into(memoryview(piece_of_other)[:count], done)
            if piece != piece_of_other:
                return False
        return True

    def _read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes from ``offset`` on. Raises ModelError where the file has changed."""
        done = 0
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start + offset)
                while done < len(view):  # the system reads at most 2 GiB at a time
                    count = file.readinto(view[done:])
                    if not count:
                        raise ModelError.sentence(f"{self.file} is cut off: it ends within {self.name}.")
                    done += count
        except FileNotFoundError as error:
            raise ModelError.sentence(f"{self.file} is missing; it was there when the run began.") from error
        except OSError as error:
            raise ModelError.sentence(f"{self.file} cannot be read: {error.strerror or error}.") from error

    def meta(self) -> Tensor:
        """A tensor of the same shape and dtype on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Shards:
    """The files of a checkpoint, in the order in which they are read, and every tensor in them by name."""

    folder: Path
    files: list[Path]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """The checkpoint in ``folder``, of which only the headers are read.

        Raises ModelError where there are no safetensors files, or one is missing or damaged.
        """
        files = _files(folder)
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            for tensor in _header(file):
                if tensor.name in tensors:
                    both = f"{tensors[tensor.name].file.name} and {file.name}"
                    raise ModelError.sentence(f"{tensor.name} is in two files of {folder}: {both}.")
                tensors[tensor.name] = tensor
        return cls(folder, files, tensors)

    @property
    def index(self) -> Path | None:
        """The file that says which tensor is where; None for a checkpoint of one file."""
        return None if self.files == [self.folder / _SINGLE] else self.folder / _INDEX

    @property
    def size(self) -> int:
        """Bytes of all files, the index included."""
        return sum(file.stat().st_size for file in self._all())

    def _all(self) -> list[Path]:
        return [*self.files, *([self.index] if self.index else [])]


class ShardCopies:
    """A copy of a checkpoint in ``folder``, in which tensors are replaced one after the other."""

    def __init__(self, shards: Shards, folder: Path) -> None:
        self.shards = shards
        self.folder = folder
        self._changed: set[Path] = set()

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor is in the copy."""
        original = self.shards.tensors[name]
        return replace(original, file=self.folder / original.file.name)

    @property
    def missing(self) -> list[Path]:
        """The files of the checkpoint of which there is no copy yet."""
        return [file for file in self.shards._all() if not (self.folder / file.name).is_file()]

    def make(self) -> None:
        """Copy the files that are missing; every copy appears whole or not at all.

        Raises OutputError where the disk refuses, or has too little space, which is found before the
        first copy is begun, and for a file that is there but is no copy.
        """
        with refusals(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partial(self.folder)
            missing = self.missing
            needed = sum(file.stat().st_size for file in missing)
            free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OutputError.sentence(
                f"{self.folder} needs {needed / 1e9:.1f} GB for the copy of the model, but its disk has "
                f"{free / 1e9:.1f} GB left."
            )
        for file in missing:
            copy_file(file, self.folder / file.name)
        self.check()

    def check(self) -> None:
        """Raise OutputError unless the copies are there and have the layout of the files they are of."""
        for file in self.shards._all():
            copy = self.folder / file.name
            try:
                alike = _layout(copy) == _layout(file)
            except FileNotFoundError:
                raise OutputError.sentence(f"{copy} is missing, although the unfinished run had made it.") from None
            except OSError as error:
                raise OutputError.sentence(f"{copy} cannot be read: {error.strerror or error}.") from error
            if not alike:
                raise OutputError.sentence(f"{copy} is damaged: it has not the layout of {file}.")

    def write(self, name: str, tensor: Tensor) -> None:
        """Replace one tensor, which must have the shape and the dtype of the one in the file.

        It need not be on the disk before ``sync``. Raises OutputError where the disk refuses.
        """
        stored = self.stored(name)
        if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
            raise ValueError(
                f"{name} is {stored.dtype} {stored.shape} in {stored.file.name}, "
                f"the tensor to write is {tensor.dtype} {tuple(tensor.shape)}."
            )
        view, done = _bytes_of(tensor.detach().cpu().contiguous()), 0
        with refusals(stored.file), stored.file.open("r+b", buffering=0) as file:
            file.seek(stored.start)
            while done < stored.size:
                done += file.write(view[done:])
        self._changed.add(stored.file)

    def sync(self) -> None:
        """Bring all that was written to the disk. Raises OutputError."""
        for copy in sorted(self._changed):
            with refusals(copy), copy.open("r+b", buffering=0) as file:
                os.fsync(file.fileno())
        self._changed.clear()


def _files(folder: Path) -> list[Path]:
    """The files of weights that transformers would read, in its order."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        raise ModelError.sentence(f"{folder} has no safetensors files, and only those can be read in parts.")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names: Iterable[str] = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError.sentence(f"{index} cannot be read as an index of weights.") from error
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise ModelError.sentence(f"{index} names {elsewhere[0]}, which is not in its own folder.")
    return [folder / name for name in names]


def _header(file: Path) -> list[StoredTensor]:
    """The tensors of one file. Raises ModelError where the header is none, or the file is not whole."""
    try:
        content, start = _read_header(file)
        size = file.stat().st_size - start
        header: dict[str, Any] = json.loads(content)
        header.pop("__metadata__", None)
        tensors = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensor = StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)
            count = math.prod(tensor.shape)
            if not 0 <= begin <= end <= size or (tensor.known and tensor.size != count * tensor.dtype.itemsize):
                raise ValueError(f"{name} is not within the file")
            tensors.append(tensor)
    except FileNotFoundError as error:
        raise ModelError.sentence(f"{file} is missing, although the index of weights names it.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError.sentence(f"{file} is damaged or cut off.") from error
    return tensors


def _read_header(file: Path) -> tuple[bytes, int]:
    """The header of a safetensors file, and where its data begin."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError("no header is that long")
        return opened.read(length), 8 + length


def _layout(file: Path) -> tuple[int, bytes]:
    """What a file and a copy with other values have in common: its size, and its header or all of an index."""
    size = file.stat().st_size
    if file.suffix == ".json":
        return size, file.read_bytes()
    try:
        return size, _read_header(file)[0]
    except ValueError:
        return size, b""


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
