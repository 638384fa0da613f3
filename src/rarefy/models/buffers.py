"""Makes the buffers of a model that are in no file of its checkpoint, such as rotary frequencies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from rarefy.errors import ModelError


def make_buffers(
    owner: PreTrainedModel, module: nn.Module, empty: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """The buffers of ``module`` that are in no file, by their names in it, on the CPU.

    ``owner`` is the model that makes them, ``empty`` are tensors of their shapes and dtypes, ``name`` is what
    errors call the module. transformers makes them with the function that also makes random weights. It is
    called twice, over zeros and over ones, so that an element that it leaves alone, or draws at random, is
    found. Raises ModelError then.
    """
    before = {leaf: module._buffers[leaf] for leaf in empty}
    made: list[dict[str, Tensor]] = []
    try:
        with torch.no_grad(), init.guard_torch_init_functions():
            for fill in (0, 1):
                for leaf, tensor in empty.items():
                    module._buffers[leaf] = torch.full_like(tensor, fill, device="cpu")
                owner._init_weights(module)
                made.append({leaf: buffer for leaf in empty if (buffer := module._buffers[leaf]) is not None})
    finally:
        module._buffers.update(before)
    for leaf, buffer in made[0].items():
        if not torch.equal(buffer, made[1][leaf]):
            place = f"{name}.{leaf}" if name else leaf
            raise ModelError.sentence(
                f"{place} is in no file of the checkpoint, and cannot be made without the whole model."
            )
    return made[0]
