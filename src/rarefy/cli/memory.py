"""How much memory a pruning run takes, how much there is, and how what is free is given back.

A run has stages, and its peak is that of the largest: blocks are pruned one at a time, and where it fits,
the model is loaded as a whole to write text. Numbers are bytes.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.cli.words import memory_words
from rarefy.errors import CalibrationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rarefy.cli.plan import Plan

# A model that stays on disk is loaded for the texts of the report only up to this size (larger ones write
# them too slowly on a CPU to be worth the wait), and up to this share of the free memory.
_TEXTS_BYTES = 4 * 2**30
_TEXTS_SHARE = 0.25


def weights_bytes(plan: Plan) -> int:
    """Of the whole model as it is loaded; tied weights count once."""
    return _nbytes(plan.skeleton.parameters(), _dtype(plan).itemsize)


def check_own_text_fits(plan: Plan) -> None:
    """Raise CalibrationError where the model as a whole, which writes its text, needs more than is free."""
    needed, free = _own_text_bytes(plan), free_bytes(plan.device)
    if free is not None and needed > free:
        raise CalibrationError.sentence(
            f"{plan.source.name} takes {memory_words(needed)} of memory as a whole, and {memory_words(free)} are "
            "free, so it cannot write its own text: name another --calibration, for which it can stay on disk."
        )


def writes_texts(plan: Plan) -> bool:
    """Whether a model that stays on disk is small enough to be loaded as a whole for the report's texts."""
    free = free_bytes(plan.device)
    needed = weights_bytes(plan)
    return needed <= _TEXTS_BYTES and (free is None or needed <= _TEXTS_SHARE * free)


def free_bytes(device: torch.device) -> int | None:
    """What this process can still take of the device's memory; None where nobody says."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        with suppress(OSError, ValueError):  # the limit of a container
            limit, used = (
                int(Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii")) for name in ("max", "current")
            )
            free = min(free, limit - used)
        return max(0, free)
    return None


def give_back() -> None:
    """Hand what was freed back to the system, or to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def estimated_bytes(plan: Plan) -> int:
    """About the most memory that the run needs at once, on its device."""
    stages = [_pruning_bytes(plan)]
    if plan.windows is None:
        stages.append(_own_text_bytes(plan))
    if not plan.streams or writes_texts(plan):
        stages.append(weights_bytes(plan))
    return max(stages) + (0 if plan.device.type == "cuda" else _process_bytes())


def _dtype(plan: Plan) -> torch.dtype:
    from rarefy.models.checkpoint import resolve_dtype

    return resolve_dtype(plan.recipe.dtype) or next(plan.skeleton.parameters()).dtype


def _process_bytes() -> int:
    """Of this process as it is: the interpreter and its libraries."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 500 * 2**20


def _nbytes(tensors: Iterable[Tensor], item: int) -> int:
    return item * sum(tensor.numel() for tensor in tensors)


def _own_text_bytes(plan: Plan) -> int:
    """Of the whole model while it writes: small ones do it in float32, and keys and values come on top."""
    weights = weights_bytes(plan)
    return weights


def _pruning_bytes(plan: Plan) -> int:
    return 0
