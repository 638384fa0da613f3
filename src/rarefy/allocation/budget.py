"""From the sparsities that a rule wishes for to those that layers get: within bounds, with the total as asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rarefy.errors import PatternError
from rarefy.layer.pattern import NM, Pattern, PerRow, Unstructured

#: No layer is pruned beyond this: what is left could not carry its rank.
MOST = 0.99


@dataclass(frozen=True)
class Layer:
    """What a rule knows of a layer without its weight: ``name``, number of its ``block``, ``shape`` (out, in)."""

    name: str
    block: int
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def kind(self) -> str:
        """The last part of the name, which layers of one kind share (``q_proj``)."""
        return self.name.rpartition(".")[2]


def shifted(wanted: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """``wanted`` plus one number, clamped to [0, MOST], so that the mean weighted by ``sizes`` is ``sparsity``.

    What clamped layers cannot take, the others do. The number is found by bisection, to rounding.
    """
    total = sum(sizes.values())

    def given(shift: float) -> dict[str, float]:
        return {name: min(max(value + shift, 0.0), MOST) for name, value in wanted.items()}

    low, high = -1.0 - max(wanted.values()), 1.0 - min(wanted.values())
    for _ in range(60):
        middle = (low + high) / 2
        reached = math.fsum(value * sizes[name] for name, value in given(middle).items()) / total
        low, high = (middle, high) if reached < sparsity else (low, middle)
    return given(high)


def patterns(
    pattern: Pattern, wanted: Mapping[str, float], layers: Mapping[str, Layer], *, exact_total: bool = True
) -> dict[str, Pattern]:
    """The pattern of each layer: that of the run with as many weights kept in all, spread as ``wanted`` says.

    ``wanted`` are sparsities by name. Unstructured patterns keep the exact number of weights that the uniform one
    keeps, patterns per row and N:M come as close as whole rows and groups allow, and keep no more. Without
    ``exact_total``, each layer gets what is wanted, rounded to the nearest.
    Raises PatternError where the pattern has too few steps for that, or does not fit a layer.
    """
    for name in wanted:
        pattern.validate(layers[name].shape, name)
    if isinstance(pattern, NM) and pattern.of < 8:
        raise PatternError.sentence(
            f"pattern is {pattern}, which has too few steps for an allocation other than uniform: that needs groups "
            "of 8 or more, such as 4:8, or a sparsity."
        )
    shares = dict(wanted)
    if exact_total:
        if pattern.nominal_sparsity() > MOST:
            raise PatternError.sentence(
                f"pattern is {pattern}, but an allocation prunes no layer beyond {MOST:.0%}: ask for less, or for "
                "the uniform one."
            )
        shares = shifted(wanted, {name: layers[name].size for name in wanted}, pattern.nominal_sparsity())
    steps = {name: _steps(pattern, layers[name].shape) for name in wanted}
    # Kept weights in steps of this layer's pattern: rounded down, then those that lost most get one step more.
    exact = {name: (1 - shares[name]) * layers[name].size / steps[name] for name in wanted}
    # An N:M pattern keeps at least one of its group, and not all.
    bounds = {name: _bounds(pattern, layers[name].size // steps[name]) for name in wanted}

    def bounded(name: str, kept: int) -> int:
        least, most = bounds[name]
        return min(max(kept, least), most)

    if not exact_total:
        return {name: _with_kept(pattern, layers[name], bounded(name, round(value))) for name, value in exact.items()}
    kept = {name: bounded(name, math.floor(value)) for name, value in exact.items()}
    room = sum(pattern.count(layers[name].shape) for name in wanted)
    room -= sum(kept[name] * steps[name] for name in wanted)
    for name in sorted(wanted, key=lambda name: kept[name] - exact[name]):
        if steps[name] <= room and kept[name] < bounds[name][1]:
            kept[name] += 1
            room -= steps[name]
    return {name: _with_kept(pattern, layers[name], kept[name]) for name in wanted}


def _steps(pattern: Pattern, shape: tuple[int, int]) -> int:
    """How many weights the smallest change of the layer's count is."""
    if isinstance(pattern, NM):
        return shape[0] * shape[1] // pattern.of
    return shape[0] if isinstance(pattern, PerRow) else 1


def _bounds(pattern: Pattern, number: int) -> tuple[int, int]:
    """The least and the most that a layer of ``number`` steps may keep, in steps."""
    return (1, number - 1) if isinstance(pattern, NM) else (1, number)


def _with_kept(pattern: Pattern, layer: Layer, kept: int) -> Pattern:
    rows, inputs = layer.shape
    if isinstance(pattern, NM):
        return replace(pattern, keep=kept)
    if isinstance(pattern, PerRow):
        return PerRow(1 - kept / inputs)
    return Unstructured(1 - kept / (rows * inputs))
