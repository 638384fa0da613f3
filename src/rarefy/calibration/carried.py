"""Carries all that crosses from block to block besides hidden states: a row for each window, kept beside them.

Some blocks put out more than hidden states, which later blocks take as an argument: indices that attention
reuses, the states of a router. Some write into a mapping that all blocks are given, such as keys and values that
later blocks share. In a recorded call a ``FromBlock`` or a ``SharedMapping`` stands for these, and ``Carried``
holds the values, like hidden states a row for each window.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.calibration.storage import WindowRows, allocate
from rarefy.calibration.trees import Leaf, Place, at, children, mapped
from rarefy.errors import ModelError


@dataclass(frozen=True)
class FromBlock(Leaf):
    """Stands in a block's call for what block number ``block`` puts out at ``place`` of its output."""

    block: int
    place: Place


@dataclass(frozen=True)
class SharedMapping(Leaf):
    """Stands in the calls of a batch for a mapping that blocks may write to; calls that share it have its number.

    ``content`` is what the model itself has put into it, ``kind`` an empty one of its class.
    """

    number: int
    kind: MutableMapping[Any, Any]
    content: dict[Any, Any]


def in_compute_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A half-precision tensor in the dtype that blocks are computed in; any other as it is."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.to(dtype) if half and dtype is not None else tensor


