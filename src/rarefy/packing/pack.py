"""Packs a checkpoint: reads it tensor by tensor, and writes a folder that holds its kept weights and their masks.

It is read twice. First every weight that may be packed is counted, so that what cannot be packed is refused before
anything is written, and the size of every file is known; then the files are written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rarefy.errors import InputError, ModelError
from rarefy.models.atomic import replace_file
from rarefy.models.blocks import find_blocks
from rarefy.models.conversion import Group, plan_conversion
from rarefy.models.settings import copy_settings, read_json
from rarefy.models.shards import Shards
from rarefy.models.source import PACKED, ModelSource
from rarefy.packing.card import write_card
from rarefy.packing.codes import GROUPS, group_of
from rarefy.packing.places import Place, place_of
from rarefy.packing.summary import PackedLayer, Summary
from rarefy.packing.weight import CHECK, FORMAT, MASK, PACKABLE, SCALE, PackedWeight, mask_bytes
from rarefy.packing.writing import Form, NewShard, check_new, new_folder, write_index

#: Told how many of how many parameters are done.
Watch = Callable[[int, int], None]

BITS = {"int8": 8, "int4": 4}

#: A weight with fewer zeros than this stays dense: its product would gain nothing in time (docs/log.md).
LEAST_ZEROS = 0.3


def pack(
    source: ModelSource,
    out: Path,
    values: str = "auto",
    watch: Watch = lambda done, count: None,
    finish: Callable[[Path, Summary], None] = lambda folder, summary: None,
) -> Summary:
    """Write the model of ``source`` packed into ``out``, which must be new or empty.

    ``values``: "auto" keeps the dtype of the files, "bf16" casts kept weights to bfloat16, "int8" and "int4" round
    them to the nearest code, which changes nothing where the method `quantize` has rounded them already. ``watch`` is
    told how many of the parameters have been written; ``finish`` may add to the folder before it gets its name. Needs
    memory for the largest parameter, or for one stack of experts.

    Raises ModelError where there are no safetensors files or no layer has enough zeros, and OutputError where ``out``
    cannot be used or the disk refuses; nothing is left then.
    """
    if values not in ("auto", "bf16", *BITS):
        raise InputError("--values", values, "auto, bf16, int8 or int4")
    check_new(out)
    checkpoint = _Checkpoint(source)
    width = _width_of_groups(checkpoint, values)
    counted = [counts for group in checkpoint.groups() for counts in _count(checkpoint, group, values, width)]
    chosen = {count.name: count for count in counted if count.zeros >= LEAST_ZEROS * count.size}
    if not chosen:
        most = max((count.zeros / count.size for count in counted), default=0.0)
        raise ModelError.sentence(
            f"{source.name} has nothing to pack: no layer holds {LEAST_ZEROS:.0%} zeros (the most is {most:.1%})."
        )
    files = checkpoint.layout(chosen)
    size = sum(form.size for forms in files.values() for form in forms.values())
    with new_folder(out, size) as folder:
        rounded = _write(checkpoint, folder, files, chosen, values, watch)
        copy_settings(checkpoint.shards.folder, folder)
        _say_packed(folder / "config.json", width)
        layers = [count.layer(count.name in chosen) for count in counted]
        dense = sum(tensor.size for tensor in checkpoint.shards.tensors.values())
        summary = Summary(values, layers, dense, size, width, rounded)
        write_card(folder, checkpoint.shards.folder, summary.facts())
        finish(folder, summary)
    return summary


class _Checkpoint:
    """The dense checkpoint: its tensors, and which of them make the parameters that may be packed."""

    def __init__(self, source: ModelSource) -> None:
        self.shards = Shards.open(source.fetch())
        self.model = source.skeleton()
        self._names = {site.parameter_name for block in find_blocks(self.model) for site in block.sites}
        self._plan = plan_conversion(
            self.model, {name: stored.meta() for name, stored in self.shards.tensors.items() if stored.known}
        )

    def groups(self) -> list[Group]:
        """What must be read together, for all parameters that may be packed."""
        return self._plan.of(name for name in self.model.state_dict() if name in self._names)

    def may_pack(self, name: str) -> bool:
        """Whether a parameter is a weight that Rarefy prunes."""
        return name in self._names

    def load(self, group: Group) -> dict[str, Tensor]:
        """The parameters of a group, in the dtype of their file."""
        dtype = self.shards.tensors[group.sources[0]].dtype
        return replace(group, dtype=dtype).load(self.model, lambda name: self.shards.tensors[name].read())

    def layout(self, chosen: Mapping[str, Count]) -> dict[str, dict[str, Form]]:
        """What each new file holds. All is in the file where it was, packed or not."""
        files: dict[str, dict[str, Form]] = {file.name: {} for file in self.shards.files}
        gone: set[str] = set()
        for group in self.groups():
            if not chosen.keys().isdisjoint(group.targets):
                gone.update(group.sources)
                first = self.shards.tensors[group.sources[0]]
                for name, target in group.targets.items():
                    dense = Form.of(tuple(target.shape), first.dtype)
                    files[first.file.name] |= chosen[name].forms() if name in chosen else {name: dense}
        for name, stored in self.shards.tensors.items():
            if name not in gone:
                files[stored.file.name][name] = Form.of(stored.shape, stored.dtype)
        return files


@dataclass(frozen=True)
class Count:
    """What was counted in one parameter: its kept weights, and, for codes of 4 bits, bytes of its values."""

    name: str
    place: Place
    dense: torch.dtype
    values: torch.dtype
    kept: int
    stored: int
    group: int

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.place.shape)

    @property
    def zeros(self) -> int:
        """The number of zeros."""
        return self.size - self.kept

    def forms(self) -> dict[str, Form]:
        """The tensors of the packed parameter."""
        *rows, width = self.place.shape
        forms = {
            self.name: Form.of((self.stored,), self.values),
            self.name + MASK: Form.of((*rows, mask_bytes(width)), torch.uint8),
            self.name + CHECK: Form.of((1,), torch.int64),
        }
        if self.group:
            forms[self.name + SCALE] = Form.of((*rows, -(-width // self.group)), torch.float16)
        return forms

    def layer(self, packed: bool) -> PackedLayer:
        """What becomes of it."""
        dense = self.size * self.dense.itemsize
        nbytes = sum(form.size for form in self.forms().values()) if packed else dense
        return PackedLayer(self.name, self.size, self.zeros, dense, nbytes)


def _width_of_groups(checkpoint: _Checkpoint, values: str) -> int:
    """How many columns share a scale, as the first weight that may be packed shows it; 0 where there are no codes."""
    if values not in BITS:
        return 0
    weights = (
        place.turned(tensor).flatten(0, -2)
        for group in checkpoint.groups()
        for name, tensor in checkpoint.load(group).items()
        if checkpoint.may_pack(name) and tensor.dtype in PACKABLE
        for place in [place_of(checkpoint.model, name)]
    )
    first = next(weights, None)
    return GROUPS[BITS[values]] if first is None else group_of(first, BITS[values])


def _count(checkpoint: _Checkpoint, group: Group, values: str, width: int) -> Iterator[Count]:
    for name, tensor in checkpoint.load(group).items():
        if not checkpoint.may_pack(name):
            continue
        if tensor.dtype not in PACKABLE:
            raise ModelError.sentence(f"{name} is {_short(tensor.dtype)}, which cannot be packed.")
        place = place_of(checkpoint.model, name)
        kept = place.turned(_cast(tensor, values) != 0).sum(dim=-1)
        stored = int(((kept + 1) // 2).sum()) if values == "int4" else int(kept.sum())
        bits = BITS.get(values)
        dtype = {8: torch.int8, 4: torch.uint8}[bits] if bits else _cast(tensor[:0], values).dtype
        yield Count(name, place, tensor.dtype, dtype, int(kept.sum()), stored, width)


def _write(
    checkpoint: _Checkpoint,
    folder: Path,
    files: Mapping[str, Mapping[str, Form]],
    chosen: Mapping[str, Count],
    values: str,
    watch: Watch,
) -> int:
    """Write all tensors to their places, and the index of several files; how many weights were rounded."""
    rounded = 0
    shards = {file: NewShard(folder / file, forms) for file, forms in files.items()}
    where = {name: shards[file] for file, forms in files.items() for name in forms}
    groups = [group for group in checkpoint.groups() if not chosen.keys().isdisjoint(group.targets)]
    for done, group in enumerate(groups):
        for name, tensor in checkpoint.load(group).items():
            if name in chosen:
                weight = _cast(chosen[name].place.turned(tensor), values)
                packed = PackedWeight.pack(weight, BITS.get(values), chosen[name].group)
                for ending, part in packed.tensors().items():
                    where[name + ending].write(name + ending, part)
                if values in BITS:
                    rounded += int((packed.unpack(weight.dtype) != weight).sum())
            else:
                where[name].write(name, tensor)
        watch(done + 1, len(groups))
    for name, stored in checkpoint.shards.tensors.items():
        if name in where and name not in chosen:
            where[name].write(name, stored.read())
    for shard in shards.values():
        shard.finish()
    if checkpoint.shards.index is not None:
        write_index(folder, files)
    return rounded


def _cast(tensor: Tensor, values: str) -> Tensor:
    return tensor.to(torch.bfloat16) if values == "bf16" else tensor


def _say_packed(file: Path, group: int) -> None:
    """Let config.json name the method, so that loaders that do not know it refuse the folder."""
    config = read_json(file)
    config["quantization_config"] = {"quant_method": PACKED, "format": FORMAT, "group_size": group}
    replace_file(file, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
