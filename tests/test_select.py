"""Keeping the k largest: exact counts, ties to the lowest index, the same mask as a stable sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.layer import passes, select
from rarefy.layer.select import keep_at_least, keep_largest, keep_largest_in_groups, kth_largest

DTYPES = [torch.float64, torch.float32, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("checked_shapes")


def by_stable_sort(scores: Tensor, k: int) -> Tensor:
    """The definition: sort downwards, equals in the order of their index, keep the first k."""
    order = scores.double().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :k], True)


@pytest.fixture(autouse=True, params=["numpy", "torch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything twice: as on the CPU, and as on all other devices."""
    monkeypatch.setattr(passes, "NUMPY", request.param == "numpy")


def draw(kind: str, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if kind == "few values":  # most entries are tied with many others
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)
    if kind == "all equal":
        return torch.full(shape, 0.25, dtype=dtype)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "mostly lowest":  # what a sparse weight looks like
        scores = torch.where(scores < 0.5, -1.0, scores).to(dtype)
    if kind == "infinities":  # what locked entries look like
        scores[..., 3:8] = torch.inf
    return scores


KINDS = ["normal", "few values", "all equal", "mostly lowest", "infinities"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kth_largest_is_the_sorted_one(kind: str, dtype: torch.dtype) -> None:
    scores = draw(kind, dtype, 5, 17)
    before = scores.clone()
    for k in (1, 2, 9, 17):
        expected = scores.sort(dim=-1, descending=True).values[:, k - 1]
        assert torch.equal(kth_largest(scores, k), expected)
        assert torch.equal(kth_largest(scores[2], k), expected[2])
    assert torch.equal(scores, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_keep_largest_is_a_stable_sort(kind: str, dtype: torch.dtype) -> None:
    scores = draw(kind, dtype, 6, 13)
    for k in range(14):
        mask = keep_largest(scores, k)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, by_stable_sort(scores, k)), k
        assert torch.equal(keep_largest(scores[0], k), by_stable_sort(scores[0], k)), k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", [1, 5, 30])
def test_equals_are_looked_for_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, ties: int
) -> None:
    scores = draw(kind, dtype, 6, 13)
    monkeypatch.setattr(select, "_TIES", ties)
    for k in (1, 4, 9, 12):
        assert torch.equal(keep_largest(scores, k), by_stable_sort(scores, k)), k
        assert torch.equal(keep_largest(scores.view(-1), 5 * k), by_stable_sort(scores.view(-1), 5 * k)), k


@pytest.mark.parametrize("rows", [1, 600])
def test_a_sparse_weight_is_pruned_again_in_little_memory(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Places are whole numbers of eight bytes: they are never of more than some entries at a time."""
    seen = []

    def places(mask: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(mask.numel())
        return passes.places(mask)

    monkeypatch.setattr(select, "places", places)
    scores = draw("normal", torch.float32, rows, 600_000 // rows).relu()  # half of them are 0
    mask = keep_largest(scores, int(0.7 * scores.shape[1]))
    assert int(mask.sum()) == rows * int(0.7 * scores.shape[1])
    assert seen
    assert max(seen) <= select._TIES


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_threshold_keeps_no_more_than_k_of_any_row(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3, 2, 2, 2, 1], [9, 1, 1, 1, 1], [2, 2, 0, 0, 2]], dtype=dtype)
    kept = keep_at_least(scores, torch.tensor([[2.0], [5.0], [2.0]], dtype=dtype), 2)
    assert kept.int().tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert torch.equal(keep_at_least(scores[1:2], torch.tensor([[5.0]], dtype=dtype), 2), kept[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_of_many_values_only_some_are_put_in_order(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    scores = draw(kind, dtype, 10_000)
    expected = scores.sort(descending=True).values
    monkeypatch.setattr("rarefy.layer.select._MANY", 1)
    monkeypatch.setattr("rarefy.layer.select._SAMPLE", 1000)
    monkeypatch.setattr("rarefy.layer.select._CHUNK", 3000)
    for k in (1, 2, 300, 5000, 9_990, 10_000):
        assert torch.equal(kth_largest(scores, k), expected[k - 1])
        assert torch.equal(kth_largest(scores.view(1, -1), k), expected[k - 1 : k])


def test_a_sample_that_misleads_costs_only_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.layer.select._MANY", 1)
    monkeypatch.setattr("rarefy.layer.select._SAMPLE", 1000)
    scores = torch.arange(10_000.0)
    scores[::11] = 0.5  # all that the sample sees
    assert float(kth_largest(scores, 100)) == float(scores.sort(descending=True).values[99])


def test_keep_largest_beyond_both_ends() -> None:
    scores = draw("normal", torch.float32, 2, 5)
    assert not keep_largest(scores, 0).any()
    assert not keep_largest(scores, -1).any()
    assert keep_largest(scores, 5).all()
    assert keep_largest(scores, 6).all()


def test_equal_scores_keep_the_lowest_index() -> None:
    assert keep_largest(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]
    assert keep_largest(torch.zeros(2, 4), 3).tolist() == [[True, True, True, False]] * 2
    # a tie in one row only: the other rows are not touched by its repair
    mixed = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert keep_largest(mixed, 2).tolist() == [[True, False, True, False], [True, True, False, False]]


def test_zero_and_minus_zero_are_tied() -> None:
    assert keep_largest(torch.tensor([-0.0, 0.0, -0.0]), 1).tolist() == [True, False, False]


def test_scores_need_not_be_contiguous() -> None:
    scores = draw("normal", torch.float64, 11, 8).T
    assert torch.equal(keep_largest(scores, 4), by_stable_sort(scores.contiguous(), 4))
    assert torch.equal(
        keep_largest_in_groups(scores[:, :9], 1, 3), keep_largest_in_groups(scores[:, :9].clone(), 1, 3)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keep", "of"), [(1, 2), (2, 4), (1, 3), (4, 8), (7, 8), (3, 9), (8, 16)])
def test_groups_are_sorted_one_by_one(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, keep: int, of: int
) -> None:
    scores = draw(kind, dtype, 4, 144)
    before = scores.clone()
    expected = by_stable_sort(scores.unflatten(1, (-1, of)), keep).flatten(1)
    assert torch.equal(keep_largest_in_groups(scores, keep, of), expected)
    monkeypatch.setattr(select, "_GROUPS", 4 * of)  # a few groups at a time
    assert torch.equal(keep_largest_in_groups(scores, keep, of), expected)
    assert torch.equal(scores, before)


def test_equal_scores_in_a_group_keep_the_lowest_index() -> None:
    for keep, of in ((2, 4), (5, 12)):  # by comparisons, by sorting
        mask = keep_largest_in_groups(torch.ones(1, 2 * of), keep, of)
        assert mask.tolist() == [([True] * keep + [False] * (of - keep)) * 2]
