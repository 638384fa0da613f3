"""The pattern of every layer of a model, by one of the rules or from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rarefy.allocation.alphapruning import AlphaPruning
from rarefy.allocation.budget import Layer, patterns
from rarefy.allocation.fisher import Fisher
from rarefy.allocation.listed import listed, read_listed
from rarefy.allocation.lsa import Lsa
from rarefy.allocation.names import ALLOWED, ALPHAPRUNING, FISHER, LSA, MEASURED, OWL, PROFILE, UNIFORM, is_allocation
from rarefy.allocation.owl import Owl
from rarefy.allocation.profile import profile
from rarefy.allocation.rule import MeasuredRule
from rarefy.errors import InputError
from rarefy.layer.pattern import Pattern
from rarefy.models.blocks import Block

RULES: Mapping[str, Callable[[Sequence[Layer], float], dict[str, float]]] = {PROFILE: profile}
MEASURED_RULES: Mapping[str, MeasuredRule] = {
    FISHER: Fisher(),
    OWL: Owl(),
    ALPHAPRUNING: AlphaPruning(),
    LSA: Lsa(),
}


def layers_of(blocks: Sequence[Block]) -> list[Layer]:
    """What rules know of the layers to prune without their weights."""
    return [Layer(site.name, block.index, site.shape) for block in blocks for site in block.sites]


def allocate(allocation: str, pattern: Pattern, blocks: Sequence[Block]) -> dict[str, Pattern]:
    """The pattern of each site of ``blocks`` by name; {} for "uniform", where all have ``pattern``.

    For a rule that measures the dense model first it is the uniform one, which has passed all checks. Raises
    InputError where ``allocation`` is none, or a file that cannot be used, and PatternError where the pattern has too
    few steps.
    """
    if allocation == UNIFORM:
        return {}
    layers = layers_of(blocks)
    by_name = {layer.name: layer for layer in layers}
    sparsity = pattern.nominal_sparsity()
    if allocation in RULES:
        return patterns(pattern, RULES[allocation](layers, sparsity), by_name)
    if allocation in MEASURED:
        return patterns(pattern, dict.fromkeys(by_name, sparsity), by_name)
    if not is_allocation(allocation):
        raise InputError("allocation", allocation, ALLOWED)
    wanted = listed(layers, sparsity, read_listed(Path(allocation)), allocation)
    return patterns(pattern, wanted, by_name, exact_total=False)


def allocate_measured(
    allocation: str, pattern: Pattern, layers: Sequence[Layer], facts: Mapping[str, Any]
) -> dict[str, Pattern]:
    """The pattern of each layer by name, from what a rule has measured of each."""
    wanted = MEASURED_RULES[allocation].spread(layers, facts, pattern.nominal_sparsity())
    return patterns(pattern, wanted, {layer.name: layer for layer in layers})
