"""Grids that kept weights are rounded to: whole numbers of 8 or 4 bits times a scale that few bits hold.

    8 bits   w = n scale,  n = -127, -126, ..., 127,  scale = 2^e              a kept weight may become 0
    4 bits   w = n scale,  n = -15, -13, ..., 15,     scale = m 2^e, m = 8..15   16 numbers, and none of them is 0

Every such w has at most 8 significant bits, so bfloat16 holds it exactly, and what was rounded once can be found
again in a checkpoint by ``find_scale``: nothing has to be stored beside the weights. Zeros are no weights of a grid,
they are the mask's. Scales of 8 bits are coarse: a step is up to twice what 127 steps to the largest weight would be.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

#: The greatest whole number, by bits.
LARGEST = {8: 127, 4: 15}

# A scale of 4 bits has this many significant bits, so that with the 4 of its whole number there are 8.
_SIGNIFICANT = 4
# So many scales of 4 bits are tried for a group.
_TRIED = 4


def nearest(w: Float[Tensor, "..."], scale: Float[Tensor, "..."], bits: int) -> Float[Tensor, "..."]:
    """The whole numbers n for which n * scale is nearest to w, as floats; for a scale of 0 those of w = 0.

    Ties go to the even number of 8 bits, and to that of every other one of 4 bits.
    """
    n = torch.where(scale > 0, w / scale, 0)
    if bits == 8:
        return n.round_().clamp_(-LARGEST[8], LARGEST[8])
    return n.add_(LARGEST[4]).div_(2).round_().clamp_(0, LARGEST[4]).mul_(2).sub_(LARGEST[4])


def scales(largest: Float[Tensor, "*groups"], bits: int) -> list[Float[Tensor, "*groups"]]:
    """The scales to choose from for groups whose largest magnitudes are given, the greatest first.

    The first is the least that reaches the largest weight. With 16 numbers only, it can be better to miss that one

    """
    mantissa, exponent = torch.frexp(largest / LARGEST[bits])  # mantissa in [1/2, 1), or 0
    if bits == 8:
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        return [torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 0)]
    units = 2**_SIGNIFICANT
    first, found = torch.ceil(mantissa * units), []  # 8 to 16
    for fewer in range(_TRIED):
        m = first - fewer
        doubled = m < units // 2  # the next smaller power of two
        m = torch.where(doubled, m + units // 2, m)
        found.append(torch.where(largest > 0, torch.ldexp(m / units, exponent - doubled.to(exponent.dtype)), 0))
    return found


def choose_scale(
    w: Float[Tensor, "*groups size"], importance: Float[Tensor, "*groups size"], bits: int
) -> Float[Tensor, "*groups"]:
    """Of ``scales`` the one with the least sum of ``importance`` times squared error, the greatest of equal ones."""
    best, least = None, None
    for scale in scales(w.abs().amax(dim=-1), bits):
        step = scale.unsqueeze(-1)
        error = (nearest(w, step, bits) * step - w).square_().mul_(importance).sum(dim=-1)
        if best is None or least is None:
            best, least = scale, error
        else:
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    assert best is not None
    return best


def find_scale(w: Float[Tensor, "*groups size"], bits: int) -> Float[Tensor, "*groups"]:
    """A scale of which all weights of a group that are not 0 are whole numbers; NaN where there is none.

    Zeros do not matter. A group of zeros has the scale 0.
    """
    largest = w.abs().amax(dim=-1)
    if bits == 8:
        (scale,) = scales(largest, 8)  # weights of a greater power of two are whole numbers of this one too
        candidates = [scale]
    else:
        candidates = [_short(largest / n) for n in range(LARGEST[4], 0, -2)]
    found = torch.full_like(largest, torch.nan)
    for scale in reversed(candidates):
        step = scale.unsqueeze(-1)
        fits = ((w == 0) | (nearest(w, step, bits) * step == w)).all(dim=-1)
        found = torch.where(fits, scale, found)
    return found


def _short(scale: Float[Tensor, "*groups"]) -> Float[Tensor, "*groups"]:
    """The nearest number of as few significant bits as a scale has."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**_SIGNIFICANT).round_() / 2**_SIGNIFICANT, exponent)
