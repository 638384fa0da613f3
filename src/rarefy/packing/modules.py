"""The modules that stand where a linear or a block's experts stood, and hold their weights packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rarefy.models.experts import Call, FusedExperts
from rarefy.packing.operator import packed_linear
from rarefy.packing.weight import CHECK, ENDINGS, MASK, SCALE, PackedWeight

OFFSETS = "_offsets"


class PackedModule(nn.Module):
    """Parameters of a module as packed weights, each under the name that the dense one had.

    The tensors of weight.py are buffers of the state dict, so they are filled by loaders, moved by ``to`` and written
    by ``save_pretrained``. Once they are filled, ``count`` must be called. The weights cannot be trained; gradients
    pass through to inputs and biases.
    """

    def __init__(self, dense_dtype: torch.dtype) -> None:
        super().__init__()
        self.dense_dtype = dense_dtype
        self._held: dict[str, tuple[tuple[int, ...], int]] = {}  # shape and group by name

    def hold(self, name: str, weight: PackedWeight) -> None:
        """Make the buffers of a parameter."""
        self._held[name] = weight.shape, weight.group
        tensors = weight.tensors()
        for ending in ENDINGS:
            self.register_buffer(name + ending, tensors.get(ending))
        self.register_buffer(name + OFFSETS, None, persistent=False)

    def packed(self, name: str) -> PackedWeight:
        """A packed parameter, as it is now."""
        shape, group = self._held[name]
        values, mask, scale = (getattr(self, name + ending) for ending in ("", MASK, SCALE))
        return PackedWeight(values, mask, shape, scale, group)

    def packed_names(self) -> list[str]:
        """The names of all packed parameters."""
        return list(self._held)

    @property
    def on_cpu(self) -> bool:
        """Whether the packed parameters are in the memory of the CPU."""
        return all(self.packed(name).values.device.type == "cpu" for name in self._held)

    def count(self, prefix: str = "") -> None:
        """Find where each row's values begin. Raises ModelError where the buffers hold what was never packed."""
        for name in self._held:
            full, weight = f"{prefix}.{name}" if prefix else name, self.packed(name)
            offsets = weight.counted(full)
            weight.verify(full, getattr(self, name + CHECK))
            self.register_buffer(name + OFFSETS, offsets, persistent=False)

    def multiply(
        self, name: str, x: Float[Tensor, "... width"], index: int = 0, bias: Tensor | None = None
    ) -> Tensor:
        """``x @ matrix.T + bias`` with the matrix of that index, (..., rows)."""
        (*_, rows, width), group = self._held[name]
        values, mask, scale, offsets = (self._buffers[name + end] for end in ("", MASK, SCALE, OFFSETS))
        assert values is not None
        assert mask is not None
        assert offsets is not None, "count() has not been called"
        if mask.ndim > 2:
            first = index * rows
            mask, offsets = mask[index], offsets[first : first + rows + 1]
            scale = None if scale is None else scale[index]
        return packed_linear(x, values, mask, offsets, scale, bias, width, group)

    def dense(self, name: str, dtype: torch.dtype) -> Float[Tensor, "... rows width"]:
        """The matrices, unpacked, on the device of their values."""
        return self.packed(name).unpack(dtype, getattr(self, name + OFFSETS))

    def original(self, dtype: torch.dtype) -> nn.Module:
        """The ordinary module with the same weights, in ``dtype``."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Move or cast the buffers; scales keep their dtype, as the kernel knows no other."""
        scales = {name: self._buffers[name + SCALE] for name in self._held}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            cast = self._buffers[name + SCALE]
            if scale is not None and cast is not None and cast.dtype != scale.dtype:
                self._buffers[name + SCALE] = scale.to(cast.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save the buffers, with checksums of what they hold now: values may have been cast."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._held:
            destination[prefix + name + CHECK] = self.packed(name).checksum()


class PackedLinear(PackedModule):
    """``nn.Linear``, or a ``Conv1D``, with a packed weight (out_features, in_features)."""

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear | Conv1D, weight: PackedWeight) -> None:
        super().__init__(linear.weight.dtype)
        self.out_features, self.in_features = weight.shape
        self._is_conv1d = isinstance(linear, Conv1D)
        self.hold("weight", weight)
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """What the linear computes."""
        return self.multiply("weight", x, bias=self.bias)

    def original(self, dtype: torch.dtype) -> nn.Module:
        weight, bias = self.dense("weight", dtype), self.bias
        linear: nn.Linear | Conv1D
        with torch.device("meta"):
            if self._is_conv1d:
                linear = Conv1D(self.out_features, self.in_features)
                weight = weight.T.contiguous()
            else:
                linear = nn.Linear(self.in_features, self.out_features, bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = bias
        return linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, values={self.weight.dtype}"


class PackedExperts(PackedModule):
    """The experts of a block, of which one or both stacks of matrices are packed, expert after expert.

    Each expert is applied to the tokens that are routed to it, by the formula of models/experts.py.
    """

    def __init__(self, experts: FusedExperts, stacks: Mapping[str, PackedWeight]) -> None:
        module = experts.module
        super().__init__(getattr(module, next(iter(stacks))).dtype)
        self._dense_module = (module,)  # a tuple, so that it is no submodule
        self.__dict__.update({name: value for name, value in vars(module).items() if not name.startswith("_")})
        for name, parameter in module.named_parameters(recurse=False):
            if name not in stacks:
                self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, packed in stacks.items():
            self.hold(name, packed)
        self._formula = _Formula(experts, self)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the experts' module computes."""
        call = self._formula.call(args, kwargs)
        given: Tensor = [*args, *kwargs.values()][0]
        return (self._unrouted(call) if call.index is None else self._routed(call)).view(given.shape)

    def _routed(self, call: Call) -> Tensor:
        """Each token through its experts; an index beyond the experts hands it on."""
        assert call.index is not None
        assert call.weights is not None
        hidden, weights = call.hidden, call.weights.reshape(-1)
        output = torch.zeros_like(hidden)
        chosen, each = call.index.reshape(-1), call.index.shape[-1]
        order = chosen.argsort(stable=True)
        ends = chosen.bincount().cumsum(0).tolist()
        for expert, end in enumerate(ends):
            places = order[ends[expert - 1] if expert else 0 : end]
            if len(places):
                X = hidden[places // each]
                Y = self._formula.output(expert, X) if expert < self._formula.size else X
                output.index_add_(0, places // each, (Y * weights[places, None]).to(output.dtype))
        return output

    def _unrouted(self, call: Call) -> Tensor:
        """All tokens once for each expert, zero where it is not chosen: what is zero stays zero."""
        output = torch.zeros_like(call.hidden)
        for expert, (X, Y) in enumerate(
            zip(*(t.view(self._formula.size, -1, t.shape[-1]) for t in (call.hidden, output)))
        ):
            chosen = X.any(dim=1)
            if bool(chosen.any()):
                Y[chosen] = self._formula.output(expert, X[chosen])
        return output

    def original(self, dtype: torch.dtype) -> nn.Module:
        module = self._dense_module[0]
        for name in self._held:
            stack = self.dense(name, dtype)
            stack = stack.transpose(1, 2).contiguous() if self._formula.transposed else stack
            setattr(module, name, nn.Parameter(stack, requires_grad=False))
        for name, parameter in self.named_parameters(recurse=False):
            setattr(module, name, parameter)
        return module


class _Formula(FusedExperts):
    """How experts compute, with products by packed matrices."""

    def __init__(self, experts: FusedExperts, module: PackedExperts) -> None:
        vars(self).update(vars(experts))
        self.module: PackedExperts = module

    def output(self, expert: int, X: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """What one expert makes of tokens."""
        return self._output(expert, X)

    def _product(self, stack: str, expert: int, X: Tensor) -> Tensor:
        if stack not in self.module.packed_names():
            return super()._product(stack, expert, X)
        bias = getattr(self.module, f"{stack}_bias", None)
        return self.module.multiply(stack, X, expert, None if bias is None else bias[expert])
