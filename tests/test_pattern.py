"""Patterns: exact counts, the best allowed mask, exact slices, and errors that say what is allowed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.errors import PatternError
from rarefy.layer.pattern import NM, Fixed, Pattern, PerRow, Unstructured

SHAPE = (6, 24)


def scores(shape: tuple[int, int] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs()


def some_mask(shape: tuple[int, int] = SHAPE) -> Tensor:
    """Rows of unlike counts: the first is empty, the second full."""
    mask = scores(shape, seed=9) > 0.7
    mask[0], mask[1] = False, True
    return mask


def patterns(shape: tuple[int, int] = SHAPE) -> dict[str, Pattern]:
    return {
        "layer 0": Unstructured(0.0),
        "layer 0.37": Unstructured(0.37),
        "layer 0.999": Unstructured(0.999),
        "row 0.37": PerRow(0.37),
        "row 0.99": PerRow(0.99),
        "2:4": NM(2, 4),
        "1:3": NM(1, 3),
        "5:12": NM(5, 12),
        "fixed": Fixed(some_mask(shape)),
    }


NAMES = list(patterns())


# --- counts


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.1, 0.25, 0.3, 0.5, 2 / 3, 0.7, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 24), (1, 13), (13, 1)])
def test_counts_round_once(sparsity: float, shape: tuple[int, int]) -> None:
    out, inputs = shape
    assert Unstructured(sparsity).count(shape) == out * inputs - round(sparsity * out * inputs)
    assert PerRow(sparsity).count(shape) == out * (inputs - round(sparsity * inputs))


def test_counts_of_groups_and_masks() -> None:
    assert NM(2, 4).count((3, 8)) == 12
    assert NM(1, 3).count((5, 9)) == 15
    assert Fixed(some_mask()).count(SHAPE) == int(some_mask().sum())


@pytest.mark.parametrize("name", NAMES)
def test_project_has_the_exact_count_and_is_allowed(name: str) -> None:
    pattern = patterns()[name]
    for values in (scores(), torch.zeros(SHAPE), torch.ones(SHAPE), scores() * 1e-300, scores().float() * 1e30):
        before = values.clone()
        mask = pattern.project(values)
        assert mask.dtype == torch.bool
        assert mask.shape == SHAPE
        assert int(mask.sum()) == pattern.count(SHAPE)
        pattern.check(mask)
        assert torch.equal(values, before)
    size = SHAPE[0] * SHAPE[1]
    assert pattern.sparsity_of(SHAPE) == pytest.approx(1 - pattern.count(SHAPE) / size)


@pytest.mark.parametrize("pattern", [Unstructured(0.4), PerRow(0.5), NM(1, 2), NM(3, 4)], ids=str)
def test_project_has_the_largest_sum_of_scores(pattern: Pattern) -> None:
    values = scores((2, 4))

    def allowed(mask: Tensor) -> bool:
        try:
            pattern.check(mask)
        except PatternError:
            return False
        return True

    masks = [torch.tensor(bits).view(2, 4) for bits in itertools.product((True, False), repeat=8)]
    best = max(float(values[mask].sum()) for mask in masks if allowed(mask))
    assert float(values[pattern.project(values)].sum()) == pytest.approx(best)


def test_ties_keep_the_lowest_index() -> None:
    ones = torch.ones(2, 4)
    assert Unstructured(0.5).project(ones).tolist() == [[True] * 4, [False] * 4]
    assert PerRow(0.5).project(ones).tolist() == [[True, True, False, False]] * 2
    assert NM(1, 2).project(ones).tolist() == [[True, False, True, False]] * 2


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fixed"])
def test_locked_entries_are_kept_first(name: str) -> None:
    pattern, values = patterns()[name], scores()
    # The worst mask is allowed, so a part of it can be locked.
    locked = pattern.project(-values) & (scores(seed=1) > 0.8)
    mask = pattern.project(values, locked)
    pattern.check(mask)
    assert bool((mask | ~locked).all())
    if not locked.any():
        assert torch.equal(mask, pattern.project(values))


# --- slices


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_budgets_of_slices_all_reduce_grams(name: str, by: str) -> None:
    pattern = patterns()[name]
    length = SHAPE[by == "columns"]
    cuts = [0, 12, 24] if by == "columns" else [0, 1, 4, 6]
    total = 0
    for a, b in itertools.pairwise(cuts):
        part = pattern.columns(a, b, SHAPE) if by == "columns" else pattern.rows(a, b, SHAPE)
        shape = (SHAPE[0], b - a) if by == "columns" else (b - a, SHAPE[1])
        count = part.count(shape)
        assert 0 <= count <= shape[0] * shape[1]
        values = scores()[:, a:b] if by == "columns" else scores()[a:b]
        part.check(part.project(values))
        # cumulative floors: a slice never strays from its fair share by more than one (per row)
        if name != "fixed":
            fair = pattern.count(SHAPE) * (b - a) / length
            assert abs(count - fair) <= (SHAPE[0] if name.startswith("row") else 1)
        total += count
    assert total == pattern.count(SHAPE)


def test_every_cut_of_every_length_adds_up() -> None:
    for pattern, width in itertools.product((Unstructured(0.63), PerRow(0.63)), (1, 5, 7, 23)):
        counts = [
            pattern.columns(a, min(a + width, 24), SHAPE).count((6, min(a + width, 24) - a))
            for a in range(0, 24, width)
        ]
        assert sum(counts) == pattern.count(SHAPE)


def test_row_slices_of_independent_rows_are_the_rows_of_the_whole() -> None:
    for name, pattern in patterns().items():
        if pattern.rows_independent:
            parts = [pattern.rows(a, a + 2, SHAPE).project(scores()[a : a + 2]) for a in (0, 2, 4)]
            assert torch.equal(torch.cat(parts), pattern.project(scores())), name
    assert not Unstructured(0.5).rows_independent


def test_groups_are_never_cut() -> None:
    assert NM(2, 4).group == 4
    assert NM(2, 4).columns(4, 12, SHAPE).count((6, 8)) == 24
    for a, b in ((0, 6), (2, 8)):
        with pytest.raises(PatternError, match="cut a group of 2:4"):
            NM(2, 4).columns(a, b, SHAPE)


# --- on the way


@pytest.mark.parametrize("name", NAMES)
def test_gradual_masks_contain_an_allowed_mask(name: str) -> None:
    pattern, values = patterns()[name], scores()
    size = SHAPE[0] * SHAPE[1]
    counts = []
    for share in (0.0, 0.2, 0.7, 0.9, 1.0):
        step = pattern.at(share)
        step.validate(SHAPE)
        mask = step.project(values)
        assert int(mask.sum()) == step.count(SHAPE)
        assert bool((mask | ~pattern.project(values)).all()), share
        counts.append(int(mask.sum()))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == pattern.count(SHAPE)
    if name != "fixed":  # a fixed mask is itself from the start
        assert counts[0] == size
    assert torch.equal(pattern.at(1.0).project(values), pattern.project(values))


def test_gradual_groups_prune_the_rest_by_one_threshold() -> None:
    values = torch.tensor([[9.0, 8.0, 1.0, 7.0], [6.0, 5.0, 4.0, 3.0]])
    mask = NM(2, 4).at(0.5).project(values)  # 2 of the 4 zeros: the lowest unprotected, 1 and 3
    assert mask.tolist() == [[True, True, False, True], [True, True, True, False]]
    assert not NM(2, 4).at(0.5).rows_independent
    for cut in (NM(2, 4).at(0.5).rows, NM(2, 4).at(0.5).columns):
        with pytest.raises(PatternError, match="cannot be cut"):
            cut(0, 1, (2, 4))


# --- checks


def test_check_names_what_is_wrong() -> None:
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :4] = True
    Unstructured(0.5).check(mask)
    PerRow(0.5).check(mask)
    with pytest.raises(PatternError, match=r"^Group 0 of row 0 keeps 4 weights, but 2:4 keeps 2\.$"):
        NM(2, 4).check(mask)
    with pytest.raises(PatternError, match=r"^The mask keeps 8 weights, but unstructured 25% keeps 12\.$"):
        Unstructured(0.25).check(mask)
    moved = mask.clone()
    moved[0, 0], moved[1, 7] = False, True
    Unstructured(0.5).check(moved)
    with pytest.raises(PatternError, match=r"^Row 0 of the mask keeps 3 weights, but row 50% keeps 4\.$"):
        PerRow(0.5).check(moved)
    Fixed(mask).check(mask)
    with pytest.raises(PatternError, match="differs from the fixed mask"):
        Fixed(mask).check(moved)


def test_a_width_that_the_group_does_not_divide_names_the_layer() -> None:
    with pytest.raises(
        PatternError, match=r"^pattern is 2:5, but model\.q_proj has 8 inputs, which 5 does not divide\.$"
    ):
        NM(2, 5).validate((4, 8), "model.q_proj")
    for refused in (lambda: NM(2, 5).count((4, 8)), lambda: NM(2, 5).project(torch.ones(4, 8))):
        with pytest.raises(PatternError, match="5 does not divide"):
            refused()
    NM(2, 5).validate((4, 10))


def test_a_fixed_mask_fits_one_shape() -> None:
    with pytest.raises(PatternError, match=r"shape \(6, 24\), but model\.o_proj has shape \(6, 12\)"):
        Fixed(some_mask()).validate((6, 12), "model.o_proj")
    with pytest.raises(PatternError, match="mask"):
        Fixed(torch.ones(2, 3))
    with pytest.raises(PatternError, match="mask"):
        Fixed(torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("kind", [Unstructured, PerRow])
@pytest.mark.parametrize("sparsity", [math.nan, math.inf, 1.0, 1, 1.5, -0.1, True, False, "0.5", "half", None, [0.5]])
def test_impossible_sparsities(kind: Any, sparsity: object) -> None:
    with pytest.raises(PatternError, match=r"sparsity is .*, but must be a number in \[0, 1\)"):
        kind(sparsity)


@pytest.mark.parametrize(("keep", "of"), [(4, 2), (0, 4), (2, 0), (4, 4), (-1, 4), (1.0, 2), ("2", 4), (2, -4)])
def test_impossible_groups(keep: Any, of: Any) -> None:
    with pytest.raises(PatternError, match=f"pattern is '{keep}:{of}', but must be N:M with 1 <= N < M"):
        NM(keep, of)


def test_names() -> None:
    assert [str(p) for p in (Unstructured(0.5), PerRow(0.625), NM(2, 4))] == ["unstructured 50%", "row 62.5%", "2:4"]
    assert str(Fixed(some_mask())).startswith("fixed")
