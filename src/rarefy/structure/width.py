"""Which neurons and heads to remove from each block, and the repair of what is left, by the layer problem.

Removing parts of a block is pruning columns of its exit (``down_proj``, ``o_proj``), the same in all rows. Blocks are
taken in order, with hidden states that come from the blocks before as they are after their removals, heads before
neurons. What is written into an exit has zeros in the removed columns: the model is the smaller one already, but for
its shapes. The repair of the last exit of each block aims at the dense model's states (dense_path.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedModel

from rarefy.calibration.collect import collect
from rarefy.calibration.record import record
from rarefy.calibration.stream import HiddenStates
from rarefy.layer.columns import Columns
from rarefy.layer.passes import apply_mask
from rarefy.layer.problem import LayerProblem
from rarefy.layer.removal import DAMPING, choose_columns, refit_columns, removal_costs
from rarefy.methods.base import wanda_scores
from rarefy.models.blocks import Block, find_blocks
from rarefy.structure.dense_path import DensePath, Gap
from rarefy.structure.parts import Parts, find_parts

#: How columns are chosen: with their interactions, by what each costs alone, or by the sum of their Wanda scores.
Choice = Literal["interactions", "single", "wanda"]
CHOICES: tuple[Choice, ...] = ("interactions", "single", "wanda")

Masks = dict[int, Bool[Tensor, " parts"]]


@dataclass(frozen=True)
class ExitRecord:
    """What became of one exit: how many parts are kept, and its output error before and after the repair.

    Errors are relative, as those of layers (``LayerProblem.relative_error``), of the weight before rounding; where
    the exit aims at the dense path, they are those from that aim. ``drift`` is the energy by which the
    states behind its block differ from the dense model's, over the energy of these, with the exit's removed columns
    at zero and nothing else changed, ``drift_left`` with the repair.
    """

    name: str
    block: int
    kind: str
    number: int
    kept: int
    masked_error: float
    error: float
    drift: float | None = None
    drift_left: float | None = None


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
    damping: float = DAMPING,
    dense: DensePath | None = None,
    offload: Path | None = None,
    finished: Finished | None = None,
    watch: Callable[[int, int, str], None] | None = None,
) -> tuple[list[tuple[Parts, Mapping[int, Tensor]]], list[ExitRecord]]:
    """Write zeros into the exits' columns of removed parts, and repaired weights into the others, in place.

    ``wanted`` says of each kind how many parts every block keeps, or each by its index; blocks that are ``finished``
    are taken as they are. ``dense`` is the path of the dense model, at which the last exits of blocks aim.
    Returns what is kept, as ``Removal`` takes it, and a record of each exit that changes. Raises NumericalError where
    a Gram matrix cannot be factored, ModelError where exits cannot aim at the dense path.
    """
    blocks = find_blocks(model)
    stream = record(model, [block.module for block in blocks], windows, batch_size, offload)
    solve = _Solve(stream, dense, repair, choice, damping)
    kept: list[tuple[Parts, Masks]] = [(parts, {}) for parts, _ in wanted]
    records: list[ExitRecord] = []
    last = max((index for parts, _ in wanted for index in parts.exits), default=-1)
    for block in blocks[: last + 1]:
        own = [(parts, _number(number, block.index)) for parts, number in wanted if block.index in parts.exits]
        known = finished.recall(block.index) if finished else None
        if dense:  # before its weights change, which may be those of the dense model
            dense.advance(block.index)
        if known is None:
            made, found = solve.exits(block, own, changed=bool(records))
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


@dataclass(frozen=True)
class _Solve:
    """How the exits of a block are solved, of which ``stream`` has the states that enter it."""

    stream: HiddenStates
    dense: DensePath | None
    repair: bool
    choice: Choice
    damping: float

    def exits(
        self, block: Block, own: Sequence[tuple[Parts, int]], changed: bool
    ) -> tuple[dict[str, Tensor], list[ExitRecord]]:
        """Write the exits of one block, in order, with so many parts kept; what was written, and a record of each.

        ``changed``: something in an earlier block is not as in the dense model.
        """
        made: dict[str, Tensor] = {}
        found: list[ExitRecord] = []
        for parts, number in own:
            site, gap = parts.exits[block.index], None
            columns = torch.ones(parts.number, dtype=torch.bool)
            if self.dense and parts is own[-1][0]:  # nothing behind it changes what the block adds
                gap = self.dense.gap(self.stream, block, site, changed or bool(found))
            if number < parts.number or gap:
                problem = LayerProblem(
                    site.read(), collect(self.stream, block.module, block.index, [site])[site.name]
                )
                problem.check(site.name)
                weight, columns, errors = self.exit(problem, parts, number, gap)
                site.write(weight)
                found.append(ExitRecord(site.name, block.index, parts.kind, parts.number, number, *errors))
            made |= {f"{parts.kind}.weight": site.read(), f"{parts.kind}.kept": columns}
        return made, found

    def exit(
        self, dense: LayerProblem, parts: Parts, number: int, gap: Gap | None
    ) -> tuple[Tensor, Bool[Tensor, " parts"], tuple[float, float, float | None, float | None]]:
        """The weight of an exit, which parts are kept, and the errors and drifts of its record."""
        problem = LayerProblem(gap.target(dense), dense.gram) if gap else dense
        columns, masked, weight = torch.ones_like(problem.dead), problem.W0, problem.W0
        if number < parts.number:
            columns = _chosen(problem, Columns(number * parts.width, parts.width), self.choice, self.damping)
            masked = apply_mask(problem.W0, columns.expand(problem.shape).contiguous())
            weight = refit_columns(problem, columns, self.damping)[0] if self.repair else masked
        drifts: tuple[float | None, float | None] = (None, None)
        if gap:
            unrepaired = apply_mask(dense.W0, columns.expand(problem.shape).contiguous())
            drifts = (gap.left(dense, unrepaired), gap.left(dense, weight))
        kept = columns.view(parts.number, parts.width)[:, 0].cpu()
        return weight, kept, (problem.relative_error(masked), problem.relative_error(weight), *drifts)


def _chosen(problem: LayerProblem, pattern: Columns, choice: Choice, damping: float) -> Bool[Tensor, " inputs"]:
    """The columns to keep."""
    if choice == "interactions":
        return choose_columns(problem, pattern, damping)
    if choice == "wanda":
        return pattern.project(wanda_scores(problem))[0]
    costs = removal_costs(problem, pattern.group, damping)
    spread = (costs / pattern.group).repeat_interleave(pattern.group).unsqueeze(0)
    return pattern.project(spread.expand(problem.shape))[0]
