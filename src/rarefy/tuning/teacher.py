"""The dense model that a model is tuned against: beside it in memory, or as what was recorded of it once.

Three teachers give the same thing, a target for each position of the windows at hand:

    ModelTeacher    the dense model itself; the only one that gives hidden states of blocks
    StatesTeacher   what entered its head, in a file: hidden numbers a position. Exact, where the trained model has
                    the dense one's head, which pruning leaves alone; each slice costs a product with the head
    TopTeacher      its k likeliest tokens with their log probabilities, in a file: 6 k bytes a position

A recorded teacher costs one pass of the dense model over the windows, however many epochs follow, and the dense
model need not be in memory beside the one that is trained.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn

from rarefy.calibration.spill import take_space
from rarefy.models.atomic import refusals, sync
from rarefy.tuning.distill import FullTarget, Target, TopTarget, top_of
from rarefy.tuning.logits import Logits, block_outputs

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Rows:
    """The dense model's targets for all predicted positions of some windows, and the hidden states of its blocks."""

    to_target: Callable[[slice], Target]
    hidden: list[Float[Tensor, "batch length hidden"]]

    def __getitem__(self, part: slice) -> Target:
        return self.to_target(part)


class Teacher(ABC):
    """Gives the dense model's targets for windows of the run, by their numbers."""

    @abstractmethod
    def rows(self, numbers: Int64[Tensor, " batch"], ids: Int64[Tensor, "batch length"]) -> Rows:
        """The targets of all predicted positions of these windows, a row for each position."""


class ModelTeacher(Teacher):
    """The dense model in memory, for inference; ``blocks`` are those whose hidden states are wanted."""

    def __init__(self, logits: Logits, blocks: Sequence[nn.Module] = ()) -> None:
        self._logits, self._blocks = logits, blocks

    @torch.no_grad()
    def rows(self, numbers: Int64[Tensor, " batch"], ids: Int64[Tensor, "batch length"]) -> Rows:
        with block_outputs(self._blocks) as hidden:
            values = self._logits.rows(ids)

        def target(part: slice) -> FullTarget:
            with torch.no_grad():
                return FullTarget(self._logits.of(values[part]))

        return Rows(target, hidden)


class StatesTeacher(Teacher):
    """What entered the dense model's head (``record_states``).

    ``logits`` is the trained model's, whose head must have the dense one's weight.
    """

    def __init__(
        self, states: Float[Tensor, "windows positions hidden"], logits: Logits, device: torch.device
    ) -> None:
        self._states, self._logits, self._device = states, logits, device

    def rows(self, numbers: Int64[Tensor, " batch"], ids: Int64[Tensor, "batch length"]) -> Rows:
        values = self._states[numbers].flatten(0, 1).to(self._device)

        def target(part: slice) -> FullTarget:
            with torch.no_grad():
                return FullTarget(self._logits.of(values[part]))

        return Rows(target, [])


class TopTeacher(Teacher):
    """The k likeliest tokens of each position, (windows, length - 1, k), and their log probabilities."""

    def __init__(self, tokens: Tensor, log_p: Tensor, device: torch.device) -> None:
        self._tokens, self._log_p, self._device = tokens, log_p, device

    def rows(self, numbers: Int64[Tensor, " batch"], ids: Int64[Tensor, "batch length"]) -> Rows:
        tokens = self._tokens[numbers].flatten(0, 1).to(self._device)
        log_p = self._log_p[numbers].flatten(0, 1).to(self._device)
        return Rows(lambda part: TopTarget(tokens[part], log_p[part]), [])


# --- Recording ----------------------------------------------------------------------------------------------


@torch.no_grad()
def record_states(
    logits: Logits, windows: Int64[Tensor, "windows length"], file: Path, progress: Progress | None = None
) -> Float[Tensor, "windows positions hidden"]:
    """Run the dense model over the windows and keep what enters its head in ``file``, which is then on the disk.

    The last position of each window, which predicts nothing, is left out. ``logits`` is the dense model's, whose
    head must stand alone, and says the dtype. Raises OutputError where the disk is full.
    """
    states: Tensor | None = None
    for number in range(len(windows)):
        rows = logits.rows(windows[number : number + 1])
        if states is None:
            states = mapped(file, (len(windows), *rows.shape), logits.precision, write=True)
        states[number] = rows.to(states)
        if progress:
            progress(number + 1, len(windows))
    assert states is not None  # there is at least one window
    with refusals(file):
        sync(file)
    return states


@torch.no_grad()
def record_top(
    logits: Logits,
    windows: Int64[Tensor, "windows length"],
    k: int,
    files: tuple[Path, Path],
    progress: Progress | None = None,
) -> tuple[Int32[Tensor, "windows positions k"], Float[Tensor, "windows positions k"]]:
    """Run the dense model over the windows and keep its k likeliest tokens of each predicted position.

    Two files, which are then on the disk: token ids, int32, and log probabilities, float16. Raises OutputError where
    the disk is full.
    """
    shape = (len(windows), windows.shape[1] - 1, k)
    tokens = mapped(files[0], shape, torch.int32, write=True)
    log_p = mapped(files[1], shape, torch.float16, write=True)
    for number in range(len(windows)):
        values = logits.rows(windows[number : number + 1])
        for part in logits.slices(len(values)):
            top = top_of(logits.of(values[part]), k)
            tokens[number, part], log_p[number, part] = top.tokens.to(tokens), top.log_p.to(log_p)
        if progress:
            progress(number + 1, len(windows))
    for file in files:
        with refusals(file):
            sync(file)
    return tokens, log_p


def mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype, *, write: bool = False) -> Tensor:
    """A tensor whose memory is a file; to ``write``, the file is made in its full size.

    Raises OutputError where the disk has no space for that, OSError or ValueError where a file to read is missing or
    of another size, which torch would fill up with zeros.
    """
    size = math.prod(shape)
    if write:
        with refusals(file), file.open("wb") as opened:
            take_space(opened.fileno(), size * dtype.itemsize)
    elif file.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{file} has not the size of a {dtype} tensor of shape {shape}")
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
