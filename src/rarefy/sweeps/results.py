"""The results of a sweep as rows, as a summary over seeds, and as CSV.

A cell is one method with one pattern and one seed; its facts are what its ``run.json`` holds.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.pruning.records import three_digits

Facts = Mapping[str, Any]
Value = str | float | int | None

#: Columns that say which cell a row is, and that say how it ended; measurements stand between them.
KEYS = ("method", "pattern", "sparsity", "seed")
ENDING = ("relative_error", "measured_sparsity", "seconds", "tuning_seconds", "peak_bytes", "status", "reason")


@dataclass(frozen=True)
class LeftOut:
    """A cell that there is none of, by the name of its row and what its column says, and the sentence why.

    ``system`` is the definition of the row.
    """

    name: str
    asked: str
    reason: str
    system: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Summary:
    """One method with one pattern: ``mean`` and ``deviation`` of every measurement over the seeds that ended well.

    ``deviation`` is the sample standard deviation, absent where there is one seed. ``failed`` counts the others.
    ``in_groups`` says that the pattern is N:M; ``asked`` is the column of tables that it belongs to.
    """

    method: str
    pattern: str
    sparsity: float
    seeds: int
    failed: int
    mean: Mapping[str, float]
    deviation: Mapping[str, float]
    in_groups: bool = False
    asked: str = ""


def row(facts: Facts) -> dict[str, Value]:
    """One row of ``results.csv``; empty where something was not measured."""
    measured, seconds = measurements(facts), facts.get("seconds", {})
    return {
        **{key: facts.get(key) for key in ("method", "pattern")},
        "sparsity": facts["asked_sparsity"],
        "seed": facts.get("seed"),
        **measured,
        "relative_error": facts.get("relative_error"),
        "measured_sparsity": facts.get("sparsity"),
        "seconds": seconds.get("shrink" if facts.get("shrink") else "prune"),
        "tuning_seconds": seconds["record"] + seconds["tune"] if "tune" in seconds else None,
        "peak_bytes": facts.get("peak_bytes"),
        "status": facts["status"],
        "reason": facts.get("reason", ""),
    }


def measurements(facts: Facts) -> dict[str, float | None]:
    """Perplexity, divergence and task scores of a cell, or of the dense model, by column name."""
    found: dict[str, float | None] = {}
    for one in facts.get("perplexity", []):
        found[f"perplexity_{one['label']}"] = one["value"]
    for one in facts.get("divergence", []):
        found[f"kl_{one['label']}"] = one["kl"]
        found[f"agreement_{one['label']}"] = one["agreement"]
    for task, result in facts.get("tasks", {}).items():
        for metric, value in result["metrics"].items():
            found[f"{task}_{metric}"] = value["value"]
            found[f"{task}_{metric}_stderr"] = value["stderr"]
    return found


def to_csv(cells: Sequence[Facts]) -> str:
    """One row per cell and seed."""
    rows = [row(facts) for facts in cells]
    columns = list(dict.fromkeys(key for one in rows for key in one if key not in (*KEYS, *ENDING)))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*KEYS, *columns, *ENDING], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summarise(cells: Sequence[Facts]) -> list[Summary]:
    """One summary per method and pattern, in the order in which they come."""
    groups: dict[tuple[str, str], list[Facts]] = {}
    for facts in cells:
        groups.setdefault((facts["method"], facts["pattern"]), []).append(facts)
    found = []
    for (method, pattern), group in groups.items():
        good = [row(facts) for facts in group if facts["status"] != "failed"]
        mean: dict[str, float] = {}
        deviation: dict[str, float] = {}
        for key in dict.fromkeys(key for one in good for key in one if key not in KEYS):
            values = [one.get(key) for one in good]
            numbers = [float(value) for value in values if isinstance(value, (int, float))]
            if numbers and len(numbers) == len(good):
                mean[key] = statistics.fmean(numbers)
                if len(numbers) > 1:
                    deviation[key] = statistics.stdev(numbers)
        sparsity = float(group[0]["asked_sparsity"])
        in_groups = group[0].get("pattern_spec", {}).get("kind") == "n:m"
        failed = len(group) - len(good)
        asked = group[0].get("asked") or (pattern if in_groups or group[0].get("shrink") else f"{100 * sparsity:g}%")
        found.append(Summary(method, pattern, sparsity, len(good), failed, mean, deviation, in_groups, asked))
    return found


def table(cells: Sequence[Facts], dense: Facts | None) -> list[list[str]]:
    """Heading, the dense model, one row per method and pattern: mean and standard deviation over seeds."""
    summaries = summarise(cells)
    everything = [measurements(dense)] if dense else []
    everything += [dict(one.mean) for one in summaries]
    columns = list(dict.fromkeys(key for one in everything for key in one if _shown(key)))
    columns.sort(key=lambda key: [i for i, start in enumerate(_ORDER) if key.startswith(start)][:1] or [len(_ORDER)])
    ends = [key for key in _COST if key in _ALWAYS or any(key in one.mean for one in summaries)]
    heading = ["method", "pattern", *(heading_of(key) for key in (*columns, *ends))]
    rows = [heading]
    if dense:
        values = measurements(dense)
        rows.append(["dense", "", *(number_words(key, values.get(key)) for key in columns), *[""] * len(ends)])
    for one in summaries:
        failed = f" ({one.failed} failed)" if one.failed and one.seeds else ""
        cellwise = [spread(key, one) for key in columns]
        if not one.seeds:
            cellwise, failed = ["failed"] * len(columns), ""
        rows.append([one.method, one.pattern + failed, *cellwise, *(spread(key, one) for key in ends)])
    return rows


def heading_of(key: str) -> str:
    """A column's name as people read it."""
    if key in _COST:
        return _COST[key]
    for start, words in (("perplexity_", "perplexity "), ("kl_", "KL "), ("agreement_", "same top-1 ")):
        if key.startswith(start):
            return words + key.removeprefix(start)
    return key.removesuffix("_acc") + (" accuracy" if key.endswith("_acc") else "")


