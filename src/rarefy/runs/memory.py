"""The memory forecast of a pruning run.

A run has stages, and its peak is that of the largest: blocks are pruned one at a time, and where it fits,
the model is loaded as a whole to write text. Numbers are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rarefy.errors import CalibrationError
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

# What methods hold beside weight and Gram, in matrices of float32: (out, in) and (in, in), from their own
# accounts of their memory.
_BUFFERS = {
    "magnitude": (2.0, 0.0),
    "wanda": (2.0, 0.0),
    "ria": (3.0, 0.0),
    "sparsegpt": (3.0, 2.0),
    "alps": (4.0, 2.0),
    "alps-paper": (4.0, 3.0),
    "admm": (5.0, 3.0),
    "admm-reselect": (5.0, 3.0),
    "admm1": (5.0, 3.0),
    "pcg": (4.0, 0.0),
    "sparsefw": (6.0, 1.0),
    "swaps": (3.0, 1.0),
    "dsnot": (10.0, 0.0),
}
_OTHER_BUFFERS = (8.0, 4.0)
# No layer takes less than this many (out, in), because it is checked and graded, and products have buffers of
# their own: seen with Wanda and ALPS on blocks of LLaMA-2-7B's widths (docs/log.md).
_LEAST_BUFFERS = 7.0


def weights_bytes(plan: Plan) -> int:
    """Of the whole model as it is loaded; tied weights count once."""
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
    """Of the whole model while it writes: small ones do it in float32, and keys and values come on top."""
    from rarefy.calibration.self_text import _CACHE_BYTES, _FLOAT32_PARAMETERS

    weights = weights_bytes(plan)
    numbers = weights // _dtype(plan).itemsize
    keys_and_values = min(_CACHE_BYTES, weights) // 4
    if plan.device.type == "cpu" and _dtype(plan).itemsize == 2 and numbers <= _FLOAT32_PARAMETERS:
        return weights + 4 * numbers + keys_and_values  # the weights in 16 bits are kept beside those
    return weights + keys_and_values


def _pruning_bytes(plan: Plan) -> int:
    """Of the blocks' turns: what comes before the blocks at first, then one block with all that it takes."""
    from rarefy.pruning.precision import compute_dtype

    num, length = plan.recipe.window_shape
    num = -(-num // plan.num_ranks)
    hidden = int(plan.source.config.get_text_config().hidden_size)
    stored = _dtype(plan).itemsize
    item = compute_dtype(_dtype(plan), plan.device).itemsize
    on_host = plan.offload is not None or plan.device.type == "cuda"
    states = 0 if on_host else num * length * hidden * stored
    tokens = min(plan.recipe.batch_size, num) * length
    sizes = {block.index: _nbytes(block.module.parameters(), 1) for block in plan.blocks}
    last = max(block.index for block in plan.blocks if block.sites)
    entry = 0
    if plan.streams:
        base = plan.skeleton.base_model
        entry = stored * (_nbytes(base.parameters(), 1) - sum(sizes.values()) + sizes[0])
    turns = []
    for block in plan.blocks[: last + 1]:
        # The block is in the dtype of computation only while it runs. A model in memory is counted as a whole.
        kept = sizes[block.index] * stored if plan.streams else 0
        running = sizes[block.index] * (item if plan.streams else item - stored)
        inner = max((max(site.shape) for site in block.sites), default=hidden)
        batch = item * tokens * (6 * hidden + 3 * inner)
        grams, solving = _block_bytes(block.sites, plan.recipe.method)
        turns.append(max(running + batch + grams, kept + solving))
    whole = 0 if plan.streams else weights_bytes(plan)
    if plan.device.type == "cpu" and plan.streams:
        whole = max(0, entry - stored * sizes[0])  # what came before the blocks is freed, but not handed back
    return whole + states + max(entry, *turns)


def _block_bytes(sites: Sequence[Site], method: str) -> tuple[int, int]:
    """Of the Grams of one block, and of the layer whose solution takes the most with those that wait beside it."""
    from rarefy.calibration.collect import gram_groups

    grams = solving = 0
    for group in gram_groups(sites):
        keys = _gram_keys(group)
        sizes = {key: 4 * site.shape[1] ** 2 for key, site in zip(keys, group)}
        grams = max(grams, sum(sizes.values()))
        for i, site in enumerate(group):
            waiting = sum(sizes[key] for key in set(keys[i:]))
            solving = max(solving, waiting + _solve_bytes(site.shape, method))
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


def _solve_bytes(shape: tuple[int, int], method: str) -> int:
    """Of one layer's dense weight, its solution as it is written, and the method's own matrices."""
    parts = [_BUFFERS.get(part, _OTHER_BUFFERS) for part in method.split("+")]
    rows, inputs = shape
    return 4 * max(int((2 + max(a, _LEAST_BUFFERS)) * rows * inputs + b * inputs**2) for a, b in parts)
