"""Finds what the files of a written model lack of those that it was made from."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from rarefy.models.conversion import companions, targets_of
from rarefy.models.shards import Shards
from rarefy.models.source import ModelSource


def lost_tensors(source: ModelSource, written: Shards) -> list[str]:
    """The names of a model's tensors for which there is nothing in the ``written`` files.

    A tensor that the model has a place for may have another name than before, and what belongs to a quantised
    weight is not missed. Raises ModelError where the model's files cannot be read.
    """
    if source.kind == "gguf":
        return []  # its names are others, and what is no part of the model is said when it is loaded
    original = Shards.open(source.fetch())
    missing = [name for name in original.tensors if name not in written.tensors]
    if not missing:
        return []
    model = source.skeleton()
    quantizer = source.dequantizer()
    about_weights = set() if quantizer is None else companions(quantizer)
    targets = targets_of(model, original.tensors, quantizer)
    made = _made(model, written)
    lost = []
    for name in missing:
        place, _, leaf = name.rpartition(".")
        replaced = bool(targets[name]) and made.issuperset(targets[name])
        dequantized = quantizer is not None and f"{place}.weight" in written.tensors
        if not replaced and leaf not in about_weights and not dequantized:
            lost.append(name)
    return lost


def missing_parameters(model: PreTrainedModel, written: Shards, quantizer: HfQuantizer | None = None) -> list[str]:
    """The parameters of a model that are made from none of the ``written`` tensors, and are tied to none that is."""
    made, owner = _made(model, written, quantizer), {}
    names = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in names.items():
        if name in made:
            owner[id(parameter)] = name
    return [name for name, parameter in names.items() if id(parameter) not in owner]


def _made(model: PreTrainedModel, written: Shards, quantizer: HfQuantizer | None = None) -> set[str]:
    """The parameters of a model that are made from written tensors."""
    return {target for targets in targets_of(model, written.tensors, quantizer).values() for target in targets}
