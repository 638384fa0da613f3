"""Hidden states in files: mapped where memory is scarce, and saved so that a killed run can go on.

Hidden states are (num windows, length, hidden) numbers, and the same again with every block: 128 windows of
2,048 tokens are 2.1 GB in bfloat16 for a model of width 4,096. ``MappedStates`` keeps them in a file of
``--offload-dir``; to the loop it is an ordinary tensor. ``save_states`` and ``load_states`` are for a run
that goes on later, maybe with another number of processes: each process saves the windows that it has, and
loads those that it needs, whoever saved them.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rarefy.errors import OutputError
from rarefy.models.atomic import CHUNK, replacing

#: The two paths of hidden states: through the pruned blocks, and through the dense ones.
PRUNED, DENSE = "pruned", "dense"


def states_nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of hidden states of a shape, in memory or in a file."""
    return math.prod(shape) * dtype.itemsize


class MappedStates:
    """A tensor of zeros in a file of ``folder``, which vanishes with the process, however that ends.

    ``tensor`` can be used like any other on the CPU. The pages that were touched count as memory of the
    process until ``release``, which costs nothing but that they are mapped again when they are next used.
    All of the file's space is taken at once: a full disk is an OutputError here, not a signal later.
    """

    def __init__(self, folder: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.nbytes = states_nbytes(shape, dtype)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(prefix=".rarefy-states-", dir=folder, buffering=0) as file:
                take_space(file.fileno(), self.nbytes)
                self._map = mmap.mmap(file.fileno(), self.nbytes)  # which holds the file until the process ends
        except OSError as error:
            raise _refused(folder, self.nbytes, error) from error
        self.tensor: Tensor = torch.frombuffer(self._map, dtype=dtype).view(*shape)

    def release(self) -> None:
        """Give the memory of the pages back; the numbers stay in the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class StatesPart:
    """The description of one file of saved hidden states: windows ``first`` to ``first + shape[0]`` of the run.

    ``shape`` is [windows, length, hidden], ``checksums`` has one number for each window. ``path`` says whether
    they have come through the pruned blocks or through the dense ones. ``carried`` is the name of what else
    crosses from block to block (carried.py), if it is that.
    """

    file: str
    first: int
    shape: list[int]
    dtype: str
    checksums: list[int]
    path: str = PRUNED
    carried: str = ""


def save_states(
    folder: Path,
    block: int,
    states: Tensor,
    first: int = 0,
    on_window: Callable[[], None] | None = None,
    *,
    path: str = PRUNED,
    carried: str = "",
) -> StatesPart:
    """Save the hidden states that enter ``block``, of windows ``first`` and on, into a file of ``folder``.

    It is on the disk, whole, afterwards. Raises OutputError where the disk refuses; files of other blocks
    stay as they are.
    """
    of_path = "" if path == PRUNED else f"{path}-"
    what = f"-{zlib.crc32(carried.encode()):08x}" if carried else ""
    name = f"states-{of_path}{block:05d}-{first:06d}{what}.bin"
    checksums = []
    with replacing(folder / name) as file:
        for window in states:
            content = _bytes_of(window)
            file.write(content)
            checksums.append(zlib.crc32(content))
            if on_window:
                on_window()
    return StatesPart(name, first, list(states.shape), _name(states.dtype), checksums, path, carried)


def load_states(
    folder: Path,
    parts: Sequence[StatesPart],
    states: Tensor,
    first: int = 0,
    on_window: Callable[[], None] | None = None,
) -> None:
    """Fill ``states``, windows ``first`` and on, with what ``save_states`` saved in one or several parts.

    Raises OutputError where a file is missing or damaged, or the parts do not hold these states.
    """
    wanted, found = range(first, first + len(states)), 0
    for part in parts:
        if part.shape[1:] != list(states.shape[1:]) or part.dtype != _name(states.dtype):
            raise OutputError.sentence(
                f"{folder / part.file} holds hidden states {part.dtype} {part.shape}, but this run has "
                f"{_name(states.dtype)} {list(states.shape)}."
            )
        here = range(max(part.first, wanted.start), min(part.first + part.shape[0], wanted.stop))
        if here:
            _load_windows(folder / part.file, part, states, here, first, on_window)
        found += len(here)
    if found != len(wanted):
        raise OutputError.sentence(f"{folder} has the hidden states of {found} of {len(wanted)} windows.")


def _load_windows(
    path: Path, part: StatesPart, states: Tensor, windows: range, first: int, on_window: Callable[[], None] | None
) -> None:
    size = states_nbytes(part.shape[1:], states.dtype)
    try:
        with path.open("rb") as file:
            file.seek((windows.start - part.first) * size)
            for number in windows:
                content = bytearray(size)
                if file.readinto(content) != size or zlib.crc32(content) != part.checksums[number - part.first]:
                    raise OutputError.sentence(f"{path} is damaged: it holds other hidden states than were saved.")
                states[number - first] = torch.frombuffer(content, dtype=states.dtype).view(*part.shape[1:])
                if on_window:
                    on_window()
    except OSError as error:
        raise OutputError.sentence(f"{path} cannot be read: {error.strerror or error}.") from error


def take_space(descriptor: int, size: int) -> None:
    """Make a file of ``size`` bytes whose space on the disk is taken, so that writing to a mapping of it cannot fail.

    Where the system has no call for it, zeros are written. Raises OSError where the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # others say that the file system does not know the call
    zeros, done = bytes(CHUNK), 0
    while done < size:
        done += os.write(descriptor, zeros[: size - done])


def _refused(folder: Path, size: int, error: OSError) -> OutputError:
    return OutputError.sentence(
        f"{folder} cannot take the {size / 1e9:.1f} GB of hidden states: {error.strerror or error}."
    )


def _bytes_of(window: Tensor) -> memoryview:
    return window.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
