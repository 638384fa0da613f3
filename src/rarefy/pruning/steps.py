"""Steps between writing a block and advancing behind it: what such a step sees, and what it may change.

The loop calls each step once per block, after all layers of the block are solved and written, while the block is
in memory. A step may change any parameter of the block as long as no weight outside of its mask becomes non-zero;
afterwards all of the block's parameters are stored. Matching the block to the dense model is such a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Bool
from torch import Tensor

from rarefy.calibration.stream import HiddenStates
from rarefy.models.blocks import Block
from rarefy.parallel.world import World


@dataclass(frozen=True)
class PrunedBlock:
    """A block whose layers have been pruned and written.

    ``entering`` are the hidden states (num, length, hidden) that enter it on the pruned path. ``leaving_dense`` are
    those that leave it on the dense path, None unless a step needs them. ``masks`` has the mask (out, in) of every
    pruned site by name, True = kept, on the block's device. All processes of ``world`` see their own windows.
    """

    block: Block
    entering: HiddenStates
    leaving_dense: HiddenStates | None
    masks: Mapping[str, Bool[Tensor, "out inputs"]]
    world: World


class BlockStep(Protocol):
    """One step; ``str`` of it names it in records and fingerprints."""

    #: Whether it reads ``leaving_dense``: then the dense path is advanced beside the pruned one.
    needs_dense_path: bool

    def num_parts(self, block: Block, num_batches: int) -> int:
        """How often ``on_part`` will be called, for the progress bar; batches are those of all processes."""

    def __call__(self, pruned: PrunedBlock, on_part: Callable[[], None]) -> None:
        """Change the parameters of the block in place, the same way on all processes."""
