"""What each part that looks beyond the layer gains: perplexity of two texts, seconds of the CPU and peak memory.

    python benchmarks/parts.py --calibration FILE --text FILE --held-out FILE [--patterns 0.6,0.7,2:4]
        [--rows "layers;matching + drift"] [--blocks 8] [--seeds 0] [--windows 32x1024] [--eval-dtype float32]
        [-o parts.jsonl]

One row after the other is added to the file, and rows that are there are not computed again; each run prints the
table of all. Text is 20 windows of 2,048 tokens, the held-out text 8. ``--blocks`` prunes the first blocks only.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor

import rarefy
from rarefy.layer.pattern import Pattern
from rarefy.models.memory import peak_bytes
from rows import Ground, Rows, parser

_RULES = ("profile", "fisher", "owl", "alphapruning", "lsa", "search")
#: What a row may have beside the layer problem, as options of rarefy.prune.
PARTS: dict[str, dict[str, Any]] = {
    "drift": {"drift": 0.25},
    "refresh": {"refresh": True},
    **{rule: {"allocation": rule} for rule in _RULES},
    **{f"{rule} row weights": {"row_weights": rule} for rule in ("mlp", "fisher")},
    "rotate": {"rotate": True},
    "permute": {"permute": True},
    "matching": {"matching": rarefy.Matching(), "batch_size": 1},
    "matching by four": {"matching": rarefy.Matching(batch_size=4)},
}
_FISHER = "fisher + fisher row weights"
ROWS = ("layers", *PARTS, _FISHER, f"matching + {_FISHER}", f"matching + drift + rotate + permute + {_FISHER}")


def pattern_of(text: str) -> Pattern:
    """0.6 or 2:4."""
    return rarefy.NM(*map(int, text.split(":"))) if ":" in text else rarefy.Unstructured(float(text))


def parts_of(row: str) -> list[str]:
    """The names of a row's parts; none for the layers alone."""
    return [] if row == "layers" else row.split(" + ")


def measured(ground: Ground, windows: Tensor, row: str, pattern: str) -> dict[str, Any]:
    """One row: prune a copy of the dense model, and evaluate it."""
    model, wanted = copy.deepcopy(ground.dense), pattern_of(pattern)
    options = {key: value for part in parts_of(row) for key, value in PARTS[part].items()}
    if isinstance(wanted, rarefy.NM):
        options.pop("row_weights", None)  # every row has the same count
        if wanted.of < 8:
            options.pop("allocation", None)  # too few steps
    else:
        options.pop("permute", None)  # an order is found for groups only
    include = [f"*.layers.{block}.*" for block in range(ground.said.blocks)]
    began = time.perf_counter(), time.process_time()
    rarefy.prune(model, windows, pattern=wanted, method=rarefy.ALPS(), include=include, **options)
    facts = {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}
    facts["peak_bytes"] = peak_bytes(torch.device("cpu"))
    return {**facts, **ground.perplexities(model)}


def print_table(lines: list[dict[str, Any]]) -> None:
    """Means over seeds, as Markdown."""
    print("| pattern | parts | seeds | text | held out | CPU seconds | peak GB |\n|---|---|---|---|---|---|---|")
    for pattern, row in dict.fromkeys((line["pattern"], line["row"]) for line in lines):
        same = [line for line in lines if (line["pattern"], line["row"]) == (pattern, row)]
        text, held_out, seconds = (
            sum(line[key] for line in same) / len(same) for key in ("text", "held_out", "cpu_seconds")
        )
        peak = max(line["peak_bytes"] for line in same) / 1e9
        print(f"| {pattern} | {row} | {len(same)} | {text:.2f} | {held_out:.2f} | {seconds:.0f} | {peak:.1f} |")


def main() -> None:
    arguments = parser(__doc__, "parts.jsonl")
    arguments.add_argument("--patterns", default="0.6,0.7,2:4")
    arguments.add_argument("--rows", default=";".join(ROWS), help="rows with ; between them, parts with +")
    arguments.add_argument("--blocks", type=int, default=0)
    arguments.add_argument("--seeds", default="0")
    said = arguments.parse_args()
    for row in said.rows.split(";"):
        if unknown := set(parts_of(row)) - PARTS.keys():
            arguments.error(f"--rows names {min(unknown)!r}, which is none of layers, {', '.join(PARTS)}")
    ground = Ground.of(said)
    rows = Rows(said.output, {name: getattr(said, name) for name in ("blocks", "windows", "eval_dtype", "model")})
    for seed in map(int, said.seeds.split(",")):
        windows = ground.windows(seed)
        for pattern in said.patterns.split(","):
            for row in said.rows.split(";"):
                cell = {"pattern": pattern, "row": row, "seed": seed}
                if not rows.all(**cell):
                    rows.add(**cell, **measured(ground, windows, row, pattern))
    print_table(rows.all())


if __name__ == "__main__":
    main()
