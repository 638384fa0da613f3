"""The section of the report about tunings: the distance from the dense model, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.pruning.records import three_digits
from rarefy.report.plots import learning_curve
from rarefy.report.views import Part, RunView


def tuning(runs: Sequence[RunView]) -> list[Part]:
    """The section about tunings: what was trained, the held-out windows before and after, and the curve."""
    parts = []
    for view in runs:
        facts = view.facts.get("tuning")
        if not isinstance(facts, Mapping):
            continue
        text = (
            f"{facts['parametrisation']}: {facts['trained']:,} numbers were trained in {facts['steps']:,} steps "
            f"against {facts['against']}; every mask is what it was."
        )
        curve, measured = facts["curve"], facts["measurements"]
        pictures = [learning_curve(curve, measured, f"tuning, {view.label}")] if curve else []
        parts.append(Part(heading=view.label, text=text, rows=_rows(facts), pictures=pictures))
    return parts


def _rows(facts: Mapping[str, Any]) -> list[list[str]]:
    """The held-out windows before the first step, in the best state, and with the weights as written."""
    measured, written = facts["measurements"], facts["written"]
    best = next((one for one in measured if one["step"] == facts["best_step"]), None)
    if best is None or written is None:
        return []
    rows = [["held-out windows", "step", "KL, nats", "perplexity"]]
    for name, one in (("before", measured[0]), ("best", best), ("as written", written)):
        perplexity = math.exp(min(one["text_loss"], 700.0))
        rows.append([name, f"{one['step']:,}", three_digits(one["kl"]), f"{perplexity:,.2f}"])
    return rows
