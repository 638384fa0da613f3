"""``rarefy shrink``: its options, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli.options import Bos, Device, Dtype, Log, Quiet, RecipeFile, Text, TextColumn, split
from rarefy.cli.terminal import Terminal, print_table
from rarefy.errors import InputError
from rarefy.pruning.records import three_digits
from rarefy.runs.folder import RunFolder
from rarefy.runs.words import memory_words

if TYPE_CHECKING:
    from rarefy.runs.shrink import ShrinkResult
    from rarefy.runs.shrink_plan import ShrinkPlan


def shrink(
    context: typer.Context,
    model: Annotated[
        Text,
        typer.Argument(
            metavar="MODEL", help="Hub id, local folder, .gguf file, or smollm2. A --recipe may name it instead."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="New or empty folder. Not needed with --dry-run."),
    ] = None,
    blocks: Annotated[
        Text, typer.Option(metavar="N|SHARE", help="Remove so many whole blocks, or this share of them.")
    ] = None,
    by: Annotated[
        Text,
        typer.Option(
            metavar="RULE",
            help="Which blocks: kl (default) or perplexity of each alone, taylor, greedy (kl, one after the other), "
            "search (over sets), or policy-gradient.",
        ),
    ] = None,
    generations: Annotated[Text, typer.Option(metavar="N", help="Generations of --by search (default: 32).")] = None,
    offspring: Annotated[
        Text, typer.Option(metavar="N", help="Sets tried in each generation of --by search (default: 16).")
    ] = None,
    steps: Annotated[Text, typer.Option(metavar="N", help="Steps of --by policy-gradient (default: 500).")] = None,
    copies: Annotated[
        bool | None,
        typer.Option(
            "--copies/--no-copies",
            help="Measure blocks on windows of which every second repeats its first half, so that copying from the "
            "context counts (default: copies).",
        ),
    ] = None,
    search: Annotated[
        bool | None,
        typer.Option("--search", help="Find how many blocks, heads and neurons to remove for --size."),
    ] = None,
    size: Annotated[
        Text, typer.Option(metavar="SHARE", help="At most this share of the parameters is left (with --search).")
    ] = None,
    among: Annotated[
        Text,
        typer.Option(
            metavar="A,B", help="What --search may remove: blocks, heads, neurons (default: all that can be)."
        ),
    ] = None,
    candidates: Annotated[
        Text, typer.Option(metavar="N", help="Counts that --search tries at most (default: 32).")
    ] = None,
    heads: Annotated[
        Text,
        typer.Option(metavar="SHARE", help="Remove this share of the KV heads of every block, with their queries."),
    ] = None,
    neurons: Annotated[
        Text, typer.Option(metavar="SHARE", help="Remove this share of the MLP neurons of every block.")
    ] = None,
    multiple: Annotated[
        Text, typer.Option(metavar="N", help="Neurons that are kept are a multiple of N (default: 64).")
    ] = None,
    choose: Annotated[
        Text,
        typer.Option(
            metavar="HOW",
            help="Which heads and neurons: interactions (default), single (what each costs alone), or wanda.",
        ),
    ] = None,
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="Refit the linears behind what was removed, towards the dense model (default: repair).",
        ),
    ] = None,
    damping: Annotated[
        Text,
        typer.Option(
            metavar="D",
            help="Damping of the refit, as a share of each input's own energy (default: what does best on windows "
            "held out of it).",
        ),
    ] = None,
    calibration: Annotated[
        Text, typer.Option(metavar="SOURCE", help="Calibration text, as for `rarefy prune` (default: self).")
    ] = None,
    text_column: TextColumn = None,
    num_samples: Annotated[
        Text, typer.Option(metavar="N", help="Calibration windows (default: 128, or 32 without --calibration).")
    ] = None,
    sequence_length: Annotated[
        Text, typer.Option(metavar="L", help="Tokens per window (default: 2048, or 1024 without --calibration).")
    ] = None,
    batch_size: Annotated[
        Text, typer.Option(metavar="N", help="Windows that run through the model at once (default: 4).")
    ] = None,
    seed: Annotated[Text, typer.Option(metavar="N", help="Draws windows and mutations (default: 0).")] = None,
    bos: Bos = None,
    device: Device = None,
    dtype: Dtype = None,
    recipe: RecipeFile = None,
    texts: Annotated[
        bool,
        typer.Option(
            "--texts/--no-texts", help="Let the dense and the smaller model write some text for the report."
        ),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes before and after, and stop; no weight is read.")
    ] = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Remove whole blocks, KV heads and MLP neurons, and repair what is left.

    The written folder is an ordinary smaller model: any tool loads it, and it can be pruned, tuned and packed.
    """
    from rarefy.runs.shrink_plan import make_shrink_plan
    from rarefy.runs.shrink_recipe import ShrinkRecipe

    names = set(ShrinkRecipe.model_fields)
    said = {name: value for name, value in context.params.items() if name in names and value is not None}
    if among is not None:
        said["among"] = split(among)
        if not said["among"]:
            raise InputError("--among", among, "some of blocks, heads and neurons")
    folder = RunFolder(output) if output is not None else None
    wanted = ShrinkRecipe.read(said, recipe)
    wanted.check_read(said)
    if folder is None and not dry_run:
        raise InputError.sentence("--output is missing: name a new or empty folder for the results (-o OUT).")
    if folder:
        folder.check()
    with Terminal(quiet, log, output) as terminal:
        plan = make_shrink_plan(wanted)
        if dry_run or folder is None:
            _print_plan(plan)
            return
        from rarefy.runs.shrink import execute_shrinking

        terminal.begin()
        result = execute_shrinking(plan, folder, ["rarefy", *context.obj], terminal, texts)
        if result.went_on:
            terminal.note("the run had been finished before")
        _print_result(result, terminal)


