"""Options that several commands take, with their help."""

from __future__ import annotations

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
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Only linears whose full name matches; repeatable."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="No linears whose full name matches; repeatable.")
]
