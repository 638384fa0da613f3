"""The dtype in which a block is computed on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to run blocks in: float32 on CPUs without matrix units for half precision.

    There float32 products are faster than bfloat16 ones (docs/log.md) and lose nothing.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    if device.type == "cpu" and half and not (dtype == torch.bfloat16 and amx):
        return torch.float32
    return dtype


@contextmanager
def computing_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold the half-precision parameters and buffers of a block in ``dtype`` within the scope."""
    tensors = [*module.parameters(), *module.buffers()]
    changed = [
        (tensor, tensor.dtype)
        for tensor in tensors
        if tensor.dtype in (torch.bfloat16, torch.float16) and tensor.dtype != dtype
    ]
    try:
        for tensor, _ in changed:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, original in changed:
            tensor.data = tensor.data.to(original)
