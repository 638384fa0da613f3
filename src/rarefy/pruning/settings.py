"""What a pruning run does to each block: the pattern of every site, the method, and steps that follow it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rarefy.allocation.allocate import MEASURED_RULES, allocate
from rarefy.allocation.names import MEASURED
from rarefy.errors import InputError
from rarefy.layer.across import AcrossNM
from rarefy.layer.pattern import NM, Pattern
from rarefy.methods.base import Method
from rarefy.models.blocks import Block
from rarefy.models.sites import Site
from rarefy.pruning.outputs import neuron_makers
from rarefy.pruning.steps import BlockStep

PatternOf = Callable[[Site], Pattern]
#: Which outputs of a layer count more: all alike, those that make large neurons, or those that the loss depends on.
NONE, MLP, FISHER = "none", "mlp", "fisher"


@dataclass(frozen=True)
class Uniform:
    """The same pattern for every site."""

    pattern: Pattern

    def __call__(self, site: Site) -> Pattern:
        return self.pattern

    def __str__(self) -> str:
        return str(self.pattern)

    def describe(self) -> str:
        """The pattern as a clause for people."""
        return self.pattern.describe()


@dataclass(frozen=True)
class PerLayer:
    """A pattern for each pruned site, by name; ``pattern`` is that of all together, spread by ``allocation``."""

    patterns: Mapping[str, Pattern]
    pattern: Pattern
    allocation: str

    def __call__(self, site: Site) -> Pattern:
        return self.patterns.get(site.name, self.pattern)

    def __str__(self) -> str:
        return f"{Path(self.allocation).name} {self.pattern}"

    def describe(self) -> str:
        """The pattern as a clause for people."""
        return f"{self.pattern} on average, of each layer as the allocation ({Path(self.allocation).name}) has it"


@dataclass(frozen=True)
class Unmeasured(PerLayer):
    """The same pattern for every site, until the dense model has been measured for ``allocation`` (survey.py)."""


@dataclass(frozen=True)
class AcrossNeurons(PerLayer):
    """N:M groups of consecutive neurons of each MLP: ``patterns`` has those of the layers that make neurons."""

    def __str__(self) -> str:
        return f"{self.pattern} of neurons"

    def describe(self) -> str:
        """The pattern as a clause for people."""
        return f"{self.pattern.describe()}; in layers that make the neurons of an MLP, of every consecutive outputs"


def across_neurons(pattern: NM, blocks: Sequence[Block]) -> AcrossNeurons:
    """``pattern`` along the inputs of each site of ``blocks``, but across the outputs of those that make neurons."""
    makers = {name for block in blocks for name in neuron_makers(block)}
    patterns = {
        site.name: AcrossNM(pattern.keep, pattern.of)
        for block in blocks
        for site in block.sites
        if site.name in makers
    }
    return AcrossNeurons(patterns, pattern, "neurons")


@dataclass(frozen=True)
class PruneSettings:
    """The arguments of ``rarefy.prune`` that say what is done; that function's docstring explains them.

    ``pattern_of`` gives the pattern of a site. ``steps`` come after the layers of a block are written, in order.
    ``drift`` is the share of the drift that targets correct (drift.py), ``refresh`` whether a block's Grams are
    collected again after each group of layers that read the same. ``permute`` and ``rotate`` change each block
    before it is pruned (reparametrise.py). ``row_weights`` says which outputs count more where rows compete for
    weights (layer/row_weights.py).
    """

    pattern_of: PatternOf
    method: Method
    batch_size: int = 4
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    strict: bool = False
    steps: Sequence[BlockStep] = ()
    drift: float = 0.0
    refresh: bool = False
    permute: bool = False
    rotate: bool = False
    row_weights: str = NONE

    def __post_init__(self) -> None:
        if not 0 <= self.drift <= 1:
            raise InputError("drift", self.drift, "a number from 0 to 1")
        if self.drift and self.refresh:
            # Refreshed Grams would be of other inputs than the drift, and the correction explodes (docs/log.md).
            raise InputError.sentence(
                "drift does not go with refresh: the drift is that of a block's inputs before it is pruned, and "
                "refreshed Grams are of others."
            )
        if self.refresh and self.method.needs_output_norms:
            raise InputError.sentence(
                f"refresh does not go with {self.method}: it needs what the last linear of an MLP reads before the "
                "others are solved."
            )
        if self.steps and self.method.comes_last:
            name, does = type(self.steps[0]).__name__.lower(), "move weights off the grid they are rounded to"
            if self.method.gives_dense:
                does = "change the product, not its factors"
            raise InputError.sentence(f"{name} does not go with {self.method}: it would {does}.")
        if self.needs_dense_weights and self.drift > 0:
            raise InputError.sentence(
                "barber does not go with drift: it puts weights of the dense model back, which are not what layers "
                "aim at then."
            )

        if self.row_weights not in (NONE, MLP, FISHER):
            raise InputError("row_weights", self.row_weights, f"{NONE}, {MLP} or {FISHER}")
        if self.row_weights == MLP and self.refresh:
            raise InputError.sentence(
                "Row weights of the MLP (mlp) do not go with refresh: what its last linear reads is then known only "
                "after its first ones were solved."
            )
        if self.row_weights != NONE and self.method.comes_last:
            why = "move weights off the grid they are rounded to"
            if self.method.gives_dense:
                why = "count errors of a product whose factors have rows of their own"
            raise InputError.sentence(
                f"Row weights ({self.row_weights}) do not go with {self.method}: they would {why}."
            )

    @property
    def needs_output_norms(self) -> bool:
        """Whether the norms of what outputs become are needed (outputs.py)."""
        return self.method.needs_output_norms or self.row_weights == MLP

    @property
    def needs_sensitivities(self) -> bool:
        """Whether the loss of the dense model is followed back to the outputs of its linears (fisher.py)."""
        rule = MEASURED_RULES.get(self.pattern_of.allocation) if isinstance(self.pattern_of, Unmeasured) else None
        return self.row_weights == FISHER or (rule is not None and rule.needs_sensitivities)

    @property
    def needs_dense_path(self) -> bool:
        """Whether the hidden states of the dense model are needed beside those of the pruned one."""
        return self.drift > 0 or any(step.needs_dense_path for step in self.steps)

    @property
    def needs_dense_weights(self) -> bool:
        """Whether the dense weights of a block are needed behind its pruning."""
        return any(step.needs_dense_weights for step in self.steps)

    @property
    def pattern_name(self) -> str:
        """The pattern in a few words, for titles."""
        name = str(self.pattern_of) if isinstance(self.pattern_of, Uniform | PerLayer) else "a pattern per layer"
        return f"the bits of {name}" if self.method.gives_dense else name


def allocated(allocation: str, pattern: Pattern, blocks: Sequence[Block]) -> Uniform | PerLayer:
    """The pattern of each site of ``blocks``, or ``Unmeasured``. Raises InputError, PatternError (``allocate``)."""
    patterns = allocate(allocation, pattern, blocks)
    if allocation in MEASURED:
        return Unmeasured({}, pattern, allocation)
    return PerLayer(patterns, pattern, allocation) if patterns else Uniform(pattern)


def as_pattern_of(pattern: Pattern | PatternOf) -> PatternOf:
    """A function from site to pattern, also where one pattern is meant for all sites."""
    return Uniform(pattern) if isinstance(pattern, Pattern) else pattern
