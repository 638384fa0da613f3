"""The command line: read what the user wrote, call the library, print what came out.

Results go to standard output, progress and notes to standard error. A user's mistake is one sentence
and exit status 2, found before a model is loaded; a run that fails otherwise exits with 1, an
interrupted one with 130. torch and transformers are imported inside the commands, so help is quick.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import math
import platform
import re
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from rarefy import __version__
from rarefy.errors import CalibrationError, InputError, ModelError, RarefyError, VerificationError
from rarefy.report.records import Report, aligned
from rarefy.run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rarefy.calibration.sources import Source
    from rarefy.evaluation.verify import Inspection
    from rarefy.layer.pattern import Pattern
    from rarefy.methods.base import Method
    from rarefy.models.blocks import Block
    from rarefy.models.source import ModelSource
    from rarefy.recipe import Recipe

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make large language models sparse in one shot, and prove what was done.",
)

#: What typer raises for every mistake in the use of options and arguments.
_UsageError = cast("type[Exception]", typer.BadParameter.__base__)
#: The papers' context length in tokens.
_FULL_LENGTH = 2048
#: Seconds between two progress lines where standard error is no terminal.
_SECONDS_BETWEEN_LINES = 15.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status; ``arguments`` default to the process's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _keep_freed_memory()
    try:
        with _plain_warnings():
            status = app(arguments or ["--help"], prog_name="rarefy", standalone_mode=False, obj=arguments)
    except _UsageError as error:
        return _complain(error.format_message(), 2)  # type: ignore[attr-defined]
    except InputError as error:
        return _complain(_as_option(str(error)), 2)
    except RarefyError as error:
        return _complain(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, typer.Abort):
            return _complain("interrupted", 130)
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            return _complain(f"Out of memory: a smaller --batch-size or fewer --num-samples need less ({error}).", 1)
        raise
    if status == 130:  # how typer passes on an interrupt
        return _complain("interrupted", 130)
    return int(status or 0)


def _keep_freed_memory() -> None:
    """Ask glibc not to hand large freed blocks back to the kernel after each use.

    Activations and (out, in) buffers are freed and taken again all the time; fetching their pages anew
    took a tenth to a quarter of a forward pass (docs/log.md). Elsewhere than on Linux nothing happens.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def _as_option(message: str) -> str:
    """The library's name of an argument, with which its message begins, as it is written here."""
    found = re.match(r"(model|pattern|include|exclude|device|dtype|method|set)(?= is |: | \w+ is )", message)
    if not found:
        return message
    return ("MODEL" if found[1] == "model" else f"--{found[1]}") + message[found.end() :]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rarefy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


Text = str | None
Device = Annotated[
    Text, typer.Option(metavar="DEVICE", help="auto (default: a GPU if there is one), cpu, cuda, cuda:N.")
]
Dtype = Annotated[
    Text,
    typer.Option(metavar="DTYPE", help="auto (default: the checkpoint's), float32, bfloat16 or float16."),
]
Bos = Annotated[bool | None, typer.Option("--bos/--no-bos", help="Start every window with the model's start token.")]
BatchSize = Annotated[
    Text, typer.Option(metavar="N", help="Windows that run through the model at once (default: 4).")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")
]


@app.command()
def prune(
    context: typer.Context,
    model: Annotated[
        Text, typer.Argument(metavar="MODEL", help="Hub id, local folder, .gguf file, or smollm2.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="New or empty folder for all results."),
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
        typer.Option(metavar="N:M", help="Keep N of every M weights along the inputs, instead of a sparsity."),
    ] = None,
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
            "or a .txt, .jsonl, .jsonl.gz or .parquet file.",
        ),
    ] = None,
    num_samples: Annotated[
        Text,
        typer.Option(metavar="N", help="Calibration windows (default: 128, or 32 without --calibration)."),
    ] = None,
    sequence_length: Annotated[
        Text,
        typer.Option(metavar="L", help="Tokens per window (default: 2048, or 1024 without --calibration)."),
    ] = None,
    batch_size: BatchSize = None,
    seed: Annotated[
        Text, typer.Option(metavar="N", help="Draws the windows, or the model's own text (default: 0).")
    ] = None,
    bos: Bos = None,
    device: Device = None,
    dtype: Dtype = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only linears whose full name matches; repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="No linears whose full name matches; repeatable.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A hyperparameter of the method; repeatable."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML with any of these settings; options replace its keys."),
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict/--no-strict", help="Stop where the method fails on a layer.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print layers, counts and an estimate of peak memory, and stop.")
    ] = False,
) -> None:
    """Prune a model and write it, with all that was done, to a folder."""
    from rarefy.recipe import Recipe, parse_settings

    said = {
        "model": model,
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "scope": scope,
        "calibration": calibration,
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
    }
    wanted = Recipe.read({key: value for key, value in said.items() if value is not None}, recipe)
    if output is None and not dry_run:
        raise InputError.sentence("--output is missing: name a new or empty folder for the results (-o OUT).")
    folder = RunFolder(output) if output is not None else None
    if folder:
        folder.check()
    plan = _plan(wanted)
    if dry_run or folder is None:
        _print_plan(plan)
    else:
        _run(plan, folder, ["rarefy", *context.obj], chosen=wanted.calibration is not None)


