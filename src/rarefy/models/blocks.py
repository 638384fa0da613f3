"""Finds a model's decoder blocks and the sites in them, by structure and without a table of model names.

A decoder keeps its blocks in one ``nn.ModuleList``, and nearly all of its linears are in there;
embeddings, the final norm and the head are outside. What is pruned in a block are its linears and the
weights of its experts; what chooses among experts is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import takewhile

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rarefy.errors import InputError, ModelError
from rarefy.models.experts import Found, FusedExperts, find_mixtures, linears
from rarefy.models.sites import Hindrance, LinearSite, Site
from rarefy.models.wrappers import refuse_computed_weight, refuse_wrappers

__all__ = ["Block", "LinearSite", "Site", "find_blocks", "select_sites"]

# The share of a decoder's linear weights that its list of blocks must hold. Of the decoders known to
# transformers 5.23, those with one stack of blocks have 0.98 or more in it, those with several 0.83 or less.
_MIN_SHARE = 0.9
_NAMED = 4  # of things to leave out, so many are named one by one


@dataclass(frozen=True)
class Block:
    """One decoder block: its place, its module and the sites in it, in the order of the model's modules.

    ``hindrances`` are what cannot be pruned, and is refused unless it is left out. ``others`` are parameters that
    are in none of these, such as norms, with the number of weights in each: they stay as they are.
    """

    index: int
    name: str
    module: nn.Module
    sites: list[Site] = field(default_factory=list)
    hindrances: list[Hindrance] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict, repr=False)


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks of ``model`` in order, each with all of its sites.

    Works on the meta device too. Raises ModelError where there is no list that holds nearly all of the
    decoder's linears, where a block keeps most of its weights outside of linears and experts, where a weight is
    not an ordinary floating-point one, and where an adapter is put on the model. Experts of an unknown form, and
    weights that several linears share, are hindrances of their blocks.
    """
    refuse_wrappers(model)
    list_name, modules = _block_list(model)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    widths = {embedding.embedding_dim for embedding in embeddings}
    blocks = []
    for index, module in enumerate(modules):
        name = f"{list_name}.{index}"
        found = find_mixtures(name, module, widths)
        block = Block(index, name, module, [*_sites(name, module, found)], found.hindrances)
        block.others.update(_other_weights(block))
        _refuse_other_weights(block)
        blocks.append(block)
    # A linear that shares its weight with an embedding is a head, wherever it stands.
    heads = {id(embedding.weight) for embedding in embeddings}
    for block in blocks:
        block.sites[:] = [site for site in block.sites if id(site.parameter) not in heads]
    _set_aside_shared(blocks)
    return blocks


def _sites(name: str, block: nn.Module, found: Found) -> Iterator[Site]:
    """The sites of one block in the order of its modules; routers have none."""
    fused = {id(mixture.module): mixture for mixture in found.mixtures if isinstance(mixture, FusedExperts)}
    listed = {id(site.module): site for mixture in found.mixtures for site in mixture.sites}
    for path, module in block.named_modules():
        if id(module) in fused:
            yield from fused[id(module)].sites
        elif isinstance(module, nn.Linear | Conv1D) and id(module) not in found.routers:
            refuse_computed_weight(f"{name}.{path}", module)
            yield listed.get(id(module)) or LinearSite(f"{name}.{path}", module)


def _set_aside_shared(blocks: Sequence[Block]) -> None:
    """Make hindrances of the sites whose parameter is that of another linear, too."""
    names: dict[int, list[str]] = {}
    for block in blocks:
        for site in block.sites:
            if site.expert is None or site.parameter_name == f"{site.name}.weight":
                names.setdefault(id(site.parameter), []).append(site.name)
    for block in blocks:
        for site in block.sites[:]:
            sharing = [name for name in names.get(id(site.parameter), []) if name != site.name]
            if sharing:
                block.sites.remove(site)
                reason = f"{site.name} and {sharing[0]} share one weight, which Rarefy cannot prune"
                block.hindrances.append(Hindrance(site.name, reason))


def select_sites(blocks: Sequence[Block], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Block]:
    """The same blocks, each with those of its sites that ``include`` keeps and ``exclude`` does not drop.

    Both are globs on full names, ``*.mlp.*`` for instance; no ``include`` means everything. A block
    that keeps no site is still returned, because hidden states pass through it. Raises InputError
    where a glob matches no site at all, or where nothing is left, and ModelError for a hindrance that is not
    left out.
    """
    hindrances = [hindrance for block in blocks for hindrance in block.hindrances]
    names = [site.name for block in blocks for site in block.sites]
    for argument, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in (*names, *(each.name for each in hindrances))):
                example = f"one of the {len(names)} linears, such as {names[0]}"
                raise InputError(argument, glob, f"a glob that matches at least {example}")

    def selected(name: str) -> bool:
        included = not include or any(fnmatchcase(name, glob) for glob in include)
        return included and not any(fnmatchcase(name, glob) for glob in exclude)

    for hindrance in hindrances:
        if selected(hindrance.name):
            options = " ".join(f"--exclude '{glob}'" for glob in as_globs([each.name for each in hindrances]))
            raise ModelError.sentence(f"{hindrance.reason}; leave it out with {options}.")
    if not any(map(selected, names)):
        raise InputError("exclude", list(exclude), "globs that leave at least one linear to prune")
    kept = [[site for site in block.sites if selected(site.name)] for block in blocks]
    return [replace(block, sites=sites) for block, sites in zip(blocks, kept)]


def left_dense(blocks: Sequence[Block]) -> tuple[float, str]:
    """The share of the blocks' weights that are in no linear and in no expert, and the largest such parameter."""
    others = {name: number for block in blocks for name, number in block.others.items()}
    total = sum(parameter.numel() for block in blocks for parameter in block.module.parameters())
    return sum(others.values()) / max(1, total), max(others, key=others.__getitem__, default="")


def as_globs(names: Sequence[str]) -> list[str]:
    """A few globs that match all of some names, which may be in several blocks."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names))
    if len(kinds) <= _NAMED:
        return kinds
    grouped: dict[str, list[list[str]]] = {}
    for kind in kinds:
        grouped.setdefault(kind.partition("*.")[2].partition(".")[0], []).append(kind.split("."))
    common = [takewhile(lambda some: len({*some}) == 1, zip(*group)) for group in grouped.values()]
    return [".".join([some[0] for some in parts]) + ".*" for parts in common]


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


def _num_weights(module: nn.Module | None) -> int:
    """How many weights the linears in ``module`` have together."""
    return sum(linear.weight.numel() for _, linear in linears(module)) if module is not None else 0


def _other_weights(block: Block) -> dict[str, int]:
    """The parameters of a block that are in neither linears nor experts, with the number of weights in each."""
    known = {id(linear.weight) for _, linear in linears(block.module)} | {id(site.parameter) for site in block.sites}
    hindrances = tuple(f"{hindrance.name}." for hindrance in block.hindrances)
    parameters = block.module.named_parameters(prefix=block.name)
    return {
        name: parameter.numel()
        for name, parameter in parameters
        if id(parameter) not in known and not name.startswith(hindrances)
    }


def _refuse_other_weights(block: Block) -> None:
    """Raises ModelError where most of a block's weights are in neither linears nor experts.

    Experts flattened into matrices outside of linears are such a case.
    """
    others = block.others
    if 2 * sum(others.values()) > sum(parameter.numel() for parameter in block.module.parameters()):
        raise ModelError.sentence(
            f"{block.name} has most of its weights outside of linears, in {max(others, key=others.__getitem__)} "
            "for instance: Rarefy cannot prune it."
        )
