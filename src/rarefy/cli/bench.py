"""``rarefy bench``: what packed weights gain on this machine, measured."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli.options import Json, Quiet
from rarefy.cli.terminal import Terminal
from rarefy.errors import InputError, ModelError
from rarefy.pruning.records import aligned

if TYPE_CHECKING:
    from rarefy.models.source import ModelSource
    from rarefy.packing.bench import ShapeSpeed, Speed, Variant

#: Bytes that products of single matrices go round in, beyond the caches of today's servers.
_BEYOND = 1 << 30
#: Tokens of a prompt, unless the context is shorter.
_PROMPT = 128


def bench(
    model: Annotated[str, typer.Argument(metavar="PACKED", help="A folder that `rarefy pack` wrote.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="The dense model (default: the same one, unpacked in memory)."),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens of the prompt (default: 128, or what the context leaves)."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens written after it.")] = 32,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="Default: torch's.")] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="How often all are measured in turn; the best time counts.")
    ] = 5,
    shapes: Annotated[bool, typer.Option("--shapes", help="Also measure single products, by matrix shape.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a packed model against the dense one on the CPU: tokens per second, bytes, memory.

    The dense model is measured as torch multiplies by default, and without oneDNN, which for single tokens is often
    faster. All are measured in turn in one run.
    """
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise InputError("--threads", threads, f"a whole number from 1 to {cores}, the processors of this machine")
    import torch

    from rarefy.packing import kernel
    from rarefy.packing.bench import measure_shapes, measure_speed

    sources = _sources(model, against)
    prompt_tokens = _prompt_tokens(prompt_tokens, new_tokens, sources[0].context)
    if threads is not None:
        torch.set_num_threads(threads)
    with Terminal(quiet) as terminal:
        terminal.begin()
        terminal.note(f"{kernel.describe()}, {torch.get_num_threads()} threads")
        variants, facts = _load(*sources)
        with terminal.watch("measuring") as watch:
            speeds = measure_speed(variants, prompt_tokens, new_tokens, rounds, watch)
        found: list[ShapeSpeed] = []
        if shapes:
            with terminal.watch("measuring products") as watch:
                found = measure_shapes(variants[0].model, _BEYOND, 4 * rounds, (1, 8), watch)
    if as_json:
        rows = [_row(speed, speeds, facts[speed.name == "packed"]) for speed in speeds]
        settings = {"threads": torch.get_num_threads(), "kernel": kernel.path(), "prompt_tokens": prompt_tokens}
        settings |= {"new_tokens": new_tokens, "rounds": rounds, "model": model, "against": against}
        print(json.dumps({**settings, "variants": rows, "shapes": [shape.to_dict() for shape in found]}))
    else:
        print("\n".join([*_speed_lines(speeds, facts), *(_shape_lines(found) if shapes else [])]))


def _prompt_tokens(asked: int | None, new_tokens: int, context: int | None) -> int:
    """The length of the prompt. Raises InputError where it and what is written exceed the model's context."""
    if context is None:
        return asked or _PROMPT
    if new_tokens >= context:
        raise InputError("--new-tokens", new_tokens, f"below {context:,}, the model's context")
    room = context - new_tokens
    if asked is not None and asked > room:
        raise InputError(
            "--prompt-tokens",
            asked,
            f"at most {room:,}: of the model's context, {context:,}, {new_tokens:,} are written",
        )
    return asked or min(_PROMPT, room)


def _sources(model: str, against: str | None) -> tuple[ModelSource, ModelSource | None]:
    """The packed model, and the dense one where it is named; every mistake is found here."""
    from rarefy.models.source import resolve_model

    packed = resolve_model(model, packed=True)
    if packed.packing is None:
        raise ModelError.sentence(f"{model} is not packed: `rarefy pack {model} -o PACKED` makes what is measured.")
    if against is None:
        return packed, None
    dense = resolve_model(against)
    sizes = [(type(one.config), one.config.get_text_config().hidden_size) for one in (packed, dense)]
    if sizes[0] != sizes[1]:
        raise InputError("--against", against, f"a model of the form of {model}")
    return packed, dense


