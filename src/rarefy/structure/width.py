"""Which neurons and heads to remove from each block, and the repair of what is left, by the layer problem.

Removing parts of a block is pruning columns of its exit (``down_proj``, ``o_proj``), the same in all rows. Blocks are
taken in order, with hidden states that come from the blocks before as they are after their removals, heads before
neurons. What is written into an exit has zeros in the removed columns: the model is the smaller one already, but for
its shapes. The repair of the last exit of each block aims at the dense model's states (dense_path.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedModel

from rarefy.calibration.record import record
from rarefy.models.blocks import find_blocks
from rarefy.structure.dense_path import DensePath
from rarefy.structure.exits import Choice, ExitRecord, ExitSolver, holding_out
from rarefy.structure.parts import Parts, find_parts

Masks = dict[int, Bool[Tensor, " parts"]]


class Finished(Protocol):
    """Keeps the blocks that are finished, so that a run that was killed goes on with the next one."""

    def recall(self, block: int, /) -> tuple[Mapping[str, Tensor], Sequence[Mapping[str, Any]]] | None:
        """What ``keep`` got for a block; None where it is not finished."""

    def keep(self, block: int, tensors: Mapping[str, Tensor], records: Sequence[Mapping[str, Any]], /) -> None:
        """A block is finished: its tensors, and its records as plain values."""


def remove_parts(
    model: PreTrainedModel,
    windows: Int64[Tensor, "num length"],
    wanted: Sequence[tuple[Parts, int | Mapping[int, int]]],
    *,
    batch_size: int = 4,
    repair: bool = True,
    choice: Choice = "interactions",
    damping: float | None = None,
    dense: DensePath | None = None,
    offload: Path | None = None,
    finished: Finished | None = None,
    watch: Callable[[int, int, str], None] | None = None,
) -> tuple[list[tuple[Parts, Mapping[int, Tensor]]], list[ExitRecord]]:
    """Write zeros into the exits' columns of removed parts, and repaired weights into the others, in place.

    ``wanted`` says of each kind how many parts every block keeps, or each by its index; blocks that are ``finished``
    are taken as they are. ``damping`` is that of the refit (None: what does best on windows that are held out of it);
    ``dense`` is the path of the dense model, at which the last exits of blocks aim.
    Returns what is kept, as ``Removal`` takes it, and a record of each exit that changes. Raises NumericalError where
    a Gram matrix cannot be factored, ModelError where exits cannot aim at the dense path.
    """
    blocks = find_blocks(model)
    stream = record(
        model, [block.module for block in blocks], windows, holding_out(len(windows), batch_size), offload
    )
    solver = ExitSolver(stream, dense, repair, choice, damping)
    kept: list[tuple[Parts, Masks]] = [(parts, {}) for parts, _ in wanted]
    records: list[ExitRecord] = []
    last = max((index for parts, _ in wanted for index in parts.exits), default=-1)
    for block in blocks[: last + 1]:
        own = [(parts, _number(number, block.index)) for parts, number in wanted if block.index in parts.exits]
        known = finished.recall(block.index) if finished else None
        if dense:  # before its weights change, which may be those of the dense model
            dense.advance(block.index)
        if known is None:
            made, found = solver.exits(block, own, changed=bool(records))
            if finished:
                finished.keep(block.index, made, [asdict(one) for one in found])
        else:
            made, found = dict(known[0]), [ExitRecord(**one) for one in known[1]]
            for parts, _ in own:
                parts.exits[block.index].write(made[f"{parts.kind}.weight"])
        for (parts, _), (_, masks) in zip(wanted, kept):
            if block.index in parts.exits:
                masks[block.index] = made[f"{parts.kind}.kept"]
        records += found
        if block.index < last:
            stream.advance(block.module, block.index)
        if watch:
            watch(block.index + 1, last + 1, f"error {records[-1].error:.3g}" if records else "")
    return [(parts, masks) for parts, masks in kept], records


def towards_dense(
    model: PreTrainedModel,
    kept: Sequence[int],
    smaller: PreTrainedModel,
    wanted: Sequence[tuple[Parts, int]],
    windows: Int64[Tensor, "num length"],
    batch_size: int,
) -> tuple[list[tuple[Parts, int]], DensePath]:
    """``wanted`` and the path at which its exits can aim; arguments are those of ``DensePath``.

    Where no neurons are to go, the exits are those of all neurons of every block. Raises ModelError where ``smaller``
    has no exits that can.
    """
    exits = list(wanted)
    if all(parts.kind != "neurons" for parts, _ in wanted):
        neurons = find_parts(smaller, "neurons")
        exits.append((neurons, neurons.number))
    return exits, DensePath(model, kept, smaller, exits[-1][0].exits, windows, batch_size)


def _number(number: int | Mapping[int, int], block: int) -> int:
    return number if isinstance(number, int) else number[block]
