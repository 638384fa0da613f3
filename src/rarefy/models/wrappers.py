"""Takes a model out of what is wrapped around it, and refuses what changes its weights behind Rarefy's back.

An adapter adds to the weights that it is put on, so zeros in them are none in the merged model; quantised,
sharded and computed weights cannot be written. For each, one sentence says what to do first.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from rarefy.errors import ModelError

# Libraries that put adapters into a model, or prompts before its input.
_ADAPTERS = ("peft", "adapters")
_COMPILED = "OptimizedModule"  # what torch.compile returns; importing its class would load the compiler


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what torch.compile or data parallelism made of it, with all of its weights in memory.

    Raises ModelError for a model with adapters, with quantised or sharded weights, or with weights elsewhere.
    """
    while True:
        if type(model).__name__ == _COMPILED:
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        else:
            break
    refuse_wrappers(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError.sentence(
            f"{type(model).__name__} has weights that are not in memory: load it without a device map that puts some "
            "on the disk."
        )
    return model


def refuse_wrappers(model: nn.Module) -> None:
    """Raise ModelError where something in the model would make what is written to its weights another thing."""
    for name, module in model.named_modules():
        if any(_library(base) in _ADAPTERS for base in type(module).__mro__):
            raise ModelError.sentence(
                f"{_place(model, name)} has an adapter ({type(module).__name__}), whose weights are no part of the "
                "model's: merge it first (merge_and_unload), and prune what that returns."
            )
        if _library(type(module)) == "deepspeed" or "FullyShardedDataParallel" in type(module).__name__:
            raise ModelError.sentence(
                f"{_place(model, name)} has its weights in shards ({type(module).__name__}): save the whole model, "
                "and load it in one piece."
            )
        if name and (type(module).__name__ == _COMPILED or module._compiled_call_impl is not None):
            raise ModelError.sentence(
                f"{_place(model, name)} is compiled: prune the model first, and compile it then."
            )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", None)
        kind = f" ({getattr(method, 'value', method)})" if method is not None else ""
        raise ModelError.sentence(
            f"{type(model).__name__} is quantised{kind}, but Rarefy prunes ordinary floating-point weights: "
            "dequantise it first (model.dequantize), or load the model that it was made from."
        )


def refuse_computed_weight(name: str, module: nn.Module) -> None:
    """Raise ModelError unless a linear's weight is an ordinary parameter, which can be read and written."""
    parameter = module._parameters.get("weight")
    if parameter is None:
        raise ModelError.sentence(
            f"{name} computes its weight from other tensors: make it permanent first (remove_parametrizations, or "
            "prune.remove of torch.nn.utils)."
        )
    dtype = str(parameter.dtype).removeprefix("torch.")
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise ModelError.sentence(
            f"{name} keeps its weight as {dtype}, but Rarefy prunes floating-point weights only."
        )
    if type(parameter) not in (nn.Parameter, torch.Tensor):
        raise ModelError.sentence(
            f"{name} keeps its weight as a {type(parameter).__name__}, but Rarefy prunes ordinary tensors only: "
            "dequantise or gather it first."
        )


def _library(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _place(model: nn.Module, name: str) -> str:
    return name or type(model).__name__
