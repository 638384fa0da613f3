"""An order of a layer's inputs in which N:M prunes little, for inputs that may be in any order.

With importance E (rows, inputs), N:M on an order keeps, of each row, the N largest of every M consecutive inputs. The
order is to keep as much as it can:

    max over orders of  sum of rows, sum of groups, the N largest E of the group          (1)

Start: inputs by the sum of their column of E, dealt to the groups in turn, back and forth, so that no group has the
most important inputs together. Then, for each of the M places in a group, the inputs at this place of all groups are
assigned anew, the others staying. With t the N-th largest of the M - 1 others of a row's group, the group keeps its
N - 1 largest others, and the larger of t and of the newcomer's x; so the value of newcomer c in group g is, but for
what does not depend on c,

    V[c, g] = sum over rows of max(x_c, t_g)                                              (2)

and the best assignment of all newcomers at once is a linear assignment problem, which no step can lose by.

| code  | RIA's CP          | shape         | meaning                                     |
|-------|-------------------|---------------|---------------------------------------------|
| E     | S                 | (rows, n)     | importance of each weight, at least 0       |
| order | permutation       | (groups, M)   | which input stands where                    |
| V     | score matrix      | (num, num)    | what is kept with newcomer c in group g     |

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR
2024, channel permutation: heuristic allocation, then linear sum assignment. Differences: the importance is that of
one removal with interactions, w^2 / (H^-1)_jj; (2) for any N:M; up to 512 groups are assigned at a time, and rows
are sampled evenly where there are many; two passes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GROUPS = 512  # assigned at a time: the time of an assignment grows with their third power
_ROWS = 2048  # of them all, so many say which order is good
_PASSES = 2  # over the places of a group; a third changes next to nothing (docs/log.md)


def choose_order(E: Float[Tensor, "rows n"], keep: int, of: int) -> Int[Tensor, " n"]:
    """The order of the n inputs for ``keep``:``of``: place j gets input order[j].

    Importance ``E`` is at least 0, and ``of`` divides n. The same bits for the same E: ties go to the lowest index.
    """
    E = E[:: -(-len(E) // _ROWS)]
    groups = E.shape[1] // of
    order = _dealt(E.sum(dim=0, dtype=torch.float64), groups, of)
    if groups == 1 or not bool(E.any()):
        return torch.arange(E.shape[1], device=E.device)
    kept = kept_share(E, order.view(-1), keep, of)
    generator = torch.Generator().manual_seed(0)  # of which groups are assigned together
    for _ in range(_PASSES):
        for place in range(of):
            _assign_(E, order, place, keep, generator)
        before, kept = kept, kept_share(E, order.view(-1), keep, of)
        if kept <= before:
            break
    # The order that the model has is one of those to choose from.
    as_it_is = torch.arange(E.shape[1], device=E.device)
    return order.view(-1) if kept > kept_share(E, as_it_is, keep, of) else as_it_is


def kept_share(E: Float[Tensor, "rows n"], order: Int[Tensor, " n"], keep: int, of: int) -> float:
    """(1) as a share of the sum of E, in float64; 1 where nothing is important."""
    total = float(E.sum(dtype=torch.float64))
    grouped = E[:, order].unflatten(1, (-1, of))
    return float(grouped.topk(keep, dim=2).values.sum(dtype=torch.float64)) / total if total else 1.0


def _dealt(total: Float[Tensor, " n"], groups: int, of: int) -> Int[Tensor, "groups of"]:
    """The inputs from the most important on, dealt to the groups back and forth."""
    rounds = total.argsort(descending=True, stable=True).view(of, groups)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.contiguous()


def _assign_(
    E: Float[Tensor, "rows n"], order: Int[Tensor, "groups of"], place: int, keep: int, generator: torch.Generator
) -> None:
    """Assign the inputs at one place of all groups anew, by (2), in place."""
    from scipy.optimize import linear_sum_assignment

    newcomers, others = order[:, place].clone(), torch.cat([order[:, :place], order[:, place + 1 :]], dim=1)
    x = E[:, newcomers].T.contiguous()
    t = E[:, others.reshape(-1)].unflatten(1, others.shape).topk(keep, dim=2).values[:, :, -1].T.contiguous()
    for together in torch.randperm(len(order), generator=generator).chunk(-(-len(order) // _GROUPS)):
        V = torch.stack([torch.maximum(one, t[together]).sum(dim=1) for one in x[together]])
        which, group = (torch.from_numpy(i) for i in linear_sum_assignment(V.cpu().numpy(), maximize=True))
        order[together[group], place] = newcomers[together[which]]
