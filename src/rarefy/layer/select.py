"""Keep the k largest entries, exactly and deterministically, without sorting.

A full ``topk`` of a weight costs several products W @ H; the k-th largest value alone, by
introselect, costs a fraction of one. The mask then follows from comparisons with that value.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def kth_largest(values: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows"]:
    """The k-th largest value of each row, 1 <= k <= n; linear time on the CPU."""
    n = values.shape[-1]
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        # numpy's partition is vectorised; torch.kthvalue took about ten times as long (docs/log.md).
        found = np.partition(values.detach().numpy(), n - k, axis=-1)[..., n - k]
        return torch.from_numpy(np.ascontiguousarray(found)).reshape(values.shape[:-1])
    return values.kthvalue(n - k + 1, dim=-1).values


def keep_largest(scores: Float[Tensor, "*rows n"], k: int) -> Bool[Tensor, "*rows n"]:
    """True at the k largest entries of each row; among equals the lowest index is kept."""
    n = scores.shape[-1]
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if k >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_largest(scores, k).unsqueeze(-1)
    mask = _at_least(scores, threshold)
    if count(mask) == k * (scores.numel() // n):  # every row has at least k: equal sums, equal counts
        return mask
    # Ties at the threshold: all that are larger stay, then equals in the order of their index.
    mask = scores > threshold
    equal = scores == threshold
    missing = k - mask.sum(dim=-1, keepdim=True)
    return mask | (equal & (equal.cumsum(dim=-1) <= missing))


def count(mask: Bool[Tensor, "*shape"]) -> int:
    """How many entries are True; numpy counts bytes, torch adds integers, at a hundred times the cost."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def _at_least(scores: Float[Tensor, "*rows n"], threshold: Float[Tensor, "*rows one"]) -> Bool[Tensor, "*rows n"]:
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores >= threshold
    return torch.from_numpy(np.greater_equal(scores.detach().numpy(), threshold.detach().numpy()))


def keep_largest_in_groups(scores: Float[Tensor, "out inputs"], keep: int, of: int) -> Bool[Tensor, "out inputs"]:
    """True at the ``keep`` largest of every ``of`` consecutive entries of a row, the lowest index first."""
    groups = scores.reshape(*scores.shape[:-1], -1, of)
    if of > 8:
        order = groups.argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        return kept.scatter_(-1, order[..., :keep], True).flatten(-2)
    # rank = number of entries that go before this one; pairwise comparisons of the few columns of a
    # group cost a few passes over the matrix where sorting tiny rows costs many.
    columns = [groups[..., i].contiguous() for i in range(of)]
    ranks = [torch.zeros_like(columns[0], dtype=torch.int8) for _ in columns]
    for i in range(of):
        for j in range(i + 1, of):
            later_wins = columns[j] > columns[i]
            ranks[i] += later_wins
            ranks[j] += ~later_wins
    return torch.stack([rank < keep for rank in ranks], dim=-1).flatten(-2)


def positions_first(inputs: int, group: int, device: torch.device | str = "cpu") -> Int[Tensor, " inputs"]:
    """The inputs in the order of their position within their group of ``group``, then of their group.

    Matrices in this order have the first inputs of all groups side by side, then the second ones: what
    compares the inputs of a group becomes passes over contiguous columns.
    """
    return torch.arange(inputs, device=device).view(-1, group).T.flatten()
