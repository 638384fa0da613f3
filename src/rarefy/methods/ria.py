"""RIA: relative importance of a weight among its row and column, times its input's activity.

    R_ij = |W0_ij| / sum_j |W0_ij| + |W0_ij| / sum_i |W0_ij|     (1)
    S_ij = R_ij ||X_j||_2^a,  ||X_j||_2 = sqrt(H_jj)             (2)
    M = P(S),  W = W0 * M                                        (3)

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models" (ICLR 2024), equations 3 and 4, with a = 0.5 as there; SparseFW's paper (arXiv 2510.13713)
writes a = 1. The column sums couple all rows. Cost: one selection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution
from rarefy.methods.base import Cost, Method, hyper, masked


@dataclass(frozen=True)
class RIA(Method):
    """Keep the weights that matter most within their row and column, weighted by input activity."""

    name: ClassVar[str] = "ria"
    summary: ClassVar[str] = "keeps the weights that matter most in their row and column"
    paper: ClassVar[str] = "ICLR 2024, Plug-and-Play (RIA)"

    exponent: float = hyper(0.5, "power of the input norm; 0 ignores the inputs", low=0)

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        return masked(problem.W0, pattern.project(ria_scores(problem, self.exponent)))  # (3)

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        return Cost(weights=4, grams=0)


def ria_scores(problem: LayerProblem, exponent: float) -> Float[Tensor, "out inputs"]:
    """Equations (1) and (2); rows and columns of zeros score 0."""
    magnitude = problem.W0.abs()
    smallest = magnitude.new_tensor(1e-38)  # 0 / tiny = 0 where a row or column is all zero
    rows = magnitude / magnitude.sum(dim=1, keepdim=True).maximum(smallest)
    columns = magnitude / magnitude.sum(dim=0, keepdim=True).maximum(smallest)
    return (rows + columns) * problem.H.diagonal().clamp_min(0).pow(exponent / 2)
