"""SparseFW: Frank-Wolfe on the mask, relaxed to [0, 1]; the kept weights stay as they are.

With R = W0 * (1 - M) what a mask M takes away, the problem is

    min f(M) = tr(R H R^T)  over 0 <= M <= 1 with no more ones than the pattern keeps.

The scores of a warm start (Wanda, RIA, magnitude) choose the first mask. Of its k weights those with
the floor(alpha k) highest scores are kept for ever. From M = the first mask, for t = 0, 1, ...

    G = -grad f / 2 = W0 * (R H)                                         (1)
    V = 1 on what is kept for ever and on the largest entries of G that
        the pattern has room for beside it, if they are positive         (2)
    M <- (1 - eta) M + eta V                                             (3)
    eta = clip(<R H, E> / <E H, E>, 0, 1), E = W0 * (V - M)              (4)  "line-search"
    eta = 2 / (t + 2 + offset)                                           (4') "open-loop"

Every ``round_every`` steps and after the last, M is rounded to the pattern's choice of its largest
entries, and graded (5). The best of these masks and the first is the answer: never worse than the start.

| code  | paper      | shape     | meaning                                                         |
|-------|------------|-----------|-----------------------------------------------------------------|
| M     | M          | (out, in) | relaxed mask; what it says of weights kept for ever is not read |
| fixed | M-bar      | (out, in) | what is kept for ever                                           |
| W     |            | (out, in) | W0 outside fixed, else 0: G and E are 0 there                   |
| G     |            | (out, in) | (1); a line search changes it by - eta W0 * (E H)               |
| V     | V          | (out, in) | V, then V - M; float, for masks are slow to multiply with       |
| E, EH |            | (out, in) | E and E H by line search; R and R H by open loop                |

<R H, E> is <G, V - M>, so R H itself is never kept.

Source: Roux et al., "SparseFW", arXiv 2510.13713, algorithm 2. Differences: the gradient is taken at
M with the part that is kept for ever (the paper prints it without); the paper's eta_0 = 1 throws the
warm start away, so the default is the exact line search, and the open loop has an offset; the best
rounded mask is kept. For N:M the paper leaves open how alpha is shared out: a floor per group would
make 0, 0.1 and 0.25 the same at 2:4, so the highest scores of the whole matrix are kept for ever and
each group chooses the rest of its N. Per row, every row keeps its own floor(alpha k).
Cost: one product W @ H a step and about half a product's time for selection and passes on the smallest
layers, less on larger ones. Rows are not independent: they share eta and the choice of the best mask.
Memory: six (out, in) matrices; for N:M one more,
and a copy of H with the columns of its groups apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rarefy.layer.passes import apply_mask, count, row_dots, write_mask_
from rarefy.layer.pattern import NM, Fixed, Pattern, PerRow, Unstructured
from rarefy.layer.problem import LayerProblem
from rarefy.layer.select import keep_at_least, keep_largest, kth_largest, positions_first
from rarefy.layer.solution import Solution, Status
from rarefy.methods.base import IterativeMethod, hyper, masked, wanda_scores
from rarefy.methods.ria import ria_scores

_RIA_EXPONENT = 0.5  # RIA's own; SparseFW's paper writes 1
_SMALL_GROUP = 8  # inputs up to which the columns of a group are compared one by one


@dataclass
class _State:
    problem: LayerProblem
    pattern: Pattern
    fixed: Bool[Tensor, "out inputs"]
    num_fixed: int  # of each row if the pattern is per row, else of the whole matrix
    W: Float[Tensor, "out inputs"]
    M: Float[Tensor, "out inputs"]
    G: Float[Tensor, "out inputs"]
    V: Float[Tensor, "out inputs"]
    E: Float[Tensor, "out inputs"]
    EH: Float[Tensor, "out inputs"]
    best: Bool[Tensor, "out inputs"]
    lowest: float
    steps: int
    H: Float[Tensor, "in in"]
    order: Int[Tensor, " in"] | None  # of the columns of all but problem, fixed and best; None: as they come
    lock: Float[Tensor, "out inputs"] | None  # infinity on fixed, else 0; only N:M needs it
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
    alpha: float = hyper(0.6, "share of the kept weights that the warm start decides for ever", low=0, high=1)
    warm_start: str = hyper("wanda", "scores that choose the first mask", choices=("wanda", "ria", "magnitude"))
    rule: str = hyper("line-search", "how long a step is", choices=("line-search", "open-loop"))
    offset: float = hyper(20.0, "open-loop steps are 2 / (t + 2 + offset)", low=0)
    round_every: int = hyper(20, "steps between two roundings of the mask", low=1)

    def init(self, problem: LayerProblem, pattern: Pattern, start: Solution | None) -> _State:
        scores = self._scores(problem)
        mask = pattern.project(scores) if start is None else start.mask
        k = count(mask[0] if isinstance(pattern, PerRow) else mask)
        num_fixed = math.floor(self.alpha * k)
        if start is not None or pattern.group > 1:  # else the highest of all scores are in the mask
            scores.masked_fill_(~mask, -math.inf)
        fixed = _highest(scores, num_fixed, pattern)
        W, H, M, order = apply_mask(problem.W0, ~fixed), problem.H, mask.to(problem.dtype), None
        E = apply_mask(problem.W0, ~mask)
        if _in_small_groups(pattern):
            order = positions_first(problem.shape[1], pattern.group, H.device)
            W, M, E, H = W[:, order], M[:, order], E[:, order], H[order][:, order]
        RH = E @ H
        lowest = _loss(E, RH)
        state = _State(
            problem, pattern, fixed, num_fixed, W, M, RH.mul_(W), scores, E, torch.empty_like(E), mask, lowest,
            self.steps, H, order, None,
        )  # fmt: skip
        if not isinstance(pattern, (Unstructured, PerRow)):
            state.lock = torch.zeros_like(E).masked_fill_(fixed if order is None else fixed[:, order], math.inf)
        if isinstance(pattern, Fixed) or torch.equal(fixed, mask):
            state.steps = 0  # nothing to choose
        return state

    def max_steps(self, state: _State) -> int:
        return state.steps

    def step(self, state: _State, t: int) -> dict[str, float]:
        W, H, M, G, E = state.W, state.H, state.M, state.G, state.E
        V = _vertex(state)  # (2)
        if self.rule == "line-search":
            V.sub_(M)
            gain = _dot(G, V)
            EH = torch.mm(torch.mul(W, V, out=E), H, out=state.EH)
            curvature = _dot(EH, E)
            eta = min(max(gain / curvature, 0.0), 1.0) if curvature > 0 else float(gain > 0)  # (4)
            state.still = eta == 0  # and so it would be in every later step
            M.add_(V, alpha=eta)  # (3)
            G.addcmul_(W, EH, value=-eta)  # (1)
        else:
            eta = 2 / (t + 1 + self.offset)  # (4'), t counts from 1 here
            M.mul_(1 - eta).add_(V, alpha=eta)  # (3)
            R = torch.addcmul(W, W, M, value=-1, out=E)  # W is 0 where M is not read
            torch.mul(W, torch.mm(R, H, out=state.EH), out=G)  # (1)
        if t % self.round_every and t != state.steps and not state.still:
            return {}
        return {"rounded loss": self._grade(state, t)}

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

    @staticmethod
    def _grade(state: _State, t: int) -> float:
        """(5): the loss of the rounded mask, which becomes the best one if it is."""
        M = state.M
        if state.order is not None:
            M = torch.empty_like(M).index_copy_(1, state.order, M)
        rounded = state.pattern.project(M, state.fixed)
        taken = apply_mask(state.problem.W0, ~rounded, out=state.V)
        loss = _loss(taken, torch.mm(taken, state.problem.H, out=state.EH))
        if loss < state.lowest:
            state.best, state.lowest, state.best_step = rounded, loss, t
        return loss

    def _scores(self, problem: LayerProblem) -> Float[Tensor, "out inputs"]:
        if self.warm_start == "wanda":
            return wanda_scores(problem)
        return ria_scores(problem, _RIA_EXPONENT) if self.warm_start == "ria" else problem.W0.abs()


def _highest(scores: Tensor, num_fixed: int, pattern: Pattern) -> Bool[Tensor, "out inputs"]:
    """M-bar: the ``num_fixed`` highest scores of each row if the pattern is per row, else of all."""
    if isinstance(pattern, PerRow):
        return keep_largest(scores, num_fixed)
    return keep_largest(scores.view(-1), num_fixed).view_as(scores)


def _vertex(state: _State) -> Float[Tensor, "out inputs"]:
    """(2), in the buffer of V.

    A threshold above 0 keeps only what lowers f.
    """
    pattern, G, V = state.pattern, state.G, state.V
    if state.lock is not None:
        torch.add(G, state.lock, out=V)
        if state.order is not None:
            _keep_largest_in_groups_(V, pattern)
            return V
        chosen = pattern.project(V)
        return V.gt_(0).mul_(chosen)
    rows = G if isinstance(pattern, PerRow) else G.view(1, -1)
    free = pattern.count((len(rows), rows.shape[1])) // len(rows) - state.num_fixed
    threshold = kth_largest(rows, free).unsqueeze(1).clamp_min_(torch.finfo(G.dtype).tiny)
    return write_mask_(V, keep_at_least(rows, threshold, free).view_as(G))


def _in_small_groups(pattern: Pattern) -> bool:
    return isinstance(pattern, NM) and pattern.of <= _SMALL_GROUP


def _keep_largest_in_groups_(G: Float[Tensor, "out inputs"], pattern: Pattern) -> None:
    """1 on the N largest of every group if they are positive, else 0; keeps all equals.

    Inputs stand in the order of ``positions_first``. By insertion: few passes over contiguous columns.
    """
    assert isinstance(pattern, NM)
    columns = G.view(len(G), pattern.of, -1).unbind(1)
    largest: list[Tensor] = []
    for x in columns:
        full = len(largest) == pattern.keep
        for j, most in enumerate(largest):
            if full and j == pattern.keep - 1:
                largest[j] = torch.maximum(most, x)
            else:
                largest[j], x = torch.maximum(most, x), torch.minimum(most, x)
        if not full:
            largest.append(x)
    threshold = largest[-1].clamp_min(torch.finfo(G.dtype).tiny)
    for column in columns:
        column.ge_(threshold)


def _dot(A: Tensor, B: Tensor) -> float:
    """<A, B> of contiguous matrices."""
    return float(torch.dot(A.view(-1), B.view(-1)))


def _loss(R: Tensor, RH: Tensor) -> float:
    """tr(R H R^T), rows added up in float64 so that masks can be told apart."""
    return float(row_dots(R, RH).sum(dtype=torch.float64))
