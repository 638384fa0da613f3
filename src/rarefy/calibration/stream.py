"""Hidden states of all windows, and how they are replayed through one block after the other.

The recording pass (record.py) gives the hidden states that enter the first block, and how each block is called
for each batch of windows. From then on a block is called by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rarefy.calibration.ahead import Ahead
from rarefy.calibration.carried import Carried, Opened, SharedMapping, in_compute_dtype
from rarefy.calibration.storage import allocate
from rarefy.calibration.trees import Place, at, children, mapped
from rarefy.errors import NumericalError


def _keep() -> None:
    """Memory is not given back."""


@dataclass
class BlockCall:
    """Everything one block gets besides its hidden states, for one batch of windows.

    ``FromBlock`` and ``SharedMapping`` stand for what crosses from earlier blocks. The hidden states are the
    first argument, or that of the name ``keyword``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str = ""

    def map_(self, change: Callable[[Tensor], Any]) -> None:
        """Replace every tensor by what ``change`` makes of it."""

        def changed(_: Place, leaf: Any) -> Any:
            if isinstance(leaf, SharedMapping):
                return replace(leaf, content=mapped(leaf.content, changed))
            return change(leaf) if isinstance(leaf, Tensor) else leaf

        self.args, self.kwargs = mapped(self.args, changed), mapped(self.kwargs, changed)


@dataclass
class HiddenStates:
    """The hidden states (num, length, hidden) that enter the next block, in the model's dtype.

    ``calls[b][i]`` is how block b is called for batch i; equal tensors are stored once. ``release`` gives back the
    memory of states that are in a file; it may be called whenever no batch is being read. ``carried`` is what
    enters later blocks besides. The blocks themselves have the windows in dimension ``window_dim``, and in some
    models there are more dimensions than three. ``only`` are the batches that are read, if not all.
    """

    states: Float[Tensor, "num length hidden"]
    batch_size: int
    device: torch.device
    calls: list[list[BlockCall]] = field(default_factory=list)
    compute_dtype: torch.dtype = torch.float32
    release: Callable[[], None] = _keep
    window_dim: int = 0
    carried: Carried = field(default_factory=Carried)
    only: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._ahead = Ahead(self.states, self.device)

    @property
    def num_batches(self) -> int:
        """Number of batches of windows."""
        return -(-self.states.shape[0] // self.batch_size)

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Batch number and the windows it holds."""
        for i in range(self.num_batches) if self.only is None else self.only:
            yield i, slice(i * self.batch_size, (i + 1) * self.batch_size)

    def of_batches(self, batches: Sequence[int]) -> HiddenStates:
        """The same states, of which these batches alone are read; not to be advanced."""
        return replace(self, only=batches)

    @property
    def crosses(self) -> bool:
        """Whether more than hidden states goes from block to block, such as keys and values that some share."""
        found: list[bool] = []
        for batches in self.calls:
            for call in batches[:1]:
                mapped((call.args, call.kwargs), lambda _, leaf: found.append(isinstance(leaf, SharedMapping)))
        return bool(self.carried.last_reader) or any(found)

    def fork(self, offload: Path | None = None) -> HiddenStates:
        """A second path that starts with the same states, and calls blocks in the same way.

        Its states are in memory, or in a file of the folder ``offload``, which raises OutputError where it is full.
        """
        rows = allocate(tuple(self.states.shape), self.states.dtype, self.device, offload)
        rows.tensor.copy_(self.states)
        rows.release()
        return replace(self, states=rows.tensor, release=rows.release, carried=self.carried.fork(offload))

    def run(self, module: nn.Module, block: int, batch: int, windows: slice) -> Float[Tensor, "b length hidden"]:
        """The output of one block for one batch, in the dtype of computation, a row for each window."""
        return self._run(module, block, batch, windows)[0]

    def advance(self, module: nn.Module, block: int, on_batch: Callable[[], None] | None = None) -> None:
        """Replace the hidden states by the block's outputs, batch by batch, in place.

        Raises NumericalError where they leave the range of float16, ModelError where the block hands on what
        cannot be carried.
        """
        for batch, windows in self.slices():
            self.advance_batch(module, block, batch, windows)
            if on_batch:
                on_batch()
        self.finish(block)

    def advance_batch(self, module: nn.Module, block: int, batch: int, windows: slice) -> None:
        """What ``advance`` does, for one batch; ``finish`` comes after the last. Errors are those of ``advance``."""
        with torch.no_grad():
            hidden, output, opened = self._run(module, block, batch, windows)
            # first, because it may be a view of what the block has read
            self.carried.keep(block, output, opened, windows, len(self.states))
            self.states[windows] = hidden.to(self.states)
        if self.states.dtype == torch.float16 and not bool(self.states[windows].isfinite().all()):
            self.refuse_range(module, f"The hidden states behind block {block} leave")
        self.carried.release()

    def finish(self, block: int) -> None:
        """All batches have been advanced through ``block``."""
        self.carried.finish(block)
        self.release()

    def refuse_range(self, module: nn.Module, what: str) -> None:
        """Raise NumericalError: numbers are too large for float16; not where the block's own weights are no numbers.

        Other dtypes have range enough, and what is not finite in them is found when a layer is solved.
        """
        if all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
            raise NumericalError(
                f"{what} the range of float16 (65,504): prune the model in bfloat16 or float32 (--dtype)."
            )

    def _run(self, module: nn.Module, block: int, batch: int, windows: slice) -> tuple[Tensor, Any, Opened]:
        """The hidden states of the output, the output itself, and what the block was called with."""
        call = self.calls[block][batch]
        hidden = self._ahead.take(windows).to(self.compute_dtype).movedim(0, self.window_dim).contiguous()
        self._ahead.fetch(slice(windows.stop, windows.stop + self.batch_size))  # as ``slices`` has it
        opened = self.carried.open(call.args, call.kwargs, windows, self.compute_dtype)
        try:
            if call.keyword:
                output = module(*opened.args, **opened.kwargs, **{call.keyword: hidden})
            else:
                output = module(hidden, *opened.args, **opened.kwargs)
        finally:
            self.release()
            opened.release()
        return at(output, hidden_place(output)).movedim(self.window_dim, 0), output, opened


def hidden_place(output: Any) -> Place:
    """Where the hidden states are in a block's output: first, unless a field says that it is them."""
    if isinstance(output, Tensor):
        return ()
    keys = [key for key, _ in children(output)]
    key = "hidden_states" if "hidden_states" in keys else keys[0]
    return (key, *hidden_place(dict(children(output))[key]))


def convert_calls(stream: HiddenStates, dtype: torch.dtype) -> None:
    """Compute in ``dtype`` from now on: half-precision arguments of the blocks follow, as their weights do."""
    converted: dict[int, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        if id(tensor) not in converted:
            converted[id(tensor)] = in_compute_dtype(tensor, dtype)
        return converted[id(tensor)]

    for block_calls in stream.calls:
        for call in block_calls:
            call.map_(change)
    stream.compute_dtype = dtype
