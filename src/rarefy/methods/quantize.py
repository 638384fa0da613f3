"""Quantize: round the kept weights to few bits, and let those that are not yet rounded make up for it.

The support M is the start's and stays. With q(w) the nearest number of the weight's grid (layer/grid.py: a scale for
each group of columns of a row), in coordinates of unit diagonal, W for W s, A = H / (s s^T) + damping I,
A^-1 = U^T U and U upper triangular, for j = 1..in:

    scale  of j's group, when its first column is entered, for the least sum of squared errors        (1)
    Q_:j = q(W_:j) M_:j                                                                               (2)
    E_:j = (W_:j - Q_:j) / U_jj,   W_:l <- W_:l - E_:j U_jl   for l > j                               (3)

which can run away where inputs are nearly alike: what a full column cannot take is handed on, and grows. So a row
whose damped loss is not below that of rounding to the nearest takes the latter,

    Q = q(W) M    with scales of its own                                                              (3')

and then, with all scales fixed, up to ``sweeps`` times over all columns, for j = 1..in:

    D_:j = ((W0 - Q) A)_:j                                                                            (4)
    Q_:j <- q(Q_:j + D_:j / A_jj) M_:j                                                                (5)

In (3) a pruned weight that an update has moved away from 0 is put back to 0 and hands on its error like a rounded
one. (5) is the best number of the grid for one weight while all others stay, so no sweep raises the damped loss.

| code | papers       | shape        | meaning                                            |
|------|--------------|--------------|----------------------------------------------------|
| V    | W^T          | (in, out)    | weights, transposed so that a column is contiguous |
| U    | H^-1, upper  | (in, in)     | factor of the inverse                              |
| E    | E^T          | (in, out)    | scaled errors of rounding                          |
| Q    | W hat^T      | (in, out)    | rounded weights, not scaled: exact products        |
| step | scale        | (groups, out)| scales of the grid                                 |
| D    |              | (in, out)    | half the negative gradient                         |

Source: (1) to (3) Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1, and Frantar and Alistarh, SparseGPT, arXiv
2301.00774, section 3.5, with a given mask; (4) and (5) Behdin et al., QuantEase, arXiv 2309.01885, algorithm 1.
Differences: damping is relative to each input's own energy; scales are those that the stored weight shows again
(layer/grid.py), and of 4 bits the best of four; (3) is applied when a column's turn comes. The start is what (3)
corrects, so a refitted start stays refitted; (5) measures against W0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.layer.grid import choose_scale, nearest
from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem, Scaled
from rarefy.layer.solution import Solution, Status
from rarefy.layer.spectrum import inverse_factor
from rarefy.methods.base import Cost, Method, cannot_come_first, hyper, inversions


@dataclass(frozen=True)
class Quantize(Method):
    """Rounds a start's kept weights to 8 or 4 bits, column by column and then in sweeps of single weights."""

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "rounds the kept weights to 8 or 4 bits, and makes up for it"
    paper: ClassVar[str] = "arXiv 2210.17323, arXiv 2309.01885"
    needs_start: ClassVar[bool] = True
    takes_start: ClassVar[bool] = True
    comes_last: ClassVar[bool] = True

    bits: int = hyper(8, "of a kept weight", choices=(8, 4))
    group: int = hyper(128, "columns of a row that share a scale", choices=(64, 128, 256, 512))
    damping: float = hyper(0.01, "added to the diagonal of H, as a share of each input's own energy", low=0)
    sweeps: int = hyper(3, "passes over single weights afterwards, at most", low=0)

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        if start is None:
            raise cannot_come_first(self)
        factor = inverse_factor(problem, self.damping)
        kept, s = start.mask.T.contiguous(), problem.scaled.s.unsqueeze(1)
        W = start.weight.to(problem.dtype).T
        Q, step = self._round_columns(W * s, kept, factor.U, s)
        D, loss = self._gradient(problem, Q)
        nearest_Q, nearest_step = self._round_to_nearest(W, kept, s)
        nearest_D, nearest_loss = self._gradient(problem, nearest_Q)
        ran_away = ~(loss < nearest_loss)  # also where it is not finite
        Q, D = torch.where(ran_away, nearest_Q, Q), torch.where(ran_away, nearest_D, D)
        step = torch.where(ran_away, nearest_step, step)
        changed: list[float] = []
        while len(changed) < self.sweeps and 0 not in changed:
            changed.append(self._sweep_(Q, D, step, kept, problem.scaled))
        status = Status.DAMPED if factor.damping > self.damping else Status.SOLVED
        details: dict[str, float | str] = {"damping": factor.damping, "bits": self.bits, "group": self.group}
        trace = {"changed weights": changed}
        return Solution(Q.T.contiguous(), start.mask, status, details=details, steps=len(changed), trace=trace)

    def _gradient(
        self, problem: LayerProblem, Q: Float[Tensor, "inputs out"]
    ) -> tuple[Float[Tensor, "inputs out"], Float[Tensor, " out"]]:
        """(4) for all columns, and the damped loss of each row."""
        R = (problem.W0.T - Q).mul_(problem.scaled.s.unsqueeze(1))
        D = torch.addmm(R, problem.scaled.A, R, beta=self.damping)
        return D, R.mul_(D).sum(dim=0)

    def _round_to_nearest(
        self, W: Float[Tensor, "inputs out"], kept: Bool[Tensor, "inputs out"], s: Float[Tensor, "inputs 1"]
    ) -> tuple[Float[Tensor, "inputs out"], Float[Tensor, "groups out"]]:
        """(3'); Q, and the scales."""
        parts, steps = [], []
        for a in range(0, len(W), self.group):
            some = slice(a, min(a + self.group, len(W)))
            step = choose_scale(W[some].T, s[some].square().T.expand(W.shape[1], -1), self.bits)
            parts.append((nearest(W[some], step, self.bits) * step).mul_(kept[some]))
            steps.append(step)
        return torch.cat(parts), torch.stack(steps)

    def _round_columns(
        self,
        V: Float[Tensor, "inputs out"],
        kept: Bool[Tensor, "inputs out"],
        U: Float[Tensor, "inputs inputs"],
        s: Float[Tensor, "inputs 1"],
    ) -> tuple[Float[Tensor, "inputs out"], Float[Tensor, "groups out"]]:
        """(1) to (3), in place in V; Q, and the scales."""
        Q, E, steps = torch.zeros_like(V), torch.empty_like(V), []
        for a in range(0, len(V), self.group):
            b = min(a + self.group, len(V))
            if a:
                V[a:b].addmm_(U[:a, a:b].T, E[:a], alpha=-1)  # (3), all earlier groups at once
            entered = (V[a:b] / s[a:b]).mul_(kept[a:b])
            step = choose_scale(entered.T, s[a:b].square().T.expand(V.shape[1], -1), self.bits)  # (1)
            steps.append(step)
            for j in range(a, b):
                if j > a:
                    V[j].addmv_(E[a:j].T, U[a:j, j], alpha=-1)  # (3)
                Q[j] = (nearest(V[j] / s[j], step, self.bits) * step).mul_(kept[j])  # (2)
                torch.sub(V[j], Q[j] * s[j], out=E[j]).div_(U[j, j])
        return Q, torch.stack(steps)

    def _sweep_(
        self,
        Q: Float[Tensor, "inputs out"],
        D: Float[Tensor, "inputs out"],
        step: Float[Tensor, "groups out"],
        kept: Bool[Tensor, "inputs out"],
        scaled: Scaled,
    ) -> float:
        """(5) for every column, in place in Q and D; the number of weights that have changed."""
        A, s, changed = scaled.A, scaled.s, 0
        diagonal = 1 + self.damping
        for a in range(0, len(Q), self.group):
            b, scale = min(a + self.group, len(Q)), step[a // self.group]
            moved = torch.zeros_like(Q[a:b])  # scaled, by column of the group
            for j in range(a, b):
                if j > a:
                    D[j].addmv_(moved[: j - a].T, A[a:j, j], alpha=-1)  # (4), for what has moved in the group so far
                best = nearest(Q[j] + D[j] / (diagonal * s[j]), scale, self.bits).mul_(scale).mul_(kept[j])  # (5)
                moved[j - a] = (best - Q[j]) * s[j]
                changed += int((best != Q[j]).sum())
                Q[j] = best
            D[:a].addmm_(A[:a, a:b], moved, alpha=-1)
            D[b:].addmm_(A[b:, a:b], moved, alpha=-1)
            # A column of the group has not seen what itself and those after it have moved.
            D[a:b].addmm_(A[a:b, a:b].triu(), moved, alpha=-1).add_(moved, alpha=-self.damping)
        return float(changed)

    def from_trivial(self, problem: LayerProblem, pattern: Pattern, only: Solution) -> Solution:
        return self.solve(problem, pattern, only)

    def rows_independent(self, pattern: Pattern) -> bool:
        return True

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        # half a product in thin pieces, one for each D and one for every sweep; a Cholesky factorisation and a
        # triangular inverse; V, kept, Q, E, D and a passing one
        return Cost(2.5 + self.sweeps + inversions(2 / 3, shape), weights=6, grams=3)
