"""A sweep: one model, pruned by several methods with several patterns and seeds, each measured the same way.

    OUT/compare.json             what the sweep measures, and how: the same for all of its cells
    OUT/cells/dense/run.json     the dense model's measurements
    OUT/cells/NAME/              one cell: run.json, layers.jsonl, recipe.yaml, and model/ where asked for
    OUT/results.csv .md .json    all cells so far

The model is loaded once; before every cell its blocks get their dense weights back, bit for bit. All cells
of a seed are calibrated on the same windows. A cell appears whole or not at all, so a sweep that was killed
goes on with what is missing; one command writes into a folder at a time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rarefy import __version__
from rarefy.calibration.sources import DRAW_FROM, SELF, Source, draw_windows, parse_source, token_stream
from rarefy.errors import InputError, ModelError, OutputError
from rarefy.evaluation.measure import Measures, corpora, parse_texts
from rarefy.evaluation.texts import PROMPTS, write_texts
from rarefy.models.blocks import Block, find_blocks, select_sites
from rarefy.models.checkpoint import load_model, load_tokenizer, resolve_device, save_model
from rarefy.models.source import ModelSource, resolve_model
from rarefy.pruning import check_pattern, prune
from rarefy.recipe import DEFAULT_CALIBRATION, DEFAULT_SPARSITY, Recipe
from rarefy.report.card import base_model, model_card
from rarefy.report.records import Report
from rarefy.report.results import summarise, to_csv, to_markdown
from rarefy.run_folder import RunFolder, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The papers' context length in tokens, for evaluation.
EVALUATION_LENGTH = 2048

Progress = Callable[[int, int, str], None]
#: Makes what shows how far a stage is: ``with watch("pruning") as progress: progress(done, total, note)``.
Watch = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Options:
    """What the user asked for. Texts and numbers as they were written: ``plan`` checks them.

    Lists are the axes of the sweep; ``seeds`` is their number. ``settings`` are METHOD.KEY: VALUE.
    """

    model: str
    methods: Sequence[str]
    sparsities: Sequence[str] = ()
    patterns: Sequence[str] = ()
    seeds: int = 1
    scope: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    calibration: str | None = None
    num_samples: str | int | None = None
    sequence_length: str | int | None = None
    batch_size: str | int | None = None
    bos: bool = False
    device: str = "auto"
    dtype: str = "auto"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    texts: Sequence[str] = ()
    eval_length: int | None = None
    max_windows: int | None = None
    eval_batch_size: int = 1
    tasks: Sequence[str] = ()
    task_data: str | Path | None = None
    limit: int | None = None
    save: bool = False
    retry: bool = False


@dataclass(frozen=True)
class Cell:
    """One method with one pattern and one seed, all of it in a resolved recipe."""

    recipe: Recipe

    @property
    def sparsity(self) -> float:
        """The fraction of zeros that was asked for."""
        if self.recipe.pattern is not None:
            keep, of = map(int, self.recipe.pattern.split(":"))
            return 1 - keep / of
        assert self.recipe.sparsity is not None
        return self.recipe.sparsity

    @property
    def pattern(self) -> str:
        """The pattern's name, such as ``row 50%`` or ``2:4``."""
        return str(self.recipe.build_pattern())

    @property
    def name(self) -> str:
        """The name of the cell's folder; two cells never share one."""
        recipe = self.recipe
        where = recipe.pattern.replace(":", "of") if recipe.pattern else f"{recipe.scope}-{recipe.sparsity!r}"
        method = re.sub(r"[^\w.+-]", "_", recipe.method)
        return f"{method}_{where}_seed{recipe.seed}"

    def facts(self) -> dict[str, Any]:
        """What is known of the cell before it runs."""
        recipe = self.recipe
        return {
            "method": recipe.method,
            "paper": recipe.build_method().paper,
            "pattern": self.pattern,
            "asked_sparsity": self.sparsity,
            "seed": recipe.seed,
            "calibration": {
                "source": recipe.calibration,
                "num_samples": recipe.num_samples,
                "sequence_length": recipe.sequence_length,
                "bos": recipe.bos,
            },
        }


@dataclass(frozen=True)
class Plan:
    """A sweep whose every setting was checked, as far as that goes without the weights."""

    cells: Sequence[Cell]
    source: ModelSource
    device: torch.device
    measures: Measures
    calibration: Source
    #: The tokens to draw windows from; None where the model writes its own text.
    tokens: Tensor | None
    bos_id: int | None
    tokenizer: PreTrainedTokenizerBase | None
    settings: Mapping[str, Any]
    save: bool = False
    retry: bool = False


