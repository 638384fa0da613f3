"""The joint N:M score of SparseGPT against all sets of a group, and MRP, which refits behind it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rarefy
from models_for_tests import VOCABULARY, make_model
from problems import FAMILIES
from rarefy.errors import PatternError
from rarefy.layer.columns import Columns
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import NM, Fixed, Pattern, PerRow, Unstructured
from rarefy.layer.problem import LayerProblem
from rarefy.methods import build
from rarefy.methods.base import run
from rarefy.methods.compose import Then
from rarefy.methods.mrp import MRP
from rarefy.methods.refit import Backsolve
from rarefy.methods.sparsegpt import MOST_SETS, SparseGPT

JOINT = SparseGPT(score="joint")
#: Two orders of the same sums in float64, at damped problems with a condition of 1e4 at most.
SAME = 1e-9


def draw(family: str, out: int, inputs: int, seed: int = 0) -> LayerProblem:
    W0, H = FAMILIES[family](out, inputs, seed)
    return LayerProblem(W0, Gram.from_matrix(H))


def damped(problem: LayerProblem, damping: float = 0.01) -> Tensor:
    """H with the damping of the method, in its own coordinates."""
    return problem.H + damping * torch.diag(problem.H.diagonal())


def removal_loss(w: Tensor, inverse: Tensor, P: list[int]) -> float:
    """w_P (G_PP)^-1 w_P: what it costs to remove P from a row if all others make up for it."""
    return float(w[P] @ torch.linalg.solve(inverse[P][:, P], w[P]))


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (3, 4), (1, 3), (4, 8)])
@pytest.mark.parametrize("family", ["well_conditioned", "ill_conditioned", "correlated"])
def test_the_first_group_is_the_best_of_all_sets_with_the_full_inverse(family: str, keep: int, of: int) -> None:
    problem = draw(family, 24, 2 * of)
    inverse = torch.linalg.inv(damped(problem))
    mask = run(JOINT, problem, NM(keep, of)).mask
    beaten = 0
    for w, kept, single in zip(problem.W0, mask, run(SparseGPT(), problem, NM(keep, of)).mask, strict=True):
        every = {P: removal_loss(w, inverse, list(P)) for P in itertools.combinations(range(of), of - keep)}
        P = tuple((~kept[:of]).nonzero().squeeze(1).tolist())
        assert every[P] == pytest.approx(min(every.values()), rel=SAME)
        beaten += every[tuple((~single[:of]).nonzero().squeeze(1).tolist())] > every[P]
    if keep < of - 1 and family == "correlated":
        assert beaten  # or the test would say nothing of the interactions


@pytest.mark.parametrize("family", ["ill_conditioned", "correlated"])
def test_where_there_is_one_group_it_is_the_optimum(family: str) -> None:
    problem = draw(family, 12, 4)
    A = LayerProblem(problem.W0, Gram.from_matrix(damped(problem)))
    found = A.objective(run(JOINT, problem, NM(2, 4)).weight)
    losses = torch.full((12,), math.inf, dtype=torch.float64)
    for kept in itertools.combinations(range(4), 2):
        mask = torch.zeros(12, 4, dtype=torch.bool)
        mask[:, kept] = True
        W = run(Then(rarefy.Wanda(), Backsolve()), A, Fixed(mask)).weight
        losses = losses.minimum((((W - A.W0) @ A.H) * (W - A.W0)).sum(dim=1))
    assert found == pytest.approx(float(losses.sum()), rel=SAME)


def test_the_losses_of_the_groups_add_up() -> None:
    """The damped loss of the answer is the sum of the sets' own losses, each at the weights that were there then."""
    problem = draw("correlated", 5, 16)
    A, W, total = damped(problem), problem.W0.clone(), 0.0
    solution = run(JOINT, problem, NM(2, 4))
    for g in range(0, 16, 4):
        inverse = torch.zeros_like(A)
        inverse[g:, g:] = torch.linalg.inv(A[g:, g:])
        for i in range(5):
            P = (g + (~solution.mask[i, g : g + 4]).nonzero().squeeze(1)).tolist()
            total += removal_loss(W[i], inverse, P)
            W[i] -= torch.linalg.solve(inverse[P][:, P], W[i, P]) @ inverse[P]
    torch.testing.assert_close(solution.weight, W * solution.mask, rtol=1e-8, atol=1e-8)
    lost = LayerProblem(problem.W0, Gram.from_matrix(A)).objective(solution.weight)
    assert lost == pytest.approx(total, rel=1e-8)


