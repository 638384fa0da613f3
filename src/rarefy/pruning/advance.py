"""Step 5 of a block: its hidden states, replayed through it, become those that enter the next block."""

from __future__ import annotations

from collections.abc import Callable

from rarefy.calibration.stream import HiddenStates
from rarefy.models.blocks import Block
from rarefy.parallel.world import World
from rarefy.pruning.precision import computing_in


def advance(world: World, block: Block, states: HiddenStates, on_batch: Callable[[], None]) -> None:
    """Replace ``states``, which enter the block, by what it makes of them, in place and batch by batch."""
    with world.together(), computing_in(block.module, states.compute_dtype):
        states.advance(block.module, block.index, on_batch)
