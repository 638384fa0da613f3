"""MRP: SparseGPT's walk over the columns, with the joint score where sets can be enumerated, then an exact refit.

Removing a set P of the weights of one row at once, with the best update of all others, costs

    loss(P) = w_P (G_PP)^-1 w_P^T,   G = (A + damping I)^-1,                                   (1)
    dw = -w_P (G_PP)^-1 G_P,:                                                                  (2)

1. N:M: the set of the lowest loss (1) in each group, given the groups to its left ("MM"; sparsegpt.py, (4) and (5)).
   Any other pattern: the sets are too many, and each weight has the score of its removal alone ("SM").
2. All kept weights of a row become what (2) makes of the dense ones for its whole set. The best weights on a support
   are unique, so this is the refit with the same damping (refit.py).

So the unstructured recipe is ``sparsegpt+backsolve`` with damping in both, and at N:M ``sparsegpt`` with
``score=joint`` before ``backsolve``.

Source: Zhao et al., "Pruning Foundation Models for High Accuracy without Retraining", arXiv 2410.15567. Difference:
damping is a share of each input's own energy, in coordinates of unit diagonal. No code was released that it could be
compared with. Cost: that of the two parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution
from rarefy.methods.base import Cost, Method, hyper
from rarefy.methods.compose import Then
from rarefy.methods.refit import Backsolve
from rarefy.methods.sparsegpt import SparseGPT


@dataclass(frozen=True)
class MRP(Method):
    """Sets of weights removed together, with the update that makes up for them best."""

    name: ClassVar[str] = "mrp"
    summary: ClassVar[str] = "sparsegpt with the joint score of N:M groups (elsewhere its own), then backsolve"
    paper: ClassVar[str] = "arXiv 2410.15567"

    damping: float = hyper(0.01, "added to the diagonal of H, as a share of each input's own energy", low=0)
    block_size: int = hyper(128, "columns whose masks are chosen together", low=1)

    def parts_for(self, pattern: Pattern) -> Then:
        """The two methods that it is under ``pattern``."""
        score = "joint" if pattern.num_group_masks else "single"
        return Then(SparseGPT(self.damping, self.block_size, score), Backsolve(self.damping))

    def check_pattern(self, pattern: Pattern) -> None:
        self.parts_for(pattern).check_pattern(pattern)

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        return self.parts_for(pattern).solve(problem, pattern)

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        return self.parts_for(pattern).cost(shape, pattern)
