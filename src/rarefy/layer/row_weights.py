"""Row weights: a layer problem in which the errors of some outputs count more than those of others.

    minimise  sum over rows i of  v_i r_i H r_i^T,      R = W - W0,  v > 0                          (1)

With F = diag(sqrt v) this is the plain problem of F W0, since

    tr((F W - F W0) H (F W - F W0)^T) = sum of v_i r_i H r_i^T,                                     (2)

and F W has its zeros where W has them. So every method solves (1) when it is given F W0, and its answer is divided by
F again. A row's best weights on a given mask do not depend on v: it says how many weights a row keeps, and matters
only where rows compete for them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.errors import InputError
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution

#: The least weight, as a share of the mean: an output that seems not to matter still has a scale to divide by.
LEAST = 1e-6


def row_factors(v: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
    """sqrt(v), of v with a mean of 1 and at least ``LEAST``; ones where all are 0.

    Raises InputError where one is negative or no number.
    """
    v = v.double()
    if not bool(v.isfinite().all()) or bool((v < 0).any()):
        raise InputError("row_weights", "a tensor with negative numbers or NaN", "numbers of at least 0")
    mean = v.mean()
    return (v / mean).clamp_min(LEAST).sqrt() if float(mean) > 0 else torch.ones_like(v)


def weighted(problem: LayerProblem, factors: Float[Tensor, " out"]) -> LayerProblem:
    """The problem of F W0, which shares the Gram. Raises InputError where there is not a factor for each row."""
    if tuple(factors.shape) != (problem.shape[0],):
        raise InputError(
            "row_weights", f"a tensor of shape {tuple(factors.shape)}", f"({problem.shape[0]},), one for each output"
        )
    return LayerProblem(problem.W0 * factors.to(problem.W0).unsqueeze(1), problem.gram, problem.output_norms)


def unweighted(solution: Solution, factors: Float[Tensor, " out"]) -> Solution:
    """The solution of the plain problem, in place: its weight divided by F, with zeros where they were."""
    solution.weight = solution.weight / factors.to(solution.weight).unsqueeze(1)
    return solution
