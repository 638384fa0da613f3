"""Perplexity by the papers' protocol, and the text that it is measured on.

The text is tokenised as one stream, without special tokens, and cut into windows that do not overlap; the
partial window at the end is dropped. In each window every token but the first is predicted from those before
it. The loss is the mean negative log-likelihood of all predicted tokens in nats, perplexity its exponential.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rarefy.calibration.sources import Source, parse_source
from rarefy.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of this many bytes exist at once in float32: beyond that nothing gets faster, and the whole window
# would take 2 GB at 2,048 positions and a vocabulary of 256,000.
_LOGIT_BYTES = 64 * 2**20

# Positions of the first window on which the shortcut to the logits is compared with the model itself.
_PROBE = 8


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


def text_source(text: str | None, *, argument: str = "--text") -> Source:
    """The text to evaluate on: a file as it stands, "wikitext2" (test rows), or, for None, Python's own docs.

    None stands for the third of the Python documentation that "python-docs" does not calibrate on. Its name
    says so. CalibrationError where the text is missing, empty or binary.
    """
    return parse_source("python-docs" if text is None else text, argument=argument, part="evaluation")


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
    than one window. A model that gives NaN has the perplexity NaN.
    """
    if length < 2:
        raise InputError("the window length", length, "at least 2")
    if max_windows is not None and max_windows < 1:
        raise InputError("the number of windows", max_windows, "at least 1")
    body = length if bos_id is None else length - 1
    windows = len(tokens) // body
    if windows < 1:
        raise CalibrationError.sentence(
            f"The evaluation text has {len(tokens):,} tokens, but one window needs {body:,}."
        )
    windows = min(windows, max_windows or windows)
    ids = tokens[: windows * body].view(windows, body)
    if bos_id is not None:
        ids = torch.cat([ids.new_full((windows, 1), bos_id), ids], dim=1)

    training = model.training
    model.eval()
    total = 0.0
    try:
        with torch.inference_mode():
            head_alone = _head_alone(model, ids[:1, :_PROBE].to(model.device))
            for first in range(0, windows, batch_size):
                batch = ids[first : first + batch_size].to(model.device)
                total += _loss(model, batch, head_alone)
                if progress:
                    progress(min(first + batch_size, windows), windows)
    finally:
        model.train(training)
    predicted = windows * (length - 1)
    loss = total / predicted
    value = float(torch.tensor(loss, dtype=torch.float64).exp())  # inf and NaN pass, unlike in math.exp
    return Perplexity(value, loss, windows, length, predicted, source)


def _loss(model: PreTrainedModel, ids: Int64[Tensor, "batch length"], head_alone: bool) -> float:
    """The sum of -log p(token | tokens before it) over all tokens but each window's first, in nats."""
    targets = ids[:, 1:].flatten()
    total = 0.0
    for first, logits in _logits(model, ids, head_alone):
        losses = nn.functional.cross_entropy(logits.float(), targets[first : first + len(logits)], reduction="none")
        total += float(losses.cpu().double().sum())
    return total


def _logits(
    model: PreTrainedModel, ids: Int64[Tensor, "batch length"], head_alone: bool
) -> Iterator[tuple[int, Float[Tensor, "rows vocabulary"]]]:
    """The logits of all positions but each window's last, in slices: the number of the first row, and the rows."""
    head = model.get_output_embeddings()
    if head_alone:
        rows = model.base_model(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
    else:
        rows = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    size = max(1, _LOGIT_BYTES // (4 * model.config.get_text_config(decoder=True).vocab_size))
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        yield first, head(part) if head_alone else part


def _head_alone(model: PreTrainedModel, ids: Int64[Tensor, "batch length"]) -> bool:
    """Whether the model's logits are just its head's output, so that the head may run slice by slice.

    Some models scale or cap the logits afterwards; theirs are computed whole, in the model's dtype.
    """
    head, base = model.get_output_embeddings(), model.base_model
    if head is None or base is model:
        return False
    hidden = base(input_ids=ids, use_cache=False)[0]
    if hidden.shape[-1] != head.weight.shape[-1]:
        return False
    return torch.equal(model(input_ids=ids, use_cache=False).logits.float(), head(hidden).float())
