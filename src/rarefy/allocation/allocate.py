"""The pattern of every layer of a model, by one of the rules or from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rarefy.allocation.budget import Layer, patterns
from rarefy.allocation.listed import listed, read_listed
from rarefy.allocation.names import ALLOWED, PROFILE, UNIFORM, is_allocation
from rarefy.allocation.profile import profile
from rarefy.errors import InputError
from rarefy.layer.pattern import Pattern
from rarefy.models.blocks import Block

RULES: Mapping[str, Callable[[Sequence[Layer], float], dict[str, float]]] = {PROFILE: profile}


def allocate(allocation: str, pattern: Pattern, blocks: Sequence[Block]) -> dict[str, Pattern]:
    """The pattern of each site of ``blocks`` by name; {} for "uniform", where all have ``pattern``.

    Raises InputError where ``allocation`` is none, or a file that cannot be used, and PatternError where the pattern
    has too few steps.
    """
    if allocation == UNIFORM:
        return {}
    layers = [Layer(site.name, block.index, site.shape) for block in blocks for site in block.sites]
    by_name = {layer.name: layer for layer in layers}
    sparsity = pattern.nominal_sparsity()
    if allocation in RULES:
        return patterns(pattern, RULES[allocation](layers, sparsity), by_name)
    if not is_allocation(allocation):
        raise InputError("allocation", allocation, ALLOWED)
    wanted = listed(layers, sparsity, read_listed(Path(allocation)), allocation)
    return patterns(pattern, wanted, by_name, exact_total=False)
