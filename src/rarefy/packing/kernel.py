"""Loads the compiled kernel, chooses its path, and calls it with tensors.

Without the library (Rarefy was installed where there was no C compiler) ``path()`` is None, and what the kernel
does is done by torch, in weight.py.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch  # before the library: both then share torch's threads
from torch import Tensor

from rarefy.errors import InputError

#: The library is made when Rarefy is installed (hatch_build.py).
LIBRARY = Path(__file__).with_name("kernel.shared")
#: The variable of the environment that forces a path, for tests and comparisons; ``off`` is torch.
VARIABLE = "RAREFY_KERNEL"
#: As the C file numbers them; each needs more of the processor than the one before.
PATHS = ("plain", "neon", "avx2", "avx512", "avx512_bf16")
OFF = "off"

#: More rows of x than this are multiplied by torch, with the unpacked matrix.
MOST_ROWS = 8

#: As the C file numbers them, by the dtype of the values; two codes of 4 bits are one uint8.
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3, torch.uint8: 4}

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_MATRIX: list[Any] = [_INT, _INT, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG]
_WRONG = {
    1: "arguments that no packed matrix has",
    2: "a mask that claims other values than there are",
    3: "too little memory",
}


@cache
def library() -> ctypes.CDLL | None:
    """The library; None where there is none, or it cannot be loaded here."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    loaded.rarefy_product.argtypes = [*_MATRIX, _POINTER, _INT, _INT, _POINTER, _POINTER, _INT]
    loaded.rarefy_unpack.argtypes = [*_MATRIX, _POINTER, _INT, _INT]
    loaded.rarefy_count.argtypes = [_POINTER, _LONG, _LONG, _LONG, _POINTER]
    return loaded


@cache
def path() -> str | None:
    """The path that products take: the best for this machine, or what RAREFY_KERNEL says; None is torch.

    Raises InputError where the variable names no path that this machine can take.
    """
    loaded = library()
    usable = [name for number, name in enumerate(PATHS) if loaded and loaded.rarefy_can(number)]
    forced = os.environ.get(VARIABLE)
    if not forced:
        return usable[-1] if usable else None
    if forced not in (OFF, *usable):
        raise InputError(VARIABLE, forced, f"one of those that can be had here: {', '.join([OFF, *usable])}")
    return None if forced == OFF else forced


def describe() -> str:
    """How packed matrices are multiplied here, in a few words."""
    if (chosen := path()) is not None:
        return f"kernel {chosen}"
    if library() is None:
        return "no kernel, since Rarefy was installed without a C compiler: torch unpacks a matrix for each product"
    return f"no kernel, as {VARIABLE} says: torch unpacks a matrix for each product"


def product(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    width: int,
    group: int,
) -> Tensor:
    """``x (n, width) @ matrix.T + bias``, (n, rows), for up to 8 rows of x in bfloat16 or float32.

    Raises ValueError where the tensors do not make a packed matrix.
    """
    loaded, chosen = library(), path()
    assert loaded is not None
    assert chosen is not None
    matrix = _arguments(chosen, values, mask, offsets, scale, width, group)
    rows = mask.shape[0]
    if x.dtype not in (torch.bfloat16, torch.float32) or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"x is {x.dtype} and bias {bias.dtype if bias is not None else None}")
    if x.shape[-1] != width or (bias is not None and bias.shape != (rows,)):
        raise ValueError(f"x is {tuple(x.shape)} and the matrix {rows} x {width}")
    x = x.contiguous()
    bias = bias if bias is None else bias.contiguous()
    y = torch.empty(x.shape[0], rows, dtype=x.dtype)
    _refuse(
        loaded.rarefy_product(
            *matrix,
            x.data_ptr(),
            x.dtype == torch.bfloat16,
            x.shape[0],
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return y


def unpack(
    out: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, scale: Tensor | None, width: int, group: int
) -> None:
    """Fill ``out (rows, width)``: in the dtype of the values, or, for codes, in bfloat16 or float32.

    Raises ValueError where the tensors do not make a packed matrix.
    """
    loaded, chosen = library(), path()
    assert loaded is not None
    assert chosen is not None
    matrix = _arguments(chosen, values, mask, offsets, scale, width, group)
    allowed = (torch.bfloat16, torch.float32) if scale is not None else (values.dtype,)
    if out.shape != (mask.shape[0], width) or out.dtype not in allowed or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, and the matrix {mask.shape[0]} x {width}")
    _refuse(loaded.rarefy_unpack(*matrix, out.data_ptr(), out.dtype == torch.bfloat16, torch.get_num_threads()))


def count(mask: Tensor, width: int, unit: int, offsets: Tensor) -> bool:
    """Fill ``offsets (rows + 1)`` with the first value of each row, rows rounded up to whole ``unit`` values.

    False where a bit beyond the width is set.
    """
    loaded = library()
    assert loaded is not None
    assert mask.is_contiguous()
    assert offsets.numel() == mask.shape[0] + 1
    return not loaded.rarefy_count(mask.data_ptr(), mask.shape[0], width, unit, offsets.data_ptr())


def _arguments(
    chosen: str, values: Tensor, mask: Tensor, offsets: Tensor, scale: Tensor | None, width: int, group: int
) -> Sequence[object]:
    """What describes the matrix to the library; whatever the tensors hold, it reads nothing outside of them."""
    kind = KINDS.get(values.dtype)
    rows, coded = mask.shape[0], kind is not None and kind >= KINDS[torch.int8]
    fits = (
        kind is not None
        and mask.dtype == torch.uint8
        and mask.shape == (rows, (width + 31) // 32 * 4)
        and offsets.dtype == torch.int64
        and offsets.shape == (rows + 1,)
        and values.ndim == 1
        and coded == (scale is not None)
        and values.is_contiguous()
        and mask.is_contiguous()
        and offsets.is_contiguous()
    )
    if fits and scale is not None:
        groups = -(-width // group) if group > 0 else 0
        fits = scale.dtype == torch.float16 and scale.shape == (rows, groups) and scale.is_contiguous()
    if not fits:
        raise ValueError("these tensors are no packed matrix: their shapes, dtypes or strides do not fit")
    return (
        PATHS.index(chosen),
        kind,
        values.data_ptr(),
        values.numel() * (2 if values.dtype == torch.uint8 else 1),
        mask.data_ptr(),
        offsets.data_ptr(),
        None if scale is None else scale.data_ptr(),
        group,
        rows,
        width,
    )


def _refuse(status: int) -> None:
    if status:
        raise ValueError(f"the packed matrix has {_WRONG[status]}")
