"""Several processes that train one model: torch's FSDP2, which shards weights, gradients and the optimiser's states.

Embeddings and the head are not trained and stay whole on each process. What a process keeps of a sharded model are
plain tensors, its shards, so that they can be saved and loaded like any others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    """Shard each block, and what else of the model is trained, over all processes; in place."""
    from torch.distributed.fsdp import fully_shard

    fixed: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            fixed |= set(module.parameters())
    head = model.get_output_embeddings()
    fixed |= set(head.parameters()) if head is not None else set()
    for block in blocks:
        fully_shard(block, ignored_params=fixed)
    fully_shard(model.base_model, ignored_params=fixed)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: of a sharded one its shard, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one, all processes call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, pattern: Tensor) -> Tensor:
    """A process's part as the kind of tensor that ``pattern`` is."""
    if not isinstance(pattern, DTensor) or part.shape != pattern.to_local().shape:
        return part
    return DTensor.from_local(
        part.to(pattern.device), pattern.device_mesh, pattern.placements, shape=pattern.shape, stride=pattern.stride()
    )


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state with this process's parts of its tensors."""
    state = optimizer.state_dict()
    return {**state, "state": {key: _mapped(one) for key, one in state["state"].items()}}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give the optimiser the state that ``optimizer_state`` was of one like it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    restored = {
        key: {
            name: like(value, parameters[key]) if isinstance(value, Tensor) and value.ndim else value
            for name, value in one.items()
        }
        for key, one in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": restored})


def _mapped(state: dict[str, Any]) -> dict[str, Any]:
    return {name: local(value) if isinstance(value, Tensor) else value for name, value in state.items()}
