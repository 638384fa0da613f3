"""Smaller models: each rule at 10, 20, 30 and 40 % fewer parameters, its perplexity on two texts, and its speed.

    python benchmarks/shrink.py --calibration FILE --text FILE --held-out FILE [--removed 0.1,0.2,0.3,0.4]
        [--rows "kl;greedy;neurons;search"] [--windows 32x1024] [--candidates 32] [--seeds 0] [-o shrink.jsonl]

One row after the other is added to the file, and rows that are there are not computed again. Sets of blocks that one
row has measured are not measured again for another: they are in ``FILE.memo``, with which a row that was killed goes
on, too. So the seconds of a row are those of what was new in it; what a rule costs alone, benchmarks/blocks.py says.
Each run prints the table of all. Rows of one size remove the fewest blocks, heads or neurons that leave at most this
share of the parameters. Text is 20 windows of 2,048 tokens, the held-out text 8. Prefill (512 tokens) and decode (64)
are ratios to the dense model, measured in turn in one process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rarefy.errors import InputError
from rarefy.models.atomic import replace_file
from rarefy.models.checkpoint import load_model
from rarefy.models.memory import peak_bytes
from rarefy.packing.bench import Variant, measure_speed, warm_up
from rarefy.runs.events import Silent
from rarefy.runs.shrink_model import make_smaller
from rarefy.runs.shrink_plan import make_shrink_plan
from rarefy.runs.shrink_recipe import ShrinkRecipe
from rarefy.structure.counts import REMOVABLE, Counts, find_space
from rarefy.structure.memo import Memo
from rows import Ground, Rows, parser

_BLOCKS = ("kl", "perplexity", "taylor", "greedy", "search", "policy-gradient")
#: What a row removes, and the settings of its recipe.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"blocks {rule}": ("blocks", {"by": rule}) for rule in _BLOCKS},
    **{f"blocks {rule}, not repaired": ("blocks", {"by": rule, "repair": False}) for rule in _BLOCKS},
    "neurons": ("neurons", {}),
    "neurons, not repaired": ("neurons", {"repair": False}),
    "neurons single": ("neurons", {"choose": "single"}),
    "neurons wanda": ("neurons", {"choose": "wanda"}),
    "neurons wanda, not repaired": ("neurons", {"choose": "wanda", "repair": False}),
    "heads": ("heads", {}),
    "heads, not repaired": ("heads", {"repair": False}),
    "search": ("search", {}),
    "search greedy": ("search", {"by": "greedy"}),
}
#: Rows that are computed unless --rows says others: the others take long, or are variants.
USUAL = [
    row
    for row in ROWS
    if not row.startswith("blocks policy-gradient") and row not in ("search greedy", "neurons wanda, not repaired")
]

_PREFILL, _DECODE = 512, 64


def settings_of(skeleton: PreTrainedModel, row: str, size: float, multiple: int) -> dict[str, Any] | None:
    """The settings of a row's recipe; None where one kind alone does not make the model so small."""
    what, more = ROWS[row]
    if what == "search":
        return {"search": True, "size": size, **more}
    try:
        space = find_space(skeleton, size, [what], multiple)  # type: ignore[list-item]
    except InputError:
        return None
    (counts,) = space.candidates
    return {**shares(counts, space.numbers), **more}


def shares(counts: Counts, numbers: Any) -> dict[str, float]:
    """Counts as a recipe says them: the number of blocks, shares of heads and neurons."""
    found = {kind: counts.of(kind) for kind in REMOVABLE if counts.of(kind)}
    return {kind: number if kind == "blocks" else number / numbers[kind] for kind, number in found.items()}


def ratios(dense: PreTrainedModel, small: PreTrainedModel, rounds: int) -> dict[str, float]:
    """Tokens a second of the smaller model over those of the dense one."""
    models = {"dense": dense, "small": small}
    for model in models.values():
        warm_up(model)
    variants = [Variant(name, model) for name, model in models.items()]
    before, after = measure_speed(variants, _PREFILL, _DECODE, rounds, lambda *_: None)
    return {"prefill": after.prefill / before.prefill, "decode": after.decode / before.decode}


class KeptMemo(Memo):
    """A memo in a file, which all rows on the same windows share."""

    def __init__(self, file: Path, key: str) -> None:
        self.file, self.key = file, key
        super().__init__(self._all().get(key, {}))

    def keep(self, found: Mapping[str, Any]) -> None:
        super().keep(found)
        replace_file(self.file, json.dumps(self._all() | {self.key: self}))

    def _all(self) -> dict[str, Any]:
        return dict(json.loads(self.file.read_text())) if self.file.exists() else {}


