"""One pruning run: load, calibrate, prune, write, read again.

Nothing is left of a run that fails, but what it takes to go on after a kill, an interrupt or a full disk.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rarefy.cli.held import OnDisk, Whole
from rarefy.cli.plan import Plan, calibration_words
from rarefy.cli.terminal import Terminal, print_table
from rarefy.cli.words import memory_words
from rarefy.distributed import World
from rarefy.errors import InputError, ModelError, OutputError, RankError, RarefyError, VerificationError
from rarefy.identity import versions
from rarefy.report.records import Report, three_digits
from rarefy.run_folder import RunFolder

if TYPE_CHECKING:
    import torch

    from rarefy.progress import Fingerprint, Progress
    from rarefy.pruning import Home


def run(
    plan: Plan, folder: RunFolder, command: list[str], terminal: Terminal, chosen: bool, texts: bool = True
) -> None:
    """Load, prune, write, read again; ``chosen`` says whether the user named the calibration.

    ``texts``: the dense and the pruned model write some for the report.

    What is finished of a run that was killed is taken over from ``folder``.
    """
    from rarefy.devices import peak_bytes
    from rarefy.report.card import model_card

    world = World.current()
    if world.from_first(folder.run.is_file):
        with world.together():
            if world.leads:
                _end_finished(plan, folder)
        return
    began = datetime.now(UTC)
    clock = _Clock()
    with clock.stage("load"), world.together():
        model = OnDisk.where_possible(plan, terminal) or Whole(plan, terminal)
    terminal.note(calibration_words(plan.recipe) + ("" if chosen else " (the default)"))
    with clock.stage("texts"), world.together():
        if world.leads and texts:
            model.write_dense_texts()
    with clock.stage("calibrate"):
        windows = world.from_first(lambda: plan.windows if plan.windows is not None else model.own_text())
    with _journal(plan, folder, windows, terminal, world) as progress:
        with clock.stage("prune"):
            with world.together():
                home = model.home(progress)
            report = _prune(plan, home, windows, terminal)
        peak = max(world.gather(peak_bytes(plan.device)))
        world.leave()
        if not world.leads:  # what is left to do is for one
            model.close()
            return
        with clock.stage("write"):
            folder.remove_partial_files()
            folder.write_recipe(plan.recipe.to_yaml())
            folder.write_layers(report.layers)
            model.write(folder, progress)
        with clock.stage("verify"):
            _verify(folder)
        if texts:
            with clock.stage("texts"):
                model.write_texts(folder)
        peak = max(peak, peak_bytes(plan.device))
        facts = _facts(plan, report, command, began, model.dtype) | model.texts
        facts |= {"processes": world.size, "peak_bytes": peak}
        folder.write_card(model_card(facts))
        folder.write_run({**facts, "finished": _iso(datetime.now(UTC)), "seconds": clock.total()})
        progress.remove()
    title = f"{report.method}, {report.pattern}: {report.pruned:,} of {report.size:,} weights are zero"
    print_table(report.rows(), title)
    for layer in report.failed:
        terminal.warn(f"{layer.name}: {layer.status}")
    print(f"{folder.model} holds the model; its files were read again and hold every promised zero")
    terminal.note(f"peak memory: {memory_words(peak)} on {plan.device}{_of_each(world)}")
    terminal.log(f"{title}, relative error {three_digits(report.relative_error)}; {folder.model} holds the model")


def _prune(plan: Plan, home: Home, windows: torch.Tensor, terminal: Terminal) -> Report:
    from rarefy.progress import finished_blocks
    from rarefy.pruning import prune_blocks

    if home.finished:
        terminal.note(f"{finished_blocks(home.finished)} there; the run goes on with the next")
    linears = [(block.index, site.name) for block in plan.blocks for site in block.sites]
    with terminal.watch("pruning", [each for each in linears if each[0] >= home.finished]) as watch:
        return prune_blocks(home, windows, plan.recipe.prune_settings(), watch, watch.layer)


@contextmanager
def _journal(
    plan: Plan, folder: RunFolder, windows: torch.Tensor, terminal: Terminal, world: World
) -> Iterator[Progress]:
    """The open journal of the run, which stays after an error where it is worth going on from, and only then."""
    from rarefy.homes import keep_windows
    from rarefy.progress import Progress, finished_blocks

    progress = Progress(folder.path, world.leads)
    fingerprint = _agreed(world, plan, windows)
    opened = False

    def keep(error: BaseException) -> bool:
        # Again the same command would end in the same way where it is not the machine that fails.
        again = isinstance(error, RarefyError) and not isinstance(error, OutputError | ModelError | RankError)
        return not opened or (progress.finished > 0 and not again)

    with folder.writing(keep) if world.leads else nullcontext():
        with world.together():
            progress.open(fingerprint)
        opened = True
        try:
            with progress.keeping():
                position = world.from_first(lambda: progress.position)
                with world.together():
                    progress.follow(position)
                    if plan.windows is None and world.leads:
                        keep_windows(folder.path, windows)
                yield progress
        except BaseException as error:
            if not keep(error):
                progress.remove()
            elif not isinstance(error, OutputError | RankError):  # which say it
                terminal.note(f"{finished_blocks(progress.finished)} kept, and the same command goes on from there")
            raise
        finally:
            progress.close()


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


def _of_each(world: World) -> str:
    return "" if world.size == 1 else f", the most of {world.size} processes"


def _end_finished(plan: Plan, folder: RunFolder) -> None:
    """End a run that was killed when there was nothing left to do but to remove its journal.

    Raises OutputError where it was another run.
    """
    from rarefy.progress import Progress

    if not folder.recipe.is_file() or folder.recipe.read_text(encoding="utf-8") != plan.recipe.to_yaml():
        raise OutputError("--output", str(folder.path), "a new or empty folder; this one holds another run")
    Progress(folder.path).remove()
    print(f"{folder.model} holds the model; the run had been finished")


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
        "versions": versions(),
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
