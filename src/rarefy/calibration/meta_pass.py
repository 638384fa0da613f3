"""A forward pass on the meta device: all shapes and all calls of a model, without a single number.

Where a model's way depends on numbers, they are guessed: every truth holds, every number is 1, a mask chooses
everything. Of every tensor that was made from the token ids it is known in which block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy.calibration.trees import tensors_in

_OUTSIDE = -1  # made from the token ids before any block ran
_aten = torch.ops.aten


class MetaPass(TorchDispatchMode):
    """Within this scope a model can run on the meta device.

    ``block`` is the number of the block that runs now, None between blocks. ``on_read(tensor)`` hears of every
    tensor that a block reads and another block made. ``guesses`` counts what had to be guessed.
    """

    def __init__(self, on_read: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.block: int | None = None
        self.guesses = 0
        self._on_read = on_read
        self._made_in: dict[int, int] = {}
        self._held: list[Tensor] = []  # so that no other tensor gets the identity of one of them

    def made_in(self, tensor: Tensor) -> int | None:
        """The last block that took part in making a tensor; None where none did."""
        made = self._made_in.get(id(tensor), _OUTSIDE)
        return None if made == _OUTSIDE else made

    def note(self, tensors: Iterable[Tensor], block: int = _OUTSIDE) -> None:
        """Remember that these tensors were made from the token ids, in ``block`` or before all blocks."""
        for tensor in tensors:
            self._made_in[id(tensor)] = block
            self._held.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [tensor for _, tensor in tensors_in([*args, *(kwargs or {}).values()])]
        known = [self._made_in[id(tensor)] for tensor in read if id(tensor) in self._made_in]
        if self.block is not None:
            for tensor in read:
                if self.made_in(tensor) not in (None, self.block):
                    self._on_read(tensor)
        output = self._compute(func, args, kwargs or {})
        if known:
            block = max(known) if self.block is None else self.block
            self.note((tensor for _, tensor in tensors_in(output)), block)
        return output

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None or not first.is_meta:
            return func(*args, **kwargs)
        guess = _GUESSES.get(func)
        if guess is None or (func is _aten.index.Tensor and not any(map(_is_mask, args[1]))):
            return func(*args, **kwargs)
        self.guesses += 1
        return guess(*args, **kwargs)


def _number(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _nonzero(tensor: Tensor) -> Tensor:
    return tensor.new_empty((tensor.numel(), tensor.ndim), dtype=torch.long)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _index(tensor: Tensor, indices: list[Tensor | None]) -> Any:
    """``tensor[indices]`` where masks choose everything."""
    places: list[Tensor | None] = []
    for index in indices:
        places += _nonzero(index).unbind(1) if index is not None and _is_mask(index) else [index]
    return _aten.index.Tensor(tensor, places)


def _grouped_mm(tensor: Tensor, matrices: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor.new_empty(*tensor.shape[:-1], matrices.shape[-1])


def _bincount(tensor: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return tensor.new_empty(minlength, dtype=torch.long if weights is None else weights.dtype)


_GUESSES: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: _number,
    _aten.nonzero.default: _nonzero,
    _aten.index.Tensor: _index,
    _aten._grouped_mm.default: _grouped_mm,  # on the meta device for bfloat16 only
    _aten.bincount.default: _bincount,
}
