"""SparseGPT: prune columns from left to right and let the columns to the right make up for it.

In coordinates of unit diagonal, W for W s and A = H / (s s^T), with (A + damping I)^-1 = U^T U and
U upper triangular, for j = 1..in:

    M_:j   chosen by the scores W_ij^2 / U_jj^2 (the loss of one removal)            (1)
    E_:j = W_:j (1 - M_:j) / U_jj                                                    (2)
    W_:j <- W_:j M_:j,   W_:l <- W_:l - E_:j U_jl   for l > j                        (3)

(1) ignores what (3) does within a group of an N:M pattern. With ``score="joint"`` all sets P that a group g of M
columns may lose are compared, each with the best update of the group's other columns and of those to the right. With
U_gg the group's block of U, for every row and set

    loss(P) = w_P (A_PP)^-1 w_P^T = |w_P C|^2,   A = U_gg^T U_gg,   A_PP = R R^T,   C = R^-T    (4)
    E_:g = w_P C C^T (U_gP)^T    for the set of the lowest loss, then (3) for all of g         (5)

so that the losses still add up to |E|_F^2. All rows share the C of a group; an A is of M columns only.

| code  | paper       | shape       | meaning                                             |
|-------|-------------|-------------|-----------------------------------------------------|
| V     | W^T         | (in, out)   | weights, transposed so that a column is contiguous  |
| U     | H^-1, upper | (in, in)    | factor of the inverse                               |
| E     | E^T         | (in, out)   | scaled errors of the pruned entries                 |
| masks |             | (sets, M)   | the masks that a group may have                     |
| C     |             | (sets, M, p) | (4), with zero rows for the kept columns; p = M - N |
| T     |             | (sets, M, M) | (5) as E_:g = w T                                  |

(4) and (5): Zhao et al., "Pruning Foundation Models for High Accuracy without Retraining", arXiv 2410.15567, there
called MM (mrp.py has the method as published).

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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rarefy.errors import PatternError
from rarefy.layer.passes import first_lowest, piece
from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution, Status
from rarefy.layer.spectrum import inverse_factor
from rarefy.methods.base import Cost, Method, hyper, inversions

MOST_SETS = 2000  # of a group: 12:16 has 1,820, and its scores cost as much as a product of 7,280 inputs
_SCORES = 2**22  # numbers of (4) at a time


@dataclass(frozen=True)
class SparseGPT(Method):
    """Optimal-brain-surgeon pruning, column by column, with updates of the columns to the right."""

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "prunes column by column and updates the columns to the right"
    paper: ClassVar[str] = "arXiv 2301.00774"

    damping: float = hyper(0.01, "added to the diagonal of H, as a share of each input's own energy", low=0)
    block_size: int = hyper(128, "columns whose masks are chosen together", low=1)
    score: str = hyper(
        "single",
        "what a removal is reckoned to cost: alone, or with all others of its N:M group",
        choices=("single", "joint"),
    )

    def check_pattern(self, pattern: Pattern) -> None:
        if self.score == "joint" and pattern.has_choice and not 0 < pattern.num_group_masks <= MOST_SETS:
            groups = f"groups with {pattern.num_group_masks:,}" if pattern.num_group_masks else "no groups"
            raise PatternError.sentence(
                f"{self.name}.score is 'joint', which compares all masks of a group, but {pattern} has {groups}: it "
                f"must be N:M with at most {MOST_SETS:,} masks of a group."
            )

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
            prune = self._prune_groups if self.score == "joint" and pattern.has_choice else self._prune_block
            prune(V[a:b], E[a:b], kept[a:b], U[a:b, a:b], pattern.columns(a, b, shape))
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

    @staticmethod
    def _prune_groups(V: Tensor, E: Tensor, kept: Tensor, U: Tensor, pattern: Pattern) -> None:
        """(4), (5) and (3), group by group; arguments are those of ``_prune_block``."""
        masks, group = pattern.group_masks().to(V.device), pattern.group
        for a in range(0, len(V), group):
            g = slice(a, a + group)
            ahead = V[g] - U[:a, g].T @ E[:a]
            C, T = joint_removals(U[g, g], masks)
            chosen = _lowest(ahead.T, C)
            kept[g] = masks[chosen].T
            E[g] = torch.bmm(ahead.T.unsqueeze(1), T[chosen]).squeeze(1).T  # (5)
            V[g] = torch.where(kept[g], ahead - U[g, g].T @ E[g], 0)  # (3)

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        # half a product, in thin pieces; a Cholesky factorisation and a triangular inverse
        joint = 0.0
        if self.score == "joint":  # (4): a product of a group with all C
            pruned = pattern.nominal_sparsity() * pattern.group if pattern.num_group_masks else 0
            joint = pattern.num_group_masks * pruned / shape[1]
        return Cost(0.5 + inversions(2 / 3, shape) + joint, weights=3, grams=3)


def joint_removals(
    U: Float[Tensor, "group group"], masks: Bool[Tensor, "sets group"]
) -> tuple[Float[Tensor, "sets group pruned"], Float[Tensor, "sets group group"]]:
    """C of (4) and T of (5) for every mask of a group, whose block of the factor is U; each prunes as many.

    In float64 inside: a group is small, and the C are shared by all rows.
    """
    wide = U.double()
    P = (~masks).nonzero()[:, 1].view(len(masks), -1)  # (sets, pruned), the places of the pruned columns
    A = (wide.T @ wide)[P.unsqueeze(2), P.unsqueeze(1)]
    R = torch.linalg.cholesky(A)
    eye = torch.eye(P.shape[1], dtype=R.dtype, device=R.device).expand_as(R)
    small = torch.linalg.solve_triangular(R, eye, upper=False).mT  # R^-T
    rows = P.unsqueeze(2)
    C = wide.new_zeros(*masks.shape, P.shape[1]).scatter_(1, rows.expand_as(small), small)
    T = C @ (small.mT @ wide.T[P])
    return C.to(U), T.to(U)


def _lowest(W: Float[Tensor, "out group"], C: Float[Tensor, "sets group pruned"]) -> Int[Tensor, " out"]:
    """The set of the lowest loss (4) for every row, of equals the first; some rows at a time."""
    sets, group, pruned = C.shape
    flat = C.movedim(1, 0).reshape(group, -1)
    height = max(1, piece(W, _SCORES) // flat.shape[1])
    losses = [(rows @ flat).square_().view(-1, sets, pruned).sum(dim=2) for rows in W.split(height)]
    return torch.cat([first_lowest(each) for each in losses])
