"""Cuts a text into windows and computes a model's logits on them, slice by slice, for perplexity and divergence.

    tokens (n,)  --cut_windows-->  ids (windows, length)  --rows_of-->  Rows  --slices-->  logits

A window's logits whole would take gigabytes where the vocabulary is large. Where a model's logits are just
its head's output, the head runs on some positions at a time; some models scale or cap the logits afterwards,
and theirs are computed whole, in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rarefy.errors import CalibrationError, InputError
from rarefy.models.head import LOGIT_BYTES, base_output, predicting, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cut_windows(
    tokens: Int64[Tensor, " tokens"], length: int, max_windows: int | None, bos_id: int | None
) -> Int64[Tensor, "windows length"]:
    """The windows of the perplexity protocol: one after the other, the partial one at the end dropped.

    The first ``max_windows`` of them (None: all). With ``bos_id`` each is that token and then ``length - 1``
    tokens of text. InputError for numbers that make no window, CalibrationError, with both numbers, where the
    text is shorter than one.
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
    return ids if bos_id is None else torch.cat([ids.new_full((windows, 1), bos_id), ids], dim=1)


@dataclass(frozen=True)
class Rows:
    """One row per predicted position, and what makes logits of rows."""

    values: Float[Tensor, "rows _"]
    to_logits: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.values)

    def logits(self, part: slice) -> Float[Tensor, "rows vocabulary"]:
        """The logits of some of the rows."""
        return self.to_logits(self.values[part])


def rows_of(model: PreTrainedModel, ids: Int64[Tensor, "batch length"], alone: bool) -> Rows:
    """The positions of all windows but each one's last, which predicts nothing; ``alone`` is ``head_alone``."""
    if alone:
        return Rows(predicting(base_output(model, ids)), model.get_output_embeddings())
    return Rows(predicting(model(input_ids=ids, use_cache=False).logits), lambda rows: rows)


def slices(num: int, model: PreTrainedModel) -> Iterator[slice]:
    """Slices of ``num`` rows whose logits take no more than LOGIT_BYTES each."""
    size = max(1, LOGIT_BYTES // (4 * vocabulary_size(model)))
    for first in range(0, num, size):
        yield slice(first, min(first + size, num))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within the block, models are in evaluation mode and no gradients are kept; after it, modes are as before."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model, before in zip(models, training):
            model.train(before)
