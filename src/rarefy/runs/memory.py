"""The memory forecast of a pruning run, in bytes.

A run has stages, and its peak is that of the largest: blocks are pruned one at a time, and where it fits, the model
is loaded as a whole to write text. What a solve takes, the method itself says (``Method.cost``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rarefy.allocation.names import ALPHAPRUNING, SEARCH
from rarefy.errors import CalibrationError
from rarefy.models.head import LOGIT_BYTES
from rarefy.models.memory import free_bytes, resident_bytes
from rarefy.runs.words import memory_words

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rarefy.models.sites import Site
    from rarefy.runs.plan import Plan

# A model that stays on disk is loaded for the texts of the report only up to this size (larger ones write
# them too slowly on a CPU to be worth the wait), and up to this share of the free memory.
_TEXTS_BYTES = 4 * 2**30
_TEXTS_SHARE = 0.25

# No layer takes less than this many (out, in), because it is checked and graded, and products have buffers of
# their own: seen with Wanda and ALPS on blocks of LLaMA-2-7B's widths (docs/log.md).
_LEAST_BUFFERS = 7.0
# Matching holds a block in float32: masters, gradients, two moments, the best state, the start, and the block that
# runs. Of a batch it keeps activations for the backward pass, in multiples of the hidden width and the widest layer.
_MATCHED = 7
_KEPT_HIDDEN, _KEPT_INNER = 24, 8


def weights_bytes(plan: Plan) -> int:
    """What the whole model takes as it is loaded; tied weights count once."""
    return _nbytes(plan.skeleton.parameters(), _dtype(plan).itemsize)


def check_own_text_fits(plan: Plan) -> None:
    """Raise CalibrationError where the model as a whole, which writes its text, needs more than is free."""
    needed, free = _own_text_bytes(plan), free_bytes(plan.device)
    if needed > free:
        raise CalibrationError.sentence(
            f"{plan.source.name} takes {memory_words(needed)} of memory as a whole, and {memory_words(free)} are "
            "free, so it cannot write its own text: name another --calibration, for which it can stay on disk."
        )


def writes_texts(plan: Plan) -> bool:
    """Whether a model that stays on disk is small enough to be loaded as a whole for the report's texts."""
    free = free_bytes(plan.device)
    needed = weights_bytes(plan)
    return needed <= _TEXTS_BYTES and needed <= _TEXTS_SHARE * free


def estimated_bytes(plan: Plan, texts: bool) -> int:
    """About the most memory that the run needs at once, on its device; ``texts``: it writes some for the report."""
    stages = [_pruning_bytes(plan)]
    if plan.recipe.allocation == SEARCH:
        stages.append(_search_bytes(plan))
    if "fisher" in (plan.recipe.row_weights, plan.recipe.allocation):
        stages.append(_fisher_bytes(plan))
    if plan.windows is None:
        stages.append(_own_text_bytes(plan))
    if not plan.streams or (texts and writes_texts(plan)):
        stages.append(weights_bytes(plan))
    return max(stages) + (0 if plan.device.type == "cuda" else resident_bytes())


def _dtype(plan: Plan) -> torch.dtype:
    from rarefy.models.checkpoint import resolve_dtype

    return resolve_dtype(plan.recipe.dtype) or next(plan.skeleton.parameters()).dtype


def _nbytes(tensors: Iterable[Tensor], item: int) -> int:
    return item * sum(tensor.numel() for tensor in tensors)


def _own_text_bytes(plan: Plan) -> int:
    """What the whole model takes while it writes: small ones write in float32, and keys and values come on top."""
    from rarefy.calibration.self_text import _CACHE_BYTES, _FLOAT32_PARAMETERS

    weights = weights_bytes(plan)
    numbers = weights // _dtype(plan).itemsize
    keys_and_values = min(_CACHE_BYTES, weights) // 4
    if plan.device.type == "cpu" and _dtype(plan).itemsize == 2 and numbers <= _FLOAT32_PARAMETERS:
        return weights + 4 * numbers + keys_and_values  # the weights in 16 bits are kept beside those
    return weights + keys_and_values


