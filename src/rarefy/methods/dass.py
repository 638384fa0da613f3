"""DaSS: weights that make a neuron of an MLP are compared over the neurons, by how large the neuron is.

In an MLP, z = act(gate x) * (up x) is what the down projection reads. With Z_i its i-th entry over all tokens, the
layers that make z have

    S_ij = |W0_ij| ||Z_i||_2^a                                                                     (1)

compared within each input j over all outputs i, and all other layers Wanda's

    S_ij = |W0_ij| ||X_j||_2                                                                       (2)

compared within each output i. Then M = P(S), W = W0 * M.

||Z_i|| is the same for a whole row, so it matters only where rows are compared: for N:M along the inputs, and for
equal counts in each row, (1) is magnitude pruning. Where a pattern counts over the whole matrix, each input keeps
as many weights as any other, or one more, so that the total is exact; with (2) each output does.

Source: Guo et al., "Dependency-Aware Semi-Structured Sparsity of GLU Variants in Large Language Models", arXiv
2405.01943, with a = 0.5. There only MLPs are pruned (``--include '*.mlp.*'``), and N:M groups are of consecutive
neurons: outputs of gate and up, inputs of down (``--along neurons``; layer/across.py). ||Z_i|| is known where the
down projection is pruned as well, from the diagonal of its Gram matrix (pruning/outputs.py); without it (2) is used,
and the details say which it was. Cost: one selection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution
from rarefy.methods.base import Cost, Method, hyper, masked, wanda_scores


@dataclass(frozen=True)
class DaSS(Method):
    """Keep the largest |weight| times norm of the neuron that it makes; Wanda's where it makes none."""

    name: ClassVar[str] = "dass"
    summary: ClassVar[str] = "keeps the largest |weight| x norm of the MLP neuron that it makes, elsewhere as wanda"
    paper: ClassVar[str] = "arXiv 2405.01943"
    needs_output_norms: ClassVar[bool] = True

    exponent: float = hyper(0.5, "power of the neuron's norm; 0 is magnitude pruning", low=0)

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        if problem.output_norms is None:
            mask = _in_each_row(wanda_scores(problem), pattern)  # (2)
        else:
            scores = problem.W0.abs() * problem.output_norms.clamp_min(0).pow(self.exponent).unsqueeze(1)
            mask = _in_each_column(scores, pattern)  # (1)
        solution = masked(problem.W0, mask)
        solution.details["compared"] = "by input norms" if problem.output_norms is None else "by output norms"
        return solution

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        return Cost(weights=2, grams=0)


def _in_each_column(scores: Float[Tensor, "out inputs"], pattern: Pattern) -> Bool[Tensor, "out inputs"]:
    """The best mask, where the pattern lets rows compete: with its share of the budget for each column."""
    if pattern.rows_independent or pattern.rows_alike:
        return pattern.project(scores)
    shape = (len(scores), scores.shape[1])
    columns = [pattern.columns(j, j + 1, shape).project(scores[:, j : j + 1]) for j in range(shape[1])]
    return torch.cat(columns, dim=1)


def _in_each_row(scores: Float[Tensor, "out inputs"], pattern: Pattern) -> Bool[Tensor, "out inputs"]:
    """The best mask, where the pattern can be cut into rows: with its share of the budget for each row."""
    if pattern.rows_independent or pattern.rows_alike or pattern.row_group > 1:
        return pattern.project(scores)
    shape = (len(scores), scores.shape[1])
    return torch.cat([pattern.rows(i, i + 1, shape).project(scores[i : i + 1]) for i in range(shape[0])])
