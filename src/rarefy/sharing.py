"""Who solves what: layers, or rows of them, shared out among processes by what they cost; records put together.

Costs are estimates from shapes alone, so that every process comes to the same answer without asking. What
counts is how layers compare: a row of a layer with ``in`` inputs costs a multiple of in^2 with every method
(products W @ H, and the grade), and a layer, or a part of it, some share of in^3 for its factorisations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rarefy.layer.problem import error_ratio
from rarefy.layer.solution import Status
from rarefy.report.records import LayerRecord

#: Of in^3, per layer, beside out * in^2: ALPS with 8 factorisations to 58 products, SparseGPT with one to a
#: product and its grades.
_FACTORISATIONS = 1 / 8

#: Statuses from the one that says most to the one that says least about a layer of which a part has it.
_GRAVITY = (
    *(Status.NOT_FACTORED, Status.NOT_FINITE, Status.PART_FAILED, Status.DAMPED),
    *(Status.STEP_LIMIT, Status.CONVERGED, Status.SOLVED, Status.TRIVIAL),
)
#: How numbers of the details and traces of parts become the layer's; of others the largest does.
_JOINED: dict[str, Callable[[Sequence[float]], float]] = {
    "swaps": math.fsum,
    "support change": math.fsum,
    "residual": lambda norms: math.sqrt(math.fsum(norm * norm for norm in norms)),
}


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of layer number ``layer``, which process ``rank`` solves."""

    layer: int
    start: int
    stop: int
    rank: int = 0

    @property
    def rows(self) -> slice:
        """The rows as an index."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Part:
    """The record of a piece, the output energy that was lost in its rows, and theirs in the dense layer."""

    record: LayerRecord
    lost: float
    dense: float


def share_out(shapes: Sequence[tuple[int, int]], size: int, can_be_cut: bool) -> list[Piece]:
    """All rows of layers of these ``shapes`` (out, in), shared out among ``size`` processes.

    The most expensive goes to the process that has least, and so on. Where layers ``can_be_cut``, one that
    costs more than a process's fair share is cut into equal parts, if the last process is done sooner then:
    every part costs factorisations. In the order of rows.
    """
    fair = sum(_cost(*shape) for shape in shapes) / size
    whole = [Piece(layer, 0, out) for layer, (out, _) in enumerate(shapes)]
    cut = []
    for layer, (out, inputs) in enumerate(shapes):
        parts = min(out, size, math.ceil(_cost(out, inputs) / fair))
        cut += [Piece(layer, out * i // parts, out * (i + 1) // parts) for i in range(parts)]
    plans = [_dealt(pieces, shapes, size) for pieces in ([whole, cut] if can_be_cut else [whole])]
    return min(plans, key=lambda plan: plan[0])[1]


def _dealt(pieces: Sequence[Piece], shapes: Sequence[tuple[int, int]], size: int) -> tuple[float, list[Piece]]:
    """Pieces with their ranks, and what those of the process that has most cost."""
    loads = [0.0] * size
    ranks = [0] * len(pieces)
    costs = [_cost(piece.stop - piece.start, shapes[piece.layer][1]) for piece in pieces]
    for i in sorted(range(len(pieces)), key=lambda i: -costs[i]):  # of equals the first: sorting is stable
        ranks[i] = loads.index(min(loads))
        loads[ranks[i]] += costs[i]
    return max(loads), [replace(piece, rank=rank) for piece, rank in zip(pieces, ranks)]


def _cost(rows: int, inputs: int) -> float:
    return rows * inputs**2 + _FACTORISATIONS * inputs**3


def join(parts: Sequence[Part]) -> LayerRecord:
    """The record of a layer from those of its pieces, in the order of their rows."""
    if len(parts) == 1:
        return parts[0].record
    records = [part.record for part in parts]
    status = min((Status(record.status) for record in records), key=_GRAVITY.index)
    return replace(
        records[0],
        shape=[sum(record.shape[0] for record in records), records[0].shape[1]],
        kept=sum(record.kept for record in records),
        relative_error=error_ratio(math.fsum(part.lost for part in parts), math.fsum(part.dense for part in parts)),
        status=status.value,
        failed=status.failed,
        details=_details([record.details for record in records]),
        steps=max(record.steps for record in records),
        seconds=max(record.seconds for record in records),
        peak_bytes=max(record.peak_bytes for record in records),
        trace=_traces([record.trace for record in records]),
    )


def _details(all_details: Sequence[dict[str, float | str]]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for key in dict.fromkeys(key for details in all_details for key in details):
        values = [details[key] for details in all_details if key in details]
        numbers = [value for value in values if not isinstance(value, str)]
        texts = dict.fromkeys(value for value in values if isinstance(value, str))
        found[key] = "; ".join(texts) if texts else _JOINED.get(key, max)(numbers)
    return found


def _traces(traces: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Step by step; a part that was done earlier stands still."""
    found = {}
    for key in dict.fromkeys(key for trace in traces for key in trace):
        each = [trace[key] for trace in traces if trace.get(key)]
        length = max(map(len, each), default=0)
        padded = [numbers + numbers[-1:] * (length - len(numbers)) for numbers in each]
        found[key] = [_JOINED.get(key, max)(step) for step in zip(*padded)]
    return found
