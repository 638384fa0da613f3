"""A site is one weight that can be pruned, wherever it is kept: in a linear, or as one expert's part of a stack.

Everything above this package sees sites only: their names, shapes, what they read and write, and the
module whose input they multiply.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(eq=False)
class Mixture:
    """Experts of which a router chooses some for each token: ``size`` of them, with all of their sites."""

    name: str
    size: int
    sites: list[Site] = field(default_factory=list, repr=False)


@dataclass(frozen=True, eq=False)
class Expert:
    """The place of a site in a mixture: which expert it belongs to, and which of its weights it is."""

    mixture: Mixture
    index: int
    part: str


@dataclass(frozen=True)
class Hindrance:
    """Something in a block that Rarefy cannot prune, and refuses unless it is left out: its full name, and why.

    ``reason`` is a sentence without its full stop.
    """

    name: str
    reason: str


class Site(ABC):
    """One weight that can be pruned, in torch's orientation: ``output = input @ weight.T``.

    ``name`` is the full module name, such as ``model.layers.0.self_attn.q_proj``, or for an expert the
    name that its module would have, such as ``model.layers.0.mlp.experts.3.up_proj``;
    ``parameter_name`` that of the parameter it is kept in. ``module`` is the module whose forward
    input is, or leads to, the ``X (tokens, in)`` of the layer problem. ``expert`` is None for a weight
    that every token meets.
    """

    def __init__(self, name: str, module: nn.Module, parameter_name: str, expert: Expert | None = None) -> None:
        self.name = name
        self.module = module
        self.parameter_name = parameter_name
        self.expert = expert

    @property
    @abstractmethod
    def parameter(self) -> Tensor:
        """The parameter as the module holds it."""

    @abstractmethod
    def view(self, tensor: Tensor) -> Tensor:
        """The weight ``(out, in)`` within a ``tensor`` laid out like the parameter; shares its memory."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        out_features, in_features = self.view(self.parameter.detach()).shape
        return out_features, in_features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is kept in."""
        return self.parameter.dtype

    def read(self, rows: slice = slice(None)) -> Tensor:
        """A contiguous copy of the weight, ``(out, in)``, in the dtype and on the device it is kept in.

        ``rows``: only of these.
        """
        return self.view(self.parameter.detach())[rows].clone(memory_format=torch.contiguous_format)

    def write(self, weight: Tensor, rows: slice = slice(None)) -> None:
        """Replaces the weight, or ``rows`` of it, by ``weight (out, in)``, cast to the dtype in which it is kept."""
        kept = self.view(self.parameter.detach())[rows]
        if weight.shape != kept.shape:
            # copy_ would broadcast a row over the whole matrix without a word.
            raise ValueError(f"{self.name} is {tuple(kept.shape)}, the weight to write is {tuple(weight.shape)}.")
        kept.copy_(weight)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.shape[0]} x {self.shape[1]})"


class LinearSite(Site):
    """The weight of an ``nn.Linear``, or of a ``Conv1D``, which keeps its weight as ``(in, out)``."""

    module: nn.Linear | Conv1D

    def __init__(self, name: str, module: nn.Linear | Conv1D, expert: Expert | None = None) -> None:
        super().__init__(name, module, f"{name}.weight", expert)

    @property
    def parameter(self) -> Tensor:
        return self.module.weight

    def view(self, tensor: Tensor) -> Tensor:
        return tensor.T if isinstance(self.module, Conv1D) else tensor