# --- The plan ---------------------------------------------------------------------------------------------


def plan(options: Options, folder: SweepFolder) -> Plan:
    """Find every mistake that can be found before the weights are loaded.

    Raises InputError, one sentence, also where ``folder`` holds another sweep; nothing is written.
    """
    recipes = _recipes(options)
    for argument, number in (
        ("--max-windows", options.max_windows),
        ("--eval-batch-size", options.eval_batch_size),
        ("--limit", options.limit),
    ):
        if number is not None and number < 1:
            raise InputError(argument, number, "a whole number of at least 1")
    device = resolve_device(options.device)
    texts = parse_texts(options.texts)
    calibration = parse_source(options.calibration or DEFAULT_CALIBRATION)
    folder.check()
    source = resolve_model(options.model)
    cells = [Cell(recipe.resolved(source.context)) for recipe in recipes]
    blocks = select_sites(find_blocks(source.skeleton()), options.include, options.exclude)
    for pattern in dict.fromkeys(cell.recipe.build_pattern() for cell in cells):
        check_pattern(blocks, pattern)

    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError.sentence(f"{source.name} has no tokenizer, so nothing can be measured of it.")
    if options.bos and tokenizer.bos_token_id is None:
        raise InputError.sentence(f"--bos asks for a start token, but the tokenizer of {source.name} has none.")
    length = _evaluation_length(options.eval_length, source)
    tasks = None
    if options.tasks:
        from rarefy.evaluation.tasks import prepare

        tasks = prepare(options.tasks, options.task_data)
    bos_id = tokenizer.bos_token_id if options.bos else None
    recipe = cells[0].recipe
    measures = Measures(
        corpora(texts, tokenizer, length, options.bos),
        length,
        options.max_windows,
        bos_id,
        batch_size=options.eval_batch_size,
        tasks=tasks,
        limit=options.limit,
    )
    tokens = None
    if calibration is not SELF:
        num, window = recipe.window_shape
        tokens = token_stream(calibration, tokenizer, enough=DRAW_FROM * num * window)
        # Drawn once for its errors; warnings come when the sweep runs.
        if len(tokens) < window - options.bos:
            draw_windows(tokens, num, window, 0, bos_id, name=f"the text of {calibration.name}")
    settings = {
        "model": source.name,
        "weights": _fingerprint(source),
        "calibration": recipe.calibration,
        "num_samples": recipe.num_samples,
        "sequence_length": recipe.sequence_length,
        "calibration_text": None if tokens is None else _digest(tokens),
        "bos": options.bos,
        "dtype": options.dtype,
        "include": list(options.include),
        "exclude": list(options.exclude),
        "settings": dict(options.settings),
        "texts": {corpus.label: corpus.source for corpus in measures.corpora},
        "text_contents": {corpus.label: corpus.digest for corpus in measures.corpora},
        "eval_length": length,
        "max_windows": options.max_windows,
        "tasks": list(options.tasks),
        "task_data": tasks.digest if tasks else "",
        "limit": options.limit,
    }
    folder.check_same(settings)
    return Plan(
        cells,
        source,
        device,
        measures,
        calibration,
        tokens,
        bos_id,
        tokenizer,
        settings,
        options.save,
        options.retry,
    )


def _recipes(options: Options) -> list[Recipe]:
    """One recipe per cell, those of a seed together."""
    if not options.methods:
        raise InputError.sentence("--methods is missing: name one or more, such as magnitude,wanda,sparsegpt.")
    if options.seeds < 1:
        raise InputError("--seeds", options.seeds, "a whole number of at least 1")
    for argument, values in (
        ("--methods", options.methods), ("--sparsity", options.sparsities), ("--pattern", options.patterns),
    ):  # fmt: skip
        if repeated := next((value for value in values if list(values).count(value) > 1), None):
            raise InputError.sentence(f"{argument} names {repeated} twice.")
    places: list[dict[str, Any]] = [{"sparsity": value, "scope": options.scope} for value in options.sparsities]
    places += [{"pattern": value} for value in options.patterns]
    if options.scope is not None and not options.sparsities and options.patterns:
        raise InputError.sentence("--scope goes with --sparsity; an N:M pattern says by itself where it prunes.")
    places = places or [{"sparsity": DEFAULT_SPARSITY, "scope": options.scope}]
    common = {
        "model": options.model,
        "calibration": options.calibration,
        "num_samples": options.num_samples,
        "sequence_length": options.sequence_length,
        "batch_size": options.batch_size,
        "bos": options.bos,
        "device": options.device,
        "dtype": options.dtype,
        "include": list(options.include),
        "exclude": list(options.exclude),
    }
    used: set[str] = set()
    recipes = []
    for seed in range(options.seeds):
        for method in options.methods:
            mine = _settings_of(method, options.settings)
            used |= mine.keys()
            for place in places:
                said = {**common, **place, "method": method, "settings": mine or None, "seed": seed}
                try:
                    recipes.append(Recipe.read({key: value for key, value in said.items() if value is not None}))
                except InputError as error:
                    if str(error).startswith("--method "):
                        raise type(error).sentence("--methods" + str(error).removeprefix("--method")) from None
                    raise
    if unused := next((key for key in options.settings if key not in used), None):
        raise InputError("--set", unused, "METHOD.KEY=VALUE with METHOD one of " + ", ".join(options.methods))
    return recipes


