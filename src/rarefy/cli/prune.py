"""``rarefy prune``: its options, and what follows from them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from rarefy.allocation.names import MEASURED
from rarefy.cli.options import (
    Allocation,
    Along,
    BarberRefit,
    BarberScore,
    BarberShare,
    Bos,
    Device,
    Drift,
    Dtype,
    Exclude,
    Include,
    Log,
    Match,
    MatchBatch,
    MatchLr,
    OffloadDir,
    Permute,
    Quiet,
    RecipeFile,
    Refresh,
    Rotate,
    RowWeights,
    Text,
    TextColumn,
)
from rarefy.cli.terminal import Terminal, print_table, print_texts
from rarefy.errors import InputError
from rarefy.pruning.records import three_digits
from rarefy.runs.folder import RunFolder
from rarefy.runs.words import memory_words

if TYPE_CHECKING:
    from rarefy.runs.plan import Plan
    from rarefy.runs.run import RunResult


class PruneCommand(TyperCommand):
    """Its help shows what a run needs as required, though a recipe or a dry run makes up for it."""

    def format_help(self, *arguments: Any) -> None:
        for parameter in self.params:
            if parameter.name in ("model", "output"):
                parameter.required = True  # for what is printed now: help ends the process
        super().format_help(*arguments)


def prune(
    context: typer.Context,
    model: Annotated[
        Text,
        typer.Argument(
            metavar="MODEL", help="Hub id, local folder, .gguf file, or smollm2. A --recipe may name it instead."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="New or empty folder, or a killed run's. Not needed with --dry-run."
        ),
    ] = None,
    method: Annotated[
        Text,
        typer.Option(metavar="NAME", help="What `rarefy methods` lists, or package.module:Class (default: alps)."),
    ] = None,
    sparsity: Annotated[
        Text, typer.Option(metavar="S", help="Fraction of zeros, in \\[0, 1) (default: 0.5).")
    ] = None,
    pattern: Annotated[
        Text,
        typer.Option(
            metavar="N:M",
            help="Keep N of every M weights along the inputs, instead of a sparsity; N:Mt: in columns as well.",
        ),
    ] = None,
    along: Along = None,
    scope: Annotated[
        Text,
        typer.Option(
            metavar="SCOPE",
            help="Where weights compete: layer or row (default: the method's); not with --pattern.",
        ),
    ] = None,
    calibration: Annotated[
        Text,
        typer.Option(
            metavar="SOURCE",
            help="self (the model's own text), python-docs, c4, wikitext2, hub:NAME\\[:CONFIG\\[:SPLIT]], "
            "or a .txt, .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a pattern.",
        ),
    ] = None,
    text_column: TextColumn = None,
    num_samples: Annotated[
        Text,
        typer.Option(metavar="N", help="Calibration windows (default: 128, or 32 without --calibration)."),
    ] = None,
    sequence_length: Annotated[
        Text,
        typer.Option(metavar="L", help="Tokens per window (default: 2048, or 1024 without --calibration)."),
    ] = None,
    batch_size: Annotated[
        Text,
        typer.Option(metavar="N", help="Windows that run through the model at once (default: 4, or --match-batch)."),
    ] = None,
    seed: Annotated[
        Text, typer.Option(metavar="N", help="Draws the windows, or the model's own text (default: 0).")
    ] = None,
    bos: Bos = None,
    device: Device = None,
    dtype: Dtype = None,
    include: Include = None,
    exclude: Exclude = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A hyperparameter of the method; repeatable."),
    ] = None,
    recipe: RecipeFile = None,
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code", help="Let the --recipe name a method that is not Rarefy's (it runs that code)."),
    ] = False,
    strict: Annotated[
        bool | None, typer.Option("--strict/--no-strict", help="Stop where the method fails on a layer.")
    ] = None,
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
    offload_dir: OffloadDir = None,
    texts: Annotated[
        bool,
        typer.Option("--texts/--no-texts", help="Let the dense and the pruned model write some text for the report."),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print layers, counts and an estimate of peak memory, and stop.")
    ] = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Prune a model and write it, with all that was done, to a folder.

    MODEL and -o are required, but a --recipe may name MODEL instead, and --dry-run needs no -o.
    """
    from rarefy.parallel.world import World
    from rarefy.runs.make_plan import make_plan
    from rarefy.runs.recipe import Recipe, parse_settings

    said = {
        "model": model,
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "along": along,
        "scope": scope,
        "calibration": calibration,
        "text_column": text_column,
        "num_samples": num_samples,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "seed": seed,
        "bos": bos,
        "device": device,
        "dtype": dtype,
        "include": include or None,
        "exclude": exclude or None,
        "settings": parse_settings(settings) if settings else None,
        "strict": strict,
        "barber": barber,
        "barber_share": barber_share,
        "barber_refit": barber_refit,
        "match": match,
        "match_lr": match_lr,
        "match_batch": match_batch,
        "drift": drift,
        "refresh": refresh,
        "permute": permute,
        "rotate": rotate,
        "row_weights": row_weights,
        "allocation": allocation,
    }
    world = World.current()
    folder = RunFolder(output) if output is not None else None
    with world.together():
        options = {key: value for key, value in said.items() if value is not None}
        wanted = Recipe.read(options, recipe, allow_code=allow_code)
        if output is None and not dry_run:
            raise InputError.sentence("--output is missing: name a new or empty folder for the results (-o OUT).")
        if folder and world.leads:
            folder.check()
    with Terminal(quiet, log if world.leads else None, output) as terminal:
        with world.together():
            plan = make_plan(wanted, output, offload_dir)
        for warning in plan.warnings:
            terminal.warn(warning)
        if dry_run or folder is None:
            _print_plan(plan, texts)
        else:
            from rarefy.runs.run import execute

            terminal.begin()
            command, chosen = ["rarefy", *context.obj], wanted.calibration is not None
            result = execute(plan, folder, command, terminal, chosen=chosen, texts=texts)
            if result is not None:
                _print_result(result, plan, terminal)


