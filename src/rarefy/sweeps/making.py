"""Makes the model of one cell from the dense one in memory: pruned, pruned and tuned, or smaller; and its cost."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rarefy.models.memory import give_back, peak_bytes, reset_peak
from rarefy.pruning.loop import prune_model
from rarefy.pruning.records import LayerRecord, Report
from rarefy.runs.events import Watch
from rarefy.runs.shrink_model import Smaller, make_smaller
from rarefy.runs.tune_in_memory import tune_in_memory
from rarefy.structure.memo import Memo
from rarefy.sweeps.plan import Cell
from rarefy.sweeps.shrinking import ShrinkCell
from rarefy.sweeps.tuning import DenseRecords

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Made:
    """The model of a cell, the records of its layers, what run.json says of it, and the seconds of its stages."""

    model: PreTrainedModel
    facts: dict[str, Any]
    layers: Sequence[LayerRecord] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time within as stage ``name``."""
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)


@dataclass
class Making:
    """What the cells of one seed are made from: the model, which is dense before each, windows, what is shared.

    ``memo`` is of models that become smaller, ``records`` are of the dense model, for cells that are tuned.
    """

    model: PreTrainedModel
    windows: Tensor
    memo: Memo
    records: DenseRecords
    watch: Watch

    def of(self, cell: Cell | ShrinkCell, label: str) -> Made:
        """Make one cell; the model may be changed. ``peak_bytes`` among its facts is the most memory meanwhile."""
        give_back()
        reset_peak(self.model.device)
        made = self._smaller(cell, label) if isinstance(cell, ShrinkCell) else self._pruned(cell, label)
        made.facts["peak_bytes"] = peak_bytes(self.model.device)
        return made

    def _smaller(self, cell: ShrinkCell, label: str) -> Made:
        made = Made(self.model, {})
        with made.stage("shrink"):
            smaller = make_smaller(
                self.model, self.windows, cell.plan, lambda what, *_: self.watch(f"{label}: {what}"), memo=self.memo
            )
        made.model, made.facts = smaller.model, _shrunk_facts(smaller)
        return made

    def _pruned(self, cell: Cell, label: str) -> Made:
        made, tune = Made(self.model, {}), cell.tune
        dense = self.records.of(self.model, tune) if tune else None
        with made.stage("prune"), self.watch(f"{label}: pruning", cell.linears) as progress:
            report = prune_model(self.model, self.windows, cell.settings(), progress, progress.layer)
        made.facts, made.layers = _pruned_facts(report), report.layers
        if tune and dense:
            made.seconds["record"] = round(dense.seconds, 3)
            with made.stage("tune"):
                tuned = tune_in_memory(self.model, dense, tune, self.watch, f"{label}: tuning")
            made.model = tuned.model
            made.facts["tuning"] = dict(tuned.facts)
        return made


def _shrunk_facts(smaller: Smaller) -> dict[str, Any]:
    before, after = (smaller.facts[key]["parameters"] for key in ("before", "after"))
    return {"shrink": dict(smaller.facts), "sparsity": 1 - after / before, "status": "done"}


def _pruned_facts(report: Report) -> dict[str, Any]:
    failed = [layer.name for layer in report.failed]
    error = report.relative_error
    return {
        "layers": len(report.layers),
        "failed": failed,
        "size": report.size,
        "pruned": report.pruned,
        "sparsity": report.sparsity,
        "relative_error": error if math.isfinite(error) else None,
        "status": "done",
        "reason": f"{report.failed[0].status}: {', '.join(failed)}" if failed else "",
    }
