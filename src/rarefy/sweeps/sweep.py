"""The sweep itself: cell after cell on one loaded model, each recorded, failed ones with their reason."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rarefy.calibration.windows import draw_windows
from rarefy.models.blocks import Block, find_blocks
from rarefy.models.checkpoint import load_model
from rarefy.models.saving import save_model, save_other_model
from rarefy.pruning.records import three_digits
from rarefy.runs.card import base_model, model_card
from rarefy.runs.events import Watch, unwatched
from rarefy.runs.fingerprint import versions
from rarefy.runs.folder import RunFolder
from rarefy.runs.shrink_model import check_weights
from rarefy.runs.texts import kept_texts
from rarefy.structure.memo import Memo
from rarefy.sweeps.folder import SweepFolder
from rarefy.sweeps.making import Made, Making
from rarefy.sweeps.plan import Cell, Plan
from rarefy.sweeps.shrinking import ShrinkCell
from rarefy.sweeps.tuning import DenseRecords

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def run_sweep(
    sweep: Plan,
    folder: SweepFolder,
    command: Sequence[str] = (),
    *,
    watch: Watch | None = None,
    note: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Compute the cells that are missing and write the results; returns the facts of all cells there are.

    A cell that fails is recorded with its reason, and the next one begins; it counts as finished unless
    ``sweep.retry``. Other processes may run sweeps in the folder meanwhile: a cell that one of them computes is left
    to it, and is not among the results if it is not finished by the end. ``watch`` shows how far a stage is,
    ``note`` what has been found.
    """
    words = shlex.join(command)
    folder.begin(
        {"settings": dict(sweep.settings), "versions": versions()},
        sweep.rows,
        {(cell.method, cell.asked) for cell in sweep.cells},
        sweep.left_out,
        words,
    )
    run = Run(sweep, folder, words, watch or unwatched, note or (lambda _: None))
    if len(run.missing) < len(sweep.cells):
        run.note(f"{len(sweep.cells) - len(run.missing)} of {len(sweep.cells)} cells are there already")
    if run.missing or folder.read_cell("dense") is None:
        run.compute()
    return run.write_results()


