"""The precision of computation: the dtype in which a block runs on a device, and full float32 products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

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


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the scope, products of float32 matrices are of float32, not of TF32 or bfloat16, on GPUs and CPUs.

    ``torch.set_float32_matmul_precision`` and its like make them coarser for the whole process: a Gram would have
    errors of 1e-3 in place of 1e-7. The setting is the user's again afterwards.
    """
    precision: str | None = None
    with suppress(RuntimeError):  # torch refuses to say where a newer setting contradicts this one
        precision = torch.get_float32_matmul_precision()
    backends = [(backend, _precision_of(backend)) for backend in _backends()]
    try:
        if precision not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        for backend, its_precision in backends:
            if its_precision not in _FULL:
                backend.fp32_precision = "ieee"
        yield
    finally:
        if precision not in (None, "highest"):
            torch.set_float32_matmul_precision(precision)
        for backend, its_precision in backends:
            if its_precision != _precision_of(backend):
                backend.fp32_precision = its_precision


_FULL = ("none", "ieee", "")


def _backends() -> list[Any]:
    """What holds the precision of products by kind of device, in releases of torch that have such."""
    return [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]


def _precision_of(backend: Any) -> str:
    try:
        return str(backend.fp32_precision)
    except AttributeError:
        return ""
