"""What numpy does on the CPU is what the plain expressions of torch give."""

from __future__ import annotations

from operator import eq, ge, gt

import pytest
import torch
from torch import Tensor

from rarefy.layer import passes

DTYPES = [torch.float64, torch.float32, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("checked_shapes")


@pytest.fixture(autouse=True, params=["numpy", "torch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything twice: as on the CPU, and as on all other devices."""
    monkeypatch.setattr(passes, "NUMPY", request.param == "numpy")


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values, whose matrix does not stand by rows, and a mask with rows of all and of none."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-3, 4, (9, 6), generator=generator).to(dtype).T
    mask = torch.rand(6, 9, generator=generator) > 0.4
    mask[0], mask[1] = True, False
    return values, mask


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_takes_values_away(dtype: torch.dtype) -> None:
    values, mask = draw(dtype)
    expected = torch.where(mask, values, torch.zeros_like(values))
    assert torch.equal(passes.apply_mask(values, mask), expected)
    out = torch.full_like(values, torch.nan)
    assert passes.apply_mask(values, mask, out=out) is out
    assert torch.equal(out, expected)
    passes.apply_mask(values, mask, out=values)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_becomes_numbers(dtype: torch.dtype) -> None:
    values, mask = draw(dtype)
    assert passes.write_mask_(values, mask) is values
    assert torch.equal(values, mask.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_comparisons_counts_and_places(dtype: torch.dtype) -> None:
    values, mask = draw(dtype)
    for how in (eq, ge, gt):
        assert torch.equal(passes.compare(how, values, 1.0), how(values, 1.0))
        assert torch.equal(passes.compare(how, values, values[:, :1]), how(values, values[:, :1]))
    assert passes.count(mask) == int(mask.sum())
    assert passes.count_rows(mask).tolist() == mask.sum(dim=1).tolist()
    assert passes.count_rows(mask[:1]).tolist() == [9]
    assert passes.count_rows(torch.ones(2, 70_000, dtype=torch.bool)).tolist() == [70_000, 70_000]
    row, column = passes.places(mask)
    assert [row.tolist(), column.tolist()] == mask.nonzero().T.tolist()


@pytest.mark.parametrize("length", [1, 8, 61, 64, 4096])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_where_a_vector_is_true(length: int, share: float) -> None:
    mask = torch.rand(length + 3, generator=torch.Generator().manual_seed(length)) < share
    for part in (mask[:length], mask[3:], mask[::2]):  # also out of step with the words of the machine
        assert passes.indices(part).tolist() == part.nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stain", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_found(dtype: torch.dtype, stain: float) -> None:
    values, _ = draw(dtype)
    assert passes.finite(values)
    values[4, 5] = stain
    assert not passes.finite(values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dots_of_rows(dtype: torch.dtype) -> None:
    values, mask = draw(dtype)
    assert torch.equal(passes.row_dots(values, mask.to(dtype)), (values * mask).sum(dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_of_each_row(dtype: torch.dtype) -> None:
    values, _ = draw(dtype)
    values = values.contiguous()
    values[2] = 1  # of equals the first
    expected = [row.index(min(row)) for row in values.tolist()]
    assert passes.first_lowest(values).tolist() == expected


def test_by_numpy_tells_the_ways_apart() -> None:
    assert passes.by_numpy(torch.ones(2)) is passes.by_numpy(torch.ones(2) > 0) is passes.NUMPY
    assert not passes.by_numpy(torch.ones(2, dtype=torch.bfloat16))
