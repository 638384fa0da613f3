"""Rounds kept weights to codes of 8 or 4 bits, with a scale for each group of columns of a row.

The nearest code is taken; nothing is compensated (that is a method's business, which knows the layer problem).

8 bits   weight = code * scale, code from -127 to 127, scale = largest / 127
4 bits   weight = (2 code - 15) * scale, code from 0 to 15, scale = largest / 15

``largest`` is the greatest magnitude in the group. Zeros are in the mask, so 4 bits need no code for zero, and all 16
stand for kept weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

#: How many columns share a scale, by bits.
GROUPS = {8: 128, 4: 64}

_LARGEST = {8: 127, 4: 15}


def encode(
    weight: Float[Tensor, "rows width"], bits: int, group: int
) -> tuple[Int[Tensor, "rows width"], Float[Tensor, "rows groups"]]:
    """The nearest code for every weight (int8, or uint8 for 4 bits), and the scales in float16.

    What stands for a zero means nothing. Scales are rounded first, so codes are the nearest for the stored scale.
    """
    rows, width = weight.shape
    groups = -(-width // group)
    filled = torch.zeros(rows, groups * group, device=weight.device)
    filled[:, :width] = weight
    filled = filled.view(rows, groups, group)
    scale = (filled.abs().amax(dim=2) / _LARGEST[bits]).to(torch.float16)
    step = scale.float().unsqueeze(2)
    units = torch.where(step > 0, filled / step, 0.0).view(rows, -1)[:, :width]
    if bits == 8:
        return units.round_().clamp_(-127, 127).to(torch.int8), scale
    return units.add_(15).div_(2).round_().clamp_(0, 15).to(torch.uint8), scale


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
