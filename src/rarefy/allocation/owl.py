"""``owl``: blocks with many outliers among their Wanda scores keep more.

    A_ij   = |W_ij| ||X_j||                                  of all layers of a block together
    D(b)   = 100 * share of A_ij > M mean(A)                                                       (1)
    r(b)   = 2 lambda (D(b) - min D) / (max D - min D)
    s(b)   = S - r(b) + mean r                               for all layers of block b             (2)

Source: OWL, Outlier Weighed Layerwise sparsity (arXiv 2310.05175), with the lambda and M of its README.
Differences: what is clamped is given to the others, and totals are exact (budget.py); D that are all equal give the
uniform allocation, where the code divides by zero.
Cost: one pass over the windows with Grams, of which only the diagonals are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.allocation.budget import Layer
from rarefy.allocation.rule import MeasuredRule, Sensitivity, by_block, stretched
from rarefy.layer.gram import Gram


@dataclass(frozen=True)
class Owl(MeasuredRule):
    """``spread_by`` is lambda, half of the most by which two blocks differ; ``factor`` is M, both unitless."""

    spread_by: float = 0.08
    factor: float = 5.0

    needs_grams: ClassVar[bool] = True

    def of_layer(
        self, W: Float[Tensor, "out inputs"], gram: Gram | None = None, sensitivity: Sensitivity | None = None
    ) -> Float[Tensor, "in"]:
        """||X_j|| of each input, for one token on average: experts see fewer tokens than their block."""
        assert gram is not None
        return (gram.H.diagonal().clamp_min(0) / max(1, gram.num_tokens)).sqrt().cpu()

    def of_block(self, facts: Mapping[str, Float[Tensor, "in"]], read: Callable[[str], Tensor]) -> dict[str, float]:
        """(1), the same for all layers."""

        def scores(name: str) -> Tensor:
            W = read(name).float()
            return W.abs().mul_(facts[name].to(W))

        # The mean comes first, so each weight is read twice and one layer's scores are held at a time.
        sums = torch.tensor([[float(A.double().sum()), A.numel()] for A in map(scores, facts)], dtype=torch.float64)
        total, number = sums.sum(0).tolist()
        outliers = sum(int((scores(name) > self.factor * total / number).sum()) for name in facts)
        return dict.fromkeys(facts, 100 * outliers / number)

    def spread(self, layers: Sequence[Layer], facts: Mapping[str, float], sparsity: float) -> dict[str, float]:
        """(2)"""
        r = stretched(by_block(layers, facts), 2 * self.spread_by)
        mean = sum(r.values()) / len(r)
        return {layer.name: sparsity - r[layer.block] + mean for layer in layers}
