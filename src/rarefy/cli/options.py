"""Options that several commands take, with their help."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from rarefy.errors import InputError

Text = str | None
Device = Annotated[
    Text, typer.Option(metavar="DEVICE", help="auto (default: a GPU if there is one), cpu, cuda, cuda:N.")
]
Dtype = Annotated[
    Text,
    typer.Option(metavar="DTYPE", help="auto (default: the checkpoint's), float32, bfloat16 or float16."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Neither notes nor progress; results, warnings and errors remain.")
]
Log = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Append every note, warning and pruned layer to this file, with times; its folder must exist.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Only linears whose full name matches; repeatable."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="No linears whose full name matches; repeatable.")
]
OffloadDir = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Keep hidden states in a file of this folder instead of in memory."),
]
Bos = Annotated[bool | None, typer.Option("--bos/--no-bos", help="Start every window with the model's start token.")]
RecipeFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="YAML with any of these settings; options replace its keys.")
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="[LABEL=]TEXT",
        help="A text to measure perplexity on: a file, as --calibration of `rarefy prune` takes them, wikitext2, "
        "python-docs (its held-out third; the default) or hub:NAME\\[:CONFIG\\[:SPLIT]]; repeatable.",
    ),
]
TaskNames = Annotated[
    Text,
    typer.Option(
        metavar="A,B",
        help="Zero-shot tasks, by commas: arc_easy, arc_challenge, piqa, lambada, hellaswag, winogrande, boolq, "
        "openbookqa, mmlu, or any other of lm-eval (pip install 'rarefy\\[tasks]').",
    ),
]
TaskData = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Local files of the tasks, so that nothing is fetched from the hub."),
]
Limit = Annotated[
    Text,
    typer.Option(
        metavar="N", help="Only the first N items of each task, or this fraction of them, as 0.1 (default: all)."
    ),
]
TextColumn = Annotated[
    Text,
    typer.Option(
        metavar="NAME",
        help="The column, of a file of rows or a data set, with text or messages (default: text, messages, ...).",
    ),
]

# What the loop over blocks does beside the method, of `prune` and of every cell of `compare`.
Along = Annotated[
    Text,
    typer.Option(
        metavar="WHAT",
        help="What N:M groups are of: inputs, or neurons, which are outputs of the layers that make the neurons "
        "of an MLP; no sparse kernel takes these (default: inputs).",
    ),
]
BarberScore = Annotated[
    Text,
    typer.Option(
        metavar="SCORE",
        help="Swap revived and pruned weights of each block by the error of its attention and its MLP: published "
        "or signed (default: none).",
    ),
]
BarberShare = Annotated[
    Text, typer.Option(metavar="S", help="Share of the crossing pairs that --barber swaps (default: 0.01).")
]
BarberRefit = Annotated[
    bool | None,
    typer.Option(
        "--barber-refit/--no-barber-refit",
        help="Refit what is kept behind --barber, or keep its dense values, as published (default: refit).",
    ),
]
Match = Annotated[
    Text,
    typer.Option(
        metavar="PASSES",
        help="Train what is kept of each block to match the dense model: passes over the windows (default: 0).",
    ),
]
MatchLr = Annotated[
    Text, typer.Option(metavar="RATE", help="Learning rate of --match, falling linearly (default: 2e-4).")
]
MatchBatch = Annotated[Text, typer.Option(metavar="N", help="Windows per step of --match (default: 1).")]
Drift = Annotated[
    Text,
    typer.Option(
        metavar="A", help="Share of the drift from the dense path that layers correct, such as 0.25 (default: 0)."
    ),
]
Refresh = Annotated[
    bool | None,
    typer.Option("--refresh/--no-refresh", help="Let later layers of a block see what was pruned before them."),
]
Permute = Annotated[
    bool | None,
    typer.Option("--permute/--no-permute", help="Order MLP neurons and the insides of heads for N:M, at no cost."),
]
Rotate = Annotated[
    bool | None,
    typer.Option("--rotate/--no-rotate", help="Rotate the insides of heads so that less is pruned, at no cost."),
]
RowWeights = Annotated[
    Text,
    typer.Option(
        metavar="RULE",
        help="Which outputs count more where rows compete for weights (--scope layer): none, mlp (those that "
        "make large neurons), or fisher (those that the loss depends on). Default of `rarefy prune` with alps: "
        "fisher, else none.",
    ),
]
Allocation = Annotated[
    Text,
    typer.Option(
        metavar="RULE",
        help="Sparsity of each layer at the same total: uniform, profile, fisher, owl, alphapruning, lsa, search, or "
        "a .json or .csv file of globs and sparsities. Default of `rarefy prune` with alps and --scope layer: "
        "fisher, else uniform.",
    ),
]


def parse_limit(text: str | None) -> int | float | None:
    """``--limit`` as lm-eval has it: a number of items, or a fraction of each task's. Raises InputError."""
    if text is None:
        return None
    with suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    with suppress(ValueError):
        if 0 < (fraction := float(text)) < 1:
            return fraction
    raise InputError("--limit", text, "a whole number of at least 1 (items), or a fraction between 0 and 1")


def split(text: str | None) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",")] if text else []
