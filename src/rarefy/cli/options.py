"""Options that several commands take, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="[LABEL=]TEXT",
        help="A text to measure perplexity on: a file as it stands, wikitext2, python-docs (its held-out third; the "
        "default) or hub:NAME\\[:CONFIG\\[:SPLIT]]; repeatable.",
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
    int | None, typer.Option(metavar="N", min=1, help="Only the first N items of each task (default: all).")
]


def split(text: str | None) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",")] if text else []
