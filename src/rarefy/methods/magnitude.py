"""Magnitude pruning: keep the largest |W0|.

    M = P(|W0|),  W = W0 * M

P keeps the entries with the largest scores that the pattern allows. The inputs play no part. The
oldest baseline there is; cost: one selection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution
from rarefy.methods.base import Cost, Method, masked


@dataclass(frozen=True)
class Magnitude(Method):
    """Keep the largest absolute weights."""

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "keeps the largest absolute weights"

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        return masked(problem.W0, pattern.project(problem.W0.abs()))

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        return Cost(weights=1, grams=0)
