"""Makes room in a model for the packed tensors of a checkpoint, and checks them before and after they are read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rarefy.errors import ModelError
from rarefy.models.experts import FusedExperts
from rarefy.models.shards import Shards
from rarefy.models.stored import StoredTensor
from rarefy.packing import kernel
from rarefy.packing.modules import PackedExperts, PackedLinear, PackedModule
from rarefy.packing.places import Place, model_names, place_of
from rarefy.packing.weight import ENDINGS, FORMAT, PackedWeight


def make_room(model: PreTrainedModel, files: Sequence[str], format_name: str, group: int) -> None:
    """Replace in ``model``, on the meta device, every module whose weight is packed in ``files``.

    Raises ModelError where the files are damaged, where a packed tensor does not fit its module, and where weights of
    the model are in no file.
    """
    if not files or any(Path(file).suffix != ".safetensors" for file in files):
        raise ModelError.sentence("A packed checkpoint is in safetensors files, but there are none.")
    folder = Path(files[0]).parent
    check_format(folder, format_name, group)
    stored = Shards.open(folder).tensors
    names = model_names(model, stored)
    refuse_missing(model, names, folder)
    stacks: dict[str, dict[str, PackedWeight]] = {}
    for place, tensors in find_packed(model, stored, names, group):
        if place.experts is None:
            linear = model.get_submodule(place.path)
            assert isinstance(linear, nn.Linear | Conv1D)
            _replace(model, place.path, PackedLinear(linear, _on_meta(place.name, place, tensors, group)))
        else:
            stacks.setdefault(place.path, {})[place.leaf] = _on_meta(place.name, place, tensors, group)
    for path, packed in stacks.items():
        _replace(model, path, PackedExperts(FusedExperts(path, model.get_submodule(path)), packed))


def settle(model: PreTrainedModel) -> bool:
    """Count all packed values; unpack what is not on the CPU. Whether nothing is packed any more.

    Raises ModelError where a mask claims other values than there are.
    """
    left = False
    for path, module in packed_modules(model):
        module.count(path)
        if module.on_cpu:
            left = True
        else:
            _replace(model, path, module.original(module.dense_dtype))
    if left and kernel.path() is None:
        warnings.warn(f"packed weights are slow here: {kernel.describe()}", stacklevel=2)
    return not left


def unpack_modules(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give every packed module of ``model`` its ordinary form again, in ``dtype`` or its own."""
    for path, module in packed_modules(model):
        _replace(model, path, module.original(dtype or module.dense_dtype))


def packed_modules(model: nn.Module) -> list[tuple[str, PackedModule]]:
    """All packed modules with their paths."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, PackedModule)]


def check_format(folder: Path, name: str, group: int) -> None:
    """Raise ModelError unless this release reads the format."""
    if name != FORMAT:
        raise ModelError.sentence(
            f"{folder} is packed in the format {name!r}, but this release reads {FORMAT!r} only."
        )
    if not isinstance(group, int) or (group and (group % 64 or not 64 <= group <= 4096)):
        raise ModelError.sentence(
            f"{folder} has scales for every {group!r} columns, but must have multiples of 64 up to 4,096."
        )


def find_packed(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], names: Mapping[str, Sequence[str]], group: int
) -> list[tuple[Place, dict[str, StoredTensor]]]:
    """The packed parameters, each with its place in the dense ``model`` and its tensors by ending (weight.py).

    Raises ModelError where one of the tensors is missing or does not fit; only headers are read.
    """
    dense = model.state_dict()
    of_target = {target: stored[name] for name, targets in names.items() for target in targets}
    found = []
    for target, tensor in of_target.items():
        if target in dense:
            tensors = {end: of_target[target + end] for end in ENDINGS if target + end in of_target}
            if len(tensors) > 1 or len(tensor.shape) == 1 < dense[target].ndim:
                place = place_of(model, target)
                _on_meta(target, place, tensors, group)
                found.append((place, tensors))
        elif not any(target.removesuffix(end) in of_target for end in ENDINGS[1:] if target.endswith(end)):
            raise ModelError.sentence(f"{tensor.name} is in {tensor.file}, but the values that it is of are missing.")
    return found


def _on_meta(name: str, place: Place, tensors: Mapping[str, StoredTensor], group: int) -> PackedWeight:
    """The packed weight on the meta device. Raises ModelError where its tensors do not fit."""
    return PackedWeight.of(name, {end: tensor.meta() for end, tensor in tensors.items()}, place.shape, group)


def refuse_missing(model: PreTrainedModel, names: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Raise ModelError where a weight of the dense ``model`` is in no file, and tied to none that is."""
    given = {target for targets in names.values() for target in targets}
    tied = model.all_tied_weights_keys or {}
    given |= {name for pair in tied.items() if not given.isdisjoint(pair) for name in pair}
    ignored = model._keys_to_ignore_on_load_missing or ()
    missing = [
        name
        for name in model.state_dict()
        if name not in given and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if missing:
        raise ModelError.sentence(f"{folder} lacks {len(missing)} weights of its model, {min(missing)} for instance.")


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
