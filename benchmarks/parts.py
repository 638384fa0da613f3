"""What each part that looks beyond the layer gains: perplexity of two texts, seconds of the CPU and peak memory.

    python benchmarks/parts.py --calibration FILE --text FILE --held-out FILE [--patterns 0.6,0.7,2:4]
        [--rows "layers;matching, drift"] [--blocks 8] [--seeds 0] [--windows 32x1024] [--eval-dtype float32]
        [-o parts.jsonl]

One row after the other is added to the file, and rows that are there are not computed again; each run prints the
table of all. Text is 20 windows of 2,048 tokens, the held-out text 8. ``--blocks`` prunes the first blocks only.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rarefy
from rarefy.calibration.sources import parse_source
from rarefy.calibration.windows import DRAW_FROM, draw_windows, token_stream
from rarefy.cli import keep_freed_memory
from rarefy.evaluation.perplexity import perplexity
from rarefy.layer.pattern import Pattern
from rarefy.models.checkpoint import load_model, load_tokenizer, resolve_model
from rarefy.models.memory import peak_bytes

_MATCH = rarefy.Matching()
ROWS: dict[str, dict[str, Any]] = {
    "layers": {},
    "drift": {"drift": 0.25},
    "refresh": {"refresh": True},
    **{rule: {"allocation": rule} for rule in ("profile", "owl", "alphapruning", "lsa", "search")},
    **{f"row weights, {rule}": {"row_weights": rule} for rule in ("mlp", "fisher")},
    "profile, row weights, fisher": {"allocation": "profile", "row_weights": "fisher"},
    "rotate": {"rotate": True},
    "permute": {"permute": True},
    "rotate, permute": {"rotate": True, "permute": True},
    "matching": {"matching": _MATCH},
    "matching, drift": {"matching": _MATCH, "drift": 0.25},
    "matching, refresh": {"matching": _MATCH, "refresh": True},
    "matching, profile": {"matching": _MATCH, "allocation": "profile"},
    "matching, row weights, fisher": {"matching": _MATCH, "row_weights": "fisher"},
    "matching, drift, profile": {"matching": _MATCH, "drift": 0.25, "allocation": "profile"},
    "matching, drift, rotate": {"matching": _MATCH, "drift": 0.25, "rotate": True},
    "matching, drift, rotate, profile": {"matching": _MATCH, "drift": 0.25, "rotate": True, "allocation": "profile"},
    "matching, drift, rotate, lsa": {"matching": _MATCH, "drift": 0.25, "rotate": True, "allocation": "lsa"},
}


def pattern_of(text: str) -> Pattern:
    """0.6 or 2:4."""
    return rarefy.NM(*map(int, text.split(":"))) if ":" in text else rarefy.Unstructured(float(text))


def measured(dense: Any, windows: Tensor, texts: list[tuple[Tensor, int]], said: argparse.Namespace, row: str,
             pattern: str) -> dict[str, Any]:  # fmt: skip
    """One row: prune a copy of the dense model, and evaluate it."""
    model, options = copy.deepcopy(dense), dict(ROWS[row])
    if ":" in pattern:
        options.pop("allocation", None)  # 2:4 has no steps
        options.pop("row_weights", None)  # and every row the same count
    else:
        options.pop("permute", None)  # an order is found for groups only
    include = [f"*.layers.{block}.*" for block in range(said.blocks)] if said.blocks else []
    began = time.perf_counter(), time.process_time()
    rarefy.prune(model, windows, pattern=pattern_of(pattern), method=rarefy.ALPS(), include=include, **options)
    facts = {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}
    facts["peak_bytes"] = peak_bytes(torch.device("cpu"))
    model.to(getattr(torch, said.eval_dtype))
    found = [perplexity(model, tokens, max_windows=number).perplexity for tokens, number in texts]
    return {**facts, "text": found[0], "held_out": found[1]}


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
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--calibration", required=True)
    arguments.add_argument("--text", required=True)
    arguments.add_argument("--held-out", required=True)
    arguments.add_argument("--patterns", default="0.6,0.7,2:4")
    arguments.add_argument("--rows", default=";".join(ROWS), help="separated by semicolons")
    arguments.add_argument("--blocks", type=int, default=0)
    arguments.add_argument("--seeds", default="0")
    arguments.add_argument("--windows", default="32x1024")
    arguments.add_argument("--eval-dtype", default="float32")
    arguments.add_argument("-o", "--output", type=Path, default=Path("parts.jsonl"))
    said = arguments.parse_args()
    keep_freed_memory()
    source = resolve_model(said.model)
    dense, _ = load_model(source, torch.device("cpu"), "auto")
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    number, length = map(int, said.windows.split("x"))
    tokens = token_stream(parse_source(said.calibration), tokenizer, enough=DRAW_FROM * number * length)
    texts = [
        (token_stream(parse_source(name), tokenizer), most) for name, most in ((said.text, 20), (said.held_out, 8))
    ]
    key = {"blocks": said.blocks, "windows": said.windows, "eval_dtype": said.eval_dtype, "model": said.model}

    def done() -> list[dict[str, Any]]:
        lines = said.output.read_text().splitlines() if said.output.exists() else []
        return [line for line in map(json.loads, lines) if all(line[name] == value for name, value in key.items())]

    for seed in map(int, said.seeds.split(",")):
        windows = draw_windows(tokens, number, length, seed)
        for pattern in said.patterns.split(","):
            for row in said.rows.split(";"):
                cell = {"pattern": pattern, "row": row, "seed": seed}
                if any(all(line[name] == value for name, value in cell.items()) for line in done()):
                    continue
                line = {**key, **cell, **measured(dense, windows, texts, said, row, pattern)}
                with said.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print_table(done())


if __name__ == "__main__":
    main()
