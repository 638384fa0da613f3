"""ALPS: ADMM whose penalty grows until the support stands still, then conjugate gradients on it.

In coordinates of unit diagonal, in which weights are W s, with A = H / (s s^T) + damping I:

    min tr((W - W0) A (W - W0)^T)  with W = D, D sparse.

In scaled dual form (U = V / rho), from D = P(W0), U = 0, for t = 1, 2, ...

    W <- (W0 A - rho U + rho D) (A + rho I)^-1                  (1)
    D <- P(W + U), P the projection on the pattern              (2)
    U <- U + W - D                                              (3)
    rho <- next penalty, U <- U rho_old / rho                   (4)

then M = the pattern's choice from |W|, and conjugate gradients on M from M W (see refit.py), with
refit_damping in place of damping.

``ALPSPaper``, as published: the penalty follows the support. rho_0 = 0.1; every 3 steps, with s the number of
positions of the support that changed since the last look and k the number of kept weights:

    s >= 0.1 k: rho * 1.3;  s >= 0.005 k: rho * 1.2;  s >= 1: rho * 1.1;  s = 0: stop.        (5)

From the released code: at most 300 steps; stop where s < 3e-4 k from step 30 on; rho at most 1e6; if
the support does not move at first, rho / 5 and start again. H is damped by damping * mean(diag H) before it is
brought to unit diagonal; where one input has most of the energy, this drowns all others in damping.

``ALPS``, ours: rho rises from rho_first to rho_last in ``levels`` equal ratios, each held
for steps / levels steps: nothing to watch, and one factorisation a level.                    (6)

Since W0 A (A + rho I)^-1 = W0 - rho W0 (A + rho I)^-1, (1) is one product:

    W = W0 + (D - U - W0) rho (A + rho I)^-1                    (1')

W0 stands for W0 s, which is never kept.

| code     | paper           | shape     | meaning                                        |
|----------|-----------------|-----------|------------------------------------------------|
| W        | W               | (out, in) | primal weight                                  |
| D        | D               | (out, in) | its sparse copy                                |
| U        | V / rho         | (out, in) | scaled dual                                    |
| inverse  | (X^T X + rho I)^-1 | (in, in) | rho (A + rho I)^-1, written anew at each rho |

Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", arXiv 2406.07831, algorithms 1 and 2. Differences: Cholesky factorisations instead of one
eigendecomposition (cheaper here, see docs/log.md); PCG with a step per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.layer.passes import apply_mask, count
from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem, Scaled, scale
from rarefy.layer.solution import Solution
from rarefy.layer.spectrum import shifted_inverse
from rarefy.methods.base import Cost, IterativeMethod, hyper, inversions
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
    damping: float  # added to the diagonal of scaled.A
    W: Float[Tensor, "out inputs"]
    D: Float[Tensor, "out inputs"]
    U: Float[Tensor, "out inputs"]
    scratch: Float[Tensor, "out inputs"]
    mask: Bool[Tensor, "out inputs"]
    inverse: Float[Tensor, "in in"]
    rho: float = 0.0  # that ``inverse`` and U belong to


def _begin(problem: LayerProblem, pattern: Pattern, scaled: Scaled, damping: float) -> _State:
    """D = P(W0), U = 0."""
    D = problem.to_scaled(problem.W0, scaled)
    scratch = D.abs()
    mask = pattern.project(scratch)
    apply_mask(D, mask, out=D)
    W, U, inverse = torch.empty_like(D), torch.zeros_like(D), torch.empty_like(scaled.A)
    return _State(problem, pattern, scaled, damping, W, D, U, scratch, mask, inverse)


def _step(state: _State, rho: float) -> dict[str, float]:
    """(4), (1'), (2), (3), in place."""
    W, D, U, scratch, W0, s = state.W, state.D, state.U, state.scratch, state.problem.W0, state.scaled.live
    if rho != state.rho:
        shifted_inverse(state.scaled.A, state.damping + rho, out=state.inverse).mul_(rho)
        U.mul_(state.rho / rho)  # (4)
        state.rho = rho
    toward = torch.sub(D, U, out=scratch).addcmul_(W0, s, value=-1)
    torch.mm(toward, state.inverse, out=W).addcmul_(W0, s)  # (1')
    X = U.add_(W)
    before, state.mask = state.mask, state.pattern.project(torch.abs(X, out=scratch))
    apply_mask(X, state.mask, out=D)  # (2)
    X.sub_(D)  # (3): this is U again
    return {"rho": rho, "support change": float(_changes(state.mask, before))}


def _end(state: _State, refit_damping: float, steps: int, rtol: float) -> Solution:
    """Conjugate gradients on the support of the largest |W|."""
    mask = state.pattern.project(torch.abs(state.W, out=state.scratch))
    state.D = state.U = state.scratch = state.inverse = torch.empty(0)  # their memory is for the conjugate gradients
    W, problem, scaled = apply_mask(state.W, mask, out=state.W), state.problem, state.scaled
    taken, residuals = conjugate_gradients_(W, problem.W0, mask, scaled, refit_damping, steps, rtol)
    return Solution(problem.from_scaled(W, mask, scaled), mask, steps=taken, trace={"residual": residuals})


@dataclass(frozen=True)
class ALPS(IterativeMethod[_State]):
    """ADMM with a growing penalty, then preconditioned conjugate gradients on its support."""

    name: ClassVar[str] = "alps"
    summary: ClassVar[str] = "ADMM with a growing penalty, then conjugate gradients on the support it finds"
    paper: ClassVar[str] = "arXiv 2406.07831"
    follows_loss: ClassVar[bool] = True

    steps: int = hyper(24, "ADMM steps", low=1)
    levels: int = hyper(6, "distinct values of the penalty", low=1)
    rho_first: float = hyper(0.1, "first penalty", low=1e-6)
    rho_last: float = hyper(1.0, "last penalty", low=1e-6)
    damping: float = hyper(0.03, "added to the diagonal of H, as a share of each input's own energy", low=0)
    refit_damping: float = hyper(0.03, "the same in the conjugate gradients", low=0)
    pcg_steps: int = hyper(10, "conjugate-gradient steps at the end", low=0)
    rtol: float = hyper(1e-4, "conjugate gradients stop where residuals have fallen by this factor", low=0)

    def init(self, problem: LayerProblem, pattern: Pattern, start: Solution | None) -> _State:
        return _begin(problem, pattern, problem.scaled, self.damping)

    def max_steps(self, state: _State) -> int:
        return self.steps

    def step(self, state: _State, t: int) -> dict[str, float]:
        return _step(state, self._penalty(t))

    def _penalty(self, t: int) -> float:
        """(6)."""
        levels = min(self.levels, self.steps)
        level = (t - 1) * levels // self.steps
        return float(self.rho_first * (self.rho_last / self.rho_first) ** (level / max(1, levels - 1)))

    def iterate(self, state: _State) -> Float[Tensor, "out inputs"]:
        return state.W

    def finish(self, state: _State) -> Solution:
        return _end(state, self.refit_damping, self.pcg_steps, self.rtol)

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        levels = min(self.levels, self.steps)
        return Cost(self.steps + self.pcg_steps + 1 + inversions(levels, shape), weights=4, grams=2)


@dataclass
class _Watched(_State):
    """The state of ``ALPSPaper``, whose penalty depends on how the support moves."""

    next_rho: float = field(kw_only=True)
    looked: Bool[Tensor, "out inputs"] = field(kw_only=True)  # the mask at the last look
    moved: bool = False
    still: bool = False


@dataclass(frozen=True)
class ALPSPaper(IterativeMethod[_Watched]):
    """ALPS as published: the penalty grows with the changes of the support, damping is by the mean energy."""

    name: ClassVar[str] = "alps-paper"
    summary: ClassVar[str] = "ALPS as published, with a penalty that follows the changes of the support"
    paper: ClassVar[str] = "arXiv 2406.07831"

    steps: int = hyper(300, "ADMM steps at most", low=1)
    rho: float = hyper(0.1, "first penalty", low=1e-6)
    damping: float = hyper(0.01, "added to the diagonal of H, as a share of its mean", low=0)
    pcg_steps: int = hyper(10, "conjugate-gradient steps at the end", low=0)
    rtol: float = hyper(1e-4, "conjugate gradients stop where residuals have fallen by this factor", low=0)

    def init(self, problem: LayerProblem, pattern: Pattern, start: Solution | None) -> _Watched:
        scaled = scale(problem.H, self.damping * float(problem.H.diagonal().mean()))
        begun = _begin(problem, pattern, scaled, 0.0)
        return _Watched(**vars(begun), next_rho=self.rho, looked=begun.mask)

    def max_steps(self, state: _Watched) -> int:
        return self.steps

    def step(self, state: _Watched, t: int) -> dict[str, float]:
        trace = _step(state, state.next_rho)
        if t % _LOOK_EVERY == 0:
            self._look(state, t)
        return trace

    def _look(self, state: _Watched, t: int) -> None:
        """(5), and the released code's rules."""
        changed, kept = _changes(state.mask, state.looked), count(state.mask)
        state.looked = state.mask
        if (t >= _STILL_FROM and changed < _STILL * kept) or (changed == 0 and state.moved):
            state.still = True
        elif changed == 0:
            begun = _begin(state.problem, state.pattern, state.scaled, state.damping)
            state.D, state.U, state.mask, state.looked = begun.D, begun.U, begun.mask, begun.mask
            state.next_rho = state.rho / _RESTART
        else:
            state.moved = True
            factor = next(factor for share, factor in _GROWTH if changed >= share * kept)
            state.next_rho = min(state.rho * factor, _MAX_RHO)

    def stop(self, state: _Watched, t: int) -> bool:
        return state.still

    def iterate(self, state: _Watched) -> Float[Tensor, "out inputs"]:
        return state.W

    def finish(self, state: _Watched) -> Solution:
        return _end(state, 0.0, self.pcg_steps, self.rtol)

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        levels = -(-self.steps // _LOOK_EVERY)
        return Cost(self.steps + self.pcg_steps + 1 + inversions(levels, shape), weights=4, grams=2)


def _changes(mask: Tensor, before: Tensor) -> int:
    return count(mask ^ before)
