"""The distance of a model in training from the dense one, and its gradient at the logits, slice by slice.

For a position with the dense model's distribution p and the trained model's q = softmax(z), and its text's
next token y,

    loss = (1 - c) KL(p || q) - c log q_y,    KL(p || q) = sum over the vocabulary of p (log p - log q)   [nats]
    d loss / d z = (1 - c) (q - p) + c (q - e_y)                                                         (1)

so no graph over the vocabulary is needed: each slice of positions goes through the head, (1) is written over its
logits and goes back through the head at once, and the memory is that of one slice. Where only the k largest of p
are known, the others are one event "another token" of probability p_r = 1 - sum over the k of p, against
q_r = 1 - sum over the same k of q:

    KL = sum over the k of p (log p - log q) + p_r (log p_r - log q_r)                                    (2)
    d KL / d z_i = q_i - p_i within the k,   q_i (1 - p_r / q_r) elsewhere

which is a divergence (0 only if these k + 1 events are equally likely) and at most the full one. A KL over the k
alone is neither: it falls when the trained model takes probability from the k it is not asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

#: Below this, 1 minus the probability of the k tokens is rounding.
_LEAST_REST = 1e-6


@dataclass(frozen=True)
class FullTarget:
    """The dense model's logits of some positions."""

    logits: Float[Tensor, "rows vocabulary"]


@dataclass(frozen=True)
class TopTarget:
    """The k likeliest tokens of some positions, and their log probabilities among all tokens."""

    tokens: Int32[Tensor, "rows k"]
    log_p: Float[Tensor, "rows k"]


Target: TypeAlias = FullTarget | TopTarget


@dataclass(frozen=True)
class Compared:
    """Sums over some positions of KL(dense || trained) and of the text's loss, in nats, and (1) for each position."""

    kl: float
    text_loss: float
    gradient: Float[Tensor, "rows vocabulary"]


@torch.no_grad()
def compare(
    logits: Float[Tensor, "rows vocabulary"], target: Target, next_tokens: Int64[Tensor, " rows"], share: float
) -> Compared:
    """Compare the trained model's logits with the dense model's; ``share`` is c, that of the text's own loss.

    Computed in float32, summed in float64.
    """
    log_q = logits.float().log_softmax(-1)
    text_loss = -log_q.gather(-1, next_tokens[:, None])
    kl, gradient = _full(log_q, target) if isinstance(target, FullTarget) else _top(log_q, target)
    if share:
        # (1): (1 - c) (q - p) + c (q - e_y)
        gradient.mul_(1 - share).add_(log_q.exp(), alpha=share)
        gradient.scatter_add_(-1, next_tokens[:, None], torch.full_like(text_loss, -share))
    return Compared(float(kl.double().sum()), float(text_loss.double().sum()), gradient)


def _full(
    log_q: Float[Tensor, "rows vocabulary"], target: FullTarget
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocabulary"]]:
    """KL(p || q) of each position, and q - p."""
    log_p = target.logits.float().log_softmax(-1)
    p = log_p.exp()
    # What cannot come has p = 0 and log p = -inf, and adds nothing.
    terms = (log_p - log_q).mul_(p).masked_fill_(p == 0, 0.0)
    return terms.sum(-1), log_q.exp().sub_(p)


def _top(
    log_q: Float[Tensor, "rows vocabulary"], target: TopTarget
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocabulary"]]:
    """(2): KL over the k tokens and the event that another one comes, and its gradient."""
    tokens, log_p = target.tokens.long(), target.log_p.float()
    p = log_p.exp()
    rest_p = (1 - p.sum(-1, keepdim=True)).clamp_min(0.0)
    rest_p = rest_p.masked_fill(rest_p < _LEAST_REST, 0.0)
    log_q_top = log_q.gather(-1, tokens)
    # Summed, not 1 minus the others, which would be rounding where the rest is small.
    log_rest_q = log_q.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    kl = (p * (log_p - log_q_top)).sum(-1)
    kl += torch.where(rest_p > 0, rest_p * (rest_p.clamp_min(_LEAST_REST).log() - log_rest_q), 0.0)[:, 0]
    gradient = log_q.exp()
    gradient.sub_((log_q - log_rest_q).exp_().mul_(rest_p))  # q (1 - p_r / q_r), without a quotient of small numbers
    gradient.scatter_(-1, tokens, log_q_top.exp() - p)
    return kl, gradient


def top_of(logits: Float[Tensor, "rows vocabulary"], k: int) -> TopTarget:
    """The k likeliest tokens of each position with their log probabilities, as they are kept on disk."""
    largest = logits.float().log_softmax(-1).topk(k, dim=-1)
    return TopTarget(largest.indices.to(torch.int32), largest.values)


def hidden_distance(
    trained: Float[Tensor, "batch length hidden"], dense: Float[Tensor, "batch length hidden"]
) -> Float[Tensor, ""]:
    """Mean over positions of ||trained - dense||^2 / ||dense||^2: unitless, 0 is equal, 1 is as far as zeros.

    Each position counts alike; a few tokens have most of all hidden states' squared norm.
    """
    difference = (trained.float() - dense.float()).square().sum(-1)
    return (difference / dense.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()
