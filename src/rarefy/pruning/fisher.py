"""Fisher information: how much the loss of the dense model on the next token changes with each output of a linear.

    v_i = sum over tokens of (d loss / d y_i)^2,      y = x W^T,   loss = sum over tokens of -log p(next token)

These are the row weights of the layer problem (layer/row_weights.py). With the mean squares of the inputs x_j, the
allocation ``fisher`` compares weights of all layers by them.

A part of the windows goes forward through the dense blocks, and what enters each is kept; the model's own norm and
head give the gradient behind the last block; then it goes back through one block after the other, each of which runs
once more with the graph of one batch. Weights have no gradients. Memory: one block with the activations of a batch,
and the states that enter each block, which go to the offload folder where there is one.

Weights of experts that are kept in stacks have no outputs of their own that could be watched, and no such numbers.
Source: the diagonal of the empirical Fisher matrix, as MOONSHOT (arXiv 2604.13287) and others use it per weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors.torch import load, save
from torch import Tensor, nn

from rarefy.allocation.rule import Sensitivity
from rarefy.calibration.finish import Ending, output_form
from rarefy.calibration.stream import HiddenStates, convert_calls
from rarefy.errors import ModelError, NumericalError
from rarefy.models.blocks import Block
from rarefy.models.sites import LinearSite
from rarefy.pruning.advance import advance
from rarefy.pruning.block import PartCounter
from rarefy.pruning.precision import computing_in
from rarefy.pruning.search import own_windows
from rarefy.pruning.settings import PruneSettings
from rarefy.pruning.stores import BlockStore

_FILE = "fisher.safetensors"
_OUTPUTS, _INPUTS = ".outputs", ".inputs"  # behind the name of a site


def num_fisher_parts(
    store: BlockStore, blocks: Sequence[Block], windows: Tensor, first: int, num: int, settings: PruneSettings
) -> int:
    """What progress counts: each batch forward and back through each block, and through the head."""
    if not settings.needs_sensitivities or store.recall(_FILE) is not None:
        return 0
    few = own_windows(num, range(first, first + len(windows)), store.world.size)
    return (2 * len(blocks) + 1) * -(-len(few) // settings.batch_size)


def sensitivities(
    store: BlockStore,
    blocks: Sequence[Block],
    windows: Int64[Tensor, "num length"],
    first: int,
    num: int,
    settings: PruneSettings,
    counter: PartCounter,
) -> dict[str, Sensitivity]:
    """The sensitivity of each linear by name, the same on all processes; {} where the settings ask for none.

    ``windows`` are this process's, of which the first is number ``first`` of ``num``. Raises NumericalError for a
    gradient that is not finite, ModelError where the model has none.
    """
    if not settings.needs_sensitivities:
        return {}
    if (content := store.recall(_FILE)) is None:
        few = own_windows(num, range(first, first + len(windows)), store.world.size)
        some = windows[[window - first for window in few]]
        found = _followed_back(_Backward(store, blocks, some, settings.batch_size, counter))
        store.world.sum_([tensor for sums in found.values() for tensor in (sums.outputs, sums.inputs, sums.tokens)])
        found = {name: sums for name, sums in found.items() if sums.tokens}  # no token reaches some experts
        for name, sums in found.items():
            if not bool(sums.outputs.isfinite().all()):
                raise NumericalError(f"The gradient of the loss at what {name} puts out is not finite.")
        means = {name + _INPUTS: (sums.inputs / sums.tokens).cpu() for name, sums in found.items()}
        content = save({name + _OUTPUTS: sums.outputs.cpu() for name, sums in found.items()} | means)
        store.remember(_FILE, content)
    tensors = load(content)
    names = [name.removesuffix(_OUTPUTS) for name in tensors if name.endswith(_OUTPUTS)]
    return {name: Sensitivity(tensors[name + _OUTPUTS], tensors[name + _INPUTS]) for name in names}


def _followed_back(backward: _Backward) -> dict[str, _Sums]:
    """What it sums up. Raises ModelError for a model whose blocks or head autograd cannot go back through."""
    try:
        return backward.sums()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError.sentence(
            f"The loss of {type(backward.store.model).__name__} cannot be followed back through its blocks, as row "
            f"weights and allocation by fisher need it ({reason}): ask for --row-weights none --allocation uniform."
        ) from error


@dataclass
class _Sums:
    """Of one linear, in float64: squares of gradients at its outputs and of its inputs, over so many tokens."""

    outputs: Float[Tensor, " out"]
    inputs: Float[Tensor, " in"]
    tokens: Float[Tensor, "1"]

    @classmethod
    def of(cls, shape: tuple[int, int], device: torch.device) -> _Sums:
        """Zeros for a linear of this shape (out, in)."""
        return cls(*(torch.zeros(n, dtype=torch.float64, device=device) for n in (*shape, 1)))


class _Backward:
    """The dense model's windows on their way forward, and their gradients on the way back."""

    def __init__(
        self, store: BlockStore, blocks: Sequence[Block], windows: Tensor, batch_size: int, counter: PartCounter
    ) -> None:
        self.store, self.blocks, self.windows, self.counter = store, blocks, windows, counter
        self.batch_size = batch_size
        self.entering: list[HiddenStates] = []

    def sums(self) -> dict[str, _Sums]:
        """Those of this process's windows, by name."""
        states, ending = self._forward()
        gradients = self._behind_blocks(states, ending)
        found: dict[str, _Sums] = {}
        for block, before in zip_longest(self.blocks[::-1], self.blocks[-2::-1]):
            with self._loaded(block, before), self.store.world.together():
                self._through(block, gradients, found)
            self.entering.pop()
        return found

    def _forward(self) -> tuple[HiddenStates, Ending]:
        """The states that leave the last block, and what the model does with them."""
        world = self.store.world
        with world.together():
            states, _ = self.store.hidden_states(self.blocks, self.windows, self.batch_size)
        dtype = self.store.compute_dtype(states)
        # The range of float16 is too small for gradients.
        convert_calls(states, torch.float32 if dtype == torch.float16 else dtype)
        for block, following in zip_longest(self.blocks, self.blocks[1:]):
            with self._loaded(block, following):
                with world.together():
                    self.entering.append(states.fork(self.store.offload))
                    if following is None:
                        with computing_in(block.module, states.compute_dtype):
                            form = output_form(states, block.module, block.index)
                advance(world, block, states, self.counter.count)
        return states, Ending(self.store.model, [block.module for block in self.blocks], form, states.window_dim)

    def _behind_blocks(self, states: HiddenStates, ending: Ending) -> Float[Tensor, "num length hidden"]:
        """The gradient of the loss at the states that leave the last block, in float32."""
        gradients = torch.empty(states.states.shape, dtype=torch.float32)
        with self.store.world.together(), self.store.ending(self.blocks), ending.instead_of_blocks():
            for _, some in states.slices():
                for window in range(*some.indices(len(gradients))):
                    ids, hidden = self.windows[window : window + 1], states.states[window : window + 1]
                    gradients[window] = ending.gradient(ids, hidden)[0]
                self.counter.count()
        return gradients

    def _through(self, block: Block, gradients: Tensor, found: dict[str, _Sums]) -> None:
        """Bring the gradients from behind a block to before it, in place, and add up squares on the way."""
        entering = self.entering[-1]
        sites = [site for site in block.sites if isinstance(site, LinearSite)]
        with computing_in(block.module, entering.compute_dtype), _watching(sites, found):
            for batch, some in entering.slices():
                with _leaf(block.module, entering.calls[block.index][batch].keyword) as leaves, torch.enable_grad():
                    output = entering.run(block.module, block.index, batch, some)
                given = gradients[some].to(output)
                (before,) = torch.autograd.grad(output, leaves, grad_outputs=given)
                gradients[some] = before.movedim(entering.window_dim, 0).float().cpu()
                self.counter.count()

    @contextmanager
    def _loaded(self, block: Block, following: Block | None) -> Iterator[None]:
        with ExitStack() as scope:
            with self.store.world.together():
                scope.enter_context(self.store.loaded(block, following))
            yield


