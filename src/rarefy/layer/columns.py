"""A pattern that keeps the same columns in all rows, so that what is pruned can be removed from the model.

A column of ``down_proj`` is a neuron of the MLP, a group of consecutive columns of ``o_proj`` is a head. Where a
column is zero in every row, the input that it multiplies is not needed, nor are the weights that make it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.errors import PatternError
from rarefy.layer.pattern import Mask, Pattern, Scores, Shape
from rarefy.layer.select import keep_largest


@dataclass(frozen=True)
class Columns(Pattern):
    """The same ``keep`` columns are kept in all rows, in whole groups of ``group`` consecutive ones.

    ``keep`` is a multiple of ``group``. Of scores, those of all weights of a group are added up. ``share`` below 1 is
    the pattern on the way to this one, with that share of its zeros.
    """

    keep: int
    group: int = 1
    share: float = 1.0
    rows_independent = False
    rows_alike = True

    def __post_init__(self) -> None:
        if type(self.group) is not int or self.group < 1:
            raise PatternError("group", self.group, "a whole number of at least 1 (columns that belong together)")
        if type(self.keep) is not int or self.keep < 0 or self.keep % self.group:
            allowed = "a whole number of at least 0 (columns)" if self.group == 1 else f"a multiple of {self.group}"
            raise PatternError("keep", self.keep, allowed)

    def __str__(self) -> str:
        groups = "" if self.group == 1 else f" in groups of {self.group}"
        way = "" if self.share == 1 else f", {100 * self.share:.4g}% of the way"
        return f"{self.keep} columns{groups}{way}"

    def validate(self, shape: Shape, name: str = "the weight") -> None:
        if shape[1] % self.group:
            raise PatternError.sentence(
                f"pattern is {self}, but {name} has {shape[1]} inputs, which {self.group} does not divide."
            )
        if shape[1] < self.keep:
            raise PatternError.sentence(f"pattern is {self}, but {name} has only {shape[1]} inputs.")

    def count(self, shape: Shape) -> int:
        return shape[0] * self.group * self._kept_groups(shape)

    def project(self, scores: Scores, locked: Mask | None = None) -> Mask:
        chosen = self._of_groups(scores)
        if locked is not None:
            chosen.masked_fill_(self._touched(locked), math.inf)
        return self._mask(keep_largest(chosen, self._kept_groups(_shape(scores))), scores)

    def fill(self, scores: Scores, locked: Mask) -> Mask:
        """``locked``, and beside it the positive scores of the columns in which they add up to most.

        A mask that may leave out weights of a kept column, as the masks in the convex hull of the allowed ones do.
        """
        room = self.project(scores.clamp_min(0), locked)
        return room & ((scores > 0) | locked)

    def surest(self, mask: Mask, scores: Scores, share: float) -> Mask:
        """The same of whole groups: the floor(share k) with the highest scores among the k that ``mask`` keeps."""
        kept = self._touched(mask)
        sums = self._of_groups(scores).masked_fill_(~kept, -math.inf)
        return self._mask(keep_largest(sums, math.floor(share * int(kept.sum()))), scores)

    def nominal_sparsity(self) -> float:
        """Raises PatternError: what share a number of columns is depends on the shape (``sparsity_of``)."""
        raise PatternError.sentence(f"What share of the weights {self} prunes depends on the shape of the weight.")

    def at(self, share: float) -> Columns:
        return Columns(self.keep, self.group, self.share * share)

    def rows(self, start: int, stop: int, shape: Shape) -> Columns:
        return self

    def columns(self, start: int, stop: int, shape: Shape) -> Columns:
        if start % self.group or stop % self.group:
            raise PatternError.sentence(f"Columns {start} to {stop} cut a group of {self}.")
        kept, groups = self._kept_groups(shape), shape[1] // self.group
        a, b = start // self.group, stop // self.group
        # cumulative floors, so that parts add up exactly
        return Columns((kept * b // groups - kept * a // groups) * self.group, self.group)

    def check(self, mask: Mask) -> None:
        self.validate(_shape(mask))
        if len(mask) and not torch.equal(mask, mask[:1].expand_as(mask)):
            row = int((mask != mask[:1]).any(dim=1).nonzero()[0])
            raise PatternError.sentence(
                f"Row {row} of the mask keeps other columns than row 0, which {self} forbids."
            )
        groups = mask[:1].unflatten(1, (-1, self.group)).sum(dim=2)
        if bool(((groups != 0) & (groups != self.group)).any()):
            raise PatternError.sentence(f"The mask keeps a part of a group, which {self} forbids.")
        super().check(mask)

    def excess(self, nonzero: Mask) -> Iterator[str]:
        if nonzero.shape[1] % self.group or nonzero.shape[1] < self.keep:
            yield f"its {nonzero.shape[1]:,} inputs are not those of {self}"
            return
        used, kept = int(self._touched(nonzero).sum()), self._kept_groups(_shape(nonzero))
        if used > kept:
            what = "columns" if self.group == 1 else f"groups of {self.group} columns"
            yield f"{used:,} of its {what} hold non-zero weights, promised were {kept:,}"

    def spec(self) -> dict[str, Any]:
        return {"kind": "columns", "keep": self.keep, "group": self.group} if self.share == 1 else {}

    def describe(self) -> str:
        return f"every weight matrix keeps the same {self} in all rows"

    def _kept_groups(self, shape: Shape) -> int:
        self.validate(shape)
        groups = shape[1] // self.group
        return groups - round(self.share * (groups - self.keep // self.group))

    def _of_groups(self, scores: Scores) -> Float[Tensor, " groups"]:
        """The sum of the scores of every group, in float64."""
        self.validate(_shape(scores))
        return scores.sum(dim=0, dtype=torch.float64).view(-1, self.group).sum(dim=1)

    def _touched(self, mask: Mask) -> Bool[Tensor, " groups"]:
        """The groups in which a mask keeps a weight."""
        return mask.any(dim=0).view(-1, self.group).any(dim=1)

    def _mask(self, groups: Bool[Tensor, " groups"], like: Scores) -> Mask:
        return groups.repeat_interleave(self.group).expand(like.shape).contiguous()


def _shape(matrix: Tensor) -> Shape:
    outputs, inputs = matrix.shape
    return outputs, inputs
