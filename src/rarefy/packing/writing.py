"""Writes a checkpoint whose tensors are all known by name, dtype and shape before the first of them is there.

So a file's header comes first and every tensor goes to its place at once, in any order, and no more than one of them
has to be in memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rarefy.errors import OutputError
from rarefy.models.atomic import refusals, replace_file, sync_folder

INDEX = "model.safetensors.index.json"

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Form:
    """What a tensor is like in a file: the format's code for its dtype, its shape, bytes of an element."""

    code: str
    shape: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Form:
        """The form of a tensor of that shape and dtype."""
        return cls(_CODES[dtype], shape, dtype.itemsize)

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.itemsize


class NewShard:
    """A safetensors file that is being written; ``forms`` says what will be in it."""

    def __init__(self, path: Path, forms: Mapping[str, Form]) -> None:
        self.path = path
        # As the format's own library orders them: what has large elements first, so that all are aligned.
        order = sorted(forms, key=lambda name: (-forms[name].itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name in order:
            form, start = forms[name], end
            end += form.size
            header[name] = {"dtype": form.code, "shape": [*form.shape], "data_offsets": [start, end]}
            self._places[name] = start, form.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        with refusals(path), path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Raises OutputError where the disk refuses."""
        self.write_bytes(name, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def write_bytes(self, name: str, content: memoryview, done: int = 0) -> None:
        """Write bytes of a tensor, from its byte ``done`` on. Raises OutputError where the disk refuses."""
        start, size = self._places[name]
        if done + len(content) > size:
            raise ValueError(f"{name} has {size} bytes, and these would be {done + len(content)}.")
        with refusals(self.path), self.path.open("r+b", buffering=0) as file:
            file.seek(self._start + start + done)
            written = 0
            while written < len(content):  # the system writes at most 2 GiB at a time
                written += file.write(content[written:])

    def finish(self) -> None:
        """Bring the file to the disk. Raises OutputError."""
        with refusals(self.path), self.path.open("r+b", buffering=0) as file:
            os.fsync(file.fileno())


def write_index(folder: Path, shards: Mapping[str, Mapping[str, Form]]) -> None:
    """Write the index of several files, by file name. Raises OutputError."""
    weight_map = {name: file for file, forms in shards.items() for name in forms}
    total = sum(form.size for forms in shards.values() for form in forms.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    replace_file(folder / INDEX, (json.dumps(content, indent=2) + "\n").encode())


def check_new(folder: Path) -> None:
    """Raise OutputError unless ``folder`` is new or empty."""
    if folder.is_symlink() and not folder.exists():
        raise OutputError("--output", str(folder), "a folder, not a link to nothing")
    with refusals(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError("--output", str(folder), "a folder, not a file")
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError("--output", str(folder), "a new or empty folder; this one is not empty")


@contextmanager
def new_folder(folder: Path, size: int) -> Iterator[Path]:
    """A temporary sibling, which becomes ``folder`` when the block ends, and only if it ends well.

    ``size`` is how many bytes will be written. What a killed process left of the same folder is removed. Raises
    OutputError where ``folder`` is not new or empty, or the disk has too little space or refuses.
    """
    check_new(folder)
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    with refusals(folder):
        made = [parent for parent in folder.parents if not parent.exists()]
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    try:
        if (free := shutil.disk_usage(partial).free) < size:
            raise OutputError.sentence(
                f"{folder} needs {size / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB left."
            )
        yield partial
        with refusals(folder):
            sync_folder(partial)
            partial.replace(folder)
            sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            if not any(parent.iterdir()):
                parent.rmdir()
        raise
