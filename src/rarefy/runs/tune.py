"""One tuning: load, record the dense model, train, write, verify, as the command line and ``tune`` do it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.errors import ModelError, OutputError, RankError, RarefyError, VerificationError
from rarefy.models.memory import give_back, peak_bytes
from rarefy.parallel.world import World
from rarefy.pruning.stores import keep_windows, kept_windows
from rarefy.runs.card import base_model, model_card
from rarefy.runs.events import Events, Silent
from rarefy.runs.fingerprint import versions
from rarefy.runs.folder import RunFolder
from rarefy.runs.tune_facts import tuning_facts
from rarefy.runs.tune_journal import TuneJournal
from rarefy.runs.tune_masks import round_as_stored_, stored_masks, verify_masks
from rarefy.runs.tune_model import Trained, gather, is_sharded, load_trained, record_dense
from rarefy.runs.tune_plan import TunePlan, make_tune_plan
from rarefy.runs.tune_recipe import TuneRecipe
from rarefy.runs.tune_windows import joined
from rarefy.runs.verify import count_tensors, inspect_folder
from rarefy.runs.words import sparkline

if TYPE_CHECKING:
    from torch import Tensor

    from rarefy.tuning.train import Measurement, StepRecord, Tuner

#: A state is kept when this much time has passed since the last one: to write one takes seconds to minutes.
_SECONDS_BETWEEN_STATES = 600.0


@dataclass(frozen=True)
class TuneResult:
    """What a tuning left: its folder, and what ``run.json`` says of it.

    ``went_on`` is True where it had been finished before and only its journal was left to remove.
    """

    folder: RunFolder
    facts: Mapping[str, Any]
    went_on: bool = False


def tune(
    recipe: TuneRecipe | Mapping[str, Any] | str | Path,
    output: str | Path,
    *,
    allow_code: bool = False,
    events: Events | None = None,
) -> TuneResult | None:
    """Train what is kept of a pruned model against the dense one, as ``rarefy tune`` does, into folder ``output``.

    ``recipe`` is a ``TuneRecipe``, its keys in a mapping, or the path of a YAML file. What is written is an ordinary
    model folder of the same masks. A tuning that was killed goes on from the last state it kept, with the same bits
    on one process. ``allow_code``: a recipe in a file may name an optimiser that is not torch's, whose code then
    runs.

    Raises InputError for mistakes, before a model is loaded; NumericalError where the training diverges,
    VerificationError where a mask in the written files is another, RankError where another process is lost. Of
    several processes (torchrun), all call this alike; all but the first get None.
    """
    events = events or Silent()
    world = World.current()
    folder = RunFolder(output)
    with world.together():
        wanted = _recipe(recipe, allow_code)
        if world.leads:
            folder.check()
        plan = make_tune_plan(wanted)
    command = ["rarefy", "tune", "--recipe", str(folder.recipe), "-o", str(folder.path)]
    if wanted.needs_code:
        command.append("--allow-code")
    return execute_tuning(plan, folder, command, events)


def _recipe(recipe: TuneRecipe | Mapping[str, Any] | str | Path, allow_code: bool) -> TuneRecipe:
    if isinstance(recipe, TuneRecipe):
        return TuneRecipe.read(recipe.model_dump(exclude_unset=True))
    if isinstance(recipe, Mapping):
        return TuneRecipe.read(recipe)
    return TuneRecipe.read({}, Path(recipe), allow_code=allow_code)


def execute_tuning(plan: TunePlan, folder: RunFolder, command: Sequence[str], events: Events) -> TuneResult | None:
    """Carry out a plan; ``command`` is for the record. Errors are those of ``tune``."""
    world = World.current()
    if world.from_first(folder.run.is_file):
        with world.together():
            return _end_finished(plan, folder) if world.leads else None
    began = datetime.now(UTC)
    journal = TuneJournal(folder.path, world)

    def keep(error: BaseException) -> bool:
        # The same command would end in the same way unless it is the machine that fails.
        again = isinstance(error, RarefyError) and not isinstance(error, OutputError | ModelError | RankError)
        return not journal.opened or (not again and (journal.steps > 0 or journal.recorded is not None))

    with folder.writing(keep) if world.leads else nullcontext(), journal:
        try:
            return _Run(plan, folder, journal, events, world).carry_out(command, began)
        except BaseException as error:
            if not keep(error):
                journal.remove()
            elif journal.opened and journal.steps:
                events.note(f"{journal.steps:,} steps are kept, and the same command goes on from there")
            raise


def _end_finished(plan: TunePlan, folder: RunFolder) -> TuneResult:
    """Remove the journal of a tuning that was killed when nothing else was left to do."""
    if not folder.recipe.is_file() or folder.recipe.read_bytes() != plan.recipe.to_yaml().encode():
        raise OutputError("--output", str(folder.path), "a new or empty folder; this one holds another run")
    facts = folder.read_run()
    TuneJournal(folder.path).remove()
    folder.remove_partial()
    return TuneResult(folder, facts, went_on=True)


class _Run:
    """The stages of one tuning, and the seconds they took."""

    def __init__(self, plan: TunePlan, folder: RunFolder, journal: TuneJournal, events: Events, world: World) -> None:
        self.plan, self.folder, self.journal, self.events, self.world = plan, folder, journal, events, world
        self.seconds: dict[str, float] = {}
        self._clock = self._started = time.perf_counter()
        self._state_kept = time.monotonic()

    def carry_out(self, command: Sequence[str], began: datetime) -> TuneResult | None:
        """All stages in their order."""
        windows, held_out = self._windows()
        self.journal.open(self.plan.fingerprint(windows))
        if self.world.leads and any(text.windows is None for text in self.plan.texts):
            keep_windows(self.folder.path, windows)
        recorded = record_dense(self.plan, self.journal, windows, self.events, self.world)
        self._lap("record")
        trained = load_trained(self.plan, self.journal, windows, held_out, recorded, self.world)
        self._lap("load")
        self._train(trained.tuner)
        self._lap("tune")
        written = self._finish(trained)
        peak = max(self.world.gather(peak_bytes(self.plan.device)))
        self.world.leave()
        if not self.world.leads:
            return None
        facts = self._facts(trained, command, began, held_out, written)
        facts |= self._write(trained)
        del trained
        give_back()
        facts["tensors"] = self._verify()
        self._lap("verify")
        facts |= {"peak_bytes": max(peak, peak_bytes(self.plan.device)), "processes": self.world.size}
        self.folder.write_card(model_card(facts))
        facts |= {"finished": _iso(datetime.now(UTC))}
        facts |= {"seconds": {**self.seconds, "total": round(time.perf_counter() - self._started, 3)}}
        self.folder.write_run(facts)
        self.journal.remove()
        return TuneResult(self.folder, facts)

    def _lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._clock, 3)
        self._clock = now

    # --- Stages --------------------------------------------------------------------------------------------

    def _windows(self) -> tuple[Tensor, int]:
        """All windows, and how many of the last are held out; the dense model writes those of the source ``self``."""
        texts = self.plan.texts
        held_out = sum(text.held_out for text in texts)
        if all(text.windows is not None for text in texts):
            return joined(texts)

        def write() -> Tensor:
            found = kept_windows(self.folder.path)
            if found is None:
                from rarefy.calibration.self_text import write_text
                from rarefy.models.checkpoint import load_model

                model, _ = load_model(self.plan.dense, self.plan.device)
                length = self.plan.recipe.sequence_length
                assert length is not None
                with self.events.watch("writing tokens") as watch:
                    found, _ = joined(
                        [
                            text.written_by(lambda num, seed: write_text(model, num, length, seed, progress=watch))
                            for text in texts
                        ]
                    )
            return found

        return self.world.from_first(write), held_out

    def _train(self, tuner: Tuner) -> None:
        """Train, keep states on the way, and end with the best one."""
        from rarefy.tuning.masks import keep_zeros

        if tuner.step:
            self.events.note(f"{tuner.step:,} of {tuner.num_steps:,} steps are there; the tuning goes on from there")
        with self.events.watch("tuning") as watch:

            def after_step(record: StepRecord) -> None:
                best = tuner.best
                held = f", held out {best.kl:.4f} at best" if best else ""
                bars = sparkline([one.kl for one in tuner.records])
                watch(record.step, tuner.num_steps, f"KL {record.kl:.4f} nats {bars}{held}")

            def after_measurement(measurement: Measurement, is_best: bool) -> None:
                if is_best:
                    self.journal.keep_best(measurement.step, tuner.values())
                self.events.log(
                    f"tuning: step {measurement.step:,}, held out: KL {measurement.kl:.4f} nats, loss of the text "
                    f"{measurement.text_loss:.4f} nats{', the best so far' if is_best else ''}"
                )

            def at_rest() -> None:
                due = time.monotonic() - self._state_kept >= _SECONDS_BETWEEN_STATES
                if self.world.from_first(lambda: due or tuner.step == 0):
                    self.journal.keep_state(tuner.step, tuner.state())
                    self._state_kept = time.monotonic()

            # A model from which blocks or neurons were taken out may have no zeros to keep.
            keeps = self.plan.recipe.parametrisation == "full" and any(record.pruned for record in self.plan.records)
            with keep_zeros(tuner.model) if keeps else nullcontext():
                tuner.run(after_step, after_measurement, at_rest)
        best = tuner.best
        if best is not None and best.step != tuner.step and (values := self.journal.best()) is not None:
            tuner.set_values(values)
            self.events.note(
                f"the state after step {best.step:,} of {tuner.step:,} is the best on the held-out windows"
            )

    def _finish(self, trained: Trained) -> Measurement | None:
        """Ordinary weights, rounded as they are stored; the held-out windows as measured with these."""
        from rarefy.tuning.parametrise import merge_parametrisation

        if is_sharded(self.plan.recipe, self.world):
            gather(self.plan, trained, self.world)
        tuner = trained.tuner
        merge_parametrisation(self.plan.recipe.parametrisation, tuner.model)
        with self.world.together(), torch.no_grad():
            if not self.world.leads:
                return None
            if raised := round_as_stored_(tuner.model, stored_masks(self.plan.source), trained.dtypes):
                self.events.note(f"{raised:,} kept weights would be stored as 0 and are the smallest number instead")
            return tuner.measure() if tuner.measurements else None

    # --- What is written -----------------------------------------------------------------------------------

    def _write(self, trained: Trained) -> dict[str, Any]:
        """Write recipe, records and model; returns the texts that the model writes, for ``run.json``."""
        from rarefy.models.saving import save_model
        from rarefy.runs.texts import texts_for_report

        model, tokenizer = trained.tuner.model, trained.tokenizer
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(trained.dtypes[name])
        texts = texts_for_report(model, tokenizer, self.events)
        self.folder.remove_partial()
        self.folder.write_recipe(self.plan.recipe.to_yaml())
        self.folder.write_layers(self.plan.records)
        self.folder.write_model(lambda path: save_model(model, tokenizer, path, self.plan.source))
        self._lap("write")
        return {"texts": texts, "dense_texts": list(self.plan.facts.get("dense_texts", []))}

    def _verify(self) -> dict[str, int]:
        """Read the written files again: promises first, then every mask against that of the files before.

        Returns how many tensors of each kind they hold. Raises VerificationError.
        """
        from rarefy.models.source import resolve_model

        inspection = inspect_folder(self.folder.model, source=self.plan.source)
        if inspection.problems:
            raise VerificationError(f"The written files do not hold what was promised: {inspection.problems[0]}.")
        verify_masks(self.plan.source, resolve_model(str(self.folder.model)))
        return count_tensors(inspection.tensors)

    def _facts(
        self,
        trained: Trained,
        command: Sequence[str],
        began: datetime,
        held_out: int,
        written: Measurement | None,
    ) -> dict[str, Any]:
        """What ``run.json`` and the model card say of a tuning."""
        plan, recipe = self.plan, self.plan.recipe
        size, pruned = (sum(getattr(record, key) for record in plan.records) for key in ("size", "pruned"))
        dense = plan.dense
        return {
            "command": shlex.join(command),
            "versions": versions(),
            "started": _iso(began),
            "base_model": plan.facts.get("base_model") or base_model(dense.name, dense.kind, dense.path),
            "method": f"{plan.facts.get('method', 'pruned')}+tune",
            "paper": plan.facts.get("paper", ""),
            "pattern": plan.pattern,
            "pattern_spec": plan.facts.get("pattern_spec", {}),
            "pattern_words": plan.facts.get("pattern_words", plan.pattern),
            "layers": len(plan.records),
            "failed": [],
            "size": size,
            "pruned": pruned,
            "sparsity": pruned / size,
            "relative_error": None,
            "balanced_error": None,
            "seed": recipe.seed,
            "device": str(plan.device),
            "dtype": str(next(iter(trained.dtypes.values()))).removeprefix("torch."),
            "calibration": {
                "source": ", ".join(recipe.calibration),
                "num_samples": recipe.num_samples,
                "sequence_length": recipe.sequence_length,
                "bos": recipe.bos,
            },
            "tuning": tuning_facts(recipe, trained, plan.precision, held_out, written),
            "perplexity": [],
        }


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
