"""Finds a model's decoder blocks and the sites in them, by structure and without a table of model names.

A decoder keeps its blocks in one ``nn.ModuleList``, and nearly all of its linears are in there;
embeddings, the final norm and the head are outside. What is pruned in a block are its linears and the
weights of its experts; what chooses among experts is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rarefy.errors import InputError, ModelError
from rarefy.models.experts import FusedExperts, find_mixtures, linears
from rarefy.models.sites import LinearSite, Site
from rarefy.models.wrappers import refuse_computed_weight, refuse_wrappers

__all__ = ["Block", "LinearSite", "Site", "find_blocks", "select_sites"]

# The share of a decoder's linear weights that its list of blocks must hold. Of the decoders known to
# transformers 5.23, those with one stack of blocks have 0.98 or more in it, those with several 0.83 or less.
_MIN_SHARE = 0.9


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
    decoder's linears, where a block keeps most of its weights outside of linears and experts, or experts
    in a form that is not known, where a weight is not an ordinary floating-point one, where two share one
    weight, and where an adapter is put on the model.
    """
    refuse_wrappers(model)
    list_name, modules = _block_list(model)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    widths = {embedding.embedding_dim for embedding in embeddings}
    # A linear that shares its weight with an embedding is a head, wherever it stands.
    owner = {id(embedding.weight): "" for embedding in embeddings}
    blocks = []
    for index, module in enumerate(modules):
        name = f"{list_name}.{index}"
        sites = []
        for site in _sites(name, module, widths):
            known = owner.setdefault(id(site.parameter), site.parameter_name)
            if known and known != site.parameter_name:
                raise ModelError.sentence(
                    f"{site.name} and {known.removesuffix('.weight')} share one weight, which Rarefy cannot prune."
                )
            if known:
                sites.append(site)
        _refuse_other_weights(name, module, sites)
        blocks.append(Block(index, name, module, sites))
    return blocks


def _sites(name: str, block: nn.Module, widths: set[int]) -> Iterator[Site]:
    """The sites of one block in the order of its modules; routers have none."""
    mixtures, routers = find_mixtures(name, block, widths)
    fused = {id(mixture.module): mixture for mixture in mixtures if isinstance(mixture, FusedExperts)}
    listed = {id(site.module): site for mixture in mixtures for site in mixture.sites}
    for path, module in block.named_modules():
        if id(module) in fused:
            yield from fused[id(module)].sites
        elif isinstance(module, nn.Linear | Conv1D) and id(module) not in routers:
            refuse_computed_weight(f"{name}.{path}", module)
            yield listed.get(id(module)) or LinearSite(f"{name}.{path}", module)


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


def _num_weights(module: nn.Module | None) -> int:
    """How many weights the linears in ``module`` have together."""
    return sum(linear.weight.numel() for _, linear in linears(module)) if module is not None else 0


def _refuse_other_weights(name: str, block: nn.Module, sites: Sequence[Site]) -> None:
    """Raises ModelError where most of a block's weights are in neither linears nor experts.

    Experts flattened into matrices outside of linears are such a case.
    """
    known = {id(linear.weight) for _, linear in linears(block)} | {id(site.parameter) for site in sites}
    others = {key: value.numel() for key, value in block.named_parameters(prefix=name) if id(value) not in known}
    if 2 * sum(others.values()) > sum(parameter.numel() for parameter in block.parameters()):
        raise ModelError.sentence(
            f"{name} has most of its weights outside of linears, in {max(others, key=others.__getitem__)} "
            "for instance: Rarefy cannot prune it."
        )
