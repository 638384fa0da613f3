"""The distance from the dense model and its gradient: against plain formulas and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models_for_tests import VOCABULARY
from rarefy.tuning.distill import FullTarget, TopTarget, compare, hidden_distance, top_of

# float32 sums of a few dozen products of numbers near 1.
CLOSE = 1e-5


def some_logits(rows: int = 5, vocabulary: int = 23, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def next_tokens(rows: int = 5, vocabulary: int = 23) -> Tensor:
    return torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(9))


def plain_loss(z: Tensor, dense: Tensor, tokens: Tensor, share: float) -> Tensor:
    """As the formula is written, with autograd."""
    p, q = dense.softmax(-1), z.softmax(-1)
    kl = (p * (p.log() - q.log())).sum()
    return (1 - share) * kl + share * functional.cross_entropy(z, tokens, reduction="sum")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_the_formula(share: float) -> None:
    z, dense, tokens = some_logits(seed=1).requires_grad_(), some_logits(seed=2), next_tokens()
    loss = plain_loss(z, dense, tokens, share)
    (gradient,) = torch.autograd.grad(loss, z)
    found = compare(z, FullTarget(dense), tokens, share)
    assert (1 - share) * found.kl + share * found.text_loss == pytest.approx(float(loss.detach()), rel=CLOSE)
    assert torch.allclose(found.gradient, gradient, atol=CLOSE)


@pytest.mark.parametrize("k", [1, 4, 22])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_k_likeliest_and_the_rest_are_one_distribution(k: int, share: float) -> None:
    z, dense, tokens = some_logits(seed=1).requires_grad_(), some_logits(seed=2), next_tokens()
    top = top_of(dense, k)
    events = top.tokens.long()

    def joined(distribution: Tensor) -> Tensor:
        kept = distribution.gather(-1, events)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)

    p, q = joined(dense.double().softmax(-1)), joined(z.double().softmax(-1))
    kl = (p * (p.log() - q.log())).sum()
    loss = (1 - share) * kl + share * functional.cross_entropy(z, tokens, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, z)
    found = compare(z, top, tokens, share)
    assert found.kl == pytest.approx(float(kl.detach()), rel=CLOSE)
    assert torch.allclose(found.gradient, gradient, atol=CLOSE)


def test_with_all_tokens_but_one_it_is_the_full_divergence() -> None:
    z, dense, tokens = some_logits(seed=1), some_logits(seed=2), next_tokens()
    full, top = compare(z, FullTarget(dense), tokens, 0.0), compare(z, top_of(dense, 22), tokens, 0.0)
    assert top.kl == pytest.approx(full.kl, rel=CLOSE)
    assert torch.allclose(top.gradient, full.gradient, atol=CLOSE)


def test_fewer_events_tell_less_and_equal_models_nothing() -> None:
    z, dense, tokens = some_logits(seed=1), some_logits(seed=2), next_tokens()
    values = [compare(z, top_of(dense, k), tokens, 0.0).kl for k in range(1, 23)]
    assert values == sorted(values)
    for k in (1, 5, 22):
        same = compare(dense, top_of(dense, k), tokens, 0.0)
        assert abs(same.kl) < CLOSE
        assert same.gradient.abs().max() < CLOSE


def test_a_divergence_over_the_k_alone_would_be_none() -> None:
    """Why (2) has the rest: renormalised p against q falls below 0 of nothing, and equal models have a gradient."""
    dense = some_logits(seed=2).requires_grad_()
    top = top_of(dense.detach(), 3)
    p = top.log_p.exp() / top.log_p.exp().sum(-1, keepdim=True)
    truncated = (p * (p.log() - dense.log_softmax(-1).gather(-1, top.tokens.long()))).sum()
    (gradient,) = torch.autograd.grad(truncated, dense)
    assert gradient.abs().max() > 0.05  # though nothing is to be learned


def test_tokens_that_cannot_come_add_nothing() -> None:
    z, dense, tokens = some_logits(seed=1), some_logits(seed=2), torch.zeros(5, dtype=torch.int64)
    dense[:, 3], z[:, 3] = -torch.inf, -torch.inf
    others = [i for i in range(23) if i != 3]
    expected = compare(z[:, others], FullTarget(dense[:, others]), tokens, 0.0)
    found = compare(z, FullTarget(dense), tokens, 0.0)
    assert found.kl == pytest.approx(expected.kl, rel=CLOSE)
    assert torch.allclose(found.gradient[:, others], expected.gradient, atol=CLOSE)


def test_a_rest_of_no_probability_is_none() -> None:
    dense = torch.full((2, VOCABULARY), -60.0)
    dense[:, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    z, tokens = some_logits(2, VOCABULARY), torch.zeros(2, dtype=torch.int64)
    top, full = compare(z, top_of(dense, 4), tokens, 0.0), compare(z, FullTarget(dense), tokens, 0.0)
    assert top.kl == pytest.approx(full.kl, rel=CLOSE)
    assert torch.allclose(top.gradient, full.gradient, atol=CLOSE)


def test_half_precision_logits_are_compared_in_float32() -> None:
    z, dense, tokens = some_logits(seed=1).bfloat16(), some_logits(seed=2).bfloat16(), next_tokens()
    found, expected = (
        compare(one, FullTarget(two), tokens, 0.0) for one, two in ((z, dense), (z.float(), dense.float()))
    )
    assert found.kl == expected.kl
    assert found.gradient.dtype == torch.float32
    small = TopTarget(top_of(dense, 4).tokens, top_of(dense, 4).log_p.half())
    assert compare(z, small, tokens, 0.0).kl == pytest.approx(compare(z, top_of(dense, 4), tokens, 0.0).kl, rel=5e-3)


def test_hidden_states_count_by_position_and_not_by_size() -> None:
    dense = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert float(hidden_distance(dense, dense)) == 0
    assert float(hidden_distance(torch.zeros_like(dense), dense)) == pytest.approx(1)
    scaled = dense * torch.tensor([1.0, 10.0, 1000.0])[None, :, None]
    assert float(hidden_distance(1.1 * scaled, scaled)) == pytest.approx(0.01, rel=1e-4)
