"""Steps between writing a block and advancing behind it: what such a step sees, and what it may change.

The loop calls each step once per block, after all layers of the block are solved and written, while the block is
in memory. A step may change any parameter of the block as long as no weight outside of its mask becomes non-zero;
afterwards all of the block's parameters are stored. Changing masks by what attention and MLP put out is such a step
(barber.py), and so is matching the block to the dense model (matching.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.calibration.stream import HiddenStates
from rarefy.layer.pattern import Pattern
from rarefy.methods.base import Method
from rarefy.models.blocks import Block
from rarefy.models.sites import Site
from rarefy.parallel.world import World
from rarefy.pruning.records import LayerRecord

#: Solves all layers of a block again, from the weights that they have: patterns, a method, and ``on_part``, which is
#: called for each batch and each layer. Gives new records.
SolveAgain = Callable[[Callable[[Site], Pattern], Method, Callable[[], None]], Sequence[LayerRecord]]


@dataclass(frozen=True)
class PrunedBlock:
    """A block whose layers have been pruned and written.

    ``entering`` are the hidden states (num, length, hidden) that enter it on the pruned path. ``leaving_dense`` are
    those that leave it on the dense path, None unless a step needs them. ``masks`` has the mask (out, in) of every
    pruned site by name, True = kept, on the block's device; a step that changes a mask puts the new one there.
    ``dense_weights`` are the sites' weights as they were, empty unless a step needs them, ``records`` what is known
    of each site so far, and ``pattern_of`` gives its pattern. All processes of ``world`` see their own windows.
    """

    block: Block
    entering: HiddenStates
    leaving_dense: HiddenStates | None
    masks: dict[str, Bool[Tensor, "out inputs"]]
    world: World
    pattern_of: Callable[[Site], Pattern]
    dense_weights: Mapping[str, Float[Tensor, "out inputs"]]
    records: Mapping[str, LayerRecord]
    solve_again: SolveAgain


class BlockStep(Protocol):
    """One step; ``str`` of it names it in records and fingerprints."""

    #: Whether it reads ``leaving_dense``: then the dense path is advanced beside the pruned one.
    needs_dense_path: bool
    #: Whether it reads ``dense_weights``.
    needs_dense_weights: bool

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise PatternError where the step cannot work with ``pattern``, whatever the layer."""

    def num_parts(self, block: Block, num_batches: int) -> int:
        """How often ``on_part`` will be called, for the progress bar; batches are those of all processes."""

    def __call__(self, pruned: PrunedBlock, on_part: Callable[[], None]) -> None:
        """Change the parameters of the block in place, the same way on all processes."""
