"""The loop: a pruned model is brought nearer to the dense one, step by step, and measured on held-out windows.

One step: the windows of a batch run through the body of the model; slice by slice, their positions go through
the head, are compared with the dense model's, and the gradient goes back (distill.py); gradients are clipped, the
optimiser steps, zeros are zero throughout (masks.py). The model is in evaluation mode: dropout would only add
noise to targets that are known. Its weights are the float32 masters, products may be computed in bfloat16.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from rarefy.errors import InputError, NumericalError
from rarefy.parallel.world import World
from rarefy.tuning.distill import compare, hidden_distance
from rarefy.tuning.logits import Logits, block_outputs
from rarefy.tuning.settings import TuneSettings
from rarefy.tuning.shard import load_optimizer_state, local, optimizer_state, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rarefy.tuning.teacher import Teacher


@dataclass(frozen=True)
class StepRecord:
    """One step, counted from 1: means over its predicted positions in nats, before the step was made.

    ``kl`` is that to the dense model, ``text_loss`` the text's own, ``hidden`` that of hidden states (0 where
    they have no part). ``gradient_norm`` is that of all gradients together, before clipping.
    """

    step: int
    kl: float
    text_loss: float
    hidden: float
    gradient_norm: float
    learning_rate: float


@dataclass(frozen=True)
class Measurement:
    """The held-out windows after ``step`` steps: means over predicted positions, in nats; ``loss`` chooses."""

    step: int
    kl: float
    text_loss: float
    loss: float


class Tuner:
    """Trains ``parameters`` of ``model`` towards a teacher, from any step to the last.

    ``windows`` are token ids (num, length), of which the last ``held_out`` are never trained on. ``blocks`` are
    the decoder blocks. ``logits`` is of ``model``, and says in which dtype products are computed. Of several
    processes, ``world``, each takes its share of every batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        logits: Logits,
        parameters: dict[str, nn.Parameter],
        blocks: Sequence[nn.Module],
        teacher: Teacher,
        windows: Int64[Tensor, "num length"],
        held_out: int,
        settings: TuneSettings,
        world: World | None = None,
    ) -> None:
        self.model, self.parameters, self.settings = model.eval(), parameters, settings
        self._blocks = list(blocks) if settings.hidden_weight else []
        self._teacher, self._windows, self._world = teacher, windows, world or World()
        self._num = len(windows) - held_out
        self._sharded = any(isinstance(each, DTensor) for each in parameters.values())
        self._logits = logits
        self._optimizer = make_optimizer(list(parameters.values()), settings)
        self.num_steps = settings.steps(self._num)
        self.step = 0
        self.records: list[StepRecord] = []
        self.measurements: list[Measurement] = []
        if settings.gradient_checkpointing:
            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    # --- The whole -----------------------------------------------------------------------------------------

    def run(
        self,
        after_step: Callable[[StepRecord], None] = lambda _: None,
        after_measurement: Callable[[Measurement, bool], None] = lambda *_: None,
        at_rest: Callable[[], None] = lambda: None,
    ) -> None:
        """Train from the step reached to the last, or to where no measurement gets better.

        ``after_step`` hears of each step, ``after_measurement`` of each measurement and whether it is the best so
        far. ``at_rest`` is called when all of a step is done, so that ``state`` is one to go on from. Raises
        NumericalError where a loss or gradient is not finite.
        """
        order = self._order()
        every = self.settings.measured_every(self._num)
        if not self.measurements and self._num < len(self._windows):
            self._measure(after_measurement)
            at_rest()
        while self.step < self.num_steps and not self.stopped:
            size = self.settings.batch_size
            after_step(self._train(order[self.step * size : (self.step + 1) * size]))
            if self._num < len(self._windows) and (self.step % every == 0 or self.step == self.num_steps):
                self._measure(after_measurement)
            at_rest()

    @property
    def best(self) -> Measurement | None:
        """The measurement with the lowest loss, of equal ones the first."""
        return min(self.measurements, key=lambda one: one.loss, default=None)

    @property
    def stopped(self) -> bool:
        """Whether the last ``patience`` measurements all were no better than one before."""
        if not self.settings.patience or (best := self.best) is None:
            return False
        return self.measurements.index(best) < len(self.measurements) - self.settings.patience

    def state(self) -> dict[str, Any]:
        """All that is needed to go on: parameters, the optimiser's own, and what was recorded."""
        return {
            "step": self.step,
            "parameters": self.values(),
            "optimizer": optimizer_state(self._optimizer),
            "records": [asdict(one) for one in self.records],
            "measurements": [asdict(one) for one in self.measurements],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Be where ``state`` was taken."""
        self.set_values(state["parameters"])
        load_optimizer_state(self._optimizer, state["optimizer"])
        self.step = state["step"]
        self.records = [StepRecord(**one) for one in state["records"]]
        self.measurements = [Measurement(**one) for one in state["measurements"]]

    def values(self) -> dict[str, Tensor]:
        """What is trained, by name; the tensors themselves, of sharded ones this process's parts."""
        return {name: local(parameter.detach()) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def set_values(self, values: dict[str, Tensor]) -> None:
        """Give the trained parameters other values."""
        for name, parameter in self.parameters.items():
            local(parameter).copy_(values[name])

    def adopt(self, model: PreTrainedModel, logits: Logits) -> None:
        """Measure another model from now on, with the same windows and teacher; training is over."""
        self.model, self._logits = model.eval(), logits
        self._world, self._blocks = World(), []

    # --- One step ------------------------------------------------------------------------------------------

    def _order(self) -> Int64[Tensor, " steps*batch"]:
        """The numbers of the windows of all steps in a row: each pass in another seeded order."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        needed = self.num_steps * self.settings.batch_size
        passes = [torch.randperm(self._num, generator=generator) for _ in range(-(-needed // self._num))]
        return torch.cat(passes)[:needed]

    def _train(self, numbers: Int64[Tensor, " batch"]) -> StepRecord:
        rate = self.settings.rate(self.step, self.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        total = _Sums()
        mine = numbers[self._world.share(len(numbers)).start : self._world.share(len(numbers)).stop]
        for part in mine.split(self.settings.micro_batch):
            # Sharded gradients become the mean over all processes, others their sum.
            weight = len(part) / (len(mine) if self._sharded else len(numbers))
            total += self._forward(part, weight)
        total = self._add_up(total)
        limit = self.settings.clip or math.inf
        norm = float(whole(clip_grad_norm_(self.parameters.values(), limit)))
        record = StepRecord(self.step + 1, *total.means(), norm, rate)
        if not math.isfinite(norm) or not math.isfinite(record.kl):
            raise NumericalError(
                f"Step {record.step} of the tuning has a gradient of norm {norm} and a KL divergence of {record.kl}: "
                "a smaller --learning-rate may help."
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        self.records.append(record)
        return record

    def _add_up(self, sums: _Sums) -> _Sums:
        """The sums of all processes; gradients that are not sharded are added up as well."""
        if self._world.size == 1:
            return sums
        numbers = torch.tensor(astuple(sums), dtype=torch.float64)
        self._world.sum_([numbers])
        if not self._sharded:
            self._world.sum_(each.grad for each in self.parameters.values() if each.grad is not None)
        kl, text_loss, hidden, positions = numbers.tolist()
        return _Sums(kl, text_loss, hidden, int(positions))

    def _measure(self, after: Callable[[Measurement, bool], None]) -> None:
        measurement = self.measure()
        best = self.best
        self.measurements.append(measurement)
        after(measurement, best is None or measurement.loss < best.loss)

    @torch.no_grad()
    def measure(self) -> Measurement:
        """The means over the held-out windows as the model is now."""
        total = _Sums()
        for part in torch.arange(self._num, len(self._windows)).split(self.settings.micro_batch):
            total += self._forward(part, 0.0)
        kl, text_loss, hidden = total.means()
        share = self.settings.text_share
        loss = (1 - share) * kl + share * text_loss + self.settings.hidden_weight * hidden
        return Measurement(self.step, kl, text_loss, loss)

    def _forward(self, numbers: Int64[Tensor, " batch"], weight: float) -> _Sums:
        """Sums over the predicted positions of some windows; with gradients, these are added to the parameters'.

        ``weight`` is the part that these windows have in the mean over their batch.
        """
        ids = self._windows[numbers].to(self.model.device)
        dense = self._teacher.rows(numbers, ids)
        learning = torch.is_grad_enabled()
        with block_outputs(self._blocks) as hidden:
            rows = self._logits.rows(ids)
        entering = rows.detach()
        gradient = torch.empty_like(entering) if learning else None
        next_tokens = ids[:, 1:].flatten()
        sums = _Sums(positions=len(rows))
        for part in self._logits.slices(len(rows)):
            piece = entering[part].requires_grad_(learning)
            logits = self._logits.of(piece)
            compared = compare(logits, dense[part], next_tokens[part], self.settings.text_share)
            sums.kl += compared.kl
            sums.text_loss += compared.text_loss
            if gradient is not None:
                at_logits = compared.gradient.mul_(weight / len(rows)).to(logits.dtype)
                gradient[part] = torch.autograd.grad(logits, piece, at_logits)[0] if self._logits.alone else at_logits
        distances = [hidden_distance(mine, theirs) for mine, theirs in zip(hidden, dense.hidden)]
        distance = torch.stack(distances).mean() if distances else None
        if distance is not None:
            sums.hidden = float(distance.detach()) * len(rows)
        if gradient is not None:
            ends = [rows] if distance is None else [rows, self.settings.hidden_weight * weight * distance]
            torch.autograd.backward(ends, [gradient, None][: len(ends)])
        return sums


def make_optimizer(parameters: list[nn.Parameter], settings: TuneSettings) -> torch.optim.Optimizer:
    """The optimiser that ``settings`` name. Raises InputError where there is none of that name."""
    options = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)  # type: ignore[arg-type]
    module, _, name = settings.optimizer.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
        made: torch.optim.Optimizer = kind(parameters, **options)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"it makes a {type(made).__name__}, not one of torch's optimisers")
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError.sentence(
            f"--optimizer {settings.optimizer} cannot be used ({reason}); it must be adamw, or package.module:Class "
            "that takes lr, betas and weight_decay."
        ) from error
    return made


@dataclass
class _Sums:
    """Sums over predicted positions."""

    kl: float = 0.0
    text_loss: float = 0.0
    hidden: float = 0.0
    positions: int = 0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.kl + other.kl,
            self.text_loss + other.text_loss,
            self.hidden + other.hidden,
            self.positions + other.positions,
        )

    def means(self) -> tuple[float, float, float]:
        """KL, text loss and hidden distance a position."""
        return self.kl / self.positions, self.text_loss / self.positions, self.hidden / self.positions
