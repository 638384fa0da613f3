"""Reads the written files again, tensor by tensor, and checks them against what the run promised.

Nothing here trusts what pruning believed: zeros are counted in the bytes on disk. A weight that is
kept may be zero by chance, so a promise is a least number of zeros, never an exact one. All tensors of the
model must still be there, also those that were not pruned, and those that are no part of the language model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from rarefy.errors import ModelError
from rarefy.layer.pattern import Pattern, pattern_from_spec
from rarefy.models.blocks import LinearSite, Site, find_blocks
from rarefy.models.conversion import Plan, plan_conversion
from rarefy.models.gguf import block_matrices
from rarefy.models.losses import lost_tensors, missing_parameters
from rarefy.models.shards import Shards
from rarefy.models.source import ModelSource, resolve_model
from rarefy.packing.unpack import PackedCheckpoint
from rarefy.pruning.records import LayerRecord
from rarefy.runs.folder import RunFolder


@dataclass
class LayerInspection:
    """What the file holds of one linear; ``problems`` says in words which promise it breaks.

    ``shape`` is [out, in], ``pattern`` what was checked ("" where nothing was promised), ``type`` how a GGUF file
    holds it.
    """

    name: str
    shape: list[int]
    zeros: int = 0
    pattern: str = ""
    problems: list[str] = field(default_factory=list)
    type: str = ""

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the file."""
        return self.zeros / self.size


@dataclass
class Inspection:
    """What the files of a model hold; ``promised`` says whether a run folder told what to expect.

    ``lost`` says in words which tensors are not in the files, but should be; ``tensors`` are the names of those
    that are there.
    """

    folder: str
    promised: bool
    layers: list[LayerInspection]
    lost: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list, repr=False)

    @property
    def ok(self) -> bool:
        """Whether every promise is kept."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """Every broken promise, each with the name of its layer or of what is not there."""
        return [f"{layer.name}: {problem}" for layer in self.layers for problem in layer.problems] + self.lost

    @property
    def size(self) -> int:
        """The number of weights in the layers that were looked at."""
        return sum(layer.size for layer in self.layers)

    @property
    def zeros(self) -> int:
        """The number of zeros among them."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros over all layers that were looked at."""
        return self.zeros / self.size if self.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        layers = [{**asdict(layer), "sparsity": layer.sparsity} for layer in self.layers]
        return {
            "folder": self.folder,
            "promised": self.promised,
            "ok": self.ok,
            "size": self.size,
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "problems": self.problems,
            "layers": layers,
        }


def inspect_folder(name: str | Path, pattern: Pattern | None = None, source: ModelSource | None = None) -> Inspection:
    """Count the zeros of every linear in the decoder blocks, and check what was promised about them.

    ``name`` is a run folder or its ``model``: then the layers of ``layers.jsonl`` must hold at least
    the zeros it says, in its pattern, and all tensors that ``run.json`` counts must be there. It may be any other
    model with files of weights, packed ones too, or a GGUF file: then its linears are listed. ``pattern`` is
    checked in addition, and so is that nothing is lost of ``source``, the model that it was made from. Tensors are
    read one at a time, but for experts that the model keeps in one stack: these block by block.
    Raises ModelError where there is no model, or none that can be read in parts, InputError where the run
    folder is damaged.
    """
    if Path(name).suffix.lower() == ".gguf" and Path(name).is_file():
        return _inspect_gguf(Path(name), pattern)
    run = RunFolder.find(name)
    written = resolve_model(str(run.model if run else name), packed=True)
    if written.kind == "gguf":
        return _inspect_gguf(written.path, pattern)
    shards = Shards.open(written.fetch())
    model = written.skeleton()
    sites = {site.name: site for block in find_blocks(model) for site in block.sites}
    records = {record.name: record for record in run.read_layers()} if run else {}
    weights = _StoredWeights(model, shards, quantizer := written.dequantizer())
    if written.packing is not None:
        weights = _PackedWeights(model, shards, PackedCheckpoint(shards.folder))

    layers = []
    for layer_name in records or sites:
        record, site = records.get(layer_name), sites.get(layer_name)
        layer = LayerInspection(layer_name, record.shape if record else list(site.shape) if site else [0, 0])
        layers.append(layer)
        try:
            weight = weights.read(site) if site else None
        except ModelError as error:
            layer.problems.append(f"it cannot be read: {error}")
            continue
        if site is None or weight is None:
            layer.problems.append("it is missing from the model's files")
        else:
            layer.shape = list(site.shape)
            _inspect(layer, weight, record, pattern)
    known = {site.parameter_name for site in sites.values()}  # whose loss is said above
    missing = [] if written.packing is not None else missing_parameters(model, shards, quantizer)
    lost = [f"{name}: it is not in the files" for name in missing if name not in known]
    if source is not None:
        lost += [f"{name}: it was in the files of {source.name}" for name in lost_tensors(source, shards)]
    elif run and run.run.is_file() and written.packing is None:
        lost += _uncounted(shards.tensors, run.read_run().get("tensors"))
    return Inspection(str(shards.folder), bool(run), layers, lost, [*shards.tensors])