def test_it_is_better_than_single_scores_in_the_mean() -> None:
    ratio = 0.0
    for seed, pattern in itertools.product(range(4), (NM(2, 4), NM(4, 8))):
        problem = draw("ill_conditioned", 24, 48, seed)
        joint, single = (run(method, problem, pattern).relative_error for method in (JOINT, SparseGPT()))
        ratio += math.log(joint / single) / 8
    assert ratio < -0.02


def test_of_equal_sets_the_first_columns_are_kept() -> None:
    problem = LayerProblem(torch.ones(3, 8), Gram.from_matrix(torch.eye(8)))
    for pattern in (NM(2, 4), NM(3, 8)):
        assert torch.equal(run(JOINT, problem, pattern).mask, pattern.project(torch.zeros(3, 8)))


def test_some_rows_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw("correlated", 13, 16)
    whole = run(JOINT, problem, NM(4, 8))
    monkeypatch.setattr("rarefy.methods.sparsegpt._SCORES", 5 * 70 * 4)
    assert torch.equal(run(JOINT, problem, NM(4, 8)).weight, whole.weight)


def test_group_masks_are_all_there_are_in_the_order_of_ties() -> None:
    for pattern in (NM(2, 4), NM(1, 3), NM(3, 5)):
        masks = pattern.group_masks()
        assert len(masks) == pattern.num_group_masks == len(set(map(tuple, masks.tolist())))
        assert bool((masks.sum(dim=1) == pattern.keep).all())
        assert torch.equal(masks[:1], pattern.project(torch.zeros(1, pattern.of)))
    for other in (Unstructured(0.5), PerRow(0.5), Columns(4), Fixed(torch.ones(1, 4, dtype=torch.bool))):
        assert other.num_group_masks == len(other.group_masks()) == 0


# --- patterns it cannot work with


WRONG: list[tuple[Pattern, str]] = [
    (Unstructured(0.5), "unstructured 50% has no groups"),
    (PerRow(0.5), "row 50% has no groups"),
    (Columns(4), "4 columns has no groups"),
    (NM(8, 16), "8:16 has groups with 12,870"),
]


@pytest.mark.parametrize(("pattern", "words"), WRONG, ids=lambda value: str(value))
def test_patterns_without_such_groups_are_refused_in_one_sentence(pattern: Pattern, words: str) -> None:
    for method in (JOINT, Then(JOINT, Backsolve())):
        with pytest.raises(PatternError) as caught:
            run(method, draw("correlated", 4, 16), pattern)
        assert str(caught.value).startswith("sparsegpt.score is 'joint'")
        assert f"but {words}: it must be N:M with at most {MOST_SETS:,}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_refused_pattern_is_found_before_anything_changes() -> None:
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    windows = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(PatternError, match="no groups"):
        rarefy.prune(model, windows, pattern=Unstructured(0.5), method=JOINT)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_fixed_mask_leaves_nothing_to_choose() -> None:
    problem = draw("correlated", 4, 16)
    allowed = Fixed(run(rarefy.Wanda(), problem, NM(2, 4)).mask)
    assert torch.equal(run(JOINT, problem, allowed).weight, run(SparseGPT(), problem, allowed).weight)


# --- MRP


@pytest.mark.parametrize(
    ("pattern", "recipe", "settings"),
    [
        (NM(2, 4), "sparsegpt+backsolve", {"score": "joint", "sparsegpt.damping": 0.01, "backsolve.damping": 0.01}),
        (Unstructured(0.6), "sparsegpt+backsolve", {"sparsegpt.damping": 0.01, "backsolve.damping": 0.01}),
    ],
    ids=str,
)
def test_its_name_stands_for_its_recipe(pattern: Pattern, recipe: str, settings: dict[str, Any]) -> None:
    problem = draw("correlated", 6, 16)
    named, written = (run(method, problem, pattern) for method in (build("mrp"), build(recipe, settings)))
    assert torch.equal(named.weight, written.weight)
    assert named.relative_error < run(build("sparsegpt"), problem, pattern).relative_error


def test_it_refuses_groups_with_too_many_masks() -> None:
    with pytest.raises(PatternError, match="8:16 has groups with 12,870"):
        run(MRP(), draw("correlated", 4, 16), NM(8, 16))
