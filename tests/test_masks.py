"""SparseFW, Swaps and DSnoT: agreement with the reference, monotonicity, exact counts, edge cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from problems import FAMILIES, INPUTS
from rarefy.errors import InputError, MethodError
from rarefy.layer import passes
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import NM, Fixed, Pattern, PerRow, Unstructured
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution, Status
from rarefy.methods.base import Method, run
from rarefy.methods.dsnot import DSnoT
from rarefy.methods.magnitude import Magnitude
from rarefy.methods.sparsefw import SparseFW
from rarefy.methods.swaps import Swaps
from rarefy.methods.wanda import Wanda

OUT, INPUTS_ = 12, 24
# Hard choices fork on rounding: in float32 another mask of nearly the same loss may be found.
FLOAT32_ERROR = 0.03
# The loss of a mask in float32 against its loss in float64.
FLOAT32_ROUNDING = 1e-5

_CHECKERBOARD = (torch.arange(OUT)[:, None] + torch.arange(INPUTS_)) % 3 > 0
PATTERNS: dict[str, tuple[Pattern, tuple[Any, ...]]] = {
    "layer": (Unstructured(0.6), ("layer", 0.6)),
    "row": (PerRow(0.6), ("row", 0.6)),
    "2:4": (NM(2, 4), ("nm", 2, 4)),
    "1:3": (NM(1, 3), ("nm", 1, 3)),
    "fixed": (Fixed(_CHECKERBOARD), ("fixed", _CHECKERBOARD)),
}


def _fw(**settings: Any) -> tuple[Method, Callable[..., tuple[Tensor, Tensor]]]:
    def slow(W0: Tensor, H: Tensor, pattern: tuple[Any, ...], X: Tensor) -> tuple[Tensor, Tensor]:
        renamed = {"start": settings.get("warm_start", "wanda"), "step": settings["rule"][:4]}
        others = {key: settings[key] for key in ("steps", "alpha", "offset") if key in settings}
        return reference.sparsefw(W0, H, pattern, **renamed, **others)

    return SparseFW(**settings), slow


def _swaps() -> tuple[Method, Callable[..., tuple[Tensor, Tensor]]]:
    return Swaps(), lambda W0, H, pattern, X: reference.swaps(W0, H, pattern)


def _dsnot(threshold: float) -> tuple[Method, Callable[..., tuple[Tensor, Tensor]]]:
    def slow(W0: Tensor, H: Tensor, pattern: tuple[Any, ...], X: Tensor) -> tuple[Tensor, Tensor]:
        enough = threshold * ((W0 @ H * W0).sum(dim=1) / len(X)).sqrt()
        return reference.dsnot(
            W0, H, pattern, mean=X.mean(dim=0), num_tokens=len(X), threshold=enough if threshold else 0.0
        )

    return DSnoT(threshold=threshold), slow


METHODS = {
    "sparsefw": _fw(rule="line-search", steps=50, alpha=0.6),
    "sparsefw-free": _fw(rule="line-search", steps=50, alpha=0.0),
    "sparsefw-ria": _fw(rule="line-search", steps=50, alpha=0.25, warm_start="ria"),
    "sparsefw-magnitude": _fw(rule="line-search", steps=30, alpha=0.5, warm_start="magnitude"),
    "sparsefw-open": _fw(rule="open-loop", steps=50, alpha=0.5, offset=20.0),
    "sparsefw-paper": _fw(rule="open-loop", steps=50, alpha=0.5, offset=0.0),
    "swaps": _swaps(),
    "dsnot": _dsnot(0.0),
    "dsnot-threshold": _dsnot(0.05),
}
NEVER_WORSE = [name for name in METHODS if not name.startswith("dsnot")]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _problem(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float64, out: int = OUT, inputs: int = INPUTS_
) -> LayerProblem:
    W0, H = FAMILIES[family](out, inputs, seed)
    X = INPUTS[family](inputs, seed)
    return LayerProblem(W0.to(dtype), Gram.from_matrix(H.to(dtype), len(X), X.sum(dim=0)))


def _loss(problem: LayerProblem, mask: Tensor) -> float:
    return problem.objective(problem.W0 * mask)


# --- agreement with the slow reference


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern_name", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_reference(name: str, pattern_name: str, family: str) -> None:
    """In float64 the same mask, in float32 an error that is no larger."""
    method, slow = METHODS[name]
    pattern, plain = PATTERNS[pattern_name]
    problem = _problem(family)
    W, mask = slow(problem.W0, problem.H, plain, INPUTS[family](INPUTS_, 0))
    solution = run(method, problem, pattern)
    assert torch.equal(solution.mask, mask)
    assert torch.equal(solution.weight, W)
    assert not solution.status.failed

    single = run(method, _problem(family, dtype=torch.float32), pattern)
    pattern.check(single.mask)
    allowed = problem.relative_error(W) * (1 + FLOAT32_ERROR)
    assert problem.relative_error(problem.W0 * single.mask) <= allowed


# --- never worse, always better


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NEVER_WORSE)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_never_worse_than_the_start(name: str, family: str, dtype: torch.dtype) -> None:
    method = METHODS[name][0]
    for seed in range(3):
        problem = _problem(family, seed, dtype)
        slack = 1 + (FLOAT32_ROUNDING if dtype == torch.float32 else 1e-12)
        for pattern, _ in PATTERNS.values():
            start = run(Magnitude(), problem, pattern)
            solution = run(method, problem, pattern, start=start)
            pattern.check(solution.mask)
            assert solution.relative_error <= start.relative_error * slack


@pytest.mark.parametrize("family", ["well_conditioned", "ill_conditioned", "correlated"])
@pytest.mark.parametrize("pattern_name", ["row", "2:4"])
def test_every_swap_lowers_the_loss_until_none_does(family: str, pattern_name: str) -> None:
    pattern, _ = PATTERNS[pattern_name]
    problem = _problem(family, 1)
    last = _loss(problem, run(Wanda(), problem, pattern).mask)
    for swaps in range(1, 100):
        solution = run(Swaps(max_swaps=swaps), problem, pattern)
        assert solution.steps <= swaps
        loss = _loss(problem, solution.mask)
        assert loss <= last
        if solution.status is Status.CONVERGED:
            break
        assert loss < last
        last = loss
    group = torch.arange(INPUTS_) // (pattern.group if pattern.group > 1 else INPUTS_)
    for w, m in zip(problem.W0, solution.mask, strict=True):
        changes = reference.swap_changes(w, problem.H, m)[group[:, None] == group[None, :]]
        assert float(changes.min()) > -1e-9 * float(w @ problem.H @ w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pattern_name", ["row", "2:4"])
def test_swaps_go_on_where_one_input_has_nearly_all_energy(pattern_name: str, dtype: torch.dtype) -> None:
    """It is kept, and how much it has must not decide whether swaps of the others are worth making."""
    pattern, plain = PATTERNS[pattern_name]
    W0, H = FAMILIES["correlated"](OUT, INPUTS_, 1)
    scale = torch.ones(INPUTS_, dtype=torch.float64)
    scale[5] = 1e4
    H = H * scale * scale[:, None]
    expected = reference.swaps(W0, H, plain)[1]
    problem = LayerProblem(W0, Gram.from_matrix(H))
    found = run(Swaps(), LayerProblem(W0.to(dtype), Gram.from_matrix(H.to(dtype))), pattern)
    assert found.details["swaps"] > OUT
    assert _loss(problem, found.mask) <= 1.01 * _loss(problem, expected)


def test_swaps_keep_the_row_counts_of_a_mask_of_the_whole_matrix() -> None:
    problem = _problem("correlated")
    start = run(Wanda(), problem, Unstructured(0.6))
    solution = run(Swaps(), problem, Unstructured(0.6), start=start)
    assert torch.equal(solution.mask.sum(dim=1), start.mask.sum(dim=1))
    assert solution.details["swaps"] > 0


def test_swaps_use_the_mask_of_a_start_and_not_its_weights() -> None:
    problem = _problem("correlated")
    start = run(Magnitude(), problem, PerRow(0.5))
    elsewhere = Solution(start.weight + 7 * start.mask, start.mask)
    assert torch.equal(
        run(Swaps(), problem, PerRow(0.5), start=start).weight,
        run(Swaps(), problem, PerRow(0.5), start=elsewhere).weight,
    )
    expected = reference.swaps(problem.W0, problem.H, ("row", 0.5), start=start.mask)[1]
    assert torch.equal(run(Swaps(), problem, PerRow(0.5), start=start).mask, expected)


@pytest.mark.parametrize(("near", "first"), [(1, 1), (1, 3), (8, 1), (16, 2)])
def test_swaps_are_the_best_of_all_pairs_on_longer_rows(
    monkeypatch: pytest.MonkeyPatch, near: int, first: int
) -> None:
    """Where few pairs are looked at without need, the certificate must find the others."""
    monkeypatch.setattr("rarefy.methods.swaps._NEAR", near)
    monkeypatch.setattr("rarefy.methods.swaps._FIRST", first)
    for seed in range(3):
        problem = _problem("correlated", seed, out=24, inputs=60)
        for sparsity in (0.3, 0.7):
            expected = reference.swaps(problem.W0, problem.H, ("row", sparsity))[1]
            assert torch.equal(run(Swaps(), problem, PerRow(sparsity)).mask, expected)


def test_swaps_batch_by_batch_and_with_full_and_empty_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent, so that batches change nothing; a row may have nothing to swap."""
    problem = _problem("correlated")
    whole = run(Swaps(), problem, PerRow(0.6)).mask
    monkeypatch.setattr("rarefy.methods.swaps._ELEMENTS", 2 * INPUTS_)
    assert torch.equal(run(Swaps(), problem, PerRow(0.6)).mask, whole)
    start = run(Wanda(), problem, Unstructured(0.6)).mask
    start[0], start[1] = True, False
    pattern = Unstructured(0.6, int(start.sum()))
    solution = run(Swaps(), problem, pattern, start=Solution(problem.W0 * start, start))
    assert bool(solution.mask[0].all())
    assert not bool(solution.mask[1].any())
    assert torch.equal(solution.mask, reference.swaps(problem.W0, problem.H, ("layer", 0.6), start=start)[1])


