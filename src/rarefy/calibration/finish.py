"""From the states that leave the last block to logits, by the model's own forward with blocks that do nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rarefy.calibration.stream import HiddenStates, hidden_place
from rarefy.calibration.trees import mapped
from rarefy.errors import ModelError
from rarefy.models.head import LOGIT_BYTES, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    def logits(
        self, windows: Int64[Tensor, "b length"], states: Float[Tensor, "b length hidden"]
    ) -> Float[Tensor, "b length vocabulary"]:
        """The logits of some windows of which ``states`` leave the last block, without a graph."""
        with torch.no_grad():
            return self._logits(windows, states)

    def gradient(
        self, windows: Int64[Tensor, "b length"], states: Float[Tensor, "b length hidden"]
    ) -> Float[Tensor, "b length hidden"]:
        """The gradient, at the states that leave the last block, of the sum of -log p over all next tokens.

        What comes behind the blocks takes each token by itself, so that only the logits of some tokens exist at once.
        """
        if states.shape[:2] != windows.shape:  # states of a layout of its own
            return self._gradient(windows, states, windows[:, 1:])
        size = max(1, LOGIT_BYTES // (4 * len(windows) * vocabulary_size(cast("PreTrainedModel", self._model))))
        parts = [
            self._gradient(windows[:, a : a + size], states[:, a : a + size], windows[:, a + 1 :])
            for a in range(0, windows.shape[1], size)
        ]
        return torch.cat(parts, dim=1)

    def _gradient(self, windows: Tensor, states: Tensor, following: Tensor) -> Tensor:
        """The same of some tokens, with those that are ``following`` each of them, as far as there are any."""
        following = following[:, : windows.shape[1]]
        with torch.enable_grad():
            leaf = states.detach().to(self._parameter()).requires_grad_(True)
            logits = self._logits(windows, leaf)[:, : following.shape[1]]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), following.flatten().to(logits.device), reduction="sum"
            )
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient

    def _logits(self, windows: Tensor, states: Tensor) -> Tensor:
        parameter = self._parameter()
        self._states = states.to(parameter).movedim(0, self._window_dim)
        logits = getattr(self._model(input_ids=windows.to(parameter.device), use_cache=False), "logits", None)
        if not isinstance(logits, Tensor):
            raise ModelError.sentence(
                f"{type(self._model).__name__} gives no logits, by which an allocation is searched and row weights "
                "of the loss are found."
            )
        return logits

    def _parameter(self) -> Tensor:
        """One that is in memory, for its dtype and device."""
        return next(each for each in self._model.parameters() if not each.is_meta)

    def _stand_in(self, *_: Any, **__: Any) -> Any:
        place = hidden_place(self._form)
        return mapped(self._form, lambda here, leaf: self._states if here == place else leaf)
