"""Room for tensors that have a row for each window: in memory, the GPU's if they fit, or in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rarefy.calibration.ahead import empty_states
from rarefy.calibration.spill import MappedStates
from rarefy.calibration.trees import Leaf


def _keep() -> None:
    """Do nothing: a tensor in memory has no pages to give back."""


@dataclass
class WindowRows(Leaf):
    """A tensor with a row for each window; ``release`` gives back the memory of one in a file for now."""

    tensor: Tensor
    release: Callable[[], None] = _keep


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, offload: Path | None) -> WindowRows:
    """A tensor with any content, for a model that computes on ``device``; in a file of ``offload`` if that is given.

    Raises OutputError where the folder cannot take it.
    """
    if offload is None:
        return WindowRows(empty_states(shape, dtype, device))
    states = MappedStates(offload, shape, dtype)
    return WindowRows(states.tensor, states.release)


def put_away(tensor: Tensor, offload: Path | None) -> Tensor | WindowRows:
    """A tensor where it takes none of the memory that blocks need: off the GPU, or in a file of ``offload``.

    Raises OutputError where the folder cannot take it.
    """
    if offload is not None:
        states = MappedStates(offload, tensor.shape, tensor.dtype)
        states.tensor.copy_(tensor)
        states.release()
        return WindowRows(states.tensor, states.release)
    return WindowRows(tensor.cpu().pin_memory()) if tensor.is_cuda else tensor
