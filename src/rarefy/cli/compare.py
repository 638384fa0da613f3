"""``rarefy compare``: a sweep of methods, sparsities and seeds over one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli.options import (
    Allocation,
    Along,
    BarberRefit,
    BarberScore,
    BarberShare,
    Drift,
    Exclude,
    Include,
    Limit,
    Log,
    Match,
    MatchBatch,
    MatchLr,
    Permute,
    Quiet,
    Refresh,
    Rotate,
    RowWeights,
    TaskData,
    TaskNames,
    Text,
    TextColumn,
    Texts,
    parse_limit,
    split,
)
from rarefy.cli.terminal import Terminal


def compare(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, .gguf file, or smollm2.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="OUT", help="New or empty folder, or one of the same command to go on with."
        ),
    ],
    methods: Annotated[
        Text,
        typer.Option(
            metavar="A,B",
            help="Methods that `rarefy methods` lists, or A+B, by commas; or what makes the model smaller: "
            "shrink:blocks, shrink:heads, shrink:neurons, shrink:search, also with a rule (shrink:blocks:kl).",
        ),
    ] = None,
    systems: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rows beside --methods, or instead: TOML, for each row a table of the keys of a recipe.",
        ),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code", help="Let --systems name methods that are not Rarefy's (it runs that code)."),
    ] = False,
    sparsity: Annotated[
        Text, typer.Option(metavar="S,S", help="Fractions of zeros, by commas (default: 0.5).")
    ] = None,
    pattern: Annotated[
        Text, typer.Option(metavar="N:M,N:M", help="N:M patterns, by commas, beside the sparsities.")
    ] = None,
    size: Annotated[
        Text, typer.Option(metavar="S,S", help="Shares of the parameters that shrink:... leaves at most, by commas.")
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="How many seeds; each draws its own windows.")] = 1,
    scope: Annotated[
        Text, typer.Option(metavar="SCOPE", help="layer or row for all sparsities (default: the method's).")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.KEY=VALUE", help="A hyperparameter of one method; repeatable."),
    ] = None,
    calibration: Annotated[
        Text, typer.Option(metavar="SOURCE", help="As in `rarefy prune` (default: the same).")
    ] = None,
    text_column: TextColumn = None,
    num_samples: Annotated[Text, typer.Option(metavar="N", help="Calibration windows.")] = None,
    sequence_length: Annotated[Text, typer.Option(metavar="L", help="Tokens per calibration window.")] = None,
    batch_size: Annotated[
        Text, typer.Option(metavar="N", help="Calibration windows that run at once (default: 4, or --match-batch).")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Start every window with the model's start token.")] = False,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    include: Include = None,
    exclude: Exclude = None,
    along: Along = None,
    barber: BarberScore = None,
    barber_share: BarberShare = None,
    barber_refit: BarberRefit = None,
    match: Match = None,
    match_lr: MatchLr = None,
    match_batch: MatchBatch = None,
    drift: Drift = None,
    refresh: Refresh = None,
    permute: Permute = None,
    rotate: Rotate = None,
    row_weights: RowWeights = None,
    allocation: Allocation = None,
    text: Texts = None,
    eval_length: Annotated[
        int | None,
        typer.Option(metavar="L", help="Context length of perplexity (default: 2048, or the model's)."),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N windows of each text (default: all).")
    ] = None,
    eval_batch_size: Annotated[
        int, typer.Option(metavar="N", help="Windows, or items of tasks, that are measured at once.")
    ] = 1,
    tasks: TaskNames = None,
    task_data: TaskData = None,
    limit: Limit = None,
    save: Annotated[bool, typer.Option("--save", help="Also write the model of every cell.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try cells again that failed before.")] = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Prune a model in several ways and measure each: a table of methods or systems, sparsities and seeds.

    One of --methods and --systems is required. What changes the loop, such as --match, holds for all that prunes.
    The same command on the same folder goes on where it was stopped.
    """
    from rarefy.pruning.records import aligned
    from rarefy.runs.recipe import LOOP, parse_settings
    from rarefy.sweeps.folder import SweepFolder
    from rarefy.sweeps.options import Options
    from rarefy.sweeps.plan import plan_sweep
    from rarefy.sweeps.results import table

    folder = SweepFolder(output)
    with Terminal(quiet, log) as terminal:
        sweep = plan_sweep(
            Options(
                model=model,
                methods=split(methods),
                systems=systems,
                allow_code=allow_code,
                sparsities=split(sparsity),
                patterns=split(pattern),
                sizes=split(size),
                seeds=seeds,
                scope=scope,
                settings=parse_settings(settings or []),
                calibration=calibration,
                text_column=text_column,
                num_samples=num_samples,
                sequence_length=sequence_length,
                batch_size=batch_size,
                bos=bos,
                device=device,
                dtype=dtype,
                include=include or [],
                exclude=exclude or [],
                texts=text or [],
                eval_length=eval_length,
                max_windows=max_windows,
                eval_batch_size=eval_batch_size,
                tasks=split(tasks),
                task_data=task_data,
                limit=parse_limit(limit),
                save=save,
                retry=retry,
                loop={key: context.params[key] for key in LOOP if context.params[key] is not None},
            ),
            folder,
        )
        terminal.begin()
        for one in sweep.left_out:
            terminal.note(f"left out: {one.name}, {one.asked}: {one.reason}")
        from rarefy.sweeps.sweep import run_sweep  # with torch, which takes seconds

        try:
            cells = run_sweep(sweep, folder, ["rarefy", *context.obj], watch=terminal.watch, note=terminal.note)
        except KeyboardInterrupt:
            terminal.note("cells that are finished are kept, and the same command goes on behind them")
            raise
    print("\n".join(aligned(table(cells, folder.read_cell("dense")))))
    if elsewhere := len({cell.name for cell in sweep.cells} - {cell["cell"] for cell in cells}):
        print(
            f"not there yet: {elsewhere} of {len(sweep.cells)} cells, which other processes compute; the same "
            "command shows all once they are finished"
        )
    print(f"{folder.path} holds results.csv, results.md and results.json")
    if cells and all(cell["status"] == "failed" for cell in cells):
        raise typer.Exit(1)
