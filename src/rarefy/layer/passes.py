"""Passes over matrices that numpy makes several times faster on the CPU than torch, and torch elsewhere.

What they give is what the plain expressions in their docstrings give. ``by_numpy`` is the one place where
the two part: with ``NUMPY`` set to False, the CPU takes the way of all other devices, which is how tests see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NUMPY = True  # False: torch's way everywhere
_DTYPES = (torch.float32, torch.float64, torch.bool)
_ELSEWHERE = 2**24  # entries of a piece where there is no such cache, but each call costs microseconds


def by_numpy(values: Tensor) -> bool:
    """Whether numpy can work on the values where they are."""
    return NUMPY and values.device.type == "cpu" and values.dtype in _DTYPES


def piece(values: Tensor, cached: int) -> int:
    """How many entries to work on at a time: on a CPU ``cached``, which its cache holds, elsewhere many."""
    return cached if values.device.type == "cpu" else _ELSEWHERE


def compare(how: Callable[[Any, Any], Any], values: Tensor, threshold: Tensor | float) -> Bool[Tensor, "*shape"]:
    """Values >= threshold or what else ``how`` says; on the CPU by numpy, whose comparisons are much faster."""
    if not by_numpy(values):
        return cast(Tensor, how(values, threshold))
    other = threshold.detach().numpy() if isinstance(threshold, Tensor) else threshold
    return torch.from_numpy(how(values.detach().numpy(), other))


def finite(values: Float[Tensor, "*shape"]) -> bool:
    """torch.isfinite(values).all()."""
    return bool(np.isfinite(values.detach().numpy()).all() if by_numpy(values) else torch.isfinite(values).all())


def indices(mask: Bool[Tensor, " n"]) -> Int[Tensor, " true"]:
    """Where a vector that is mostly False is True, in order."""
    if not by_numpy(mask):
        return mask.nonzero().squeeze(1)
    array = np.ascontiguousarray(mask.numpy())
    if len(array) % 8:
        return torch.from_numpy(np.flatnonzero(array))
    # Eight bytes at a time where none is True: two thirds of the time of numpy, which takes a tenth of torch's.
    words = array.view(np.uint64)
    eights = np.flatnonzero(words != 0)
    found = np.flatnonzero(words[eights].view(np.bool_))
    return torch.from_numpy(eights[found >> 3] * 8 + (found & 7))


def places(mask: Bool[Tensor, "rows n"]) -> tuple[Int[Tensor, " true"], Int[Tensor, " true"]]:
    """The row and the column of each True, in order."""
    index = indices(mask.reshape(-1))
    row = index.div(mask.shape[1], rounding_mode="floor")
    return row, index - row * mask.shape[1]


def count(mask: Bool[Tensor, "*shape"]) -> int:
    """How many entries are True; numpy counts bytes, torch adds integers, at a hundred times the cost."""
    return int(np.count_nonzero(mask.numpy())) if by_numpy(mask) else int(mask.sum())


def count_rows(mask: Bool[Tensor, "*rows n"]) -> Int[Tensor, "*rows"]:
    """How many entries of each row are True, without a copy of eight bytes an entry."""
    if not by_numpy(mask):
        return mask.sum(dim=-1)
    if mask.numel() == mask.shape[-1]:
        return torch.full(mask.shape[:-1], count(mask))
    return torch.from_numpy(mask.numpy().view(np.uint8).sum(axis=-1, dtype=np.uint32).astype(np.int64))


def apply_mask(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], out: Tensor | None = None
) -> Float[Tensor, "*shape"]:
    """The values where ``mask`` is True, else 0: values * mask, in ``out`` if given.

    numpy multiplies by a mask in a third of torch's time.
    """
    if not by_numpy(values):
        return torch.mul(values, mask, out=out)
    product = torch.empty_like(values) if out is None else out
    np.multiply(values.detach().numpy(), mask.numpy(), out=product.numpy())
    return product


def write_mask_(out: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 where ``mask`` is True, else 0, in ``out``; numpy converts in a third of torch's time."""
    if not by_numpy(out):
        return out.copy_(mask)
    np.copyto(out.numpy(), mask.numpy())
    return out


def first_lowest(values: Float[Tensor, "rows n"]) -> Int[Tensor, " rows"]:
    """values.argmin(dim=1), of equals the first; numpy's is vectorised, unlike torch's (docs/log.md)."""
    if not by_numpy(values):
        return values.argmin(dim=1)
    return torch.from_numpy(values.numpy().argmin(axis=1))


def row_dots(A: Float[Tensor, "rows n"], B: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    """(A * B).sum(dim=1)."""
    if not by_numpy(A):
        dots: Tensor = torch.linalg.vecdot(A, B)
        return dots
    return torch.from_numpy(np.vecdot(A.numpy(), B.numpy()))
