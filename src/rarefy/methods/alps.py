"""ALPS: ADMM whose penalty grows until the support stands still, then conjugate gradients on it.

The problem, damped by lambda = damping * mean(diag H) and brought to unit diagonal afterwards, so that
A = (H + lambda I) / (s s^T) and weights are W s:

    min tr((W - W0) A (W - W0)^T)  with W = D, D sparse.

In scaled dual form (U = V / rho), from D = P(W0), U = 0, for t = 1, 2, ...

    W <- (W0 A - rho U + rho D) (A + rho I)^-1                  (1)
    D <- P(W + U), P the projection on the pattern              (2)
    U <- U + W - D                                              (3)
    rho <- next penalty, U <- U rho_old / rho                   (4)

then M = the pattern's choice from |W|, and conjugate gradients on M from M W (see refit.py), with
refit_damping in place of damping.

Penalty "support" (the paper): rho_0 = 0.1; every 3 steps, with s the number of positions of the support
that changed since the last look and k the number of kept weights:

    s >= 0.1 k: rho * 1.3;  s >= 0.005 k: rho * 1.2;  s >= 1: rho * 1.1;  s = 0: stop.        (5)

From the released code: at most 300 steps; stop where s < 3e-4 k from step 30 on; rho at most 1e6; if
the support does not move at first, rho / 5 and start again.
Penalty "geometric" (ours): rho rises from rho_first to rho_last in ``levels`` equal ratios, each held
for steps / levels steps: nothing to watch, and one factorisation a level.                    (6)

The code keeps X = W + U and the mask M: then D = M X and U = X - M X. W0 stands for W0 s, which is
never kept. Since W0 A (A + rho I)^-1 = W0 - rho W0 (A + rho I)^-1, (1) is one product:

    W = W0 + (D - U - W0) rho (A + rho I)^-1                    (1')

| code     | paper           | shape     | meaning                                        |
|----------|-----------------|-----------|------------------------------------------------|
| X        | W + V / rho     | (out, in) | what is projected                              |
| W        | W               | (out, in) | primal weight; scratch between steps           |
| Y        |                 | (out, in) | D - U - W0; scratch for the selection          |
| inverse  | (X^T X + rho I)^-1 | (in, in) | rho (A + rho I)^-1, written anew at each rho |

Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", arXiv 2406.07831, algorithms 1 and 2. As published it is ALPS(penalty="support"), ``alps-paper``
on the command line. Differences: Cholesky factorisations instead of one eigendecomposition (cheaper here,
see docs/log.md); PCG with a step per row.
Cost: one product W @ H a step, a factorisation and inverse for each distinct rho (about in^3 / 2
multiplications), one product per conjugate-gradient step. Memory: three (out, in), masks of a byte a
weight, and two (in, in) matrices; small layers a few (out, in) more (see refit.py and select.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.layer.passes import apply_mask, count
from rarefy.layer.pattern import Pattern
from rarefy.layer.problem import LayerProblem, Scaled
from rarefy.layer.solution import Solution
from rarefy.layer.spectrum import shifted_inverse
from rarefy.methods.base import IterativeMethod, hyper
from rarefy.methods.refit import conjugate_gradients_

_LOOK_EVERY = 3  # steps between two looks at the support
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # (5): share of k that moved, factor of rho
_STILL, _STILL_FROM = 3e-4, 30  # released code: share of k, first step
_MAX_RHO = 1e6  # released code
_RESTART = 5.0  # released code: rho is divided by this where the support does not move at first


@dataclass
class _State:
    problem: LayerProblem
    pattern: Pattern
    scaled: Scaled
    X: Float[Tensor, "out inputs"]
    W: Float[Tensor, "out inputs"]
    Y: Float[Tensor, "out inputs"]
    mask: Bool[Tensor, "out inputs"]
    looked: Bool[Tensor, "out inputs"] | None  # the mask at the last look; only penalty "support" looks
    inverse: Float[Tensor, "in in"]
    rho: float
    factored: float = 0.0  # the rho that ``inverse`` belongs to
    rescale: float = 1.0  # rho_old / rho, for U in the next step
    moved: bool = False
    still: bool = False


@dataclass(frozen=True)
class ALPS(IterativeMethod[_State]):
    """ADMM with a growing penalty, then preconditioned conjugate gradients on its support."""

    name: ClassVar[str] = "alps"
    summary: ClassVar[str] = "ADMM with a growing penalty, then conjugate gradients on the support it finds"
    paper: ClassVar[str] = "arXiv 2406.07831"

    penalty: str = hyper(
        "geometric", "how rho grows: by equal ratios, or by support change", choices=("geometric", "support")
    )
    steps: int = hyper(48, "ADMM steps with the geometric penalty", low=1)
    levels: int = hyper(8, "distinct values of the geometric penalty", low=1)
    rho_first: float = hyper(0.1, "first geometric penalty", low=1e-6)
    rho_last: float = hyper(1.0, "last geometric penalty", low=1e-6)
    max_support_steps: int = hyper(300, "ADMM steps at most with the penalty by support change", low=1)
    rho_support: float = hyper(0.1, "first penalty by support change", low=1e-6)
    damping: float = hyper(0.01, "added to the diagonal of H, as a fraction of its mean", low=0)
    refit_damping: float = hyper(0.01, "the same in the conjugate gradients", low=0)
    pcg_steps: int = hyper(10, "conjugate-gradient steps at the end", low=0)
    rtol: float = hyper(1e-4, "conjugate gradients stop where residuals have fallen by this factor", low=0)

    def __str__(self) -> str:
        return "alps-paper" if self.penalty == "support" else "alps"

    def init(self, problem: LayerProblem, pattern: Pattern, start: Solution | None) -> _State:
        scaled = problem.scaled(self.damping, damp_first=True)
        X = problem.to_scaled(problem.W0, scaled)
        Y = X.abs()
        mask = pattern.project(Y)
        support = self.penalty == "support"
        apply_mask(X, mask, out=X)
        return _State(
            problem, pattern, scaled, X, torch.empty_like(X), Y, mask, mask if support else None,
            torch.empty_like(scaled.H), self.rho_support if support else self.rho_first,
        )  # fmt: skip

    def max_steps(self, state: _State) -> int:
        return self.max_support_steps if self.penalty == "support" else self.steps

    def step(self, state: _State, t: int) -> dict[str, float]:
        if self.penalty == "geometric":
            self._set_rho(state, self._geometric(t))
        if state.factored != state.rho:
            shifted_inverse(state.scaled.H, state.rho, out=state.inverse).mul_(state.rho)
            state.factored = state.rho
        X, Y, before, W0, s = state.X, state.Y, state.mask, state.problem.W0, state.scaled.live
        D = apply_mask(X, before, out=Y)
        U = X.sub_(D).mul_(state.rescale)  # (4), in place of X
        Y = D.sub_(U).addcmul_(W0, s, value=-1)
        W = torch.mm(Y, state.inverse, out=state.W).addcmul_(W0, s)  # (1')
        U.add_(W)  # X = W + U
        state.mask = state.pattern.project(torch.abs(X, out=Y))  # (2), (3)
        state.rescale = 1.0
        trace = {"rho": state.rho, "support change": float(_changes(state.mask, before))}
        if self.penalty == "support" and t % _LOOK_EVERY == 0:
            self._look(state, t)
        return trace

    def stop(self, state: _State, t: int) -> bool:
        return state.still

    def iterate(self, state: _State) -> Float[Tensor, "out inputs"]:
        return state.W

    def finish(self, state: _State) -> Solution:
        mask = state.pattern.project(torch.abs(state.W, out=state.Y))
        state.X = state.Y = state.inverse = torch.empty(0)  # their memory is for the conjugate gradients
        W, W0, scaled = apply_mask(state.W, mask, out=state.W), state.problem.W0, state.scaled
        less = None
        if self.refit_damping != self.damping:
            mean = state.problem.H.diagonal().mean()
            less = (self.damping - self.refit_damping) * mean / scaled.s.square()
        steps, residuals = conjugate_gradients_(W, W0, mask, scaled, self.pcg_steps, self.rtol, less)
        weight = state.problem.from_scaled(W, mask, scaled)
        return Solution(weight, mask, steps=steps, trace={"residual": residuals})

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent and self.penalty == "geometric"

    def _geometric(self, t: int) -> float:
        level = (t - 1) * self.levels // self.steps if self.levels < self.steps else t - 1
        highest = max(1, min(self.levels, self.steps) - 1)
        return float(self.rho_first * (self.rho_last / self.rho_first) ** (level / highest))  # (6)

    def _look(self, state: _State, t: int) -> None:
        """(5), and the released code's rules, every third step."""
        assert state.looked is not None  # as always with this penalty
        changed, kept = _changes(state.mask, state.looked), count(state.mask)
        state.looked = state.mask
        if (t >= _STILL_FROM and changed < _STILL * kept) or (changed == 0 and state.moved):
            state.still = True
        elif changed == 0:
            self._set_rho(state, state.rho / _RESTART)
            W0 = state.problem.to_scaled(state.problem.W0, state.scaled)
            state.mask = state.looked = state.pattern.project(W0.abs())
            apply_mask(W0, state.mask, out=state.X)
        else:
            state.moved = True
            factor = next(factor for share, factor in _GROWTH if changed >= share * kept)
            self._set_rho(state, min(state.rho * factor, _MAX_RHO))

    @staticmethod
    def _set_rho(state: _State, rho: float) -> None:
        state.rescale *= state.rho / rho
        state.rho = rho


def _changes(mask: Tensor, before: Tensor) -> int:
    return count(mask ^ before)