def _print_plan(plan: ShrinkPlan) -> None:
    """What ``--dry-run`` shows."""
    from rarefy.runs.shrink_model import removed_words

    if plan.space:
        _print_search(plan)
        return
    assert plan.after is not None
    print(f"{removed_words(plan)} would be removed")
    print_table(_sizes(plan.before.to_dict(), plan.after.to_dict()))


def _print_search(plan: ShrinkPlan) -> None:
    """What a search would try, and what that costs."""
    from rarefy.structure.parts import WORDS

    assert plan.space is not None
    space, tried = plan.space, plan.candidates
    print(f"at most {space.limit:,} of {plan.before.parameters:,} parameters would be left")
    rows = [["removed", "of", "from", "to"]]
    for kind, number in space.numbers.items():
        fewest, most = space.span(kind)
        what = "blocks" if kind == "blocks" else f"{WORDS[kind]} of each block"
        rows.append([what, f"{number:,}", f"{fewest:,}", f"{most:,}"])
    print_table(rows, f"{len(tried)} of {len(space.candidates)} counts that are no larger would be tried:")
    rows = [["round", "candidates", "windows to repair", "windows to measure"]]
    for place, one in enumerate(plan.rounds, start=1):
        rows.append([str(place), str(one.candidates), str(one.repaired), str(one.measured)])
    print_table(rows)
    passes = search_passes(plan)
    print(f"about {passes:,} passes of one block over all windows, beside those of --by {plan.recipe.by}")
    for kind, reason in space.refused.items():
        print(f"no {kind} are removed: {reason}")


def search_passes(plan: ShrinkPlan) -> int:
    """Passes of one block over all windows that a search takes at most, without those of the rule for blocks."""
    windows, blocks = plan.rounds[-1].repaired + plan.rounds[-1].measured, plan.before.blocks
    repairs = 4 if plan.recipe.repair else 3  # Grams of two kinds and the states; the dense path
    each = sum(one.candidates * (repairs * one.repaired + one.measured) for one in plan.rounds)
    return round(each / windows * blocks)


def _print_result(result: ShrinkResult, terminal: Terminal) -> None:
    facts = result.facts["shrink"]
    print_table(_sizes(facts["before"], facts["after"]), f"removed: {result.facts['pattern']}")
    if facts["search"]:
        best, tried = facts["search"]["best"], len(facts["search"]["candidates"])
        print(f"search: {tried} models were made; KL of this one to the dense model {three_digits(best['kl'])} nats")
    if facts["blocks"]:
        removed = ", ".join(map(str, facts["blocks"]["removed"]))
        print(f"removed blocks: {removed}; KL to the dense model {three_digits(facts['blocks']['kl'])} nats")
    for kind in dict.fromkeys(part["kind"] for part in facts["parts"]):
        own = [part for part in facts["parts"] if part["kind"] == kind]
        masked, repaired = (sum(part[key] for part in own) / len(own) for key in ("masked_error", "error"))
        print(
            f"{kind}: mean relative error {three_digits(repaired)}"
            + (f", {three_digits(masked)} without repair{_damping_words(own)}" if facts["repair"] else "")
        )
    if path := facts["dense_path"]:
        apart, left = (sum(one[key] for one in path) / len(path) for key in ("drift", "drift_left"))
        print(
            f"hidden states apart from the dense model's: {three_digits(left)} of their energy in the mean of "
            f"{len(path)} blocks, {three_digits(apart)} without repair"
        )
    elif facts["no_dense_path"]:
        terminal.note(f"the repair does not aim at the dense model's hidden states: {facts['no_dense_path']}")
    print(f"{result.folder.model} holds the model; it was loaded again and computes the same")
    terminal.note(f"peak memory: {memory_words(result.facts['peak_bytes'])} on {result.facts['device']}")
    terminal.log(f"removed: {result.facts['pattern']}; {result.folder.model} holds the model")


def _damping_words(exits: Sequence[Mapping[str, Any]]) -> str:
    """The least and the most damping of the exits' refits; nothing of an earlier release's run."""
    found = sorted({one["damping"] for one in exits if one.get("damping") is not None})
    if not found:
        return ""
    return f"; damping {found[0]:g}" + (f" to {found[-1]:g}" if len(found) > 1 else "")


def _sizes(before: dict[str, int], after: dict[str, int]) -> list[list[str]]:
    rows = [["", "before", "after", "left"]]
    for key, name in (
        ("blocks", "blocks"),
        ("parameters", "parameters"),
        ("bytes", "bytes of weights"),
        ("multiplications", "multiplications a token"),
    ):
        rows.append([name, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key]:.1%}"])
    return rows