def _print_result(result: RunResult, plan: Plan, terminal: Terminal) -> None:
    report, model = result.report, result.folder.model
    if result.went_on:
        print(f"{model} holds the model; the run had been finished")
        return
    title = f"{report.method}, {report.pattern}: {report.pruned:,} of {report.size:,} weights are zero"
    print_table(report.rows(), title)
    for layer in report.failed:
        terminal.warn(f"{layer.name}: {layer.status}")
    if not terminal.quiet:
        print_texts(result.facts, "pruned")
    print(f"{model} holds the model; its files were read again and hold every promised zero")
    each = "" if plan.num_ranks == 1 else f", the most of {plan.num_ranks} processes"
    terminal.note(f"peak memory: {memory_words(result.facts['peak_bytes'])} on {plan.device}{each}")
    terminal.log(f"{title}, relative error {three_digits(report.relative_error)}; {model} holds the model")


def _print_plan(plan: Plan, texts: bool) -> None:
    """What ``--dry-run`` shows: the layers by kind with their counts of weights to prune, and the memory it takes.

    ``texts``: the models write some for the report.
    """
    from rarefy.runs.plan import calibration_words
    from rarefy.runs.run import forecast_of

    forecast = forecast_of(plan, texts)
    sites = [site for block in plan.blocks for site in block.sites]
    kinds = Counter((site.name.rpartition(".")[2], site.shape) for site in sites)
    rows = [["layer", "count", "shape", "to prune"]]
    pruned_of: Counter[tuple[str, tuple[int, int]]] = Counter()
    for site in sites:
        pruned = site.shape[0] * site.shape[1] - plan.pattern_of(site).count(site.shape)
        pruned_of[site.name.rpartition(".")[2], site.shape] += pruned
    for (kind, shape), count in kinds.items():
        pruned = pruned_of[kind, shape]
        rows.append([kind, f"{count:,}", f"{shape[0]} x {shape[1]}", f"{pruned:,}"])
    rows.append(["all", f"{len(sites):,}", "", f"{forecast.pruned:,}"])
    print_table(rows)
    print(f"{plan.method}, {plan.pattern_of}: {forecast.pruned:,} of {forecast.size:,} weights would be pruned")
    if plan.recipe.allocation in MEASURED:
        print(f"{plan.recipe.allocation} measures the dense model first; until then all layers have the same share")
    print(calibration_words(plan.recipe))
    each = "" if plan.num_ranks == 1 else f" for each of {plan.num_ranks} processes"
    print(f"peak memory, estimated: {memory_words(forecast.peak_bytes)} on {plan.device}{each}")
