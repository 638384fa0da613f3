"""The output head of a model: what enters it, and whether the logits are its output and nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Logits of this many bytes exist at once in float32: beyond that nothing gets faster, and the whole window
#: would take 2 GB at 2,048 positions and a vocabulary of 256,000.
LOGIT_BYTES = 64 * 2**20

#: Positions of the first window on which the shortcut to the logits is compared with the model itself.
PROBE = 8


def head_alone(model: PreTrainedModel, ids: Int64[Tensor, "windows length"]) -> bool:
    """Whether the model's logits are just its head's output, found out on the beginning of the first window."""
    head, base = model.get_output_embeddings(), model.base_model
    if head is None or base is model:
        return False
    ids = ids[:1, :PROBE].to(model.device)
    hidden = base_output(model, ids)
    if hidden.shape[-1] != head.weight.shape[-1]:
        return False
    return torch.equal(model(input_ids=ids, use_cache=False).logits.float(), head(hidden).float())


def base_output(model: PreTrainedModel, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch length hidden"]:
    """The hidden states that enter the head of a model whose head stands alone."""
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False)[0]
    return hidden


def predicting(values: Float[Tensor, "batch length _"]) -> Float[Tensor, "rows _"]:
    """A row for each position of each window but its last, which predicts nothing."""
    return values[:, :-1].flatten(0, 1)


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens the model gives a logit for."""
    return int(model.config.get_text_config(decoder=True).vocab_size)
