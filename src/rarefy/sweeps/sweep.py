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
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    ``sweep.retry``. ``watch`` shows how far a stage is, ``note`` what has been found.
    """
    watch = watch or unwatched
    note = note or (lambda _: None)
    words = shlex.join(command)
    folder.begin(
        {"settings": dict(sweep.settings), "command": words, "versions": versions()},
        sweep.rows,
        {(cell.method, cell.asked) for cell in sweep.cells},
        sweep.left_out,
    )
    todo = [cell for cell in sweep.cells if _is_missing(folder.read_cell(cell.name), sweep.retry)]
    if len(todo) < len(sweep.cells):
        note(f"{len(sweep.cells) - len(todo)} of {len(sweep.cells)} cells are there already")
    if todo or folder.read_cell("dense") is None:
        with watch("loading") as _:
            model, tokenizer = load_model(sweep.source, sweep.device, sweep.settings["dtype"])
        if any(isinstance(cell, ShrinkCell) for cell in todo):
            check_weights(model, sweep.settings["model"])
        tokenizer = tokenizer or sweep.tokenizer
        weights = DenseWeights(find_blocks(model))
        if folder.read_cell("dense") is None:
            _measure_dense(sweep, folder, model, tokenizer, watch, note)
        states = None
        if todo:
            with watch("recording the dense model") as progress:
                states = sweep.measures.record(model, progress)
        done = len(sweep.cells) - len(todo)
        for seed, cells in groupby(todo, key=lambda cell: cell.seed):
            weights.restore()
            windows = _windows(sweep, model, seed, watch)
            with DenseRecords(sweep, watch) as records:
                making = Making(model, windows, Memo(), records, watch)
                for cell in cells:
                    weights.restore()
                    done += 1
                    label = f"[{done}/{len(sweep.cells)}] {cell.method}, {cell.pattern}, seed {seed}"
                    facts = _run_cell(sweep, folder, cell, making, tokenizer, states, words, label)
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
    facts["texts"] = kept_texts(model, tokenizer)
    facts["seconds"] = {"evaluate": round(time.perf_counter() - started, 3)}
    folder.write_cell("dense", lambda cell: cell.write_run(facts))
    note(f"dense: {_in_words(facts)}")


def _run_cell(
    sweep: Plan,
    folder: SweepFolder,
    cell: Cell | ShrinkCell,
    making: Making,
    tokenizer: PreTrainedTokenizerBase | None,
    states: Sequence[Any] | None,
    command: str,
    label: str,
) -> dict[str, Any]:
    """Make, measure and write one cell; its facts. ``states`` are what the dense model's head read."""
    facts: dict[str, Any] = {
        "command": command,
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
        with making.watch(f"{label}: measuring") as progress:
            facts |= sweep.measures.of(made.model, tokenizer, states, progress)
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

    folder.write_cell(cell.name, fill)
    return facts


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