class Run:
    """One process's share of a sweep."""

    def __init__(
        self, sweep: Plan, folder: SweepFolder, command: str, watch: Watch, note: Callable[[str], None]
    ) -> None:
        self.sweep, self.folder, self.command = sweep, folder, command
        self.watch, self.note = watch, note
        self._places = {cell.name: place for place, cell in enumerate(sweep.cells)}
        #: The facts of each cell as this process found them first.
        self._found = {cell.name: folder.read_cell(cell.name) for cell in sweep.cells}
        self.missing = [cell for cell in sweep.cells if _is_missing(self._found[cell.name], sweep.retry)]

    def still_missing(self) -> list[Cell | ShrinkCell]:
        """What was missing and nobody has computed since."""
        return [cell for cell in self.missing if self._is_as_found(cell)]

    def write_results(self) -> list[dict[str, Any]]:
        """Write the tables of all cells there are: those of this command as it names them, then others; these."""

        def in_order(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
            places = self._places
            return sorted(cells, key=lambda facts: (places.get(facts["cell"], len(places)), facts["cell"]))

        return self.folder.write_results(in_order)

    def compute(self) -> None:
        """Load the model and compute what is missing, as far as no other process does."""
        sweep, folder = self.sweep, self.folder
        with self.watch("loading") as _:
            self.model, tokenizer = load_model(sweep.source, sweep.device, sweep.settings["dtype"])
        if any(isinstance(cell, ShrinkCell) for cell in self.missing):
            check_weights(self.model, sweep.settings["model"])
        self.tokenizer = tokenizer or sweep.tokenizer
        self._weights = DenseWeights(find_blocks(self.model))
        with folder.claim("dense") as held:
            if not held:
                self.note("another process measures the dense model, for which this one waits")
        with folder.claim("dense", wait=True):
            if folder.read_cell("dense") is None:
                self._measure_dense()
        if not self.missing:
            return
        with self.watch("recording what the dense model predicts") as progress:
            self._states = sweep.measures.record(self.model, progress)
        # Again, as long as there is something to take over from a process that was killed.
        while (todo := self.still_missing()) and self._compute(todo):
            pass

    def _compute(self, todo: Sequence[Cell | ShrinkCell]) -> int:
        """Compute the cells of ``todo`` that no other process has; how many they were."""
        computed = 0
        for seed, same in groupby(todo, key=lambda cell: cell.seed):
            cells = [cell for cell in same if self._is_as_found(cell)]
            if not cells:
                continue
            self._weights.restore()
            windows = _windows(self.sweep, self.model, seed, self.watch)
            with DenseRecords(self.sweep, self.watch) as records:
                making = Making(self.model, windows, Memo(), records, self.watch)
                for cell in cells:
                    with self.folder.claim(cell.name) as held:
                        if not held or not self._is_as_found(cell):
                            continue
                        self._weights.restore()
                        place = f"{self._places[cell.name] + 1}/{len(self._places)}"
                        label = f"[{place}] {cell.method}, {cell.pattern}, seed {seed}"
                        facts = self._run_cell(cell, making, label)
                    computed += 1
                    self.note(f"{label}: {_in_words(facts)}")
                    self.write_results()
        return computed

    def _is_as_found(self, cell: Cell | ShrinkCell) -> bool:
        return self.folder.read_cell(cell.name) == self._found[cell.name]

    def _measure_dense(self) -> None:
        started = time.perf_counter()
        with self.watch("measuring the dense model") as progress:
            facts = self.sweep.measures.of(self.model, self.tokenizer, progress=progress)
        facts |= {"method": "dense", "pattern": "", "asked_sparsity": 0.0, "status": "done"}
        facts["texts"] = kept_texts(self.model, self.tokenizer)
        facts["seconds"] = {"evaluate": round(time.perf_counter() - started, 3)}
        self.folder.write_cell("dense", lambda cell: cell.write_run(facts))
        self.note(f"dense: {_in_words(facts)}")

    def _run_cell(self, cell: Cell | ShrinkCell, making: Making, label: str) -> dict[str, Any]:
        """Make, measure and write one cell; its facts."""
        sweep, tokenizer = self.sweep, self.tokenizer
        facts: dict[str, Any] = {
            "command": self.command,
            "versions": versions(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "base_model": base_model(sweep.source.name, sweep.source.kind, sweep.source.path),
            "device": str(sweep.device),
            "dtype": str(making.model.dtype).removeprefix("torch."),
            **cell.facts(),
        }
        made: Made | None = None
        try:
            made = making.of(cell, label)
            started = time.perf_counter()
            with self.watch(f"{label}: measuring") as progress:
                facts |= sweep.measures.of(made.model, tokenizer, self._states, progress)
            facts["texts"] = kept_texts(made.model, tokenizer)
            facts |= made.facts | {"seconds": {**made.seconds, "evaluate": round(time.perf_counter() - started, 3)}}
        except Exception as error:  # noqa: BLE001 (whatever it is, it must not cost the other cells)
            made = None
            facts |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
            if sweep.device.type == "cuda":
                torch.cuda.empty_cache()

        def fill(run_folder: RunFolder) -> None:
            run_folder.write_recipe(cell.recipe.to_yaml())
            run_folder.write_layers(made.layers if made else [])
            if made is not None and sweep.save:
                save, model = save_other_model if isinstance(cell, ShrinkCell) else save_model, made.model
                run_folder.write_model(lambda path: save(model, tokenizer, path, sweep.source))
                run_folder.write_card(model_card(facts))
            run_folder.write_run(facts)

        self.folder.write_cell(cell.name, fill)
        return facts


def _is_missing(facts: Mapping[str, Any] | None, retry: bool) -> bool:
    return facts is None or (retry and facts.get("status") == "failed")


def _windows(sweep: Plan, model: PreTrainedModel, seed: int, watch: Watch) -> Tensor:
    num, length = sweep.cells[0].recipe.window_shape
    if sweep.tokens is not None:
        return draw_windows(
            sweep.tokens, num, length, seed, sweep.bos_id, name=f"the text of {sweep.calibration.name}"
        )
    from rarefy.calibration.self_text import write_text

    with watch("writing tokens") as progress:
        return write_text(model, num, length, seed, progress=lambda done, total: progress(done, total, ""))


def _in_words(facts: Mapping[str, Any]) -> str:
    if facts["status"] == "failed":
        return f"failed: {facts['reason']}"
    words = [
        f"perplexity {'not finite' if one['value'] is None else format(one['value'], '.2f')} on {one['label']}"
        for one in facts["perplexity"]
    ]
    words += [
        f"KL {three_digits(one['kl'])} on {one['label']}" for one in facts["divergence"] if one["kl"] is not None
    ]
    for task, result in facts["tasks"].items():
        if (accuracy := result["metrics"].get("acc")) and accuracy["value"] is not None:
            words.append(f"{task} {accuracy['value']:.1%}")
    return ", ".join(words)
