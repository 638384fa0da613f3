"""The smaller model: blocks, neurons and heads left out, all other weights as they are.

The kept tensors are taken from the dense model, and the modules are those that transformers builds from the smaller
config, so that what is written is an ordinary model. That it computes what the dense model does with the removed
parts off is not taken on trust: both are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from rarefy.errors import ModelError
from rarefy.models.blocks import Block, find_blocks
from rarefy.structure.config import changed, fewer_blocks, number_in, skeleton
from rarefy.structure.parts import WORDS, Parts

# Two computations of one thing in half precision, and in float32, as a share of what the block adds to its input.
_SAME = {torch.float32: 1e-3, torch.float64: 1e-3}
_SAME_IN_HALF = 0.1


@dataclass(frozen=True)
class Removal:
    """What is left of a model: the indices of its ``blocks``, and of each kind of parts the kept ones of every block.

    A block that has no parts of a kind is not in its mapping.
    """

    blocks: tuple[int, ...]
    parts: tuple[tuple[Parts, Mapping[int, Bool[Tensor, " parts"]]], ...] = field(default=())

    def entries(self, model: PreTrainedModel) -> dict[str, Any]:
        """The entries of the config that change. Raises ModelError for other numbers in each block."""
        changes: dict[str, Any] = {}
        if len(self.blocks) != number_in(model.config, "num_hidden_layers"):
            changes |= fewer_blocks(model.config, self.blocks)
        for parts, kept in self.parts:
            numbers = {int(kept[index].sum()) for index in self.blocks if index in kept}
            if len(numbers) != 1:
                raise ModelError.sentence(f"The config has one number of {WORDS[parts.kind]} for all blocks.")
            changes |= parts.config_entries(numbers.pop())
        return changes


def shrunk_skeleton(model: PreTrainedModel, removal: Removal) -> PreTrainedModel:
    """The smaller model on the meta device; ``model`` may be there, too.

    Raises ModelError where it has no stock form: where transformers builds other blocks than those that are kept.
    """
    made = skeleton(changed(model.config, removal.entries(model)))
    old, new = find_blocks(model), find_blocks(made)
    if len(new) != len(removal.blocks):
        raise ModelError.sentence(f"{type(model).__name__} keeps {len(new)} blocks, whatever its config says.")
    for place, index in enumerate(removal.blocks):
        if difference := _difference(old[index].module, index, new[place].module, place, removal):
            raise ModelError.sentence(
                f"{old[index].name} would be another kind of block at place {place} ({difference}): "
                f"{type(model).__name__} has a rule by place that no config without some of its blocks can say."
            )
    return made


def shrink(model: PreTrainedModel, removal: Removal) -> PreTrainedModel:
    """The smaller model; tensors of which nothing is removed are shared with ``model``.

    Columns of the exits are left out as they are: whoever repairs them writes them into ``model`` first. Raises
    ModelError where there is no stock form.
    """
    made = shrunk_skeleton(model, removal)
    old, new = find_blocks(model), find_blocks(made)
    names = {f"{new[place].name}.": f"{old[index].name}." for place, index in enumerate(removal.blocks)}
    dense = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    cuts = _cuts(old, removal)

    def source(name: str) -> Tensor:
        prefix = next((prefix for prefix in names if name.startswith(prefix)), None)
        there = name if prefix is None else names[prefix] + name.removeprefix(prefix)
        tensor = dense[there].detach()
        for dim, index in cuts.get(there, ()):
            tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor

    _fill(made, source)
    made.tie_weights()
    made.config.dtype = model.config.dtype or model.dtype
    made.generation_config = deepcopy(model.generation_config)
    made.eval().requires_grad_(False)
    return made


def _cuts(blocks: Sequence[Block], removal: Removal) -> dict[str, list[tuple[int, Tensor]]]:
    """By the full name of a parameter, what is left of its dimensions."""
    cuts: dict[str, list[tuple[int, Tensor]]] = {}
    for parts, kept in removal.parts:
        for index, mask in kept.items():
            for slot in parts.slots[index]:
                cuts.setdefault(f"{blocks[index].name}.{slot.name}", []).append((slot.dim, slot.index(mask)))
    return cuts


def _fill(made: nn.Module, source: Any) -> None:
    """Put the tensors that ``source`` gives by name in place of those on the meta device."""
    known: dict[str, Tensor] = {}
    for path, module in made.named_modules():
        prefix = f"{path}." if path else ""
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is None:
                    continue
                found = known.setdefault(prefix + name, source(prefix + name))
                if found.shape != tensor.shape:
                    raise ModelError.sentence(
                        f"{prefix}{name} would be {tuple(found.shape)}, but the smaller model has "
                        f"{tuple(tensor.shape)}."
                    )
                kind[name] = nn.Parameter(found, False) if kind is module._parameters else found


def _difference(old: nn.Module, index: int, new: nn.Module, place: int, removal: Removal) -> str:
    """What a block of the smaller model is that the block it is made from is not; "" where they are alike."""
    modules = dict(new.named_modules())
    if modules.keys() != dict(old.named_modules()).keys():
        return "it has other modules"
    shares = {(parts.number, int(kept[index].sum())) for parts, kept in removal.parts if index in kept}
    for path, module in old.named_modules():
        other = modules[path]
        if type(other) is not type(module):
            return f"{type(other).__name__} in place of {type(module).__name__}"
        theirs = vars(other)
        for key, value in vars(module).items():
            if key == "training" or key.startswith("_") or not isinstance(value, (int, float, str, type(None))):
                continue
            their = theirs.get(key)
            if their == value or (type(value) is type(their) is int and _follows(value, their, index, place, shares)):
                continue
            return f"{f'{path}.' if path else ''}{key} is {their!r} in place of {value!r}"
    return ""


def _follows(value: int, other: int, index: int, place: int, shares: set[tuple[int, int]]) -> bool:
    """Whether a number is another because the block has another place, or has fewer parts."""
    return (value, other) == (index, place) or any(value * left == other * number for number, left in shares)


# --- Comparing --------------------------------------------------------------------------------------------


def with_order(model: PreTrainedModel, parts: Parts, ids: Int64[Tensor, "windows length"]) -> Parts:
    """The parts with the order in which the model's fused rows are, found by removing some parts of one block.

    ``ids`` are a few tokens. Raises ModelError where the block without them does not compute what it does with
    their columns at zero.
    """
    index = min(parts.exits)
    block, site = find_blocks(model)[index], parts.exits[index]
    kept = torch.ones(parts.number, dtype=torch.bool)
    kept[:: 2 if parts.number > 2 else parts.number] = False  # every second, so that any other order shows
    weight = site.read()
    columns = kept.repeat_interleave(parts.width).to(weight.device)
    try:
        site.write(weight * columns)
        entered, expected = _through(model, block.module, ids)
    finally:
        site.write(weight)
    scale = float((expected - entered).norm()) or 1.0
    limit = _SAME.get(model.dtype, _SAME_IN_HALF)
    everywhere = dict.fromkeys(parts.exits, kept)
    for ordered in parts.orders():
        removal = Removal(tuple(range(number_in(model.config, "num_hidden_layers"))), ((ordered, everywhere),))
        small = _one_block(model, removal, index)
        try:
            with _in_place_of(model, block, small):
                found = _through(model, small, ids)[1]
        except RuntimeError:  # a size that does not follow from those that the config says
            continue
        if float((found - expected).norm()) <= limit * scale:
            return ordered
    raise ModelError.sentence(
        f"{block.name} without some of its {WORDS[parts.kind]} does not compute what it does with their outputs at "
        "zero, so that Rarefy cannot remove them."
    )


def _one_block(model: PreTrainedModel, removal: Removal, index: int) -> nn.Module:
    """One block of the smaller model, with its weights."""
    made = find_blocks(shrunk_skeleton(model, removal))[index]
    old = find_blocks(model)
    cuts = _cuts(old, removal)
    tensors = dict(old[index].module.named_parameters()) | dict(old[index].module.named_buffers())

    def source(name: str) -> Tensor:
        tensor = tensors[name].detach()
        for dim, where in cuts.get(f"{old[index].name}.{name}", ()):
            tensor = tensor.index_select(dim, where.to(tensor.device))
        return tensor

    _fill(made.module, source)
    return made.module.eval()


@contextmanager
def _in_place_of(model: PreTrainedModel, block: Block, module: nn.Module) -> Iterator[None]:
    """Within the scope, another module is in a block's place."""
    path, _, place = block.name.rpartition(".")
    modules = model.get_submodule(path)
    try:
        modules[int(place)] = module  # type: ignore[operator]
        yield
    finally:
        modules[int(place)] = block.module  # type: ignore[operator]


class _Enough(Exception):
    """Ends a forward pass where the block has been seen."""


def _through(model: PreTrainedModel, module: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What enters a block and what leaves it, in float32."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        seen.extend([entered.float(), (output if isinstance(output, Tensor) else output[0]).float()])
        raise _Enough  # later blocks may read what this one shares with them, in another size

    hook = module.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), suppress(_Enough):
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        hook.remove()
    return seen[0], seen[1]
