"""Double Sparse Factorization: a weight as the product of two sparse matrices, for a comparison of accuracy.

W0 (out, in) is to be L R with sparse L (out, r), R (r, in), r = min(out, in), so one of them is square. In
coordinates of unit diagonal, W0 for W0 s and A = H / (s s^T):

    min  tr((L R - W0) A (L R - W0)^T)   with k_L and k_R non-zeros                             (1)

From L (or R) the identity and the other factor the largest |W0|, for rounds t = 1..rounds: R for fixed L, with A = I,
then L for fixed R, with A as it is. Each is a problem  min tr(Y^T G Y) - 2 tr(Y^T C)  of one sparse factor Y,

    Y = R:    G = L^T L,      C = L^T W0;           Y = L^T:  G = R A R^T,   C = R A W0^T       (2)

brought to unit diagonal of G, damped, and solved by a few steps of ADMM that go on from the round before:

    Y <- (G + p I)^-1 (C + p (Z - U)),   p = min(1, t / (rounds - 3))^3, then 5 times           (3)
    M <- the k largest |Y + U| (the first 2 times),  Z <- M (Y + U),  U <- U + Y - Z,
    Y <- (G + I)^-1 (C + Z - U)                                                                  (4)

The best round by (1) is kept. Then both factors are refitted in turn on their supports by conjugate gradients on (1),
which no step can raise; (1) couples the rows of R, so there is one step length for all of them.

**What is stored.** Two matrices have two masks. A single sparse matrix of the pattern takes  b k + out in  bits for k
values of b bits and its mask; the factors take  b (k_L + k_R) + out r + r in.  Both are to be equal, so

    k_L + k_R = k - r^2 / b,     of which the square one gets 0.16 r^2, or 0.25 r^2 where W0 is not square,  (5)

at most half. The answer of the method is the product: a dense matrix, without a zero to be counted on. It says what
the factorisation is worth, and is no sparse model.

| code  | paper  | shape          | meaning                                  |
|-------|--------|----------------|------------------------------------------|
| L, R  | A, B   | (out, r), (r, in) | the factors                           |
| Y,U,Z | W,U,Z  | (r, in), (r, out) | of one factor's ADMM                  |

Source: Boža and Macko, Two Sparse Matrices are Better than One, arXiv 2409.18850. Differences: L's problem has the
true Gram; both factors are refitted with it, not the one at the output alone; the best round is kept; counts are
exact, and masks are counted (5).
Cost: about 9 products and two factorisations of r x r a round, 3 products a step of the refit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.errors import PatternError
from rarefy.layer.passes import apply_mask
from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.select import keep_largest
from rarefy.layer.solution import Solution
from rarefy.methods.base import Cost, Diverged, Method, hyper

_INNER, _CHOOSING = 5, 2  # steps of (4), and how many of them choose the mask
_SQUARE, _NOT_SQUARE = 0.16, 0.25  # what the square factor keeps of its entries


@dataclass
class Factors:
    """Two sparse factors in the coordinates of W0, their supports, and (1) after each round and refit."""

    L: Float[Tensor, "out r"]
    R: Float[Tensor, "r inputs"]
    trace: dict[str, list[float]]

    @property
    def product(self) -> Float[Tensor, "out inputs"]:
        """L R."""
        return self.L @ self.R


@dataclass
class _Factor:
    """One factor with its ADMM: Z is what it is, k how many non-zeros it has."""

    Z: Float[Tensor, "r n"]
    U: Float[Tensor, "r n"]
    k: int


@dataclass(frozen=True)
class DSF(Method):
    """Replaces a weight by the dense product of two sparse factors that take as many bits as the pattern would."""

    name: ClassVar[str] = "dsf"
    summary: ClassVar[str] = "the dense product of two sparse factors, for a comparison of accuracy at equal bits"
    paper: ClassVar[str] = "arXiv 2409.18850"
    gives_dense: ClassVar[bool] = True
    comes_last: ClassVar[bool] = True

    rounds: int = hyper(40, "rounds over both factors", low=4)
    damping: float = hyper(0.01, "added to the unit diagonal of each factor's problem", low=0)
    refits: int = hyper(10, "times that each factor is refitted afterwards", low=0)
    refit_steps: int = hyper(10, "conjugate-gradient steps of each refit", low=1)
    value_bits: int = hyper(16, "bits of a kept value, when stored bits are counted", choices=(16, 8, 4, 32))

    def check_pattern(self, pattern: Pattern) -> None:
        if not pattern.has_choice or pattern.group > 1 or pattern.rows_alike:
            raise PatternError.sentence(
                f"{self.name} is compared with a sparsity, whose stored bits its factors get, and {pattern} is none."
            )

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        shape = problem.shape
        k_left, k_right = self.budgets(shape, pattern)
        factors = self.factorise(problem, k_left, k_right)
        product = problem.from_scaled(factors.product, torch.ones_like(problem.W0, dtype=torch.bool), problem.scaled)
        details: dict[str, float | str] = {
            "weights": f"the dense product of two sparse factors, {k_left:,} and {k_right:,} non-zeros",
            "stored_bits": stored_bits(shape, self.value_bits, k_left, k_right),
            "stored_bits_of_pattern": self.value_bits * pattern.count(shape) + shape[0] * shape[1],
        }
        everything = torch.ones_like(problem.W0, dtype=torch.bool)
        return Solution(product, everything, details=details, steps=self.rounds, trace=factors.trace)

    def budgets(self, shape: Shape, pattern: Pattern) -> tuple[int, int]:
        """(5): the non-zeros of L and of R. Raises PatternError where masks alone take more bits than there are."""
        r = min(shape)
        total = pattern.count(shape) - -(-r * r // self.value_bits)
        if total < 2 * r:
            raise PatternError.sentence(
                f"{pattern} leaves two factors of a {shape[0]} x {shape[1]} weight no bits for values beside masks."
            )
        square = min(round((_SQUARE if shape[0] == shape[1] else _NOT_SQUARE) * r * r), total // 2)
        return (square, total - square) if shape[0] <= shape[1] else (total - square, square)

    def factorise(self, problem: LayerProblem, k_left: int, k_right: int) -> Factors:
        """Factors with so many non-zeros at most. Raises NumericalError where the iteration diverges."""
        A, W0 = problem.scaled.A, problem.to_scaled(problem.W0, problem.scaled)
        target = W0 @ A
        energy = float((target * W0).sum(dtype=torch.float64))
        left, right = _start(W0, k_left, k_right)
        best, least, errors = (left.Z, right.Z), float("inf"), []
        for t in range(1, self.rounds + 1):
            p = min(1.0, t / (self.rounds - 3)) ** 3
            L = left.Z.T
            self._solve_(right, L.T @ L, L.T @ W0, p)
            R = right.Z
            RA = R @ A
            self._solve_(left, RA @ R.T, R @ target.T, p)
            errors.append(_error(left.Z.T, R, A, W0) / energy if energy else 0.0)
            if errors[-1] < least:
                least, best = errors[-1], (left.Z.clone(), R.clone())
        if not least < float("inf"):
            raise Diverged(f"{self} diverged within {self.rounds} rounds.")
        L, R = best[0].T.contiguous(), best[1]
        refits = [least]
        for _ in range(self.refits):
            G = R @ A @ R.T
            refit_(L, L != 0, partial(_times, G, None), target @ R.T, self.refit_steps)
            G = L.T @ L
            refit_(R, R != 0, partial(_times, A, G), L.T @ target, self.refit_steps)
            refits.append(_error(L, R, A, W0) / energy if energy else 0.0)
        return Factors(L, R, {"error": errors, "refit error": refits})

    def _solve_(self, factor: _Factor, G: Float[Tensor, "r r"], C: Float[Tensor, "r n"], p: float) -> None:
        """(3) and (4), in place in the factor."""
        d = G.diagonal().clamp_min(0).sqrt()
        live = d > 0
        d = torch.where(live, d, 1).unsqueeze(1)
        G, C = G / d / d.T, C / d
        G.diagonal().add_(self.damping)
        Z, U = factor.Z * d, factor.U
        Y = torch.cholesky_solve(C + p * (Z - U), _shifted(G, max(p, 1e-6)))
        factored = _shifted(G, 1.0)
        for step in range(_INNER):
            V = Y + U
            if step < _CHOOSING:
                mask = keep_largest(V.abs().reshape(-1), factor.k).view_as(V)
            Z = apply_mask(V, mask)
            U = V - Z
            Y = torch.cholesky_solve(C + Z - U, factored)
        factor.Z, factor.U = Z / d, U

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        return Cost(9.0 * self.rounds + 6.0 * self.refits * self.refit_steps, weights=12, grams=4)


def stored_bits(shape: Shape, value_bits: int, k_left: int, k_right: int) -> int:
    """The bits of two factors: their values, and a mask of one bit an entry for each."""
    r = min(shape)
    return value_bits * (k_left + k_right) + r * (shape[0] + shape[1])


def _start(W0: Float[Tensor, "out inputs"], k_left: int, k_right: int) -> tuple[_Factor, _Factor]:
    """The square factor is the identity, the other one the largest of W0 at half its budget. L is held transposed."""
    out, inputs = W0.shape
    eye = torch.eye(min(out, inputs), dtype=W0.dtype, device=W0.device)
    k = k_right if out <= inputs else k_left
    half = max(1, k // 2)  # no mutant: only budgets of a weight or two would notice
    largest = apply_mask(W0, keep_largest(W0.abs().reshape(-1), half).view_as(W0))
    left, right = (eye, largest) if out <= inputs else (largest.T.contiguous(), eye)
    return _Factor(left, torch.zeros_like(left), k_left), _Factor(right, torch.zeros_like(right), k_right)


def _shifted(G: Float[Tensor, "r r"], p: float) -> Float[Tensor, "r r"]:
    """The Cholesky factor of G + p I."""
    G = G.clone()
    G.diagonal().add_(p)
    factor: Tensor = torch.linalg.cholesky_ex(G).L
    return factor


def _error(L: Tensor, R: Tensor, A: Tensor, W0: Tensor) -> float:
    """(1)."""
    D = torch.addmm(W0, L, R, beta=-1)
    return float(((D @ A) * D).sum(dtype=torch.float64))


def _times(H: Tensor, G: Tensor | None, X: Tensor) -> Tensor:
    """The Hessian of (1) applied to a change X of a factor: X H, or G X H."""
    return X @ H if G is None else G @ X @ H


def refit_(
    X: Float[Tensor, "m n"],
    mask: Bool[Tensor, "m n"],
    operator: Callable[[Tensor], Tensor],
    B: Float[Tensor, "m n"],
    steps: int,
) -> None:
    """Lower <X, operator(X)> - 2 <X, B> on a support by conjugate gradients, in place; the operator is symmetric."""
    residual = apply_mask(B - operator(X), mask)
    direction, square = residual.clone(), float(residual.square().sum(dtype=torch.float64))
    for _ in range(steps):
        image = apply_mask(operator(direction), mask)
        curvature = float((direction * image).sum(dtype=torch.float64))
        if not (curvature > 0 and square > 0):
            return
        X.add_(direction, alpha=square / curvature)
        residual.add_(image, alpha=-square / curvature)
        before, square = square, float(residual.square().sum(dtype=torch.float64))
        direction = residual + (square / before) * direction