def _pruning_bytes(plan: Plan) -> int:
    """What the loop takes: the embeddings with the first block at first, then one block after the other."""
    from rarefy.pruning.precision import compute_dtype

    num, length = plan.recipe.window_shape
    num = -(-num // plan.num_ranks)
    hidden = int(plan.source.config.get_text_config().hidden_size)
    stored = _dtype(plan).itemsize
    item = compute_dtype(_dtype(plan), plan.device).itemsize
    matching = plan.recipe.match > 0
    paths = 1 + (matching or plan.recipe.drift > 0)
    on_host = plan.offload is not None or plan.device.type == "cuda"
    states = 0 if on_host else paths * num * length * hidden * stored
    tokens = min(plan.recipe.windows_at_once, num) * length
    sizes = {block.index: _nbytes(block.module.parameters(), 1) for block in plan.blocks}
    last = max(block.index for block in plan.blocks if block.sites)
    entry = 0
    if plan.streams:
        base = plan.skeleton.base_model
        entry = stored * (_nbytes(base.parameters(), 1) - sum(sizes.values()) + sizes[0])
    each = []
    for block in plan.blocks[: last + 1]:
        # The block is in the dtype of computation only while it runs. A model in memory is counted as a whole.
        kept = sizes[block.index] * stored if plan.streams else 0
        running = sizes[block.index] * (item if plan.streams else item - stored)
        inner = max((max(site.shape) for site in block.sites), default=hidden)
        batch = item * tokens * (6 * hidden + 3 * inner)
        grams, solving = _block_bytes(plan, block.sites)
        if (
            plan.recipe.drift > 0
        ):  # one more matrix for each distinct input, one for its correction, and a float32 batch
            grams, solving = 2 * grams, solving + 2 * grams
            batch += 8 * tokens * inner
        if plan.recipe.barber != "none":
            kept += sizes[block.index] * stored  # the dense weights
            gradients = 4 * (2 + (plan.recipe.barber == "signed")) * sizes[block.index]
            running += gradients + 4 * tokens * (_KEPT_HIDDEN * hidden + _KEPT_INNER * inner)
        each.append(max(running + batch + grams, kept + solving))
        if matching and block.sites:
            each.append(
                _MATCHED * 4 * sizes[block.index] + 4 * tokens * (_KEPT_HIDDEN * hidden + _KEPT_INNER * inner)
            )
        if plan.recipe.allocation == ALPHAPRUNING:  # in float64 a weight, its square, and what eigenvalues take
            each += [kept + 8 * (site.shape[0] * site.shape[1] + 4 * min(site.shape) ** 2) for site in block.sites]
    whole = 0 if plan.streams else weights_bytes(plan)
    if plan.device.type == "cpu" and plan.streams:
        whole = max(0, entry - stored * sizes[0])  # the embeddings are freed, but not handed back
    return whole + states + max(entry, *each)


def _search_bytes(plan: Plan) -> int:
    """What the search takes: SparseGPT on a block and a copy of it; or, to compare logits, two windows of them.

    A slice of the latter is in float32, beside all of the model but its blocks.
    """
    from rarefy.methods.sparsegpt import SparseGPT
    from rarefy.pruning.search import SLICE

    vocabulary = int(plan.source.config.get_text_config().vocab_size)
    stored, length = _dtype(plan).itemsize, plan.recipe.window_shape[1]
    comparing = _ending_bytes(plan) + vocabulary * (2 * length * stored + 4 * 4 * min(length, SLICE))
    copy = max(_nbytes(block.module.parameters(), stored) for block in plan.blocks)
    return max(comparing, _pruning_bytes(replace(plan, method=SparseGPT())) + copy)


def _fisher_bytes(plan: Plan) -> int:
    """What following the loss back takes: states that enter blocks, and the graph of a batch or some tokens' logits.

    In float32 the logits, their logarithms and their gradient come on top of those that the head gives.
    """
    from rarefy.pruning.precision import compute_dtype
    from rarefy.pruning.search import WINDOWS

    num, length = plan.recipe.window_shape
    text = plan.source.config.get_text_config()
    few = -(-min(num, max(WINDOWS, plan.num_ranks)) // plan.num_ranks)
    stored, item = _dtype(plan).itemsize, compute_dtype(_dtype(plan), plan.device).itemsize
    on_host = plan.offload is not None or plan.device.type == "cuda"
    states = 0 if on_host else few * length * int(text.hidden_size) * (stored * (1 + len(plan.blocks)) + 4)
    tokens = min(plan.recipe.windows_at_once, few) * length
    logits = min(LOGIT_BYTES, 4 * int(text.vocab_size) * length)
    graphs = [_ending_bytes(plan) + logits * (stored + 3 * 4) // 4]
    for block in plan.blocks:
        inner = max((max(site.shape) for site in block.sites), default=0)
        running = _nbytes(block.module.parameters(), item) + (0 if plan.streams else weights_bytes(plan))
        graphs.append(running + 4 * tokens * (_KEPT_HIDDEN * int(text.hidden_size) + _KEPT_INNER * inner))
    return states + max(graphs)


def _ending_bytes(plan: Plan) -> int:
    """All of the model but its blocks; the whole, where that is in memory."""
    blocks = sum(_nbytes(block.module.parameters(), _dtype(plan).itemsize) for block in plan.blocks)
    return weights_bytes(plan) - (blocks if plan.streams else 0)


def _block_bytes(plan: Plan, sites: Sequence[Site]) -> tuple[int, int]:
    """The Grams of one block, and the solve that takes the most, with the Grams that wait beside it."""
    from rarefy.calibration.collect import gram_groups

    grams = solving = 0
    for group in gram_groups(sites):
        keys = _gram_keys(group)
        sizes = {key: 4 * site.shape[1] ** 2 for key, site in zip(keys, group)}
        grams = max(grams, sum(sizes.values()))
        for i, site in enumerate(group):
            waiting = sum(sizes[key] for key in set(keys[i:]))
            solving = max(solving, waiting + _solve_bytes(plan, site.shape))
    return grams, solving


def _gram_keys(sites: Sequence[Site]) -> list[tuple[str, int, int]]:
    """What tells the Grams of sites apart, as far as that can be told without running the block.

    In a module, two linears of one shape (gate and up) read the same input; of three and more of one width the
    last (the output of attention) reads another one; and so does the last of two that differ in shape.
    """
    together: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        together.setdefault((site.name.rpartition(".")[0], site.shape[1]), []).append(site)
    keys = []
    for site in sites:
        place = (site.name.rpartition(".")[0], site.shape[1])
        members = together[place]
        alike = len(members) == 2 and members[0].shape == members[1].shape
        keys.append((*place, int(len(members) > 1 and not alike and site is members[-1])))
    return keys


def _solve_bytes(plan: Plan, shape: tuple[int, int]) -> int:
    """One layer's dense weight, its solution as it is written, and the method's own matrices, all in float32."""
    rows, inputs = shape
    cost = plan.method.cost(shape, plan.pattern)
    return int(4 * ((2 + max(cost.weights, _LEAST_BUFFERS)) * rows * inputs + cost.grams * inputs**2))