@pytest.mark.parametrize("pattern", [PerRow(0.6), NM(2, 4), NM(4, 8)], ids=str)
def test_the_certificate_holds_on_wide_rows(pattern: Pattern) -> None:
    problem = _problem("correlated", 3, out=6, inputs=96)
    plain = ("row", 0.6) if isinstance(pattern, PerRow) else ("nm", pattern.keep, pattern.of)  # type: ignore[attr-defined]
    mask = reference.swaps(problem.W0, problem.H, plain)[1]
    assert torch.equal(run(Swaps(), problem, pattern).mask, mask)


# --- alpha


@pytest.mark.parametrize("pattern_name", ["layer", "row", "1:3"])
def test_alpha_1_is_the_warm_start(pattern_name: str) -> None:
    pattern, _ = PATTERNS[pattern_name]
    problem = _problem("correlated")
    solution = run(SparseFW(alpha=1), problem, pattern)
    assert torch.equal(solution.mask, run(Wanda(), problem, pattern).mask)
    assert solution.status is Status.TRIVIAL
    assert solution.steps == 0


def test_alpha_1_leaves_a_group_something_to_choose() -> None:
    problem = _problem("ill_conditioned")
    start, found = run(Wanda(), problem, NM(3, 6)), run(SparseFW(alpha=1), problem, NM(3, 6))
    changed = (start.mask & ~found.mask).view(-1, 6).sum(dim=1)
    assert int(changed.max()) == 1
    assert found.relative_error < start.relative_error