@app.command("eval")
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


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder that `prune` wrote, or any model folder.")],
    pattern: Annotated[
        Text, typer.Option(metavar="N:M", help="Also check that at most N of every M weights are kept.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read the written files again; exit status 1 where they do not hold what was promised."""
    from rarefy.evaluation.verify import inspect_folder
    from rarefy.recipe import parse_pattern

    inspection = inspect_folder(model, parse_pattern(pattern) if pattern is not None else None)
    if as_json:
        print(json.dumps(inspection.to_dict()))
    else:
        _print_table(_inspection_rows(inspection))
        if inspection.ok and any(layer.pattern for layer in inspection.layers):
            print("every promise is kept")
    for problem in inspection.problems:
        _note(f"broken: {problem}")
    if not inspection.ok:
        raise typer.Exit(1)


@app.command()
def methods() -> None:
    """List the methods: what each does, its hyperparameters with defaults, its paper."""
    from rarefy.methods import METHODS

    for name, method in METHODS.items():
        paper = f" ({method.paper})" if method.paper else ""
        print(f"{name}: {method.summary}{paper}; scope {method.default_scope}")
        for item in fields(method):
            if "help" in item.metadata:
                choices = f" ({', '.join(item.metadata['choices'])})" if item.metadata["choices"] else ""
                print(f"    --set {item.name}={getattr(method, item.name)}    {item.metadata['help']}{choices}")


# --- prune ------------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """A run whose every setting was checked, as far as that goes without the weights."""

    recipe: Recipe
    method: Method
    pattern: Pattern
    device: torch.device
    source: ModelSource
    skeleton: PreTrainedModel
    blocks: list[Block]
    #: Token ids (num, length); None where the model is to write its own text.
    windows: torch.Tensor | None


def _plan(recipe: Recipe) -> _Plan:
    """Find every mistake that can be found before the weights are loaded, the cheapest first."""
    from rarefy.calibration.sources import DRAW_FROM, SELF, draw_windows, parse_source
    from rarefy.models.blocks import find_blocks, select_sites
    from rarefy.models.checkpoint import resolve_device
    from rarefy.models.source import resolve_model
    from rarefy.pruning import check_pattern
    from rarefy.recipe import DEFAULT_CALIBRATION

    method, pattern = recipe.build_method(), recipe.build_pattern()
    device = resolve_device(recipe.device)
    text = parse_source(recipe.calibration or DEFAULT_CALIBRATION)
    source = resolve_model(recipe.model)
    recipe = recipe.resolved(source.context)
    skeleton = source.skeleton()
    blocks = select_sites(find_blocks(skeleton), recipe.include, recipe.exclude)
    check_pattern(blocks, pattern)
    windows = None
    if text is not SELF:
        num, length = recipe.window_shape
        tokens, bos_id = _tokens(source, text, recipe.bos, enough=DRAW_FROM * num * length)
        windows = draw_windows(tokens, num, length, recipe.seed, bos_id, name=f"the text of {text.name}")
    elif recipe.bos:
        recipe = recipe.model_copy(update={"bos": False})  # what the model writes begins with it anyway
    return _Plan(recipe, method, pattern, device, source, skeleton, blocks, windows)


def _tokens(
    source: ModelSource, text: Source, bos: bool, enough: int | None = None
) -> tuple[torch.Tensor, int | None]:
    """The tokens of ``text`` in one row, and the start token if ``bos`` asks for it."""
    from rarefy.calibration.sources import token_stream
    from rarefy.models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError.sentence(
            f"{source.name} has no tokenizer, so it can read no text; --calibration self needs none."
        )
    if bos and tokenizer.bos_token_id is None:
        raise InputError.sentence(f"--bos asks for a start token, but the tokenizer of {source.name} has none.")
    return token_stream(text, tokenizer, enough), tokenizer.bos_token_id if bos else None


def _print_plan(plan: _Plan) -> None:
    """What ``--dry-run`` shows: every layer with its count of weights to prune, and the memory it takes."""
    rows = [["layer", "shape", "to prune"]]
    total = size = 0
    for site in (site for block in plan.blocks for site in block.sites):
        weights = site.shape[0] * site.shape[1]
        pruned = weights - plan.pattern.count(site.shape)
        rows.append([site.name, f"{site.shape[0]} x {site.shape[1]}", f"{pruned:,}"])
        total, size = total + pruned, size + weights
    rows.append(["all", "", f"{total:,}"])
    _print_table(rows)
    print(f"{plan.method}, {plan.pattern}: {total:,} of {size:,} weights would be pruned")
    print(_calibration_words(plan.recipe))
    print(f"peak memory, estimated: {_size(_estimated_bytes(plan))} on {plan.device}")


def _calibration_words(recipe: Recipe) -> str:
    num, length = recipe.window_shape
    return f"calibration: {num:,} windows of {length:,} tokens from {recipe.calibration}"


def _estimated_bytes(plan: _Plan) -> int:
    """About the most memory that the run needs at once: weights, hidden states, and one block's work."""
    from rarefy.models.checkpoint import resolve_dtype

    num, length = plan.recipe.window_shape
    dtype = resolve_dtype(plan.recipe.dtype)
    parameters = list(plan.skeleton.parameters())
    item = dtype.itemsize if dtype else parameters[0].dtype.itemsize
    weights = sum(parameter.numel() for parameter in parameters) * item
    hidden = num * length * plan.source.config.get_text_config().hidden_size * item
    sites = [site for block in plan.blocks for site in block.sites]
    largest = max(plan.blocks, key=lambda block: sum(math.prod(site.shape) for site in block.sites))
    inputs = {site.shape[1] for site in largest.sites}
    # In float32: the block itself, one Gram per input width, and what a solve holds beside them.
    block = 4 * sum(math.prod(site.shape) for site in largest.sites)
    grams = 4 * sum(width**2 for width in inputs)
    solve = 4 * max(4 * site.shape[1] ** 2 + 6 * math.prod(site.shape) for site in sites)
    # Activations of one batch: what goes into and out of the widest linears, twice.
    widest = sum(sorted(max(site.shape) for site in largest.sites)[-3:])
    batch = 4 * 2 * min(plan.recipe.batch_size, num) * length * widest
    libraries = 0 if plan.device.type == "cuda" else 600 * 2**20
    return weights + hidden + block + grams + max(solve, batch) + libraries


def _run(plan: _Plan, folder: RunFolder, command: list[str], chosen: bool) -> None:
    """Load, prune, write, read again; nothing is left in the folder if any of it fails."""
    from rarefy.models.checkpoint import load_model, save_model
    from rarefy.pruning import prune as prune_model
    from rarefy.report.card import model_card

    recipe, source = plan.recipe, plan.source
    began = datetime.now(UTC)
    clock = _Clock()
    with clock.stage("load"):
        model, tokenizer = load_model(source, plan.device, recipe.dtype)
    _note(_calibration_words(recipe) + ("" if chosen else " (the default)"))
    with clock.stage("calibrate"):
        windows = plan.windows if plan.windows is not None else _own_text(model, recipe)
    with clock.stage("prune"), _Watch("pruning") as watch:
        report = prune_model(
            model,
            windows,
            pattern=plan.pattern,
            method=plan.method,
            batch_size=recipe.batch_size,
            include=recipe.include,
            exclude=recipe.exclude,
            strict=recipe.strict,
            on_progress=watch,
        )
    with folder.writing():
        with clock.stage("write"):
            folder.write_recipe(recipe.to_yaml())
            folder.write_layers(report.layers)
            facts = _facts(plan, report, command, began, model.dtype)

            folder.write_model(lambda path: save_model(model, tokenizer, path, source))
            folder.write_card(model_card(facts))
        with clock.stage("verify"):
            _verify(folder)
        folder.write_run({**facts, "finished": _iso(datetime.now(UTC)), "seconds": clock.total()})
    _print_table(
        report.rows(),
        f"{report.method}, {report.pattern}: {report.pruned:,} of {report.size:,} weights are zero",
    )
    for layer in report.failed:
        _note(f"warning: {layer.name}: {layer.status}")
    print(f"{folder.model} holds the model; its files were read again and hold every promised zero")


def _own_text(model: PreTrainedModel, recipe: Recipe) -> torch.Tensor:
    from rarefy.calibration.self_text import write_text

    with _Watch("writing tokens") as watch:
        return write_text(model, *recipe.window_shape, recipe.seed, progress=watch)


def _verify(folder: RunFolder) -> None:
    from rarefy.evaluation.verify import inspect_folder

    problems = inspect_folder(folder.model).problems
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise VerificationError(f"The written files do not hold what was promised: {problems[0]}{more}.")


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _facts(plan: _Plan, report: Report, command: list[str], began: datetime, dtype: torch.dtype) -> dict[str, Any]:
    """What ``run.json`` and the model card say of a run."""
    from rarefy.report.card import base_model

    recipe = plan.recipe
    return {
        "command": shlex.join(command),
        "versions": {
            "rarefy": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
        },
        "started": _iso(began),
        "base_model": base_model(plan.source.name, plan.source.kind, plan.source.path),
        "method": report.method,
        "paper": plan.method.paper,
        "pattern": report.pattern,
        "layers": len(report.layers),
        "failed": [layer.name for layer in report.failed],
        "size": report.size,
        "pruned": report.pruned,
        "sparsity": report.sparsity,
        "relative_error": report.relative_error if math.isfinite(report.relative_error) else None,
        "peak_bytes": report.peak_bytes,
        "seed": recipe.seed,
        "device": str(plan.device),
        "dtype": str(dtype).removeprefix("torch."),
        "calibration": {
            "source": recipe.calibration,
            "num_samples": recipe.num_samples,
            "sequence_length": recipe.sequence_length,
            "bos": recipe.bos,
        },
        "perplexity": [],
    }


# --- eval -------------------------------------------------------------------------------------------------


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
    tokens, bos_id = _tokens(source, text, bos)
    if len(tokens) < length - (bos_id is not None):
        raise CalibrationError.sentence(
            f"The text of {text.name} has {len(tokens):,} tokens, but one window needs {length:,}."
        )
    if text_name is None:
        _note("text: the last third of Python's own documentation; --text names another")
    model, _ = load_model(source, device, dtype)
    with _Watch("windows") as watch:
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
        _note(f"warning: {folder.run} could not be changed: {error.strerror or error}")


# --- printing ---------------------------------------------------------------------------------------------


def _inspection_rows(inspection: Inspection) -> list[list[str]]:
    rows = [["layer", "shape", "zeros", "sparsity", "checked"]]
    for layer in inspection.layers:
        checked = f"{layer.pattern} {'broken' if layer.problems else 'holds'}" if layer.pattern else ""
        shape = " x ".join(map(str, layer.shape))
        rows.append([layer.name, shape, f"{layer.zeros:,}", f"{layer.sparsity:.2%}", checked])
    rows.append(["all", "", f"{inspection.zeros:,}", f"{inspection.sparsity:.2%}", ""])
    return rows


def _print_table(rows: list[list[str]], title: str = "") -> None:
    """Print rows, the first of which is the heading and the last a sum, as a table or as aligned text."""
    console = Console()
    if console.is_terminal:
        table = Table(title=title or None, title_justify="left", show_footer=True)
        for i, heading in enumerate(rows[0]):
            table.add_column(heading, rows[-1][i], justify="right" if i else "left", no_wrap=True)
        for row in rows[1:-1]:
            table.add_row(*row)
        console.print(table)
    else:
        print("\n".join(filter(None, [title, *aligned(rows)])))


class _Watch:
    """Shows how far a stage is: one bar on a terminal, a line now and then elsewhere, on standard error."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(what, total=None, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if error is None:
            _note(f"{self._what}: done in {_duration(time.monotonic() - self._started)}")

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Part ``done`` of ``total`` is finished; ``note`` is shown beside it."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = _duration((now - self._started) * (total - done) / max(done, 1))
            _note(f"{self._what}: {done:,} of {total:,}, {left} left{', last ' + note if note else ''}")


class _Clock:
    """Seconds of each stage of a run, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time within as stage ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 3)

    def total(self) -> dict[str, float]:
        """All stages so far and the time since the beginning."""
        return {**self.seconds, "total": round(time.perf_counter() - self._started, 3)}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within the block, a warning is one line on standard error, without file and source line."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        _note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _complain(text: str, status: int) -> int:
    """Print one sentence about what went wrong and return the exit status."""
    sentence = " ".join(text.split())
    _note(f"error: {sentence}" + ("" if sentence.endswith((".", "?", "!")) else "."))
    return status
