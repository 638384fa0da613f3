"""The torch operator ``rarefy::packed_linear``: what ``F.linear`` is for a dense weight.

One operator for every device and number of rows, so that torch.compile and export see a single opaque step of
known shape. A few rows of x are multiplied by the kernel; for more, and without a kernel, the matrix is unpacked into
memory that all layers share, and torch multiplies as it would with the dense weight.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from rarefy.packing import kernel
from rarefy.packing.weight import unpack, unpacked_as

_NAME = "rarefy::packed_linear"
_shared = threading.local()  # two threads may multiply at the same time


def packed_linear(
    x: Float[Tensor, "... width"],
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    width: int,
    group: int,
) -> Float[Tensor, "... rows"]:
    """``x @ matrix.T + bias`` for a matrix (rows, width) as weight.py has it.

    Raises ValueError where the tensors do not make a packed matrix.
    """
    result: Tensor = _OPERATOR(x, values, mask, offsets, scale, bias, width, group)
    return result


def _compute(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    width: int,
    group: int,
) -> Tensor:
    rows, count = mask.shape[0], x.numel() // width
    if x.device.type != "cpu" or count > kernel.MOST_ROWS or kernel.path() is None or x.dtype not in _PRODUCTS:
        return functional.linear(x, _dense(x.dtype, values, mask, offsets, scale, width, group), bias)
    if count == 0:
        return x.new_empty(*x.shape[:-1], rows)
    flat = x.reshape(count, width)
    if x.dtype == torch.float16:
        y = kernel.product(flat.float(), values, mask, offsets, scale, _float(bias), width, group).half()
    else:
        y = kernel.product(flat, values, mask, offsets, scale, bias, width, group)
    return y.view(*x.shape[:-1], rows)


_PRODUCTS = (torch.bfloat16, torch.float16, torch.float32)


def _dense(
    dtype: torch.dtype,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    width: int,
    group: int,
) -> Tensor:
    """The matrix in ``dtype``, in memory that the next call of this thread uses again."""
    rows, first = mask.shape[0], unpacked_as(values.dtype, dtype)
    if values.device.type != "cpu":
        return unpack(values, mask, offsets, scale, width, group, dtype)
    memory: dict[torch.dtype, Tensor] = vars(_shared).setdefault("memory", {})
    if first not in memory or memory[first].numel() < rows * width:
        memory.pop(first, None)
        with torch.inference_mode(False):  # else it could not be written to outside of inference mode
            memory[first] = torch.empty(rows * width, dtype=first)
    out = memory[first][: rows * width].view(rows, width)
    return unpack(values, mask, offsets, scale, width, group, dtype, out)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _shape(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    width: int,
    group: int,
) -> Tensor:
    """What the result is like, for compilers."""
    return x.new_empty(*x.shape[:-1], mask.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, mask, offsets, scale, _, ctx.width, ctx.group = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(values, mask, offsets, scale)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the packed weight is fixed."""
    values, mask, offsets, scale = ctx.saved_tensors
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = gradient @ unpack(values, mask, offsets, scale, ctx.width, ctx.group, ctx.dtype)
    if ctx.needs_input_grad[5]:
        of_bias = gradient.flatten(0, -2).sum(dim=0)
    return of_x, None, None, None, None, of_bias, None, None


torch.library.define(
    _NAME,
    "(Tensor x, Tensor values, Tensor mask, Tensor offsets, Tensor? scale, Tensor? bias, int width, int group)"
    " -> Tensor",
)
torch.library.impl(_NAME, "default", _compute)
torch.library.register_fake(_NAME, _shape)
torch.library.register_autograd(_NAME, _backward, setup_context=_save)
_OPERATOR = torch.ops.rarefy.packed_linear.default
