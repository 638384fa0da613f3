"""Computes a model's logits, a slice of positions at a time, and collects the outputs of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rarefy.models.head import LOGIT_BYTES, base_output, head_alone, predicting, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens on which the model's logits are compared with the output of its head alone.
_PROBE = 8


class Logits:
    """Computes the logits of one model in two steps: a row for each predicted position, then logits from some rows.

    Rows are the inputs of the head where the logits are its output and nothing more (``alone``): then a slice of
    them at a time goes through the head. Else, as with logits that are scaled or capped, they are the logits.

    Products are computed in ``precision``. The head is not trained, so where it is kept in another dtype, a copy in
    this one is made once.
    """

    def __init__(self, model: PreTrainedModel, precision: torch.dtype) -> None:
        self._model, self.precision = model, precision
        self._vocabulary = vocabulary_size(model)
        with torch.no_grad():
            self.alone = head_alone(model, torch.arange(_PROBE)[None] % self._vocabulary)
        head = model.get_output_embeddings()
        if self.alone and head.weight.dtype != precision:
            head = deepcopy(head).to(precision).requires_grad_(False)
        self.head = head

    def rows(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "rows _"]:
        """All positions of all windows but each one's last, which predicts nothing."""
        ids = ids.to(self._model.device)
        with computing(self._model.device, self.precision):
            if self.alone:
                return predicting(base_output(self._model, ids))
            return predicting(self._model(input_ids=ids, use_cache=False).logits)

    def of(self, rows: Float[Tensor, "rows _"]) -> Float[Tensor, "rows vocabulary"]:
        """The logits of some rows."""
        return self.head(rows.to(self.precision)) if self.alone else rows

    def slices(self, num: int) -> Iterator[slice]:
        """Slices of ``num`` rows whose logits take no more than LOGIT_BYTES each."""
        size = max(1, LOGIT_BYTES // (4 * self._vocabulary))
        for first in range(0, num, size):
            yield slice(first, min(first + size, num))


@contextmanager
def computing(device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """Within the scope, products are computed in ``precision`` from whatever weights are kept in."""
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        yield


@contextmanager
def block_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the scope, what each of the blocks puts out is appended to the list, in their order."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, Tensor)
        seen.append(hidden)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
