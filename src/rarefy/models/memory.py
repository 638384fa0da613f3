"""Memory of this process and of its device: how much was taken at most, how much is free, how to give it back.

Numbers are bytes.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch


def peak_bytes(device: torch.device) -> int:
    """The most memory so far, or since ``reset_peak``: of the GPU's allocator, or of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows, where psutil knows the peak
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Let ``peak_bytes`` begin anew, where the system can: on GPUs and on Linux. Elsewhere it stays as it is."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak of the resident set


def resident_bytes() -> int:
    """The memory that this process occupies now: the interpreter, its libraries, and its tensors."""
    return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> int:
    """What this process can still take of the device's memory; within a container, of its limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # "max" where a container has no limit
        free = min(free, _free_in_container(Path("/sys/fs/cgroup")))
    return max(0, free)


def _free_in_container(group: Path) -> int:
    """What is left of the limit of a control group (version 2). Raises OSError or ValueError where it has none.

    Pages of files that were read and are not in use count as used there, but the kernel frees them when it must.
    """
    limit, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
    statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    return limit - used + int(statistics.get("inactive_file", 0))


def give_back() -> None:
    """Hand what was freed back to the system, or to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
