"""How large a model is: parameters, bytes of its files, multiplications for each token."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from rarefy.models.blocks import find_blocks


@dataclass(frozen=True)
class Size:
    """Of one model. ``multiplications`` are those of weights for one token, the head's included, attention's own not.

    Of experts, those of as many as a token is sent to.
    """

    blocks: int
    parameters: int
    bytes: int
    multiplications: int

    def to_dict(self) -> dict[str, int]:
        """Plain values, for ``run.json``."""
        return asdict(self)


def size_of(model: PreTrainedModel) -> Size:
    """The size of a model, which may be on the meta device."""
    blocks = find_blocks(model)
    config = model.config
    multiplications = 0.0
    for block in blocks:
        for site in block.sites:
            weights = site.shape[0] * site.shape[1]
            chosen = getattr(config, "num_experts_per_tok", None) if site.expert else None
            share = min(1.0, chosen / site.expert.mixture.size) if site.expert and isinstance(chosen, int) else 1.0
            multiplications += weights * share
    head = model.get_output_embeddings()
    if head is not None:
        multiplications += head.weight.numel()
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    total = sum(parameter.numel() for parameter in parameters)
    # A config that was written says its dtype in words.
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else model.dtype
    return Size(len(blocks), total, total * dtype.itemsize, round(multiplications))
