"""The norms of what the outputs of a layer become: known where the next linear of an MLP is solved beside it.

The linears of an MLP lead from the hidden size to the neurons and back. What the last one reads, a product or an
activation of what the first ones give, has the diagonal of its Gram matrix as squared norms. So they cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rarefy.calibration.experts import Grams
from rarefy.models.blocks import Block
from rarefy.models.sites import LinearSite, Mixture

#: The norm of each output, by the name of the site.
OutputNorms = dict[str, Float[Tensor, " out"]]
Shapes = Mapping[str, tuple[int, int]]


def output_norms(block: Block, grams: Grams) -> OutputNorms:
    """||Z_i||_2 over all tokens for each output i of the sites that make the neurons z of an MLP of this block.

    Only where the Gram of the linear that reads z is among ``grams``.
    """
    found: OutputNorms = {}
    for linears in _siblings(block):
        reader, makers = neurons_of(linears)
        if reader in grams:
            norms = grams[reader].H.diagonal().clamp_min(0).sqrt()
            # gate and up in one matrix: each half makes all neurons
            found |= {name: norms.repeat(linears[name][0] // len(norms)) for name in makers}
    return found


def neuron_makers(block: Block) -> list[str]:
    """The names of the linears of a block whose outputs become the neurons of an MLP."""
    return [name for linears in _siblings(block) for name in neurons_of(linears)[1]]


def has_known_norms(block: Block) -> bool:
    """Whether a site of the block makes the neurons of an MLP of which another site reads them."""
    names = {site.name for site in block.sites}
    found = (neurons_of(linears) for linears in _siblings(block))
    return any(reader in names and not names.isdisjoint(makers) for reader, makers in found)


def neurons_of(linears: Shapes) -> tuple[str, list[str]]:
    """Of the linears of one module, by name with their (out, in): the one that reads its neurons, and its makers.

    Without a name where it is no MLP: of one linear or two to the neurons, or of one for gate and up, and one back.
    """
    *makers, (reader, (hidden, number)) = linears.items() or [("", (0, 0))]
    outputs = [out for _, (out, inputs) in makers if inputs == hidden]
    alike = outputs in ([number], [number, number], [2 * number])
    if not alike or len(outputs) != len(makers):
        return "", []
    return reader, [name for name, _ in makers]


def _siblings(block: Block) -> Iterator[Shapes]:
    """The linears of each module that holds sites, and those of each expert, with their (out, in), in order."""
    parents: dict[str, None] = {}
    experts: dict[tuple[Mixture, int], None] = {}
    for site in block.sites:
        if isinstance(site, LinearSite):
            parents.setdefault(site.name.rpartition(".")[0])
        elif site.expert is not None:
            experts.setdefault((site.expert.mixture, site.expert.index))
    for parent in parents:
        module = block.module.get_submodule(parent.removeprefix(block.name).removeprefix("."))
        children = module.named_children()
        yield {
            f"{parent}.{name}": LinearSite("", cast(nn.Linear, child)).shape
            for name, child in children
            if isinstance(child, nn.Linear | Conv1D)
        }
    for mixture, index in experts:
        yield {
            site.name: site.shape for site in mixture.sites if site.expert is not None and site.expert.index == index
        }
