"""Patterns: exact counts, the best allowed mask, exact slices, and errors that say what is allowed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.errors import PatternError
from rarefy.layer.pattern import NM, Fixed, Pattern, PerRow, Unstructured, pattern_from_spec

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


# --- what a search for a mask needs


def sets_of(pattern: Pattern, shape: tuple[int, int]) -> list[tuple[Tensor, int]]:
    """The sets of entries that the pattern counts, as masks, and how many of each may be kept."""
    index = torch.arange(shape[0] * shape[1]).view(shape)
    if isinstance(pattern, PerRow):
        label, most = index // shape[1], pattern.count(shape) // shape[0]
    elif isinstance(pattern, NM):
        label, most = index // pattern.of, pattern.keep
    else:
        label, most = index * 0, pattern.count(shape)
    return [(label == value, most) for value in label.unique()]


SEARCHED = [Unstructured(0.4), PerRow(0.5), NM(1, 2), NM(2, 4), NM(3, 4), NM(1, 8)]


@pytest.mark.parametrize("pattern", SEARCHED, ids=str)
@pytest.mark.parametrize("kind", ["normal", "few values", "all equal", "none positive"])
def test_fill_is_the_best_of_all_masks_with_at_most_as_many(pattern: Pattern, kind: str) -> None:
    shape = (1, 8)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind != "normal":
            values = {"few values": values.round(), "all equal": values * 0 + 0.5, "none positive": -values.abs()}[
                kind
            ]
        locked = pattern.surest(pattern.project(values), torch.rand(shape, generator=generator), 0.5)
        before = values.clone()
        found = pattern.fill(values, locked)
        assert torch.equal(values, before)
        assert bool((found | ~locked).all())
        sets = sets_of(pattern, shape)
        masks = (torch.tensor(bits).view(shape) for bits in itertools.product((True, False), repeat=8))
        allowed = [
            mask
            for mask in masks
            if bool((mask | ~locked).all()) and all(int((mask & one).sum()) <= most for one, most in sets)
        ]
        assert all(int((found & one).sum()) <= most for one, most in sets)
        assert float(values[found].sum()) == pytest.approx(max(float(values[mask].sum()) for mask in allowed))
        assert bool((values[found & ~locked] > 0).all())


@pytest.mark.parametrize("pattern", SEARCHED, ids=str)
def test_fill_takes_the_first_of_equals_and_no_more_than_there_is_room_for(pattern: Pattern) -> None:
    ones = torch.ones(3, 8)
    nothing = torch.zeros(3, 8, dtype=torch.bool)
    assert torch.equal(pattern.fill(ones, nothing), pattern.project(ones))
    assert not pattern.fill(-ones, nothing).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_the_surest_part_of_a_mask_has_the_highest_scores(name: str, share: float) -> None:
    pattern, values = patterns()[name], scores()
    mask = pattern.project(scores(seed=4))  # not the mask of these scores
    surest = pattern.surest(mask, values, share)
    assert bool((mask | ~surest).all())
    for one, most in [(torch.ones_like(mask), int(mask.sum()))] if name == "fixed" else sets_of(pattern, SHAPE):
        if isinstance(pattern, NM):
            assert int((surest & one).sum()) <= max(1, most - 1)
        else:
            assert int((surest & one).sum()) == math.floor(share * most)
    if isinstance(pattern, NM):
        most = max(1, pattern.keep - 1) * mask.numel() // pattern.of
        assert int(surest.sum()) == min(math.floor(share * int(mask.sum())), most)
    left = mask & ~surest
    if surest.any() and left.any() and isinstance(pattern, (Unstructured, Fixed)):
        assert float(values[surest].min()) >= float(values[left].max())


def test_of_a_group_the_surest_are_its_highest() -> None:
    values = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]])
    mask = NM(2, 4).project(values)
    assert NM(2, 4).surest(mask, values, 0.25).nonzero()[:, 1].tolist() == [0]
    assert NM(2, 4).surest(mask, values, 0.5).nonzero()[:, 1].tolist() == [0, 4]
    assert NM(2, 4).surest(mask, values, 1.0).nonzero()[:, 1].tolist() == [0, 4]
    assert NM(1, 4).surest(NM(1, 4).project(values), values, 0.5).nonzero()[:, 1].tolist() == [0]


def test_where_there_is_a_choice_and_how_far_a_start_is_trusted() -> None:
    assert not Fixed(some_mask()).has_choice
    for name, pattern in patterns().items():
        assert pattern.has_choice is (name != "fixed")
        assert 0 <= pattern.trust <= 1


# --- slices


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_budgets_of_slices_add_up(name: str, by: str) -> None:
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


def test_gradual_groups_prune_what_is_small_beside_their_protected_ones() -> None:
    # 8 is protected and 7 near it; 0.4 is small, but near 0.5
    values = torch.tensor([[9.0, 8.0, 1.0, 7.0, 0.6, 0.5, 0.4, 0.3]])
    mask = NM(2, 4).at(0.5).project(values)  # 2 of the 4 zeros: those of ratio 1 / 8 and 3 / 5
    assert mask.tolist() == [[True, True, False, True, True, True, True, False]]
    assert NM(2, 4).at(0.25).project(values).tolist() == [[True, True, False, *[True] * 5]]
    for factor in (1e-30, 1e30):  # a group's own scale does not count
        scale = torch.tensor([1.0] * 4 + [factor] * 4)
        assert torch.equal(NM(2, 4).at(0.5).project(values * scale), mask)
    two = torch.cat([values, values.flip(1)])  # and of every row the same number
    assert NM(2, 4).at(0.5).project(two).sum(dim=1).tolist() == [6, 6]
    assert NM(2, 4).at(0.5).rows_independent
    assert torch.equal(NM(2, 4).at(0.5).rows(1, 2, (2, 8)).project(two[1:]), NM(2, 4).at(0.5).project(two)[1:])
    with pytest.raises(PatternError, match="cannot be cut"):
        NM(2, 4).at(0.5).columns(0, 4, (2, 8))


def test_gradual_groups_of_zeros() -> None:
    mask = NM(2, 4).at(0.5).project(torch.tensor([[0.0] * 4 + [4.0, 3.0, 2.0, 1.0]]))
    assert mask.tolist() == [[True, True, False, False, *[True] * 4]]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fixed"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_gradual_masks_keep_what_is_locked(name: str, share: float) -> None:
    pattern, values = patterns()[name], scores()
    locked = pattern.project(-values) & (scores(seed=1) > 0.8)  # of the worst mask
    mask = pattern.at(share).project(values, locked)
    assert bool((mask | ~locked).all())
    assert int(mask.sum()) == pattern.at(share).count(SHAPE)
    final = pattern.project(values, locked)
    assert bool((mask | ~final).all())


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
    fewer = mask.clone()
    fewer[1, 0] = False
    with pytest.raises(PatternError, match=r"^Row 1 of the mask keeps 3 weights, but row 50% keeps 4\.$"):
        PerRow(0.5).check(fewer)
    more = mask.clone()
    more[1, 7] = True
    with pytest.raises(PatternError, match=r"^Row 1 of the mask keeps 5 weights, but row 50% keeps 4\.$"):
        PerRow(0.5).check(more)
    assert [*PerRow(0.5).excess(mask), *PerRow(0.5).excess(fewer)] == []
    assert [*PerRow(0.5).excess(more)][1:] == ["1 of its 2 rows hold more than 4 non-zero weights"]
    groups = torch.tensor([[True, True, False, False, True, False, False, False]])
    with pytest.raises(PatternError, match=r"^Group 1 of row 0 keeps 1 weights, but 2:4 keeps 2\.$"):
        NM(2, 4).check(groups)
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


@pytest.mark.parametrize("pattern", [Unstructured(0.6), PerRow(0.25), NM(2, 4), NM(3, 8)], ids=str)
def test_a_pattern_is_made_again_from_its_spec(pattern: Pattern) -> None:
    assert pattern_from_spec(pattern.spec()) == pattern
