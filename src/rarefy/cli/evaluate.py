"""``rarefy eval``: what is measured of a model, and how a run folder keeps it."""

from __future__ import annotations

import json
import math
import time
from typing import Annotated, Any

import typer

from rarefy.cli.options import Device, Dtype, Json, Text
from rarefy.cli.plan import read_tokens
from rarefy.cli.terminal import Watch, note
from rarefy.errors import CalibrationError, InputError
from rarefy.run_folder import RunFolder

#: The papers' context length in tokens.
_FULL_LENGTH = 2048


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What `prune` takes, or a folder that it wrote.")],
    text: Annotated[
        Text,
        typer.Option(
            metavar="TEXT", help="A text file as it stands, or wikitext2 (default: Python's documentation)."
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(metavar="L", min=2, help="Context length in tokens (default: 2048, or the model's)."),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N windows (default: all).")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Windows that run through the model at once.")
    ] = 1,
    bos: Annotated[bool, typer.Option("--bos", help="Start every window with the model's start token.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity by the papers' protocol: windows without overlap, no special tokens."""
    started = time.perf_counter()
    facts = _evaluate(model, text, sequence_length, max_windows, batch_size, bos, device or "auto", dtype or "auto")
    facts["seconds"] = round(time.perf_counter() - started, 3)
    if as_json:
        print(json.dumps(facts))
    else:
        value = facts["perplexity"]
        print(
            f"perplexity {'not finite' if value is None else format(value, '.2f')} on {facts['text']}, "
            f"{facts['windows']} windows of {facts['length']:,} tokens"
        )


def _evaluate(
    model_name: str,
    text_name: str | None,
    length: int | None,
    max_windows: int | None,
    batch_size: int,
    bos: bool,
    device_name: str,
    dtype: str,
) -> dict[str, Any]:
    """Perplexity and all that it depends on; a run folder keeps it in run.json and in its model card."""
    from rarefy.evaluation.perplexity import perplexity, text_source
    from rarefy.models.checkpoint import load_model, resolve_device, resolve_dtype
    from rarefy.models.source import resolve_model

    device = resolve_device(device_name)
    resolve_dtype(dtype)
    text = text_source(text_name)
    folder = RunFolder.find(model_name)
    source = resolve_model(str(folder.model if folder else model_name))
    if length is None:
        length = min(_FULL_LENGTH, source.context or _FULL_LENGTH)
    elif source.context is not None and length > source.context:
        raise InputError("--sequence-length", length, f"at most {source.context}, the model's longest context")
    tokens, bos_id = read_tokens(source, text, bos)
    if len(tokens) < length - (bos_id is not None):
        raise CalibrationError.sentence(
            f"The text of {text.name} has {len(tokens):,} tokens, but one window needs {length:,}."
        )
    if text_name is None:
        note("text: the last third of Python's own documentation; --text names another")
    model, _ = load_model(source, device, dtype)
    with Watch("windows") as watch:
        result = perplexity(
            model, tokens, length, max_windows=max_windows, bos_id=bos_id, batch_size=batch_size, progress=watch
        )
    row = {
        "text": text.name,
        "value": result.perplexity if math.isfinite(result.perplexity) else None,
        "length": result.length,
        "windows": result.windows,
        "tokens": result.tokens,
        "bos": bos,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if folder and folder.run.is_file():
        _keep_perplexity(folder, row)
    return {"model": model_name, "perplexity": row.pop("value"), **row, "device": str(device)}


def _keep_perplexity(folder: RunFolder, row: dict[str, Any]) -> None:
    """Add a measurement to run.json and the model card, in place of the same one made before."""
    from rarefy.report.card import model_card

    facts = folder.read_run()
    key = [name for name in row if name != "value"]
    others = [old for old in facts["perplexity"] if any(old.get(name) != row[name] for name in key)]
    facts["perplexity"] = [*others, row]
    try:
        folder.write_run(facts)
        folder.write_card(model_card(facts))
    except OSError as error:
        note(f"warning: {folder.run} could not be changed: {error.strerror or error}")
