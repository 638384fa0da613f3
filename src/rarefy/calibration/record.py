"""The recording pass: how a model calls each of its blocks, and the hidden states that enter the first.

In one cheap pass through the model, every block only notes what it is called with and hands its input on. That
gives each block's own arguments (masks, position embeddings: layers may differ). Only the first block runs, once
and for one window, which shows what else blocks put out; where a later block is called with that, it is noted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from rarefy.calibration.carried import Carried, FromBlock, SharedMapping
from rarefy.calibration.storage import allocate, put_away
from rarefy.calibration.stream import BlockCall, HiddenStates, hidden_place
from rarefy.calibration.trees import Place, children, mapped
from rarefy.errors import CalibrationError, InputError, ModelError

_LARGE = 2**20  # bytes of an argument of one call from which on it is put away with the hidden states


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
    base = getattr(model, "base_model", model)
    recorder = _Recorder(type(model).__name__, len(blocks))
    with torch.no_grad(), recorder.replacing(blocks):
        entry, _ = recorder.record(base, windows[:1].to(device))
        window_dim = tuple(entry.shape).index(1) if 1 in entry.shape else 0
        shape = list(entry.shape)
        shape.pop(window_dim)
        rows = allocate((len(windows), *shape), entry.dtype, device, offload)
        calls: list[list[BlockCall]] = [[] for _ in blocks]
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(device)
            entry, batch_calls = recorder.record(base, batch)
            if entry.ndim != rows.tensor.ndim or entry.shape[window_dim] != len(batch):
                raise ModelError.sentence(
                    f"{type(model).__name__} makes hidden states of shape {tuple(entry.shape)} of {len(batch)} "
                    "windows, in which Rarefy does not find the windows again."
                )
            rows.tensor[start : start + len(batch)] = entry.movedim(window_dim, 0)
            rows.release()
            for block, call in enumerate(batch_calls):
                calls[block].append(call)
            _share_equal(calls, len(batch), offload)
    carried = Carried(device, offload, _last_readers(calls))
    return HiddenStates(rows.tensor, batch_size, device, calls, entry.dtype, rows.release, window_dim, carried)


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

    def __init__(self, model: str, num_blocks: int) -> None:
        self._model, self._num_blocks = model, num_blocks
        self._output: Any = None  # what the first block puts out
        self._begin()

    def record(self, base: nn.Module, windows: Int64[Tensor, "b length"]) -> tuple[Tensor, list[BlockCall]]:
        """The hidden states that enter the first block for some windows, and how each block is called.

        Raises ModelError where the blocks are not called one after the other with nothing done in between.
        """
        self._begin()
        self._num_windows = len(windows)
        try:
            base(input_ids=windows, use_cache=False)
        except InputError:
            raise
        except (ValueError, TypeError) as error:
            raise ModelError.sentence(cannot_run(self._model, error)) from error
        if self._order != list(range(self._num_blocks)):
            raise ModelError.sentence(blocks_out_of_order(self._num_blocks, self._order))
        assert self._entry is not None
        return self._entry, self._calls

    @contextmanager
    def replacing(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Within the scope, blocks only record."""
        own = [block.__dict__.get("forward") for block in blocks]  # hooks of other libraries live there
        try:
            for index, block in enumerate(blocks):
                block.forward = self._stand_in(index, block.forward)
            yield
        finally:
            for block, forward in zip(blocks, own, strict=True):
                block.__dict__.pop("forward", None)  # the class's own forward shows again
                if forward is not None:
                    block.forward = forward

    def _begin(self) -> None:
        self._order: list[int] = []
        self._calls: list[BlockCall] = []
        self._entry: Tensor | None = None
        self._handed_on: tuple[Tensor, int] | None = None
        self._placeholders: dict[int, tuple[Tensor, FromBlock]] = {}  # by address of what they are stored in
        self._mappings: list[MutableMapping[Any, Any]] = []

    def _stand_in(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def only_record(*args: Any, **kwargs: Any) -> Any:
            if self._output is None:
                self._output = forward(*args, **kwargs)
            keyword = "" if args else "hidden_states"
            hidden = args[0] if args else kwargs.pop(keyword, None)
            if not isinstance(hidden, Tensor):
                raise ModelError.sentence(called_without_states(self._model, index))
            self._check_unchanged(index, hidden)
            self._order.append(index)
            marked = {key: self._marked(value) for key, value in kwargs.items()}
            self._calls.append(BlockCall(self._marked(args[1:]), marked, keyword))
            self._entry = hidden if self._entry is None else self._entry
            self._handed_on = hidden, version(hidden)
            return self._answer(index, hidden)

        return only_record

    def _answer(self, index: int, hidden: Tensor) -> Any:
        """What looks like a block's output: its input as the hidden states, placeholders for all other tensors."""
        place_of_hidden = hidden_place(self._output)

        def answer(place: Place, leaf: Any) -> Any:
            if place == place_of_hidden:
                return hidden
            if not isinstance(leaf, Tensor):
                return leaf
            # as large as it would be, of the windows of this batch instead of one, but without memory
            rows = (self._num_windows, *leaf.shape[1:]) if leaf.shape[:1] == (1,) else leaf.shape
            placeholder = leaf.new_zeros(()).expand(rows)
            self._placeholders[stored_at(placeholder)] = placeholder, FromBlock(index, place)
            return placeholder

        return mapped(self._output, answer)

    def _marked(self, value: Any) -> Any:
        """Arguments with marks in place of what crosses from earlier blocks, and of mappings."""
        if isinstance(value, Tensor):
            return self._placeholders.get(stored_at(value), (None, value))[1]
        if isinstance(value, MutableMapping):
            return self._marked_mapping(value)
        return (
            type(value)(self._marked(child) for _, child in children(value))
            if type(value) in (tuple, list)
            else value
        )

    def _marked_mapping(self, mapping: MutableMapping[Any, Any]) -> SharedMapping:
        known = [number for number, other in enumerate(self._mappings) if other is mapping]
        if not known:
            known = [len(self._mappings)]
            self._mappings.append(mapping)
        kind = copy.copy(mapping)
        kind.clear()
        return SharedMapping(known[0], kind, {key: self._marked(value) for key, value in mapping.items()})

    def _check_unchanged(self, index: int, hidden: Tensor) -> None:
        """Raise ModelError where the hidden states are not those that the block before has handed on."""
        if self._handed_on is None:
            return
        before, its_version = self._handed_on
        if not same_part(hidden, before) or version(hidden) != its_version:
            raise ModelError.sentence(changed_between(self._model, index))


# --- Sentences, and questions about tensors, which the check without weights has too


def blocks_out_of_order(num_blocks: int, order: Sequence[int]) -> str:
    """The sentence about a model that does not run each of its blocks once, in order."""
    if list(order) == sorted(set(order)):
        return f"The model runs only {len(order)} of its {num_blocks} blocks on text, but Rarefy needs all of them."
    return f"The model runs its {num_blocks} blocks in the order {list(order)}, but Rarefy needs each once, in turn."


def cannot_run(model: str, error: Exception) -> str:
    """The sentence about a model that needs more than token ids."""
    return f"{model} cannot be run on token ids alone: {' '.join(str(error).split()).rstrip('.')}."


def called_without_states(model: str, index: int) -> str:
    """The sentence about a block whose first argument, or ``hidden_states``, is no tensor with the windows in it."""
    return f"{model} does not call block {index} with the hidden states of every window, which Rarefy needs."


def changed_between(model: str, index: int) -> str:
    """The sentence about a model that does something to hidden states between two blocks."""
    return (
        f"{model} changes hidden states between block {index - 1} and block {index}, "
        "but Rarefy replays nothing but blocks."
    )


def stored_at(tensor: Tensor) -> int:
    """A number for the memory of a tensor, which its views share; tensors without memory have one too."""
    return tensor.untyped_storage()._cdata


def same_part(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return tensor is other or (
        stored_at(tensor) == stored_at(other)
        and tensor.storage_offset() == other.storage_offset()
        and (tensor.shape, tensor.stride(), tensor.dtype) == (other.shape, other.stride(), other.dtype)
    )


def version(tensor: Tensor) -> int:
    """How often a tensor was written to in place, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version


# --- What is the same in several calls


def _last_readers(calls: Sequence[Sequence[BlockCall]]) -> dict[FromBlock, int]:
    """The last block that reads each part of another block's output."""
    readers: dict[FromBlock, int] = {}

    def note(block: int, value: Any) -> None:
        if isinstance(value, FromBlock):
            readers[value] = block
        elif isinstance(value, SharedMapping):
            note(block, value.content)
        else:
            for _, child in children(value):
                note(block, child)

    for block, (call, *_) in enumerate(calls):
        note(block, [call.args, call.kwargs])
    return readers


def _share_equal(calls: list[list[BlockCall]], num_windows: int, offload: Path | None) -> None:
    """Let the newest batch's tensors be those of the first block or first batch where they are equal.

    Large ones that this batch has for itself, such as inputs of each layer, are put away where states are.
    """
    seen: list[Tensor] = []
    own: dict[int, Any] = {}  # of this batch, by identity, where they are now

    def known(tensor: Tensor) -> Any:
        for other in seen:
            if _equal(other, tensor):
                return own.get(id(other), other)
        seen.append(tensor)
        if len(calls[0]) > 1 and tensor.shape[:1] == (num_windows,) and tensor.nbytes >= _LARGE:
            own[id(tensor)] = put_away(tensor, offload)
        return own.get(id(tensor), tensor)

    def note(tensor: Tensor) -> Tensor:
        if not any(other is tensor for other in seen):
            seen.append(tensor)
        return tensor

    for block_calls in calls:
        if len(block_calls) > 1:
            block_calls[0].map_(note)
        block_calls[-1].map_(known)


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return other is tensor or (
        other.shape == tensor.shape and other.dtype == tensor.dtype and torch.equal(other, tensor)
    )
