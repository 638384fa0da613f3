"""One pruning run: load, calibrate, prune, write, read again; nothing is left of a run that fails."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rarefy import __version__
from rarefy.cli.plan import Plan, calibration_words
from rarefy.cli.terminal import Terminal, print_table
from rarefy.errors import VerificationError
from rarefy.report.records import Report, three_digits
from rarefy.run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rarefy.recipe import Recipe


def run(plan: Plan, folder: RunFolder, command: list[str], terminal: Terminal, chosen: bool) -> None:
    """Load, prune, write, read again; ``chosen`` says whether the user named the calibration."""
    from rarefy.models.checkpoint import load_model, save_model
    from rarefy.pruning import prune as prune_model
    from rarefy.report.card import model_card

    recipe, source = plan.recipe, plan.source
    began = datetime.now(UTC)
    clock = _Clock()
    with clock.stage("load"):
        model, tokenizer = load_model(source, plan.device, recipe.dtype)
    terminal.note(calibration_words(recipe) + ("" if chosen else " (the default)"))
    with clock.stage("texts"):
        texts = {"dense_texts": _texts(model, tokenizer, terminal)}
    with clock.stage("calibrate"):
        windows = plan.windows if plan.windows is not None else _own_text(model, recipe, terminal)
    linears = [(block.index, site.name) for block in plan.blocks for site in block.sites]
    with clock.stage("prune"), terminal.watch("pruning", linears) as watch:
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
            on_layer=watch.layer,
        )
    with clock.stage("texts"):
        texts["texts"] = _texts(model, tokenizer, terminal)
    with folder.writing():
        with clock.stage("write"):
            folder.write_recipe(recipe.to_yaml())
            folder.write_layers(report.layers)
            facts = _facts(plan, report, command, began, model.dtype) | texts

            folder.write_model(lambda path: save_model(model, tokenizer, path, source))
            folder.write_card(model_card(facts))
        with clock.stage("verify"):
            _verify(folder)
        folder.write_run({**facts, "finished": _iso(datetime.now(UTC)), "seconds": clock.total()})
    title = f"{report.method}, {report.pattern}: {report.pruned:,} of {report.size:,} weights are zero"
    print_table(report.rows(), title)
    for layer in report.failed:
        terminal.warn(f"{layer.name}: {layer.status}")
    print(f"{folder.model} holds the model; its files were read again and hold every promised zero")
    terminal.log(f"{title}, relative error {three_digits(report.relative_error)}; {folder.model} holds the model")


def _texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, terminal: Terminal
) -> list[dict[str, str]]:
    """What the model writes after three prompts, for the report; nothing where it cannot."""
    from rarefy.evaluation.texts import kept_texts

    try:
        with terminal.watch("writing texts"):
            return kept_texts(model, tokenizer)
    except Exception as error:  # noqa: BLE001 (a picture in a report must not cost the run)
        terminal.warn(f"the model writes no texts for the report: {' '.join(str(error).split())}")
        return []


def _own_text(model: PreTrainedModel, recipe: Recipe, terminal: Terminal) -> torch.Tensor:
    from rarefy.calibration.self_text import write_text

    with terminal.watch("writing tokens") as watch:
        return write_text(model, *recipe.window_shape, recipe.seed, progress=watch)


def _verify(folder: RunFolder) -> None:
    from rarefy.evaluation.verify import inspect_folder

    problems = inspect_folder(folder.model).problems
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise VerificationError(f"The written files do not hold what was promised: {problems[0]}{more}.")


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _facts(plan: Plan, report: Report, command: list[str], began: datetime, dtype: torch.dtype) -> dict[str, Any]:
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


class _Clock:
    """Seconds of each stage of a run, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time within as stage ``name``, or add it to that of the same stage before."""
        started = time.perf_counter()
        try:
            yield
        finally:
            before = self.seconds.get(name, 0.0)
            self.seconds[name] = round(before + time.perf_counter() - started, 3)

    def total(self) -> dict[str, float]:
        """All stages so far and the time since the beginning."""
        return {**self.seconds, "total": round(time.perf_counter() - self._started, 3)}
