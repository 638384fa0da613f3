"""What tests of tuning share: small pruned models, their dense originals, and a tuner for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models_for_tests import VOCABULARY, make_model
from rarefy.models.blocks import find_blocks
from rarefy.tuning.logits import Logits
from rarefy.tuning.parametrise import Name, parametrise
from rarefy.tuning.settings import TuneSettings
from rarefy.tuning.teacher import ModelTeacher, StatesTeacher, Teacher, TopTeacher, record_states, record_top
from rarefy.tuning.train import Tuner

QUICK = TuneSettings(learning_rate=1e-2, batch_size=2, micro_batch=2, epochs=2, warmup_steps=1)


def prune_by_magnitude(model: PreTrainedModel, sparsity: float = 0.5) -> PreTrainedModel:
    """Set the smallest weights of every linear in the blocks to 0, in place."""
    for block in find_blocks(model):
        for site in block.sites:
            weight = site.read()
            threshold = weight.abs().flatten().kthvalue(int(sparsity * weight.numel())).values
            site.write(weight * (weight.abs() > threshold))
    return model


def sparse_and_dense(architecture: str = "llama", sparsity: float = 0.5) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A pruned model and its dense original, in float32."""
    return prune_by_magnitude(make_model(architecture), sparsity), make_model(architecture)


def some_windows(num: int = 6, length: int = 16, seed: int = 0) -> Tensor:
    """Token ids (num, length)."""
    return torch.randint(3, VOCABULARY, (num, length), generator=torch.Generator().manual_seed(seed))


def site_masks(model: PreTrainedModel) -> dict[str, Tensor]:
    """Where each weight in the blocks is not zero, by name."""
    return {site.name: site.read() != 0 for block in find_blocks(model) for site in block.sites}


def make_teacher(
    kind: str, dense: PreTrainedModel, logits: Logits, windows: Tensor, folder: Path, precision: torch.dtype
) -> Teacher:
    """A teacher: model, states, or top-K."""
    of_dense = Logits(dense, precision)
    if kind == "model":
        return ModelTeacher(of_dense, [block.module for block in find_blocks(dense)])
    if kind == "states":
        return StatesTeacher(record_states(of_dense, windows, folder / "states"), logits, torch.device("cpu"))
    files = (folder / "tokens", folder / "log_p")
    return TopTeacher(*record_top(of_dense, windows, int(kind.removeprefix("top-")), files), torch.device("cpu"))


def make_tuner(
    sparse: PreTrainedModel,
    dense: PreTrainedModel,
    folder: Path,
    *,
    name: Name = "full",
    teacher: str = "model",
    windows: Tensor | None = None,
    held_out: int = 2,
    precision: torch.dtype = torch.float32,
    settings: TuneSettings = QUICK,
    **changes: Any,
) -> Tuner:
    """A tuner of ``sparse`` towards ``dense``; ``changes`` are to the settings."""
    windows = some_windows() if windows is None else windows
    blocks = find_blocks(sparse)
    logits = Logits(sparse, precision)
    made = make_teacher(teacher, dense, logits, windows, folder, precision)
    parameters = parametrise(name, sparse, blocks, rank=4, alpha=8.0)
    settings = replace(settings, **changes)
    modules = [block.module for block in blocks]
    return Tuner(sparse, logits, parameters, modules, made, windows, held_out, settings)
