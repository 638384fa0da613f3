"""Rounds a sparse weight to the dtype in which it is stored, and says how many numbers did not fit."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.layer.passes import finite


def round_to(
    weight: Float[Tensor, "out inputs"], mask: Bool[Tensor, "out inputs"], dtype: torch.dtype
) -> tuple[Float[Tensor, "out inputs"], int]:
    """The weight in ``dtype``, +0 where ``mask`` is False, and how many of its finite numbers overflowed.

    What would become infinite, from 65,520 on in float16, becomes the largest finite number of its sign instead.
    """
    kept = torch.where(mask, weight, 0)
    rounded = kept.to(dtype)
    if finite(rounded):
        return rounded, 0
    largest = torch.finfo(dtype).max
    overflowed = rounded.isinf() & kept.isfinite()
    return torch.where(overflowed, kept.sign().to(dtype) * largest, rounded), int(overflowed.sum())