def _settings_of(method: str, settings: Mapping[str, str]) -> dict[str, str]:
    """The settings that belong to a part of ``method``."""
    return {key: value for key, value in settings.items() if key.rpartition(".")[0] in method.split("+")}


def _evaluation_length(asked: int | None, source: ModelSource) -> int:
    if asked is None:
        return min(EVALUATION_LENGTH, source.context or EVALUATION_LENGTH)
    if asked < 2:
        raise InputError("--eval-length", asked, "a whole number of at least 2 (tokens)")
    if source.context is not None and asked > source.context:
        raise InputError("--eval-length", asked, f"at most {source.context}, the model's longest context")
    return asked


def _fingerprint(source: ModelSource) -> str:
    """Of the files of a local model, from their sizes, beginnings and ends; of one on the hub, its revision."""
    if source.kind == "hub":
        return source.path.name
    files = [source.path] if source.path.is_file() else sorted(source.path.iterdir())
    digest = hashlib.sha256()
    for file in files:
        if file.is_file() and file.suffix in (".gguf", ".safetensors", ".bin", ".json"):
            size = file.stat().st_size
            with file.open("rb") as opened:
                digest.update(f"{file.name} {size} ".encode() + opened.read(2**20))
                opened.seek(max(0, size - 2**20))
                digest.update(opened.read())
    return digest.hexdigest()[:16]


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


# --- The folder -------------------------------------------------------------------------------------------

#: What a difference between two commands is called.
_WORDS = {
    "model": "MODEL",
    "weights": "the weights of MODEL",
    "calibration_text": "the text of --calibration",
    "texts": "--text",
    "text_contents": "the contents of --text",
    "settings": "--set",
    "task_data": "the files of --task-data",
}


class SweepFolder:
    """The output folder of a sweep; it does nothing on disk until it is told to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.sweep = self.path / "compare.json"
        self.cells = self.path / "cells"

    @property
    def exists(self) -> bool:
        """Whether there is a sweep in the folder."""
        return self.sweep.is_file()

    def check(self) -> None:
        """Raise OutputError unless the folder is empty, can be made, or holds a sweep."""
        if not self.exists:
            RunFolder(self.path).check()

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raise OutputError, naming the difference, where the folder's sweep measures something else."""
        if not self.exists:
            return
        there = self.read_sweep()["settings"]
        for key, value in settings.items():
            if there.get(key) != value:
                what = _WORDS.get(key, "--" + key.replace("_", "-"))
                if isinstance(value, str) and len(value) == 16 and key not in ("model", "calibration"):
                    change = f"{what} changed"
                else:
                    change = f"{what} was {_said(there.get(key))} and is {_said(value)} now"
                raise OutputError.sentence(
                    f"{self.path} holds a sweep of another command: {change}. Repeat that command, with more methods "
                    "or seeds if you like, or name another folder."
                )

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Make the folder and say in it what the sweep is; clear away what a killed command left."""
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            for left in self.cells.glob(".*"):
                shutil.rmtree(left, ignore_errors=True)
            write_atomically(self.sweep, json.dumps(facts, indent=2) + "\n")
        except OSError as error:
            raise OutputError("--output", str(self.path), f"a folder that can be written ({error})") from error

    def read_sweep(self) -> dict[str, Any]:
        """What ``compare.json`` holds. Raises InputError where it is damaged or there is none."""
        found = _read_object(self.sweep)
        if not isinstance(found.get("settings"), dict):
            raise InputError.sentence(f"{self.sweep} is damaged: it says nothing of a sweep.")
        return found

    def read_cell(self, name: str) -> dict[str, Any] | None:
        """The facts of a finished cell; None where it is not finished."""
        file = self.cells / name / "run.json"
        return _read_object(file) if file.is_file() else None

    def finished(self) -> list[dict[str, Any]]:
        """The facts of all finished cells except the dense one, each with its folder's name under ``cell``."""
        names = sorted(file.parent.name for file in self.cells.glob("*/run.json"))
        kept = [name for name in names if name != "dense" and not name.startswith(".")]
        return [{**(self.read_cell(name) or {}), "cell": name} for name in kept]

    def write_cell(self, name: str, fill: Callable[[RunFolder], None]) -> None:
        """Let ``fill`` write into a folder, which becomes the cell once it has returned."""
        partial = self.cells / f".{name}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            fill(RunFolder(partial))
            shutil.rmtree(self.cells / name, ignore_errors=True)  # of a failed one that is tried again
            partial.replace(self.cells / name)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def write_results(self, cells: Sequence[Mapping[str, Any]], command: str) -> None:
        """Write the three files of results anew."""
        dense = self.read_cell("dense")
        settings = self.read_sweep()["settings"]
        content = {
            "command": command,
            "versions": versions(),
            "settings": settings,
            "dense": dense,
            "summary": [vars(one) for one in summarise(cells)],
            "cells": list(cells),
        }
        write_atomically(self.path / "results.csv", to_csv(cells))
        write_atomically(self.path / "results.md", to_markdown(cells, dense, settings, command))
        write_atomically(self.path / "results.json", json.dumps(content, indent=2) + "\n")


