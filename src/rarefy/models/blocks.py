"""Finds a model's decoder blocks and the linears in them, by structure and without a table of model names.

A decoder keeps its blocks in one ``nn.ModuleList``, and nearly all of its linears are in there;
embeddings, the final norm and the head are outside. What Rarefy prunes is a *site*: a two-dimensional
weight that some module applies to its input. Everything above this file sees sites only, so an
expert's slice of a three-dimensional parameter, or a weight that is still on disk, can become another
subclass of :class:`Site` without a change elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rarefy.errors import InputError, ModelError

# The share of a decoder's linear weights that its list of blocks must hold. Of the decoders known to
# transformers 5.23, those with one stack of blocks have 0.98 or more in it, those with several 0.83 or less.
_MIN_SHARE = 0.9


class Site(ABC):
    """One weight that can be pruned, in torch's orientation: ``output = input @ weight.T``.

    ``name`` is the full module name, such as ``model.layers.0.self_attn.q_proj``; ``module`` is the
    module whose forward input is the ``X (tokens, in)`` of the layer problem.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""

    @abstractmethod
    def read(self) -> Tensor:
        """A contiguous copy of the weight, ``(out, in)``, in the dtype and on the device it is kept in."""

    @abstractmethod
    def write(self, weight: Tensor) -> None:
        """Replaces the weight by ``weight (out, in)``, cast to the dtype in which it is kept."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.shape[0]} x {self.shape[1]})"


class LinearSite(Site):
    """The weight of an ``nn.Linear``, or of a ``Conv1D``, which keeps its weight as ``(in, out)``."""

    module: nn.Linear | Conv1D

    @property
    def _weight(self) -> Tensor:
        weight = self.module.weight.detach()
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self._weight.shape
        return out_features, in_features

    def read(self) -> Tensor:
        return self._weight.clone(memory_format=torch.contiguous_format)

    def write(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.shape:
            # copy_ would broadcast a row over the whole matrix without a word.
            raise ValueError(f"{self.name} is {self.shape}, the weight to write is {tuple(weight.shape)}.")
        self._weight.copy_(weight)


@dataclass(frozen=True)
class Block:
    """One decoder block: its place, its module and the sites in it, in the order of the model's modules."""

    index: int
    name: str
    module: nn.Module
    sites: list[Site] = field(default_factory=list)


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks of ``model`` in order, each with all of its sites.

    Works on the meta device too. Raises ModelError where there is no list that holds nearly all of the
    decoder's linears, where a block is a mixture of experts or keeps most of its weights outside of
    linears, where a weight is not floating-point, and where two linears share one weight.
    """
    list_name, modules = _block_list(model)
    # A linear that shares its weight with an embedding is a head, wherever it stands.
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    owner: dict[int, str] = {}
    blocks = []
    for index, module in enumerate(modules):
        name = f"{list_name}.{index}"
        _refuse_experts(name, module)
        sites: list[Site] = []
        for linear_name, linear in _linears(module):
            if id(linear.weight) in embeddings:
                continue
            site = LinearSite(f"{name}.{linear_name}", linear)
            if not linear.weight.is_floating_point():
                raise ModelError.sentence(
                    f"{site.name} keeps its weight as {str(linear.weight.dtype).removeprefix('torch.')}, "
                    "but Rarefy prunes floating-point weights only."
                )
            if id(linear.weight) in owner:
                raise ModelError.sentence(
                    f"{site.name} and {owner[id(linear.weight)]} share one weight, which Rarefy cannot prune."
                )
            owner[id(linear.weight)] = site.name
            sites.append(site)
        blocks.append(Block(index, name, module, sites))
    return blocks


def select_sites(blocks: Sequence[Block], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Block]:
    """The same blocks, each with those of its sites that ``include`` keeps and ``exclude`` does not drop.

    Both are globs on full names, ``*.mlp.*`` for instance; no ``include`` means everything. A block
    that keeps no site is still returned, because hidden states pass through it. Raises InputError
    where a glob matches no site at all, or where nothing is left.
    """
    names = [site.name for block in blocks for site in block.sites]
    for argument, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                example = f"one of the {len(names)} linears, such as {names[0]}"
                raise InputError(argument, glob, f"a glob that matches at least {example}")

    def selected(name: str) -> bool:
        included = not include or any(fnmatchcase(name, glob) for glob in include)
        return included and not any(fnmatchcase(name, glob) for glob in exclude)

    if not any(map(selected, names)):
        raise InputError("exclude", list(exclude), "globs that leave at least one linear to prune")
    return [replace(block, sites=[site for site in block.sites if selected(site.name)]) for block in blocks]


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its full name."""
    for root in _decoders(model):
        lists = [child for child in root.modules() if isinstance(child, nn.ModuleList)]
        if any(map(_num_weights, lists)):
            break
    else:
        raise ModelError.sentence(f"{type(model).__name__} has no list of blocks with linears in them.")
    # A list inside a block (experts, adapters) holds less than the list around it.
    blocks = max(lists, key=_num_weights)
    name = next(name for name, child in model.named_modules() if child is blocks)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    head_weights = _num_weights(head) if any(child is head for child in root.modules()) else 0
    share = _num_weights(blocks) / (_num_weights(root) - head_weights)
    if share < _MIN_SHARE:
        raise ModelError.sentence(
            f"{type(model).__name__} has {share:.0%} of its decoder's linear weights in {name}, but Rarefy "
            f"prunes only models that have at least {_MIN_SHARE:.0%} of them in one list of blocks."
        )
    return name, blocks


def _decoders(model: nn.Module) -> Iterator[nn.Module]:
    """Where to look for blocks: first what the model itself calls its decoder, then the whole of it.

    A model that also sees or hears has lists of blocks for that, in some cases larger ones. And what
    a few models call their decoder is the head.
    """
    if isinstance(model, PreTrainedModel):
        yield model.get_decoder()
    yield model


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear | Conv1D]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)]


def _num_weights(module: nn.Module | None) -> int:
    """How many weights the linears in ``module`` have together."""
    return sum(linear.weight.numel() for _, linear in _linears(module)) if module is not None else 0


def _refuse_experts(name: str, block: nn.Module) -> None:
    """Raises ModelError where ``block`` holds alternatives of which a router chooses some.

    They come as a list of modules of one class that have linears, or fused in one parameter with a
    leading dimension for the expert, or flattened into a two-dimensional parameter outside of linears.
    """
    later = "like experts: Rarefy does not prune mixtures of experts yet."
    for child_name, child in block.named_modules(prefix=name):
        if isinstance(child, nn.ModuleList) and len(child) > 1 and _num_weights(child):
            raise ModelError.sentence(f"{child_name} is a list of {len(child)} modules, {later}")
        if isinstance(child, _ConvNd):  # has a three-dimensional weight, but no experts
            continue
        for parameter_name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1:
                what = f"{child_name}.{parameter_name} is a stack of {parameter.shape[0]} matrices"
                raise ModelError.sentence(f"{what}, {later}")
    parameters = dict(block.named_parameters(prefix=name))
    if 2 * _num_weights(block) < sum(parameter.numel() for parameter in parameters.values()):
        linears = {id(linear.weight) for _, linear in _linears(block)}
        others = {key: value.numel() for key, value in parameters.items() if id(value) not in linears}
        raise ModelError.sentence(
            f"{name} has most of its weights outside of linears, in {max(others, key=others.__getitem__)} "
            "for instance: Rarefy cannot prune it."
        )
