"""One run of ``rarefy shrink``: load, choose, remove, repair, write, verify, for the command line and Python."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.errors import OutputError, RarefyError, VerificationError
from rarefy.models.memory import give_back, peak_bytes
from rarefy.runs.card import base_model, model_card
from rarefy.runs.events import Events, Silent
from rarefy.runs.fingerprint import versions
from rarefy.runs.folder import RunFolder
from rarefy.runs.plan import calibration_words
from rarefy.runs.shrink_journal import ShrinkJournal
from rarefy.runs.shrink_model import Smaller, check_weights, make_smaller
from rarefy.runs.shrink_plan import ShrinkPlan, make_shrink_plan
from rarefy.runs.shrink_recipe import ShrinkRecipe
from rarefy.runs.verify import count_tensors, inspect_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Tokens on which what is written is compared with what is in memory.
_PROBE = 32
#: How far their logits may be apart, as a share: the same weights, on the same machine.
_SAME = 1e-3


@dataclass(frozen=True)
class ShrinkResult:
    """What a run left: its folder, and what ``run.json`` says of it.

    ``went_on`` is True where it had been finished before and only its journal was left to remove.
    """

    folder: RunFolder
    facts: Mapping[str, Any]
    went_on: bool = False


def shrink(
    recipe: ShrinkRecipe | Mapping[str, Any] | str | Path, output: str | Path, *, events: Events | None = None
) -> ShrinkResult:
    """Remove blocks, KV heads and MLP neurons of a model, as ``rarefy shrink`` does, into folder ``output``.

    ``recipe`` is a ``ShrinkRecipe``, its keys in a mapping, or the path of a YAML file. What is written is the
    ordinary folder of a smaller model, which needs no Rarefy. A run that was killed goes on with all that it had
    measured and the blocks that it had repaired, and ends with the same bits.

    Raises InputError for mistakes, before a model is loaded, ModelError where a removal has no stock form,
    VerificationError where the written model is not the one in memory.
    """
    folder = RunFolder(output)
    if isinstance(recipe, Mapping):
        recipe = ShrinkRecipe.read(recipe)
    elif not isinstance(recipe, ShrinkRecipe):
        recipe = ShrinkRecipe.read({}, Path(recipe))
    folder.check()
    plan = make_shrink_plan(recipe)
    command = ["rarefy", "shrink", "--recipe", str(folder.recipe), "-o", str(folder.path)]
    return execute_shrinking(plan, folder, command, events or Silent())


def execute_shrinking(
    plan: ShrinkPlan, folder: RunFolder, command: Sequence[str], events: Events, texts: bool = True
) -> ShrinkResult:
    """Carry out a plan; ``command`` is for the record, ``texts``: the models write some for the report.

    Errors are those of ``shrink``.
    """
    if folder.run.is_file():
        return _end_finished(plan, folder)
    journal = ShrinkJournal(folder.path)

    def keep(error: BaseException) -> bool:
        # The same command would end in the same way unless it is the machine that fails.
        again = isinstance(error, RarefyError) and not isinstance(error, OutputError)
        return not journal.opened or (journal.has_something and not again)

    with folder.writing(keep), journal:
        try:
            journal.open(plan.fingerprint())
            return _Run(plan, folder, journal, events, texts).carry_out(command)
        except BaseException as error:
            if not keep(error):
                journal.remove()
            elif journal.opened and not isinstance(error, OutputError):
                events.note("what has been measured is kept, and the same command goes on from there")
            raise


def _end_finished(plan: ShrinkPlan, folder: RunFolder) -> ShrinkResult:
    """Remove the journal of a run that was killed when nothing else was left to do."""
    if not folder.recipe.is_file() or folder.recipe.read_bytes() != plan.recipe.to_yaml().encode():
        raise OutputError("--output", str(folder.path), "a new or empty folder; this one holds another run")
    facts = folder.read_run()
    ShrinkJournal(folder.path).remove()
    folder.remove_partial()
    return ShrinkResult(folder, facts, went_on=True)


class _Run:
    """The stages of one run, and the seconds they took."""

    def __init__(
        self, plan: ShrinkPlan, folder: RunFolder, journal: ShrinkJournal, events: Events, texts: bool
    ) -> None:
        self.plan, self.folder, self.journal, self.events, self.texts = plan, folder, journal, events, texts
        self.seconds: dict[str, float] = {}
        self._clock = self._started = time.perf_counter()

    def carry_out(self, command: Sequence[str]) -> ShrinkResult:
        """All stages in their order."""
        from rarefy.models.checkpoint import load_model

        began, plan, recipe = datetime.now(UTC), self.plan, self.plan.recipe
        model, tokenizer = load_model(plan.source, plan.device, recipe.dtype)
        dtype = model.dtype
        check_weights(model, recipe.model)
        self.events.note(calibration_words(recipe))
        self._lap("load")
        dense_texts = self._texts_of(model, tokenizer)
        if self.journal.has_something:
            self.events.note("the run goes on with what has been measured before")
        windows = self._windows(model)
        self._lap("text")
        smaller = make_smaller(
            model, windows, plan, self.events.watch, memo=self.journal.memo, finished=self.journal, lap=self._lap
        )
        model = smaller.model
        texts = self._texts_of(model, tokenizer)
        self._write(model, tokenizer)
        self._lap("write")
        tensors = self._verify(model, windows[:1, :_PROBE])
        self._lap("verify")
        facts = self._facts(command, began, smaller, windows)
        facts |= {"dtype": str(dtype).removeprefix("torch.")}
        facts |= {"tensors": tensors, "dense_texts": dense_texts, "texts": texts}
        facts |= {"peak_bytes": peak_bytes(plan.device), "finished": _iso(datetime.now(UTC))}
        facts |= {"seconds": {**self.seconds, "total": round(time.perf_counter() - self._started, 3)}}
        self.folder.write_card(model_card(facts))
        self.folder.write_run(facts)
        self.journal.remove()
        return ShrinkResult(self.folder, facts)

    def _lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._clock, 3)
        self._clock = now

    def _texts_of(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[dict[str, str]]:
        """What a model writes after three prompts, for the report; nothing where it cannot."""
        from rarefy.runs.texts import texts_for_report

        return texts_for_report(model, tokenizer, self.events) if self.texts else []

    def _windows(self, model: PreTrainedModel) -> Tensor:
        if self.plan.windows is not None:
            return self.plan.windows
        if (found := self.journal.windows()) is not None:
            return found
        from rarefy.calibration.self_text import write_text

        recipe = self.plan.recipe
        assert recipe.num_samples is not None
        assert recipe.sequence_length is not None
        with self.events.watch("writing tokens") as watch:
            found = write_text(model, recipe.num_samples, recipe.sequence_length, recipe.seed, progress=watch)
        self.journal.keep_windows(found)
        return found

    def _write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        from rarefy.models.saving import save_other_model

        self.folder.remove_partial()
        self.folder.write_recipe(self.plan.recipe.to_yaml())
        self.folder.write_layers([])  # no zeros are promised
        self.folder.write_model(lambda path: save_other_model(model, tokenizer, path, self.plan.source))

    def _verify(self, model: PreTrainedModel, ids: Tensor) -> dict[str, int]:
        """Load what was written as anybody would, and compare its logits; how many tensors of each kind there are.

        Raises VerificationError.
        """
        from rarefy.models.checkpoint import load_model
        from rarefy.models.source import resolve_model

        written, _ = load_model(resolve_model(str(self.folder.model)), self.plan.device)
        with torch.no_grad():
            ours, theirs = (
                one(input_ids=ids.to(one.device), use_cache=False).logits.float() for one in (model, written)
            )
        del written
        give_back()
        if not float((ours - theirs).norm()) <= _SAME * float(ours.norm()):
            raise VerificationError("The written files do not hold the model that is in memory.")
        inspection = inspect_folder(self.folder.model)
        if inspection.problems:
            raise VerificationError(f"The written files do not hold what was promised: {inspection.problems[0]}.")
        return count_tensors(inspection.tensors)

    def _facts(self, command: Sequence[str], began: datetime, smaller: Smaller, windows: Tensor) -> dict[str, Any]:
        """What ``run.json`` and the model card say."""
        plan, recipe, source = self.plan, self.plan.recipe, self.plan.source
        return {
            "command": shlex.join(command),
            "versions": versions(),
            "started": _iso(began),
            "base_model": base_model(source.name, source.kind, source.path),
            "method": "shrink",
            "paper": "",
            "pattern": smaller.removed,
            "pattern_spec": {},
            "pattern_words": smaller.removed,
            "layers": 0,
            "failed": [],
            "size": 0,
            "pruned": 0,
            "sparsity": 0.0,
            "relative_error": None,
            "balanced_error": None,
            "seed": recipe.seed,
            "device": str(plan.device),
            "processes": 1,
            "calibration": {
                "source": recipe.calibration,
                "num_samples": len(windows),
                "sequence_length": windows.shape[1],
                "bos": recipe.bos,
            },
            "shrink": dict(smaller.facts),
            "perplexity": [],
        }


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
