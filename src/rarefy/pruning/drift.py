"""Targets that correct the drift: a layer aims at what the dense layer gives on the dense path, as far as is safe.

With X the inputs of a layer on the pruned path and X0 those on the dense path, the layer problem keeps X W0^T.
What is wanted is X0 W0^T. Of all weights

    W0 + W0 D H^-1,    H = X^T X,  D = (X0 - X)^T X          (1)

comes closest to it. That follows the noise of the calibration text; a share of it, damped, does not:

    W0 + share * W0 D (H + damping * diag H)^-1              (2)

The layer is then pruned with (2) in place of W0.

Source: GPTAQ (arXiv 2504.02692) for the correction, GPTQModel for a share of 0.25. Difference: the damping, which
is relative to the energy of each input; undamped, (1) ruins a model (docs/log.md).
Cost: per block a forward pass, and per distinct input a full product, where a Gram needs half of one. Memory: one
more (in, in) for each distinct input of the block. What experts read is routed differently on the two paths, so
their targets stay W0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.calibration.linears import Group, Reads, watching
from rarefy.calibration.stream import HiddenStates
from rarefy.layer.gram import Gram
from rarefy.layer.problem import scale
from rarefy.layer.spectrum import times_damped_inverse
from rarefy.models.blocks import Block
from rarefy.parallel.world import World
from rarefy.pruning.precision import computing_in

#: D of each site, by name; sites that read the same share the matrix.
Drifts = dict[str, Float[Tensor, "in in"]]

DAMPING = 0.05


def advance_dense(
    world: World, block: Block, entering: HiddenStates, dense: HiddenStates, on_batch: Callable[[], None]
) -> Drifts:
    """Replace the states of the dense path by what the dense block makes of them, and sum D on the way.

    ``entering`` are the states that enter the block on the pruned path; sums are over the windows of all processes.
    """
    sites = [site for site in block.sites if site.expert is None]
    drifts: Drifts = {}
    with world.together(), computing_in(block.module, entering.compute_dtype), torch.no_grad():
        for batch, windows in entering.slices():
            on_dense, on_pruned = Reads(), Reads()
            with watching(sites, on_dense.note):
                dense.advance_batch(block.module, block.index, batch, windows)
            with watching(sites, on_pruned.note):
                entering.run(block.module, block.index, batch, windows)
            for group, group0 in zip(on_pruned.groups(), on_dense.groups(), strict=True):
                _add(drifts, group, group0)
            on_batch()
        dense.finish(block.index)
    world.sum_({id(D): D for D in drifts.values()}.values())
    return drifts


def _add(drifts: Drifts, group: Group, group0: Group) -> None:
    """Add one batch of a group's inputs on both paths."""
    name, size = group.sites[0].name, group.sites[0].shape[1]
    if name not in drifts:
        D = torch.zeros(size, size, device=group.inputs[0].device)
        drifts |= {site.name: D for site in group.sites}
    for X, X0 in zip(group.inputs, group0.inputs, strict=True):
        rows = X.reshape(-1, size)
        # In the dtype of computation: a share needs no more digits, and sums over batches are in float32.
        drifts[name] += (X0.reshape(-1, size) - rows).T @ rows


def corrected(
    W0: Float[Tensor, "out inputs"], gram: Gram, D: Float[Tensor, "in in"], share: float
) -> Float[Tensor, "out inputs"]:
    """(2), in float32. Raises NumericalError where H cannot be factored."""
    step = gram.cached("drift", lambda: times_damped_inverse(D, scale(gram.H), DAMPING))
    return torch.addmm(W0.to(step), W0.to(step), step, alpha=share)
