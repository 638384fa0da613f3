"""Kept weights as codes of 8 or 4 bits, with a scale for each group of columns of a row.

8 bits   weight = code * scale, code from -127 to 127
4 bits   weight = (2 code - 15) * scale, code from 0 to 15

Zeros are in the mask, so 4 bits need no code for zero, and all 16 stand for kept weights. A group that the method
`quantize` has rounded shows its scale (layer/grid.py), and loses nothing. Any other group is rounded to the nearest
code with the scale largest / 127 or largest / 15, where ``largest`` is its greatest magnitude; nothing is compensated
(that is a method's business, which knows the layer problem).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

from rarefy.layer.grid import LARGEST, find_scale, nearest

#: How many columns share a scale where nothing shows it, by bits.
GROUPS = {8: 128, 4: 64}

# Numbers of columns that may share one in a weight that has been rounded, and rows that are looked at to find it.
_WIDTHS, _ROWS = (512, 256, 128, 64), 64


def group_of(weight: Float[Tensor, "rows width"], bits: int) -> int:
    """How many columns share a scale in a weight that has been rounded to ``bits``; else what is usual."""
    for group in _WIDTHS:
        if not find_scale(_grouped(weight[:_ROWS], group), bits).isnan().any():
            return group
    return GROUPS[bits]


def encode(
    weight: Float[Tensor, "rows width"], bits: int, group: int
) -> tuple[Int[Tensor, "rows width"], Float[Tensor, "rows groups"]]:
    """The nearest code for every weight (int8, or uint8 for 4 bits), and the scales in float16.

    What stands for a zero means nothing. Scales are rounded first, so codes are the nearest for the stored scale.
    """
    grouped = _grouped(weight, group)
    scale = (grouped.abs().amax(dim=2) / LARGEST[bits]).to(torch.float16)
    if not find_scale(grouped[:1], bits).isnan().all():  # a row tells whether it is worth while
        shown = find_scale(grouped, bits)
        scale = torch.where(shown == shown.to(torch.float16), shown.to(torch.float16), scale)
    whole = nearest(grouped, scale.float().unsqueeze(2), bits).view(len(weight), -1)[:, : weight.shape[1]]
    return whole.to(torch.int8) if bits == 8 else whole.add_(LARGEST[4]).div_(2).to(torch.uint8), scale


def _grouped(weight: Float[Tensor, "rows width"], group: int) -> Float[Tensor, "rows groups group"]:
    """The weight in float32, its rows filled up with zeros to whole groups."""
    rows, width = weight.shape
    groups = -(-width // group)
    filled = torch.zeros(rows, groups * group, device=weight.device)
    filled[:, :width] = weight
    return filled.view(rows, groups, group)


def integers(codes: Int[Tensor, " count"]) -> Int[Tensor, " count"]:
    """What the scale multiplies, as int8: an 8-bit code itself, 2 code - 15 for one of 4 bits."""
    return codes if codes.dtype == torch.int8 else (2 * codes).to(torch.int8) - 15


def decode(
    units: Int[Tensor, "rows width"], scale: Float[Tensor, "rows groups"], group: int
) -> Float[Tensor, "rows width"]:
    """The weights in float32, from integers (zero where nothing is kept) and scales."""
    return units.float() * scale.float().repeat_interleave(group, dim=1)[:, : units.shape[1]]


def pair(codes: UInt8[Tensor, " count"], counts: Int64[Tensor, " rows"]) -> UInt8[Tensor, " bytes"]:
    """Codes of 4 bits, two in a byte, the first in the low half; each row (``counts``) begins with a whole byte."""
    single = torch.zeros(int(_whole(counts).sum()), dtype=torch.uint8, device=codes.device)
    single[_places(counts)] = codes
    return single[0::2] | single[1::2] << 4


def unpair(values: UInt8[Tensor, " bytes"], counts: Int64[Tensor, " rows"]) -> UInt8[Tensor, " count"]:
    """The codes that ``pair`` put together."""
    return torch.stack([values & 15, values >> 4], dim=1).flatten()[_places(counts)]


def _whole(counts: Int64[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
    return (counts + 1) // 2 * 2


def _places(counts: Int64[Tensor, " rows"]) -> Int64[Tensor, " count"]:
    """Where each code is among those of rows that have been filled up to even numbers."""
    filling = _whole(counts) - counts
    before = filling.cumsum(0) - filling
    return torch.arange(int(counts.sum()), device=counts.device) + before.repeat_interleave(counts)
