"""The interface of rules that measure the dense model: what they take from a layer, a block, and all blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from rarefy.allocation.budget import Layer
from rarefy.layer.gram import Gram


@dataclass(frozen=True)
class Sensitivity:
    """How much the loss of the dense model depends on a linear.

    ``outputs`` (out,) are squares of the loss's gradient at each output, summed over tokens, and ``inputs`` (in,)
    mean squares of what the linear reads.
    """

    outputs: Float[Tensor, " out"]
    inputs: Float[Tensor, " in"]


@dataclass(frozen=True)
class MeasuredRule:
    """An allocation from facts about the dense model; a frozen dataclass of its hyperparameters.

    Blocks are seen one at a time: ``of_layer`` for each of its layers, perhaps on several processes, then
    ``of_block``. ``spread`` comes when all blocks were seen.
    """

    #: Whether ``of_layer`` gets Grams of the dense model, for which the windows pass through all blocks once.
    needs_grams: ClassVar[bool] = False
    #: Whether it gets sensitivities, of linears that are modules (pruning/fisher.py).
    needs_sensitivities: ClassVar[bool] = False

    def of_layer(
        self, W: Float[Tensor, "out inputs"], gram: Gram | None = None, sensitivity: Sensitivity | None = None
    ) -> Any:
        """What is kept of one layer: small, and it can be pickled."""
        raise NotImplementedError

    def of_block(self, facts: Mapping[str, Any], read: Callable[[str], Tensor]) -> dict[str, Any]:
        """What ``spread`` gets of each layer of a block, from what was kept; ``read`` gives a weight by name."""
        return dict(facts)

    def spread(self, layers: Sequence[Layer], facts: Mapping[str, Any], sparsity: float) -> dict[str, float]:
        """The sparsity that the rule wishes for each layer, by name; budget.py makes the total exact."""
        raise NotImplementedError


def by_block(layers: Sequence[Layer], facts: Mapping[str, float]) -> dict[int, float]:
    """The mean of ``facts`` over the layers of each block."""
    blocks: dict[int, list[float]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(facts[layer.name])
    return {block: sum(values) / len(values) for block, values in blocks.items()}


def stretched(values: Mapping[int, float], width: float) -> dict[int, float]:
    """``values`` moved and scaled so that they run from 0 to ``width``; all 0 where they do not differ."""
    least, most = min(values.values()), max(values.values())
    if not most > least:
        return dict.fromkeys(values, 0.0)
    return {key: width * (value - least) / (most - least) for key, value in values.items()}
