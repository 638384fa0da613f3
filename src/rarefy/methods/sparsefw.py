"""SparseFW: Frank-Wolfe on the mask, relaxed to [0, 1]; the kept weights stay as they are.

With R = W0 * (1 - M) what a mask M takes away, the problem is

    min f(M) = tr(R H R^T)  over 0 <= M <= 1 with no more ones than the pattern keeps.

The scores of a warm start (Wanda, RIA, magnitude) choose the first mask. Of its k weights those with
the floor(alpha k) highest scores are kept for ever. From M = the first mask, for t = 0, 1, ...

    G = -grad f / 2 = W0 * (R H)                                         (1)
    V = 1 on what is kept for ever and on the largest entries of G that
        the pattern has room for beside it, if they are positive         (2)
    M <- (1 - eta) M + eta V                                             (3)
    eta = clip(<G, V - M> / <E H, E>, 0, 1), E = W0 * (V - M)            (4)  "line-search"
    eta = 2 / (t + 2 + offset)                                           (4') "open-loop"

(3) changes R by - eta E, so G changes by - eta W0 * (E H), at the cost of one product. Every ``round_every``
steps and after the last, M is rounded to the pattern's choice of its largest entries, and graded (5). The
best of these masks and the first is the answer: never worse than the start.

| code  | paper      | shape     | meaning                                                         |
|-------|------------|-----------|-----------------------------------------------------------------|
| M     | M          | (out, in) | relaxed mask, 1 on what is kept for ever                        |
| fixed | M-bar      | (out, in) | what is kept for ever                                           |
| G     |            | (out, in) | (1)                                                             |
| V     | V          | (out, in) | (2)                                                             |
| D     |            | (out, in) | V - M                                                           |
| E, EH |            | (out, in) | E and E H                                                       |

Source: Roux et al., "SparseFW", arXiv 2510.13713, algorithm 2. Differences: the gradient is taken at
M with the part that is kept for ever (the paper prints it without); the paper's eta_0 = 1 throws the
warm start away, so the default is the exact line search, and the open loop has an offset; the best
rounded mask is kept. alpha is a share of the kept weights of the whole matrix, per row of each row, and for
N:M of the whole matrix with at most N - 1 in a group (the paper leaves this open: a floor per group would
make 0, 0.1 and 0.25 the same at 2:4). Where it is not given, it is the pattern's ``trust``.
Rows are not independent: they share eta and the choice of the best mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.layer.passes import apply_mask, row_dots, write_mask_
from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution, Status
from rarefy.methods.base import Cost, IterativeMethod, hyper, masked, wanda_scores
from rarefy.methods.ria import ria_scores

_RIA_EXPONENT = 0.5  # RIA's own; SparseFW's paper writes 1


@dataclass
class _State:
    problem: LayerProblem
    pattern: Pattern
    fixed: Bool[Tensor, "out inputs"]
    M: Float[Tensor, "out inputs"]
    G: Float[Tensor, "out inputs"]
    D: Float[Tensor, "out inputs"]
    E: Float[Tensor, "out inputs"]
    EH: Float[Tensor, "out inputs"]
    best: Bool[Tensor, "out inputs"]
    lowest: float
    steps: int
    best_step: int = 0
    still: bool = False


@dataclass(frozen=True)
class SparseFW(IterativeMethod[_State]):
    """Frank-Wolfe steps on the relaxed mask, with the surest part of a warm start kept for ever."""

    name: ClassVar[str] = "sparsefw"
    summary: ClassVar[str] = "chooses the mask by Frank-Wolfe steps on its relaxation"
    paper: ClassVar[str] = "arXiv 2510.13713"
    takes_start: ClassVar[bool] = True

    steps: int = hyper(200, "Frank-Wolfe steps", low=0)
    alpha: float | None = hyper(
        None, "share of the kept weights that the warm start decides for ever", low=0, high=1, by="the pattern"
    )
    warm_start: str = hyper("wanda", "scores that choose the first mask", choices=("wanda", "ria", "magnitude"))
    rule: str = hyper("line-search", "how long a step is", choices=("line-search", "open-loop"))
    offset: float = hyper(20.0, "open-loop steps are 2 / (t + 2 + offset)", low=0)
    round_every: int = hyper(20, "steps between two roundings of the mask", low=1)

    def init(self, problem: LayerProblem, pattern: Pattern, start: Solution | None) -> _State:
        scores = self._scores(problem)
        mask = pattern.project(scores) if start is None else start.mask
        fixed = pattern.surest(mask, scores, pattern.trust if self.alpha is None else self.alpha)
        R = apply_mask(problem.W0, ~mask)
        RH = R @ problem.H
        lowest = _loss(R, RH)
        chooses = pattern.has_choice and not torch.equal(fixed, mask)
        return _State(
            problem, pattern, fixed, mask.to(problem.dtype), RH.mul_(problem.W0), scores, R, torch.empty_like(R),
            mask, lowest, self.steps if chooses else 0,
        )  # fmt: skip

    def max_steps(self, state: _State) -> int:
        return state.steps

    def step(self, state: _State, t: int) -> dict[str, float]:
        W0, M, G = state.problem.W0, state.M, state.G
        V = state.pattern.fill(G, state.fixed)  # (2)
        D = write_mask_(state.D, V).sub_(M)
        E = torch.mul(W0, D, out=state.E)
        EH = torch.mm(E, state.problem.H, out=state.EH)
        if self.rule == "line-search":
            gain, curvature = _dot(G, D), _dot(EH, E)
            eta = min(max(gain / curvature, 0.0), 1.0) if curvature > 0 else float(gain > 0)  # (4)
            state.still = eta == 0  # and so it would be in every later step
        else:
            eta = 2 / (t + 1 + self.offset)  # (4'), t counts from 1 here
        M.add_(D, alpha=eta)  # (3)
        G.addcmul_(W0, EH, value=-eta)  # (1)
        if t % self.round_every and t != state.steps and not state.still:
            return {}
        return {"rounded loss": self._grade(state, t)}

    @staticmethod
    def _grade(state: _State, t: int) -> float:
        """(5): the loss of the rounded mask, which becomes the best one if it is."""
        rounded = state.pattern.project(state.M, state.fixed)
        R = apply_mask(state.problem.W0, ~rounded, out=state.E)
        loss = _loss(R, torch.mm(R, state.problem.H, out=state.EH))
        if loss < state.lowest:
            state.best, state.lowest, state.best_step = rounded, loss, t
        return loss

    def stop(self, state: _State, t: int) -> bool:
        return state.still

    def iterate(self, state: _State) -> Float[Tensor, "out inputs"]:
        return state.G

    def finish(self, state: _State) -> Solution:
        solution = masked(state.problem.W0, state.best)
        if state.steps == 0:
            solution.status = Status.TRIVIAL
        solution.details = {"best step": float(state.best_step)}
        return solution

    def _scores(self, problem: LayerProblem) -> Float[Tensor, "out inputs"]:
        if self.warm_start == "wanda":
            return wanda_scores(problem)
        return ria_scores(problem, _RIA_EXPONENT) if self.warm_start == "ria" else problem.W0.abs()

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        return Cost(self.steps + 1 + self.steps // self.round_every, weights=6, grams=0)


def _dot(A: Tensor, B: Tensor) -> float:
    """<A, B> of contiguous matrices."""
    return float(torch.dot(A.view(-1), B.view(-1)))


def _loss(R: Tensor, RH: Tensor) -> float:
    """tr(R H R^T), rows added up in float64 so that masks can be told apart."""
    return float(row_dots(R, RH).sum(dtype=torch.float64))
