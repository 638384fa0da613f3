"""Wanda: keep the weights whose product with the norm of their input is largest.

    S_ij = |W0_ij| ||X_j||_2,  ||X_j||_2 = sqrt(H_jj)            (1)
    M = P(S),  W = W0 * M                                        (2)

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
arXiv 2306.11695, section 3 and algorithm 1. There weights compete within one output row, which is
this method's default scope; any other pattern works the same way. Cost: one selection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution
from rarefy.methods.base import Cost, Method, masked, wanda_scores


@dataclass(frozen=True)
class Wanda(Method):
    """Keep the largest |weight| times input norm, within each row by default."""

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "keeps the largest |weight| x input norm"
    paper: ClassVar[str] = "arXiv 2306.11695"
    default_scope: ClassVar[str] = "row"

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        return masked(problem.W0, pattern.project(wanda_scores(problem)))  # (1), (2)

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        return Cost(weights=1, grams=0)
