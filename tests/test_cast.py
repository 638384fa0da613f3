"""A sparse weight in the dtype it is stored in: zeros stay zeros, and what does not fit is counted."""

from __future__ import annotations

import pytest
import torch

from rarefy.layer.cast import round_to


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_fits_is_rounded_and_what_is_pruned_is_plus_zero(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    rounded, overflowed = round_to(weight, mask, dtype)
    assert rounded.dtype == dtype
    assert overflowed == 0
    assert torch.equal(rounded[mask], weight[mask].to(dtype))
    assert not rounded[~mask].any()
    assert not torch.signbit(rounded[~mask]).any()


def test_what_overflows_float16_is_the_largest_number_and_counted() -> None:
    weight = torch.tensor([[65_519.0, 65_520.0, -1e9, 1.0], [7e4, -3.0, 0.0, -65_504.0]])
    mask = torch.tensor([[True] * 4, [False, True, True, True]])
    rounded, overflowed = round_to(weight, mask, torch.float16)
    assert rounded.tolist() == [[65_504.0, 65_504.0, -65_504.0, 1.0], [0.0, -3.0, 0.0, -65_504.0]]
    assert overflowed == 2  # 65,519 is rounded down, and 7e4 is pruned
    assert round_to(weight, mask, torch.bfloat16)[1] == 0


def test_infinity_is_no_overflow() -> None:
    weight = torch.tensor([[torch.inf, 1e6]])
    rounded, overflowed = round_to(weight, torch.ones(1, 2, dtype=torch.bool), torch.float16)
    assert rounded.tolist() == [[float("inf"), 65_504.0]]
    assert overflowed == 1
