"""Two methods of one's own, one direct and one iterative, used through Python.

    python examples/my_method.py

On the command line, with this folder on Python's path (docs/add-a-method.md):

    PYTHONPATH=examples rarefy prune smollm2 -o out --method my_method:Saliency
    PYTHONPATH=examples rarefy prune smollm2 -o out --method wanda+my_method:HardThresholding
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import rarefy
from rarefy.layer.pattern import Pattern
from rarefy.layer.problem import Scaled
from rarefy.layer.spectrum import inverse_factor
from rarefy.methods.base import hyper, masked


@dataclass(frozen=True)
class Saliency(rarefy.Method):
    """Keep the weights whose removal, alone and with the best update of the others, would cost most."""

    name: ClassVar[str] = "saliency"
    summary: ClassVar[str] = "keeps the weights of largest optimal-brain-surgeon saliency"
    paper: ClassVar[str] = "Hassibi and Stork, 1993"

    damping: float = hyper(0.01, "added to the diagonal of H, as a share of each input's own energy", low=0)

    def solve(
        self, problem: rarefy.LayerProblem, pattern: Pattern, start: rarefy.Solution | None = None
    ) -> rarefy.Solution:
        factor = inverse_factor(problem, self.damping)  # A^-1 = U^T U, shared by all layers with this Gram
        inverse_diagonal = factor.U.square().sum(dim=0)  # (A^-1)_jj
        scores = problem.to_scaled(problem.W0, problem.scaled).square() / inverse_diagonal
        return masked(problem.W0, pattern.project(scores))

    def rows_independent(self, pattern: Pattern) -> bool:
        return pattern.rows_independent


@dataclass
class _State:
    problem: rarefy.LayerProblem
    pattern: Pattern
    scaled: Scaled  # A = H / (s s^T), and s
    W0: Tensor  # (out, in), in coordinates of unit diagonal, like W
    W: Tensor
    mask: Tensor
    smoothness: float  # the largest eigenvalue of A
    settled: bool = False


@dataclass(frozen=True)
class HardThresholding(rarefy.IterativeMethod[_State]):
    """Gradient steps of the safe length, each followed by the projection on the pattern."""

    name: ClassVar[str] = "hard-thresholding"
    summary: ClassVar[str] = "gradient steps, each followed by the projection on the pattern"
    paper: ClassVar[str] = "arXiv 0805.0510"
    takes_start: ClassVar[bool] = True

    steps: int = hyper(50, "iterations at most", low=1)
    tolerance: float = hyper(1e-4, "stops where a step moves the weight by less than this share of it", low=0)

    def init(self, problem: rarefy.LayerProblem, pattern: Pattern, start: rarefy.Solution | None) -> _State:
        scaled = problem.scaled
        W0 = problem.to_scaled(problem.W0, scaled)
        mask = pattern.project(W0.abs()) if start is None else start.mask
        W = W0 * mask if start is None else problem.to_scaled(start.weight.to(problem.dtype), scaled)
        smoothness = problem.gram.cached(
            ("hard-thresholding", problem.dtype, W0.device), lambda: float(torch.linalg.matrix_norm(scaled.A, 2))
        )
        return _State(problem, pattern, scaled, W0, W, mask, smoothness)

    def max_steps(self, state: _State) -> int:
        return self.steps

    def step(self, state: _State, t: int) -> dict[str, float]:
        before = state.W
        W = before - (before - state.W0) @ state.scaled.A / state.smoothness  # (1)
        state.mask = state.pattern.project(W.abs())  # (2)
        state.W = W * state.mask
        moved = float((state.W - before).norm() / before.norm().clamp_min(1e-38))
        state.settled = moved < self.tolerance
        return {"moved": moved}

    def stop(self, state: _State, t: int) -> bool:
        return state.settled

    def iterate(self, state: _State) -> Tensor:
        return state.W

    def finish(self, state: _State) -> rarefy.Solution:
        weight = state.problem.from_scaled(state.W, state.mask, state.scaled)
        return rarefy.Solution(weight, state.mask)

    def rows_independent(self, pattern: Pattern) -> bool:
        return False  # the stop test looks at all rows at once


def main() -> None:
    """Compare both with Wanda on one random layer with correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    mixing = torch.eye(128) + torch.randn(128, 128, generator=generator) / 8
    inputs = torch.randn(2048, 128, generator=generator) @ mixing
    gram = inputs.T @ inputs

    methods = [
        rarefy.Wanda(),
        Saliency(),
        HardThresholding(),
        rarefy.Then(rarefy.Wanda(), HardThresholding(steps=200)),
        rarefy.Then(Saliency(), rarefy.PCG()),
    ]
    for pattern in (rarefy.Unstructured(0.5), rarefy.NM(2, 4)):
        for method in methods:
            solution = rarefy.solve(weight, gram, pattern, method)
            error = f"relative error {solution.relative_error:.4f}"
            print(f"{pattern!s:<18} {method!s:<24} {error}, {solution.status.value}")


if __name__ == "__main__":
    main()