def test_steps_0_is_the_warm_start() -> None:
    problem = _problem("correlated")
    solution = run(SparseFW(steps=0), problem, NM(2, 4))
    assert torch.equal(solution.mask, run(Wanda(), problem, NM(2, 4)).mask)


@pytest.mark.parametrize("pattern_name", ["layer", "row", "2:4", "1:3"])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_highest_scores_of_the_start_are_kept_for_ever(alpha: float, pattern_name: str) -> None:
    pattern, plain = PATTERNS[pattern_name]
    problem = _problem("correlated")
    scores = reference.saliency(problem.W0, problem.H, "wanda")
    kept = reference.sparsefw_fixed_part(scores, plain, alpha)
    solution = run(SparseFW(alpha=alpha, steps=40), problem, pattern)
    assert bool(solution.mask[kept].all())


def test_alpha_of_0_a_tenth_and_a_quarter_differ_at_2_of_4() -> None:
    problem = _problem("correlated", 5, out=24, inputs=48)
    masks = [run(SparseFW(alpha=alpha, steps=60), problem, NM(2, 4)).mask for alpha in (0.0, 0.1, 0.25)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_sparsefw_rounds_and_grades_as_often_as_told() -> None:
    solution = run(SparseFW(steps=50, round_every=20, rule="open-loop"), _problem("correlated"), PerRow(0.6))
    assert len(solution.trace["rounded loss"]) == 3
    assert solution.steps == 50
    assert solution.details["best step"] in (0, 20, 40, 50)


def test_a_diagonal_gram_leaves_nothing_to_improve() -> None:
    """The loss is then a sum of squared Wanda scores, so Wanda's mask is the best of all."""
    problem = _problem("diagonal")
    for pattern in (Unstructured(0.6), PerRow(0.6), NM(2, 4)):
        wanda = run(Wanda(), problem, pattern).mask
        assert torch.equal(run(SparseFW(), problem, pattern).mask, wanda)
        assert torch.equal(run(Swaps(), problem, pattern).mask, wanda)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (2, 8), (1, 4)])