def measured(ground: Ground, recipe: dict[str, Any], memo: Memo) -> dict[str, Any]:
    """One row: the smaller model is made as ``rarefy shrink`` makes it, and evaluated."""
    plan = make_shrink_plan(ShrinkRecipe.read(recipe))
    assert plan.windows is not None
    model, _ = load_model(ground.source, torch.device("cpu"), "auto")
    began = time.perf_counter(), time.process_time()
    made = make_smaller(model, plan.windows, plan, Silent().watch, memo=memo)
    found = {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}
    if rounds := ground.said.rounds:
        found |= ratios(ground.dense, made.model, rounds)
    shrunk = made.facts
    errors = [(part["masked_error"], part["error"]) for part in shrunk["parts"]]
    means = [sum(column) / len(errors) for column in zip(*errors)] or [None, None]
    return {
        **found,
        "left": shrunk["after"]["parameters"] / shrunk["before"]["parameters"],
        "multiplications": shrunk["after"]["multiplications"] / shrunk["before"]["multiplications"],
        "what": made.removed,
        "removed": shrunk["blocks"]["removed"] if shrunk["blocks"] else [],
        "kl_of_blocks": shrunk["blocks"]["kl"] if shrunk["blocks"] else None,
        "kl_of_search": shrunk["search"]["best"]["kl"] if shrunk["search"] else None,
        "tried": shrunk["search"]["candidates"] if shrunk["search"] else [],
        "masked_error": means[0],
        "error": means[1],
        "peak_bytes": peak_bytes(torch.device("cpu")),
        **ground.perplexities(made.model),
    }


def print_table(lines: list[dict[str, Any]]) -> None:
    """All rows as Markdown, those of one size together, the best on the text first."""
    print("| removed | rule | what | text | held out | prefill | decode | left | CPU seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for line in sorted(lines, key=lambda line: (line["asked"], line["text"])):
        speed = [f"{line[key]:.2f}" if key in line else "" for key in ("prefill", "decode")]
        print(
            f"| {line['asked']:.0%} | {line['row']} | {line['what']} | {line['text']:.2f} | {line['held_out']:.2f} | "
            f"{' | '.join(speed)} | {line['left']:.1%} | {line['cpu_seconds']:.0f} |"
        )


def main() -> None:
    arguments = parser(__doc__, "shrink.jsonl")
    arguments.add_argument("--removed", default="0.1,0.2,0.3,0.4", help="shares of the parameters")
    arguments.add_argument("--rows", default=";".join(USUAL), help=f"some of {'; '.join(ROWS)}")
    arguments.add_argument("--multiple", type=int, default=64)
    arguments.add_argument("--candidates", type=int, default=32)
    arguments.add_argument("--steps", type=int, default=500)
    arguments.add_argument("--generations", type=int, default=32)
    arguments.add_argument("--seeds", default="0")
    arguments.add_argument("--rounds", type=int, default=3, help="of timing; 0 for none")
    said = arguments.parse_args()
    if unknown := set(said.rows.split(";")) - ROWS.keys():
        arguments.error(f"--rows names {min(unknown)!r}, which is none of {'; '.join(ROWS)}")
    ground = Ground.of(said)
    number, length = map(int, said.windows.split("x"))
    common = {"num_samples": number, "sequence_length": length}
    common |= {name: getattr(said, name) for name in ("model", "calibration", "multiple", "candidates", "steps")}
    common |= {"generations": said.generations}
    rows = Rows(said.output, {**common, "eval_dtype": said.eval_dtype})
    if not rows.all(row="dense"):
        model, _ = load_model(ground.source, torch.device("cpu"), "auto")
        empty = {"what": "", "left": 1.0, "cpu_seconds": 0.0}
        rows.add(row="dense", asked=0.0, seed=0, **ground.perplexities(model), **empty)
    for seed in map(int, said.seeds.split(",")):
        for removed in map(float, said.removed.split(",")):
            for row in said.rows.split(";"):
                cell = {"row": row, "asked": removed, "seed": seed}
                if rows.all(**cell):
                    continue
                settings = settings_of(ground.source.skeleton(), row, 1 - removed, said.multiple)
                if settings is None:
                    print(f"{row}: no model of {1 - removed:.0%} of the parameters")
                    continue
                memo = KeptMemo(
                    said.output.with_name(said.output.name + ".memo"), f"{said.windows}, copies, seed {seed}"
                )
                line = measured(ground, {**common, **settings, "seed": seed}, memo)
                rows.add(**cell, **line)
                print(f"{row}, {removed:.0%}: {line['text']:.2f}, {line['held_out']:.2f}", flush=True)
    print_table(rows.all())


if __name__ == "__main__":
    main()
