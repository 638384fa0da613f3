"""``search``: the profile (slope, offsets of kinds) with which the pruned model predicts most like the dense one.

A compass search: from the better of the uniform allocation and the published profile, one number of the profile at a
time goes a step up or down, wherever the distance becomes less; where no step does that, steps are halved. The
distance is KL(dense || pruned), which whoever calls knows how to measure (pruning/search.py). Nothing is random.

Sources: EvoPress (arXiv 2410.14649) for KL to the dense model as what is searched by, instead of perplexity; ATP
(arXiv 2502.14770) for one slope over all blocks, which a search over each of them does not beat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields

from rarefy.allocation.budget import Layer
from rarefy.allocation.profile import LEAST_BLOCKS, QUERY_KEY, VALUE_OUTPUT, Profile, published

#: All numbers of a profile are multiples of this sparsity, so that equal ones are found to be equal.
UNIT = 0.00125
FIRST_STEP = 16  # units: 2 % sparsity
#: How many profiles are tried beside the two first, for each number that can be changed.
_FOR_EACH = 6

Point = tuple[int, ...]


def num_evaluations(layers: Sequence[Layer]) -> int:
    """How many profiles are tried at most: 20 for a model with blocks enough and attention of separate linears."""
    return 2 + _FOR_EACH * len(changeable(layers)) if changeable(layers) else 0


def changeable(layers: Sequence[Layer]) -> list[str]:
    """Which numbers of a profile make a difference for these layers."""
    kinds = {layer.kind for layer in layers}
    found = ["slope"] if len({layer.block for layer in layers}) >= LEAST_BLOCKS else []
    for name, these in (("query_key", QUERY_KEY), ("value_output", VALUE_OUTPUT)):
        if kinds & these and kinds - these:
            found.append(name)
    return found


def profile_at(point: Point) -> Profile:
    """The profile at a point, which has a number of units for each field of ``Profile``."""
    return Profile(*(UNIT * number for number in point))


def search(layers: Sequence[Layer], sparsity: float, distance: Callable[[Point], float]) -> Point:
    """The best of the points that were tried. ``distance`` is called once for each."""
    names = [each.name for each in fields(Profile)]
    coordinates = [names.index(name) for name in changeable(layers)]
    budget = num_evaluations(layers)
    known: dict[Point, float] = {}

    def better(point: Point, best: Point | None) -> bool:
        if point in known or len(known) >= budget:
            return False
        known[point] = distance(point)
        return best is None or known[point] < known[best]

    best: Point = (0,) * len(names)
    better(best, None)
    start = asdict(published(sparsity))
    point = tuple(round(start[name] / UNIT) if i in coordinates else 0 for i, name in enumerate(names))
    best = point if better(point, best) else best
    step, signs = FIRST_STEP, dict.fromkeys(coordinates, 1)
    while len(known) < budget and step:
        moved = False
        for i in coordinates:
            for sign in (signs[i], -signs[i]):
                point = (*best[:i], best[i] + sign * step, *best[i + 1 :])
                if better(point, best):
                    best, signs[i], moved = point, sign, True
                    break
        step = step if moved else step // 2
    return best
