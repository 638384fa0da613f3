"""``rarefy tune``: its options, and what follows from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli.options import Bos, Device, Log, Quiet, RecipeFile, Text, TextColumn
from rarefy.cli.terminal import Terminal, print_table, print_texts
from rarefy.errors import InputError
from rarefy.pruning.records import three_digits
from rarefy.runs.folder import RunFolder
from rarefy.runs.words import memory_words

if TYPE_CHECKING:
    from rarefy.runs.tune import TuneResult
    from rarefy.runs.tune_plan import TunePlan


def tune(
    context: typer.Context,
    model: Annotated[
        Text, typer.Argument(metavar="MODEL", help="A folder that `prune` wrote, or any model folder with zeros.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="New or empty folder, or a killed tuning's. Not with --dry-run."
        ),
    ] = None,
    against: Annotated[
        Text, typer.Option(metavar="DENSE", help="The dense model (default: the one that MODEL was pruned from).")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE\\[=SHARE]",
            help="What `prune` takes, several times with shares, as c4=0.7 (default: what MODEL was pruned with).",
        ),
    ] = None,
    text_column: TextColumn = None,
    num_samples: Annotated[
        Text, typer.Option(metavar="N", help="Windows to train on (default: as MODEL was pruned with, else 32).")
    ] = None,
    sequence_length: Annotated[
        Text, typer.Option(metavar="L", help="Tokens per window (default: as MODEL was pruned with, else 1024).")
    ] = None,
    held_out: Annotated[
        Text,
        typer.Option(
            metavar="N", help="Windows of the same text, none of them trained on, that choose the state (default: 4)."
        ),
    ] = None,
    bos: Bos = None,
    parametrisation: Annotated[
        Text,
        typer.Option(
            metavar="FORM",
            help="full (all kept weights; the default), norms, spp or lora; merged at the end.",
        ),
    ] = None,
    rank: Annotated[Text, typer.Option(metavar="R", help="Of spp and lora (default: 16).")] = None,
    alpha: Annotated[Text, typer.Option(metavar="A", help="Of spp and lora, scaled by A / R (default: 32).")] = None,
    learning_rate: Annotated[
        Text, typer.Option(metavar="RATE", help="Its highest (default: full 2e-4, norms 1e-3, spp 5e-2, lora 1e-3).")
    ] = None,
    batch_size: Annotated[Text, typer.Option(metavar="N", help="Windows in a step (default: 1).")] = None,
    micro_batch: Annotated[
        Text, typer.Option(metavar="N", help="Windows that run through the model at once (default: 1).")
    ] = None,
    epochs: Annotated[Text, typer.Option(metavar="N", help="Passes over the windows (default: 3).")] = None,
    max_steps: Annotated[Text, typer.Option(metavar="N", help="Steps at most (default: no limit).")] = None,
    warmup_steps: Annotated[
        Text, typer.Option(metavar="N", help="Steps in which the learning rate rises (default: 8).")
    ] = None,
    schedule: Annotated[
        Text, typer.Option(metavar="NAME", help="What it does then: linear (to 0; the default), cosine, constant.")
    ] = None,
    weight_decay: Annotated[Text, typer.Option(metavar="W", help="AdamW's (default: 0).")] = None,
    clip: Annotated[
        Text, typer.Option(metavar="NORM", help="Largest norm of all gradients (default: 1; 0: no limit).")
    ] = None,
    text_share: Annotated[
        Text, typer.Option(metavar="C", help="The text's own part of the loss, in \\[0, 1] (default: 0).")
    ] = None,
    hidden_weight: Annotated[
        Text, typer.Option(metavar="W", help="Weight of the blocks' hidden states in the loss (default: 0).")
    ] = None,
    teacher: Annotated[
        Text,
        typer.Option(
            metavar="KIND",
            help="The dense model beside (model), what enters its head, recorded once (states), or its K likeliest "
            "tokens, recorded once (top-K); default: auto, which is states where that is exact.",
        ),
    ] = None,
    eval_every: Annotated[
        Text, typer.Option(metavar="N", help="Steps between two measurements of held-out windows (default: a pass).")
    ] = None,
    patience: Annotated[
        Text, typer.Option(metavar="N", help="Stop after N measurements without a better one (default: never).")
    ] = None,
    optimizer: Annotated[
        Text, typer.Option(metavar="NAME", help="adamw (default), or package.module:Class with torch's interface.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute each block anew for its gradient: a third more time, much less memory.",
        ),
    ] = None,
    precision: Annotated[
        Text,
        typer.Option(metavar="DTYPE", help="Of products: auto (bfloat16 where it is faster), float32 or bfloat16."),
    ] = None,
    device: Device = None,
    seed: Annotated[
        Text, typer.Option(metavar="N", help="Draws windows and their order (default: as MODEL was pruned with).")
    ] = None,
    recipe: RecipeFile = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="Let the --recipe name an optimiser that is not torch's (it runs that code)."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained and an estimate of peak memory, and stop.")
    ] = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Train the kept weights of a pruned model against the dense one; every zero stays zero.

    Dense model, text and windows are those that MODEL was pruned with, unless others are named. The written
    folder is an ordinary model of the same masks; a tuning that was killed goes on with the same command.
    """
    from rarefy.parallel.world import World
    from rarefy.runs.tune_plan import make_tune_plan
    from rarefy.runs.tune_recipe import TuneRecipe

    names = set(TuneRecipe.model_fields)
    said = {name: value for name, value in context.params.items() if name in names and value not in (None, [])}
    world = World.current()
    folder = RunFolder(output) if output is not None else None
    with world.together():
        wanted = TuneRecipe.read(said, recipe, allow_code=allow_code)
        if output is None and not dry_run:
            raise InputError.sentence("--output is missing: name a new or empty folder for the results (-o OUT).")
        if folder and world.leads:
            folder.check()
    with Terminal(quiet, log if world.leads else None, output) as terminal:
        with world.together():
            plan = make_tune_plan(wanted)
        if dry_run or folder is None:
            _print_plan(plan)
            return
        from rarefy.runs.tune import execute_tuning

        terminal.begin()
        result = execute_tuning(plan, folder, ["rarefy", *context.obj], terminal)
        if result is not None:
            _print_result(result, terminal)