_ORDER = ("perplexity_", "kl_", "agreement_")
#: Columns behind the measurements, and their headings; some are there only where something was measured.
_COST = {
    "relative_error": "relative error",
    "measured_sparsity": "sparsity",
    "seconds": "seconds",
    "tuning_seconds": "seconds of tuning",
    "peak_bytes": "peak GB",
}
_ALWAYS = ("relative_error", "measured_sparsity", "seconds")


def _shown(key: str) -> bool:
    return key.startswith(_ORDER) or key.endswith("_acc")


def spread(key: str, summary: Summary) -> str:
    """The mean of a measurement with its deviation over seeds; empty where there is none."""
    if key not in summary.mean:
        return ""
    text = number_words(key, summary.mean[key])
    if key in summary.deviation and (key not in _COST or key == "relative_error"):
        text += f" ± {_deviation(summary.deviation[key], text)}"
    return text


def _deviation(value: float, mean: str) -> str:
    """A deviation with as many decimals as its mean, or with one digit where these would all be 0."""
    if mean.endswith("%"):
        return f"{value:.1%}"
    if "e" in mean:
        return three_digits(value)
    decimals = len(mean.partition(".")[2])
    return f"{value:,.{decimals}f}" if value == 0 or value >= 0.5 * 10**-decimals else f"{value:.1g}"


def number_words(key: str, value: Value) -> str:
    """A measurement as tables have it; empty where there is none, or where it is not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if key == "measured_sparsity":
        return f"{value:.2%}"
    if key.startswith("agreement_") or key.endswith("_acc"):
        return f"{value:.1%}"
    if key.startswith("perplexity_"):
        return perplexity_words(float(value))
    if key in ("seconds", "tuning_seconds"):
        return f"{value:,.1f}"
    if key == "peak_bytes":
        return f"{float(value) / 1e9:,.1f}"
    return three_digits(float(value))


def perplexity_words(value: float) -> str:
    """A perplexity with two decimals, or none where it is so large that they say nothing."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"
