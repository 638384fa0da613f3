"""A packed matrix: the weights that are not zero, one after the other, and a mask of one bit a weight.

The format ``bitmap-1``. Of a matrix (rows, width):

values   1-D, row after row: the kept weights in the dtype they had, or codes, two of 4 bits in one uint8
mask     uint8 (rows, ceil(width / 32) * 4): bit c % 8 of byte c / 8 is set where column c is kept
scale    float16 (rows, ceil(width / group)), for codes only (codes.py)

Where a row's values begin is counted in the mask whenever a matrix is loaded, so that a file cannot say it wrongly.
Zeros are found by comparison, so -0.0 becomes 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from rarefy.errors import ModelError
from rarefy.packing import kernel
from rarefy.packing.codes import decode, encode, integers, pair, unpair

FORMAT = "bitmap-1"
#: What is appended to the name of the values.
MASK, SCALE = "_mask", "_scale"

#: Dtypes of weights that can be packed.
PACKABLE = (torch.bfloat16, torch.float16, torch.float32)
# Weights that torch unpacks at a time: enough for its passes, and little memory.
_AT_ONCE = 1 << 22


def mask_bytes(width: int) -> int:
    """Bytes of mask in a row: whole words of 32 columns."""
    return (width + 31) // 32 * 4


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix (rows, ``width``) of which only the weights that are not zero are kept."""

    values: Tensor
    mask: UInt8[Tensor, "rows bytes"]
    width: int
    scale: Float[Tensor, "rows groups"] | None = None
    group: int = 0

    @classmethod
    def pack(cls, weight: Float[Tensor, "rows width"], bits: int | None = None, group: int = 0) -> PackedMatrix:
        """The weight, packed; with ``bits`` its values are rounded to codes, with a scale for each group."""
        kept = weight != 0
        rows, width = weight.shape
        mask = torch.zeros(rows, mask_bytes(width), dtype=torch.uint8)
        packed = np.packbits(kept.cpu().numpy(), axis=1, bitorder="little")
        mask[:, : packed.shape[1]] = torch.from_numpy(packed)
        if bits is None:
            return cls(weight[kept].cpu(), mask, width)
        codes, scale = encode(weight, bits, group)
        values = codes[kept].cpu()
        if bits == 4:
            values = pair(values, kept.sum(dim=1).cpu())
        return cls(values, mask, width, scale.cpu(), group)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.mask.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        tensors = (self.values, self.mask, *([self.scale] if self.scale is not None else []))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @cached_property
    def offsets(self) -> Int64[Tensor, " rows_and_one"]:
        """Where each row's values begin, and where the last one's end. Raises ModelError as ``check`` does."""
        return count_values(self.values, self.mask, self.width)

    def check(self, name: str) -> None:
        """Raise ModelError unless these tensors make a packed matrix, whatever they hold."""
        check_layout(name, self.values, self.mask, self.scale, (self.rows, self.width), self.group)
        count_values(self.values, self.mask, self.width, name)

    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "rows width"]:
        """The dense matrix, on the device of the values.

        ``dtype`` is what codes become, and what other values are cast to; without it, these keep their own.
        """
        wanted = dtype or (self.values.dtype if self.scale is None else torch.float32)
        return unpack(self.values, self.mask, self.offsets, self.scale, self.width, self.group, wanted)


def check_layout(
    name: str, values: Tensor, mask: Tensor, scale: Tensor | None, shape: tuple[int, ...], group: int
) -> None:
    """Raise ModelError unless shapes and dtypes are those of packed matrices (..., rows, width); reads no element."""
    *rows, width = shape
    coded = values.dtype in (torch.int8, torch.uint8)
    if values.ndim != 1 or not (coded or values.dtype in PACKABLE):
        raise _wrong(name, f"its values are {_form(values)}, and must be a row of weights or codes")
    if mask.dtype != torch.uint8 or [*mask.shape] != [*rows, mask_bytes(width)]:
        raise _wrong(name, f"its mask is {_form(mask)}, and must be uint8 {(*rows, mask_bytes(width))}")
    groups = -(-width // group) if group > 0 else 0
    if coded and (scale is None or scale.dtype != torch.float16 or [*scale.shape] != [*rows, groups]):
        given = "missing" if scale is None else _form(scale)
        raise _wrong(name, f"its scales are {given}, and must be float16 {(*rows, groups)}")
    if not coded and scale is not None:
        raise _wrong(name, "it has scales, although its values are no codes")


def count_values(values: Tensor, mask: Tensor, width: int, name: str = "A matrix") -> Int64[Tensor, " rows_and_one"]:
    """Where each row's values begin, counted in the mask. Raises ModelError where there are more or fewer values."""
    unit = 2 if values.dtype == torch.uint8 else 1  # rows of codes of 4 bits begin with a whole byte
    offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int64)
    on_cpu = mask.cpu().contiguous()
    if kernel.library() is not None:
        within = kernel.count(on_cpu, width, unit, offsets)
    else:
        counts = np.bitwise_count(on_cpu.numpy()).sum(axis=1, dtype=np.int64)
        offsets[1:] = torch.from_numpy((counts + unit - 1) // unit * unit).cumsum(0)
        beyond = _bits(on_cpu[:, -4:], 32)[:, width % 32 :] if width % 32 else None
        within = beyond is None or not bool(beyond.any())
    if not within:
        raise _wrong(name, "its mask keeps columns that it does not have")
    claimed, given = int(offsets[-1]), values.numel() * unit
    if claimed != given:
        raise _wrong(name, f"its mask claims {claimed:,} values, but it has {given:,}")
    return offsets.to(mask.device)


def unpack(
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    width: int,
    group: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Float[Tensor, "rows width"]:
    """The dense matrix in ``dtype``; ``out`` is memory for it, of the dtype that ``unpacked_as`` names."""
    rows = mask.shape[0]
    if out is None:
        out = torch.empty(rows, width, dtype=unpacked_as(values.dtype, dtype), device=values.device)
    if values.device.type == "cpu" and kernel.path() is not None:
        kernel.unpack(out, values, mask, offsets, scale, width, group)
    else:
        step = max(1, _AT_ONCE // width)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            kept = _bits(mask[part], width)
            first, end = int(offsets[part.start]), int(offsets[part.stop])
            if scale is None:
                out[part] = torch.zeros_like(out[part]).masked_scatter_(kept, values[first:end])
                continue
            codes = values[first:end] if values.dtype == torch.int8 else _codes(values[first // 2 : end // 2], kept)
            units = torch.zeros(kept.shape, dtype=torch.int8, device=kept.device).masked_scatter_(
                kept, integers(codes)
            )
            out[part] = decode(units, scale[part], group)
    return out.to(dtype)


def unpacked_as(values: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What a matrix with such values is unpacked as, before it is cast to ``dtype``."""
    if values in PACKABLE:
        return values
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _codes(values: Tensor, kept: Tensor) -> Tensor:
    return unpair(values, kept.sum(dim=1))


def _bits(mask: UInt8[Tensor, "rows bytes"], width: int) -> Bool[Tensor, "rows width"]:
    """Which columns are kept."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(2) >> places & 1).flatten(1)[:, :width].bool()


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _wrong(name: str, reason: str) -> ModelError:
    return ModelError.sentence(f"{name} is no packed matrix: {reason}.")
