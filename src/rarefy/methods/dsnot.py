"""DSnoT: exchange weights within a row until the pruned ones no longer shift the output's mean.

With mu the mean and var the variance of the inputs, one row starts with the residual

    e = sum over pruned j of w_j mu_j                                                        (1)

and repeats, while |e| is large and at most ``steps`` times,

    grow:  revive the pruned j with the largest sign(e) w_j mu_j / var_j                     (2)
    prune: the kept j with the lowest Wanda score |w_j| ||X_j|| that has
           sign(e) w_j mu_j < 0                                                              (3)
    e <- e + w_prune mu_prune - w_grow mu_grow                                               (4)

until e changes its sign (that swap is kept), nothing is left to swap, or |e| is below ``threshold``
times the root mean square of the row's dense output, sqrt(w H w / tokens).

Nothing in (2) or (3) depends on e but its sign, and that ends the row. So the swaps are known from the
start: the i-th of the grow order with the i-th of the prune order, within the row or the N:M group; and
one sort and a running sum replace the loop. (5)

| code         | paper     | shape       | meaning                                             |
|--------------|-----------|-------------|-----------------------------------------------------|
| contribution | W E[A]    | (out, in)   | w_j mu_j                                            |
| gain         |           | (out, in)   | the key of (2), -infinity where not allowed         |
| cost         |           | (out, in)   | the key of (3), infinity where not allowed          |
| e            | epsilon   | (out, swaps + 1) | residual before each swap and after the last   |

Source: Zhang et al., "Dynamic Sparse No Training", arXiv 2310.08915, algorithm 1. Differences: the
paper's threshold of 0.1 is absolute and its released code's residual grows with the window's length,
so here it is relative to the row's output; N:M swaps stay within a group, and a group grows only while
it has something to prune; masks of the whole matrix keep each row's count. Weights stay W0. Nothing
makes the layer's error fall: with a threshold near 0 it often rises above the start's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution, Status
from rarefy.methods.base import Cost, Method, check_rows_apart, hyper, masked, wanda_scores

_SMALLEST_VARIANCE = 1e-12  # of the mean square of all inputs: constant inputs must not divide by 0


@dataclass(frozen=True)
class DSnoT(Method):
    """Swaps weights of a row so that the expected output of the pruned row is that of the dense one."""

    name: ClassVar[str] = "dsnot"
    summary: ClassVar[str] = "swaps weights of a row until its mean output is that of the dense row"
    paper: ClassVar[str] = "arXiv 2310.08915"
    default_scope: ClassVar[str] = "row"
    needs_means: ClassVar[bool] = True
    takes_start: ClassVar[bool] = True

    steps: int = hyper(50, "swaps per row at most", low=0)
    threshold: float = hyper(0.1, "residual that is small enough, as a share of the row's output", low=0)

    def check_pattern(self, pattern: Pattern) -> None:
        check_rows_apart(self, pattern)

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        W, scores = problem.W0, wanda_scores(problem)
        mask = pattern.project(scores) if start is None else start.mask
        if not pattern.has_choice:
            return Solution(W * mask, mask, Status.TRIVIAL)
        mean, variance = _moments(problem)
        contribution = W * mean.to(W)
        e0 = (contribution * ~mask).sum(dim=1, dtype=torch.float64)  # (1)
        sign = e0.sign()
        toward = contribution * sign.to(W).unsqueeze(1)
        grows = ~mask & (toward > 0)
        prunes = mask & (toward < 0)
        gain = (toward / variance.to(W)).masked_fill_(~grows, -math.inf)  # (2)
        cost = scores.masked_fill_(~prunes, math.inf)  # (3)

        # (5): both orders within each group (the row, where there are none), then the best pairs of a row
        group = pattern.group if pattern.group > 1 else W.shape[1]
        gain, grow = _sorted(gain, group, descending=True)
        cost, prune = _sorted(cost, group, descending=False)
        gain.masked_fill_(cost.isinf(), -math.inf)
        order = gain.argsort(dim=1, descending=True, stable=True)[:, : self.steps]
        possible = gain.gather(1, order).isfinite()
        grow, prune = grow.gather(1, order), prune.gather(1, order)
        moved = (contribution.gather(1, prune) - contribution.gather(1, grow)).double()
        e = torch.cat([e0.unsqueeze(1), moved], dim=1).cumsum(dim=1)  # (4)
        small = (e.abs() < self._enough(problem).unsqueeze(1)) | (e == 0) | (e.sign() != sign.unsqueeze(1))
        swap = possible & (small[:, :-1].cumsum(dim=1) == 0)

        found = mask.clone()
        row = torch.arange(len(W), device=W.device).unsqueeze(1).expand_as(swap)
        found[row[swap], grow[swap]] = True
        found[row[swap], prune[swap]] = False
        solution = masked(W, found)
        solution.steps = int(swap.sum(dim=1).max()) if swap.numel() else 0
        solution.details = {"swaps": float(swap.sum())}
        return solution

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        return Cost(1, weights=12, grams=0)  # and two sorts

    def _enough(self, problem: LayerProblem) -> Float[Tensor, " out"]:
        """The residual of each row that is small enough, in units of its output."""
        if self.threshold == 0:
            return torch.zeros(problem.shape[0], dtype=torch.float64, device=problem.W0.device)
        energy = ((problem.W0 @ problem.H) * problem.W0).sum(dim=1, dtype=torch.float64)
        return (energy.clamp_min(0) / problem.gram.num_tokens).sqrt().mul(self.threshold)


def _moments(problem: LayerProblem) -> tuple[Float[Tensor, "in"], Float[Tensor, "in"]]:
    """Mean and variance of every input over the tokens, float64; raises InputError without means."""
    mean, variance = (moment.to(problem.W0.device) for moment in (problem.gram.mean, problem.gram.variance))
    smallest = max(_SMALLEST_VARIANCE * float((variance + mean.square()).mean()), 1e-300)
    return mean, variance.clamp_min(smallest)


def _sorted(keys: Float[Tensor, "out inputs"], group: int, descending: bool) -> tuple[Tensor, Tensor]:
    """Keys sorted within each group of a row, the lowest index first among equals; and their inputs."""
    values, index = keys.unflatten(1, (-1, group)).sort(dim=2, descending=descending, stable=True)
    index += torch.arange(0, keys.shape[1], group, device=keys.device).unsqueeze(1)
    return values.flatten(1), index.flatten(1)