def _said(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, dict):
        return ",".join(str(one) for one in value.values()) or "not given"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "not given"
    return str(value)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError.sentence(f"{file} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise InputError.sentence(f"{file} is damaged: it must hold one JSON object.")
    return found


def versions() -> dict[str, str]:
    """Of Rarefy, Python and the libraries that results depend on, as far as they are installed."""
    found = {"rarefy": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors", "lm_eval"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- The sweep --------------------------------------------------------------------------------------------


class DenseWeights:
    """A copy of all that the blocks hold, on the CPU, to give it back bit for bit."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._kept = [
            (tensor, tensor.detach().to("cpu", copy=True))
            for block in blocks
            for tensor in (*block.module.parameters(), *block.module.buffers())
        ]

    def restore(self) -> None:
        """Write every tensor back in place."""
        with torch.no_grad():
            for tensor, dense in self._kept:
                tensor.copy_(dense)


def run(
    sweep: Plan,
    folder: SweepFolder,
    command: Sequence[str] = (),
    *,
    watch: Watch | None = None,
    note: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Compute the cells that are missing and write the results; returns the facts of all cells there are.

    A cell that fails is recorded with its reason, and the next one begins; it counts as finished unless
    ``sweep.retry``. ``watch`` shows how far a stage is, ``note`` what has been found.
    """
    watch = watch or _unwatched
    note = note or (lambda _: None)
    words = shlex.join(command)
    folder.begin({"settings": dict(sweep.settings), "command": words, "versions": versions()})
    todo = [cell for cell in sweep.cells if _is_missing(folder.read_cell(cell.name), sweep.retry)]
    if len(todo) < len(sweep.cells):
        note(f"{len(sweep.cells) - len(todo)} of {len(sweep.cells)} cells are there already")
    if todo or folder.read_cell("dense") is None:
        with watch("loading") as _:
            model, tokenizer = load_model(sweep.source, sweep.device, sweep.settings["dtype"])
        tokenizer = tokenizer or sweep.tokenizer
        weights = DenseWeights(find_blocks(model))
        if folder.read_cell("dense") is None:
            _measure_dense(sweep, folder, model, tokenizer, watch, note)
        states = None
        if todo:
            with watch("dense model") as progress:
                states = sweep.measures.record(model, progress)
        done = len(sweep.cells) - len(todo)
        for seed, cells in groupby(todo, key=lambda cell: cell.recipe.seed):
            weights.restore()
            windows = _windows(sweep, model, seed, watch)
            for cell in cells:
                weights.restore()
                done += 1
                label = f"[{done}/{len(sweep.cells)}] {cell.recipe.method}, {cell.pattern}, seed {seed}"
                facts = _run_cell(sweep, folder, cell, model, tokenizer, windows, states, words, label, watch)
                note(f"{label}: {_in_words(facts)}")
                folder.write_results(_in_order(sweep, folder), words)
    found = _in_order(sweep, folder)
    folder.write_results(found, words)
    return found


def _is_missing(facts: Mapping[str, Any] | None, retry: bool) -> bool:
    return facts is None or (retry and facts.get("status") == "failed")


def _in_order(sweep: Plan, folder: SweepFolder) -> list[dict[str, Any]]:
    """All finished cells: those of this command as it names them, then those of earlier ones."""
    place = {cell.name: i for i, cell in enumerate(sweep.cells)}
    return sorted(folder.finished(), key=lambda facts: (place.get(facts["cell"], len(place)), facts["cell"]))


def _windows(sweep: Plan, model: PreTrainedModel, seed: int, watch: Watch) -> Tensor:
    num, length = sweep.cells[0].recipe.window_shape
    if sweep.tokens is not None:
        return draw_windows(
            sweep.tokens, num, length, seed, sweep.bos_id, name=f"the text of {sweep.calibration.name}"
        )
    from rarefy.calibration.self_text import write_text

    with watch("writing tokens") as progress:
        return write_text(model, num, length, seed, progress=lambda done, total: progress(done, total, ""))


def _measure_dense(
    sweep: Plan,
    folder: SweepFolder,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    watch: Watch,
    note: Callable[[str], None],
) -> None:
    started = time.perf_counter()
    with watch("measuring the dense model") as progress:
        facts = sweep.measures.of(model, tokenizer, progress=progress)
    facts |= {"method": "dense", "pattern": "", "asked_sparsity": 0.0, "status": "done"}
    facts |= _texts(model, tokenizer)
    facts["seconds"] = {"evaluate": round(time.perf_counter() - started, 3)}
    folder.write_cell("dense", lambda cell: cell.write_run(facts))
    note(f"dense: {_in_words(facts)}")


def _run_cell(
    sweep: Plan,
    folder: SweepFolder,
    cell: Cell,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: Tensor,
    states: Sequence[Any] | None,
    command: str,
    label: str,
    watch: Watch,
) -> dict[str, Any]:
    """Prune, measure and write one cell; its facts."""
    recipe = cell.recipe
    facts: dict[str, Any] = {
        "command": command,
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": base_model(sweep.source.name, sweep.source.kind, sweep.source.path),
        "device": str(sweep.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        **cell.facts(),
    }
    report: Report | None = None
    try:
        with watch(f"{label}: pruning") as progress:
            report = prune(
                model,
                windows,
                pattern=recipe.build_pattern(),
                method=recipe.build_method(),
                batch_size=recipe.batch_size,
                include=recipe.include,
                exclude=recipe.exclude,
                strict=recipe.strict,
                on_progress=progress,
            )
        started = time.perf_counter()
        with watch(f"{label}: measuring") as progress:
            facts |= sweep.measures.of(model, tokenizer, states, progress)
        facts |= _texts(model, tokenizer)
        facts |= _pruned_facts(report, time.perf_counter() - started)
    except Exception as error:  # noqa: BLE001 (whatever it is, it must not cost the other cells)
        report = None
        facts |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        if sweep.device.type == "cuda":
            torch.cuda.empty_cache()

    def fill(run_folder: RunFolder) -> None:
        run_folder.write_recipe(recipe.to_yaml())
        run_folder.write_layers(report.layers if report else [])
        if report and sweep.save:
            run_folder.write_model(lambda path: save_model(model, tokenizer, path, sweep.source))
            run_folder.write_card(model_card(facts))
        run_folder.write_run(facts)

    folder.write_cell(cell.name, fill)
    return facts


def _pruned_facts(report: Report, seconds: float) -> dict[str, Any]:
    failed = [layer.name for layer in report.failed]
    error = report.relative_error
    return {
        "layers": len(report.layers),
        "failed": failed,
        "size": report.size,
        "pruned": report.pruned,
        "sparsity": report.sparsity,
        "relative_error": error if math.isfinite(error) else None,
        "peak_bytes": report.peak_bytes,
        "seconds": {"prune": round(report.seconds, 3), "evaluate": round(seconds, 3)},
        "status": "done",
        "reason": f"{report.failed[0].status}: {', '.join(failed)}" if failed else "",
    }


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    return {"texts": [{"prompt": one, "text": text} for one, text in zip(PROMPTS, write_texts(model, tokenizer))]}


def _in_words(facts: Mapping[str, Any]) -> str:
    if facts["status"] == "failed":
        return f"failed: {facts['reason']}"
    words = [
        f"perplexity {'not finite' if one['value'] is None else format(one['value'], '.2f')} on {one['label']}"
        for one in facts["perplexity"]
    ]
    words += [f"KL {one['kl']:.4f} on {one['label']}" for one in facts["divergence"] if one["kl"] is not None]
    for task, result in facts["tasks"].items():
        if (accuracy := result["metrics"].get("acc")) and accuracy["value"] is not None:
            words.append(f"{task} {accuracy['value']:.1%}")
    return ", ".join(words)


def _unwatched(_: str) -> AbstractContextManager[Progress]:
    return nullcontext(lambda done, total, note: None)
