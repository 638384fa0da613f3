"""Repair towards the dense model: what is left of a block makes up for what is missing before and after it.

Without some of its parts or blocks a model leaves the path of the dense one. The exit of a block's MLP
(``down_proj``) adds to the hidden states, and so it can bring them back, as far as a linear map of its inputs can.
With X the exit's inputs, Y what leaves the block, Y0 the dense model's states at the place where the next kept block
begins, so behind the removed ones, and c what the block multiplies with before it adds, of all weights

    W0 + (1 / c) M (H + damping * diag H)^-1,    M = (Y0 - Y)^T X,  H = X^T X          (1)

brings Y closest to Y0. The layer problem of the exit then has

    W0 + share * (1 / c) M (H + damping * diag H)^-1                                   (2)

in place of W0, whether columns are removed as well or not. The share is 1 before a hole, where the exit takes over
from the removed blocks, and a small one elsewhere, where all of (1) would follow the noise of the calibration text.
An exit whose output a block changes before it adds it (a norm behind the MLP) has no such c, and is not repaired.

Source: a removed block as a linear map that goes into the MLP before it is "ReplaceMe", arXiv 2505.02819, with a map
of what the MLP puts out; here it is one of the neurons, as many as there are. The share elsewhere
is that of drift in pruning (pruning/drift.py, after GPTAQ, arXiv 2504.02692); for the damping see exits.py.
Cost: the dense model's states of all windows beside the others, and per repaired block a product more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from rarefy.calibration.record import record
from rarefy.calibration.stream import HiddenStates
from rarefy.errors import ModelError
from rarefy.layer.gram import Gram
from rarefy.layer.problem import LayerProblem
from rarefy.layer.spectrum import times_damped_inverse
from rarefy.models.blocks import Block, find_blocks
from rarefy.models.sites import LinearSite

#: Shares of (1) that an exit takes: before removed blocks, and elsewhere.
HOLE, LATER = 1.0, 0.25

#: What is added to an exit must come out of its block but for a factor, up to this in float32 and in half precision.
_SAME, _SAME_IN_HALF = 1e-3, 0.1


@dataclass(frozen=True)
class Gap:
    """How far an exit's block is from the dense path: M of (1), energies of Y0 - Y and of Y0; the share of (2)."""

    M: Float[Tensor, "out inputs"]
    energy: float
    dense_energy: float
    factor: float
    share: float

    def __add__(self, other: Gap) -> Gap:
        """What this one and that of other windows show together."""
        energies = self.energy + other.energy, self.dense_energy + other.dense_energy
        return Gap(self.M + other.M, *energies, self.factor, self.share)

    def target(self, problem: LayerProblem, damping: float) -> Float[Tensor, "out inputs"]:
        """(2). Raises NumericalError where H cannot be factored."""
        step = times_damped_inverse(self.M, problem.scaled, damping)
        return problem.W0 + (self.share / self.factor) * step * (problem.scaled.live > 0)

    def left(self, problem: LayerProblem, W: Float[Tensor, "out inputs"]) -> float:
        """The energy of Y0 - Y that is left with the weight W, over that of Y0."""
        D = (W.to(problem.dtype) - problem.W0).double()
        M, H, c = self.M.to(D), problem.H.double(), self.factor
        energy = self.energy - 2 * c * float((D * M).sum()) + c**2 * float(((D @ H) * D).sum())
        return max(energy, 0.0) / self.dense_energy


class DensePath:
    """The hidden states of the dense model, beside those of the model of which the ``kept`` blocks are left.

    ``windows`` (num, length) are those of the other path, in the same batches. Weights that both models share may
    be changed behind ``advance``. ``smaller`` is that other model, with its ``exits`` by block. Raises ModelError
    where these cannot bring it back to this path, and what ``record`` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kept: Sequence[int],
        smaller: PreTrainedModel,
        exits: Mapping[int, LinearSite],
        windows: Int64[Tensor, "num length"],
        batch_size: int,
        offload: Path | None = None,
    ) -> None:
        first = find_blocks(smaller)[min(exits)]
        self._factor = exit_factor(smaller, first, exits[first.index], windows[:1])
        self._blocks = find_blocks(model)
        self._ends = [*kept[1:], len(self._blocks)]
        self._holes = [end > index + 1 for index, end in zip(kept, self._ends)]
        self._states = record(model, [block.module for block in self._blocks], windows, batch_size, offload)
        self._begins_late = kept[0] > 0
        self._done = 0

    def share(self, place: int, changed: bool) -> float:
        """The share of (1) that the exit takes in this place of the smaller model.

        ``changed``: something before is not as in the dense model. Until then there is nothing to bring back.
        """
        return HOLE if self._holes[place] else LATER if changed or self._begins_late else 0.0

    def advance(self, place: int) -> None:
        """Bring the states to where the block behind this place of the smaller model begins."""
        for block in self._blocks[self._done : self._ends[place]]:
            self._states.advance(block.module, block.index)
        self._done = self._ends[place]

    def look(self, stream: HiddenStates, block: Block, site: LinearSite, share: float) -> tuple[Gram, Gap]:
        """The Gram of what the exit ``site`` of a block reads, and how far what leaves the block is from this path.

        ``stream`` enters the block. Of (1) the exit is to take a ``share``.
        """
        gram = Gram(site.shape[1], device=stream.device)
        M = torch.zeros(site.shape, device=site.parameter.device)
        energy = dense_energy = 0.0
        seen: list[Tensor] = []
        hook = site.module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
        try:
            with torch.no_grad():
                for batch, windows in stream.slices():
                    Y = stream.run(block.module, block.index, batch, windows)
                    Y0 = self._states.states[windows].to(Y.device)
                    E = (Y0.float() - Y.float()).reshape(-1, Y.shape[-1])
                    X = seen.pop().reshape(-1, site.shape[1])
                    gram.update(X)
                    M += E.to(X).T @ X  # in the dtype of computation, as the drift of pruning; sums are in float32
                    energy += float(E.square().sum(dtype=torch.float64))
                    dense_energy += float(Y0.float().square().sum(dtype=torch.float64))
        finally:
            hook.remove()
        dense_energy = max(dense_energy, torch.finfo(torch.float32).tiny)
        return gram, Gap(M, energy, dense_energy, self._factor, share)


def exit_factor(
    model: PreTrainedModel, block: Block, site: LinearSite, windows: Int64[Tensor, "num length"]
) -> float:
    """What a block multiplies the output of its exit with before it adds it to the hidden states: mostly 1.

    Found by adding noise to the output, on a few ``windows``. Raises ModelError where the block does something else.
    """
    refused = ModelError.sentence(
        f"{block.name} does not add to its hidden states what {site.name} puts out, which so cannot bring them back "
        "to the dense model's."
    )
    stream = record(model, [one.module for one in find_blocks(model)], windows, len(windows))
    whole = slice(0, len(windows))
    with torch.no_grad():
        before = stream.run(block.module, block.index, 0, whole).float()
        noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before)
        noise *= before.square().mean().sqrt()

        def noisy(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            if output.numel() != noise.numel():  # the block carries more states than its exit makes
                raise refused
            return output + noise.reshape(output.shape).to(output)

        hook = site.module.register_forward_hook(noisy)
        try:
            change = stream.run(block.module, block.index, 0, whole).float() - before
        finally:
            hook.remove()
    factor = float((noise * change).sum() / noise.square().sum())
    limit = _SAME if stream.compute_dtype == torch.float32 else _SAME_IN_HALF
    if factor == 0 or not float((change - factor * noise).norm()) <= limit * float(change.norm()):
        raise refused
    return factor
