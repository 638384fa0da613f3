"""Removing columns: the pattern, the choice with interactions, the exact refit, all against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import rarefy.layer.removal as removal
from problems import FAMILIES
from rarefy.errors import PatternError
from rarefy.layer.columns import Columns
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import Fixed, pattern_from_spec
from rarefy.layer.problem import LayerProblem
from rarefy.layer.removal import choose_columns, refit_columns, removal_costs, remove_columns
from rarefy.methods.admm import ADMM
from rarefy.methods.base import run
from rarefy.methods.compose import Then
from rarefy.methods.dsnot import DSnoT
from rarefy.methods.magnitude import Magnitude
from rarefy.methods.refit import PCG, Backsolve
from rarefy.methods.swaps import Swaps
from rarefy.methods.wanda import Wanda

OUT, INPUTS = 5, 8
# Two ways to one number in float64, of problems with conditions up to 1e6.
SAME: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9}
REGULAR = ("well_conditioned", "correlated", "diagonal", "ill_conditioned")


def draw(family: str, seed: int = 0, out: int = OUT, inputs: int = INPUTS) -> LayerProblem:
    W0, H = FAMILIES[family](out, inputs, seed)
    return LayerProblem(W0, Gram.from_matrix(H))


def closed_form(problem: LayerProblem, kept: Tensor) -> float:
    """tr(W0_P [(H^-1)_PP]^-1 W0_P^T), the loss of removing the columns P."""
    inverse = torch.linalg.inv(problem.H)
    W_P = problem.W0[:, ~kept]
    return float((W_P @ torch.linalg.inv(inverse[~kept][:, ~kept]) * W_P).sum())


def all_choices(groups: int, keep: int, group: int) -> list[Tensor]:
    masks = []
    for chosen in itertools.combinations(range(groups), keep):
        mask = torch.zeros(groups, dtype=torch.bool)
        mask[list(chosen)] = True
        masks.append(mask.repeat_interleave(group))
    return masks


# --- the refit, and the cost of a removal


@pytest.mark.parametrize("family", REGULAR)
def test_the_refit_is_the_best_answer_on_its_columns(family: str) -> None:
    problem = draw(family)
    for kept in all_choices(INPUTS, 5, 1)[::7]:
        weight, damping = refit_columns(problem, kept, damping=0.0)
        assert damping == 0
        assert not weight[:, ~kept].any()
        assert problem.objective(weight) == pytest.approx(closed_form(problem, kept), rel=1e-6)
        row_by_row = run(Then(Wanda(), Backsolve()), problem, Fixed(kept.expand(OUT, INPUTS).contiguous()))
        torch.testing.assert_close(weight, row_by_row.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("family", REGULAR)
def test_the_cost_of_one_removal_is_the_closed_form(family: str, group: int) -> None:
    problem = draw(family)
    costs = removal_costs(problem, group, damping=0.0)
    for index, cost in enumerate(costs):
        kept = torch.ones(INPUTS, dtype=torch.bool)
        kept[index * group : (index + 1) * group] = False
        assert float(cost) == pytest.approx(closed_form(problem, kept), rel=1e-6)
    if group == 1:
        expected = problem.W0.square().sum(dim=0) / torch.linalg.inv(problem.H).diagonal()
        torch.testing.assert_close(costs, expected, rtol=1e-6, atol=0)


def test_damping_is_that_of_the_damped_problem() -> None:
    problem = draw("correlated")
    scaled = problem.scaled
    A = scaled.A + 0.3 * torch.eye(INPUTS)
    damped = LayerProblem(problem.W0, Gram.from_matrix(A * scaled.s.outer(scaled.s)))
    kept = all_choices(INPUTS, 5, 1)[11]
    torch.testing.assert_close(refit_columns(problem, kept, 0.3)[0], refit_columns(damped, kept, 0.0)[0], **SAME)
    torch.testing.assert_close(removal_costs(problem, 2, 0.3), removal_costs(damped, 2, 0.0), **SAME)


# --- the choice


@pytest.mark.parametrize(("group", "keep"), [(1, 6), (1, 4), (1, 2), (2, 4), (2, 6), (4, 4)])
@pytest.mark.parametrize("family", REGULAR)
def test_the_choice_is_near_the_best_of_all_and_below_single_scores(family: str, group: int, keep: int) -> None:
    ratios, single_ratios = [], []
    for seed in range(3):
        problem = draw(family, seed)
        best = min(closed_form(problem, kept) for kept in all_choices(INPUTS // group, keep // group, group))
        found = remove_columns(problem, Columns(keep, group), damping=0.0)
        Columns(keep, group).check(found.mask)
        loss = problem.objective(found.weight)
        assert loss >= best * (1 - 1e-6)
        ratios.append(loss / best)
        costs = removal_costs(problem, group, damping=0.0)
        order = costs.argsort(descending=True)[: keep // group]
        single = torch.zeros(INPUTS // group, dtype=torch.bool)
        single[order] = True
        single_ratios.append(closed_form(problem, single.repeat_interleave(group)) / best)
    # Where no exchange of one pair is better, it is nearly always the best; single scores are up to several times it.
    assert max(ratios) <= 1.5, ratios
    assert sum(ratio < 1 + 1e-6 for ratio in ratios) >= 2, ratios
    assert sum(ratios) <= sum(single_ratios) * (1 + 1e-6)


@pytest.mark.parametrize("group", [1, 3])
def test_exchanges_lower_the_loss_and_end_where_none_does(group: int) -> None:
    for seed in range(3):
        problem = draw("correlated", seed, out=6, inputs=24)
        pattern = Columns(12, group)
        greedy = choose_columns(problem, pattern, 0.0, max_swaps=0)
        found = choose_columns(problem, pattern, 0.0)
        loss = closed_form(problem, found)
        assert loss <= closed_form(problem, greedy) * (1 + 1e-9)
        groups = found.view(-1, group).any(dim=1)
        removed = [index for index in range(len(groups)) if not groups[index]]
        if len(removed) <= removal._TRIES:
            for p, q in itertools.product(removed, [index for index in range(len(groups)) if groups[index]]):
                other = groups.clone()
                other[p], other[q] = True, False
                assert closed_form(problem, other.repeat_interleave(group)) >= loss * (1 - 1e-6)


def test_updates_that_wait_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw("correlated", 1, out=6, inputs=48)
    lazy = choose_columns(problem, Columns(16))
    monkeypatch.setattr(removal, "_STALE", 1)
    assert torch.equal(choose_columns(problem, Columns(16)), lazy)


def test_of_equal_columns_the_first_are_kept() -> None:
    problem = LayerProblem(torch.ones(3, 8, dtype=torch.float64), Gram.from_matrix(torch.eye(8, dtype=torch.float64)))
    assert choose_columns(problem, Columns(3)).tolist() == [True] * 3 + [False] * 5
    assert choose_columns(problem, Columns(4, 2)).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_family_gets_an_answer(family: str, dtype: torch.dtype) -> None:
    W0, H = FAMILIES[family](OUT, 24, 0)
    problem = LayerProblem(W0.to(dtype), Gram.from_matrix(H.to(dtype)))
    for pattern in (Columns(10), Columns(12, 4), Columns(24), Columns(0)):
        found = remove_columns(problem, pattern)
        pattern.check(found.mask)
        assert found.weight.dtype == dtype
        assert bool(found.weight.isfinite().all())
        assert not found.weight[~found.mask].any()
        assert problem.relative_error(found.weight) <= 1 + 1e-6
    torch.testing.assert_close(remove_columns(problem, Columns(24)).weight, problem.W0, rtol=1e-5, atol=1e-6)


def test_dead_inputs_go_first() -> None:
    problem = draw("dead_columns")
    kept = choose_columns(problem, Columns(INPUTS - 2))
    assert torch.equal(kept, ~problem.dead)


# --- the pattern


def test_counts_and_projection() -> None:
    scores = torch.tensor([[1.0, 5, 2, 2], [1, 0, 2, 2]])
    assert Columns(2).project(scores).tolist() == [[False, True, True, False]] * 2
    assert Columns(2, 2).project(scores).tolist() == [[False, False, True, True]] * 2
    assert Columns(2).count((3, 4)) == 6
    assert Columns(2).sparsity_of((3, 4)) == 0.5
    assert Columns(2, 2).project(torch.ones(2, 6)).tolist() == [[True, True] + [False] * 4] * 2
    locked = torch.zeros(2, 4, dtype=torch.bool)
    locked[1, 0] = True
    assert Columns(2).project(scores, locked).tolist() == [[True, True, False, False]] * 2
    # One weight of a group locks the group; one non-zero weight breaks the promise that it is gone.
    assert Columns(2, 2).project(scores, locked).tolist() == [[True, True, False, False]] * 2
    assert list(Columns(2, 2).excess(torch.tensor([[True, False, False, True]]))) != []


@pytest.mark.parametrize(("keep", "group"), [(3, 1), (4, 2)])
def test_projection_and_filling_are_the_best_of_all(keep: int, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        scores = torch.randn(3, 8, generator=generator, dtype=torch.float64)
        masks = [mask.expand(3, 8) for mask in all_choices(8 // group, keep // group, group)]
        best = max(float(scores[mask].sum()) for mask in masks)
        assert float(scores[Columns(keep, group).project(scores)].sum()) == pytest.approx(best)
        best = max(float(scores[mask].clamp_min(0).sum()) for mask in masks)
        filled = Columns(keep, group).fill(scores, torch.zeros(3, 8, dtype=torch.bool))
        assert float(scores[filled].sum()) == pytest.approx(best)
        mask = Columns(keep, group).project(scores)
        surest = Columns(keep, group).surest(mask, scores, 0.5)
        assert bool((mask | ~surest).all())
        Columns(keep // group // 2 * group, group).check(surest)


def test_on_the_way_and_in_slices() -> None:
    values = torch.rand(3, 24, generator=torch.Generator().manual_seed(0))
    for pattern in (Columns(6), Columns(8, 4)):
        counts = []
        for share in (0.0, 0.3, 0.7, 1.0):
            mask = pattern.at(share).project(values)
            pattern.at(share).check(mask)
            assert bool((mask | ~pattern.project(values)).all())
            counts.append(int(mask[0].sum()))
        assert counts[0] == 24
        assert counts[-1] == pattern.keep
        assert counts == sorted(counts, reverse=True)
        parts = [pattern.columns(a, a + 8, (3, 24)).count((3, 8)) for a in (0, 8, 16)]
        assert sum(parts) == pattern.count((3, 24))
    with pytest.raises(PatternError, match="cut a group"):
        Columns(8, 4).columns(0, 6, (3, 24))


def test_the_spec_gives_the_pattern_again() -> None:
    for pattern in (Columns(6), Columns(8, 4)):
        assert pattern_from_spec(pattern.spec()) == pattern
    assert Columns(6).at(0.5).spec() == {}
    with pytest.raises(PatternError, match="of kind columns with keep and group"):
        pattern_from_spec({"kind": "columns", "keep": 3})
    with pytest.raises(PatternError, match="keep is 3, but must be a multiple of 2"):
        pattern_from_spec({"kind": "columns", "keep": 3, "group": 2})


def test_what_is_wrong_is_named() -> None:
    mask = Columns(2).project(torch.rand(3, 6))
    Columns(2).check(mask)
    with pytest.raises(PatternError, match=r"^The mask keeps 6 weights, but 3 columns keeps 9\.$"):
        Columns(3).check(mask)
    uneven = mask.clone()
    uneven[2] = mask[2].roll(1)
    with pytest.raises(PatternError, match=r"^Row 2 of the mask keeps other columns than row 0"):
        Columns(2).check(uneven)
    part = torch.tensor([[True, False, True, False]])
    with pytest.raises(PatternError, match="a part of a group"):
        Columns(2, 2).check(part)
    with pytest.raises(PatternError, match=r"but model\.o_proj has 6 inputs, which 4 does not divide\.$"):
        Columns(4, 4).validate((3, 6), "model.o_proj")
    with pytest.raises(PatternError, match=r"but model\.o_proj has only 6 inputs\.$"):
        Columns(8, 2).validate((3, 6), "model.o_proj")
    assert list(Columns(2).excess(mask)) == []
    assert list(Columns(1).excess(mask)) == ["2 of its columns hold non-zero weights, promised were 1"]
    for keep, group in ((-1, 1), (3, 2), (2.0, 1), (True, 1), (2, 0), (2, 1.0)):
        with pytest.raises(PatternError):
            Columns(keep, group)  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="depends on the shape"):
        Columns(2).nominal_sparsity()


# --- methods


@pytest.mark.parametrize("method", [Swaps(), DSnoT()], ids=str)
def test_methods_that_treat_rows_apart_refuse(method: Any) -> None:
    with pytest.raises(PatternError, match="one mask for all rows"):
        run(Then(Wanda(), method), draw("correlated"), Columns(4))


def test_the_choice_with_interactions_is_better_than_that_of_scores() -> None:
    ours = others = 1.0
    for seed in range(5):
        problem = draw("correlated", seed, out=12, inputs=24)
        ours *= problem.relative_error(remove_columns(problem, Columns(14), damping=0.0).weight)
        for method in (Magnitude(), Wanda(), ADMM()):
            solution = run(Then(method, PCG(steps=60)), problem, Columns(14))
            assert solution.relative_error >= problem.relative_error(
                refit_columns(problem, solution.mask[0], 0.0)[0]
            ) * (1 - 1e-6)
        others *= run(Then(Wanda(), PCG(steps=60)), problem, Columns(14)).relative_error
    assert ours < others
