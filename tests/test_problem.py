"""The problem of one layer: loss, gradient, grade, scaling, and the factorisations of its Gram."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from problems import FAMILIES, INPUTS
from rarefy.errors import InputError, NumericalError
from rarefy.layer import problem as problem_module
from rarefy.layer.gram import Gram
from rarefy.layer.problem import LayerProblem, scale
from rarefy.layer.spectrum import inverse_factor, penalised_inverse, shifted_inverse

# Sums of a few hundred products, relative to the largest: 1e-16 or 1e-7, times their number.
ROUNDING: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
}
DTYPES = list(ROUNDING)
NAMES = list(FAMILIES)


def draw(family: str, dtype: torch.dtype = torch.float64, out: int = 6, inputs: int = 12) -> LayerProblem:
    W0, H = FAMILIES[family](out, inputs, 0)
    return LayerProblem(W0.to(dtype), Gram.from_matrix(H.to(dtype)))


def other_weight(problem: LayerProblem) -> Tensor:
    noise = torch.randn(problem.shape, generator=torch.Generator().manual_seed(3), dtype=problem.dtype)
    return problem.W0 + 0.3 * noise


# --- loss and grade


@pytest.mark.usefixtures("checked_shapes")
@pytest.mark.parametrize("family", NAMES)
def test_objective_is_the_change_of_the_outputs(family: str) -> None:
    problem, X = draw(family), INPUTS[family](12, 0)
    W = other_weight(problem)
    assert problem.objective(W) == pytest.approx(float((X @ W.T - X @ problem.W0.T).square().sum()), rel=1e-11)
    dense = float((X @ problem.W0.T).square().sum())
    assert problem.relative_error(W) == pytest.approx(problem.objective(W) / dense, rel=1e-11)
    assert problem.relative_error(problem.W0) == 0
    assert problem.relative_error(torch.zeros_like(W)) == pytest.approx(1)


@pytest.mark.usefixtures("checked_shapes")
@pytest.mark.parametrize("family", NAMES)
def test_gradient_is_that_of_the_objective(family: str) -> None:
    problem = draw(family)
    W = other_weight(problem).requires_grad_()
    D = W - problem.W0
    ((D @ problem.H) * D).sum().backward()
    torch.testing.assert_close(problem.gradient(W.detach()), W.grad, **ROUNDING[torch.float64])
    assert not problem.gradient(problem.W0).any()
    torch.testing.assert_close(problem.target, problem.W0 @ problem.H)


def test_grades_are_summed_in_float64() -> None:
    # Differences of one part in 1e5, and 1e8 + 1: lost in float32 sums.
    problem = LayerProblem(torch.ones(1, 4), Gram.from_matrix(torch.diag(torch.tensor([1e8, 1.0, 1.0, 1.0]))))
    assert problem.objective(torch.zeros(1, 4)) == 1e8 + 3
    assert problem.relative_error(torch.tensor([[1.0, 0.0, 1.0, 1.0]])) == pytest.approx(1 / (1e8 + 3), rel=1e-12)


@pytest.mark.parametrize("away", [0.0, 1e-6, 1.0])  # from the kernel of H
def test_float32_grades_as_float64_does_however_little_is_lost(away: float) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    X[:, 0] *= 1e3  # an outlier
    H = (X.T @ X).float()
    kernel = torch.linalg.eigh(H.double()).eigenvectors[:, :10].T
    W0 = torch.randn(10, 60, generator=generator)
    D = kernel + away * torch.randn(10, 60, generator=generator, dtype=torch.float64)
    W = (W0 + D).float()
    exact = LayerProblem(W0.double(), Gram.from_matrix(H.double()))
    assert LayerProblem(W0, Gram.from_matrix(H)).objective(W) == pytest.approx(exact.objective(W.double()), rel=1e-4)


@pytest.mark.parametrize("shape", [(6, 12), (14, 7)])
def test_grades_in_strips(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    problem = draw("correlated", torch.float64, *shape)
    W = other_weight(problem)
    whole = problem.objective(W)
    monkeypatch.setattr(problem_module, "_STRIP", 5)  # divides none of these
    again = draw("correlated", torch.float64, *shape)
    assert again.objective(W) == pytest.approx(whole, rel=1e-12)
    in_float32 = draw("correlated", torch.float32, *shape)
    assert in_float32.balanced_error(W) == pytest.approx(problem.balanced_error(W), rel=1e-4)
    assert again.relative_error(W) == pytest.approx(problem.relative_error(W), rel=1e-12)


def test_the_norm_of_the_balanced_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "_STRIP", 5)
    problem = draw("correlated")
    factors = torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = torch.linalg.matrix_norm(problem.H * factors * factors[:, None])
    assert problem._balanced_norm(factors) == pytest.approx(float(expected), rel=1e-6)


def test_nothing_lost_of_nothing_is_zero_and_something_is_infinite() -> None:
    dead = LayerProblem(torch.ones(2, 3), Gram.from_matrix(torch.zeros(3, 3)))
    assert dead.relative_error(torch.zeros(2, 3)) == 0
    zero = LayerProblem(torch.zeros(2, 3), Gram.from_matrix(torch.eye(3)))
    assert zero.relative_error(torch.zeros(2, 3)) == 0
    assert zero.relative_error(torch.ones(2, 3)) == math.inf


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_grade_has_no_unit(scale: float) -> None:
    W0, H = FAMILIES["correlated"](6, 12, 0)
    problem, scaled = draw("correlated"), LayerProblem(W0.float() * scale, Gram.from_matrix(H.float() / scale))
    W = other_weight(problem)
    assert scaled.relative_error(W * scale) == pytest.approx(problem.relative_error(W), rel=1e-4)


# --- the grade that no input can dominate


@pytest.mark.usefixtures("checked_shapes")
@pytest.mark.parametrize("family", NAMES)
def test_the_balanced_error_is_the_relative_one_of_inputs_of_equal_energy(family: str) -> None:
    problem = draw(family)
    W = other_weight(problem)
    A = problem.scaled.A.clone()
    A[problem.dead, problem.dead] = 0  # of a dead input nothing is known
    even = LayerProblem(problem.W0, Gram.from_matrix(A))
    assert problem.balanced_objective(W) == pytest.approx(even.objective(W), rel=1e-9)
    assert problem.balanced_error(W) == pytest.approx(even.relative_error(W), rel=1e-9)
    assert problem.balanced_error(problem.W0) == 0
    assert problem.balanced_error(torch.zeros_like(W)) == pytest.approx(1)
    single = draw(family, torch.float32)
    assert single.balanced_error(W) == pytest.approx(problem.balanced_error(W), rel=1e-3)


def test_a_massive_input_hides_in_the_relative_error_only() -> None:
    W0, H = FAMILIES["well_conditioned"](6, 12, 0)
    masks = torch.ones(2, 6, 12, dtype=torch.bool)
    masks[0, :, 4:] = False  # all but a few inputs are thrown away, the massive one is kept
    masks[1, :, 8:] = False
    relative, balanced = [], []
    for factor in (1.0, 1000.0):
        scale = torch.ones(12, dtype=torch.float64)
        scale[0] = factor
        problem = LayerProblem(W0, Gram.from_matrix(H * scale * scale[:, None]))
        relative += [problem.relative_error(W0 * mask) for mask in masks]
        balanced += [problem.balanced_error(W0 * mask) for mask in masks]
    assert max(relative[2:]) < 1e-4 < 0.1 < min(relative[:2])
    assert balanced[2:] == pytest.approx(balanced[:2])
    assert balanced[0] > 1.5 * balanced[1]


@pytest.mark.parametrize("away", [0.0, 1e-6, 1.0])
def test_float32_grades_balanced_errors_as_float64_does(away: float) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    X[:, 0] *= 1e3
    H = (X.T @ X).float()
    W0 = torch.randn(10, 60, generator=generator)
    exact = LayerProblem(W0.double(), Gram.from_matrix(H.double()))
    kernel = torch.linalg.eigh(exact.scaled.A).eigenvectors[:, :10].T / exact.scaled.s
    D = kernel + away * torch.randn(10, 60, generator=generator, dtype=torch.float64)
    W = (W0 + D).float()
    got = LayerProblem(W0, Gram.from_matrix(H)).balanced_objective(W)
    assert got == pytest.approx(exact.balanced_objective(W.double()), rel=1e-3)


# --- dtypes, shapes, numbers


@pytest.mark.parametrize(
    ("weight", "gram", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_works_in_float32_unless_something_is_float64(
    weight: torch.dtype, gram: torch.dtype, expected: torch.dtype
) -> None:
    problem = LayerProblem(torch.ones(2, 3, dtype=weight), Gram.from_matrix(torch.eye(3, dtype=gram)))
    assert problem.dtype == problem.W0.dtype == problem.H.dtype == expected
    assert problem.gradient(problem.W0).dtype == expected
    assert problem.shape == (2, 3)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (4, 2), (1, 2, 3), (0, 4)])
def test_shapes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"weight is .*, but must be \(out, 3\)"):
        LayerProblem(torch.ones(shape), Gram(3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_check_names_the_layer(bad: float) -> None:
    W0 = torch.ones(2, 3)
    W0[1, 2] = bad
    with pytest.raises(NumericalError, match=r"^The weight of model\.k_proj has NaN or infinity\.$"):
        LayerProblem(W0, Gram.from_matrix(torch.eye(3))).check("model.k_proj")
    with pytest.raises(NumericalError, match=r"Gram matrix of model\.k_proj"):
        LayerProblem(torch.ones(2, 3), Gram.from_matrix(torch.eye(3) * bad)).check("model.k_proj")
    LayerProblem(torch.ones(2, 3), Gram.from_matrix(torch.eye(3))).check("model.k_proj")


def test_the_callers_weight_is_left_alone() -> None:
    W0 = torch.ones(2, 3, requires_grad=True)
    problem = LayerProblem(W0, Gram.from_matrix(torch.eye(3)))
    assert not problem.W0.requires_grad
    assert W0.requires_grad


# --- unit diagonal


@pytest.mark.usefixtures("checked_shapes")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_scaled_is_the_gram_at_unit_diagonal(family: str, shift: float, dtype: torch.dtype) -> None:
    problem = draw(family, dtype)
    scaled = scale(problem.H, shift) if shift else problem.scaled
    H, alive = problem.H, ~problem.dead
    assert torch.equal(scaled.A.diagonal(), torch.ones_like(scaled.s))
    assert torch.equal(scaled.s[problem.dead], torch.ones_like(scaled.s[problem.dead]))
    assert torch.equal(scaled.live, scaled.s * alive)
    torch.testing.assert_close(scaled.s[alive], (H.diagonal()[alive] + shift).sqrt(), **ROUNDING[dtype])
    back = scaled.A * scaled.s.outer(scaled.s)
    off = ~torch.eye(12, dtype=torch.bool)
    torch.testing.assert_close(back[off], H[off], **ROUNDING[dtype])


@pytest.mark.usefixtures("checked_shapes")
def test_scaled_weights_are_wanda_scores_and_come_back() -> None:
    problem = draw("dead_columns")
    assert problem.dead.nonzero().flatten().tolist() == [0, 6]
    scaled = problem.scaled
    W = problem.to_scaled(problem.W0, scaled)
    torch.testing.assert_close(W.abs(), problem.W0.abs() * problem.H.diagonal().sqrt())
    assert not W[:, problem.dead].any()
    mask = torch.rand(problem.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    # a kept weight of a dead input stays what it was
    torch.testing.assert_close(problem.from_scaled(W, mask, scaled), problem.W0 * mask)
    assert torch.equal(problem.W0, FAMILIES["dead_columns"](6, 12, 0)[0])


def test_layers_with_one_gram_share_what_is_made_of_it() -> None:
    W0, H = FAMILIES["correlated"](6, 12, 0)
    gram = Gram.from_matrix(H.float())
    q, k, wide = (LayerProblem(w, gram) for w in (W0.float(), W0.float()[:3], W0))
    assert q.scaled is k.scaled
    assert inverse_factor(q, 0.01) is inverse_factor(k, 0.01)
    assert inverse_factor(q, 0.01) is not inverse_factor(q, 0.02)
    assert penalised_inverse(q, 0.1, 1.0) is penalised_inverse(k, 0.1, 1.0)
    # float64 next to float32 shares nothing by mistake
    assert (
        wide.H.dtype
        == wide.scaled.A.dtype
        == inverse_factor(wide, 0.01).U.dtype
        == penalised_inverse(wide, 0.1, 1.0).dtype
        == torch.float64
    )
    assert wide.H is wide.H


@pytest.mark.parametrize("damping", [0.1, 0.3])
@pytest.mark.parametrize("rho", [0.2, 1.0])
def test_a_shared_inverse_is_that_of_its_own_damping_and_penalty(damping: float, rho: float) -> None:
    problem, eye = draw("correlated"), torch.eye(12, dtype=torch.float64)
    for others in ((0.1, 1.0), (0.3, 0.2), (0.5, 0.5)):
        penalised_inverse(problem, *others)  # asked for before, with the same Gram
        inverse_factor(problem, others[0])
    expected = rho * torch.linalg.inv(problem.scaled.A + (damping + rho) * eye)
    torch.testing.assert_close(penalised_inverse(problem, damping, rho), expected, **ROUNDING[torch.float64])
    U = inverse_factor(problem, damping).U
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(problem.scaled.A + damping * eye), atol=1e-9, rtol=0)


# --- factorisations


@pytest.mark.usefixtures("checked_shapes")
@pytest.mark.parametrize("family", NAMES)
def test_inverse_factor(family: str) -> None:
    problem = draw(family)
    factor = inverse_factor(problem, 0.01)
    damped = problem.scaled.A + 0.01 * torch.eye(12, dtype=torch.float64)
    assert factor.damping == 0.01
    assert torch.equal(factor.U, factor.U.triu())
    assert bool((factor.U.diagonal() > 0).all())
    torch.testing.assert_close(factor.U.T @ factor.U @ damped, torch.eye(12, dtype=torch.float64), atol=1e-9, rtol=0)


def indefinite(lowest: float, size: int = 12) -> Tensor:
    """A matrix of unit diagonal with lowest eigenvalue ``lowest`` < 0: what rounding can make of a Gram."""
    # Entries of one size and two signs outside the diagonal: 1 - c x with x the highest eigenvalue of their signs.
    signs = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sign().triu(1)
    signs = signs + signs.T
    highest = float(torch.linalg.eigvalsh(signs)[-1])
    return torch.eye(size, dtype=torch.float64) - (1 - lowest) / highest * signs


@pytest.mark.parametrize(("lowest", "expected"), [(-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
def test_damping_grows_tenfold_until_the_gram_can_be_factored(lowest: float, expected: float) -> None:
    problem = LayerProblem(torch.ones(1, 12), Gram.from_matrix(indefinite(lowest)))
    factor = inverse_factor(problem, 0.01)
    assert factor.damping == pytest.approx(expected)
    damped = indefinite(lowest) + expected * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(factor.U.T @ factor.U @ damped, torch.eye(12, dtype=torch.float64), atol=1e-9, rtol=0)


def test_no_damping_asked_for_still_finds_some() -> None:
    problem = draw("rank_deficient")
    factor = inverse_factor(LayerProblem(problem.W0, Gram.from_matrix(torch.ones(12, 12))), 0.0)
    assert 0 < factor.damping < 1e-3


@pytest.mark.parametrize("tokens", [30, 58])
def test_a_factor_whose_pivots_are_positive_by_rounding_only_is_not_taken(tokens: int) -> None:
    """Fewer tokens than inputs, float32, and so little damping that the inverse is noise."""
    X = torch.randn(tokens, 60, generator=torch.Generator().manual_seed(tokens)) + 1
    problem = LayerProblem(torch.ones(1, 60), Gram.from_matrix(X.T @ X))
    A, eye = problem.scaled.A.double(), torch.eye(60, dtype=torch.float64)
    for damping in (1e-7, 1e-6, 1e-5):
        factor = inverse_factor(problem, damping)
        U = factor.U.double()
        missed = torch.linalg.matrix_norm(U.T @ U @ (A + factor.damping * eye) - eye) / 60**0.5
        assert float(missed) < 0.1, damping
        assert factor.damping > damping or damping == 1e-5


def test_what_no_damping_can_save_is_an_error() -> None:
    H = torch.eye(4, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1e9
    with pytest.raises(NumericalError, match="not positive definite"):
        inverse_factor(LayerProblem(torch.ones(1, 4), Gram.from_matrix(H)), 0.01)
    with pytest.raises(NumericalError, match="not positive definite"):
        shifted_inverse(H, 1.0)


@pytest.mark.parametrize("rho", [0.03, 1.0, 30.0])
def test_shifted_inverse(rho: float) -> None:
    problem = draw("correlated")
    A = problem.scaled.A
    before = A.clone()
    expected = torch.linalg.inv(A + rho * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(shifted_inverse(A, rho), expected, **ROUNDING[torch.float64])
    out = torch.full_like(expected, torch.nan)
    assert shifted_inverse(A, rho, out=out) is out
    torch.testing.assert_close(out, expected, **ROUNDING[torch.float64])
    assert torch.equal(A, before)
