"""The model of a pruning run: whole in memory, or streamed from disk block by block.

Both do the same things for a run: write text while the model is dense, give the loop its block store, and
write the pruned model into the run's folder.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rarefy.errors import ModelError
from rarefy.models.memory import give_back
from rarefy.runs.memory import weights_bytes, writes_texts
from rarefy.runs.words import memory_words

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rarefy.models.source import ModelSource
    from rarefy.models.streaming import StreamedModel
    from rarefy.pruning.stores import BlockStore
    from rarefy.runs.events import Events
    from rarefy.runs.folder import RunFolder
    from rarefy.runs.journal import Journal
    from rarefy.runs.plan import Plan

_T = TypeVar("_T")


class RunModel(ABC):
    """A model that is to be pruned. ``texts`` is what ``run.json`` says of what it writes."""

    dtype: torch.dtype

    def __init__(self, plan: Plan, events: Events) -> None:
        self.plan = plan
        self.events = events
        self.texts: dict[str, list[dict[str, str]]] = {"dense_texts": [], "texts": []}

    @abstractmethod
    def write_dense_texts(self) -> None:
        """Write texts for the report while the model is dense, if it must be now."""

    @abstractmethod
    def own_text(self) -> torch.Tensor:
        """Calibration windows that the dense model writes, token ids (num, length)."""

    @abstractmethod
    def store(self, journal: Journal) -> BlockStore:
        """The block store of the loop, in which the blocks that the journal calls finished are finished."""

    @abstractmethod
    def write(self, folder: RunFolder, journal: Journal) -> None:
        """Write the pruned model into ``folder``."""

    @abstractmethod
    def write_texts(self, folder: RunFolder) -> None:
        """Write texts for the report with the pruned model, which is in ``folder``."""

    def close(self) -> None:  # noqa: B027 (a model in memory needs no end)
        """The model is not needed any more."""

    def _texts_of(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[dict[str, str]]:
        """What the model writes after three prompts, for the report; nothing where it cannot."""
        from rarefy.runs.texts import texts_for_report

        return texts_for_report(model, tokenizer, self.events)

    def _own_text_of(self, model: PreTrainedModel) -> torch.Tensor:
        from rarefy.calibration.self_text import write_text

        recipe = self.plan.recipe
        with self.events.watch("writing tokens") as watch:
            return write_text(model, *recipe.window_shape, recipe.seed, progress=watch)


class WholeModel(RunModel):
    """A model in memory."""

    def __init__(self, plan: Plan, events: Events) -> None:
        from rarefy.models.checkpoint import load_model

        super().__init__(plan, events)
        self.model, self.tokenizer = load_model(plan.source, plan.device, plan.recipe.dtype)
        self.dtype = self.model.dtype

    def write_dense_texts(self) -> None:
        self.texts["dense_texts"] = self._texts_of(self.model, self.tokenizer)

    def own_text(self) -> torch.Tensor:
        return self._own_text_of(self.model)

    def store(self, journal: Journal) -> BlockStore:
        from rarefy.pruning.stores import JournaledStore

        return JournaledStore(self.model, journal, self.plan.offload)

    def write(self, folder: RunFolder, journal: Journal) -> None:
        from rarefy.models.saving import save_model

        folder.write_model(lambda path: save_model(self.model, self.tokenizer, path, self.plan.source))

    def write_texts(self, folder: RunFolder) -> None:
        self.texts["texts"] = self._texts_of(self.model, self.tokenizer)


class OnDiskModel(RunModel):
    """A model of which blocks are loaded one at a time, and the whole only for writing text."""

    @classmethod
    def where_possible(cls, plan: Plan, events: Events) -> OnDiskModel | None:
        """The model of ``plan`` on disk; None where it cannot be had in parts."""
        from rarefy.models.checkpoint import resolve_dtype
        from rarefy.models.streaming import StreamedModel

        if not plan.streams:
            return None
        try:
            streamed = StreamedModel(plan.source, resolve_dtype(plan.recipe.dtype))
            streamed.check_buffers()
        except ModelError as error:
            events.note(f"the model is loaded as a whole: {error}")
            return None
        return cls(plan, events, streamed)

    def __init__(self, plan: Plan, events: Events, streamed: StreamedModel) -> None:
        super().__init__(plan, events)
        self.streamed = streamed
        self.dtype = streamed.model.dtype
        if streamed.surplus:
            events.warn(
                f"{plan.source.name} has {len(streamed.surplus)} tensors that its model has no place for, "
                f"{min(streamed.surplus)} for instance; they are kept as they are."
            )
        if unnamed := streamed.shards.unnamed:
            events.warn(
                f"{plan.source.name} has files of weights that are no part of its model, {unnamed[0].name} for "
                "instance; they are left out."
            )

    def write_dense_texts(self) -> None:
        """Nothing yet: the dense model is still there at the end."""

    def own_text(self) -> torch.Tensor:
        return self._with_whole(self.plan.source, lambda model, _: self._own_text_of(model))

    def store(self, journal: Journal) -> BlockStore:
        from rarefy.pruning.loop import changed_parameters
        from rarefy.pruning.stores import StreamedStore

        settings = self.plan.recipe.prune_settings(self.plan.pattern_of)
        changed = [name for block in self.plan.blocks for name in changed_parameters(block, settings)]
        store = StreamedStore(self.streamed, journal, self.plan.device, self.plan.offload, changed)
        store.prepare(1 + max(block.index for block in self.plan.blocks if block.sites))
        return store

    def write(self, folder: RunFolder, journal: Journal) -> None:
        from rarefy.models.saving import write_settings

        if journal.model.exists():  # else it was published before the run was killed
            write_settings(self.plan.source, journal.model, self.dtype if self.streamed.casts else None)
            journal.publish(folder.model)
        self.close()

    def close(self) -> None:
        self.streamed.close()

    def write_texts(self, folder: RunFolder) -> None:
        from rarefy.models.source import resolve_model

        if not writes_texts(self.plan):
            self.events.note(
                f"the model is too large to be loaded as a whole ({memory_words(weights_bytes(self.plan))}), so the "
                "report will have no texts that it writes"
            )
            return
        pruned = resolve_model(str(Path(folder.model).absolute()))
        for key, source in (("dense_texts", self.plan.source), ("texts", pruned)):
            self.texts[key] = self._with_whole(source, self._texts_of)

    def _with_whole(
        self, source: ModelSource, use: Callable[[PreTrainedModel, PreTrainedTokenizerBase | None], _T]
    ) -> _T:
        """What ``use`` makes of the whole model, whose memory is free again afterwards."""
        from rarefy.models.checkpoint import load_model

        def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what there is to say was said of the model on disk
                return load_model(source, self.plan.device, self.plan.recipe.dtype)

        give_back()
        try:
            return use(*loaded())  # held by nobody but the call
        finally:
            give_back()


def open_model(plan: Plan, events: Events) -> RunModel:
    """The model of ``plan``, streamed where its files allow that. Raises ModelError."""
    return OnDiskModel.where_possible(plan, events) or WholeModel(plan, events)
