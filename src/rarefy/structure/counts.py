"""How much of each kind is removed so that at most a share of the parameters is left: all that can be, by counting.

Of all counts of blocks, KV heads and MLP neurons only those matter from which nothing can be given back: with one
block, head or unit of neurons more the model would be too large.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from rarefy.errors import InputError, ModelError
from rarefy.models.blocks import find_blocks
from rarefy.structure.config import fewer_blocks
from rarefy.structure.parts import Kind, Parts, find_parts
from rarefy.structure.size import size_of

Removable = Literal["blocks", "heads", "neurons"]
REMOVABLE: tuple[Removable, ...] = get_args(Removable)

_ROUNDING = 1e-12  # 0.29 of 100 parameters are 29, which the product of the two numbers is a little below


@dataclass(frozen=True, order=True)
class Counts:
    """What is removed: so many whole blocks, and of every block that is left so many KV heads and MLP neurons."""

    blocks: int = 0
    heads: int = 0
    neurons: int = 0

    def of(self, kind: Removable) -> int:
        """The number of one kind."""
        number: int = getattr(self, kind)
        return number

    @property
    def is_single(self) -> bool:
        """Whether a single kind is removed."""
        return sum(self.of(kind) > 0 for kind in REMOVABLE) == 1


@dataclass(frozen=True)
class Space:
    """The ``candidates`` that leave at most ``limit`` parameters, from the fewest blocks to the most.

    ``numbers`` is how many of each kind there are, of those that may be removed; ``unit`` how many neurons go at
    once. ``refused`` says of the other kinds why not.
    """

    limit: int
    numbers: Mapping[Removable, int]
    unit: int
    candidates: tuple[Counts, ...] = field(repr=False)
    refused: Mapping[Removable, str]

    def drawn(self, most: int, seed: int) -> list[Counts]:
        """At most ``most`` candidates, in their order: all that remove a single kind, and some of the others."""
        singles = [counts for counts in self.candidates if counts.is_single]
        others = [counts for counts in self.candidates if not counts.is_single]
        num = max(0, min(len(others), most - len(singles)))
        return sorted([*singles, *random.Random(seed).sample(others, num)])

    def span(self, kind: Removable) -> tuple[int, int]:
        """The fewest and the most of one kind that a candidate removes."""
        found = [counts.of(kind) for counts in self.candidates]
        return min(found), max(found)


def find_space(model: PreTrainedModel, size: float, among: Sequence[Removable] = (), multiple: int = 64) -> Space:
    """The counts that leave at most the share ``size`` of a model's parameters; it may be on the meta device.

    ``among``: the kinds that may be removed; empty for all that the model can lose. Neurons are kept in multiples of
    ``multiple``, unless all are. Where blocks are of different sizes, they are taken to lose the smallest.
    Raises ModelError where a kind is named that the model cannot lose, InputError where no counts are enough.
    """
    weights = _Weights(model)
    parts: dict[Kind, Parts] = {}
    refused: dict[Removable, str] = {}
    numbers: dict[Removable, int] = {}
    for kind in REMOVABLE:
        if among and kind not in among:
            continue
        try:
            numbers[kind] = _number(model, kind, parts)
        except ModelError as error:
            if kind in among:
                raise
            refused[kind] = str(error)
    weights.count(parts)
    limit = math.floor(size * weights.total * (1 + _ROUNDING))
    candidates = _candidates(weights, numbers, limit, multiple)
    if not candidates:
        least = weights.left(_most(numbers, multiple)) / weights.total
        if least >= 1:
            units = f", which are kept in multiples of {multiple}" if "neurons" in numbers else ""
            raise InputError.sentence(
                f"--size is {size}, but none of the model's {' and '.join(numbers)} can go{units}."
            )
        allowed = (
            f"a share of at least {math.ceil(1000 * least) / 1000:.3f}, as {' and '.join(numbers)} go no further"
        )
        raise InputError("--size", size, allowed)
    return Space(limit, numbers, multiple, tuple(candidates), refused)


def _number(model: PreTrainedModel, kind: Removable, parts: dict[Kind, Parts]) -> int:
    """How many of a kind a model has; parts are added to ``parts``. Raises ModelError where it can lose none."""
    if kind == "blocks":
        number = len(find_blocks(model))
        if number < 2:
            raise ModelError.sentence(f"{type(model).__name__} has a single block, which cannot be removed.")
        fewer_blocks(model.config, range(number - 1))
        return number
    parts[kind] = find_parts(model, kind)
    return parts[kind].number


class _Weights:
    """How many parameters a model has, and how many of them go with each part and block."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.total = size_of(model).parameters
        self.parameters = [dict(block.module.named_parameters()) for block in find_blocks(model)]
        blocks = [sum(one.numel() for one in own.values()) for own in self.parameters]
        self.blocks = torch.tensor(blocks, dtype=torch.int64)
        self.each: dict[Removable, torch.Tensor] = {}

    def count(self, parts: Mapping[Kind, Parts]) -> None:
        """Note of each kind how many parameters of every block a part has."""
        for kind, found in parts.items():
            each = torch.zeros_like(self.blocks)
            for index, slots in found.slots.items():
                weights = sum(self.parameters[index][slot.name].numel() for slot in slots)
                each[index] = weights // found.number
            self.each[kind] = each

    def left(self, counts: Counts) -> int:
        """How many parameters are left, at most: the smallest blocks go."""
        blocks = self.blocks.clone()
        for kind, each in self.each.items():
            blocks -= each * counts.of(kind)
        gone = blocks.sort().values[: counts.blocks].sum()
        return self.total - int(self.blocks.sum()) + int(blocks.sum() - gone)


def _candidates(weights: _Weights, numbers: Mapping[Removable, int], limit: int, multiple: int) -> list[Counts]:
    """Of each number of blocks and heads the fewest neurons that are enough; none that removes more than another.

    More blocks or heads never need more neurons, so that one that removes more than another has the same number of
    neurons as a neighbour with a block or a head less.
    """
    neurons = _steps(numbers.get("neurons", 1), multiple)
    found: list[Counts] = []
    fewest: dict[tuple[int, int], int] = {}
    for blocks in range(numbers.get("blocks", 1)):
        for heads in range(numbers.get("heads", 1)):
            enough = partial(_is_enough, weights, limit, blocks, heads)
            place = bisect_left(neurons, True, key=enough)
            if place == len(neurons):
                continue
            fewest[blocks, heads] = neurons[place]
            neighbours = fewest.get((blocks - 1, heads)), fewest.get((blocks, heads - 1))
            if neurons[place] not in neighbours:
                found.append(Counts(blocks, heads, neurons[place]))
    return found


def _is_enough(weights: _Weights, limit: int, blocks: int, heads: int, neurons: int) -> bool:
    return weights.left(Counts(blocks, heads, neurons)) <= limit


def _steps(number: int, multiple: int) -> list[int]:
    """How many neurons can be removed, so that none go or a multiple is kept."""
    kept = range((number - 1) // multiple * multiple, 0, -multiple)
    return [0, *(number - left for left in kept)]


def _most(numbers: Mapping[Removable, int], multiple: int) -> Counts:
    last = _steps(numbers.get("neurons", 1), multiple)[-1]
    return Counts(numbers.get("blocks", 1) - 1, numbers.get("heads", 1) - 1, last)
