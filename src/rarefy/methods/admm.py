"""ADMM pruning: alternate between the best dense answer near the mask and the best mask near it.

In coordinates of unit diagonal (|W0 s| is the Wanda score), with A = H / (s s^T) + damping I, scaled
dual U and penalty rho, for t = 1..steps, from W = W0, U = 0:

    M chosen from the scores |W + U| at sparsity s_t            (1)  while t <= mask_steps
    Z = M (W + U)                                               (2)
    U <- U + W - Z                                              (3)
    W <- (W0 A + rho (Z - U)) (A + rho I)^-1                    (4)

and at the end Z = M (W + U) once more; the answer is Z / s. The cubic schedule of the gradual masks is
s_t = s - s (1 - t / mask_steps)^3.                             (5)

The code keeps V = W + U only, since (2) and (3) give Z = M V, U = V - Z. And because
W0 A (A + rho I)^-1 = W0 - rho W0 (A + rho I)^-1, step (4) needs one product and no W0 A:

    W = W0 + (Z - U - W0) rho (A + rho I)^-1                    (4')

| code    | paper         | shape     | meaning                              |
|---------|---------------|-----------|--------------------------------------|
| V       | W^k + U^k     | (out, in) | what is projected                    |
| inverse | (XX^T+rho I)^-1 | (in, in) | rho (A + rho I)^-1, one per Gram    |

Source: Boža, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938,
algorithms 1 and 2; 20 steps, 15 of them with mask choice, damping 0.1, rho = 1. Schedules: "cubic" is
the paper's; "reselect" chooses at the final sparsity from the start, as the released code does;
"fixed" chooses the mask once, by Wanda score (ADMM1). N:M: on the way, the N largest of each group are
protected and the rest is pruned by one threshold; the released code knows 2:4 only.
Cost: one product W @ H a step, one factorisation per Gram. Memory: five (out, in), three (in, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.layer.passes import apply_mask
from rarefy.layer.pattern import Fixed, Pattern
from rarefy.layer.problem import LayerProblem, Scaled
from rarefy.layer.solution import Solution
from rarefy.layer.spectrum import scaled_inverse
from rarefy.methods.base import IterativeMethod, hyper


@dataclass
class _State:
    problem: LayerProblem
    pattern: Pattern
    scaled: Scaled
    W0: Float[Tensor, "out inputs"]
    V: Float[Tensor, "out inputs"]
    W: Float[Tensor, "out inputs"]
    Y: Float[Tensor, "out inputs"]
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
    damping: float = hyper(0.1, "added to the diagonal of H at unit diagonal", low=0)
    rho: float = hyper(1.0, "penalty on the distance to the mask", low=1e-6)
    schedule: str = hyper(
        "cubic",
        "gradual sparsity, final sparsity at once, or one mask",
        choices=("cubic", "reselect", "fixed"),
    )

    def __str__(self) -> str:
        return {"cubic": "admm", "reselect": "admm-reselect", "fixed": "admm1"}[self.schedule]

    def init(self, problem: LayerProblem, pattern: Pattern, start: Solution | None) -> _State:
        scaled = problem.scaled(self.damping, damp_first=False)
        W0 = problem.to_scaled(problem.W0, scaled)
        V = W0.clone() if start is None else problem.to_scaled(start.weight.to(problem.dtype), scaled)
        mask = pattern.project(W0.abs()) if start is None else start.mask
        if self.schedule == "fixed":
            pattern = Fixed(mask)
        inverse = scaled_inverse(problem, scaled, self.rho)
        return _State(problem, pattern, scaled, W0, V, torch.empty_like(V), torch.empty_like(V), inverse, mask)

    def max_steps(self, state: _State) -> int:
        return self.steps

    def step(self, state: _State, t: int) -> dict[str, float]:
        last = min(self.mask_steps, self.steps)
        if t <= last and self.schedule != "fixed":
            pattern = state.pattern
            if self.schedule == "cubic" and t < last:
                pattern = pattern.at(1 - (1 - t / last) ** 3)  # (5)
            state.mask = pattern.project(torch.abs(state.V, out=state.Y))  # (1)
        Z = apply_mask(state.V, state.mask, out=state.Y)  # (2)
        U = state.V.sub_(Z)  # (3), in place of V
        W = torch.addmm(state.W0, Z.sub_(U).sub_(state.W0), state.inverse, out=state.W)  # (4')
        U.add_(W)  # V = W + U
        return {}

    def iterate(self, state: _State) -> Float[Tensor, "out inputs"]:
        return state.V

    def finish(self, state: _State) -> Solution:
        mask = state.mask
        return Solution(state.problem.from_scaled(state.V, mask, state.scaled), mask)

    def rows_independent(self, pattern: Pattern) -> bool:
        gradual = self.schedule == "cubic"
        return pattern.rows_independent and not (gradual and pattern.group > 1)
