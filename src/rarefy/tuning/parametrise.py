"""Which parameters of a model are trained, and in which form; all end as ordinary weights of the same masks.

    full     every weight that is kept, norms and biases: all but the embeddings and what is tied to them
    norms    norms and biases only
    spp      W (1 + s b A): a factor for each kept weight from 16 in + out numbers for a layer (SPP, 2405.16057)
    lora     W + M (s B A): PEFT's adapter with its product masked

W is (out, in), M its mask, A (rank, in), B (out, rank), b (out), s = alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rarefy.errors import InputError, ModelError
from rarefy.models.sites import LinearSite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rarefy.models.blocks import Block

Name = Literal["full", "norms", "spp", "lora"]
NAMES: tuple[Name, ...] = ("full", "norms", "spp", "lora")


class SPP(nn.Module):
    """W -> W (1 + s b_i A[floor(rank i / out)]) for row i; a zero stays 0 whatever A and b are.

    Source: SPP (2405.16057). There A is uniform in +-1/sqrt(in) and b is 0 at first, so that nothing is changed
    before the first step. The rank is what is asked for, and any number of rows can be parted by it; the dropout
    on the adapter's input is left out, as there is one product and no second path.
    """

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float, transposed: bool, seed: int) -> None:
        super().__init__()
        rows, inputs = shape
        bound = 1 / math.sqrt(inputs)
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(rows))
        self.register_buffer("part", torch.arange(rows) * rank // rows, persistent=False)
        self.part: Tensor
        self._scale, self._transposed = alpha / rank, transposed

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        factor = 1 + self._scale * self.b[:, None] * self.A[self.part]
        return weight * (factor.T if self._transposed else factor)


def parametrise(
    name: Name, model: PreTrainedModel, blocks: Sequence[Block], *, rank: int = 16, alpha: float = 32.0, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Make ``model`` ready to be trained in the form ``name``; the parameters to be trained, by name.

    ``blocks`` are the model's. Raises InputError for spp and lora where experts are kept in stacks.
    """
    model.requires_grad_(False)
    if name in ("full", "norms"):
        chosen = dict(trainable(model, norms=name == "norms"))
        if not chosen:
            raise ModelError.sentence(
                "The model has neither norms nor biases, so --parametrisation norms trains nothing."
            )
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return chosen
    sites = check_parametrisation(name, blocks)
    if name == "spp":
        return _add_spp(model, sites, rank, alpha, seed)
    from rarefy.tuning.adapters import add_lora

    return add_lora(model, sites, rank, alpha, seed)


@torch.no_grad()
def merge_parametrisation(name: Name, model: PreTrainedModel) -> None:
    """Turn what was trained into ordinary weights, in place; full and norms are that already."""
    if name == "spp":
        for module in list(model.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    elif name == "lora":
        from rarefy.tuning.adapters import merge_in_place

        merge_in_place(model)
    model.requires_grad_(False)


def trainable(model: PreTrainedModel, *, norms: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """All floating-point parameters but embeddings and the head, which pruning left alone.

    ``norms``: only vectors among them, which are norms and biases.
    """
    fixed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    fixed |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    for key, parameter in model.named_parameters():
        if id(parameter) not in fixed and parameter.is_floating_point() and not (norms and parameter.ndim > 1):
            yield key, parameter


def check_parametrisation(name: Name, blocks: Sequence[Block]) -> list[LinearSite]:
    """The linears of the blocks. Raises InputError where ``name`` has no form for what else is there."""
    linears = []
    for site in (site for block in blocks for site in block.sites):
        if isinstance(site, LinearSite):
            linears.append(site)
        elif name in ("spp", "lora"):
            raise InputError.sentence(
                f"--parametrisation {name} does not go with experts that are kept in one stack, as {site.name}: "
                "full and norms do."
            )
    return linears


def _add_spp(
    model: PreTrainedModel, sites: Sequence[LinearSite], rank: int, alpha: float, seed: int
) -> dict[str, nn.Parameter]:
    for number, site in enumerate(sites):
        transposed = not isinstance(site.module, nn.Linear)  # a Conv1D keeps (in, out)
        form = SPP(site.shape, rank, alpha, transposed, seed + number).to(site.parameter.device)
        parametrize.register_parametrization(site.module, "weight", form)
    for key, parameter in model.named_parameters():
        if key.endswith(".parametrizations.weight.original"):
            parameter.requires_grad_(False)
    return {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
