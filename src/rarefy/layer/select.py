"""Keep the k largest entries, exactly and deterministically, without sorting.

On the CPU a full ``topk`` of a weight costs several products W @ H; the k-th largest value alone, by
introselect, costs a fraction of one. On a GPU ``topk`` is a radix select by many blocks, ``kthvalue`` one by a single
block for each row (docs/log.md). The mask then follows from comparisons with that value.
"""

from __future__ import annotations

import math
from operator import eq, ge, gt
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rarefy.layer.passes import by_numpy, compare, count, count_rows, indices, piece, places

_MANY = 2**21  # values in a row from which on only some of them are copied and put in order
_SAMPLE = 2**16
_CHUNK = 2**20
_FEW, _OFTEN = 128, 0.35  # values looked at, and the share of the lowest among them from which on a sort is faster
_TIES = 2**17  # entries among which equals are looked for at a time: each that is found takes some 40 bytes
_SMALL_GROUP = 8  # entries up to which the columns of groups are compared, instead of the groups put in order
_GROUPS = 2**15  # entries of such groups at a time: their columns stay in a CPU's cache


def kth_largest(values: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows"]:
    """The k-th largest value of each row, 1 <= k <= n; linear time."""
    n = values.shape[-1]
    if not by_numpy(values):
        if 2 * k <= n:  # no mutant: both ways find the same value
            return values.topk(k, dim=-1, sorted=False).values.amin(dim=-1)
        return values.topk(n - k + 1, dim=-1, largest=False, sorted=False).values.amax(dim=-1)
    if n >= _MANY and values.numel() == n and (found := _between(values.reshape(n), k)) is not None:
        return found.reshape(values.shape[:-1])
    # numpy's partition is vectorised; torch.kthvalue took about ten times as long (docs/log.md).
    array = values.detach().numpy()
    ordered = np.sort(array, axis=-1) if _often_lowest(array) else np.partition(array, n - k, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(ordered[..., n - k])).reshape(values.shape[:-1])


def _often_lowest(array: np.ndarray) -> bool:
    """Whether, to judge by a few values, many equal the lowest one, as the zeros of a sparse matrix do.

    numpy's partition then takes that value as its pivot again and again, at ten times the cost of a sort.
    """
    flat = array.reshape(-1)
    few = flat[:: len(flat) // _FEW | 1]
    return bool(np.count_nonzero(few == few.min()) > _OFTEN * len(few))


def _between(values: Float[Tensor, " n"], k: int) -> Float[Tensor, " one"] | None:
    """The k-th largest of many values, found among those between two values of a sample; None if it is not.

    What must be copied is a few per cent of the values instead of all.
    """
    n = len(values)
    # An odd stride meets all columns; numpy sorts in a tenth of torch's time.
    sample = np.sort(values[:: n // _SAMPLE | 1].detach().numpy())
    place, slack = len(sample) * (n - k) // n, 4 * math.isqrt(len(sample))
    low = float(sample[max(place - slack, 0)])  # no mutant: where the value is not between, all are searched
    high = float(sample[min(place + slack, len(sample) - 1)])  # no mutant: as for low
    above, candidates, most = 0, [], n // 4
    for chunk in values.split(_CHUNK):
        larger = compare(gt, chunk, high)
        between = compare(ge, chunk, low) ^ larger
        above += count(larger)
        most -= count(between)
        if most < 0:  # many equals; no mutant: all values can be searched as well
            return None
        candidates.append(chunk[indices(between)])
    found = torch.cat(candidates)
    if not 1 <= k - above <= len(found):  # no mutant: all values can be searched as well
        return None
    return kth_largest(found, k - above).view(1)


def keep_largest(scores: Float[Tensor, "*rows n"], k: int) -> Bool[Tensor, "*rows n"]:
    """True at the k largest entries of each row; among equals the lowest index is kept."""
    n = scores.shape[-1]
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if k >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_largest(scores, k).unsqueeze(-1)
    mask = compare(ge, scores, threshold)
    if count(mask) == k * (scores.numel() // n):  # every row has at least k: equal sums, equal counts
        return mask
    return _first_of_equals(mask, scores, threshold, k)


def keep_at_least(
    scores: Float[Tensor, "*rows n"], threshold: Float[Tensor, "*rows 1"], k: int
) -> Bool[Tensor, "*rows n"]:
    """True at the entries of each row that reach its threshold, or at k of them where there are more.

    Entries above the threshold, fewer than k in every row, come first, then those with the lowest index.
    """
    mask = compare(ge, scores, threshold)
    if int(count_rows(mask).max()) <= k:
        return mask
    return _first_of_equals(mask, scores, threshold, k)


def _first_of_equals(
    mask: Bool[Tensor, "*rows n"], scores: Float[Tensor, "*rows n"], threshold: Float[Tensor, "*rows 1"], k: int
) -> Bool[Tensor, "*rows n"]:
    """The mask of what reaches the threshold, with k in every row that had more: of equals the first.

    Works in place where the mask is contiguous, on some of its entries at a time: all may be equal.
    """
    mask, n = mask.contiguous(), mask.shape[-1]
    rows, values, limits = mask.view(-1, n), scores.reshape(-1, n), threshold.reshape(-1, 1)
    together = piece(scores, _TIES)
    width = min(n, together)
    height = max(1, together // width)
    for a in range(0, len(rows), height):
        part = slice(a, a + height)
        above = count_rows(compare(gt, values[part], limits[part]))
        _drop_late_equals_(rows[part], values[part], limits[part], k - above, width)
    return mask


def _drop_late_equals_(
    rows: Bool[Tensor, "rows n"],
    values: Float[Tensor, "rows n"],
    limits: Float[Tensor, "rows 1"],
    room: Int[Tensor, " rows"],
    width: int,
) -> None:
    """Keep as many of the entries that equal a row's limit as it has room for, the first."""
    for b in range(0, rows.shape[1], width):
        piece = rows[:, b : b + width]
        row, column = places(compare(eq, values[:, b : b + width], limits))
        here = torch.bincount(row, minlength=len(rows))
        place = torch.arange(len(row), device=row.device) - (here.cumsum(0) - here)[row]  # among those of its row
        late = place >= room[row]
        piece[row[late], column[late]] = False
        room = room - here


def keep_largest_in_groups(scores: Float[Tensor, "out inputs"], keep: int, of: int) -> Bool[Tensor, "out inputs"]:
    """True at the ``keep`` largest of every ``of`` consecutive entries of a row, the lowest index first."""
    groups = scores.reshape(-1, of)
    if of > _SMALL_GROUP:  # no mutant: both ways give the same mask
        return keep_largest(groups, keep).view(scores.shape)
    kept = torch.empty(groups.shape, dtype=torch.bool, device=groups.device)
    step = piece(groups, _GROUPS) // of  # no mutant: pieces of any size do
    for start in range(0, len(groups), step):
        some = slice(start, start + step)
        if by_numpy(groups):
            _keep_largest_in_few_(kept[some].numpy(), groups[some].detach().numpy(), keep)
        else:
            kept[some] = _largest_by_rank(groups[some], keep)
    return kept.view(scores.shape)


def _largest_by_rank(groups: Float[Tensor, "groups of"], keep: int) -> Bool[Tensor, "groups of"]:
    """True at the ``keep`` largest entries of each group: those that fewer than ``keep`` others come before.

    Every pair of a group is compared: on a GPU a few calls that wait for nothing cost less than many on columns.
    """
    one, other = groups.unsqueeze(2), groups.unsqueeze(1)
    earlier = torch.ones(groups.shape[1], groups.shape[1], dtype=torch.bool, device=groups.device).tril_(-1)
    before = torch.where(earlier, other >= one, other > one)  # of equals the first comes first
    return before.sum(dim=2, dtype=torch.uint8) < keep


def _keep_largest_in_few_(
    kept: np.ndarray[Any, np.dtype[np.bool_]], groups: np.ndarray[Any, np.dtype[Any]], keep: int
) -> None:
    """``kept`` (groups, of) is set to True at the ``keep`` largest entries of each group, else to False.

    The threshold of each group is found by insertion into the largest entries so far: a few passes over whole
    columns, where putting tiny groups in order costs many.
    """
    columns = [np.ascontiguousarray(column) for column in np.moveaxis(groups, 1, 0)]
    largest: list[Any] = []  # of each group, downwards
    for x in columns:
        for j, most in enumerate(largest):
            largest[j] = np.maximum(most, x)
            if j + 1 < keep:
                x = np.minimum(most, x)
        if len(largest) < keep:
            largest.append(x)
    threshold = largest[-1]
    reach = [column >= threshold for column in columns]
    most = int(sum(mask.view(np.uint8) for mask in reach).max())
    if most > keep:  # of equals the first; no mutant: where as many reach it as fit, nothing changes
        room = keep - sum((column > threshold).view(np.uint8) for column in columns).view(np.int8)
        for j, column in enumerate(columns):
            equal = column == threshold
            reach[j] &= ~equal | (room > 0)
            room = room - equal.view(np.int8)
    for j, mask in enumerate(reach):
        kept[:, j] = mask


def positions_first(inputs: int, group: int, device: torch.device | str = "cpu") -> Int[Tensor, " inputs"]:
    """The inputs in the order of their position within their group of ``group``, then of their group.

    Matrices in this order have the first inputs of all groups side by side, then the second ones: what
    compares the inputs of a group becomes passes over contiguous columns.
    """
    return torch.arange(inputs, device=device).view(-1, group).T.flatten()
