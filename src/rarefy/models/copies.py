"""A copy of a checkpoint in which tensors are replaced, one after the other, while a model is pruned.

Where the tensors keep their names, dtypes and shapes, the copy is the checkpoint's files with other bytes in some
places: order, metadata and index stay what they were. Where some do not (another dtype is wanted, or weights are
dequantised, or pickled), the files that hold them are written anew, and all others are copied as they are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rarefy.errors import ModelError, OutputError
from rarefy.models.atomic import copy_file, refusals, remove_partial, replacing
from rarefy.models.settings import read_json
from rarefy.models.shards import Shards
from rarefy.models.stored import SafeTensor, bytes_of, read_header
from rarefy.models.weight_files import INDEX, PICKLED, SAFETENSORS


@dataclass(frozen=True)
class CopiedTensor:
    """A tensor of the copy, which goes into the copy of the checkpoint's ``file``.

    ``make`` gives its values before pruning, ``code`` is its dtype as safetensors calls it. ``same`` says whether
    the checkpoint holds the same bytes, so that they can be copied with their file.
    """

    file: Path
    code: str
    shape: tuple[int, ...]
    size: int
    make: Callable[[], Tensor]
    same: bool = True


def as_it_is(shards: Shards) -> dict[str, CopiedTensor]:
    """All tensors of a checkpoint, to be copied as they are."""
    return {
        name: CopiedTensor(stored.file, stored.code, stored.shape, stored.size, stored.read_bytes)
        for name, stored in shards.tensors.items()
    }


@dataclass(frozen=True)
class _NewFile:
    """A file of the copy: a checkpoint's ``source`` copied, or, with a ``header``, written anew from tensors."""

    source: Path
    tensors: dict[str, SafeTensor]
    header: bytes | None
    size: int


class ShardCopies:
    """A copy of a checkpoint in ``folder``, in which tensors are replaced one after the other.

    ``tensors`` says what the copy holds; without it, what the checkpoint does.
    """

    def __init__(self, shards: Shards, folder: Path, tensors: Mapping[str, CopiedTensor] | None = None) -> None:
        self.shards = shards
        self.folder = folder
        self._content = tensors if tensors is not None else as_it_is(shards)
        used = {tensor.file for tensor in self._content.values()}
        self._files = dict(self._new_file(file) for file in shards.files if file in used)
        self._tensors = {name: tensor for file in self._files.values() for name, tensor in file.tensors.items()}
        self._index = self._new_index()
        self._changed: set[Path] = set()

    @property
    def tensors(self) -> Mapping[str, SafeTensor]:
        """Where every tensor is in the copy, by name."""
        return self._tensors

    def stored(self, name: str) -> SafeTensor:
        """Where a tensor is in the copy."""
        return self._tensors[name]

    @property
    def missing(self) -> list[Path]:
        """The files of the copy that are not there yet."""
        files = [*self._files, *([self._index[0]] if self._index else [])]
        return [file for file in files if not file.is_file()]

    def make(self) -> None:
        """Make the files that are missing; every one appears whole or not at all.

        Raises OutputError where the disk refuses, or has too little space, which is found before the
        first copy is begun, and for a file that is there but is no copy.
        """
        with refusals(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partial(self.folder)
            missing = self.missing
            needed = sum(self._files[file].size for file in missing if file in self._files)
            free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OutputError.sentence(
                f"{self.folder} needs {needed / 1e9:.1f} GB for the copy of the model, but its disk has "
                f"{free / 1e9:.1f} GB left."
            )
        for file in missing:
            self._make(file)
        self.check()

    def check(self) -> None:
        """Raise OutputError unless the copies are there and have the layout that they must have."""
        for copy, file in self._files.items():
            self._check(copy, file.source, _layout, (file.size, _header(file)))
        if self._index:
            copy, content = self._index
            self._check(copy, self.shards.index or copy, Path.read_bytes, content)

    def write(self, name: str, tensor: Tensor) -> None:
        """Replace one tensor, which must have the shape and the dtype of the one in the copy.

        It need not be on the disk before ``sync``. Raises OutputError where the disk refuses.
        """
        stored = self.stored(name)
        if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
            raise ValueError(
                f"{name} is {stored.dtype} {stored.shape} in {stored.file.name}, "
                f"the tensor to write is {tensor.dtype} {tuple(tensor.shape)}."
            )
        view, done = bytes_of(tensor.detach().cpu().contiguous()), 0
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

    # --- Files --------------------------------------------------------------------------------------------

    def _new_file(self, source: Path) -> tuple[Path, _NewFile]:
        """The file of the copy that holds what ``source`` holds."""
        content = {name: tensor for name, tensor in self._content.items() if tensor.file == source}
        copy = self.folder / _safe_name(source.name)
        originals = {name: stored for name, stored in self.shards.tensors.items() if stored.file == source}
        if source.suffix != ".bin" and content.keys() == originals.keys() and all(t.same for t in content.values()):
            tensors = {
                name: SafeTensor(name, copy, stored.code, stored.shape, stored.size, stored.start)
                for name, stored in originals.items()
                if isinstance(stored, SafeTensor)
            }
            return copy, _NewFile(source, tensors, None, source.stat().st_size)
        return copy, _laid_out(source, copy, content)

    def _new_index(self) -> tuple[Path, bytes] | None:
        """The index of the copy, and what it says; None for a copy of one file."""
        index = self.shards.index
        if index is None:
            return None
        if all(file.header is None for file in self._files.values()):
            return self.folder / index.name, index.read_bytes()
        content = read_json(index)
        content["weight_map"] = {name: tensor.file.name for name, tensor in sorted(self._tensors.items())}
        metadata = content.get("metadata")
        total = {"total_size": sum(tensor.size for tensor in self._tensors.values())}
        content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), **total}
        name = _safe_name(index.name.removesuffix(INDEX)) + INDEX
        return self.folder / name, (json.dumps(content, indent=2) + "\n").encode()

    def _make(self, copy: Path) -> None:
        if self._index and copy == self._index[0]:
            with replacing(copy) as written:
                written.write(self._index[1])
            return
        file = self._files[copy]
        if file.header is None:
            copy_file(file.source, copy)
            return
        with replacing(copy) as written:
            written.write(len(file.header).to_bytes(8, "little") + file.header)
            for name, stored in file.tensors.items():
                content = bytes_of(self._content[name].make().contiguous())
                if len(content) != stored.size:
                    raise ValueError(f"{name} takes {len(content)} bytes, not {stored.size}")
                written.write(content)

    def _check(self, copy: Path, source: Path, read: Callable[[Path], object], expected: object) -> None:
        try:
            good = read(copy) == expected
        except FileNotFoundError:
            raise OutputError.sentence(f"{copy} is missing, although the unfinished run had made it.") from None
        except OSError as error:
            raise OutputError.sentence(f"{copy} cannot be read: {error.strerror or error}.") from error
        if not good:
            raise OutputError.sentence(f"{copy} is damaged: it has not the layout of a copy of {source}.")