@pytest.mark.parametrize("family", ["ill_conditioned", "correlated", "well_conditioned"])
def test_sparsefw_is_not_above_plain_frank_wolfe_with_one_locked_weight_a_group(
    family: str, keep: int, of: int
) -> None:
    """The geometric mean of three problems; where no rule gains anything, they differ in a mask or two."""
    ours, plain = 1.0, 1.0
    for seed in range(3):
        problem = _problem(family, seed, out=16, inputs=48)
        ours *= run(SparseFW(), problem, NM(keep, of)).relative_error
        plain *= problem.relative_error(reference.frank_wolfe_groups(problem.W0, problem.H, keep, of)[0])
    assert ours <= plain * (1.001 if family == "well_conditioned" else 1)


def test_alpha_is_the_patterns_unless_it_is_given() -> None:
    problem = _problem("ill_conditioned", out=16, inputs=48)
    for pattern in (NM(2, 4), NM(1, 4), PerRow(0.5)):
        default, same = (run(SparseFW(alpha=alpha), problem, pattern) for alpha in (None, pattern.trust))
        assert torch.equal(default.mask, same.mask)
    assert not torch.equal(run(SparseFW(), problem, NM(2, 4)).mask, run(SparseFW(alpha=0.02), problem, NM(2, 4)).mask)


# --- DSnoT


def test_dsnot_brings_the_mean_of_the_output_nearer() -> None:
    problem = _problem("correlated", 2)
    mean = problem.gram.mean
    start = run(Wanda(), problem, PerRow(0.6))
    found = run(DSnoT(threshold=0.0), problem, PerRow(0.6))
    before, after = (problem.W0 * ~start.mask) @ mean, (problem.W0 * ~found.mask) @ mean
    assert bool((before.sign() * after <= before.abs()).all())  # moved towards 0, or past it and stopped there
    assert bool((after.sign() != before.sign()).any())
    assert found.details["swaps"] > 0
    assert found.steps <= 50


def test_dsnot_without_means_says_so() -> None:
    W0, H = FAMILIES["correlated"](OUT, INPUTS_, 0)
    with pytest.raises(InputError, match="mean"):
        run(DSnoT(), LayerProblem(W0, Gram.from_matrix(H, 10)), PerRow(0.5))


def test_dsnot_makes_at_most_the_swaps_it_is_allowed() -> None:
    problem = _problem("correlated", 2)
    start = run(Wanda(), problem, PerRow(0.6)).mask
    for steps in (0, 1, 2):
        mask = run(DSnoT(steps=steps, threshold=0.0), problem, PerRow(0.6)).mask
        assert int((mask ^ start).sum(dim=1).max()) == 2 * steps


def test_dsnot_sees_a_small_variance_beside_a_large_mean() -> None:
    """The Gram's float32 diagonal holds the mean only; the order of (2) is that of the variances."""
    tokens, inputs = 4000, 24
    X = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = (X * torch.logspace(-2, 0, inputs, dtype=torch.float64) + 100).float()
    W0 = torch.randn(OUT, inputs, generator=torch.Generator().manual_seed(1))
    gram = Gram(inputs, means=True)
    gram.update(X)
    found = run(DSnoT(threshold=0.0), LayerProblem(W0, gram), PerRow(0.6))
    exact = Gram.from_matrix(X.double().T @ X.double(), tokens, X.double().sum(dim=0))
    expected = run(DSnoT(threshold=0.0), LayerProblem(W0.double(), exact), PerRow(0.6))
    assert found.details["swaps"] > OUT
    assert torch.equal(found.mask, expected.mask)


# --- the way of all devices but the CPU


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern_name", PATTERNS)
def test_torch_and_numpy_find_the_same_mask(name: str, pattern_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, pattern = METHODS[name][0], PATTERNS[pattern_name][0]
    by_numpy = run(method, _problem("correlated"), pattern)
    monkeypatch.setattr(passes, "NUMPY", False)
    by_torch = run(method, _problem("correlated"), pattern)
    assert torch.equal(by_torch.mask, by_numpy.mask)
    assert torch.equal(by_torch.weight, by_numpy.weight)


# --- hyperparameters


@pytest.mark.parametrize(
    "make",
    [
        lambda: SparseFW(alpha=2),
        lambda: SparseFW(steps=-1),
        lambda: SparseFW(rule="newton"),
        lambda: SparseFW(warm_start="random"),
        lambda: SparseFW(round_every=0),
        lambda: Swaps(max_swaps=-1),
        lambda: DSnoT(steps=-1),
        lambda: DSnoT(threshold=-0.1),
    ],
)
def test_impossible_hyperparameters_are_one_sentence(make: Callable[[], Method]) -> None:
    with pytest.raises(MethodError, match=r"^[^\n]*must be[^\n]*\.$"):
        make()
