"""The plan of a pruning run: its checked settings, the skeleton of its model, and its calibration text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.allocation.names import UNIFORM
from rarefy.runs.fingerprint import versions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rarefy.layer.pattern import Pattern
    from rarefy.methods.base import Method
    from rarefy.models.blocks import Block
    from rarefy.models.source import ModelSource
    from rarefy.pruning.settings import PerLayer, Uniform
    from rarefy.runs.fingerprint import Fingerprint
    from rarefy.runs.recipe import Recipe
    from rarefy.runs.shrink_recipe import ShrinkRecipe

#: From this share of the blocks' weights on, a run says that weights outside of linears stay dense.
_MUCH = 0.1


@dataclass
class Plan:
    """A run whose every setting was checked, as far as that goes without the weights."""

    recipe: Recipe
    method: Method
    #: That of all layers together, and that of each.
    pattern: Pattern
    pattern_of: Uniform | PerLayer
    device: torch.device
    source: ModelSource
    skeleton: PreTrainedModel
    blocks: list[Block]
    #: Token ids (num, length); None where the model is to write its own text.
    windows: torch.Tensor | None
    #: Whether the model is to stay on disk, as far as that is known.
    streams: bool
    #: A folder for the hidden states; None where they are to be in memory.
    offload: Path | None = None
    #: How many processes share the windows.
    num_ranks: int = 1

    def fingerprint(self, windows: torch.Tensor) -> Fingerprint:
        """All that the result depends on; ``windows`` is the calibration text."""
        from rarefy.runs.fingerprint import Fingerprint

        made_by = {name: versions()[name] for name in ("rarefy", "torch", "transformers")}
        # Which GPU it is does not matter; another process of the run has another one.
        settings = self.recipe.model_dump() | {"device": self.device.type, **made_by}
        if self.recipe.allocation != UNIFORM:  # of which a file may have changed
            specs = [self.pattern_of(site).spec() for block in self.blocks for site in block.sites]
            settings["the sparsity of layers"] = hashlib.sha256(repr(specs).encode()).hexdigest()[:12]
        return Fingerprint.of(settings, self.source.path, windows)

    @property
    def warnings(self) -> list[str]:
        """What is no mistake, but hardly what was meant."""
        return [*self._few_tokens(), *self._left_dense()]

    def _few_tokens(self) -> list[str]:
        num, length = self.recipe.window_shape
        widest = max((site for block in self.blocks for site in block.sites), key=lambda site: site.shape[1])
        if num * length >= widest.shape[1]:
            return []
        words = (
            f"the calibration has {num * length:,} tokens, fewer than the {widest.shape[1]:,} inputs of "
            f"{widest.name}: that says too little about its weights; more --num-samples say more"
        )
        return [words]

    def _left_dense(self) -> list[str]:
        from rarefy.models.blocks import left_dense

        share, name = left_dense(self.blocks)
        if share < _MUCH:
            return []
        return [f"{share:.0%} of the weights in the model's blocks are in no linear, and stay as they are: {name}"]


def calibration_words(recipe: Recipe | ShrinkRecipe) -> str:
    """How many windows of how many tokens from where."""
    num, length = recipe.window_shape
    return f"calibration: {num:,} windows of {length:,} tokens from {recipe.calibration}"


def pattern_facts(recipe: Recipe, pattern_of: Uniform | PerLayer) -> dict[str, Any]:
    """What run.json says of the pattern: its spec, if it promises zeros along the inputs, and a clause for people."""
    method, pattern = recipe.build_method(), recipe.build_pattern()
    words = pattern_of.describe()
    if method.gives_dense:
        words = f"none: each weight is the dense product of two sparse factors, with the stored bits of {pattern}"
    plain = recipe.along == "inputs" and not method.gives_dense
    return {"pattern_spec": pattern.spec() if plain else {}, "pattern_words": words}
