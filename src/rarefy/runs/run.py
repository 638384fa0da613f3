"""One pruning run: load, calibrate, prune, write, verify, as the command line and ``rarefy.run`` do it.

A run that fails takes back what it wrote, except for what the same call needs to go on after a kill, an
interrupt or a full disk: the finished blocks in ``OUT/unfinished`` (journal.py).
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.errors import InputError, ModelError, OutputError, RankError, RarefyError, VerificationError
from rarefy.models.memory import peak_bytes
from rarefy.parallel.world import World
from rarefy.pruning.loop import prune_blocks
from rarefy.pruning.precision import compute_words
from rarefy.pruning.records import Report
from rarefy.pruning.stores import keep_windows
from rarefy.runs.card import base_model, model_card
from rarefy.runs.events import Events, Silent
from rarefy.runs.fingerprint import Fingerprint, versions
from rarefy.runs.folder import RunFolder
from rarefy.runs.journal import Journal, finished_blocks
from rarefy.runs.make_plan import make_plan
from rarefy.runs.memory import estimated_bytes
from rarefy.runs.model import RunModel, open_model
from rarefy.runs.plan import Plan, calibration_words, pattern_facts
from rarefy.runs.recipe import Recipe
from rarefy.runs.verify import count_tensors, inspect_folder

if TYPE_CHECKING:
    from rarefy.models.source import ModelSource
    from rarefy.pruning.stores import BlockStore


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, one record per layer, and what ``run.json`` says of it.

    ``went_on`` is True where the run had been finished before and only its journal was left to remove.
    """

    folder: RunFolder
    report: Report
    facts: Mapping[str, Any]
    went_on: bool = False


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path,
    *,
    offload_dir: str | Path | None = None,
    texts: bool = True,
    allow_code: bool = False,
    events: Events | None = None,
) -> RunResult | None:
    """Prune a model as ``rarefy prune`` does, and write it with all that was done to the folder ``output``.

    ``recipe`` is a ``Recipe``, its keys in a mapping, or the path of a YAML file. The model stays on disk and
    is read and written block by block where its files allow that; ``offload_dir`` keeps hidden states in a
    file, too. ``texts``: the dense and the pruned model write three texts for the report. ``allow_code``: a recipe
    in a file may name a method that is not Rarefy's, whose code then runs. ``events`` hears of notes, warnings and
    progress. A run that was killed goes on where it was, if the same call is repeated.
    The written files are read again at the end.

    Raises InputError for mistakes, before anything is loaded or written; NumericalError for NaN or infinity,
    VerificationError where a written file breaks a promise, RankError where another process is lost. Of
    several processes (torchrun), all call this alike; all but the first get None.
    """
    events = events or Silent()
    world = World.current()
    folder = RunFolder(output)
    with world.together():
        wanted = _recipe(recipe, allow_code)
        if world.leads:
            folder.check()
        plan = make_plan(wanted, folder.path, Path(offload_dir) if offload_dir is not None else None)
    for warning in plan.warnings:
        events.warn(warning)
    command = ["rarefy", "prune", "--recipe", str(folder.recipe), "-o", str(folder.path)]
    if ":" in wanted.method:
        command.append("--allow-code")
    return execute(plan, folder, command, events, chosen=wanted.calibration is not None, texts=texts)


@dataclass(frozen=True)
class Forecast:
    """What a run would do: its plan, the weights that it would prune, and about the most memory that it takes.

    ``size`` counts the weights of all layers to prune, ``pruned`` those that become zero. ``peak_bytes`` is an
    estimate for the device of the run, of each process.
    """

    plan: Plan
    size: int
    pruned: int
    peak_bytes: int


def forecast(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    offload_dir: str | Path | None = None,
    texts: bool = True,
    allow_code: bool = False,
) -> Forecast:
    """Check a run as ``run`` does, without loading weights or writing anything; arguments and errors are those."""
    plan = make_plan(_recipe(recipe, allow_code), offload=Path(offload_dir) if offload_dir is not None else None)
    return forecast_of(plan, texts)


