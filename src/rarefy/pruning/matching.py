"""Matching: a pruned block is trained so that, on the pruned path, it gives the states of the dense path.

The layer problem sees one linear at a time. Matching sees the block. With masks fixed, its kept weights W, norms
and biases minimise, over all windows,

    L(W) = ||f_W(X) - Y||^2 / ||Y||^2          (1)

where X are the states that enter the block on the pruned path, Y those that leave it on the dense path, and f_W is
the block. So errors of the blocks before are corrected as far as this block can.

    G <- gradient of (1) on the windows of one step, times the mask          (2)
    W <- AdamW(W, G), then times the mask                                    (3)

Several processes take the steps that one would take: each runs those batches of a step that are of its windows, and
gradients are summed.

A part of the windows is held out. The state of the pass with the least held-out loss is kept, which may be the
start: a block is never left worse than it was, on windows that it was not trained on.

Sources: Rethinking Pruning (EMNLP 2024) for inputs of the pruned path and targets of the dense one, EBFT
(arXiv 2402.12419) for AdamW at 2e-4, falling linearly. Differences: held-out windows choose the pass; masters are
in float32; weight decay is 0.
Cost: per pass, a forward and a backward pass of the block over all windows. Memory: the block seven times in float32
(masters, gradients, two moments, the start, the best pass, and the block that runs), the activations of one batch,
and the states of both paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rarefy.calibration.stream import HiddenStates
from rarefy.errors import InputError
from rarefy.layer.pattern import Pattern
from rarefy.models.blocks import Block
from rarefy.parallel.world import World
from rarefy.pruning.precision import computing_in
from rarefy.pruning.steps import PrunedBlock

_LEAST_ENERGY = 1e-30  # of a target that is zero everywhere


@dataclass(frozen=True)
class Matching:
    """Trains the kept weights, norms and biases of each pruned block to match the dense model.

    ``passes`` over the windows; ``learning_rate`` of AdamW, which falls linearly to 0; ``batch_size`` windows per
    step, rounded up to whole calibration batches, one for each process at least; ``held_out`` is the share of the
    batches that choose the best pass, at least one; ``seed`` orders the batches. Raises
    InputError where one of them is out of range.
    """

    passes: int = 3
    learning_rate: float = 2e-4
    batch_size: int = 1
    held_out: float = 0.1
    seed: int = 0

    needs_dense_path = True
    needs_dense_weights = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("passes", self.passes >= 1, "a whole number of at least 1"),
            ("learning_rate", 0 < self.learning_rate < 1, "a number between 0 and 1"),
            ("batch_size", self.batch_size >= 1, "a whole number of at least 1 (windows)"),
            ("held_out", 0 <= self.held_out < 1, "a share in [0, 1)"),
        ):
            if not value:
                raise InputError(f"matching.{name}", getattr(self, name), allowed)

    def check_pattern(self, pattern: Pattern) -> None:
        """Any will do: masks stay what they are."""

    def num_parts(self, block: Block, num_batches: int) -> int:
        """Training batches of all passes, and held-out batches before and after each."""
        if not block.sites:
            return 0
        held_out = self._num_held_out(num_batches)
        return self.passes * (num_batches - held_out) + (self.passes + 1) * held_out

    def __call__(self, pruned: PrunedBlock, on_part: Callable[[], None]) -> None:
        """Train the block in place. All processes of the world end with the same bits."""
        if not pruned.block.sites:
            return
        with pruned.world.together():
            if pruned.leaving_dense is None:
                raise ValueError("Matching needs the dense path.")
        trainer = _Trainer(pruned, self, on_part)
        with trainer.float32_masters():
            trainer.train(self)

    def _num_held_out(self, num_batches: int) -> int:
        """How many batches are held out: none of a single one, for which the last pass is kept."""
        return min(num_batches - 1, max(1, round(self.held_out * num_batches))) if self.held_out else 0


class _Trainer:
    """One block in training: its parameters, their masks, and the two paths."""

    def __init__(self, pruned: PrunedBlock, settings: Matching, on_part: Callable[[], None]) -> None:
        assert pruned.leaving_dense is not None
        self.module: nn.Module = pruned.block.module
        self.index = pruned.block.index
        self.world: World = pruned.world
        self.entering: HiddenStates = pruned.entering
        self.target: HiddenStates = pruned.leaving_dense
        self.sites = pruned.block.sites
        self.masks = pruned.masks
        self.on_part = on_part
        self.trained = [each for each in self.module.parameters() if each.is_floating_point()]
        self.masters: list[nn.Parameter] = []
        # The range of float16 is too small for gradients: there products are in bfloat16, weights in float32.
        self.autocast = pruned.entering.compute_dtype == torch.float16
        self.dtype = torch.float32 if self.autocast else pruned.entering.compute_dtype
        # Batches have numbers over all processes, each of which runs its own; all draw the same orders.
        numbers = self.world.gather(self.entering.num_batches)
        before = sum(numbers[: self.world.rank])
        self.own = {before + number: (number, windows) for number, windows in self.entering.slices()}
        num_held_out = settings._num_held_out(sum(numbers))
        self.generator = torch.Generator().manual_seed(settings.seed + self.index)
        order = torch.randperm(sum(numbers), generator=self.generator).tolist()
        self.held_out, self.batches = sorted(order[:num_held_out]), order[num_held_out:]

    @contextmanager
    def float32_masters(self) -> Iterator[None]:
        """Within the scope, parameters have gradients, and masters in float32; afterwards as before, and masked.

        Parameters are in the dtype of computation, so that a pass casts nothing; where that is float32, they are
        the masters.
        """
        stored = [(each, each.requires_grad) for each in self.trained]
        try:
            with computing_in(self.module, self.dtype):
                for parameter in self.trained:
                    self.masters.append(nn.Parameter(parameter.detach().float()))
                    parameter.requires_grad_(True)
                yield
        finally:
            for parameter, requires_grad in stored:
                parameter.requires_grad_(requires_grad)
                parameter.grad = None
            self._apply_masks()

    def train(self, settings: Matching) -> None:
        """All passes; the parameters of the best one are kept."""
        step_batches = max(self.world.size, math.ceil(settings.batch_size / self.entering.batch_size))
        steps = settings.passes * math.ceil(len(self.batches) / step_batches)
        # Fused: one pass over memory for each matrix in place of ten.
        optimizer = torch.optim.AdamW(
            self.masters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        best = self._held_out_loss()
        start = kept = self._copy()
        for _ in range(settings.passes):
            for batches in self._steps(step_batches):
                self._step(optimizer, batches)
                schedule.step()
            loss = self._held_out_loss()
            if loss < best or math.isinf(loss):  # without held-out windows, the last pass is kept
                best, kept = loss, self._copy()
        self._restore(kept)
        # What counts is the block as it is stored: rounding must not have undone what was won.
        if kept is not start and math.isfinite(best) and not self._better_as_stored(start, kept):
            self._restore(start)

    def _steps(self, size: int) -> list[list[int]]:
        """The batches of each step of a pass, in a new order, ``size`` at a time.

        Of several, each is from another part of the text, and so most often of another process.
        """
        if size == 1:
            order = torch.randperm(len(self.batches), generator=self.generator).tolist()
            return [[self.batches[i]] for i in order]
        places = sorted(self.batches)
        parts = [places[i * len(places) // size : (i + 1) * len(places) // size] for i in range(size)]
        shuffled = [[part[i] for i in torch.randperm(len(part), generator=self.generator).tolist()] for part in parts]
        in_turn = [batch for some in zip_longest(*shuffled) for batch in some if batch is not None]
        return [in_turn[first : first + size] for first in range(0, len(in_turn), size)]

    def _step(self, optimizer: torch.optim.Optimizer, batches: list[int]) -> None:
        """(2) and (3). A weight outside of its mask is 0 and has a gradient of 0, so AdamW leaves it at 0."""
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        energy = torch.zeros(1, dtype=torch.float64)
        with self.world.together():
            for batch in batches:
                if batch in self.own:
                    error, of_target = self._error(batch)
                    error.backward()
                    energy += of_target
                    self._take_gradients()
                self.on_part()
        gradients = [master.grad for master in self.masters if master.grad is not None]
        self.world.sum_([energy, *gradients])
        for gradient in gradients:
            gradient.div_(float(energy))
        self._mask_gradients()
        optimizer.step()
        self._cast()

    def _take_gradients(self) -> None:
        """Add what the last backward pass has left in the parameters to the gradients of the masters."""
        for parameter, master in zip(self.trained, self.masters):
            if parameter.grad is not None and master.grad is not None:
                master.grad += parameter.grad
                parameter.grad = None

    def _cast(self) -> None:
        """Round the masters to the parameters with which the block runs."""
        with torch.no_grad():
            for parameter, master in zip(self.trained, self.masters):
                if parameter.data_ptr() != master.data_ptr():
                    parameter.copy_(master)

    def _error(self, batch: int) -> tuple[Float[Tensor, ""], float]:
        """Numerator and denominator of (1) on one of this process's batches."""
        number, windows = self.own[batch]
        device = self.entering.device.type
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            output = self.entering.run(self.module, self.index, number, windows)
        target = self.target.states[windows].to(output.device, torch.float32)
        return (output.float() - target).square().sum(), max(float(target.square().sum()), _LEAST_ENERGY)

    def _held_out_loss(self, seen: bool = True) -> float:
        """(1) on the held-out windows of all processes; infinity where there are none.

        Progress counts it where it is ``seen``.
        """
        total = torch.zeros(2, dtype=torch.float64)
        with self.world.together(), torch.no_grad():
            for batch in self.held_out:
                if batch in self.own:
                    error, energy = self._error(batch)
                    total += torch.tensor([float(error), energy], dtype=torch.float64)
                if seen:
                    self.on_part()
        self.world.sum_([total])
        return float(total[0] / total[1]) if total[1] else math.inf

    def _better_as_stored(self, start: list[Tensor], kept: list[Tensor]) -> bool:
        """Whether ``kept`` has less held-out loss than ``start`` when both are rounded to the stored dtype."""
        dtype = self.entering.states.dtype
        if dtype == self.dtype:  # the held-out losses were those of rounded parameters
            return True
        losses = []
        for state in (start, kept):
            self._restore([tensor.to(dtype).float() for tensor in state])
            losses.append(self._held_out_loss(seen=False))
        self._restore(kept)
        return losses[1] < losses[0]

    def _copy(self) -> list[Tensor]:
        return [master.detach().clone() for master in self.masters]

    def _restore(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for master, kept in zip(self.masters, state):
                master.copy_(kept)
        self._cast()

    def _mask_gradients(self) -> None:
        of = {id(parameter): master.grad for parameter, master in zip(self.trained, self.masters)}
        for site in self.sites:
            gradient = of[id(site.parameter)]
            assert gradient is not None
            site.view(gradient).mul_(self.masks[site.name])

    def _apply_masks(self) -> None:
        """Set what is outside of the masks to +0, which it was but for its sign."""
        with torch.no_grad():
            for site in self.sites:
                weight = site.view(site.parameter.detach())
                weight.copy_(torch.where(self.masks[site.name], weight, 0))
