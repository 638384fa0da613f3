"""``rarefy eval``: what is measured of a model, and how a run folder keeps it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli.options import (
    Device,
    Dtype,
    Json,
    Limit,
    Log,
    Quiet,
    TaskData,
    TaskNames,
    TextColumn,
    Texts,
    parse_limit,
    split,
)
from rarefy.cli.terminal import Terminal
from rarefy.errors import InputError, ModelError
from rarefy.pruning.records import aligned, three_digits
from rarefy.runs.folder import RunFolder

if TYPE_CHECKING:
    from rarefy.evaluation.measure import Measures
    from rarefy.models.source import ModelSource

#: The papers' context length in tokens.
_FULL_LENGTH = 2048


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What `prune` takes, or a folder that it wrote.")],
    text: Texts = None,
    text_column: TextColumn = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="Also load this model and measure the distance from its next-token distribution: mean KL divergence "
            "in nats, and the share of equal top-1 tokens.",
        ),
    ] = None,
    tasks: TaskNames = None,
    task_data: TaskData = None,
    limit: Limit = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(metavar="L", min=2, help="Context length in tokens (default: 2048, or the model's)."),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N windows of each text (default: all).")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Windows, or items of tasks, that run at once.")
    ] = 1,
    bos: Annotated[bool, typer.Option("--bos", help="Start every window with the model's start token.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Measure perplexity by the papers' protocol, distance from the dense model, and zero-shot tasks.

    Windows do not overlap and have no special tokens. Tasks alone are measured where only --tasks is given.
    What is measured of a folder that `prune` wrote is kept there, in run.json and in the model card.
    """
    from rarefy.evaluation.texts import parse_texts
    from rarefy.models.locate import locate
    from rarefy.runs.arguments import check_device, check_dtype, check_goes_with_tasks

    started = time.perf_counter()
    items, chosen_dtype = parse_limit(limit), dtype or "auto"
    check_device(device or "auto")
    check_dtype(chosen_dtype)
    check_goes_with_tasks(tasks, task_data=task_data, limit=limit)
    with Terminal(quiet, log) as terminal:
        folder = RunFolder.find(model)
        locate(str(folder.model if folder else model))
        if against:
            with _naming_against():
                locate(against)
        sources = parse_texts(text or [], text_column) if text or against or not tasks else {}

        # What follows imports torch, which takes seconds.
        from rarefy.models.checkpoint import load_model, resolve_device
        from rarefy.models.source import resolve_model

        chosen_device = resolve_device(device or "auto")
        source = resolve_model(str(folder.model if folder else model), packed=True)
        dense_source = _dense(against, source) if against else None
        measures = _measures(sources, source, dense_source, sequence_length, max_windows, batch_size, bos)
        if tasks:
            from rarefy.evaluation.tasks import prepare

            measures = replace(measures, tasks=prepare(split(tasks), task_data), limit=items)
        terminal.begin()
        keeps = folder is not None and _keeps(folder, terminal)
        if sources and not text:
            terminal.note("text: the last third of Python's own documentation; --text names another")
        loaded, tokenizer = load_model(source, chosen_device, chosen_dtype)
        dense = load_model(dense_source, chosen_device, chosen_dtype)[0] if dense_source else None
        with terminal.watch("measuring") as watch:
            found = measures.of(loaded, tokenizer, dense, watch)
        for one in found["divergence"]:
            one["against"] = against
        if folder and keeps:
            _keep(folder, found, terminal)
        lines = _lines(found)
        for line in lines:
            terminal.log(line)
    if as_json:
        shared = {"model": model, "device": str(chosen_device), "dtype": str(loaded.dtype).removeprefix("torch.")}
        seconds = round(time.perf_counter() - started, 3)
        print(json.dumps({**shared, "bos": bos, "length": measures.length, **_as_json(found), "seconds": seconds}))
    else:
        print("\n".join(lines))


@contextmanager
def _naming_against() -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ModelError.sentence(f"--against: {error}") from None


def _dense(name: str, source: ModelSource) -> ModelSource:
    """The model to compare with, which must know the same number of tokens."""
    from rarefy.models.source import resolve_model

    with _naming_against():
        dense = resolve_model(name, packed=True)
    size, dense_size = (one.config.get_text_config(decoder=True).vocab_size for one in (source, dense))
    if size != dense_size:
        raise InputError(
            "--against", name, f"a model with {size:,} tokens in its vocabulary, as MODEL; it has {dense_size:,}"
        )
    return dense


