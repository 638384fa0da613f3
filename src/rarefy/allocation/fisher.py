"""``fisher``: weights go where that raises the loss of the model least, by one threshold for all layers.

    f_ij = v_i h_j w_ij^2                                                                         (1)
    s(l) = share of the f_ij of layer l that are at most t, within S - bound and S + bound        (2)

with v_i the squared gradient of the loss at output i, summed over tokens, h_j the mean square of input j, and the one
t for which the sparsities have the total that was asked. (1) is, but for a factor that all layers share, by how much
the loss rises when w_ij alone is taken: the diagonal of the Fisher information, where gradients at outputs do not
depend on inputs. Which weights a layer keeps its solver finds.

Sources: the diagonal of the Fisher information as a cost of pruning is Optimal Brain Damage's (1990), its factors
those of K-FAC (arXiv 1503.05671). Allocation by a bounded share below one threshold is ours, with a bound that was
measured (docs/log.md).
Cost: row weights of the loss (pruning/fisher.py), and one look at each weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rarefy.allocation.budget import MOST, Layer
from rarefy.allocation.rule import MeasuredRule, Sensitivity
from rarefy.layer.gram import Gram

#: Of a layer's f_ij a histogram is kept, over octaves from the smallest to the largest in float32.
_PER_OCTAVE, _LOWEST, _HIGHEST = 16, -126, 128
_AT_ONCE = 2**22  # weights


@dataclass(frozen=True)
class Fisher(MeasuredRule):
    """``bound`` is the most by which the sparsity of a layer differs from that of the run."""

    bound: float = 0.2

    needs_sensitivities: ClassVar[bool] = True

    def of_layer(
        self, W: Float[Tensor, "out inputs"], gram: Gram | None = None, sensitivity: Sensitivity | None = None
    ) -> Int64[Tensor, " bins"] | None:
        """The histogram of (1); None for a layer of which no gradient is known."""
        if sensitivity is None:
            return None
        v, h = sensitivity.outputs.to(W.device, torch.float32), sensitivity.inputs.to(W.device, torch.float32)
        bins = torch.zeros(_PER_OCTAVE * (_HIGHEST - _LOWEST), dtype=torch.int64, device=W.device)
        rows = max(1, _AT_ONCE // W.shape[1])
        for some, weights in zip(v.split(rows), W.split(rows)):
            f = weights.float().square().mul_(h).mul_(some.unsqueeze(1))
            place = f.log2_().sub_(_LOWEST).mul_(_PER_OCTAVE).floor_().clamp_(0, len(bins) - 1)
            bins += torch.bincount(place.flatten().long(), minlength=len(bins))
        return bins.cpu()

    def spread(
        self, layers: Sequence[Layer], facts: Mapping[str, Tensor | None], sparsity: float
    ) -> dict[str, float]:
        """(2), with t by bisection; between the edges of a bin, shares are on a line."""
        found = {layer.name: sparsity for layer in layers}
        known = [layer for layer in layers if facts[layer.name] is not None]
        if not known:
            return found
        sizes = torch.tensor([layer.size for layer in known], dtype=torch.float64)
        counts = torch.stack([bins for layer in known if (bins := facts[layer.name]) is not None]).double()
        below = torch.nn.functional.pad(counts.cumsum(1), (1, 0)) / sizes.unsqueeze(1)
        least, most = max(0.0, sparsity - self.bound), min(MOST, sparsity + self.bound)

        def shares(t: float) -> Float[Tensor, " layers"]:
            place = min(int(t), counts.shape[1] - 1)
            within = below[:, place] + (t - place) * (below[:, place + 1] - below[:, place])
            return within.clamp(least, most)

        low, high = 0.0, float(counts.shape[1])
        for _ in range(60):
            t = (low + high) / 2
            low, high = (t, high) if float(shares(t) @ sizes) < sparsity * float(sizes.sum()) else (low, t)
        return found | dict(zip((layer.name for layer in known), shares(high).tolist(), strict=True))
