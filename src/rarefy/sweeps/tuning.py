"""The dense model's side of cells that are tuned: recorded once for all cells of a seed that tune alike."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from rarefy.runs.events import Watch
from rarefy.runs.tune_in_memory import DenseRecord, record_in_memory
from rarefy.runs.tune_plan import precision_of
from rarefy.runs.tune_recipe import TuneRecipe
from rarefy.runs.tune_windows import Text, draw
from rarefy.sweeps.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DenseRecords:
    """Records of one seed, in a folder of the system's for temporary files, which is gone at the end of the context.

    The windows are those that ``rarefy tune`` trains on and holds out behind a ``rarefy prune`` of the same options.
    """

    def __init__(self, sweep: Plan, watch: Watch) -> None:
        self._sweep, self._watch = sweep, watch
        self._folder = tempfile.TemporaryDirectory(prefix="rarefy-", ignore_cleanup_errors=True)
        self._found: dict[tuple[int, torch.dtype], DenseRecord] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._found.clear()
        self._folder.cleanup()

    def of(self, model: PreTrainedModel, recipe: TuneRecipe) -> DenseRecord:
        """The record for a tuning by ``recipe``; the ``model`` is dense now. Raises OutputError, CalibrationError."""
        key = recipe.held_out, precision_of(recipe, model.device)
        if key not in self._found:
            file = Path(self._folder.name) / f"dense-states-{len(self._found)}"
            windows = self._windows(model, recipe)
            self._found[key] = record_in_memory(model, windows, *key, file, self._watch)
        return self._found[key]

    def _windows(self, model: PreTrainedModel, recipe: TuneRecipe) -> Tensor:
        sweep = self._sweep
        num, length, seed = recipe.num_samples, recipe.sequence_length, recipe.seed
        assert num is not None
        assert length is not None
        assert seed is not None
        if sweep.tokens is not None:
            text = Text(sweep.calibration, num, recipe.held_out, seed)
            return draw(sweep.tokens, text, length, sweep.bos_id)
        from rarefy.calibration.self_text import write_text

        with self._watch("writing tokens for tuning") as progress:
            return write_text(model, num + recipe.held_out, length, seed, progress=progress)
