"""Small random layer problems, one family per difficulty, for tests of the methods.

Every family is defined by its inputs X (tokens, in); `FAMILIES[name](out, inputs, seed)` returns a dense
weight W0 (out, in) and the Gram matrix H = X^T X (in, in), both float64. `INPUTS[name](inputs, seed)` returns
the X of the same seed, for methods that also need means. The same seed gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.layer.pattern import Pattern
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution
from rarefy.methods.base import Method

InputFamily = Callable[[int, int], Tensor]
Family = Callable[[int, int, int], tuple[Tensor, Tensor]]


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def well_conditioned(inputs: int, seed: int) -> Tensor:
    """Independent normal inputs, eight times as many tokens as inputs."""
    return _normal(8 * inputs, inputs, seed)


def ill_conditioned(inputs: int, seed: int) -> Tensor:
    """Singular values of X from 1 to 1e-3, evenly spaced in the logarithm: the condition number of H is
    1e6."""
    left = torch.linalg.qr(_normal(inputs, inputs, seed)).Q
    right = torch.linalg.qr(_normal(inputs, inputs, seed + 1)).Q
    X: Tensor = (left * torch.logspace(0, -3, inputs, dtype=torch.float64)) @ right.T
    return X


def rank_deficient(inputs: int, seed: int) -> Tensor:
    """Half as many tokens as inputs: H is singular."""
    return _normal(max(1, inputs // 2), inputs, seed)


def dead_columns(inputs: int, seed: int) -> Tensor:
    """The first input and one in the middle (never the same one where there are two) are always zero."""
    X = _normal(8 * inputs, inputs, seed)
    X[:, [0, inputs // 2]] = 0
    return X


def duplicate_columns(inputs: int, seed: int) -> Tensor:
    """The second input repeats the first, the last repeats the middle one: H is singular, no weight is
    dead."""
    X = _normal(8 * inputs, inputs, seed)
    if inputs > 1:
        X[:, 1] = X[:, 0]
        X[:, -1] = X[:, inputs // 2]
    return X


def identity(inputs: int, seed: int) -> Tensor:
    """H is the identity: every mask method reduces to magnitude pruning."""
    return torch.eye(inputs, dtype=torch.float64)


def diagonal(inputs: int, seed: int) -> Tensor:
    """H is diagonal with entries between about 1e-2 and 1e2: the best support is known in closed form."""
    generator = torch.Generator().manual_seed(seed)
    exponents = 2 * torch.rand(inputs, generator=generator, dtype=torch.float64) - 1
    return torch.diag(10**exponents)


def correlated(inputs: int, seed: int) -> Tensor:
    """Like activations: correlated channels with non-zero means, one channel in 16 at 30 times the scale."""
    mixing = torch.eye(inputs, dtype=torch.float64) + _normal(inputs, inputs, seed + 1) / math.sqrt(inputs)
    X = (_normal(8 * inputs, inputs, seed) + 0.5 * _normal(1, inputs, seed + 2)) @ mixing
    generator = torch.Generator().manual_seed(seed + 3)
    outliers = torch.randperm(inputs, generator=generator)[: max(1, inputs // 16)]
    X[:, outliers] *= 30
    return X


def _family(draw_inputs: InputFamily) -> Family:
    def problem(out: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
        X = draw_inputs(inputs, seed)
        H = X.T @ X
        # The weight's seed is far from the inputs' seeds, so that W0 and X share no random numbers.
        return _normal(out, inputs, seed + 10_000), (H + H.T) / 2

    problem.__doc__ = draw_inputs.__doc__
    return problem


INPUTS: dict[str, InputFamily] = {
    draw_inputs.__name__: draw_inputs
    for draw_inputs in (
        well_conditioned,
        ill_conditioned,
        rank_deficient,
        dead_columns,
        duplicate_columns,
        identity,
        diagonal,
        correlated,
    )
}

FAMILIES: dict[str, Family] = {name: _family(draw_inputs) for name, draw_inputs in INPUTS.items()}


def output_energy(W0: Tensor, H: Tensor) -> Tensor:
    """The squared norm of each output (out,) over all tokens."""
    return ((W0 @ H) * W0).sum(dim=1).clamp_min(0)


@dataclass(frozen=True)
class OfNeurons(Method):
    """A method on a layer whose outputs are neurons, with the norms of the outputs themselves for want of others."""

    name: ClassVar[str] = "of-neurons"
    summary: ClassVar[str] = "a method that is told norms of outputs"

    method: Method

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        norms = output_energy(problem.W0, problem.H).sqrt()
        return self.method.solve(LayerProblem(problem.W0, problem.gram, norms), pattern, start)

    def rows_independent(self, pattern: Pattern) -> bool:
        return self.method.rows_independent(pattern)
