"""Checks of the slow reference itself, against closed forms, finite differences and enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from problems import FAMILIES, INPUTS

# Rounding of float64 on problems with condition numbers up to 1e6.
TIGHT: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}

Solver = Callable[[Tensor, Tensor, tuple[Any, ...]], tuple[Tensor, Tensor]]


def _dsnot(W0: Tensor, H: Tensor, pattern: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    mean = torch.linspace(-1, 1, len(H), dtype=torch.float64) * H.diagonal().sqrt() / 10
    return reference.dsnot(W0, H, pattern, mean=mean, num_tokens=64, threshold=1e-6)


MASK_ONLY: dict[str, Solver] = {
    "magnitude": reference.magnitude,
    "wanda": reference.wanda,
    "ria": reference.ria,
    "dsnot": _dsnot,
    "sparsefw": lambda W0, H, pattern: reference.sparsefw(W0, H, pattern, steps=30),
    "sparsefw-line": lambda W0, H, pattern: reference.sparsefw(W0, H, pattern, steps=30, step="line"),
    "swaps": reference.swaps,
    "brute-force-mask": reference.brute_force_mask,
}
UPDATING: dict[str, Solver] = {
    "sparsegpt": lambda W0, H, pattern: reference.sparsegpt(W0, H, pattern, block_size=3),
    "admm": reference.admm,
    "admm-reselect": lambda W0, H, pattern: reference.admm(W0, H, pattern, schedule="reselect"),
    "admm1": lambda W0, H, pattern: reference.admm(W0, H, pattern, schedule="fixed"),
    "alps": reference.alps,
    "alps-geometric": reference.alps_geometric,
    "pcg": reference.pcg,
    "backsolve": reference.backsolve,
    "brute-force": reference.brute_force,
}
SOLVERS = {**MASK_ONLY, **UPDATING}


def _pattern(name: str, out: int, inputs: int) -> tuple[Any, ...]:
    checkerboard = (torch.arange(out)[:, None] + torch.arange(inputs)) % 3 > 0
    return {
        "layer": ("layer", 0.55),
        "row": ("row", 0.4),
        "2:4": ("nm", 2, 4),
        "1:2": ("nm", 1, 2),
        "fixed": ("fixed", checkerboard),
        "dense": ("layer", 0.0),
        "empty": ("fixed", torch.zeros(out, inputs, dtype=torch.bool)),
    }[name]


PATTERNS = ["layer", "row", "2:4", "1:2", "fixed", "dense", "empty"]


def _draw(family: str, out: int = 3, inputs: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    return FAMILIES[family](out, inputs, seed)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- problems and projections


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_reproducible_and_of_their_kind(family: str) -> None:
    W0, H = _draw(family)
    again, _ = _draw(family)
    X = INPUTS[family](8, 0)
    assert W0.dtype == H.dtype == torch.float64
    assert torch.equal(W0, again)
    assert torch.equal(H, H.T)
    torch.testing.assert_close(H, X.T @ X)
    eigenvalues = torch.linalg.eigvalsh(H)
    if family == "ill_conditioned":
        torch.testing.assert_close(eigenvalues[-1] / eigenvalues[0], torch.tensor(1e6).double(), rtol=1e-6, atol=0)
    singular = bool(eigenvalues[0] < 1e-10 * eigenvalues[-1])
    assert singular == (family in ("rank_deficient", "dead_columns", "duplicate_columns"))


def test_projections_keep_exact_counts_and_the_first_of_equals() -> None:
    ones = torch.ones(2, 4)
    assert reference.project_topk(ones, 5).tolist() == [[True] * 4, [True, False, False, False]]
    twos_and_ones = torch.ones(64, 8)
    twos_and_ones[:, ::2] = 2
    assert reference.project_topk(twos_and_ones, 77).flatten().nonzero().flatten().tolist() == [*range(0, 154, 2)]
    assert reference.project_rows(ones, 1).tolist() == [[True, False, False, False]] * 2
    assert reference.project_nm(ones, 1, 2).tolist() == [[True, False, True, False]] * 2
    assert reference.project_topk(torch.tensor([[1.0, 3.0], [3.0, 2.0]]), 1).tolist() == [
        [False, True],
        [False, False],
    ]
    assert reference.num_kept(("layer", 0.5), 3, 3) == 5  # round(4.5) is 4 in Python
    assert reference.num_kept(("row", 0.5), 2, 3) == 2  # round(1.5) is 2


def test_gradual_projection_ends_at_the_pattern_and_protects_groups() -> None:
    scores = torch.rand(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for pattern in (("layer", 0.7), ("row", 0.7), ("nm", 2, 4), ("nm", 1, 4), ("nm", 4, 8)):
        final = reference.project(scores, pattern)
        assert torch.equal(reference.project_gradual(scores, pattern, 1.0), final)
        half = reference.project_gradual(scores, pattern, 0.5)
        assert bool(half[final].all())
    assert int((~reference.project_gradual(scores, ("nm", 2, 4), 0.5)).sum()) == 4 * round(0.5 * (1 - 0.5**3) * 8)


# --- laws of every method


@pytest.mark.parametrize("pattern_name", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_fills_the_pattern_exactly(family: str, pattern_name: str) -> None:
    W0, H = _draw(family)
    pattern = _pattern(pattern_name, *W0.shape)
    for name, solve in SOLVERS.items():
        W, mask = solve(W0, H, pattern)
        assert int(mask.sum()) == reference.num_kept(pattern, *W0.shape), name
        assert bool(torch.isfinite(W).all()), name
        assert bool((W[~mask] == 0).all()), name
        if pattern[0] == "nm":
            assert bool((mask.reshape(-1, pattern[2]).sum(1) == pattern[1]).all()), name
        if pattern[0] == "row":
            assert bool((mask.sum(1) == reference.num_kept(pattern, 1, W0.shape[1])).all()), name
        if pattern[0] == "fixed":
            assert torch.equal(mask, pattern[1]), name
        if name in MASK_ONLY:
            assert torch.equal(W[mask], W0[mask]), name


@pytest.mark.parametrize("pattern_name", ["layer", "row", "2:4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_brute_force_is_never_beaten(family: str, pattern_name: str) -> None:
    W0, H = _draw(family, seed=1)
    pattern = _pattern(pattern_name, *W0.shape)
    best = reference.relative_error(reference.brute_force(W0, H, pattern)[0], W0, H)
    best_mask = reference.relative_error(reference.brute_force_mask(W0, H, pattern)[0], W0, H)
    for name, solve in SOLVERS.items():
        error = reference.relative_error(solve(W0, H, pattern)[0], W0, H)
        assert error >= best - 1e-12, name
        if name in MASK_ONLY:
            assert error >= best_mask - 1e-12, name


def test_brute_force_over_the_whole_matrix_is_plain_enumeration() -> None:
    W0, H = _draw("correlated", out=2, inputs=4)
    errors: dict[bool, list[float]] = {True: [], False: []}
    for bits in itertools.product((True, False), repeat=8):
        mask = torch.tensor(bits).reshape(2, 4)
        if mask.sum() == 3:
            errors[False].append(reference.relative_error(W0 * mask, W0, H))
            errors[True].append(reference.relative_error(reference.backsolve(W0, H, ("fixed", mask))[0], W0, H))
    pattern = ("layer", 5 / 8)
    refit, plain = reference.brute_force(W0, H, pattern)[0], reference.brute_force_mask(W0, H, pattern)[0]
    assert reference.relative_error(refit, W0, H) == pytest.approx(min(errors[True]), rel=1e-12)
    assert reference.relative_error(plain, W0, H) == pytest.approx(min(errors[False]), rel=1e-12)


@pytest.mark.parametrize("pattern_name", ["layer", "row", "2:4"])
@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - {"dsnot"}))
def test_the_scale_of_the_gram_changes_nothing(name: str, pattern_name: str) -> None:
    for family in ("well_conditioned", "dead_columns", "correlated"):
        W0, H = _draw(family, seed=2)
        pattern = _pattern(pattern_name, *W0.shape)
        W, mask = SOLVERS[name](W0, H, pattern)
        W4, mask4 = SOLVERS[name](W0, 4 * H, pattern)
        assert torch.equal(mask, mask4)
        torch.testing.assert_close(W, W4, **TIGHT)


# --- masks by score


def test_scores_are_those_of_the_papers() -> None:
    W0 = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    H = torch.diag(torch.tensor([9.0, 16.0]))
    assert reference.saliency(W0, H, "wanda").tolist() == [[3, 8], [9, 16]]
    # |-2| (1 / 3 + 1 / 6) * sqrt(4) for exponent 0.5
    assert float(reference.saliency(W0, H, "ria")[0, 1]) == pytest.approx(2.0)
    assert float(reference.saliency(W0, H, "ria", 1.0)[0, 1]) == pytest.approx(4.0)


# --- SparseGPT


@pytest.mark.parametrize("kind", ["layer", "row"])
def test_sparsegpt_with_an_identity_gram_is_magnitude_per_block(kind: str) -> None:
    W0, H = _draw("identity", out=5, inputs=10)
    W, mask = reference.sparsegpt(W0, H, (kind, 0.37), block_size=4)
    kept, rows = 0, 1 if kind == "row" else 5
    total = reference.num_kept((kind, 0.37), rows, 10)
    for start, end in ((0, 4), (4, 8), (8, 10)):
        budget = total * end // 10 - kept
        kept += budget
        project = reference.project_rows if kind == "row" else reference.project_topk
        assert torch.equal(mask[:, start:end], project(W0[:, start:end].abs(), budget))
    torch.testing.assert_close(W, W0 * mask, **TIGHT)


def test_one_removal_costs_its_closed_form() -> None:
    W0, H = _draw("correlated", out=1)
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 0] = False
    W, _ = reference.sparsegpt(W0, H, ("fixed", mask), damping=0.0)
    cost = float(W0[0, 0] ** 2 / torch.linalg.inv(H)[0, 0])
    assert reference.objective(W, W0, H) == pytest.approx(cost, rel=1e-8)
    torch.testing.assert_close(W, reference.backsolve(W0, H, ("fixed", mask))[0], **TIGHT)


def test_sparsegpt_pivots_are_the_squared_cholesky_diagonal_of_the_inverse() -> None:
    """One row, one block, one weight kept: the choice is by W^2 / diag(U)^2."""
    for seed in range(5):
        W0, H = _draw("correlated", out=1, seed=seed)
        damped = H + 0.01 * torch.diag(H.diagonal())
        U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        _, mask = reference.sparsegpt(W0, H, ("layer", 7 / 8))
        assert int(mask.flatten().nonzero()) == int((W0.flatten() ** 2 / U.diagonal() ** 2).argmax())


def test_sparsegpt_chooses_groups_with_updated_weights() -> None:
    W0, H = _draw("correlated", out=6, inputs=8, seed=3)
    W, mask = reference.sparsegpt(W0, H, ("nm", 2, 4))
    damped = H + 0.01 * torch.diag(H.diagonal())
    first = torch.ones_like(mask)
    first[:, :4] = mask[:, :4]
    entering = reference.sparsegpt(W0, H, ("fixed", first))[0][:, 4:]
    pivots = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).diagonal()[4:] ** 2
    assert torch.equal(mask[:, 4:], reference.project_nm(entering**2 / pivots, 2, 4))
    assert not torch.equal(mask[:, 4:], reference.project_nm(W0[:, 4:] ** 2 / pivots, 2, 4))
    assert bool((W[~mask] == 0).all())


# --- DSnoT


def test_dsnot_lowers_the_expected_residual_and_keeps_row_counts() -> None:
    W0, H = _draw("correlated", out=8, inputs=16)
    X = INPUTS["correlated"](16, 0)
    mean = X.mean(0)
    _, start = reference.wanda(W0, H, ("row", 0.5))
    _, mask = reference.dsnot(W0, H, ("row", 0.5), mean=mean, num_tokens=len(X), threshold=0.0)
    before, after = (W0 * ~start) @ mean, (W0 * ~mask) @ mean
    flipped = torch.sign(before) != torch.sign(after)
    assert bool(((after.abs() <= before.abs() + 1e-12) | flipped).all())
    assert not torch.equal(mask, start)
    assert torch.equal(mask.sum(1), start.sum(1))
    unmoved = reference.dsnot(W0, H, ("row", 0.5), mean=mean, num_tokens=len(X), threshold=before.abs() + 1e-9)[1]
    assert torch.equal(unmoved, start)


def test_dsnot_follows_a_row_worked_out_by_hand() -> None:
    W0 = torch.tensor([[2.0, 1.0, -0.5, -3.0, 0.2]])
    start = torch.tensor([[False, False, True, True, True]])
    mean = torch.ones(5)
    H = torch.diag(mean**2 + torch.tensor([10.0, 1, 1, 1, 1]))  # of one token, with these variances
    pattern = ("row", 0.4)
    # e = 3: input 1 gains 1 / 1 against 2 / 10; input 2 is the least kept weight of the opposite sign.
    _, once = reference.dsnot(W0, H, pattern, mean=mean, num_tokens=1, start=start, steps=1)
    assert once.tolist() == [[False, True, False, True, True]]
    # e = 1.5: inputs 0 and 3 change places, the sign flips and the row stops.
    _, mask = reference.dsnot(W0, H, pattern, mean=mean, num_tokens=1, start=start)
    assert mask.tolist() == [[True, True, False, False, True]]


# --- ADMM


def test_admm_on_a_fixed_mask_converges_to_the_damped_refit() -> None:
    W0, H = _draw("correlated")
    mask = _pattern("fixed", *W0.shape)[1]
    W, _ = reference.admm(W0, H, ("fixed", mask), steps=3000)
    damped = H + 0.1 * torch.diag(H.diagonal())  # damping on the unit diagonal is a share of each diag H_jj
    torch.testing.assert_close(W, reference.backsolve(W0, damped, ("fixed", mask))[0], rtol=1e-6, atol=1e-8)


def test_admm1_keeps_the_wanda_mask_of_the_pattern() -> None:
    W0, H = _draw("correlated", out=4, inputs=8)
    for pattern in (("layer", 0.5), ("row", 0.5), ("nm", 2, 4)):
        _, mask = reference.admm(W0, H, pattern, schedule="fixed")
        assert torch.equal(mask, reference.wanda(W0, H, pattern)[1])


# --- ALPS


@pytest.mark.parametrize("solve", [reference.alps, reference.alps_geometric])
@pytest.mark.parametrize("pattern_name", ["layer", "row", "2:4"])
@pytest.mark.parametrize("family", ["identity", "diagonal"])
def test_alps_finds_the_support_of_a_diagonal_problem(family: str, pattern_name: str, solve: Solver) -> None:
    """With a clear gap between kept and pruned; without one ADMM may exchange weights of like worth."""
    for seed in range(4):
        W0, H = _draw(family, out=4, seed=seed)
        pattern = _pattern(pattern_name, *W0.shape)
        # lambda ||W - W0||^2 is part of the objective: the largest W0^2 (H_jj + lambda) are best.
        share = H.diagonal() if solve is reference.alps_geometric else H.diagonal().mean()
        s = (H.diagonal() + 0.01 * share).sqrt()
        worth = W0.sign() * (1 + W0.abs() / 4)
        W0 = torch.where(reference.project(W0.abs(), pattern), 4 * worth, worth / 4) / s
        W, mask = solve(W0, H, pattern)
        assert torch.equal(mask, reference.project((W0 * s).abs(), pattern))
        # The final PCG ends with a residual of at most 1e-4 times that of the dense weight.
        torch.testing.assert_close(W * s, W0 * s * mask, rtol=1e-3, atol=1e-3)


def test_alps_schedule_raises_rho_with_the_change_and_obeys_its_rules() -> None:
    factors = set()
    for sparsity in (0.7, 0.95):
        W0, H = _draw("correlated", out=24, inputs=48)
        trace: list[dict[str, float]] = []
        reference.alps(W0, H, ("layer", sparsity), trace=trace)
        k = reference.num_kept(("layer", sparsity), 24, 48)
        assert [entry["step"] for entry in trace] == list(range(3, 3 * len(trace) + 1, 3))
        assert trace[0]["rho"] == 0.1
        for entry, following in itertools.pairwise(trace):
            change = entry["change"]
            factor = 1.3 if change >= 0.1 * k else 1.2 if change >= 0.005 * k else 1.1
            assert change > 0
            assert following["rho"] == pytest.approx(entry["rho"] * factor)
            factors.add(factor)
        assert trace[-1]["change"] == 0
        # Theorem 1: rho_t ||W_t - D_t|| stays bounded.
        bounds = [entry["rho"] * entry["gap"] for entry in trace]
        half = len(bounds) // 2
        assert max(bounds[half:]) < 2 * max(bounds[:half])
    assert factors >= {1.2, 1.3}


def test_alps_gives_up_at_iteration_30_where_the_support_never_moves() -> None:
    W0, H = _draw("identity", out=4)
    W0 = torch.where(reference.project(W0.abs(), ("layer", 0.5)), W0.sign() * 100, W0.sign())
    trace: list[dict[str, float]] = []
    _, mask = reference.alps(W0, H, ("layer", 0.5), trace=trace)
    assert torch.equal(mask, W0.abs() == 100)
    assert [entry["step"] for entry in trace] == list(range(3, 31, 3))
    assert trace[-1]["rho"] == pytest.approx(0.1 / 5**9)


def test_alps_restarts_with_a_smaller_penalty_where_the_support_does_not_move() -> None:
    W0, H = _draw("correlated", out=24, inputs=48)
    trace: list[dict[str, float]] = []
    reference.alps(W0, H, ("layer", 0.7), rho=1e5, trace=trace)
    assert trace[0]["change"] == 0
    assert trace[1]["rho"] == pytest.approx(2e4)


def test_methods_keep_the_order_of_the_papers() -> None:
    """On inputs without outlier channels, with which damping by the mean diagonal (ALPS's paper) is heavy."""
    names = ("alps", "admm", "admm1", "sparsegpt", "wanda", "magnitude")
    errors = dict.fromkeys((*names, "alps-geometric"), 1.0)
    for name, seed in itertools.product(errors, range(3)):
        W0, H = _draw("ill_conditioned", out=16, inputs=32, seed=seed)
        solve = reference.sparsegpt if name == "sparsegpt" else SOLVERS[name]
        errors[name] *= reference.relative_error(solve(W0, H, ("layer", 0.6))[0], W0, H)
    assert all(errors[better] < errors[worse] for better, worse in itertools.pairwise(names))
    assert errors["alps-geometric"] < errors["admm"]


# --- refits


@pytest.mark.parametrize("family", ["well_conditioned", "dead_columns", "duplicate_columns", "identity", "diagonal"])
def test_pcg_after_as_many_steps_as_inputs_is_the_exact_refit(family: str) -> None:
    W0, H = _draw(family)
    pattern = _pattern("fixed", *W0.shape)
    W, _ = reference.pcg(W0, H, pattern, steps=W0.shape[1], rtol=0.0)
    torch.testing.assert_close(W, reference.backsolve(W0, H, pattern)[0], **TIGHT)


@pytest.mark.parametrize("family", FAMILIES)
def test_refits_descend_and_the_exact_one_has_no_gradient_on_its_support(family: str) -> None:
    W0, H = _draw(family)
    W, mask = reference.wanda(W0, H, ("row", 0.5))
    losses = [reference.objective(W, W0, H)]
    for steps in range(1, 12):
        refit, same = reference.pcg(W0, H, ("fixed", mask), start=W, steps=steps, rtol=0.0)
        assert torch.equal(mask, same)
        losses.append(reference.objective(refit, W0, H))
    exact, _ = reference.backsolve(W0, H, ("fixed", mask), start=W)
    losses.append(reference.objective(exact, W0, H))
    scale = reference.objective(torch.zeros_like(W0), W0, H)
    assert all(later <= earlier + 1e-12 * scale for earlier, later in itertools.pairwise(losses[:-1]))
    assert losses[-1] <= min(losses) + 1e-12 * scale
    gradient = ((exact - W0) @ H)[mask]
    assert float(gradient.abs().max()) < 1e-8 * float((W0 @ H).abs().max())


def test_pcg_stops_at_its_tolerance() -> None:
    W0, H = _draw("well_conditioned", out=4, inputs=16)
    pattern = _pattern("fixed", *W0.shape)
    W, mask = reference.pcg(W0, H, pattern, steps=100, rtol=1e-2)
    longer, _ = reference.pcg(W0, H, pattern, steps=1000, rtol=1e-2)
    assert torch.equal(W, longer)
    s = H.diagonal().sqrt()
    residual, size = ((W0 - W) @ H * mask / s).norm(dim=1), (W0 @ H * mask / s).norm(dim=1)
    assert bool((residual <= 1e-2 * size).all())
    assert not torch.allclose(W, reference.backsolve(W0, H, pattern)[0], rtol=1e-6)


# --- SparseFW


def test_sparsefw_gradient_is_that_of_its_objective() -> None:
    W0, H = _draw("correlated")
    M = torch.rand(W0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradient = reference.sparsefw_gradient(W0, H, M)
    for i, j in itertools.product(range(3), range(8)):
        step = torch.zeros_like(M)
        step[i, j] = 1e-3  # the objective is quadratic: the central difference has no truncation error
        up, down = (reference.objective(W0 * (M + sign * step), W0, H) for sign in (1, -1))
        assert float(gradient[i, j]) == pytest.approx((up - down) / 2e-3, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("pattern", [("layer", 0.6), ("row", 0.6), ("nm", 2, 4), ("nm", 3, 8)])
def test_sparsefw_keeps_its_fixed_part_and_never_loses_to_its_start(pattern: tuple[Any, ...]) -> None:
    W0, H = _draw("correlated", out=6, inputs=16)
    for start, step, alpha in itertools.product(
        ("wanda", "ria", "magnitude"), ("open", "line"), (0.0, 0.25, 0.9, 1.0)
    ):
        scores = reference.saliency(W0, H, start)
        warm = reference.project(scores, pattern)
        fixed = reference.sparsefw_fixed_part(scores, pattern, alpha)
        W, mask = reference.sparsefw(W0, H, pattern, steps=25, alpha=alpha, start=start, step=step)
        assert bool(mask[fixed].all())
        assert bool(warm[fixed].all())
        assert reference.objective(W, W0, H) <= reference.objective(W0 * warm, W0, H)
        if alpha == 1.0 and pattern[0] != "nm":
            assert torch.equal(mask, warm)
    if pattern[0] == "nm":
        free = (warm & ~fixed).view(-1, pattern[2]).sum(dim=1)
        assert int(free.min()) >= 1
        # a floor per group would make these equal
        assert (
            int(reference.sparsefw_fixed_part(scores, pattern, 0.1).sum()) == reference.num_kept(pattern, 6, 16) // 10
        )


def test_sparsefw_vertex_fills_the_budget_with_descent_only() -> None:
    scores = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-1.0, -2.0, 5.0, -3.0]]).numpy()
    locked = torch.zeros(2, 4, dtype=torch.bool).numpy()
    locked[0, 0] = locked[1, 2] = True
    for pattern, free, descent in (
        (("layer", 0.25), [2, 3, 1, 4], [2, 3]),
        (("row", 0.25), [2, 3, 4, 5], [2, 3]),
        (("nm", 1, 2), [2, 4], [2]),
    ):
        every = reference._free_topk(scores, pattern, locked, positive_only=False)
        assert every.flatten().nonzero()[0].tolist() == sorted(free)
        positive = reference._free_topk(scores, pattern, locked, positive_only=True)
        assert positive.flatten().nonzero()[0].tolist() == descent


