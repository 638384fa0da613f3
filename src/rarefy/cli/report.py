"""``rarefy report``: runs and sweeps on one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli.options import Quiet
from rarefy.cli.terminal import Terminal


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `prune` or `compare` wrote.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Default: RUN/report.html of the first.")
    ] = None,
    texts: Annotated[
        bool,
        typer.Option(
            "--texts/--no-texts",
            help="Where a run kept no texts, load its pruned model and the dense one, which its recipe names and "
            "which may be on the hub, to write some (default: load no model).",
        ),
    ] = False,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="With --texts: auto, cpu, cuda, cuda:N.")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Draw runs on one HTML page that needs no network."""
    from rarefy.report.build import write_report

    with Terminal(quiet) as terminal:
        file = write_report(runs, output, texts=texts, device=device, watch=terminal.watch, note=terminal.note)
    print(f"{file} holds the report")
