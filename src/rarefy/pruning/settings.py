"""What a pruning run is asked to do to each layer, in one piece: what the loop over blocks takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rarefy.layer.pattern import Pattern
from rarefy.methods.base import Method


@dataclass(frozen=True)
class PruneSettings:
    """The arguments of ``rarefy.prune`` that say what is done; that function's docstring explains them."""

    pattern: Pattern
    method: Method
    batch_size: int = 4
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    strict: bool = False