@dataclass
class Opened:
    """The arguments of one call with all that was carried filled in, and the mappings as they were before it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mappings: dict[int, MutableMapping[Any, Any]] = field(default_factory=dict)
    before: dict[int, dict[Any, list[Any]]] = field(default_factory=dict)  # by number and key, what was there
    files: list[WindowRows] = field(default_factory=list)

    def release(self) -> None:
        """Give back the memory of arguments that are in files; the block has run."""
        for rows in self.files:
            rows.release()


@dataclass
class Carried:
    """The values that cross, by name, each with a row for every window; in memory, or in files of ``offload``.

    ``last_reader`` says for each ``FromBlock`` of the calls which block is the last to read it; others are not
    kept.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: Path | None = None
    last_reader: dict[FromBlock, int] = field(default_factory=dict)
    values: dict[str, WindowRows] = field(default_factory=dict)
    _coming: dict[str, WindowRows] = field(default_factory=dict)  # of the block that runs, for those behind it

    def open(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], windows: slice, dtype: torch.dtype | None = None
    ) -> Opened:
        """The arguments of a recorded call for some windows, with all that is kept elsewhere on the device.

        Half-precision arguments that are kept elsewhere come in ``dtype``.
        """
        opened = Opened((), {})

        def fill(_: Place, leaf: Any) -> Any:
            if isinstance(leaf, WindowRows):
                opened.files.append(leaf)
                return in_compute_dtype(leaf.tensor.to(self.device), dtype)
            if isinstance(leaf, FromBlock):
                return self._rows(_name_of(leaf), windows)
            if isinstance(leaf, SharedMapping):
                if leaf.number not in opened.mappings:
                    mapping = copy.copy(leaf.kind)
                    mapping.update(mapped(leaf.content, fill))
                    mapping.update(self._written(leaf.number, windows))
                    opened.mappings[leaf.number] = mapping
                    opened.before[leaf.number] = {key: _held(value) for key, value in mapping.items()}
                return opened.mappings[leaf.number]
            return leaf

        opened.args, opened.kwargs = mapped(args, fill), mapped(kwargs, fill)
        return opened

    def keep(self, block: int, output: Any, opened: Opened, windows: slice, num: int) -> None:
        """Keep what a block has put out, and written into mappings, for some of ``num`` windows.

        Raises ModelError for what has no row for each window.
        """
        for source in self.last_reader:
            if source.block == block:
                self._put(_name_of(source), _part(output, source), windows, num, block)
        for number, mapping in opened.mappings.items():
            for key, value in mapping.items():
                if not _are(_held(value), opened.before[number].get(key)):
                    for steps, leaf in _leaves(value, (("dict", key),)):
                        self._put(_name_of_entry(number, steps), leaf, windows, num, block)

    def finish(self, block: int) -> None:
        """All windows have passed ``block``: show what it has handed on, and forget what no later block reads."""
        self.values |= self._coming
        self._coming.clear()
        for source, last in self.last_reader.items():
            if last <= block:
                self.values.pop(_name_of(source), None)

    def fork(self, offload: Path | None = None) -> Carried:
        """A copy that goes on by itself."""
        other = Carried(self.device, offload, self.last_reader)
        for name, rows in self.values.items():
            other.add(name, tuple(rows.tensor.shape), rows.tensor.dtype).copy_(rows.tensor)
        other.release()
        return other

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for the value of that name, with any content."""
        self.values[name] = allocate(shape, dtype, self.device, self.offload)
        return self.values[name].tensor

    def release(self) -> None:
        """Give the memory of values in files back; it may be called whenever none is being read."""
        for rows in [*self.values.values(), *self._coming.values()]:
            rows.release()

    def _rows(self, name: str, windows: slice) -> Tensor:
        return self.values[name].tensor[windows].to(self.device)

    def _put(self, name: str, value: Any, windows: slice, num: int, block: int) -> None:
        count = min(windows.stop, num) - windows.start
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != count:
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ModelError.sentence(
                f"Block {block} hands {given} on to later blocks beside the hidden states of {count} windows, "
                "but Rarefy carries only tensors with a row for each window."
            )
        rows = self.values.get(name)
        if rows is None or (rows.tensor.shape[1:], rows.tensor.dtype) != (value.shape[1:], value.dtype):
            if name not in self._coming:
                self._coming[name] = allocate((num, *value.shape[1:]), value.dtype, self.device, self.offload)
            rows = self._coming[name]
        rows.tensor[windows] = value.to(rows.tensor.device)

    def _written(self, number: int, windows: slice) -> dict[Any, Any]:
        """The entries that blocks have written into a mapping, for some windows."""
        entries = [
            (steps, self._rows(name, windows)) for name, other, steps in _entries(self.values) if other == number
        ]
        written: dict[Any, Any] = _built(entries) if entries else {}
        return written


# --- Names of what is carried, which say all that is needed to find its place again

_Steps = tuple[tuple[str, Any], ...]  # from outside: the kind of container, and the key or index in it


def _name_of(source: FromBlock) -> str:
    return json.dumps(["output", source.block, *source.place])


def _name_of_entry(number: int, steps: _Steps) -> str:
    for _, key in steps:
        if not isinstance(key, str | int):
            raise ModelError.sentence(
                f"A block writes to {key!r} in a mapping that later blocks read, but Rarefy carries only entries "
                "whose keys are words or numbers."
            )
    return json.dumps(["mapping", number, *steps])


def _entries(names: dict[str, Any]) -> Iterator[tuple[str, int, _Steps]]:
    """The names of entries of mappings, each with the number of its mapping and the steps to it."""
    for name in names:
        what, number, *steps = json.loads(name)
        if what == "mapping":
            yield name, number, tuple((kind, key) for kind, key in steps)


def _leaves(value: Any, steps: _Steps) -> Iterator[tuple[_Steps, Any]]:
    """All in ``value`` that is no tuple, list or mapping."""
    kind = "dict" if isinstance(value, MutableMapping) else type(value).__name__
    if kind in ("dict", "tuple", "list"):
        for key, child in children(value):
            yield from _leaves(child, (*steps, (kind, key)))
    else:
        yield steps, value


def _held(value: Any) -> list[Any]:
    return [leaf for _, leaf in _leaves(value, ())]


def _are(some: list[Any], others: list[Any] | None) -> bool:
    """Whether two lists hold the very same objects."""
    return others is not None and len(some) == len(others) and all(one is two for one, two in zip(some, others))


def _built(leaves: list[tuple[_Steps, Tensor]]) -> Any:
    """The nested containers that ``leaves`` are the tensors of."""
    if leaves[0][0] == ():
        return leaves[0][1]
    grouped: dict[Any, list[tuple[_Steps, Tensor]]] = {}
    for steps, tensor in leaves:
        grouped.setdefault(steps[0][1], []).append((steps[1:], tensor))
    kind = leaves[0][0][0][0]
    if kind == "dict":
        return {key: _built(group) for key, group in grouped.items()}
    items = [_built(grouped[index]) for index in sorted(grouped)]
    return tuple(items) if kind == "tuple" else items


def _part(output: Any, source: FromBlock) -> Any:
    try:
        return at(output, source.place)
    except LookupError:
        return None
