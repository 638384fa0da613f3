"""The precision of computation: the dtype in which a block runs on a device, and full float32 products."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import nn

#: bfloat16 products must be so many times as fast as float32 ones: what is between products is slower in bfloat16.
_GAIN = 1.25

_ROWS, _INPUTS, _OUTPUTS, _ROUNDS = 512, 1024, 1024, 5


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to run blocks in: on a CPU float32, or bfloat16 where the weights are and its products are faster.

    What is faster is measured once in a process (``bfloat16_gain``); float32 loses nothing.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if dtype == torch.bfloat16 and bfloat16_gain() >= _GAIN else torch.float32


@cache
def bfloat16_gain() -> float:
    """How many times as fast as in float32 this CPU multiplies bfloat16 matrices: the best of rounds in turn.

    Between 0.6 and 2.1 was seen on processors with AVX-512, 8 with AMX (docs/log.md). It takes some hundredths of a
    second; where bfloat16 is emulated, the first round ends it.
    """
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    operands = {
        dtype: (torch.ones(_ROWS, _INPUTS, dtype=dtype), torch.ones(_OUTPUTS, _INPUTS, dtype=dtype)) for dtype in best
    }
    with torch.no_grad():
        for _ in range(1 + _ROUNDS):  # the first one makes the kernels
            for dtype, (x, weight) in operands.items():
                started = time.perf_counter()
                nn.functional.linear(x, weight)
                best[dtype] = min(best[dtype], time.perf_counter() - started)
            if best[torch.bfloat16] > 4 * best[torch.float32]:
                break
    return best[torch.float32] / best[torch.bfloat16]


def compute_words(dtype: torch.dtype, device: torch.device) -> str | None:
    """In which dtype blocks run and why, for the user; None where there is no choice."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return None
    chosen = str(compute_dtype(dtype, device)).removeprefix("torch.")
    return (
        f"computation: {chosen}, as bfloat16 products take {1 / bfloat16_gain():.2g} of the time of float32 ones here"
    )


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
