"""A packed weight: what is not zero, one after the other, and a mask of one bit a weight.

The format ``bitmap-1``. Of a weight (..., rows, width), which is one matrix or a stack of them, the tensors are

NAME        1-D, row after row: the kept weights in the dtype they had, or codes, two of 4 bits in one uint8
NAME_mask   uint8 (..., rows, ceil(width / 32) * 4): bit c % 8 of byte c / 8 is set where column c is kept
NAME_scale  float16 (..., rows, ceil(width / group)), for codes only (codes.py)
NAME_check  int64 (1): the xxh3 of the bytes of the others, in this order

Where a row's values begin is counted in the mask whenever a weight is loaded, so that a file cannot say it wrongly.
The checksum is there because of the mask: one bit in the wrong place moves all values behind it in the row. Zeros are
found by comparison, so -0.0 becomes 0.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from rarefy.errors import ModelError
from rarefy.packing import kernel
from rarefy.packing.codes import decode, encode, integers, pair, unpair

FORMAT = "bitmap-1"
#: What is appended to the name of the values.
MASK, SCALE, CHECK = "_mask", "_scale", "_check"
ENDINGS = ("", MASK, SCALE, CHECK)

#: Dtypes of weights that can be packed.
PACKABLE = (torch.bfloat16, torch.float16, torch.float32)
# Weights that torch unpacks at a time: enough for its passes, and little memory.
_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Matrices of ``shape`` (..., rows, width) of which only the weights that are not zero are kept."""

    values: Tensor
    mask: UInt8[Tensor, "*rows bytes"]
    shape: tuple[int, ...]
    scale: Float[Tensor, "*rows groups"] | None = None
    group: int = 0

    @classmethod
    def pack(cls, weight: Float[Tensor, "*rows width"], bits: int | None = None, group: int = 0) -> PackedWeight:
        """The weight, packed; with ``bits`` its values are rounded to codes, with a scale for each group."""
        shape = tuple(weight.shape)
        flat = weight.reshape(-1, shape[-1])
        kept = flat != 0
        mask = torch.zeros(len(flat), mask_bytes(shape[-1]), dtype=torch.uint8)
        packed = np.packbits(kept.cpu().numpy(), axis=1, bitorder="little")
        mask[:, : packed.shape[1]] = torch.from_numpy(packed)
        mask = mask.view(*shape[:-1], -1)
        if bits is None:
            return cls(flat[kept].cpu(), mask, shape)
        codes, scale = encode(flat, bits, group)
        values = codes[kept].cpu()
        if bits == 4:
            values = pair(values, kept.sum(dim=1).cpu())
        return cls(values, mask, shape, scale.cpu().view(*shape[:-1], -1), group)

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...], group: int) -> PackedWeight:
        """A weight of that shape, from its tensors by ending. Raises ModelError where these do not fit.

        No element is read, so they may be on the meta device.
        """
        if missing := [end for end in ("", MASK, CHECK) if end not in tensors]:
            raise ModelError.sentence(f"{name} is damaged: there is no {name}{missing[0]}.")
        scale = tensors.get(SCALE)
        weight = cls(tensors[""], tensors[MASK], shape, scale, 0 if scale is None else group)
        if reason := weight._misfit():
            raise _wrong(name, reason)
        check = tensors[CHECK]
        if check.dtype != torch.int64 or tuple(check.shape) != (1,):
            raise _wrong(name, f"its checksum is {_form(check)}, and must be int64 (1,)")
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes of values, mask and scales."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._data())

    @cached_property
    def offsets(self) -> Int64[Tensor, " rows_and_one"]:
        """Where the values of each row of each matrix begin, and where the last one's end; it is ``counted``."""
        return self.counted("A weight")

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by ending."""
        tensors = {"": self.values, MASK: self.mask, CHECK: self.checksum()}
        return tensors if self.scale is None else {**tensors, SCALE: self.scale}

    def checksum(self) -> Int64[Tensor, "1"]:
        """The xxh3 of all bytes; nothing on the meta device."""
        if self.values.device.type == "meta":
            return torch.empty(1, dtype=torch.int64, device="meta")
        total = xxhash.xxh3_64()
        for tensor in self._data():
            total.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return torch.from_numpy(np.array([total.intdigest()], dtype=np.uint64).view(np.int64))

    def verify(self, name: str, checksum: Tensor) -> None:
        """Raise ModelError unless the bytes are those that the checksum was made of."""
        if not torch.equal(self.checksum(), checksum.cpu()):
            raise _wrong(name, "its bytes have changed since its checksum was made")

    def counted(self, name: str) -> Int64[Tensor, " rows_and_one"]:
        """Where the values of each row of each matrix begin, counted in the mask, and where the last one's end.

        Raises ModelError where the mask keeps more or fewer weights than there are values, or columns beyond the
        width.
        """
        unit = 2 if self.values.dtype == torch.uint8 else 1  # rows of codes of 4 bits begin with a whole byte
        width, mask = self.shape[-1], self.mask.flatten(0, -2).cpu().contiguous()
        offsets = torch.zeros(len(mask) + 1, dtype=torch.int64)
        if kernel.library() is not None:
            within = kernel.count(mask, width, unit, offsets)
        else:
            counts = np.bitwise_count(mask.numpy()).sum(axis=1, dtype=np.int64)
            offsets[1:] = torch.from_numpy((counts + unit - 1) // unit * unit).cumsum(0)
            within = not width % 32 or not bool(_bits(mask[:, -4:], 32)[:, width % 32 :].any())
        if not within:
            raise _wrong(name, "its mask keeps columns that it does not have")
        claimed, given = int(offsets[-1]), self.values.numel() * unit
        if claimed != given:
            raise _wrong(name, f"its mask claims {claimed:,} values, but it has {given:,}")
        return offsets.to(self.mask.device)

    def unpack(self, dtype: torch.dtype | None = None, offsets: Tensor | None = None) -> Float[Tensor, "*rows width"]:
        """The dense weight, on the device of the values.

        ``dtype`` is what codes become, and what other values are cast to; without it, these keep their own.
        ``offsets`` where they are known already.
        """
        wanted = dtype or (self.values.dtype if self.scale is None else torch.float32)
        scale = None if self.scale is None else self.scale.flatten(0, -2)
        offsets = self.offsets if offsets is None else offsets
        mask = self.mask.flatten(0, -2)
        return unpack(self.values, mask, offsets, scale, self.shape[-1], self.group, wanted).view(self.shape)

    def _data(self) -> list[Tensor]:
        return [self.values, self.mask, *([] if self.scale is None else [self.scale])]

    def _misfit(self) -> str:
        """What is wrong with the shapes and dtypes."""
        values, mask, scale = self.values, self.mask, self.scale
        *rows, width = self.shape
        coded = values.dtype in (torch.int8, torch.uint8)
        groups = -(-width // self.group) if self.group > 0 else 0
        if values.ndim != 1 or not (coded or values.dtype in PACKABLE):
            return f"its values are {_form(values)}, and must be a row of weights or codes"
        if mask.dtype != torch.uint8 or [*mask.shape] != [*rows, mask_bytes(width)]:
            return f"its mask is {_form(mask)}, and must be uint8 {(*rows, mask_bytes(width))}"
        if coded and scale is None:
            return "its values are codes, but it has no scales"
        if scale is not None and not coded:
            return "it has scales, but its values are no codes"
        if scale is not None and (scale.dtype != torch.float16 or [*scale.shape] != [*rows, groups]):
            return f"its scales are {_form(scale)}, and must be float16 {(*rows, groups)}"
        return ""


def mask_bytes(width: int) -> int:
    """Bytes of mask in a row: whole words of 32 columns."""
    return (width + 31) // 32 * 4


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
    return ModelError.sentence(f"{name} is no packed weight: {reason}.")