def forecast_of(plan: Plan, texts: bool) -> Forecast:
    """The forecast of a plan; ``texts``: the models write some for the report."""
    sites = [site for block in plan.blocks for site in block.sites]
    size = sum(site.shape[0] * site.shape[1] for site in sites)
    kept = sum(plan.pattern_of(site).count(site.shape) for site in sites)
    return Forecast(plan, size, size - kept, estimated_bytes(plan, texts))


def _recipe(recipe: Recipe | Mapping[str, Any] | str | Path, allow_code: bool) -> Recipe:
    if isinstance(recipe, Recipe):
        return Recipe.read(recipe.model_dump(exclude_unset=True))
    if isinstance(recipe, Mapping):
        return Recipe.read(recipe)
    return Recipe.read({}, Path(recipe), allow_code=allow_code)


def execute(
    plan: Plan, folder: RunFolder, command: Sequence[str], events: Events, *, chosen: bool, texts: bool
) -> RunResult | None:
    """Carry out a plan; ``chosen`` says whether the user named the calibration, ``command`` is for the record.

    What is finished of a run that was killed is taken over from ``folder``. Errors are those of ``run``.
    """
    world = World.current()
    if world.from_first(folder.run.is_file):
        with world.together():
            return _end_finished(plan, folder) if world.leads else None
    began = datetime.now(UTC)
    clock = _Clock()
    with clock.stage("load"), world.together():
        model = open_model(plan, events)
    events.note(calibration_words(plan.recipe) + ("" if chosen else " (the default)"))
    if words := compute_words(model.dtype, plan.device):
        events.note(words)
    with clock.stage("texts"), world.together():
        if world.leads and texts:
            model.write_dense_texts()
    with clock.stage("calibrate"):
        windows = world.from_first(lambda: plan.windows if plan.windows is not None else model.own_text())
    with _journal(plan, folder, windows, events, world) as journal:
        with clock.stage("prune"):
            with world.together():
                store = model.store(journal)
            report = _prune(plan, store, windows, events)
        peak = max(world.gather(peak_bytes(plan.device)))
        world.leave()
        if not world.leads:  # the first process does what is left
            model.close()
            return None
        facts = _write(plan, folder, model, journal, report, events, clock, texts)
        facts = _facts(plan, report, command, began, model.dtype) | facts
        facts |= {"processes": world.size, "peak_bytes": max(peak, peak_bytes(plan.device))}
        folder.write_card(model_card(facts))
        facts |= {"finished": _iso(datetime.now(UTC)), "seconds": clock.total()}
        folder.write_run(facts)
        journal.remove()
    return RunResult(folder, report, facts)


def _write(
    plan: Plan,
    folder: RunFolder,
    model: RunModel,
    journal: Journal,
    report: Report,
    events: Events,
    clock: _Clock,
    texts: bool,
) -> dict[str, Any]:
    """Write recipe, records and model, verify the files, and let the models write; what ``run.json`` says of it."""
    with clock.stage("write"):
        folder.remove_partial()
        folder.write_recipe(plan.recipe.to_yaml())
        folder.write_layers(report.layers)
        model.write(folder, journal)
    with clock.stage("verify"):
        tensors = _verify(folder, plan.source)
    if texts:
        with clock.stage("texts"):
            model.write_texts(folder)
    return {"tensors": tensors, **model.texts}


def _prune(plan: Plan, store: BlockStore, windows: torch.Tensor, events: Events) -> Report:
    if store.finished:
        events.note(f"{finished_blocks(store.finished)} there; the run goes on with the next")
    linears = [(block.index, site.name) for block in plan.blocks for site in block.sites]
    with events.watch("pruning", [each for each in linears if each[0] >= store.finished]) as stage:
        return prune_blocks(store, windows, plan.recipe.prune_settings(plan.pattern_of), stage, stage.layer)


