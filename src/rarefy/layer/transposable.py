"""Transposable N:M: a mask that keeps N of every M inputs of a row, and N of every M outputs of a column.

So the weight and its transpose are both N:M, and a training with such a weight is fast forward and backward. The
matrix falls into blocks of M x M, each of which keeps N in each of its rows and columns. The best mask of a block for
scores S is a transport problem,

    max <S, T>   over   T 1 = N,  T^T 1 = N,  0 <= T <= 1                     (1)

whose vertices are the masks. Up to M = 4 all masks of a block are compared. Beyond, (1) is solved with entropy and
rounded, for all blocks at once:

    T <- exp(b S), and then, b doubling from time to time (T <- T^2),
    T <- diag(N / T 1) T;   T <- T diag(N / T^T 1);   T <- min(T, 1)          (2)  Sinkhorn
    entries from the largest T on, as long as their row and column have room                       (3)
    a row and a column that lack one get it: (x, y) leaves, (i, y) and (x, j) come                 (4)
    two rows exchange the columns that gain most by it                                             (5)

After (3), where row i and column j lack one, each row that is not kept in column j is full, so it holds one of the
columns that row i does not: (4) always finds one.

| code  | TSENOR        | shape        | meaning                                             |
|-------|---------------|--------------|-----------------------------------------------------|
| S     | |W|           | (M, M, B)    | scores of B blocks, by the largest of the block     |
| T     | S             | (M, M, B)    | transport plan                                      |
| kept  |               | (M, M, B)    | the mask                                            |

Source: Meng et al., TSENOR, arXiv 2505.23949. Differences: b doubles, which needs a quarter of the iterations;
T is clipped without Dykstra's correction, which in so few iterations gains nothing; (5) between rows instead of a
search over all pairs of entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rarefy.errors import PatternError
from rarefy.layer.passes import piece
from rarefy.layer.pattern import NM, Mask, Scores, Shape

Blocks = Float[Tensor, "M M B"]
BlockMasks = Bool[Tensor, "M M B"]

_ENUMERATED = 4  # M up to which all masks of a block are compared: 90 for 2:4
_TOGETHER = 2**20  # entries of blocks at a time
_CACHED = 2**17  # of these in (2), which then stay in a CPU's cache
_SHARPNESS = (5.0, 10.0, 20.0, 40.0)  # b, which doubles
_ITERATIONS = 6  # of (2) for each b
_ROUNDS = 1  # of (5)
_TINY = 1e-30


@dataclass(frozen=True)
class TransposableNM(NM):
    """``keep`` of every ``of`` consecutive inputs of a row are kept, and of every ``of`` outputs of a column."""

    rows_independent = False
    num_group_masks = 0  # for the groups of a block depend on each other

    @property
    def row_group(self) -> int:  # type: ignore[override]
        return self.of

    def group_masks(self) -> Mask:
        return torch.zeros(0, self.of, dtype=torch.bool)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}t"

    def validate(self, shape: Shape, name: str = "the weight") -> None:
        super().validate(shape, name)
        if shape[0] % self.of:
            raise PatternError.sentence(
                f"pattern is {self}, but {name} has {shape[0]} outputs, which {self.of} does not divide."
            )

    def count(self, shape: Shape) -> int:
        NM.validate(self, shape)
        return shape[0] * (shape[1] // self.of) * self.keep

    def project(self, scores: Scores, locked: Mask | None = None) -> Mask:
        outputs, inputs = scores.shape
        self.validate((outputs, inputs))
        S = _in_blocks(scores, self.of)
        fixed = _in_blocks(locked, self.of) if locked is not None else None
        choose = _best_of_all if self.of <= _ENUMERATED else _transported
        size = max(1, _TOGETHER // self.of**2)  # no mutant: a piece's size
        parts = []
        for start in range(0, S.shape[2], size):
            some = slice(start, start + size)
            block = _finite(S[..., some].contiguous())
            parts.append(choose(block, self.keep, None if fixed is None else fixed[..., some]))
        return _from_blocks(torch.cat(parts, dim=2), outputs)

    def fill(self, scores: Scores, locked: Mask) -> Mask:
        """``locked``, and beside it what is positive of the best mask for the positive scores."""
        return self.project(scores.clamp_min(0), locked) & ((scores > 0) | locked)

    def surest(self, mask: Mask, scores: Scores, share: float) -> Mask:
        """As for any pattern: columns have something to choose as long as not all of a block is kept."""
        return super(NM, self).surest(mask, scores, share)

    def rows(self, start: int, stop: int, shape: Shape) -> NM:
        if start % self.of or stop % self.of:
            raise PatternError.sentence(f"Rows {start} to {stop} cut a block of {self}.")
        return self

    def check(self, mask: Mask) -> None:
        super().check(mask)
        try:
            NM(self.keep, self.of).check(mask.T)
        except PatternError as error:
            raise PatternError.sentence(f"Of the mask's transpose: {error}") from None

    def excess(self, nonzero: Mask) -> Iterator[str]:
        yield from super().excess(nonzero)
        if nonzero.shape[0] % self.of:
            yield f"its {nonzero.shape[0]:,} outputs cannot be cut into groups of {self.of}"
            return
        per_group = nonzero.T.unflatten(1, (-1, self.of)).sum(dim=2)
        if wrong := int((per_group > self.keep).sum()):
            yield (
                f"{wrong:,} of the {per_group.numel():,} groups of its transpose hold more than {self.keep} of "
                f"{self.of} non-zero weights"
            )

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "transposable": True}

    def describe(self) -> str:
        return (
            f"at most {self.keep} of every {self.of} consecutive inputs of a row, and of every {self.of} consecutive "
            "outputs of a column, are not zero"
        )


def _in_blocks(values: Tensor, of: int) -> Tensor:
    """(out, in) as (M, M, B), block by block; a copy."""
    blocks: Tensor = values.unflatten(0, (-1, of)).unflatten(2, (-1, of)).permute(1, 3, 0, 2).flatten(2)
    return blocks


def _from_blocks(blocks: Tensor, rows: int) -> Tensor:
    of = blocks.shape[0]
    values: Tensor = blocks.unflatten(2, (rows // of, -1)).permute(2, 0, 3, 1).flatten(2).flatten(0, 1)
    return values.contiguous()


def _finite(S: Blocks) -> Blocks:
    """The scores, with what is -infinity, and to be kept last of all, below what all others of a block add up to."""
    if bool(torch.isfinite(S.sum())):
        return S
    never = torch.isneginf(S)
    least = S.masked_fill(never, 0).abs().amax(dim=(0, 1)).clamp_min(torch.finfo(S.dtype).tiny)
    return torch.where(never, -float(S.shape[0] ** 2) * least, S)  # no mutant: less would do


# --- small blocks


@cache
def _all_masks(keep: int, of: int) -> Bool[Tensor, "masks M*M"]:
    """All masks of a block; first those that keep the lowest indices."""
    rows = [[column in some for column in range(of)] for some in combinations(range(of), keep)]
    found = [block for block in product(rows, repeat=of) if all(sum(column) == keep for column in zip(*block))]
    return torch.tensor(found).flatten(1)


def _best_of_all(S: Blocks, keep: int, locked: BlockMasks | None) -> BlockMasks:
    masks = _all_masks(keep, S.shape[0]).to(S.device)
    sums = masks.to(S.dtype) @ S.flatten(0, 1)
    if locked is not None:
        missed = (~masks).to(S.dtype) @ locked.flatten(0, 1).to(S.dtype)
        sums.masked_fill_(missed > 0, -torch.inf)
    return masks[sums.argmax(dim=0)].T.reshape(S.shape)


# --- larger blocks


def _transported(S: Blocks, keep: int, locked: BlockMasks | None) -> BlockMasks:
    """The mask of each block by (2) to (5)."""
    S = S / S.abs().amax(dim=(0, 1)).clamp_min(torch.finfo(S.dtype).tiny)
    if locked is None:
        locked = torch.zeros_like(S, dtype=torch.bool)
    S = S.masked_fill(locked, 1.0)
    size = max(1, piece(S, _CACHED) // len(S) ** 2)  # no mutant: a piece's size
    parts = [_plan(some.contiguous(), keep) for some in S.split(size, dim=2)]
    kept, rows, columns = _rounded(torch.cat(parts, dim=2).masked_fill_(locked, torch.inf), keep)
    _complete_(S, kept, rows, columns, locked, keep)
    for _ in range(_ROUNDS):
        _exchange_(S, kept, locked)
    return kept


def _plan(S: Blocks, keep: int) -> Blocks:
    """(2)."""
    T = torch.exp((S - 1) * _SHARPNESS[0])
    for number in range(len(_SHARPNESS)):
        if number:
            T.square_().clamp_min_(_TINY)
        for _ in range(_ITERATIONS):
            T.mul_(keep / T.sum(dim=1, keepdim=True).clamp_min_(_TINY))
            T.mul_(keep / T.sum(dim=0, keepdim=True).clamp_min_(_TINY))
            T.clamp_max_(1)
    return T


def _rounded(T: Blocks, keep: int) -> tuple[BlockMasks, Int[Tensor, "M B"], Int[Tensor, "M B"]]:
    """(3), and how many each row and each column of a block lacks; equal entries by their index."""
    of, _, num = T.shape
    order = T.flatten(0, 1).T.contiguous().sort(dim=1, descending=True, stable=True).indices.T.contiguous()
    row = order.div(of, rounding_mode="floor")
    column = order - row * of
    rows = torch.full((of, num), keep, dtype=torch.int8, device=T.device)
    columns = rows.clone()
    kept = torch.zeros(of * of, num, dtype=torch.bool, device=T.device)
    for k in range(of * of):
        i, j = row[k : k + 1], column[k : k + 1]
        room = torch.minimum(rows.gather(0, i), columns.gather(0, j)) > 0
        kept.scatter_(0, order[k : k + 1], room)
        taken = room.to(torch.int8).neg_()
        rows.scatter_add_(0, i, taken)
        columns.scatter_add_(0, j, taken)
    return kept.view(T.shape), rows, columns


def _complete_(
    S: Blocks,
    kept: BlockMasks,
    rows: Int[Tensor, "M B"],
    columns: Int[Tensor, "M B"],
    locked: BlockMasks,
    keep: int,
) -> None:
    """(4) until no row lacks any, in place in ``kept``."""
    of = S.shape[0]
    while len(lacking := rows.amax(dim=0).nonzero().squeeze(1)):
        S_, kept_, locked_ = S[..., lacking], kept[..., lacking], locked[..., lacking]
        # No entry (i, j) is free: the rounding took all that had room in their row and column.
        i, j = (counts[:, lacking].argmax(dim=0).view(1, 1, -1) for counts in (rows, columns))
        # (x, y) leaves, and (i, y) and (x, j) come
        S_i, S_j = S_.gather(0, i.expand(1, of, -1)), S_.gather(1, j.expand(of, 1, -1))
        kept_i, kept_j = kept_.gather(0, i.expand(1, of, -1)), kept_.gather(1, j.expand(of, 1, -1))
        gain = (S_i + S_j - S_).masked_fill_(~(kept_ & ~kept_i & ~kept_j & ~locked_), -torch.inf)
        best, place = gain.flatten(0, 1).max(dim=0)
        stuck = best == -torch.inf
        some = (~stuck).nonzero().squeeze(1)
        block, i, j = lacking[some], i.view(-1)[some], j.view(-1)[some]
        x, y = place[some] // of, place[some] % of
        kept[x, y, block] = False
        kept[i, y, block] = True
        kept[x, j, block] = True
        rows[i, block] -= 1
        columns[j, block] -= 1
        for one in lacking[stuck].tolist():  # which only locked entries can bring about
            kept[..., one] = _programmed(S[..., one], keep, locked[..., one])
            rows[:, one] = columns[:, one] = 0


def _programmed(S: Float[Tensor, "M M"], keep: int, locked: Bool[Tensor, "M M"]) -> Bool[Tensor, "M M"]:
    """(1) as a linear program, one of whose vertices the simplex method finds."""
    from scipy.optimize import linprog

    of = len(S)
    index = torch.arange(of * of)
    sums = torch.cat([index // of == torch.arange(of).view(-1, 1), index % of == torch.arange(of).view(-1, 1)])
    bounds = [(float(one), 1.0) for one in locked.flatten().tolist()]
    found = linprog(
        -S.flatten().double().cpu().numpy(),
        A_eq=sums.double().numpy(),
        b_eq=[keep] * (2 * of),
        bounds=bounds,
        method="highs-ds",
    )
    if found.x is None:
        raise PatternError.sentence(f"Entries are to be kept that no {keep}:{of}t mask holds together.")
    return torch.from_numpy(found.x).view(of, of).to(S.device) > 0.5


def _exchange_(S: Blocks, kept: BlockMasks, locked: BlockMasks) -> None:
    """(5) for every two rows of each block, in place in ``kept``; pairs that share no row at once."""
    for first, second in _pairings(S.shape[0]):
        D = S[first] - S[second]
        one, two = kept[first], kept[second]
        least, j = D.masked_fill(~(one & ~two & ~locked[first]), torch.inf).min(dim=1, keepdim=True)
        most, l = D.masked_fill(~(two & ~one & ~locked[second]), -torch.inf).max(dim=1, keepdim=True)  # noqa: E741
        better = most > least
        for rows, gone, come in ((one, j, l), (two, l, j)):
            rows.scatter_(1, gone, rows.gather(1, gone) & ~better)
            rows.scatter_(1, come, rows.gather(1, come) | better)
        kept[first], kept[second] = one, two


@cache
def _pairings(of: int) -> list[tuple[list[int], list[int]]]:
    """Every two of ``of`` rows once, in rounds of pairs that share no row, as in a tournament."""
    rows = [*range(of)] if of % 2 == 0 else [*range(of), -1]
    rounds = []
    for _ in range(len(rows) - 1):
        half = len(rows) // 2
        pairs = [sorted(pair) for pair in zip(rows[:half], rows[: half - 1 : -1]) if -1 not in pair]
        rounds.append(([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
        rows = [rows[0], rows[-1], *rows[1:-1]]
    return rounds