def test_one_step_of_sparsefw_is_worked_out_from_its_gradient() -> None:
    """The first step leaves only the vertex, at the gradient of M + M_bar; the better one is returned."""
    pattern, seen = ("layer", 0.6), 0
    for seed in range(20):
        W0, H = _draw("correlated", out=6, inputs=16, seed=seed)
        scores = reference.saliency(W0, H, "magnitude")
        start = reference.project(scores, pattern)
        fixed = reference.sparsefw_fixed_part(scores, pattern, 0.5)
        gradient = -2 * W0 * ((W0 * ~start) @ H)
        budget = int(start.sum() - fixed.sum())
        vertex = reference.project_topk(torch.where(fixed, torch.inf, gradient).neg(), budget)
        if bool((gradient[vertex] < 0).all()):
            end = vertex | fixed
            better = reference.objective(W0 * end, W0, H) < reference.objective(W0 * start, W0, H)
            _, mask = reference.sparsefw(W0, H, pattern, steps=1, alpha=0.5, start="magnitude")
            assert torch.equal(mask, end if better else start)
            seen += better
    assert seen


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (1, 4)])
def test_plain_frank_wolfe_keeps_what_it_locks(keep: int, of: int) -> None:
    W0, H = _draw("correlated", out=6, inputs=16)
    scores = reference.saliency(W0, H, "wanda")
    _, mask = reference.frank_wolfe_groups(W0, H, keep, of, steps=30)
    assert bool((mask.view(-1, of).sum(dim=1) == keep).all())
    assert bool(mask[reference.project_nm(scores, 1, of)].all())
    wanda = reference.wanda(W0, H, ("nm", keep, of))[1]
    assert torch.equal(mask, wanda) == (keep == 1)