def _load(
    packed_source: ModelSource, dense_source: ModelSource | None
) -> tuple[list[Variant], dict[bool, dict[str, int]]]:
    """The variants to measure, and bytes of the packed (True) and the dense (False) model."""
    from rarefy.models.checkpoint import load_model
    from rarefy.models.memory import give_back, resident_bytes
    from rarefy.packing.bench import DENSE_WAYS, Variant, bytes_per_token, warm_up, weight_bytes

    models, facts = {}, {}
    for is_packed in (True, False):
        give_back()
        before = resident_bytes()
        source = packed_source if is_packed or dense_source is None else dense_source
        model: Any = load_model(source, "cpu")[0]
        if not is_packed and dense_source is None:
            model.dequantize()
        warm_up(model)
        give_back()
        facts[is_packed] = {
            "file_bytes": _file_bytes(source) if is_packed or dense_source else weight_bytes(model),
            "weight_bytes": weight_bytes(model),
            "resident_bytes": resident_bytes() - before,
            "bytes_per_token": bytes_per_token(model),
        }
        models[is_packed] = model
    dense = [Variant(f"dense, {name}", models[False], scope) for name, scope in DENSE_WAYS.items()]
    return [Variant("packed", models[True]), *dense], facts


def _file_bytes(source: ModelSource) -> int:
    """Bytes of the files of weights."""
    place = source.fetch()
    files = place.glob("*.safetensors") if place.is_dir() else [place]  # one file of weights, in GGUF
    return sum(file.stat().st_size for file in files)


def _row(speed: Speed, speeds: list[Speed], facts: dict[str, int]) -> dict[str, Any]:
    best = max(other.decode for other in speeds if other.name != "packed")
    return {
        "name": speed.name,
        "prefill_tokens_per_second": speed.prefill,
        "decode_tokens_per_second": speed.decode,
        "decode_against_best_dense": speed.decode / best,
        "seconds_per_token": {"products": speed.products, "rest": speed.rest},
        **facts,
    }


def _speed_lines(speeds: list[Speed], facts: dict[bool, dict[str, int]]) -> list[str]:
    heading = ["", "prefill tok/s", "decode tok/s", "to best dense", "ms/token", "products", "rest"]
    table = [[*heading, "file MB", "memory MB", "MB/token"]]
    for speed in speeds:
        row = _row(speed, speeds, facts[speed.name == "packed"])
        seconds = (1 / speed.decode, speed.products, speed.rest)
        sizes = (row[name] for name in ("file_bytes", "resident_bytes", "bytes_per_token"))
        table.append(
            [
                speed.name,
                f"{speed.prefill:,.1f}",
                f"{speed.decode:,.2f}",
                f"{row['decode_against_best_dense']:.2f}",
                *(f"{1000 * each:.2f}" for each in seconds),
                *(f"{size / 1e6:,.1f}" for size in sizes),
            ]
        )
    return [
        *aligned(table),
        "products: of all linears, the head included; rest: attention, norms, and Python itself",
    ]


def _shape_lines(shapes: list[ShapeSpeed]) -> list[str]:
    heading = ["matrix", "number", "zeros", "rows of x", "packed ms", "dense ms, torch's default"]
    table = [[*heading, "best dense ms", "to best dense", "to torch's default"]]
    for shape in shapes:
        found = shape.to_dict()
        name, best = min(shape.dense.items(), key=lambda pair: pair[1])
        table.append(
            [
                f"{shape.rows:,} x {shape.width:,}",
                str(shape.number),
                f"{shape.zeros:.1%}",
                str(shape.batch),
                f"{1000 * shape.packed:.3f}",
                f"{1000 * shape.dense['default']:.3f}",
                f"{1000 * best:.3f} ({name})",
                f"{found['gain']:.2f}",
                f"{found['gain_over_default']:.2f}",
            ]
        )
    last = f"single products go round in copies of {_BEYOND / 1e9:.1f} GB each, beyond the caches"
    return ["", *aligned(table), last]
