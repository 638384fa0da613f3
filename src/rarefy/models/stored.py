"""Reads single tensors of a checkpoint: where each is in its file, and its bytes when they are asked for.

A safetensors file is a header in JSON, which says where the bytes of each tensor are, and those bytes. So a
tensor is read into memory of its own, without a mapping of the file, whose pages would count as memory of
this process for as long as it is open. A pickled file (.bin) has no such header: torch maps it, and of what is
mapped only the tensor that is asked for is read.
"""

from __future__ import annotations

import json
import math
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.errors import ModelError
from rarefy.models.atomic import CHUNK
from rarefy.models.quiet import first_line

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
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor(ABC):
    """One tensor in a file; ``code`` is its dtype as safetensors calls it, ``size`` its bytes."""

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
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

    def meta(self) -> Tensor:
        """A tensor of the same shape and dtype on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @abstractmethod
    def read(self) -> Tensor:
        """The tensor, in memory of its own on the CPU. Raises ModelError where the file has changed."""

    @abstractmethod
    def read_bytes(self) -> Tensor:
        """Its bytes as they are in the file, one after the other: uint8. Raises ModelError as ``read`` does."""

    def same_as(self, other: StoredTensor) -> bool:
        """Whether both are the same tensor, bit by bit."""
        return (self.code, self.shape) == (other.code, other.shape) and torch.equal(
            self.read_bytes(), other.read_bytes()
        )


@dataclass(frozen=True)
class SafeTensor(StoredTensor):
    """A tensor in a safetensors file: ``size`` bytes from ``start`` on, counted from the file's beginning."""

    start: int

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._read_into(bytes_of(tensor), 0)
        return tensor

    def read_bytes(self) -> Tensor:
        content = torch.empty(self.size, dtype=torch.uint8)
        self._read_into(bytes_of(content), 0)
        return content

    def same_as(self, other: StoredTensor) -> bool:
        """Whether both are the same tensor, compared in pieces."""
        if not isinstance(other, SafeTensor):
            return super().same_as(other)
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


@dataclass(frozen=True)
class PickledTensor(StoredTensor):
    """A tensor in a file that ``torch.save`` wrote."""

    def read(self) -> Tensor:
        return _mapped(self.file)[self.name].clone(memory_format=torch.contiguous_format)

    def read_bytes(self) -> Tensor:
        return self.read().reshape(-1).view(torch.uint8)


def tensors_in(file: Path) -> list[StoredTensor]:
    """The tensors of one file of weights, of which only the header is read.

    Raises ModelError where there is none, or the file is not whole.
    """
    try:
        return _pickled(file) if file.suffix == ".bin" else _header(file)
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError.sentence(f"{file} is missing, although the index of weights names it.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError.sentence(f"{file} is damaged or cut off.") from error


def read_header(file: Path) -> tuple[bytes, int]:
    """The header of a safetensors file, and where its data begin. Raises ValueError, OSError."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError("no header is that long")
        return opened.read(length), 8 + length


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _header(file: Path) -> list[StoredTensor]:
    content, start = read_header(file)
    size = file.stat().st_size - start
    header: dict[str, Any] = json.loads(content)
    header.pop("__metadata__", None)
    tensors: list[StoredTensor] = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensor = SafeTensor(name, file, entry["dtype"], tuple(entry["shape"]), end - begin, start + begin)
        count = math.prod(tensor.shape)
        if not 0 <= begin <= end <= size or (tensor.known and tensor.size != count * tensor.dtype.itemsize):
            raise ValueError(f"{name} is not within the file")
        tensors.append(tensor)
    return tensors


def _pickled(file: Path) -> list[StoredTensor]:
    return [
        PickledTensor(name, file, CODES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.itemsize)
        for name, tensor in _mapped(file).items()
    ]


@lru_cache(maxsize=2)  # a block may be in two files
def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped into memory, or read into it where the pickle is older than torch 1.6."""
    try:
        content = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what damage makes of a pickle is not foreseen
        raise ModelError.sentence(
            f"{file} is damaged, or holds more than tensors ({first_line(error)}): it is not read."
        ) from error
    if not isinstance(content, dict):
        raise ModelError.sentence(f"{file} holds no tensors with names.")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
