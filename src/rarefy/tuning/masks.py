"""Keeps the zeros of a pruned model while it is trained, whatever trains it.

Two things are enough, and both are needed. The gradient of every zero is set to 0 as soon as it is there, so
that it counts in no norm that is clipped and in no moment of an optimiser. And after each step of any
optimiser the zeros are set to 0 again, because momentum from before, or an update that mixes the entries of
a matrix, moves weights whose gradient is 0.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from rarefy.errors import InputError, VerificationError
from rarefy.tuning.adapters import mask_adapters
from rarefy.tuning.shard import local, whole


@dataclass(frozen=True)
class _Weight:
    """A parameter with zeros: the tensor itself, held weakly, and where it is not zero on this process."""

    name: str
    parameter: weakref.ref[Tensor]
    mask: Bool[Tensor, "..."]

    def mask_(self, tensor: Tensor) -> None:
        """Set the entries of ``tensor``, laid out like the parameter, to 0 where the mask is False."""
        part = local(tensor)
        part.mul_(self.mask if self.mask.device == part.device else self.mask.to(part.device))

    def filled(self, tensor: Tensor) -> int:
        """How many entries of ``tensor`` are not 0 where the mask is False."""
        part = local(tensor)
        return int(((part != 0) & ~self.mask.to(part.device)).sum())


class KeptZeros:
    """The zeros of a model in training, from ``keep_zeros(model)`` to ``remove``; a context does both and checks.

    ``masks`` are True where a weight is kept, by the parameters' names; of a sharded parameter, this
    process's part. ``adapters`` are the layers whose LoRA products are masked; they stay so.
    """

    def __init__(self, model: nn.Module) -> None:
        found = list(_sparse_parameters(model))
        if not found:
            raise InputError.sentence(
                f"The model has no zeros to keep: no weight of its {type(model).__name__} holds zeros beside other "
                "values; call keep_zeros after its weights are loaded."
            )
        self._weights = {id(each): _Weight(name, weakref.ref(each), local(each) != 0) for name, each in found}
        self._model = weakref.ref(model)
        self.adapters = mask_adapters(model)
        self._hooks: list[Any] = [
            each.register_post_accumulate_grad_hook(_gradient_hook(self._weights[id(each)]))
            for _, each in found
            if each.requires_grad
        ]
        self._hooks.append(register_optimizer_step_post_hook(_step_hook(self._weights)))
        weakref.finalize(model, _remove, self._hooks)

    @property
    def masks(self) -> dict[str, Bool[Tensor, "..."]]:
        """Where each parameter with zeros is not zero, by its name."""
        return {weight.name: weight.mask for weight in self._weights.values()}

    @torch.no_grad()
    def apply_(self) -> None:
        """Set the zeros to 0 now: for whatever changes weights without a step of one of torch's optimisers."""
        for weight in self._weights.values():
            if (parameter := weight.parameter()) is not None:
                weight.mask_(parameter)

    @torch.no_grad()
    def check(self) -> None:
        """Prove that every zero is still 0.

        Raises VerificationError where one is not, and where a parameter was replaced, by sharding for
        instance: then it was not watched since.
        """
        model = self._model()
        if model is None:
            return
        parameters = dict(model.named_parameters())
        for weight in self._weights.values():
            parameter = parameters.get(weight.name)
            if parameter is None or parameter is not weight.parameter():
                raise VerificationError(
                    f"{weight.name} is not the parameter that it was: call keep_zeros after the model is sharded, "
                    "converted or loaded."
                )
            if filled := weight.filled(parameter):
                raise VerificationError(f"{weight.name} has {filled:,} weights that were zero and are not any more.")

    def remove(self) -> None:
        """Watch the model no longer."""
        _remove(self._hooks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        if error is None:
            self.check()


def keep_zeros(model: nn.Module) -> KeptZeros:
    """Keep every zero of a pruned model zero while it is trained, by whatever loop and optimiser.

    ``model`` is any module with pruned weights; what is watched are its parameters of two and more dimensions
    that hold zeros beside other values, embeddings and what is tied to them aside. Use it as a context, which
    proves at its end that no zero was filled, or keep the handle::

        with rarefy.keep_zeros(model):
            trainer.train()

    Where the model has LoRA adapters of PEFT, their products are masked as well, so that what is trained is what
    PEFT's own merge, or ``rarefy.merge``, leaves; that stays after the end.

    It works with every optimiser of torch's kind, before or after that is made, with weight decay, momentum,
    gradient accumulation and clipping, mixed precision, ``torch.compile``, DDP, and FSDP2 where it is called after
    ``fully_shard``. Raises InputError where there are no zeros; at the end of the context VerificationError where
    a zero was filled all the same. Memory: one byte for each weight of the watched parameters.
    """
    return KeptZeros(model)


@torch.no_grad()
def _sparse_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that hold zeros beside other values, but for embeddings; each once, under its first name."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not parameter.is_floating_point() or id(parameter) in embeddings:
            continue
        nonzero = (parameter != 0).sum()
        # All processes decide alike, whatever their shards hold.
        kept = int(whole(nonzero))
        if 0 < kept < parameter.numel():  # an adapter that begins as zero is no pruned weight
            yield name, parameter


def _gradient_hook(weight: _Weight) -> Any:
    def hook(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            weight.mask_(gradient)

    return hook


def _step_hook(weights: dict[int, _Weight]) -> Any:
    """A hook for after a step of any optimiser: it masks those of its parameters that are watched."""

    @torch.no_grad()
    def hook(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                weight = weights.get(id(parameter))
                if isinstance(parameter, Tensor) and weight is not None and weight.parameter() is parameter:
                    weight.mask_(parameter)

    return hook


def _remove(hooks: list[Any]) -> None:
    while hooks:
        hooks.pop().remove()
