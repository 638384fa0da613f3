"""Hidden states beside a GPU: on it where they fit, else in pinned memory, the next batch copied ahead.

On the CPU nothing of this happens: a batch is a slice of the states.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# States are kept on the GPU up to this share of its free memory: blocks, Grams and solves need the rest.
_SHARE = 0.25


def empty_states(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "*shape"]:
    """Memory for the hidden states (num, length, hidden) of a model that computes on ``device``."""
    if device.type != "cuda":
        return torch.empty(shape, dtype=dtype)
    if math.prod(shape) * dtype.itemsize <= _SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, pin_memory=True)  # the GPU copies from it by itself


class Ahead:
    """Batches of states that come to a GPU from pinned memory, each while the one before it is computed with.

    Only ``take`` waits for a copy. What is fetched and not taken is forgotten by the next ``fetch``.
    """

    def __init__(self, states: Float[Tensor, "num length hidden"], device: torch.device) -> None:
        self._states, self._device = states, device
        self._useful = device.type == "cuda" and states.is_pinned()
        self._stream = torch.cuda.Stream(device) if self._useful else None
        self._fetched: tuple[slice, Tensor] | None = None

    def fetch(self, windows: slice) -> None:
        """Begin to copy some windows; they must not be written to before they are taken."""
        if self._stream is None or windows.start >= len(self._states):
            return
        with torch.cuda.stream(self._stream):
            self._fetched = windows, self._states[windows].to(self._device, non_blocking=True)

    def take(self, windows: slice) -> Float[Tensor, "b length hidden"]:
        """The states of some windows on the device, copied ahead if they are those of the last ``fetch``."""
        fetched, self._fetched = self._fetched, None
        if self._stream is None or fetched is None or fetched[0] != windows:
            return self._states[windows].to(self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        fetched[1].record_stream(current)  # its memory is not given to others while it is in use here
        return fetched[1]
