"""Which blocks to keep, by a policy gradient: what the text loses with random masks says what to keep more often.

With a keep probability s_i of every unit and masks m ~ Bernoulli(s), a step draws K masks, measures their losses L_k
on one batch of windows, and does

    b <- (1 - 1/T) b + (1/T) mean_k L_k          (the first b is that mean)                         (1)
    g  = 1/(K-1) sum_k (L_k - b) (m_k - s) / sqrt(s (1 - s))                                        (2)
    s <- clamp(s - rate g - v, 0, 1),  v >= 0 the least with sum s <= budget                        (3)

and at the end the units of the largest s are kept. (2) is the score function with sqrt(s (1 - s)) in place of
s (1 - s): with a baseline that does not depend on the masks its mean is K/(K-1) sqrt(s (1 - s)) dE[L]/ds, a diagonal
preconditioner of the gradient; with (1) the factor is (K - 1/T)/(K-1).

| code     | here | shape      | meaning                              |
|----------|------|------------|--------------------------------------|
| keep     | s    | (units,)   | the probability that a unit is kept  |
| masks    | m    | (K, units) | what was drawn, 1 = kept             |
| losses   | L    | (K,)       | mean loss of the text, nats          |
| baseline | b    | ()         | moving average of the losses         |

Source: "Bypass Back-propagation", arXiv 2406.10576, and its code for K, T, the rate and (2), (3). Differences: units
are whole blocks, because heads and neurons kept in other numbers in each block have no stock form; the start is the
KL without each block alone, not Wanda's scores; a batch is one of the calibration windows' own, not 8 windows of 128
tokens; the rate is that of 15,000 steps times 15,000 / steps, so that s can go as far in fewer of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.structure.depth import BlockSets, lowest

#: K, T and the rate of the published runs, and the steps that it is for.
DRAWN, MEMORY, RATE, STEPS = 2, 5, 2e-3, 15_000

_EPSILON = 1e-7  # added to sqrt(s (1 - s)), as published
_HALVINGS = 60  # of the interval in which v is: to the last bit of float64


def gradient(
    losses: Float[Tensor, " K"], masks: Float[Tensor, "K units"], keep: Float[Tensor, " units"], baseline: float
) -> Float[Tensor, " units"]:
    """(2): where to lower the keep probabilities, from K > 1 masks and their losses."""
    deviations = (masks - keep) / ((keep * (1 - keep)).sqrt() + _EPSILON)
    return (losses - baseline) @ deviations / (len(losses) - 1)


def project(keep: Float[Tensor, " units"], budget: float) -> Float[Tensor, " units"]:
    """The nearest probabilities whose sum is at most the budget: (3)."""
    low, high = 0.0, max(0.0, float(keep.max()))
    if float(keep.clamp(0, 1).sum()) <= budget:
        return keep.clamp(0, 1)
    for _ in range(_HALVINGS):
        v = (low + high) / 2
        low, high = (v, high) if float((keep - v).clamp(0, 1).sum()) > budget else (low, v)
    return (keep - high).clamp(0, 1)


def first_probabilities(scores: Mapping[int, float], share: float) -> Float[Tensor, " units"]:
    """Keep probabilities of mean ``share``, before they are clamped, that are larger where a score is."""
    of = torch.tensor([scores[unit] for unit in sorted(scores)], dtype=torch.float64)
    spread = (of - of.mean()) / of.std().clamp_min(1e-12)
    found = spread.sigmoid()
    return (found + share - found.mean()).clamp(0, 1)


def policy_gradient(
    sets: BlockSets, num: int, scores: Mapping[int, float], *, seed: int, steps: int, watch: Callable[..., None]
) -> tuple[list[int], list[float]]:
    """The ``num`` blocks to remove, and the baseline after every step; starts from the scores of the blocks."""
    draw = torch.Generator().manual_seed(seed)
    budget = sets.number - num
    keep = project(first_probabilities(scores, budget / sets.number), budget)
    baseline, trace = 0.0, []
    for step in range(steps):
        batch = int(torch.randint(sets.num_batches, (), generator=draw))
        masks = (torch.rand(DRAWN, sets.number, generator=draw, dtype=torch.float64) < keep).double()
        kept = [mask.nonzero().squeeze(1).tolist() for mask in masks]
        losses = torch.tensor([sets.measure_batch(one, batch).loss for one in kept], dtype=torch.float64)
        mean = float(losses.mean())
        baseline = mean if step == 0 else (1 - 1 / MEMORY) * baseline + mean / MEMORY
        rate = RATE * STEPS / steps * (1 + math.cos(math.pi * step / steps)) / 2
        keep = project(keep - rate * gradient(losses, masks, keep, baseline), budget)
        trace.append(baseline)
        watch(step + 1, steps, f"loss {baseline:.4f} nats")
    return lowest(dict(enumerate(keep.tolist())), num), trace