def test_sparsefw_lowers_the_error_of_wanda() -> None:
    W0, H = _draw("correlated", out=16, inputs=32)
    wanda = reference.relative_error(reference.wanda(W0, H, ("row", 0.6))[0], W0, H)
    for step in ("open", "line"):
        W, _ = reference.sparsefw(W0, H, ("row", 0.6), steps=100, alpha=0.0, step=step)
        assert reference.relative_error(W, W0, H) < 0.8 * wanda


# --- SparseSwaps


def test_swap_formula_is_the_difference_of_objectives() -> None:
    W0, H = _draw("correlated", out=1)
    _, mask = reference.wanda(W0, H, ("row", 0.5))
    changes = reference.swap_changes(W0[0], H, mask[0])
    before = reference.objective(W0 * mask, W0, H)
    for u, p in itertools.product(range(8), repeat=2):
        if mask[0, u] and not mask[0, p]:
            swapped = mask.clone()
            swapped[0, u], swapped[0, p] = False, True
            direct = reference.objective(W0 * swapped, W0, H) - before
            assert float(changes[u, p]) == pytest.approx(direct, rel=1e-9, abs=1e-9 * before)
        else:
            assert float(changes[u, p]) == float("inf")


@pytest.mark.parametrize("pattern", [("layer", 0.5), ("row", 0.5), ("nm", 2, 4)])
def test_swaps_end_where_no_swap_helps(pattern: tuple[Any, ...]) -> None:
    W0, H = _draw("correlated", out=4, inputs=8, seed=4)
    start = reference.magnitude(W0, H, pattern)[1]
    W, mask = reference.swaps(W0, H, pattern, start=start)
    end = reference.objective(W, W0, H)
    assert end < reference.objective(W0 * start, W0, H)
    assert torch.equal(mask.sum(1), start.sum(1))
    for i, u, p in itertools.product(range(4), range(8), range(8)):
        if mask[i, u] and not mask[i, p] and (pattern[0] != "nm" or u // 4 == p // 4):
            swapped = mask.clone()
            swapped[i, u], swapped[i, p] = False, True
            assert reference.objective(W0 * swapped, W0, H) >= end * (1 - 1e-9)