def _safe_name(name: str) -> str:
    """The name of the copy of a file of weights, which is always safetensors, or of its index without its ending."""
    if not name.endswith(".bin"):
        return name
    stem = name.removesuffix(".bin")
    return SAFETENSORS.removesuffix(".safetensors") + stem.removeprefix(PICKLED.removesuffix(".bin")) + ".safetensors"


def _laid_out(source: Path, copy: Path, content: Mapping[str, CopiedTensor]) -> _NewFile:
    """A file that holds ``content``: tensors of wide dtypes first, so that each begins at a multiple of its width."""
    widths = {name: tensor.size // max(1, torch.Size(tensor.shape).numel()) for name, tensor in content.items()}
    order = sorted(content, key=lambda name: -widths[name])
    header: dict[str, object] = {"__metadata__": _metadata(source) | {"format": "pt"}}
    offsets, offset = {}, 0
    for name in order:
        tensor = content[name]
        offsets[name] = offset
        header[name] = {
            "dtype": tensor.code,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset := offset + tensor.size],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    tensors = {
        name: SafeTensor(
            name, copy, content[name].code, content[name].shape, content[name].size, start + offsets[name]
        )
        for name in order
    }
    return _NewFile(source, tensors, text, start + offset)


def _metadata(source: Path) -> dict[str, str]:
    """The metadata of a safetensors file; none of a pickled one."""
    if source.suffix == ".bin" or not source.is_file():
        return {}
    try:
        said = json.loads(read_header(source)[0]).get("__metadata__")
    except (OSError, ValueError) as error:
        raise ModelError.sentence(f"{source} cannot be read; it could when the run began.") from error
    return {str(key): str(value) for key, value in said.items()} if isinstance(said, dict) else {}


def _header(file: _NewFile) -> bytes:
    if file.header is not None:
        return file.header
    try:
        return read_header(file.source)[0]
    except (OSError, ValueError) as error:
        raise ModelError.sentence(f"{file.source} cannot be read; it could when the run began.") from error


def _layout(file: Path) -> tuple[int, bytes]:
    """The size and the header of a file, in which a copy with other values equals it."""
    size = file.stat().st_size
    try:
        return size, read_header(file)[0]
    except ValueError:
        return size, b""
