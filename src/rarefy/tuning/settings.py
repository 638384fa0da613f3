"""The settings of the training loop: how many steps, at which learning rate, with which loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rarefy.errors import InputError

Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class TuneSettings:
    """Settings of the loop; a ``step`` is one of the optimiser.

    ``batch_size`` windows make a step, of which ``micro_batch`` run through the model at once. Training ends after
    ``epochs`` passes over the windows, or after ``max_steps``. The learning rate rises over ``warmup_steps``, then
    follows ``schedule`` to 0. ``clip`` is the largest norm of all gradients together, 0 for no limit.

    ``text_share`` is the text's own part of the loss, ``hidden_weight`` that of the hidden states beside it
    (distill.py). ``eval_every`` steps (0: once an epoch) the held-out windows are measured; the best state is
    kept, and after ``patience`` measurements without a better one (0: never) training stops.

    ``optimizer`` is adamw, or package.module:Class with torch's interface.
    """

    learning_rate: float = 2e-4
    batch_size: int = 1
    micro_batch: int = 1
    epochs: int = 3
    max_steps: int | None = None
    warmup_steps: int = 8
    schedule: Schedule = "linear"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    text_share: float = 0.0
    hidden_weight: float = 0.0
    eval_every: int = 0
    patience: int = 0
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batch:
            raise InputError("micro_batch", self.micro_batch, f"a divisor of batch_size, which is {self.batch_size}")

    def steps(self, num: int) -> int:
        """How many steps ``num`` windows make."""
        steps = -(-self.epochs * num // self.batch_size)
        return min(steps, self.max_steps) if self.max_steps is not None else steps

    def measured_every(self, num: int) -> int:
        """Steps from one measurement of the held-out windows to the next."""
        return self.eval_every or max(1, -(-num // self.batch_size))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step ``step`` of ``steps``, counted from 0."""
        warm = min(self.warmup_steps, steps - 1)
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return self.learning_rate
        left = (steps - step) / (steps - warm)
        if self.schedule == "linear":
            return self.learning_rate * left
        from math import cos, pi

        return self.learning_rate * (1 - cos(pi * left)) / 2
