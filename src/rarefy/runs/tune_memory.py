"""The memory forecast of a tuning, in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rarefy.models.memory import resident_bytes

if TYPE_CHECKING:
    from rarefy.runs.tune_plan import TunePlan

_FLOAT32 = 4


def trained_numbers(plan: TunePlan) -> int:
    """How many numbers are trained."""
    from rarefy.tuning.parametrise import trainable

    recipe = plan.recipe
    if recipe.parametrisation in ("full", "norms"):
        sizes = [
            parameter.numel() for _, parameter in trainable(plan.skeleton, norms=recipe.parametrisation == "norms")
        ]
        return sum(sizes)
    shapes = [site.shape for block in plan.blocks for site in block.sites]
    if recipe.parametrisation == "spp":
        return sum(recipe.rank * inputs + rows for rows, inputs in shapes)
    return sum(recipe.rank * (inputs + rows) for rows, inputs in shapes)


def estimated_bytes(plan: TunePlan) -> int:
    """About the most memory that the tuning needs at once, on its device."""
    return max(_recording_bytes(plan), _training_bytes(plan)) + (
        0 if plan.device.type == "cuda" else resident_bytes()
    )


def _recording_bytes(plan: TunePlan) -> int:
    """Bytes that the dense model takes while it is recorded."""
    dense = plan.dense.skeleton()
    item = max(plan.precision.itemsize, next(dense.parameters()).dtype.itemsize)
    return item * sum(parameter.numel() for parameter in dense.parameters()) + _logits_bytes(plan)


def _training_bytes(plan: TunePlan) -> int:
    """Bytes of training: masters, gradients, AdamW's two moments and masks; activations and a slice of logits.

    A copy of the head and of the linears in half precision comes on top where products are computed in that.
    """
    recipe, skeleton = plan.recipe, plan.skeleton
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    trained = trained_numbers(plan)
    watched = sum(site.shape[0] * site.shape[1] for block in plan.blocks for site in block.sites)
    masks = watched if recipe.parametrisation == "full" else 0
    half = plan.precision.itemsize if plan.precision.itemsize < _FLOAT32 else 0
    head = skeleton.get_output_embeddings()
    head_size = sum(parameter.numel() for parameter in head.parameters()) if head is not None else 0
    beside = 0
    if recipe.teacher == "model" or recipe.hidden_weight:
        dense = plan.dense.skeleton()
        beside = next(dense.parameters()).dtype.itemsize * sum(parameter.numel() for parameter in dense.parameters())
    weights = _FLOAT32 * (total + 3 * trained) + masks + half * (watched + head_size) + beside
    return weights + _activation_bytes(plan) + _logits_bytes(plan)


def _activation_bytes(plan: TunePlan) -> int:
    """Bytes of activations that all blocks keep for their gradients, or one block where they are computed anew."""
    recipe = plan.recipe
    config = plan.source.config.get_text_config()
    assert recipe.sequence_length is not None
    tokens = (recipe.micro_batch or 1) * recipe.sequence_length
    blocks = []
    for block in plan.blocks:
        widths = sum(sum(site.shape) for site in block.sites)
        # Inputs and outputs of linears in the dtype of products; norms and sums of the residual path in float32.
        blocks.append(tokens * (plan.precision.itemsize * widths + _FLOAT32 * 6 * int(config.hidden_size)))
    if recipe.gradient_checkpointing:
        return max(blocks) + len(blocks) * tokens * _FLOAT32 * int(config.hidden_size)
    return sum(blocks)


def _logits_bytes(plan: TunePlan) -> int:
    """Bytes of a slice of logits with all that is computed from it."""
    from rarefy.models.head import LOGIT_BYTES, vocabulary_size

    assert plan.recipe.sequence_length is not None
    positions = (plan.recipe.micro_batch or 1) * plan.recipe.sequence_length
    return 6 * min(LOGIT_BYTES, _FLOAT32 * positions * vocabulary_size(plan.skeleton))
