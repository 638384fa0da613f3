"""GGUF files: checks that they are whole, and lets transformers read them in a fraction of the time.

transformers has the knowledge of which tensor of which architecture goes where, so Rarefy leaves the
reading to it. Its way there is long: for the 94 MiB of SmolLM2 it walks through the vocabulary three
times with several numpy slices per word, and builds the table of tensor names once per module (397
times). ``quick_reading`` spares both, and with them about 20 of 24 seconds on two cores.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.errors import ModelError


def check_gguf(path: Path) -> None:
    """Raises ModelError unless ``path`` is a GGUF file with all of its tensors; reads no tensor."""
    try:
        _Reader(path)
    except Exception as error:
        # The reader does not foresee damage; what it raises depends on where the file ends.
        reason = str(error) or type(error).__name__
        raise ModelError.sentence(f"{path} is no GGUF file, or is damaged or cut off: {reason}.") from error


def tensors_beyond(path: Path, num_blocks: int) -> list[str]:
    """The tensors of a GGUF file that belong to blocks after the model's, such as layers for speculation."""
    beyond = []
    for tensor in _Reader(path).tensors:
        kind, _, rest = tensor.name.partition(".")
        number = rest.partition(".")[0]
        if kind == "blk" and number.isdigit() and int(number) >= num_blocks:
            beyond.append(tensor.name)
    return beyond


#: The types of blocks that hold an exact zero wherever a weight was zero: floats, and grids that are symmetric about
#: it. The others, such as Q4_K, Q5_K and Q4_1, put a scale's offset in its place.
KEEP_ZEROS = frozenset({"F64", "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q4_0", "Q3_K", "MXFP4", "TQ2_0"})

_ROUTER = "ffn_gate_inp"


def block_matrices(path: Path) -> Iterator[tuple[str, str, Float[Tensor, "out in"]]]:
    """Every matrix in the blocks of a GGUF file: its name there, the type of its blocks, and its weights in float32.

    Matrices of a stack of experts come one by one, under the stack's name and their number. Routers are left out.
    Raises ModelError where the file is damaged, or holds a type that the ``gguf`` package cannot read.
    """
    check_gguf(path)
    for tensor in _Reader(path).tensors:
        name = tensor.name.removesuffix(".weight")
        if not name.startswith("blk.") or name == tensor.name or len(tensor.shape) < 2 or _ROUTER in name:
            continue
        kind = tensor.tensor_type.name
        try:
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError.sentence(f"{name} in {path} is of type {kind}, which cannot be read.") from error
        numbered = [("", weights)] if weights.ndim == 2 else [(f".{i}", matrix) for i, matrix in enumerate(weights)]
        for number, matrix in numbered:
            yield name + number, kind, torch.tensor(matrix)  # of its own: the file's memory cannot be written


@contextmanager
def quick_reading() -> Iterator[None]:
    """Within the scope, transformers reads GGUF files quickly and without its progress bar.

    Replaces two functions of the ``gguf`` package and standard error while it lasts. What transformers
    gets is the same; should another release of it look elsewhere, it is slow again and nothing else.
    """
    replaced: dict[str, Any] = {"GGUFReader": _Reader, "get_tensor_name_map": gguf.get_tensor_name_map}
    originals = {name: getattr(gguf, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(gguf, name, cache(function))
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


class _Reader(gguf.GGUFReader):
    """The package's reader, with arrays of metadata read in one go.

    Where the file ends within an array, the array is shorter, and what should follow it is missing.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = self._get(orig_offs, "uint32")
        count = self._get(orig_offs + 4, "uint64")
        item, length = gguf.GGUFValueType(kind[0]), int(count[0])
        start = orig_offs + 12
        values: list[Any]
        if item == gguf.GGUFValueType.STRING:
            values, end = self._strings(start, length)
        elif item in self.gguf_scalar_to_np:
            flat = self._get(start, self.gguf_scalar_to_np[item], length)
            values, end = list(flat.reshape(-1, 1)), start + flat.nbytes
        else:
            raise ValueError(f"its metadata has an array of type {item}")
        types = [gguf.GGUFValueType.ARRAY, item] if length else [gguf.GGUFValueType.ARRAY]
        return end - orig_offs, [kind, count, *values], list(range(2, 2 + len(values))), types

    def _strings(self, offset: int, number: int) -> tuple[list[bytes], int]:
        """``number`` strings that are stored from ``offset`` on, and the offset just after them."""
        length = struct.Struct(">Q" if self.endianess == gguf.GGUFEndian.BIG else "<Q")
        data: Any = self.data
        raw = memoryview(data)
        strings = []
        for _ in range(number):
            (size,) = length.unpack_from(raw, offset)
            start, offset = offset + length.size, offset + length.size + size
            strings.append(bytes(raw[start:offset]))
        return strings, offset
