"""SparseGPT: prune columns from left to right and let the columns to the right make up for it.

In coordinates of unit diagonal, W for W s and A = H / (s s^T), with (A + damping I)^-1 = U^T U and
U upper triangular, for j = 1..in:

    M_:j   chosen by the scores W_ij^2 / U_jj^2 (the loss of one removal)            (1)
    E_:j = W_:j (1 - M_:j) / U_jj                                                    (2)
    W_:j <- W_:j M_:j,   W_:l <- W_:l - E_:j U_jl   for l > j                        (3)

| code | paper       | shape     | meaning                                             |
|------|-------------|-----------|-----------------------------------------------------|
| V    | W^T         | (in, out) | weights, transposed so that a column is contiguous  |
| U    | H^-1, upper | (in, in)  | factor of the inverse                               |
| E    | E^T         | (in, out) | scaled errors of the pruned entries                 |

Source: Frantar and Alistarh, arXiv 2301.00774, algorithm 1, blocks of 128 columns: masks are chosen
for a block when it is entered; N:M masks for a group when it is entered, with updated weights.
Differences: damping is a share of each input's own energy (the paper's is of the mean energy, in which all
inputs drown where one is far larger); budgets of blocks are cumulative, so the total count is exact; the
update (3) is applied when a column's turn comes (one matrix-vector product with the E so far) instead of to
all columns at once, which is the same sum. A factorisation that fails or gives noise is tried again with
more damping, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution, Status
from rarefy.layer.spectrum import inverse_factor
from rarefy.methods.base import Cost, Method, hyper, inversions


@dataclass(frozen=True)
class SparseGPT(Method):
    """Optimal-brain-surgeon pruning, column by column, with updates of the columns to the right."""

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "prunes column by column and updates the columns to the right"
    paper: ClassVar[str] = "arXiv 2301.00774"

    damping: float = hyper(0.01, "added to the diagonal of H, as a share of each input's own energy", low=0)
    block_size: int = hyper(128, "columns whose masks are chosen together", low=1)

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        factor = inverse_factor(problem, self.damping)
        U, shape = factor.U, problem.shape
        V = problem.to_scaled(problem.W0, problem.scaled).T.contiguous()
        kept = torch.empty_like(V, dtype=torch.bool)
        E = torch.empty_like(V)
        width = -(-self.block_size // pattern.group) * pattern.group  # whole N:M groups only
        for a in range(0, shape[1], width):
            b = min(a + width, shape[1])
            if a:
                V[a:b].addmm_(U[:a, a:b].T, E[:a], alpha=-1)  # (3), all earlier blocks at once
            self._prune_block(V[a:b], E[a:b], kept[a:b], U[a:b, a:b], pattern.columns(a, b, shape))
        mask = kept.T.contiguous()
        weight = problem.from_scaled(V.T, mask, problem.scaled)
        status = Status.DAMPED if factor.damping > self.damping else Status.SOLVED
        return Solution(weight, mask, status, details={"damping": factor.damping})

    @staticmethod
    def _prune_block(V: torch.Tensor, E: torch.Tensor, kept: torch.Tensor, U: torch.Tensor, pattern: Pattern) -> None:
        """(1) to (3) within one block, in place; V, E, kept are (width, out), U is (width, width)."""
        diagonal = U.diagonal().unsqueeze(1)
        group = pattern.group if pattern.group > 1 else len(V)
        for j in range(len(V)):
            if j % group == 0:  # (1)
                ahead = V[j : j + group]
                if j:
                    ahead = ahead - U[:j, j : j + group].T @ E[:j]
                scores = (ahead / diagonal[j : j + group]).square_().T.contiguous()
                chosen = pattern.columns(j, j + len(ahead), (V.shape[1], len(V))).project(scores).T
                kept[j : j + group] = chosen
                # (1 - M) / U_jj, so that a column costs one product and one multiplication
                factors = ~chosen / diagonal[j : j + group]
            if j:
                V[j].addmv_(E[:j].T, U[:j, j], alpha=-1)  # (3)
            torch.mul(V[j], factors[j % group], out=E[j])  # (2)
        V.mul_(kept)

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        # half a product, in thin pieces; a Cholesky factorisation and a triangular inverse
        return Cost(0.5 + inversions(2 / 3, shape), weights=3, grams=3)
