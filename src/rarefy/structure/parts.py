"""What can be removed from inside of every block: MLP neurons, and KV heads with their query heads.

Found by structure, as sites are: an entry of the config is lowered, and the shapes that change show which rows and
columns belong to it. Columns of one linear in a block change, its exit (``down_proj``, ``o_proj``): these are what a
part puts out. Rows of others, biases and whatever else has a length that changes go with them. In which order a fused
matrix has its rows is found by trying: a block without some parts must compute what it does with the exit's columns
at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rarefy.errors import ModelError
from rarefy.models.blocks import Block, find_blocks
from rarefy.models.sites import LinearSite
from rarefy.structure.config import changed, entry, number_in, skeleton

Kind = Literal["neurons", "heads"]
WORDS: dict[Kind, str] = {"neurons": "MLP neurons", "heads": "KV heads"}


@dataclass(frozen=True)
class Slot:
    """A dimension of a parameter that parts share out: each of its ``segments`` holds all parts, one after another.

    ``name`` is the parameter's within its block.
    """

    name: str
    dim: int
    segments: tuple[int, ...]

    def index(self, kept: Bool[Tensor, " parts"]) -> Tensor:
        """The places of the kept parts along the dimension."""
        places = [kept.repeat_interleave(length // len(kept)) for length in self.segments]
        return torch.cat(places).nonzero().squeeze(1)


@dataclass(frozen=True)
class Parts:
    """The parts of one kind in every block: how many, and where they are.

    ``exits`` and ``slots`` are of each block, by its index; the exit's own columns are among its slots. ``width`` is
    the number of the exit's columns that a part has. ``order`` is one of ``orders()``, in which fused rows are.
    """

    kind: Kind
    number: int
    width: int
    entries: Mapping[str, tuple[int, int]]  # of the config: their value for all parts, and for each part
    fixed: Mapping[str, Any]  # entries that must be said from then on
    exits: Mapping[int, LinearSite] = field(repr=False)
    slots: Mapping[int, tuple[Slot, ...]] = field(repr=False)
    fused: tuple[tuple[int, ...], ...] = ()

    def config_entries(self, kept: int) -> dict[str, Any]:
        """What the config says where ``kept`` parts are left in every block."""
        return dict(self.fixed) | {
            key: whole - each * (self.number - kept) for key, (whole, each) in self.entries.items()
        }

    def orders(self) -> Iterator[Parts]:
        """These parts with each order in which the rows of a fused matrix can be."""
        yield self
        for segments in self.fused:
            yield replace(
                self,
                slots={
                    block: tuple(
                        replace(slot, segments=segments) if slot.segments == (sum(segments),) else slot
                        for slot in slots
                    )
                    for block, slots in self.slots.items()
                },
            )


def find_parts(model: PreTrainedModel, kind: Kind) -> Parts:
    """The parts of one kind in every block of a model, which may be on the meta device.

    Raises ModelError where there are none, or where they have no place in the model's config.
    """
    config, blocks = model.config, find_blocks(model)
    name = type(model).__name__
    tried = _neurons(config, blocks) if kind == "neurons" else _heads(name, config)
    reasons = []
    for fixed, entries, number, fused in tried:
        try:
            return _parts(model, blocks, kind, fixed, entries, number, fused)
        except ModelError as error:
            reasons.append(str(error))
    # Entries that count other things than neurons are refused for reasons that say nothing of these.
    telling = [reason for reason in reasons if kind == "heads" or "experts" in reason]
    raise ModelError.sentence(
        next(iter(telling), f"{name} has no {WORDS[kind]} of which its config could have fewer in every block.")
    )


_Try = tuple[dict[str, Any], dict[str, tuple[int, int]], int, tuple[tuple[int, ...], ...]]


def _neurons(config: PreTrainedConfig, blocks: Sequence[Block]) -> Iterator[_Try]:
    """Entries that may be the number of neurons: those that say what a linear reads, then those that say nothing."""
    widths = {site.shape[1] for block in blocks for site in block.sites if site.expert is None}
    values = config.to_dict()
    number = [(key, value) for key, value in values.items() if type(value) is int and value in widths]
    silent = [(key, width) for key, value in values.items() if value is None for width in sorted(widths)]
    for key, value in [*number, *((key, width) for key, width in silent if not key.endswith("_id"))]:
        if value > 1:
            yield {}, {key: (value, 1)}, value, ((value, value),)


def _heads(name: str, config: PreTrainedConfig) -> Iterator[_Try]:
    """The entries of heads, and of KV heads where they are others."""
    heads = number_in(config, "num_attention_heads")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(kv_heads, int) or heads % kv_heads:
        raise ModelError.sentence(f"{name} has other numbers of heads in each block, which Rarefy cannot lower.")
    if kv_heads < 2:
        raise ModelError.sentence(f"{name} has a single KV head in each block, which cannot be removed.")
    try:
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
    except Exception as error:  # configs of other widths in each block have errors of their own
        raise ModelError.sentence(f"{name} has no single width of its heads, which its config could keep.") from error
    entries = {entry(config, "num_attention_heads"): (heads, heads // kv_heads)}
    if hasattr(config, "num_key_value_heads"):
        entries[entry(config, "num_key_value_heads")] = (kv_heads, 1)
    q, kv = heads * width, kv_heads * width
    yield {"head_dim": width}, entries, kv_heads, ((q, kv, kv),)


def _parts(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    kind: Kind,
    fixed: Mapping[str, Any],
    entries: Mapping[str, tuple[int, int]],
    number: int,
    fused: tuple[tuple[int, ...], ...],
) -> Parts:
    """The parts that the entries are the number of. Raises ModelError where they are no such thing."""
    name = type(model).__name__
    known = Parts(kind, number, 0, entries, fixed, {}, {}, fused)
    before = _shapes(skeleton(changed(model.config, known.config_entries(number))))
    if before != _shapes(model):
        raise ModelError.sentence(f"{name} has no {WORDS[kind]} that its config counts.")
    left = number - max(1, number // 2)
    try:
        after = _shapes(skeleton(changed(model.config, known.config_entries(left))))
    except ModelError:
        after = before
    if before == after or before.keys() != after.keys():
        raise ModelError.sentence(
            f"{name} has no place in its config for fewer {WORDS[kind]} in every block, so that no stock model has "
            "them."
        )
    differ = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    exits: dict[int, LinearSite] = {}
    slots: dict[int, tuple[Slot, ...]] = {}
    for block in blocks:
        own = {key: differ.pop(key) for key in list(differ) if key.startswith(f"{block.name}.")}
        if own:
            exits[block.index], slots[block.index] = _of_block(block, own, number, left, WORDS[kind])
    if differ:
        raise ModelError.sentence(f"{next(iter(differ))} depends on the number of {WORDS[kind]}, too.")
    widths = {site.shape[1] for site in exits.values()}
    if len(widths) != 1 or (width := widths.pop()) % number:
        raise ModelError.sentence(f"{name} has other numbers of {WORDS[kind]} in some blocks.")
    return replace(known, width=width // number, exits=exits, slots=slots)


def _of_block(
    block: Block, differ: Mapping[str, tuple[torch.Size, torch.Size]], number: int, left: int, words: str
) -> tuple[LinearSite, tuple[Slot, ...]]:
    """The exit and the slots of one block, given the shapes that change."""
    sites = {site.parameter_name: site for site in block.sites}
    exits: list[LinearSite] = []
    slots = []
    for key, (old, new) in differ.items():
        dims = [dim for dim, (a, b) in enumerate(zip(old, new)) if a != b]
        site = sites.get(key)
        if len(dims) != 1 or old[dims[0]] * left != new[dims[0]] * number or old[dims[0]] % number:
            raise ModelError.sentence(f"{key} does not shrink in proportion to the number of {words}.")
        if site is not None and (site.expert is not None or not isinstance(site, LinearSite)):
            raise ModelError.sentence(f"{key} holds experts, of which Rarefy removes no {words}.")
        slots.append(Slot(key.removeprefix(f"{block.name}."), dims[0], (old[dims[0]],)))
        if isinstance(site, LinearSite) and site.view(torch.empty(new, device="meta")).shape[0] == site.shape[0]:
            exits.append(site)
    if len(exits) != 1:
        raise ModelError.sentence(f"{block.name} has {len(exits)} linears that read {words}, but Rarefy knows one.")
    return exits[0], tuple(slots)


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}
