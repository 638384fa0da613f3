"""Tunes a pruned model that is in memory, as ``rarefy tune`` does one in files: same windows, same steps, same bits.

dense = record_in_memory(model, windows, ...)      while the model is dense
tuned = tune_in_memory(pruned, dense, recipe, ...) a copy of the pruned model, its masks compared with those before
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from rarefy.parallel.world import World
from rarefy.runs.events import Watch
from rarefy.runs.tune_facts import tuning_facts
from rarefy.runs.tune_masks import compare_masks, masks_of, round_as_stored_
from rarefy.runs.tune_model import made_trainable
from rarefy.runs.words import sparkline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rarefy.runs.tune_recipe import TuneRecipe
    from rarefy.tuning.logits import Logits
    from rarefy.tuning.teacher import Teacher
    from rarefy.tuning.train import StepRecord


@dataclass(frozen=True)
class DenseRecord:
    """What the dense model says about some windows, of which the last ``held_out`` are not trained on.

    ``make_teacher`` is given the logits of the model that is trained, ``precision`` is the dtype of products, and
    ``seconds`` is how long it took.
    """

    windows: Int64[Tensor, "num length"]
    held_out: int
    precision: torch.dtype
    make_teacher: Callable[[Logits], Teacher]
    kind: str
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """A tuned model in the dtypes of the pruned one, and what run.json says of the tuning."""

    model: PreTrainedModel
    facts: Mapping[str, Any]


def record_in_memory(
    model: PreTrainedModel,
    windows: Int64[Tensor, "num length"],
    held_out: int,
    precision: torch.dtype,
    file: Path,
    watch: Watch,
) -> DenseRecord:
    """Record a dense model, which stays as it is, in ``file``, which must be there as long as the record is used.

    Where its head does not stand alone, nothing is recorded and a copy of the model stays in memory instead. Raises
    OutputError where the disk is full.
    """
    from rarefy.tuning.logits import Logits
    from rarefy.tuning.teacher import ModelTeacher, StatesTeacher, record_states

    started = time.perf_counter()
    dense = copy.deepcopy(model).eval()
    logits = Logits(dense.float() if precision == torch.float32 else dense, precision)
    if not logits.alone:
        teacher = ModelTeacher(logits)
        return DenseRecord(windows, held_out, precision, lambda _: teacher, "model", time.perf_counter() - started)
    with watch("recording the dense model for tuning") as progress:
        states = record_states(logits, windows, file, progress)
    device = model.device

    def make_teacher(trained: Logits) -> Teacher:
        return StatesTeacher(states, trained, device)

    return DenseRecord(windows, held_out, precision, make_teacher, "states", time.perf_counter() - started)


def tune_in_memory(
    pruned: PreTrainedModel, dense: DenseRecord, recipe: TuneRecipe, watch: Watch, what: str = "tuning"
) -> Tuned:
    """Train a copy of a pruned model against the dense one; every zero stays zero, and no kept weight becomes one.

    Raises NumericalError where the training diverges, VerificationError where a mask is another than before.
    """
    from rarefy.tuning.masks import keep_zeros
    from rarefy.tuning.parametrise import merge_parametrisation

    masks = dict(masks_of(pruned))
    model = copy.deepcopy(pruned)
    trained = made_trainable(
        model, None, recipe, dense.precision, dense.make_teacher, dense.windows, dense.held_out, World()
    )
    trained.teacher = dense.kind
    tuner = trained.tuner
    best: dict[str, Tensor] = {}
    keeps = recipe.parametrisation == "full" and any(not bool(mask.all()) for mask in masks.values())
    with watch(what) as progress, keep_zeros(model) if keeps else nullcontext():

        def after_step(record: StepRecord) -> None:
            bars = sparkline([one.kl for one in tuner.records])
            progress(record.step, tuner.num_steps, f"KL {record.kl:.4f} nats {bars}")

        def after_measurement(_: object, is_best: bool) -> None:
            if is_best:
                best.clear()
                best.update({name: value.clone() for name, value in tuner.values().items()})

        tuner.run(after_step, after_measurement)
    if best:
        tuner.set_values(best)
    merge_parametrisation(recipe.parametrisation, model)
    round_as_stored_(model, masks.items(), trained.dtypes)
    written = tuner.measure() if tuner.measurements else None
    facts = tuning_facts(recipe, trained, dense.precision, dense.held_out, written)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(trained.dtypes[name])
    facts["zeros"] = compare_masks(masks.items(), masks_of(model))
    return Tuned(model, facts)