def _measures(
    sources: dict[str, Any],
    source: ModelSource,
    dense: ModelSource | None,
    length: int | None,
    max_windows: int | None,
    batch_size: int,
    bos: bool,
) -> Measures:
    from rarefy.evaluation.measure import Measures, corpora
    from rarefy.models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError.sentence(f"{source.name} has no tokenizer, so nothing can be measured of it.")
    if bos and tokenizer.bos_token_id is None:
        raise InputError.sentence(f"--bos asks for a start token, but the tokenizer of {source.name} has none.")
    contexts = [one.context for one in (source, dense) if one and one.context is not None]
    if length is None:
        length = min([_FULL_LENGTH, *contexts])  # some models have no longest context
    elif contexts and length > min(contexts):
        raise InputError("--sequence-length", length, f"at most {min(contexts)}, the model's longest context")
    bos_id = tokenizer.bos_token_id if bos else None
    texts = corpora(sources, tokenizer, length, bos_id, source)
    return Measures(texts, length, max_windows, bos_id, batch_size)


def _keeps(folder: RunFolder, terminal: Terminal) -> bool:
    """Whether measurements can be kept in ``folder``; a warning, before they are made, where its run is damaged."""
    from rarefy.runs.card import model_card

    if not folder.run.exists():
        return False
    try:
        model_card(folder.read_run())
    except InputError as error:
        terminal.warn(f"what is measured will not be kept: {error}")
        return False
    return True


def _keep(folder: RunFolder, found: dict[str, Any], terminal: Terminal) -> None:
    """Add measurements to run.json and the model card, in place of the same ones made before."""
    from rarefy.runs.card import model_card

    try:
        facts = folder.read_run()
        _add(facts, found)
        folder.write_run(facts)
        folder.write_card(model_card(facts))
    except InputError as error:
        terminal.warn(f"what was measured is not kept: {error}")


def _add(facts: dict[str, Any], found: dict[str, Any]) -> None:
    for kind, names in (("perplexity", _SAME), ("divergence", (*_SAME, "against"))):
        new = found[kind]
        same = [[one[name] for name in names] for one in new]
        others = [old for old in facts.get(kind, []) if [old.get(name) for name in names] not in same]
        facts[kind] = [*others, *new]
    facts["tasks"] = {**facts.get("tasks", {}), **found["tasks"]}


#: Two measurements are of the same thing where these are equal.
_SAME = ("text", "length", "windows", "tokens", "bos", "dtype")


def _as_json(found: dict[str, Any]) -> dict[str, Any]:
    """One object for each text; where there is one text, its numbers stand at the top as well."""
    rows = []
    for i, one in enumerate(found["perplexity"]):
        row = {"text": one["text"], "label": one["label"], "perplexity": one["value"]}
        row |= {name: one[name] for name in ("windows", "tokens")}
        if found["divergence"]:
            row |= {name: found["divergence"][i][name] for name in ("kl", "agreement", "against")}
        rows.append(row)
    return {**(rows[0] if len(rows) == 1 else {}), "texts": rows, "tasks": found["tasks"]}


def _lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for i, one in enumerate(found["perplexity"]):
        value = "not finite" if one["value"] is None else format(one["value"], ".2f")
        windows = f"{one['windows']} window{'s' * (one['windows'] > 1)} of {one['length']:,} tokens"
        label = re.escape(one["label"])  # most often the name of the text's file, which need not be said twice
        named = re.search(rf"(?<![\w.-]){label}(?![\w-])", one["text"])
        name = one["text"] if named else f"{one['label']} ({one['text']})"
        lines.append(f"perplexity {value} on {name}, {windows}")
        if found["divergence"]:
            distance = found["divergence"][i]
            lines.append(
                f"KL divergence {three_digits(distance['kl'])} nats, same top-1 token {distance['agreement']:.1%}, "
                f"on {name} against {distance['against']}"
            )
    if found["tasks"]:
        rows = [["task", "items", "metric", "value", "standard error"]]
        for task, result in found["tasks"].items():
            for metric, score in result["metrics"].items():
                shown = [_score(metric, score[key]) for key in ("value", "stderr")]
                rows.append([task, f"{result['samples']:,}", metric, *shown])
        lines += aligned(rows)
    return lines


def _score(metric: str, value: float | None) -> str:
    if value is None:
        return "unknown"
    if metric.startswith("acc"):
        return f"{value:.1%}"
    return f"{value:,.2f}" if metric == "perplexity" else three_digits(value)
