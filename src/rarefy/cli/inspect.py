"""``rarefy inspect``: reads the written files again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from rarefy.cli.options import Json, Text
from rarefy.cli.terminal import print_table, say

if TYPE_CHECKING:
    from rarefy.runs.verify import Inspection


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder that `prune` or `pack` wrote, any model folder, or a .gguf file."
        ),
    ],
    pattern: Annotated[
        Text,
        typer.Option(
            metavar="N:M", help="Also check that at most N of every M weights are kept (N:Mt: in columns, too)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read the written files again; exit status 1 where they do not hold what was promised."""
    from rarefy.models.locate import locate
    from rarefy.runs.folder import RunFolder
    from rarefy.runs.recipe import build_pattern, parse_pattern

    if pattern is not None:
        parse_pattern(pattern)
    if (run := RunFolder.find(model)) is None:
        locate(model)
    else:
        run.read_layers()

    # What follows imports torch, which takes seconds.
    from rarefy.runs.verify import inspect_folder

    inspection = inspect_folder(model, build_pattern(pattern) if pattern is not None else None)
    if as_json:
        print(json.dumps(inspection.to_dict()))
    else:
        print_table(_inspection_rows(inspection))
        if inspection.ok and any(layer.pattern for layer in inspection.layers):
            print("every promise is kept")
        _warn_of_types(inspection)
    for problem in inspection.problems:
        say(f"broken: {problem}")
    if not inspection.ok:
        raise typer.Exit(1)


def _warn_of_types(inspection: Inspection) -> None:
    """Say which types of a GGUF file cannot hold zeros, as nobody sees it in the file."""
    from rarefy.models.gguf import KEEP_ZEROS

    types = {layer.type for layer in inspection.layers if layer.type}
    if lossy := sorted(types - KEEP_ZEROS):
        say(f"{', '.join(lossy)}: these types turn zeros into small numbers; Q8_0, Q6_K, Q5_0 and Q4_0 keep them")


def _inspection_rows(inspection: Inspection) -> list[list[str]]:
    has_types = any(layer.type for layer in inspection.layers)
    rows = [["layer", "shape", "zeros", "sparsity", "type" if has_types else "checked"]]
    for layer in inspection.layers:
        checked = f"{layer.pattern} {'broken' if layer.problems else 'holds'}" if layer.pattern else ""
        checked = ", ".join(filter(None, (layer.type, checked)))
        shape = " x ".join(map(str, layer.shape))
        rows.append([layer.name, shape, f"{layer.zeros:,}", f"{layer.sparsity:.2%}", checked])
    rows.append(["all", "", f"{inspection.zeros:,}", f"{inspection.sparsity:.2%}", ""])
    return rows
