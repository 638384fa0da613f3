"""Shares layers, or rows of them, out among processes by what they cost to solve.

Costs are estimates from shapes alone, so that every process comes to the same answer without asking. What
counts is how layers compare: a row of a layer with ``in`` inputs costs a multiple of in^2 with every method
(products W @ H, and the grade), and a layer, or a part of it, some share of in^3 for its factorisations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

#: Of in^3, per layer, beside out * in^2: ALPS with 8 factorisations to 58 products, SparseGPT with one to a
#: product and its grades.
_FACTORISATIONS = 1 / 8


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of layer number ``layer``, which process ``rank`` solves."""

    layer: int
    start: int
    stop: int
    rank: int = 0

    @property
    def rows(self) -> slice:
        """The rows as an index."""
        return slice(self.start, self.stop)


def share_out(shapes: Sequence[tuple[int, int]], size: int, can_be_cut: Sequence[bool]) -> list[Piece]:
    """All rows of layers of these ``shapes`` (out, in), shared out among ``size`` processes.

    The most expensive piece goes to the process that has least, and so on. A layer that ``can_be_cut`` and costs
    more than a process's fair share is cut into equal parts, if the last process is done sooner then: every part
    costs factorisations. The pieces come in the order of layers and rows.
    """
    fair = sum(_cost(*shape) for shape in shapes) / size
    whole = [Piece(layer, 0, out) for layer, (out, _) in enumerate(shapes)]
    cut = []
    for layer, (out, inputs) in enumerate(shapes):
        parts = min(out, size, math.ceil(_cost(out, inputs) / fair)) if can_be_cut[layer] else 1
        cut += [Piece(layer, out * i // parts, out * (i + 1) // parts) for i in range(parts)]
    plans = [_dealt(pieces, shapes, size) for pieces in (whole, cut)]
    return min(plans, key=lambda plan: plan[0])[1]


def _dealt(pieces: Sequence[Piece], shapes: Sequence[tuple[int, int]], size: int) -> tuple[float, list[Piece]]:
    """Pieces with their ranks, and what those of the process that has most cost."""
    loads = [0.0] * size
    ranks = [0] * len(pieces)
    costs = [_cost(piece.stop - piece.start, shapes[piece.layer][1]) for piece in pieces]
    for i in sorted(range(len(pieces)), key=lambda i: -costs[i]):  # of equals the first: sorting is stable
        ranks[i] = loads.index(min(loads))
        loads[ranks[i]] += costs[i]
    return max(loads), [replace(piece, rank=rank) for piece, rank in zip(pieces, ranks)]


def _cost(rows: int, inputs: int) -> float:
    return rows * inputs**2 + _FACTORISATIONS * inputs**3
