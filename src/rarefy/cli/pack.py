"""``rarefy pack`` and ``rarefy unpack``: a checkpoint without its zeros, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rarefy.cli.options import Json, Quiet
from rarefy.cli.terminal import Terminal

if TYPE_CHECKING:
    from rarefy.packing.summary import Summary

Output = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="New or empty folder.")]


def pack(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A folder that `prune` wrote, or a model with zeros.")
    ],
    output: Output,
    values: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Kept weights: auto (default: as they are), bf16, or the nearest codes: int8, int4.",
        ),
    ] = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint that holds only what is not zero: smaller on disk and in memory, and faster on CPUs.

    transformers reads it after `import rarefy`. Layers with fewer than 30 % zeros stay dense. `rarefy unpack` gives
    the ordinary folder back.
    """
    from rarefy.packing import kernel
    from rarefy.runs.packed import pack_model

    with Terminal(quiet) as terminal:
        terminal.begin()
        with terminal.watch("packing") as watch:
            summary = pack_model(model, output, values, watch)
        if summary.rounded:
            terminal.note(f"values are rounded to the nearest {values} code; nothing makes up for what that costs")
        elif values in ("int8", "int4"):
            terminal.note(f"values were {values} codes already, so nothing is lost")
        if kernel.library() is None:
            terminal.note(kernel.describe())
    facts = summary.facts()
    print(json.dumps({"output": str(output), **facts}) if as_json else _words(output, summary))


def unpack(
    packed: Annotated[str, typer.Argument(metavar="PACKED", help="A folder that `rarefy pack` wrote.")],
    output: Output,
    quiet: Quiet = False,
) -> None:
    """Write the ordinary folder of a packed checkpoint again: the same weights bit for bit, unless they are codes."""
    from rarefy.runs.packed import unpack_model

    with Terminal(quiet) as terminal:
        terminal.begin()
        with terminal.watch("unpacking") as watch:
            unpack_model(packed, output, watch)
    print(f"{output} holds the ordinary model")


def _words(output: Path, summary: Summary) -> str:
    facts = summary.facts()
    zeros = 1 - facts["kept"] / facts["size"]
    lines = [f"{output} holds {facts['packed_layers']} of {facts['layers']} weights packed, {zeros:.1%} of them zero"]
    for what, dense, packed in (
        ("packed weights", facts["dense_bytes"], facts["packed_bytes"]),
        ("all weights", facts["all_dense_bytes"], facts["all_packed_bytes"]),
    ):
        lines.append(f"{what}: {packed / 1e6:,.1f} MB instead of {dense / 1e6:,.1f} ({packed / dense:.3f})")
    return "\n".join(lines)
