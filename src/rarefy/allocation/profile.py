"""``profile``: a fixed profile over depth and kinds of linears, which needs neither weights nor data.

    s(l) = S + slope (2 b / (B - 1) - 1) + offset(kind)          for block b of B

Queries and keys are pruned more, values and outputs of attention less, early blocks less than late ones; the first
block like the mean of the early half, the last one like the mean of all.

Source: what EvoPress (arXiv 2410.14649) finds by search on LLaMA-2-7B and LLaMA-3-8B, in the averages of its public
configurations. There slope and offset are 0.02 and 0.045 at 50 %, 0.04 and 0.025 at 70 %; here they are on the line
through these, and not below 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rarefy.allocation.budget import Layer

#: What the parts of attention are called in models of transformers that keep them apart.
QUERY_KEY = frozenset({"q_proj", "k_proj", "query", "key", "q", "k", "wq", "wk"})
VALUE_OUTPUT = frozenset({"v_proj", "o_proj", "value", "v", "o", "wv", "wo", "out_proj"})


#: A model of fewer blocks has no slope.
LEAST_BLOCKS = 4


@dataclass(frozen=True)
class Profile:
    """A profile: its ``slope`` over depth, and the offsets of ``query_key`` and ``value_output`` linears."""

    slope: float = 0.0
    query_key: float = 0.0
    value_output: float = 0.0

    def spread(self, layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
        """The sparsity that the profile wishes for each layer, by name."""
        blocks = sorted({layer.block for layer in layers})
        by_depth = {block: _depth(place, len(blocks)) * self.slope for place, block in enumerate(blocks)}
        return {layer.name: sparsity + by_depth[layer.block] + self._offset(layer.kind) for layer in layers}

    def _offset(self, kind: str) -> float:
        return self.query_key if kind in QUERY_KEY else self.value_output if kind in VALUE_OUTPUT else 0.0


def published(sparsity: float) -> Profile:
    """The profile of the source at a sparsity."""
    offset = max(0.0, 0.045 - 0.1 * (sparsity - 0.5))
    return Profile(max(0.0, 0.02 + 0.1 * (sparsity - 0.5)), offset, -offset)


def profile(layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
    """The sparsity that the published profile wishes for each layer, by name."""
    return published(sparsity).spread(layers, sparsity)


def _depth(place: int, number: int) -> float:
    """From -1 to 1 over the blocks, but for the first and the last."""
    if number < LEAST_BLOCKS:
        return 0.0
    if place == 0:
        return -0.5
    return 0.0 if place == number - 1 else 2 * place / (number - 1) - 1
