"""``alphapruning``: blocks whose weights have heavy-tailed spectra, a sign of much that was learnt, keep more.

With l_1 <= ... <= l_n the squared singular values of W, and a cut at i of m = n - i + 1 values from l_i on,

    alpha_i = 1 + m / sum over j >= i of ln(l_j / l_i)                                             (1)
    D_i     = max over j >= i of |1 - (l_j / l_i)^(1 - alpha_i) - (j - i) / m|                     (2)
    alpha   = alpha_i of the cut with the least D_i, among cuts near the peak of the spectrum      (3)
    q(b)    = 1 - eps + 2 eps (alpha(b) - min) / (max - min),      alpha(b) the mean over block b
    s(b)    = S q(b) / mean of q weighted by sizes                                                 (4)

The peak is the left edge p of the fullest of 100 bins of log10 l. Cuts lie below 1.5 p and above log10(0.95 p): the
published code compares this logarithm with values that are none, so that it seldom binds. It is kept, as published
results have it.

Source: AlphaPruning (arXiv 2410.10912). Differences: published sparsities may exceed 1; here clamped layers give what
they cannot take to the others (budget.py). Values below 1e-12 of the largest are left out as rounding.
Cost: the eigenvalues of W W^T or W^T W, whichever is smaller, in float64; no text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.allocation.budget import Layer
from rarefy.allocation.rule import MeasuredRule, Sensitivity, by_block, stretched
from rarefy.layer.gram import Gram

_BINS = 100
_ROUNDING = 1e-12  # of the largest value: products and eigenvalues are in float64


@dataclass(frozen=True)
class AlphaPruning(MeasuredRule):
    """``spread_by`` is eps: blocks get from 1 - eps to 1 + eps times the same sparsity."""

    spread_by: float = 0.3

    def of_layer(
        self, W: Float[Tensor, "out inputs"], gram: Gram | None = None, sensitivity: Sensitivity | None = None
    ) -> float:
        """(3)"""
        W = W.double()
        square = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
        return exponent(torch.linalg.eigvalsh(square).cpu())

    def spread(self, layers: Sequence[Layer], facts: Mapping[str, float], sparsity: float) -> dict[str, float]:
        """(4)"""
        finite = [alpha for alpha in facts.values() if math.isfinite(alpha)]
        if not finite:
            return {layer.name: sparsity for layer in layers}
        lightest = max(finite)  # which is what a layer without a tail counts as
        alphas = by_block(layers, {name: min(alpha, lightest) for name, alpha in facts.items()})
        if not max(alphas.values()) > min(alphas.values()):
            return {layer.name: sparsity for layer in layers}
        q = {block: 1 - self.spread_by + each for block, each in stretched(alphas, 2 * self.spread_by).items()}
        mean = sum(q[layer.block] * layer.size for layer in layers) / sum(layer.size for layer in layers)
        return {layer.name: sparsity * q[layer.block] / mean for layer in layers}


def exponent(values: Float[Tensor, " n"]) -> float:
    """The exponent alpha of a power law fitted to the tail of ``values``, which are float64 and ascending.

    Large for a light tail. Infinity where all values are equal, or there is one.
    """
    values = values[values > _ROUNDING * values[-1]]
    n = len(values)
    if n < 2 or not float(values[-1]) > float(values[0]):
        return math.inf
    logs = values.log()
    bins = torch.histc(values.log10(), _BINS, float(values[0].log10()), float(values[-1].log10()))
    edge = int(bins.argmax()) / _BINS
    peak = float(values[0]) ** (1 - edge) * float(values[-1]) ** edge
    best = (math.inf, math.inf)
    for i in range(n - 1):
        if not math.log10(0.95 * peak) <= float(values[i]) <= 1.5 * peak:
            continue
        tail, m = logs[i:] - logs[i], n - i
        if not float(tail[-1]) > 0:
            continue
        alpha = 1 + m / float(tail.sum())  # (1)
        steps = torch.arange(m, dtype=torch.float64, device=values.device) / m
        D = float((1 - (tail * (1 - alpha)).exp() - steps).abs().max())  # (2)
        best = min(best, (D, alpha))
    return best[1]