@contextmanager
def _watching(sites: Sequence[LinearSite], found: dict[str, _Sums]) -> Iterator[None]:
    """Within the scope, squares of each site's inputs, and of the gradient at its outputs, are added to ``found``."""

    def watch(sums: _Sums) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(gradient: Tensor) -> None:
            sums.outputs += _squares(gradient)

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            X = inputs[0].detach()
            # Some modules use parts of their weight one by one; what they put out has other rows.
            if output.requires_grad and (output.shape[-1], X.shape[-1]) == (len(sums.outputs), len(sums.inputs)):
                sums.inputs += _squares(X)
                sums.tokens += X.numel() // X.shape[-1]
                output.register_hook(add)

        return hook

    with ExitStack() as hooks:
        for site in sites:
            sums = found.setdefault(site.name, _Sums.of(site.shape, site.parameter.device))
            hooks.callback(site.module.register_forward_hook(watch(sums)).remove)
        yield


def _squares(rows: Tensor) -> Tensor:
    """The sum of squares over all tokens, of each feature."""
    return rows.reshape(-1, rows.shape[-1]).float().square().sum(0, dtype=torch.float64)


@contextmanager
def _leaf(module: nn.Module, keyword: str) -> Iterator[list[Tensor]]:
    """Within the scope, the hidden states that a block reads are leaves of the graph, and in the list."""
    leaves: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        hidden = kwargs[keyword] if keyword else args[0]
        leaves.append(hidden.detach().requires_grad_(True))
        return (args, {**kwargs, keyword: leaves[-1]}) if keyword else ((leaves[-1], *args[1:]), kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield leaves
    finally:
        handle.remove()
