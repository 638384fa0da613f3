"""ADMM pruning: alternate between the best dense answer near the mask and the best mask near it.

In coordinates of unit diagonal (|W0 s| is the Wanda score), with A = H / (s s^T) + damping I, scaled
dual U and penalty rho, for t = 1..steps, from W = W0, U = 0:

    M chosen from the scores |W + U| at sparsity s_t            (1)  while t <= mask_steps
    Z = M (W + U)                                               (2)
    U <- U + W - Z                                              (3)
    W <- (W0 A + rho (Z - U)) (A + rho I)^-1                    (4)

and at the end Z = M (W + U) once more; the answer is Z / s. The cubic schedule of the gradual masks is
s_t = s - s (1 - t / mask_steps)^3.                             (5)

Because W0 A (A + rho I)^-1 = W0 - rho W0 (A + rho I)^-1, step (4) needs one product and no W0 A:

    W = W0 + (Z - U - W0) rho (A + rho I)^-1                    (4')

| code    | paper           | shape     | meaning                            |
|---------|-----------------|-----------|------------------------------------|
| W, U, Z | W^k, U^k, Z^k   | (out, in) | dense weight, scaled dual, sparse weight |
| inverse | (XX^T+rho I)^-1 | (in, in)  | rho (A + rho I)^-1, one per Gram   |

Source: Boža, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938,
algorithms 1 and 2; 20 steps, 15 of them with mask choice, damping 0.1, rho = 1. Schedules: "cubic" is
the paper's; "reselect" chooses at the final sparsity from the start, as the released code does;
"fixed" chooses the mask once, by Wanda score (ADMM1). N:M: on the way, the N largest of each group are
protected, and of the rest of a row goes first what is small beside the smallest of them in its group; the
released code knows 2:4 only, and has one threshold for all groups, which decides those of large weights last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.layer.passes import apply_mask
from rarefy.layer.pattern import Fixed, Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution
from rarefy.layer.spectrum import penalised_inverse
from rarefy.methods.base import Cost, IterativeMethod, hyper, inversions


@dataclass
class _State:
    problem: LayerProblem
    pattern: Pattern
    W0: Float[Tensor, "out inputs"]
    W: Float[Tensor, "out inputs"]
    U: Float[Tensor, "out inputs"]
    Z: Float[Tensor, "out inputs"]
    scratch: Float[Tensor, "out inputs"]
    inverse: Float[Tensor, "in in"]
    mask: Bool[Tensor, "out inputs"]


@dataclass(frozen=True)
class ADMM(IterativeMethod[_State]):
    """Alternating direction method of multipliers with gradual masks."""

    name: ClassVar[str] = "admm"
    summary: ClassVar[str] = "alternates between weights and masks, with masks that become sparse gradually"
    paper: ClassVar[str] = "arXiv 2401.02938"
    takes_start: ClassVar[bool] = True

    steps: int = hyper(20, "iterations", low=1)
    mask_steps: int = hyper(15, "iterations that choose the mask again", low=1)
    damping: float = hyper(0.1, "added to the diagonal of H, as a share of each input's own energy", low=0)
    rho: float = hyper(1.0, "penalty on the distance to the mask", low=1e-6)
    schedule: str = hyper(
        "cubic",
        "gradual sparsity, final sparsity at once, or one mask",
        choices=("cubic", "reselect", "fixed"),
    )

    def __str__(self) -> str:
        return {"cubic": "admm", "reselect": "admm-reselect", "fixed": "admm1"}[self.schedule]

    def init(self, problem: LayerProblem, pattern: Pattern, start: Solution | None) -> _State:
        W0 = problem.to_scaled(problem.W0, problem.scaled)
        W = W0.clone() if start is None else problem.to_scaled(start.weight.to(problem.dtype), problem.scaled)
        mask = pattern.project(W0.abs()) if start is None else start.mask
        if self.schedule == "fixed":
            pattern = Fixed(mask)
        inverse = penalised_inverse(problem, self.damping, self.rho)
        U, Z, scratch = torch.zeros_like(W), torch.empty_like(W), torch.empty_like(W)
        return _State(problem, pattern, W0, W, U, Z, scratch, inverse, mask)

    def max_steps(self, state: _State) -> int:
        return self.steps

    def step(self, state: _State, t: int) -> dict[str, float]:
        W0, W, U, Z, scratch = state.W0, state.W, state.U, state.Z, state.scratch
        V = U.add_(W)
        if (pattern := self._pattern(state, t)) is not None:
            state.mask = pattern.project(torch.abs(V, out=scratch))  # (1)
        apply_mask(V, state.mask, out=Z)  # (2)
        U = V.sub_(Z)  # (3)
        toward = torch.sub(Z, U, out=scratch).sub_(W0)
        torch.addmm(W0, toward, state.inverse, out=W)  # (4')
        return {}

    def _pattern(self, state: _State, t: int) -> Pattern | None:
        """What the mask of step t is chosen from; None where it stays."""
        last = min(self.mask_steps, self.steps)
        if self.schedule == "fixed" or t > last:
            return None
        if self.schedule == "reselect" or t == last:
            return state.pattern
        return state.pattern.at(1 - (1 - t / last) ** 3)  # (5)

    def iterate(self, state: _State) -> Float[Tensor, "out inputs"]:
        return state.W

    def finish(self, state: _State) -> Solution:
        V, problem = state.U.add_(state.W), state.problem
        return Solution(problem.from_scaled(V, state.mask, problem.scaled), state.mask)

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        # Gradual masks of groups need scores relative to their group, which take two matrices more.
        gradual = self.schedule == "cubic" and pattern.group > 1
        return Cost(self.steps + inversions(1, shape), weights=7 if gradual else 5, grams=2)
