"""Puts the record of a layer together from those of its parts, which different processes have solved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rarefy.layer.problem import error_ratio
from rarefy.layer.solution import Status
from rarefy.pruning.records import LayerRecord

#: Statuses from the one that says most to the one that says least about a layer of which a part has it.
_GRAVITY = (
    *(Status.NOT_FACTORED, Status.NOT_FINITE, Status.PART_FAILED, Status.DAMPED),
    *(Status.STEP_LIMIT, Status.CONVERGED, Status.SOLVED, Status.TRIVIAL),
)
#: How numbers of the details and traces of parts become the layer's; of others the largest does.
_JOINED: dict[str, Callable[[Sequence[float]], float]] = {
    "swaps": math.fsum,
    "support change": math.fsum,
    "overflowed": math.fsum,
    "residual": lambda norms: math.sqrt(math.fsum(norm * norm for norm in norms)),
}


@dataclass(frozen=True)
class Energies:
    """Output energy of some rows: tr(D H D^T), and with H brought to unit diagonal (LayerProblem.balanced_error)."""

    plain: float
    balanced: float


@dataclass(frozen=True)
class Part:
    """The record of a piece, the output energy that was lost in its rows, and theirs in the dense layer."""

    record: LayerRecord
    lost: Energies
    dense: Energies


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
        relative_error=error_ratio(
            math.fsum(part.lost.plain for part in parts), math.fsum(part.dense.plain for part in parts)
        ),
        balanced_error=error_ratio(
            math.fsum(part.lost.balanced for part in parts), math.fsum(part.dense.balanced for part in parts)
        ),
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
