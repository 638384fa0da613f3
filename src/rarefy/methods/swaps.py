"""SparseSwaps: exchange a kept and a pruned weight of a row while that lowers the loss.

With the weights W0 and a mask M, one row has r = w * (1 - m), c = H r, d = diag H, and a loss r H r.
Pruning a kept u and reviving a pruned p changes it by

    a_u + b_p - 2 w_u w_p H_up,  a_u = 2 w_u c_u + w_u^2 d_u,  b_p = -2 w_p c_p + w_p^2 d_p        (1)

Take the best pair while it is negative, then

    c <- c + w_u H[:, u] - w_p H[:, p]                                                             (2)

The best of all kept x pruned pairs is found without looking at all of them. The two p of the lowest b_p
are paired with all u (3), and left out from here on: they would lower the bounds of all others. With
s_j = |w_j| sqrt(d_j) and g_u the largest correlation |H_uj| / sqrt(d_u d_j) of input u with another one,
every pair of u and a p that is left changes the loss by at least

    l_u = a_u + f(s_u g_u),  f(x) = min over p of (b_p - 2 x s_p).                                 (4)

f is concave, so chords between a few of its values stay below it, and (4) costs a few passes over the
row. The u of the lowest l_u is paired with all p (5). Every other u with l_u below the best change so
far is paired with the 16 inputs that are most correlated with it (6), and with all p (7) if with h_u,
the 17th correlation, in place of g_u its bound is still below. No pair that was left out can be better:
the certificate. In an N:M pattern pairs stay within a group and are all looked at.

| code   | paper | shape      | meaning                                                            |
|--------|-------|------------|--------------------------------------------------------------------|
| W, C2  | w, 2c | (rows, in) | weights, and twice H times what the mask takes away                |
| A, B   | a, b  | (rows, in) | (1), infinity where there is nothing to prune, to revive           |
| prune, revive | | (rows, in) | w^2 d, infinity where there is nothing to prune, to revive         |
| S      |       | (rows, in) | |w| sqrt(d)                                                        |
| reach  |       | (rows, in) | s g, the argument of f                                             |
| lowest |       | (rows, in) | l                                                                  |
| partners | |            | g, h, and the 16 inputs of (6) for each input                      |

Source: Zimmer et al., "SparseSwaps", arXiv 2512.10922. Differences: (3) to (7) instead of all pairs;
a swap must lower the loss by more than rounding can; C2 is computed afresh now and then, and always
before a row is called done; a row that ends worse than it began gets its start back. Masks of the
whole matrix keep each row's count. Rows are independent. The start's weights play no part: the answer
is W0 on the mask. Cost: some thirty passes over a row per swap. Memory: a dozen (rows, in) matrices for
a batch of rows that fits a CPU's cache, and with N:M one copy of H.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import lt
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rarefy.layer.passes import apply_mask, compare, first_lowest, piece, places
from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.select import positions_first
from rarefy.layer.solution import Solution, Status
from rarefy.methods.base import Cost, Method, check_rows_apart, hyper, masked, wanda_scores

_ELEMENTS = 2**18  # of a batch of rows: its matrices stay in a CPU's cache
_STALE = 64  # swaps after which C2 is computed afresh
_IDLE = 0.125  # share of finished rows at which the others are moved together
# A swap must lower the loss by this share of the sum of w_j^2 d_j over what is pruned: well above what rounding
# leaves of (2). What is kept does not count, for one input may have more energy than all others.
_ENOUGH = {torch.float32: 1e-5, torch.float64: 1e-13}
_NEAR = 16  # partners of an input that are tried before all
_FIRST = 2  # inputs to revive that are paired with all before
_KNOTS = (0.07, 0.2, 1.0)  # where f is evaluated beside 0, as shares of its largest argument

Rows = Float[Tensor, "rows inputs"]
Best = tuple[Float[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, " rows"]]


@dataclass(frozen=True)
class Swaps(Method):
    """Exact best exchanges of one kept and one pruned weight per row, until none lowers the loss."""

    name: ClassVar[str] = "swaps"
    summary: ClassVar[str] = "exchanges kept and pruned weights of a row while that lowers the loss"
    paper: ClassVar[str] = "arXiv 2512.10922"
    default_scope: ClassVar[str] = "row"
    takes_start: ClassVar[bool] = True

    max_swaps: int = hyper(10_000, "swaps per row at most", low=0)

    def check_pattern(self, pattern: Pattern) -> None:
        check_rows_apart(self, pattern)

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        mask = pattern.project(wanda_scores(problem)) if start is None else start.mask
        if not pattern.has_choice:
            return Solution(apply_mask(problem.W0, mask), mask, Status.TRIVIAL)
        # The partners of an input are then a multiple of in / group away, so pairs are contiguous passes.
        order = positions_first(problem.shape[1], pattern.group, problem.H.device)
        H = problem.H if pattern.group == 1 else problem.H[order][:, order]
        key = ("swap partners", problem.dtype, problem.W0.device)
        grouped = pattern.group > 1
        partners = None if grouped else problem.gram.cached(key, lambda: nearest_partners(problem.H))
        found = torch.empty_like(mask)
        height = max(1, piece(problem.W0, _ELEMENTS) // problem.shape[1])
        counts = []
        unfinished = False
        for a in range(0, problem.shape[0], height):
            rows = slice(a, a + height)
            batch = _Batch(problem.W0[rows][:, order], H, mask[rows][:, order], partners, pattern.group)
            unfinished |= batch.search(self.max_swaps)
            found[rows, order] = batch.result
            counts.append(batch.swaps)
        solution = masked(problem.W0, found)
        solution.status = Status.STEP_LIMIT if unfinished else Status.CONVERGED
        swaps = torch.cat(counts)
        solution.steps = int(swaps.max())
        solution.details = {"swaps": float(swaps.sum())}
        return solution

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        # Passes over rows, of which a batch is small: about as long as this many products (docs/log.md).
        batch = min(1.0, _ELEMENTS / (shape[0] * shape[1]))
        grouped = pattern.group > 1
        return Cost(90 if grouped else 250, weights=1 + 16 * batch, grams=1 if grouped else 0)


@dataclass(frozen=True, eq=False)
class Partners:
    """The inputs that are most correlated with each input, and bounds of its other correlations."""

    nearest: Float[Tensor, "in"]  # g, rounded up
    rest: Float[Tensor, "in"]  # h, rounded up
    index: Int[Tensor, "in near"]
    H: Float[Tensor, "in near"]  # H[u, index[u]]


def nearest_partners(H: Float[Tensor, "in in"]) -> Partners:
    """The inputs nearest to each input by |H_uj| / sqrt(H_uu H_jj); dead inputs are near to none."""
    s = H.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(s > 0, 1 / s, 0)
    near = min(_NEAR, len(H) - 1)  # no mutant: more partners find the same pairs, in more time
    values, index = [], []
    for a in range(0, len(H), 256):  # strips, to need no second (in, in) matrix
        strip = (H[a : a + 256] * inverse).abs_().mul_(inverse[a : a + 256].unsqueeze(1))
        strip.diagonal(a).fill_(-1)
        highest = strip.topk(min(near + 1, len(H)), dim=1)
        values.append(highest.values)
        index.append(highest.indices[:, :near].int())
    correlation = torch.cat(values).clamp_min_(0).mul_(1 + 64 * torch.finfo(H.dtype).eps)  # no mutant: a wider bound
    found = torch.cat(index)
    return Partners(correlation[:, 0], correlation[:, -1], found, H.gather(1, found.long()))


class _Batch:
    """Some rows that are searched together; rows that are done leave it."""

    _PER_ROW = ("W", "C2", "S", "Q", "prune", "revive", "reach", "top", "enough", "fresh", "count", "index", "begun")

    def __init__(
        self,
        W: Rows,
        H: Float[Tensor, "in in"],
        mask: Bool[Tensor, "rows inputs"],
        partners: Partners | None,  # None if ``group`` is more than 1
        group: int,
    ) -> None:
        self.H, self.group = H, group
        self.partners = partners
        self.result = mask.clone()  # of all rows, in their first order
        self.swaps = torch.zeros(len(mask), dtype=torch.int64, device=W.device)
        self.W = W.contiguous()
        self.S = W.abs() * H.diagonal().clamp_min(0).sqrt()
        self.Q = self.S.square()
        self.prune = self.Q.masked_fill(~mask, torch.inf)
        self.revive = self.Q.masked_fill(mask, torch.inf)
        self.reach = self.S if partners is None else self.S * partners.nearest
        self.top = self.reach.amax(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
        self.enough = torch.empty_like(self.top[:, 0])
        self.C2 = torch.empty_like(self.W)
        self.fresh = torch.zeros(len(W), dtype=torch.bool, device=W.device)
        self.rows = self.index = torch.arange(len(W), device=W.device)
        self.count = torch.zeros_like(self.index)
        self._refresh(~self.fresh)
        self.begun = self._losses()

    def search(self, max_swaps: int) -> bool:
        """Swap until no row has a swap that lowers its loss; whether ``max_swaps`` stopped one before."""
        unfinished = False
        done = torch.zeros_like(self.fresh)
        for t in range(1, 2**62):
            change, u, p = self._best_in_groups() if self.partners is None else self._best_in_rows(self.partners)
            improves = (change < -self.enough) & ~done
            if not bool(improves.all()):
                done |= ~improves & self.fresh  # otherwise rounding may have hidden a swap: look once more
                self._refresh(~improves & ~done)
            if t > max_swaps:  # some row may have made as many
                limited = improves & (self.count >= max_swaps)
                unfinished |= bool(limited.any())
                self._refresh(limited)
                improves &= ~limited
                done |= limited
            self._swap(improves, u, p)
            if t % _STALE == 0:
                self._refresh(improves)
            finished = int(torch.count_nonzero(done))
            if finished > _IDLE * len(done) or finished == len(done):
                self._leave(done)
                done = torch.zeros_like(self.fresh)
                if len(done) == 0:
                    break
        return unfinished

    def _best_in_rows(self, partners: Partners) -> Best:
        """The lowest change of every row, and its u and p."""
        x = self.W * self.C2
        A = self.prune + x  # (1)
        B = torch.sub(self.revive, x, out=x)
        best: Best | None = None
        for _ in range(_FIRST):  # (3)
            p = first_lowest(B)
            change, u = self._best_partner(B, A, p)
            best = _lower(best, (change, u, p))
            B[self.rows, p] = torch.inf
        heights, slopes = self._chords(B)
        lowest, X = torch.full_like(A, torch.inf), torch.empty_like(A)
        for height, slope in zip(heights.split(1, dim=1), slopes.split(1, dim=1)):  # (4)
            torch.minimum(lowest, torch.addcmul(height, self.reach, slope, out=X), out=lowest)
        lowest += A
        u = first_lowest(lowest)  # (5)
        change, p = self._best_partner(A, B, u)
        best = _lower(best, (change, u, p))
        lowest[self.rows, u] = torch.inf
        r, v = places(compare(lt, lowest, best[0].unsqueeze(1)))
        if len(r):
            best = self._neighbours(A, B, partners, r, v, best)  # (6)
            x = (self.S[r, v] * partners.rest[v]).unsqueeze(1)
            bound = torch.addcmul(heights.index_select(0, r), slopes.index_select(0, r), x).amin(dim=1)
            left = bound + A[r, v] < best[0][r]
            r, v = r[left], v[left]
        step = max(1, piece(A, _ELEMENTS) // A.shape[1])  # no mutant: a piece's size
        for a in range(0, len(r), step):  # (7)
            some, w = r[a : a + step], v[a : a + step]
            best = _better(best, some, w, *self._best_partner(A, B, w, some))
        return best

    def _chords(self, B: Rows) -> tuple[Float[Tensor, "rows knots"], Float[Tensor, "rows knots"]]:
        """Heights at 0 and slopes of lines whose lowest is below f: its chords, for f is concave."""
        X, x0, f0 = torch.empty_like(B), torch.zeros_like(self.top), B.amin(dim=1, keepdim=True)
        heights, slopes = [], []
        for share in _KNOTS:
            x1 = share * self.top
            f1 = torch.addcmul(B, self.S, -2 * x1, out=X).amin(dim=1, keepdim=True)
            slope = (f1 - f0) / (x1 - x0)
            heights.append(f0 - slope * x0)
            slopes.append(slope)
            x0, f0 = x1, f1
        return torch.cat(heights, dim=1), torch.cat(slopes, dim=1)

    def _best_partner(self, A: Rows, B: Rows, u: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The lowest change that u can have in its row, and its p; ``rows``: not of all rows, but of these."""
        W = self.W if rows is None else self.W.index_select(0, rows)
        B = B if rows is None else B.index_select(0, rows)
        rows = self.rows if rows is None else rows
        X = self.H.index_select(0, u).mul_(W)
        torch.addcmul(B, X, (-2 * self.W[rows, u]).unsqueeze(1), out=X)
        p = first_lowest(X)
        return A[rows, u] + X.gather(1, p.unsqueeze(1)).squeeze(1), p

    def _neighbours(self, A: Rows, B: Rows, partners: Partners, r: Tensor, u: Tensor, best: Best) -> Best:
        """The best of ``best`` and of the pairs of u in row r with the inputs nearest to it."""
        p = partners.index.index_select(0, u)
        at = (p + (r * A.shape[1]).to(p.dtype).unsqueeze(1)).view(-1)
        X = self.W.view(-1).index_select(0, at).view_as(p).mul_(partners.H.index_select(0, u))
        X = torch.addcmul(B.view(-1).index_select(0, at).view_as(p), X, (-2 * self.W[r, u]).unsqueeze(1))
        nearest = first_lowest(X).unsqueeze(1)
        change = A[r, u] + X.gather(1, nearest).squeeze(1)
        return _better(best, r, u, change, p.gather(1, nearest).squeeze(1).long())

    def _best_in_groups(self) -> Best:
        """The lowest change of every row within a group, and its u and p: all pairs are looked at."""
        x = self.W * self.C2
        A = self.prune + x  # (1)
        B = torch.sub(self.revive, x, out=x)
        inputs = A.shape[1]
        apart = inputs // self.group
        twice_W, twice_B = torch.cat([self.W, self.W], dim=1), torch.cat([B, B], dim=1)
        X = torch.empty_like(A)
        best: Best | None = None
        for shift in range(apart, inputs, apart):
            partner = slice(shift, shift + inputs)
            torch.mul(self.W, twice_W[:, partner], out=X)
            X.mul_(self._beside(shift)).add_(A).add_(twice_B[:, partner])
            u = first_lowest(X)
            change = X.gather(1, u.unsqueeze(1)).squeeze(1)
            p = (u + shift) % inputs
            best = _lower(best, (change, u, p))
        assert best is not None  # a group has at least two inputs
        return best

    def _beside(self, shift: int) -> Float[Tensor, "in"]:
        """-2 H_up for every u and the p that is ``shift`` further, cyclically."""
        return -2 * torch.cat([self.H.diagonal(shift), self.H.diagonal(shift - len(self.H))])

    def _swap(self, improves: Bool[Tensor, " rows"], u: Tensor, p: Tensor) -> None:
        r = improves.nonzero().squeeze(1)
        if len(r) == 0:
            return
        if len(r) == len(improves):
            self.C2.addcmul_(self.H.index_select(0, u), 2 * self.W[r, u].unsqueeze(1))  # (2)
            self.C2.addcmul_(self.H.index_select(0, p), -2 * self.W[r, p].unsqueeze(1))
        else:
            u, p = u[r], p[r]
            step = self.H.index_select(0, u).mul_(2 * self.W[r, u].unsqueeze(1))
            step.addcmul_(self.H.index_select(0, p), -2 * self.W[r, p].unsqueeze(1))
            self.C2.index_add_(0, r, step)
        self.prune[r, u] = self.revive[r, p] = torch.inf
        self.prune[r, p], self.revive[r, u] = self.Q[r, p], self.Q[r, u]
        self.fresh[r] = False
        self.count[r] += 1

    def _taken(self) -> Rows:
        """What the masks take away: the weights that could be revived."""
        return self.W * self.revive.isfinite()

    def _losses(self) -> Float[Tensor, " rows"]:
        return (self._taken() * self.C2).sum(dim=1, dtype=torch.float64) / 2

    def _refresh(self, rows: Bool[Tensor, " rows"]) -> None:
        """Compute C2 anew in these rows, and what a swap must gain."""
        r = rows.nonzero().squeeze(1)
        if len(r):
            pruned = self.revive[r].isfinite()
            self.C2[r] = (2 * self.W[r]).mul_(pruned) @ self.H
            self.enough[r] = (self.Q[r] * pruned).sum(dim=1).mul_(_ENOUGH[self.W.dtype])
            self.fresh[r] = True

    def _leave(self, done: Bool[Tensor, " rows"]) -> None:
        """Write down the masks of rows that are done, unless they began better, and go on with the others."""
        better = done & (self._losses() <= self.begun)  # no mutant: rounding alone makes a row worse than it began
        self.result[self.index[better]] = self.revive[better].isinf()
        self.swaps[self.index[done]] = self.count[done]
        left = (~done).nonzero().squeeze(1)
        for name in self._PER_ROW:
            setattr(self, name, getattr(self, name).index_select(0, left))
        self.rows = torch.arange(len(left), device=left.device)


def _lower(best: Best | None, other: Best) -> Best:
    """Row by row the one with the lower change; of equals the first."""
    if best is None:
        return other
    better = other[0] < best[0]
    change, u, p = (torch.where(better, new, old) for new, old in zip(other, best))
    return change, u, p


def _better(best: Best, r: Tensor, u: Tensor, change: Tensor, p: Tensor) -> Best:
    """``best``, replaced where a pair (u, p) of row r changes the loss by less."""
    lowest = best[0].scatter_reduce(0, r, change, "amin")
    won = ((change == lowest[r]) & (change < best[0][r])).nonzero().squeeze(1).flip(0)  # of equals the first
    best[1][r[won]], best[2][r[won]] = u[won], p[won]
    return lowest, best[1], best[2]
