"""The section of the report about smaller models: sizes, which blocks went, what the repair gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.pruning.records import three_digits
from rarefy.report.plots import drift_curves, removed_blocks, repair_curves
from rarefy.report.views import Part, RunView

_ROWS = (
    ("blocks", "blocks"),
    ("parameters", "parameters"),
    ("bytes", "bytes of weights"),
    ("multiplications", "multiplications of weights for a token"),
)
_MEASURES = {"perplexity": "loss without it, nats", "taylor": "Taylor score"}


def shrinking(runs: Sequence[RunView]) -> list[Part]:
    """What was removed of each model that `rarefy shrink` made smaller, with a picture of it."""
    parts = []
    for view in runs:
        facts = view.facts.get("shrink")
        if not isinstance(facts, Mapping):
            continue
        before, after = facts["before"], facts["after"]
        rows = [["", "before", "after", "left"]]
        rows += [
            [name, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / max(1, before[key]):.1%}"]
            for key, name in _ROWS
        ]
        parts.append(Part(heading=view.label, text=_text(facts), rows=rows, pictures=_pictures(facts, view.label)))
        if facts.get("search"):
            parts.append(_search(facts["search"], view.label))
    return parts


def _search(search: Mapping[str, Any], label: str) -> Part:
    """The candidates of a search that were made on all windows, the best first."""
    last = max(one["round"] for one in search["candidates"])
    final = [one for one in search["candidates"] if one["round"] == last and one["kl"] is not None]
    rows = [["blocks removed", "KV heads of each block", "MLP neurons of each block", "KL, nats"]]
    rows += [
        [*(f"{one[key]:,}" for key in ("blocks", "heads", "neurons")), three_digits(one["kl"])]
        for one in sorted(final, key=lambda one: float(one["kl"]))
    ]
    text = (
        f"{len(search['candidates'])} models of at most {search['size']:.1%} of the parameters were made, these of "
        "them with all windows."
    )
    return Part(heading=f"search of {label}", text=text, rows=rows)


def _text(facts: Mapping[str, Any]) -> str:
    """The blocks that went, and the distance from the dense model without them."""
    blocks = facts["blocks"]
    if not blocks:
        return ""
    gone = ", ".join(map(str, blocks["removed"]))
    return f"Removed blocks: {gone} (rule: {blocks['by']}), {three_digits(blocks['kl'])} nats from the dense model."


def _pictures(facts: Mapping[str, Any], label: str) -> list[Any]:
    pictures = []
    blocks = facts["blocks"]
    if blocks and blocks["scores"]:
        scores = {int(index): score for index, score in blocks["scores"].items()}
        measure = _MEASURES.get(blocks["by"], "KL without it, nats")
        pictures.append(removed_blocks(scores, blocks["removed"], f"blocks of {label}", measure))
    if facts["parts"]:
        pictures.append(repair_curves(facts["parts"], f"heads and neurons of {label}"))
    if facts.get("dense_path"):
        pictures.append(drift_curves(facts["dense_path"], f"distance from the dense model of {label}"))
    return pictures
