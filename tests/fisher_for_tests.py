"""Squared gradients and inputs of linears, from one backward pass through a whole dense model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rarefy.models.blocks import find_blocks
from rarefy.models.sites import LinearSite


def plain_fisher(model: PreTrainedModel, windows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Squared gradients of the loss at the outputs of each linear, summed over tokens; mean squares of its inputs."""
    model.requires_grad_(True)
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, args: Any, output: Tensor) -> None:
            if not output.requires_grad:  # as that of an indexer, which chooses positions
                return
            output.retain_grad()
            outputs[name], inputs[name] = output, args[0].detach().reshape(-1, args[0].shape[-1])

        return hook

    for site in (site for block in find_blocks(model) for site in block.sites):
        if isinstance(site, LinearSite):
            site.module.register_forward_hook(keep(site.name))
    logits = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="sum").backward()
    squares = {
        name: output.grad.reshape(-1, output.shape[-1]).square().sum(0)
        for name, output in outputs.items()
        if output.grad is not None
    }
    return squares, {name: inputs[name].square().mean(0) for name in squares}
