"""The plan of a pruning run, in which every mistake is found, and what ``--dry-run`` shows of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rarefy.cli.terminal import print_table
from rarefy.cli.words import memory_words
from rarefy.errors import InputError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rarefy.calibration.sources import Source
    from rarefy.layer.pattern import Pattern
    from rarefy.methods.base import Method
    from rarefy.models.blocks import Block
    from rarefy.models.source import ModelSource
    from rarefy.recipe import Recipe


@dataclass
class Plan:
    """A run whose every setting was checked, as far as that goes without the weights."""

    recipe: Recipe
    method: Method
    pattern: Pattern
    device: torch.device
    source: ModelSource
    skeleton: PreTrainedModel
    blocks: list[Block]
    #: Token ids (num, length); None where the model is to write its own text.
    windows: torch.Tensor | None

    @property
    def warnings(self) -> list[str]:
        """What is no mistake, but hardly what was meant."""
        num, length = self.recipe.window_shape
        widest = max((site for block in self.blocks for site in block.sites), key=lambda site: site.shape[1])
        if num * length >= widest.shape[1]:
            return []
        words = (
            f"the calibration has {num * length:,} tokens, fewer than the {widest.shape[1]:,} inputs of "
            f"{widest.name}: that says too little about its weights; more --num-samples say more"
        )
        return [words]


def make_plan(recipe: Recipe) -> Plan:
    """Find every mistake that can be found before the weights are loaded, the cheapest first."""
    from rarefy.calibration.sources import DRAW_FROM, SELF, draw_windows, parse_source
    from rarefy.models.blocks import find_blocks, select_sites
    from rarefy.models.checkpoint import resolve_device
    from rarefy.models.source import resolve_model
    from rarefy.pruning import check_pattern
    from rarefy.recipe import DEFAULT_CALIBRATION

    method, pattern = recipe.build_method(), recipe.build_pattern()
    device = resolve_device(recipe.device)
    text = parse_source(recipe.calibration or DEFAULT_CALIBRATION)
    source = resolve_model(recipe.model)
    recipe = recipe.resolved(source.context)
    skeleton = source.skeleton()
    blocks = select_sites(find_blocks(skeleton), recipe.include, recipe.exclude)
    check_pattern(blocks, pattern)
    windows = None
    if text is not SELF:
        num, length = recipe.window_shape
        tokens, bos_id = read_tokens(source, text, recipe.bos, enough=DRAW_FROM * num * length)
        windows = draw_windows(tokens, num, length, recipe.seed, bos_id, name=f"the text of {text.name}")
    elif recipe.bos:
        recipe = recipe.model_copy(update={"bos": False})  # what the model writes begins with it anyway
    return Plan(recipe, method, pattern, device, source, skeleton, blocks, windows)


def read_tokens(
    source: ModelSource, text: Source, bos: bool, enough: int | None = None
) -> tuple[torch.Tensor, int | None]:
    """The tokens of ``text`` in one row, and the start token if ``bos`` asks for it."""
    from rarefy.calibration.sources import token_stream
    from rarefy.models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError.sentence(
            f"{source.name} has no tokenizer, so it can read no text; --calibration self needs none."
        )
    if bos and tokenizer.bos_token_id is None:
        raise InputError.sentence(f"--bos asks for a start token, but the tokenizer of {source.name} has none.")
    return token_stream(text, tokenizer, enough), tokenizer.bos_token_id if bos else None


def print_plan(plan: Plan) -> None:
    """What ``--dry-run`` shows: every layer with its count of weights to prune, and the memory it takes."""
    rows = [["layer", "shape", "to prune"]]
    total = size = 0
    for site in (site for block in plan.blocks for site in block.sites):
        weights = site.shape[0] * site.shape[1]
        pruned = weights - plan.pattern.count(site.shape)
        rows.append([site.name, f"{site.shape[0]} x {site.shape[1]}", f"{pruned:,}"])
        total, size = total + pruned, size + weights
    rows.append(["all", "", f"{total:,}"])
    print_table(rows)
    print(f"{plan.method}, {plan.pattern}: {total:,} of {size:,} weights would be pruned")
    print(calibration_words(plan.recipe))
    print(f"peak memory, estimated: {memory_words(_estimated_bytes(plan))} on {plan.device}")


def calibration_words(recipe: Recipe) -> str:
    """How many windows of how many tokens from where."""
    num, length = recipe.window_shape
    return f"calibration: {num:,} windows of {length:,} tokens from {recipe.calibration}"


def _estimated_bytes(plan: Plan) -> int:
    """About the most memory that the run needs at once: weights, hidden states, and one block's work."""
    from rarefy.models.checkpoint import resolve_dtype

    num, length = plan.recipe.window_shape
    dtype = resolve_dtype(plan.recipe.dtype)
    parameters = list(plan.skeleton.parameters())
    item = dtype.itemsize if dtype else parameters[0].dtype.itemsize
    weights = sum(parameter.numel() for parameter in parameters) * item
    hidden = num * length * plan.source.config.get_text_config().hidden_size * item
    sites = [site for block in plan.blocks for site in block.sites]
    largest = max(plan.blocks, key=lambda block: sum(math.prod(site.shape) for site in block.sites))
    inputs = {site.shape[1] for site in largest.sites}
    # In float32: the block itself, one Gram per input width, and what a solve holds beside them.
    block = 4 * sum(math.prod(site.shape) for site in largest.sites)
    grams = 4 * sum(width**2 for width in inputs)
    solve = 4 * max(4 * site.shape[1] ** 2 + 6 * math.prod(site.shape) for site in sites)
    # Activations of one batch: what goes into and out of the widest linears, twice.
    widest = sum(sorted(max(site.shape) for site in largest.sites)[-3:])
    batch = 4 * 2 * min(plan.recipe.batch_size, num) * length * widest
    libraries = 0 if plan.device.type == "cuda" else 600 * 2**20
    return weights + hidden + block + grams + max(solve, batch) + libraries