@contextmanager
def _journal(plan: Plan, folder: RunFolder, windows: torch.Tensor, events: Events, world: World) -> Iterator[Journal]:
    """The open journal of the run, which stays after an error where the run can go on, and only then."""
    journal = Journal(folder.path, world.leads)
    fingerprint = _agreed(world, plan, windows)
    opened = False

    def keep(error: BaseException) -> bool:
        # The same command would end in the same way unless it is the machine that fails.
        again = isinstance(error, RarefyError) and not isinstance(error, OutputError | ModelError | RankError)
        return not opened or (journal.goes_on and not again)

    with folder.writing(keep) if world.leads else nullcontext():
        with world.together():
            journal.open(fingerprint)
        opened = True
        try:
            with journal.keeping():
                position = world.from_first(lambda: journal.position)
                with world.together():
                    journal.follow(position)
                    if plan.windows is None and world.leads:
                        keep_windows(folder.path, windows)
                yield journal
        except BaseException as error:
            if not keep(error):
                journal.remove()
            elif not isinstance(error, OutputError | RankError):  # whose sentences say it
                events.note(f"{journal.kept_words} kept, and the same command goes on from there")
            raise
        finally:
            journal.close()


def _agreed(world: World, plan: Plan, windows: torch.Tensor) -> Fingerprint:
    """The fingerprint of the run. Raises InputError where it is not the same for all processes."""
    with world.together():
        mine = plan.fingerprint(windows)
    first, *others = world.gather(mine)
    for rank, other in enumerate(others, start=1):
        if difference := first.difference(other):
            raise InputError.sentence(
                f"The processes are not at the same run: that of process 0 is one {difference} as for process {rank}."
            )
    return mine


def _end_finished(plan: Plan, folder: RunFolder) -> RunResult:
    """Remove the journal of a run that was killed when nothing else was left to do.

    Raises OutputError where the folder holds another run.
    """
    if not folder.recipe.is_file() or folder.recipe.read_bytes() != plan.recipe.to_yaml().encode():
        raise OutputError("--output", str(folder.path), "a new or empty folder; this one holds another run")
    facts = folder.read_run()
    report = Report(folder.read_layers(), str(facts.get("pattern", "")), str(facts.get("method", "")))
    Journal(folder.path).remove()
    folder.remove_partial()
    return RunResult(folder, report, facts, went_on=True)


def _verify(folder: RunFolder, source: ModelSource) -> dict[str, int]:
    """Read the written files again; how many tensors of each kind they hold. Raises VerificationError."""
    inspection = inspect_folder(folder.model, source=source)
    if problems := inspection.problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise VerificationError(f"The written files do not hold what was promised: {problems[0]}{more}.")
    return count_tensors(inspection.tensors)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _facts(plan: Plan, report: Report, command: Sequence[str], began: datetime, dtype: torch.dtype) -> dict[str, Any]:
    """What ``run.json`` and the model card say of a run."""
    recipe = plan.recipe
    return {
        "command": shlex.join(command),
        "versions": versions(),
        "started": _iso(began),
        "base_model": base_model(plan.source.name, plan.source.kind, plan.source.path),
        "method": report.method,
        "paper": plan.method.paper,
        "pattern": report.pattern,
        **pattern_facts(plan.recipe, plan.pattern_of),
        "allocation": recipe.allocation,
        "row_weights": recipe.row_weights,
        "layers": len(report.layers),
        "failed": [layer.name for layer in report.failed],
        "size": report.size,
        "pruned": report.pruned,
        "sparsity": report.sparsity,
        "relative_error": report.relative_error if math.isfinite(report.relative_error) else None,
        "balanced_error": report.balanced_error if math.isfinite(report.balanced_error) else None,
        "seed": recipe.seed,
        "device": str(plan.device),
        "dtype": str(dtype).removeprefix("torch."),
        "compute_dtype": report.compute_dtype,
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
        """Seconds of all stages so far, and of the whole run."""
        return {**self.seconds, "total": round(time.perf_counter() - self._started, 3)}