def count_tensors(names: Iterable[str]) -> dict[str, int]:
    """How many tensors there are of each kind: names that differ in numbers only count together, with * for these."""
    return dict(Counter(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names))


def _uncounted(names: Iterable[str], promised: Any) -> Iterator[str]:
    """What the files hold fewer of than a run has counted; runs of earlier releases have counted nothing."""
    there = count_tensors(names)
    for kind, number in promised.items() if isinstance(promised, Mapping) else ():
        if there.get(kind, 0) < number:
            yield f"{kind}: the files hold {there.get(kind, 0):,} tensors of this name, promised were {number:,}"


def _inspect_gguf(file: Path, pattern: Pattern | None) -> Inspection:
    """The same for a GGUF file, whose matrices are read one at a time."""
    layers = []
    for name, kind, weight in block_matrices(file):
        layer = LayerInspection(name, list(weight.shape), type=kind)
        _inspect(layer, weight, None, pattern)
        layers.append(layer)
    return Inspection(str(file), False, layers)


def _inspect(layer: LayerInspection, weight: Tensor, record: LayerRecord | None, pattern: Pattern | None) -> None:
    """Count and check one weight (out, in) as it lies in the file."""
    if list(weight.shape) != layer.shape:
        layer.problems.append(f"its shape in the file is {list(weight.shape)}")
        return
    nonzero = weight != 0
    layer.zeros = layer.size - int(nonzero.sum())
    if not bool(weight.isfinite().all()):
        layer.problems.append("it holds NaN or infinity")
    if record is not None:
        layer.pattern = record.pattern
        layer.problems += dict.fromkeys(_broken_promises(nonzero, record))  # each once
    if pattern is not None and str(pattern) != layer.pattern:
        layer.pattern = ", ".join(filter(None, (layer.pattern, str(pattern))))
        layer.problems += pattern.excess(nonzero)


def _broken_promises(nonzero: Tensor, record: LayerRecord) -> Iterator[str]:
    """What of ``record`` the weight with these non-zeros (out, in) does not hold."""
    if list(nonzero.shape) != record.shape:
        yield f"it has shape {list(nonzero.shape)}, promised was {record.shape}"
        return
    zeros = record.size - int(nonzero.sum())
    if zeros < record.pruned:
        yield f"it holds {zeros:,} zeros, promised were {record.pruned:,}"
    if record.pattern_spec:
        yield from pattern_from_spec(record.pattern_spec).excess(nonzero)


class _StoredWeights:
    """Reads the weight of a site from the files of a model, under whatever name and in whatever form it is there.

    Most have a tensor of their name. A base model's checkpoint leaves out the prefix that the model with
    a head has. And experts may be one matrix each in the files, under other names, or all in one stack.
    """

    def __init__(self, model: PreTrainedModel, shards: Shards, quantizer: HfQuantizer | None) -> None:
        self._model, self._tensors, self._quantizer = model, shards.tensors, quantizer
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._made: dict[str, Tensor] = {}  # the stacks of one block at most

    def read(self, site: Site) -> Tensor | None:
        """The weight (out, in), None where the files do not have it; ModelError where they are damaged."""
        name = f"{site.name}.weight"
        stored = self._tensors.get(name) or self._tensors.get(name.removeprefix(self._prefix))
        if stored is not None and self._quantizer is None:
            tensor = stored.read()
            same = isinstance(site, LinearSite) and tensor.shape == site.parameter.shape
            return site.view(tensor) if same else tensor
        made = self._parameter(site.parameter_name)
        return None if made is None else site.view(made)

    def _parameter(self, name: str) -> Tensor | None:
        """A parameter as transformers makes it when it loads the files, but in the dtype of the files."""
        if name not in self._made and (group := self._plan.groups.get(name)):
            if len(self._made) > 1:
                self._made.clear()
            own = group if group.dequantize else replace(group, dtype=self._tensors[group.sources[0]].dtype)
            self._made |= own.load(self._model, lambda source: self._tensors[source].read())
        return self._made.get(name)

    @cached_property
    def _plan(self) -> Plan:
        stored = {name: tensor.meta() for name, tensor in self._tensors.items() if tensor.known}
        return plan_conversion(self._model, stored, self._quantizer)


class _PackedWeights(_StoredWeights):
    """Reads weights from a packed folder, in which some are packed and others dense."""

    def __init__(self, model: PreTrainedModel, shards: Shards, checkpoint: PackedCheckpoint) -> None:
        super().__init__(model, shards, None)
        self._checkpoint = checkpoint

    def read(self, site: Site) -> Tensor | None:
        name = site.parameter_name
        if name not in self._checkpoint.packed:
            return super().read(site)
        if name not in self._made:
            self._made = {name: self._checkpoint.read(name)}  # one parameter at most: a stack has many sites
        return site.view(self._made[name])
