"""N:M sparsity in groups of consecutive outputs of an input, across the rows of a weight instead of along them.

Outputs of gate and up are the neurons of an MLP, and so are the inputs of down: groups of neurons lie across the
rows of the former and along those of the latter. No sparse kernel for x W^T takes groups of outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rarefy.errors import PatternError
from rarefy.layer.pattern import NM, Mask, Pattern, Scores, Shape


@dataclass(frozen=True)
class AcrossNM(Pattern):
    """``keep`` weights of every ``of`` consecutive outputs of an input are kept.

    ``share`` below 1 is the pattern on the way to this one, with that share of its zeros.
    """

    keep: int
    of: int
    share: float = 1.0
    rows_independent = False

    def __post_init__(self) -> None:
        NM(self.keep, self.of)  # says what is wrong

    def __str__(self) -> str:
        way = "" if self.share == 1 else f", {100 * self.share:.4g}% of the way"
        return f"{self.keep}:{self.of} across outputs{way}"

    @property
    def row_group(self) -> int:  # type: ignore[override]
        return self.of

    @property
    def _transposed(self) -> Pattern:
        """The pattern of the transposed weight."""
        along = NM(self.keep, self.of)
        return along if self.share == 1 else along.at(self.share)

    def validate(self, shape: Shape, name: str = "the weight") -> None:
        if shape[0] % self.of:
            raise PatternError.sentence(
                f"pattern is {self}, but {name} has {shape[0]} outputs, which {self.of} does not divide."
            )

    def count(self, shape: Shape) -> int:
        self.validate(shape)
        return self._transposed.count((shape[1], shape[0]))

    def project(self, scores: Scores, locked: Mask | None = None) -> Mask:
        self.validate((len(scores), scores.shape[1]))
        locked = None if locked is None else locked.T.contiguous()
        return self._transposed.project(scores.T.contiguous(), locked).T.contiguous()

    def surest(self, mask: Mask, scores: Scores, share: float) -> Mask:
        return self._transposed.surest(mask.T.contiguous(), scores.T.contiguous(), share).T.contiguous()

    @property
    def trust(self) -> float:
        return NM(self.keep, self.of).trust

    def nominal_sparsity(self) -> float:
        return self.share * NM(self.keep, self.of).nominal_sparsity()

    def at(self, share: float) -> AcrossNM:
        return AcrossNM(self.keep, self.of, self.share * share)

    def rows(self, start: int, stop: int, shape: Shape) -> AcrossNM:
        if start % self.of or stop % self.of:
            raise PatternError.sentence(f"Rows {start} to {stop} cut a group of {self}.")
        return self

    def columns(self, start: int, stop: int, shape: Shape) -> AcrossNM:
        return self

    def check(self, mask: Mask) -> None:
        self.validate((len(mask), mask.shape[1]))
        if self.share < 1:
            super().check(mask)
            return
        per_group = mask.view(-1, self.of, mask.shape[1]).sum(dim=1)
        if bool((per_group != self.keep).any()):
            index, column = (int(i) for i in (per_group != self.keep).nonzero()[0])
            raise PatternError.sentence(
                f"Group {index} of input {column} of the mask keeps {int(per_group[index, column])} weights, but "
                f"{self} keeps {self.keep}."
            )

    def excess(self, nonzero: Mask) -> Iterator[str]:
        if len(nonzero) % self.of:
            yield f"its {len(nonzero):,} outputs cannot be cut into groups of {self.of}"
            return
        per_group = nonzero.view(-1, self.of, nonzero.shape[1]).sum(dim=1)
        if wrong := int((per_group > self.keep).sum()):
            yield (
                f"{wrong:,} of its {per_group.numel():,} groups hold more than {self.keep} of {self.of} "
                "non-zero weights"
            )

    def spec(self) -> dict[str, Any]:
        return {"kind": "n:m across", "keep": self.keep, "of": self.of} if self.share == 1 else {}

    def describe(self) -> str:
        return f"at most {self.keep} of every {self.of} consecutive outputs of an input are not zero"
