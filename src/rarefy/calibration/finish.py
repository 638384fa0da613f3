"""From the states that leave the last block to logits, by the model's own forward with blocks that do nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rarefy.calibration.stream import HiddenStates, hidden_place
from rarefy.calibration.trees import mapped


def output_form(stream: HiddenStates, module: nn.Module, block: int) -> Any:
    """What a block puts out for the first batch, with an empty tensor in place of the hidden states."""
    batch, windows = next(stream.slices())
    seen: list[Any] = []
    hook = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        with torch.no_grad():
            stream.run(module, block, batch, windows)
    finally:
        hook.remove()
    place = hidden_place(seen[-1])
    return mapped(seen[-1], lambda here, leaf: leaf.new_empty(0) if here == place else leaf)


class Ending:
    """What a model does behind its blocks: norm, head, and whatever else makes logits of states.

    ``form`` is what a block puts out (``output_form``), ``window_dim`` where its windows are.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], form: Any, window_dim: int) -> None:
        self._model, self._blocks, self._form, self._window_dim = model, blocks, form, window_dim
        self._states: Tensor | None = None

    @contextmanager
    def instead_of_blocks(self) -> Iterator[None]:
        """Within the scope, every block puts out the states at hand, whatever it reads; ``logits`` works here."""
        own = [block.__dict__.get("forward") for block in self._blocks]  # hooks of other libraries live there
        try:
            for block in self._blocks:
                block.forward = self._stand_in
            yield
        finally:
            for block, forward in zip(self._blocks, own, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward

    @torch.no_grad()
    def logits(
        self, windows: Int64[Tensor, "b length"], states: Float[Tensor, "b length hidden"]
    ) -> Float[Tensor, "b length vocabulary"]:
        """The logits of some windows of which ``states`` leave the last block."""
        parameter = next(each for each in self._model.parameters() if not each.is_meta)
        self._states = states.to(parameter).movedim(0, self._window_dim)
        logits: Tensor = self._model(input_ids=windows.to(parameter.device), use_cache=False).logits
        return logits

    def _stand_in(self, *_: Any, **__: Any) -> Any:
        place = hidden_place(self._form)
        return mapped(self._form, lambda here, leaf: self._states if here == place else leaf)