def _print_result(result: TuneResult, terminal: Terminal) -> None:
    model = result.folder.model
    if result.went_on:
        print(f"{model} holds the model; the tuning had been finished")
        return
    facts = result.facts["tuning"]
    if measured := facts["measurements"]:
        rows = [["held-out windows", "step", "KL, nats", "perplexity"]]
        best = next(one for one in measured if one["step"] == facts["best_step"])
        rows += [_measured("before", measured[0]), _measured("best", best), _measured("as written", facts["written"])]
        print_table(rows)
        terminal.log("; ".join(" ".join(row) for row in rows[1:]))
    if not terminal.quiet:
        print_texts(result.facts, "tuned")
    print(f"{model} holds the model; its files were read again: every mask is what it was")
    terminal.note(f"peak memory: {memory_words(result.facts['peak_bytes'])} on {result.facts['device']}")


def _measured(name: str, one: dict[str, Any]) -> list[str]:
    perplexity = math.exp(min(one["text_loss"], 700.0))
    return [name, f"{one['step']:,}", three_digits(one["kl"]), f"{perplexity:,.2f}"]


def _print_plan(plan: TunePlan) -> None:
    """What ``--dry-run`` shows."""
    from rarefy.runs.tune_memory import estimated_bytes, trained_numbers

    recipe = plan.recipe
    num = sum(text.num for text in plan.texts)
    steps = recipe.settings().steps(num)
    print(f"{recipe.parametrisation}: {trained_numbers(plan):,} numbers would be trained in {steps:,} steps")
    sources = ", ".join(recipe.calibration)
    print(
        f"{num:,} windows of {recipe.sequence_length:,} tokens from {sources}, {recipe.held_out:,} more are held out"
    )
    print(f"dense model: {recipe.against}")
    print(f"peak memory, estimated: {memory_words(estimated_bytes(plan))} on {plan.device}")
