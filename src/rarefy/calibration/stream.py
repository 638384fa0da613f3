"""Hidden states of all windows, and how they are replayed through one block after the other.

One cheap pass through the model, in which every block only records what it is called with and hands
its input on, gives each block's own keyword arguments (masks, position embeddings: layers may
differ) and the hidden states that enter the first block. From then on a block is called by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rarefy.calibration.ahead import Ahead, empty_states
from rarefy.calibration.spill import MappedStates
from rarefy.errors import CalibrationError, ModelError


def _keep() -> None:
    """Memory is not given back."""


@dataclass
class BlockCall:
    """Everything one block gets besides its hidden states, for one batch of windows."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class HiddenStates:
    """The hidden states (num, length, hidden) that enter the next block, in the model's dtype.

    ``calls[b][i]`` is how block b is called for batch i; equal tensors are stored once. ``release`` gives
    back the memory of states that are in a file; it may be called whenever no batch is being read.
    """

    states: Float[Tensor, "num length hidden"]
    batch_size: int
    device: torch.device
    calls: list[list[BlockCall]] = field(default_factory=list)
    compute_dtype: torch.dtype = torch.float32
    release: Callable[[], None] = _keep

    def __post_init__(self) -> None:
        self._ahead = Ahead(self.states, self.device)

    @property
    def num_batches(self) -> int:
        """Number of batches of windows."""
        return -(-self.states.shape[0] // self.batch_size)

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Batch number and the windows it holds."""
        for i in range(self.num_batches):
            yield i, slice(i * self.batch_size, (i + 1) * self.batch_size)

    def fork(self, offload: Path | None = None) -> HiddenStates:
        """A second path that starts with the same states, and calls blocks in the same way.

        Its states are in memory, or in a file of the folder ``offload``, which raises OutputError where it is full.
        """
        other = _allocate(tuple(self.states.shape), self.states.dtype, offload, self.batch_size, self.device)
        other.states.copy_(self.states)
        other.calls, other.compute_dtype = self.calls, self.compute_dtype
        other.release()
        return other

    def run(self, module: nn.Module, block: int, batch: int, windows: slice) -> Float[Tensor, "b length hidden"]:
        """The output of one block for one batch, in the dtype of computation."""
        call = self.calls[block][batch]
        hidden = self._ahead.take(windows).to(self.compute_dtype)
        self._ahead.fetch(slice(windows.stop, windows.stop + self.batch_size))  # as ``slices`` has it
        try:
            output = module(hidden, *call.args, **call.kwargs)
        finally:
            self.release()
        return output[0] if isinstance(output, (tuple, list)) else output

    def advance(self, module: nn.Module, block: int, on_batch: Callable[[], None] | None = None) -> None:
        """Replace the hidden states by the block's outputs, batch by batch, in place."""
        with torch.no_grad():
            for batch, windows in self.slices():
                self.states[windows] = self.run(module, block, batch, windows).to(self.states)
                if on_batch:
                    on_batch()
            self.release()


def record(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    windows: Int64[Tensor, "num length"],
    batch_size: int,
    offload: Path | None = None,
) -> HiddenStates:
    """Hidden states at the entry of the first block and every block's arguments, in one pass.

    ``windows`` are token ids. The head is never run. The states are in memory, or in a file of the folder
    ``offload``. Raises CalibrationError for windows that are no token ids of the model, ModelError where a
    model does not run its blocks one after the other, OutputError where the folder cannot take the states.
    """
    check_windows(model, windows)
    device = next(model.parameters()).device
    stream: HiddenStates | None = None
    calls: list[list[BlockCall]] = [[] for _ in blocks]
    base = getattr(model, "base_model", model)
    with torch.no_grad(), _recording(blocks) as recorder:
        for start in range(0, windows.shape[0], batch_size):
            batch = windows[start : start + batch_size].to(device)
            recorder.begin()
            base(input_ids=batch, use_cache=False)
            if recorder.order != list(range(len(blocks))):
                raise ModelError.sentence(
                    f"The model ran its {len(blocks)} blocks in the order {recorder.order}, "
                    "but Rarefy needs each once, one after the other."
                )
            entry = recorder.entry
            assert entry is not None
            if stream is None:
                stream = _allocate((len(windows), *entry.shape[1:]), entry.dtype, offload, batch_size, device)
                stream.calls = calls
            stream.states[start : start + len(batch)] = entry
            stream.release()
            for block, call in enumerate(recorder.calls):
                calls[block].append(call)
            _share_equal(calls)
    if stream is None:
        raise CalibrationError.sentence("windows holds no window.")
    return stream


def _allocate(
    shape: tuple[int, ...], dtype: torch.dtype, offload: Path | None, batch_size: int, device: torch.device
) -> HiddenStates:
    """Hidden states with any content, in memory (the GPU's, if they fit) or in a file of ``offload``."""
    if offload is None:
        return HiddenStates(empty_states(shape, dtype, device), batch_size, device, compute_dtype=dtype)
    mapped = MappedStates(offload, shape, dtype)
    return HiddenStates(mapped.tensor, batch_size, device, compute_dtype=dtype, release=mapped.release)


def check_windows(model: nn.Module, windows: Int64[Tensor, "num length"]) -> None:
    """Raise CalibrationError unless ``windows`` (num, length) are int64 token ids of the model."""
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.numel() == 0:
        given = f"a {windows.dtype} tensor of shape {tuple(windows.shape)}"
        raise CalibrationError("windows", given, "int64 token ids of shape (num, length)")
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None)
    if size is not None and not 0 <= int(windows.min()) <= int(windows.max()) < size:
        given = f"ids from {int(windows.min())} to {int(windows.max())}"
        raise CalibrationError("windows", given, f"token ids from 0 to {size - 1}, the model's vocabulary")


