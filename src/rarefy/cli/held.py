"""The model of a pruning run: whole in memory, or on disk and loaded in parts.

Both do the same things for ``run``: write text while the model is dense, give the loop over blocks its
home, and write the pruned model into the run's folder.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rarefy.cli.memory import give_back, weights_bytes, writes_texts
from rarefy.cli.words import memory_words
from rarefy.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rarefy.cli.plan import Plan
    from rarefy.cli.terminal import Terminal
    from rarefy.models.source import ModelSource
    from rarefy.models.streaming import StreamedModel
    from rarefy.progress import Progress
    from rarefy.pruning import Home
    from rarefy.run_folder import RunFolder

_T = TypeVar("_T")


class Held(ABC):
    """A model that is to be pruned. ``texts`` is what ``run.json`` says of what it writes."""

    dtype: torch.dtype

    def __init__(self, plan: Plan, terminal: Terminal) -> None:
        self.plan = plan
        self.terminal = terminal
        self.texts: dict[str, list[dict[str, str]]] = {"dense_texts": [], "texts": []}

    @abstractmethod
    def write_dense_texts(self) -> None:
        """Write texts for the report while the model is dense, if it must be now."""

    @abstractmethod
    def own_text(self) -> torch.Tensor:
        """Calibration windows that the dense model writes, token ids (num, length)."""

    @abstractmethod
    def home(self, progress: Progress) -> Home:
        """Where the loop over blocks finds them, with what is finished already."""

    @abstractmethod
    def write(self, folder: RunFolder, progress: Progress) -> None:
        """Write the pruned model into ``folder``."""

    @abstractmethod
    def write_texts(self, folder: RunFolder) -> None:
        """Write texts for the report with the pruned model, which is in ``folder``."""

    def close(self) -> None:  # noqa: B027 (a model in memory needs no end)
        """The model is not needed any more."""

    def _texts_of(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[dict[str, str]]:
        """What the model writes after three prompts, for the report; nothing where it cannot."""
        from rarefy.evaluation.texts import kept_texts

        try:
            with self.terminal.watch("writing texts"):
                return kept_texts(model, tokenizer)
        except Exception as error:  # noqa: BLE001 (a picture in a report must not cost the run)
            self.terminal.warn(f"the model writes no texts for the report: {' '.join(str(error).split())}")
            return []

    def _own_text_of(self, model: PreTrainedModel) -> torch.Tensor:
        from rarefy.calibration.self_text import write_text

        recipe = self.plan.recipe
        with self.terminal.watch("writing tokens") as watch:
            return write_text(model, *recipe.window_shape, recipe.seed, progress=watch)


class Whole(Held):
    """A model in memory."""

    def __init__(self, plan: Plan, terminal: Terminal) -> None:
        from rarefy.models.checkpoint import load_model

        super().__init__(plan, terminal)
        self.model, self.tokenizer = load_model(plan.source, plan.device, plan.recipe.dtype)
        self.dtype = self.model.dtype

    def write_dense_texts(self) -> None:
        self.texts["dense_texts"] = self._texts_of(self.model, self.tokenizer)

    def own_text(self) -> torch.Tensor:
        return self._own_text_of(self.model)

    def home(self, progress: Progress) -> Home:
        from rarefy.homes import KeptHome

        return KeptHome(self.model, progress, self.plan.offload)

    def write(self, folder: RunFolder, progress: Progress) -> None:
        from rarefy.models.checkpoint import save_model

        folder.write_model(lambda path: save_model(self.model, self.tokenizer, path, self.plan.source))

    def write_texts(self, folder: RunFolder) -> None:
        self.texts["texts"] = self._texts_of(self.model, self.tokenizer)


class OnDisk(Held):
    """A model of which blocks are loaded one at a time, and the whole only for writing text."""

    @classmethod
    def where_possible(cls, plan: Plan, terminal: Terminal) -> OnDisk | None:
        """The model of ``plan`` on disk; None where it cannot be had in parts, or not be written back so."""
        from rarefy.models.streaming import StreamedModel

        if not plan.streams:
            return None
        try:
            streamed = StreamedModel(plan.source)
            streamed.check_storable(site.parameter_name for block in plan.blocks for site in block.sites)
        except ModelError as error:
            terminal.note(f"the model is loaded as a whole: {error}")
            return None
        return cls(plan, terminal, streamed)

    def __init__(self, plan: Plan, terminal: Terminal, streamed: StreamedModel) -> None:
        super().__init__(plan, terminal)
        self.streamed = streamed
        self.dtype = streamed.model.dtype
        if streamed.surplus:
            terminal.warn(
                f"{plan.source.name} has {len(streamed.surplus)} tensors that its model has no place for, "
                f"{min(streamed.surplus)} for instance; they are kept as they are."
            )

    def write_dense_texts(self) -> None:
        """Nothing yet: the dense model is still there at the end."""

    def own_text(self) -> torch.Tensor:
        return self._with_whole(self.plan.source, lambda model, _: self._own_text_of(model))

    def home(self, progress: Progress) -> Home:
        from rarefy.homes import StreamedHome

        home = StreamedHome(self.streamed, progress, self.plan.device, self.plan.offload)
        home.prepare(1 + max(block.index for block in self.plan.blocks if block.sites))
        return home

    def write(self, folder: RunFolder, progress: Progress) -> None:
        from rarefy.models.settings import copy_settings

        if progress.model.exists():  # else it was published before the run was killed
            copy_settings(self.streamed.shards.folder, progress.model)
            progress.publish(folder.model)
        self.close()

    def close(self) -> None:
        self.streamed.close()

    def write_texts(self, folder: RunFolder) -> None:
        from rarefy.models.source import resolve_model

        if not writes_texts(self.plan):
            self.terminal.note(
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
