"""The policy gradient: the mean of its estimate over all masks is the gradient, and it finds the best of all sets."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rarefy.structure.depth import BlockSets
from rarefy.structure.policy import DRAWN, MEMORY, first_probabilities, gradient, policy_gradient, project
from rarefy.structure.rules import choose_blocks
from test_shrink import deep

WINDOWS = torch.randint(3, 160, (4, 16), generator=torch.Generator().manual_seed(1))
UNITS = 3
MASKS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=UNITS)), dtype=torch.float64)
LOSSES = torch.tensor([3.0, 2.5, 2.0, 1.9, 2.8, 1.0, 1.7, 0.4], dtype=torch.float64)  # of each of the masks
KEEP = torch.tensor([0.3, 0.6, 0.8], dtype=torch.float64)


def chances(keep: Tensor) -> Tensor:
    """Of every mask."""
    return torch.where(MASKS == 1, keep, 1 - keep).prod(dim=1)


def exact_gradient() -> Tensor:
    """Of the mean loss over all masks, by autograd."""
    keep = KEEP.clone().requires_grad_()
    (chances(keep) @ LOSSES).backward()
    assert keep.grad is not None
    return keep.grad


@pytest.mark.parametrize("baseline", ["fixed", "moving", "first"])
def test_the_mean_over_all_masks_is_the_gradient(baseline: str) -> None:
    of = chances(KEEP)
    mean = torch.zeros(UNITS, dtype=torch.float64)
    for pair in itertools.product(range(len(MASKS)), repeat=DRAWN):
        losses = LOSSES[list(pair)]
        first = float(losses.mean())
        value = {"fixed": 1.5, "moving": (1 - 1 / MEMORY) * 1.5 + first / MEMORY, "first": first}[baseline]
        mean += of[list(pair)].prod() * gradient(losses, MASKS[list(pair)], KEEP, value)
    factor = {"fixed": DRAWN, "moving": DRAWN - 1 / MEMORY, "first": DRAWN - 1}[baseline] / (DRAWN - 1)
    expected = factor * (KEEP * (1 - KEEP)).sqrt() * exact_gradient()
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=0)  # the epsilon beside the root


def test_the_projection_is_the_nearest_point() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        point = torch.rand(2, generator=draw, dtype=torch.float64) * 3 - 1
        found = project(point, 0.9)
        assert float(found.sum()) <= 0.9 + 1e-12
        grid = torch.cartesian_prod(*[torch.linspace(0, 1, 401, dtype=torch.float64)] * 2)
        allowed = grid[grid.sum(dim=1) <= 0.9]
        nearest = (allowed - point).norm(dim=1).min()
        assert float((found - point).norm()) <= float(nearest) + 1e-9
    inside = torch.tensor([0.2, 0.3], dtype=torch.float64)
    assert torch.equal(project(inside, 0.9), inside)


def test_the_start_follows_the_scores() -> None:
    keep = first_probabilities({0: 5.0, 1: 1.0, 2: 3.0, 3: 2.0}, 0.5)
    assert keep.argsort(descending=True).tolist() == [0, 2, 3, 1]
    assert float(keep.mean()) == pytest.approx(0.5)
    assert first_probabilities({0: 1.0, 1: 1.0}, 0.5).tolist() == [0.5, 0.5]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return deep("llama", 5)


def test_the_best_of_all_sets_is_found(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of losses that the scores mislead about: blocks 1 and 3 cost little only together."""
    sets = BlockSets(model, WINDOWS, 4)

    def loss(kept: list[int]) -> float:
        gone = {*range(5)} - {*kept}
        return 0.4 * len(gone) + 0.5 * len(gone - {1, 3}) - 0.2 * ({1, 3} <= gone)

    class Fake:
        def __init__(self, kept: list[int]) -> None:
            self.loss = loss(kept)

    monkeypatch.setattr(sets, "measure_batch", lambda kept, batch: Fake(kept))
    misled = {0: 0.0, 1: 4.0, 2: 1.0, 3: 3.0, 4: 2.0}
    remove, trace = policy_gradient(sets, 2, misled, seed=0, steps=400, watch=lambda *_: None)
    best = min(itertools.combinations(range(5), 2), key=lambda gone: loss([i for i in range(5) if i not in gone]))
    assert tuple(remove) == best == (1, 3)
    assert trace[-1] == pytest.approx(loss([0, 2, 4]), abs=0.1)  # hardly another set is drawn at the end


def test_as_a_rule(model: PreTrainedModel) -> None:
    sets = BlockSets(model, WINDOWS, 2)
    found = choose_blocks(sets, 2, "policy-gradient", steps=5)
    assert len(found.trace) == 5
    assert found.scores.keys() == {*range(5)}
    assert found.distance == sets.measure([i for i in range(5) if i not in found.remove])
    scoring = WINDOWS.numel() * (5 + 5 * 4 // 2)
    assert scoring < found.block_tokens <= scoring + WINDOWS.numel() * 5 + 5 * DRAWN * 5 * 2 * 16
    again = choose_blocks(BlockSets(model, WINDOWS, 2), 2, "policy-gradient", steps=5)
    assert again == found