class _Recorder:
    """Stands in for the forward of every block during the recording pass."""

    def __init__(self) -> None:
        self.begin()
        self._tuple: bool | None = None  # whether blocks return a tuple, learnt from the first call

    def begin(self) -> None:
        self.order: list[int] = []
        self.calls: list[BlockCall] = []
        self.entry: Tensor | None = None

    def stand_in(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def only_record(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            if self._tuple is None:  # one real call tells what shape of answer the model expects
                self._tuple = isinstance(forward(hidden, *args, **kwargs), tuple)
            if self.entry is None:
                self.entry = hidden
            self.order.append(index)
            self.calls.append(BlockCall(args, kwargs))
            return (hidden,) if self._tuple else hidden

        return only_record


@contextmanager
def _recording(blocks: Sequence[nn.Module]) -> Iterator[_Recorder]:
    recorder = _Recorder()
    own = [block.__dict__.get("forward") for block in blocks]  # hooks of other libraries live there
    try:
        for index, block in enumerate(blocks):
            block.forward = recorder.stand_in(index, block.forward)
        yield recorder
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)  # the class's own forward shows again
            if forward is not None:
                block.forward = forward


def _share_equal(calls: list[list[BlockCall]]) -> None:
    """Let the newest batch's tensors be those of the first block or first batch where they are equal."""
    seen: list[Tensor] = []
    for block_calls in calls:
        for call in (block_calls[0], block_calls[-1]):
            call.args = _map(call.args, lambda tensor: _known(tensor, seen))
            call.kwargs = _map(call.kwargs, lambda tensor: _known(tensor, seen))


def _known(tensor: Tensor, seen: list[Tensor]) -> Tensor:
    for other in seen:
        if other is tensor or (
            other.shape == tensor.shape and other.dtype == tensor.dtype and torch.equal(other, tensor)
        ):
            return other
    seen.append(tensor)
    return tensor


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to every tensor inside tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_map(item, change) for item in value)
    if type(value) is dict:
        return {key: _map(item, change) for key, item in value.items()}
    return value


def convert_calls(stream: HiddenStates, dtype: torch.dtype) -> None:
    """Compute in ``dtype`` from now on: floating-point arguments of the blocks follow."""
    converted: dict[int, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        return converted.setdefault(id(tensor), tensor.to(dtype))

    for block_calls in stream.calls:
        for call in block_calls:
            call.args, call.kwargs = _map(call.args, change), _map(call.kwargs, change)
    stream.compute_dtype = dtype
