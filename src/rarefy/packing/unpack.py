"""Makes an ordinary checkpoint of a packed one again, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rarefy.errors import ModelError
from rarefy.models.conversion import Group, plan_conversion
from rarefy.models.quiet import quiet
from rarefy.models.settings import copy_settings, read_json
from rarefy.models.shards import Shards
from rarefy.models.source import PACKED, ModelSource
from rarefy.models.stored import StoredTensor
from rarefy.packing.card import write_unpacked_card
from rarefy.packing.loading import check_format, find_packed, refuse_missing
from rarefy.packing.pack import Watch
from rarefy.packing.places import Place, model_names
from rarefy.packing.weight import CHECK, PackedWeight
from rarefy.packing.writing import Form, NewShard, check_new, new_folder, write_index


class PackedCheckpoint:
    """A packed folder: its tensors, and the parameters of the dense model that are packed in them.

    Raises ModelError where the folder is not packed, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        settings = read_json(folder / "config.json").get("quantization_config")
        if not isinstance(settings, dict) or settings.get("quant_method") != PACKED:
            raise ModelError.sentence(f"{folder} is not packed: its config.json does not say so.")
        self.group = settings.get("group_size", 0)
        check_format(folder, str(settings.get("format")), self.group)
        self.shards = Shards.open(folder)
        self.model = dense_skeleton(folder)
        self.names = model_names(self.model, self.shards.tensors)
        refuse_missing(self.model, self.names, folder)
        found = find_packed(self.model, self.shards.tensors, self.names, self.group)
        self.packed: dict[str, tuple[Place, dict[str, StoredTensor]]] = {
            place.name: (place, tensors) for place, tensors in found
        }

    def stored(self, name: str) -> list[StoredTensor]:
        """The tensors of a parameter of the dense model, packed or not."""
        if name in self.packed:
            return list(self.packed[name][1].values())
        return [self.shards.tensors[stored] for stored, targets in self.names.items() if name in targets]

    def read(self, name: str) -> Tensor:
        """A parameter as the dense model has it. Raises ModelError where it is damaged."""
        if name not in self.packed:
            return self.stored(name)[0].read()
        place, stored = self.packed[name]
        tensors = {end: tensor.read() for end, tensor in stored.items()}
        weight = PackedWeight.of(name, tensors, place.shape, self.group)
        offsets = weight.counted(name)
        weight.verify(name, tensors[CHECK])
        return place.turned(weight.unpack(self.dtype_of(name), offsets)).contiguous()

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a parameter: that of its values, or the model's where these are codes."""
        values = self.stored(name)[0].dtype
        if values.is_floating_point:
            return values
        dtype: Any = self.model.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32


def dense_skeleton(folder: Path) -> PreTrainedModel:
    """The dense model of a packed folder, on the meta device."""
    with quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return ModelSource(str(folder), "folder", folder, config).skeleton()


def unpack(
    packed: Path,
    out: Path,
    watch: Watch = lambda done, count: None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the ordinary model folder of ``packed`` into ``out``, which must be new or empty.

    Weights whose values are no codes are bit for bit what was packed (-0.0 became 0.0); codes become weights of the
    model's dtype. ``watch`` and ``finish`` are those of ``pack``. Raises ModelError where ``packed`` is damaged, and
    OutputError where ``out`` cannot be used or the disk refuses; nothing is left then.
    """
    check_new(out)
    checkpoint = PackedCheckpoint(packed)
    groups, files, taken = _layout(checkpoint)
    size = sum(form.size for forms in files.values() for form in forms.values())
    with new_folder(out, size) as folder:
        shards = {file: NewShard(folder / file, forms) for file, forms in files.items()}
        where = {name: shards[file] for file, forms in files.items() for name in forms}
        for done, group in enumerate(groups):
            targets = {name: checkpoint.read(name) for name in group.targets}
            for name, tensor in group.store(checkpoint.model, targets).items():
                where[name].write(name, tensor)
            watch(done + 1, len(groups))
        for name, stored in checkpoint.shards.tensors.items():
            if name not in taken:
                where[name].write(name, stored.read())
        for shard in shards.values():
            shard.finish()
        if checkpoint.shards.index is not None:
            write_index(folder, files)
        copy_settings(packed, folder)
        write_unpacked_card(folder, packed)
        finish(folder)


def _layout(checkpoint: PackedCheckpoint) -> tuple[list[Group], dict[str, dict[str, Form]], set[str]]:
    """What must be made together, what each new file holds, and which tensors of the packed files are used up.

    Names are those under which transformers saves the model: experts, for instance, may be one matrix each.
    """
    model, tensors = checkpoint.model, checkpoint.shards.tensors
    metas = revert_weight_conversion(model, dict(model.state_dict()))
    groups = plan_conversion(model, metas).of(checkpoint.packed)
    files: dict[str, dict[str, Form]] = {file.name: {} for file in checkpoint.shards.files}
    taken = set()
    for group in groups:
        used = [tensor for name in group.targets for tensor in checkpoint.stored(name)]
        taken |= {tensor.name for tensor in used}
        dtype = checkpoint.dtype_of(group.name)
        files[used[0].file.name] |= {name: Form.of(tuple(metas[name].shape), dtype) for name in group.sources}
    for name, stored in tensors.items():
        if name not in taken:
            files[stored.file.name][name] = Form.of(stored.shape, stored.dtype)
    return groups, files, taken
