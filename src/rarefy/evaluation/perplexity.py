"""Perplexity by the papers' protocol.

The text is tokenised as one stream, without special tokens, and cut into windows that do not overlap; the
partial window at the end is dropped. In each window every token but the first is predicted from those before
it. The loss is the mean negative log-likelihood of all predicted tokens in nats, perplexity its exponential.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from rarefy.evaluation.logits import cut_windows, evaluating, rows_of, slices
from rarefy.models.head import head_alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """What was measured: unitless ``perplexity`` = exp(``loss``), the mean loss per predicted token in nats.

    ``windows`` of ``length`` tokens each were read, and ``tokens`` = windows * (length - 1) predicted;
    ``source`` names the text. Perplexities at different lengths or on different texts are not comparable.
    """

    perplexity: float
    loss: float
    windows: int
    length: int
    tokens: int
    source: str = ""


def perplexity(
    model: PreTrainedModel,
    tokens: Int64[Tensor, " tokens"],
    length: int = 2048,
    *,
    max_windows: int | None = None,
    bos_id: int | None = None,
    batch_size: int = 1,
    source: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of ``model`` on the first ``max_windows`` windows (None: all) of ``length`` tokens.

    ``tokens`` (n,) int64 is the whole text. With ``bos_id`` each window is that token and then ``length - 1``
    tokens of text, all of which are predicted. The model computes in its own dtype; log-likelihoods are taken
    in float32 and added in float64. ``batch_size`` windows go through the model at once;
    ``progress(done, total)`` counts windows. CalibrationError, with both numbers, where the text is shorter
    than one window, InputError for numbers that make none. A model that gives NaN has the perplexity NaN.
    """
    ids = cut_windows(tokens, length, max_windows, bos_id)
    total = 0.0
    with evaluating(model):
        alone = head_alone(model, ids)
        for first in range(0, len(ids), batch_size):
            total += _loss(model, ids[first : first + batch_size].to(model.device), alone)
            if progress:
                progress(min(first + batch_size, len(ids)), len(ids))
    return mean_perplexity(total, ids, source)


def mean_perplexity(total_loss: float, ids: Int64[Tensor, "windows length"], source: str = "") -> Perplexity:
    """The perplexity of windows ``ids`` whose losses add up to ``total_loss`` (nats)."""
    windows, length = ids.shape
    predicted = windows * (length - 1)
    loss = total_loss / predicted
    value = float(torch.tensor(loss, dtype=torch.float64).exp())  # inf and NaN pass, unlike in math.exp
    return Perplexity(value, loss, windows, length, predicted, source)


def _loss(model: PreTrainedModel, ids: Int64[Tensor, "batch length"], alone: bool) -> float:
    """The sum of -log p(token | tokens before it) over all tokens but each window's first, in nats."""
    targets = ids[:, 1:].flatten()
    rows = rows_of(model, ids, alone)
    total = 0.0
    for part in slices(len(rows), model):
        losses = nn.functional.cross_entropy(rows.logits(part).float(), targets[part], reduction="none")
        total += float(losses.cpu().double().sum())
    return total
