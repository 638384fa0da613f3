"""Says which tensors the copy of a checkpoint holds, in which dtype, and with which values before pruning."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rarefy.models.conversion import Group, Plan
from rarefy.models.copies import CopiedTensor, as_it_is
from rarefy.models.shards import Shards
from rarefy.models.stored import CODES, StoredTensor


def lay_out(
    model: PreTrainedModel, plan: Plan, shards: Shards, changed: Collection[str], cast: bool
) -> dict[str, CopiedTensor]:
    """The tensors of a copy of the checkpoint, into which the parameters ``changed`` of ``model`` are to be written.

    A tensor keeps its name, dtype and shape, but for these: quantised ones become ordinary weights in the
    model's dtype. If ``cast``, tensors that the model knows are in its dtype, and those that it has no place for
    (the tower that sees, layers for speculation) stay as they are, bit by bit. Without it, only parameters
    that are written, and would lose by being stored in the dtype of the file, are in the model's.
    """
    content = as_it_is(shards)
    for name in plan.dropped:
        del content[name]
    for group in _groups(plan):
        if group.dequantize:
            file = shards.tensors[group.sources[0]].file
            for source in group.sources:
                content.pop(source, None)
            content |= _dequantized(group, _DequantizedGroup(group, model, shards), file)
            continue
        written = not group.targets.keys().isdisjoint(changed)
        for source in group.sources:
            stored = shards.tensors[source]
            loses = written and torch.promote_types(stored.dtype, group.dtype) != stored.dtype
            if stored.dtype.is_floating_point and stored.dtype != group.dtype and (cast or loses):
                content[source] = _cast(stored, group.dtype)
    return content


def _groups(plan: Plan) -> Iterable[Group]:
    """Every group of a plan, once."""
    return [*plan.of(plan.groups), *plan.placeless]


def _cast(stored: StoredTensor, dtype: torch.dtype) -> CopiedTensor:
    size = stored.size // stored.dtype.itemsize * dtype.itemsize
    return CopiedTensor(stored.file, CODES[dtype], stored.shape, size, lambda: stored.read().to(dtype), same=False)


def _dequantized(group: Group, made: _DequantizedGroup, file: Path) -> dict[str, CopiedTensor]:
    """The ordinary weights that a group of quantised ones becomes."""
    return {
        name: CopiedTensor(
            file, CODES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, partial(made.take, name), same=False
        )
        for name, tensor in group.written.items()
    }


class _DequantizedGroup:
    """The tensors that a group is written as: made together, taken one by one in the order of the copy."""

    def __init__(self, group: Group, model: PreTrainedModel, shards: Shards) -> None:
        self._group, self._model, self._shards = group, model, shards
        self._made: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        if name not in self._made:
            self._made = self._make()
        return self._made.pop(name)

    def _make(self) -> dict[str, Tensor]:
        loaded = self._group.load(self._model, lambda source: self._shards.tensors[source].read())
        return self._group.store(self._model, loaded)
