"""What a pruning run does to each block: the pattern of every site, the method, and steps that follow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rarefy.layer.pattern import Pattern
from rarefy.methods.base import Method
from rarefy.models.sites import Site
from rarefy.pruning.steps import BlockStep

PatternOf = Callable[[Site], Pattern]


@dataclass(frozen=True)
class Uniform:
    """The same pattern for every site."""

    pattern: Pattern

    def __call__(self, site: Site) -> Pattern:
        return self.pattern

    def __str__(self) -> str:
        return str(self.pattern)


@dataclass(frozen=True)
class PruneSettings:
    """The arguments of ``rarefy.prune`` that say what is done; that function's docstring explains them.

    ``pattern_of`` gives the pattern of a site. ``steps`` come after the layers of a block are written, in order.
    """

    pattern_of: PatternOf
    method: Method
    batch_size: int = 4
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    strict: bool = False
    steps: Sequence[BlockStep] = ()

    @property
    def needs_dense_path(self) -> bool:
        """Whether a step needs the hidden states of the dense model beside those of the pruned one."""
        return any(step.needs_dense_path for step in self.steps)

    @property
    def pattern_name(self) -> str:
        """The pattern in a few words, for titles."""
        return str(self.pattern_of) if isinstance(self.pattern_of, Uniform) else "a pattern per layer"


def as_pattern_of(pattern: Pattern | PatternOf) -> PatternOf:
    """A function from site to pattern, also where one pattern is meant for all sites."""
    return Uniform(pattern) if isinstance(pattern, Pattern) else pattern
