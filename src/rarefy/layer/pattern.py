"""Sparsity patterns: which masks are allowed, and the best allowed mask for given scores.

A mask is True where a weight is kept. Counts are exact: ``round(sparsity * size)`` entries are
pruned, ties keep the lowest index. N:M keeps N of every M consecutive inputs of a row.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from operator import gt
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.errors import PatternError
from rarefy.layer.passes import apply_mask, compare, count, count_rows, write_mask_
from rarefy.layer.select import keep_at_least, keep_largest, keep_largest_in_groups, kth_largest

Shape = tuple[int, int]
Scores = Float[Tensor, "out inputs"]
Mask = Bool[Tensor, "out inputs"]


class Pattern(ABC):
    """A set of allowed masks for a weight of any shape (out, in)."""

    #: True where the choice in one row never depends on another row.
    rows_independent: bool = True
    #: True where all rows have the same mask, so that no weight can be moved within a row alone.
    rows_alike: bool = False
    #: Length of the groups of inputs that belong together; blockwise methods cut at its multiples.
    group: int = 1
    #: Length of the groups of outputs that belong together, at whose multiples rows can be cut.
    row_group: int = 1
    #: Whether there is more than one allowed mask, so that a method has something to choose.
    has_choice: bool = True
    #: How many masks a group may have where each is chosen by itself; 0 where there are no such groups.
    num_group_masks: int = 0

    @abstractmethod
    def count(self, shape: Shape) -> int:
        """How many weights of a matrix of ``shape`` are kept, exactly."""

    @abstractmethod
    def project(self, scores: Scores, locked: Mask | None = None) -> Mask:
        """The allowed mask with the largest sum of scores; entries of ``locked`` are kept first.

        ``locked`` must itself fit into an allowed mask.
        """

    def fill(self, scores: Scores, locked: Mask) -> Mask:
        """``locked``, and beside it the largest positive scores for which there is room.

        The mask with the largest sum of scores of those that hold ``locked`` and keep, in each set that is
        counted, at most what an allowed mask keeps: a linear function's best vertex of their convex hull.
        """
        return self.project(scores, locked) & (compare(gt, scores, 0.0) | locked)

    def surest(self, mask: Mask, scores: Scores, share: float) -> Mask:
        """The floor(share k) weights with the highest scores among the k that ``mask`` keeps."""
        scores = scores.masked_fill(~mask, -math.inf)
        return keep_largest(scores.reshape(-1), math.floor(share * count(mask))).view_as(scores)

    @property
    def trust(self) -> float:
        """The share of a warm start's mask that a search for a better one had best leave as it is."""
        return 0.6  # measured (docs/log.md)

    def group_masks(self) -> Bool[Tensor, "masks group"]:
        """The masks of one group, ``num_group_masks`` of them; where several do equally well, the first is chosen."""
        return torch.zeros(0, self.group, dtype=torch.bool)

    @abstractmethod
    def at(self, share: float) -> Pattern:
        """The pattern on the way from dense (0) to this one (1) with ``share`` of its zeros.

        Its masks always contain an allowed mask of the final pattern.
        """

    @abstractmethod
    def rows(self, start: int, stop: int, shape: Shape) -> Pattern:
        """The pattern of rows start..stop of a matrix of ``shape``; the budgets of all slices add up."""

    @abstractmethod
    def columns(self, start: int, stop: int, shape: Shape) -> Pattern:
        """The pattern of columns start..stop of a matrix of ``shape``; the budgets of all slices add up."""

    def validate(self, shape: Shape, name: str = "the weight") -> None:  # noqa: B027 (most fit any shape)
        """Raise PatternError, naming the layer, where no mask of ``shape`` is allowed."""

    def sparsity_of(self, shape: Shape) -> float:
        """The exact fraction of zeros in a matrix of ``shape``."""
        return 1 - self.count(shape) / (shape[0] * shape[1])

    @abstractmethod
    def nominal_sparsity(self) -> float:
        """The fraction of zeros that is asked for, before it is rounded to a count."""

    def check(self, mask: Mask) -> None:
        """Raise PatternError where ``mask`` is not an allowed mask."""
        kept, allowed = count(mask), self.count(_shape(mask))
        if kept != allowed:
            raise PatternError.sentence(f"The mask keeps {kept} weights, but {self} keeps {allowed}.")

    def excess(self, nonzero: Mask) -> Iterator[str]:
        """How a weight with these non-zeros breaks the pattern, each way as the end of a sentence about the weight.

        A kept weight may be zero, so fewer non-zeros than the pattern keeps are no excess.
        """
        size, zeros = nonzero.numel(), nonzero.numel() - count(nonzero)
        if zeros < (promised := size - self.count(_shape(nonzero))):
            yield f"it holds {zeros:,} zeros, promised were {promised:,}"

    def spec(self) -> dict[str, Any]:
        """Plain values from which ``pattern_from_spec`` makes this pattern again, for records; {} where none do."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """The pattern as a clause for people, without its name."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """``sparsity`` of the whole matrix is zero, wherever the scores are lowest.

    ``sparsity`` is a fraction in [0, 1). ``kept`` replaces it by an exact count (slices use it).
    """

    sparsity: float
    kept: int | None = None
    rows_independent = False

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    def __str__(self) -> str:
        return f"unstructured {_percent(self.sparsity)}"

    def count(self, shape: Shape) -> int:
        size = shape[0] * shape[1]
        return size - round(self.sparsity * size) if self.kept is None else self.kept

    def project(self, scores: Scores, locked: Mask | None = None) -> Mask:
        scores = _locked_first(scores, locked)
        return keep_largest(scores.reshape(-1), self.count(_shape(scores))).view_as(scores)

    def fill(self, scores: Scores, locked: Mask) -> Mask:
        room = self.count(_shape(scores)) - count(locked)
        return _largest_positive(apply_mask(scores, ~locked).view(1, -1), room).view_as(scores) | locked

    def nominal_sparsity(self) -> float:
        return self.sparsity

    def at(self, share: float) -> Unstructured:
        _refuse_slice(self, self.kept)
        return Unstructured(self.sparsity * share)

    def rows(self, start: int, stop: int, shape: Shape) -> Unstructured:
        return Unstructured(self.sparsity, _share(self.count(shape), start, stop, shape[0]))

    def columns(self, start: int, stop: int, shape: Shape) -> Unstructured:
        return Unstructured(self.sparsity, _share(self.count(shape), start, stop, shape[1]))

    def spec(self) -> dict[str, Any]:
        return {"kind": "unstructured", "sparsity": self.sparsity} if self.kept is None else {}

    def describe(self) -> str:
        return f"{_percent(self.sparsity)} of every weight matrix is zero"


@dataclass(frozen=True)
class PerRow(Pattern):
    """``sparsity`` of every row (output neuron) is zero.

    ``sparsity`` is a fraction in [0, 1). ``kept`` replaces it by an exact count per row (slices use it).
    """

    sparsity: float
    kept: int | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    def __str__(self) -> str:
        return f"row {_percent(self.sparsity)}"

    def count(self, shape: Shape) -> int:
        return shape[0] * self._kept_per_row(shape[1])

    def project(self, scores: Scores, locked: Mask | None = None) -> Mask:
        return keep_largest(_locked_first(scores, locked), self._kept_per_row(scores.shape[1]))

    def surest(self, mask: Mask, scores: Scores, share: float) -> Mask:
        """As for any pattern, but with the share of each row's kept weights."""
        kept = math.floor(share * self._kept_per_row(mask.shape[1]))
        return keep_largest(scores.masked_fill(~mask, -math.inf), kept)

    def nominal_sparsity(self) -> float:
        return self.sparsity

    def at(self, share: float) -> PerRow:
        _refuse_slice(self, self.kept)
        return PerRow(self.sparsity * share)

    def rows(self, start: int, stop: int, shape: Shape) -> PerRow:
        return self

    def columns(self, start: int, stop: int, shape: Shape) -> PerRow:
        return PerRow(self.sparsity, _share(self._kept_per_row(shape[1]), start, stop, shape[1]))

    def check(self, mask: Mask) -> None:
        per_row = count_rows(mask)
        allowed = self._kept_per_row(mask.shape[1])
        if bool((per_row != allowed).any()):
            row = int((per_row != allowed).nonzero()[0])
            raise PatternError.sentence(
                f"Row {row} of the mask keeps {int(per_row[row])} weights, but {self} keeps {allowed}."
            )

    def excess(self, nonzero: Mask) -> Iterator[str]:
        yield from super().excess(nonzero)
        allowed = self._kept_per_row(nonzero.shape[1])
        if wrong := int((count_rows(nonzero) > allowed).sum()):
            yield f"{wrong:,} of its {nonzero.shape[0]:,} rows hold more than {allowed:,} non-zero weights"

    def spec(self) -> dict[str, Any]:
        return {"kind": "row", "sparsity": self.sparsity} if self.kept is None else {}

    def describe(self) -> str:
        return f"{_percent(self.sparsity)} of every row of every weight matrix is zero"

    def _kept_per_row(self, inputs: int) -> int:
        return inputs - round(self.sparsity * inputs) if self.kept is None else self.kept


@dataclass(frozen=True)
class NM(Pattern):
    """N:M sparsity: ``keep`` weights of every ``of`` consecutive inputs of a row are kept."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not (type(self.keep) is int and type(self.of) is int and 1 <= self.keep < self.of):
            raise PatternError(
                "pattern", f"{self.keep}:{self.of}", "N:M with 1 <= N < M (N of every M weights are kept)"
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def group(self) -> int:  # type: ignore[override]
        return self.of

    @property
    def num_group_masks(self) -> int:  # type: ignore[override]
        return math.comb(self.of, self.keep)

    def group_masks(self) -> Bool[Tensor, "masks group"]:
        kept = torch.tensor(list(itertools.combinations(range(self.of), self.keep)))
        return torch.zeros(len(kept), self.of, dtype=torch.bool).scatter_(1, kept, True)

    def validate(self, shape: Shape, name: str = "the weight") -> None:
        if shape[1] % self.of:
            raise PatternError.sentence(
                f"pattern is {self}, but {name} has {shape[1]} inputs, which {self.of} does not divide."
            )

    def count(self, shape: Shape) -> int:
        self.validate(shape)
        return shape[0] * (shape[1] // self.of) * self.keep

    def project(self, scores: Scores, locked: Mask | None = None) -> Mask:
        self.validate(_shape(scores))
        return keep_largest_in_groups(_locked_first(scores, locked), self.keep, self.of)

    def surest(self, mask: Mask, scores: Scores, share: float) -> Mask:
        """As for any pattern, but at most N - 1 of a group, which has then something to choose; for N = 1, 0 or 1."""
        most = keep_largest_in_groups(scores.masked_fill(~mask, -math.inf), max(1, self.keep - 1), self.of)
        num = min(math.floor(share * count(mask)), count(most))
        return keep_largest(scores.masked_fill(~most, -math.inf).reshape(-1), num).view_as(scores)

    @property
    def trust(self) -> float:
        return 0.1 + (self.keep - 1) / self.of  # measured for 1:4, 2:8, 2:4, 4:8 and 3:4 (docs/log.md)

    def nominal_sparsity(self) -> float:
        return 1 - self.keep / self.of

    def at(self, share: float) -> _Gradual:
        return _Gradual(self, share)

    def rows(self, start: int, stop: int, shape: Shape) -> NM:
        return self

    def columns(self, start: int, stop: int, shape: Shape) -> NM:
        if start % self.of or stop % self.of:
            raise PatternError.sentence(f"Columns {start} to {stop} cut a group of {self}.")
        return self

    def check(self, mask: Mask) -> None:
        self.validate(_shape(mask))
        per_group = mask.reshape(mask.shape[0], -1, self.of).sum(dim=2, dtype=torch.int32)
        if bool((per_group != self.keep).any()):
            row, index = (int(i) for i in (per_group != self.keep).nonzero()[0])
            raise PatternError.sentence(
                f"Group {index} of row {row} keeps {int(per_group[row, index])} weights, but {self} keeps "
                f"{self.keep}."
            )

    def excess(self, nonzero: Mask) -> Iterator[str]:
        if nonzero.shape[1] % self.of:
            yield f"its {nonzero.shape[1]:,} inputs cannot be cut into groups of {self.of}"
            return
        per_group = nonzero.unflatten(1, (-1, self.of)).sum(dim=2)
        if wrong := int((per_group > self.keep).sum()):
            yield (
                f"{wrong:,} of its {per_group.numel():,} groups hold more than {self.keep} of {self.of} "
                "non-zero weights"
            )

    def spec(self) -> dict[str, Any]:
        return {"kind": "n:m", "keep": self.keep, "of": self.of}

    def describe(self) -> str:
        return f"at most {self.keep} of every {self.of} consecutive inputs of a row are not zero"


@dataclass(frozen=True, eq=False)
class Fixed(Pattern):
    """Exactly the given mask (out, in), whatever the scores; for refits of a known support."""

    mask: Mask
    has_choice = False

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.mask.ndim != 2:
            raise PatternError(
                "mask", f"a {self.mask.dtype} tensor of shape {tuple(self.mask.shape)}", "bool, (out, in)"
            )

    def __str__(self) -> str:
        return "fixed mask"

    def validate(self, shape: Shape, name: str = "the weight") -> None:
        if shape != _shape(self.mask):
            raise PatternError.sentence(
                f"The fixed mask has shape {_shape(self.mask)}, but {name} has shape {shape}."
            )

    def count(self, shape: Shape) -> int:
        self.validate(shape)
        return count(self.mask)

    def project(self, scores: Scores, locked: Mask | None = None) -> Mask:
        self.validate(_shape(scores))
        return self.mask.to(scores.device)

    def nominal_sparsity(self) -> float:
        return self.sparsity_of(_shape(self.mask))

    def at(self, share: float) -> Fixed:
        return self

    def rows(self, start: int, stop: int, shape: Shape) -> Fixed:
        return Fixed(self.mask[start:stop])

    def columns(self, start: int, stop: int, shape: Shape) -> Fixed:
        return Fixed(self.mask[:, start:stop])

    def check(self, mask: Mask) -> None:
        self.validate(_shape(mask))
        if not torch.equal(mask, self.mask.to(mask.device)):
            raise PatternError.sentence("The mask differs from the fixed mask.")

    def describe(self) -> str:
        return "the same weights are zero as in the mask that was given"


@dataclass(frozen=True, eq=False)
class _Gradual(Pattern):
    """On the way to an N:M pattern: of each group the N largest scores are protected, the others go gradually.

    Of every row, first go those that are smallest relative to the smallest protected score of their group. One
    threshold for the scores of all rows, as in Boža's gradual 2:4 rule (arXiv 2401.02938), would decide groups of
    large weights last.
    """

    final: NM
    share: float

    def __str__(self) -> str:
        return f"{_percent(self.share)} of the way to {self.final}"

    def validate(self, shape: Shape, name: str = "the weight") -> None:
        self.final.validate(shape, name)

    def count(self, shape: Shape) -> int:
        return shape[0] * self._kept_per_row(shape[1])

    def project(self, scores: Scores, locked: Mask | None = None) -> Mask:
        protected = self.final.project(scores, locked)
        smallest = scores.masked_fill(~protected, math.inf).view(-1, self.final.of).amin(dim=1, keepdim=True)
        relative = scores.view(-1, self.final.of) / smallest.clamp_min_(torch.finfo(scores.dtype).tiny)
        relative = _locked_first(relative.view_as(scores), protected)
        return keep_largest(relative, self._kept_per_row(scores.shape[1]))

    def _kept_per_row(self, inputs: int) -> int:
        return inputs - round(self.share * (inputs - self.final.count((1, inputs))))

    def nominal_sparsity(self) -> float:
        return self.share * self.final.nominal_sparsity()

    def at(self, share: float) -> Pattern:
        return _Gradual(self.final, self.share * share)

    def rows(self, start: int, stop: int, shape: Shape) -> Pattern:
        return self

    def columns(self, start: int, stop: int, shape: Shape) -> Pattern:
        raise PatternError.sentence(f"{self} couples all columns and cannot be cut.")

    def describe(self) -> str:
        return str(self)


def pattern_from_spec(spec: Mapping[str, Any]) -> Pattern:
    """The pattern whose ``spec`` this is. Raises PatternError where it is none."""
    try:
        kind = spec["kind"]
        if kind == "n:m":
            if spec.get("transposable"):
                transposable: Pattern = import_module("rarefy.layer.transposable").TransposableNM(
                    spec["keep"], spec["of"]
                )
                return transposable
            return NM(spec["keep"], spec["of"])
        if kind in ("unstructured", "row"):
            return (Unstructured if kind == "unstructured" else PerRow)(spec["sparsity"])
        if kind == "columns":
            # The module imports this one, so it is imported when it is needed.
            columns: Pattern = import_module("rarefy.layer.columns").Columns(spec["keep"], spec["group"])
            return columns
        if kind == "n:m across":
            across: Pattern = import_module("rarefy.layer.across").AcrossNM(spec["keep"], spec["of"])
            return across
    except (KeyError, TypeError) as error:
        raise PatternError(
            "pattern",
            dict(spec),
            "of kind n:m or n:m across with keep and of, of kind unstructured or row with sparsity, or of kind "
            "columns with keep and group",
        ) from error
    raise PatternError("pattern", dict(spec), "of kind n:m, n:m across, unstructured, row or columns")


def check_sparsity(sparsity: object, argument: str = "sparsity") -> None:
    """Raise PatternError unless ``sparsity`` is a finite number in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise PatternError(argument, sparsity, "a number in [0, 1), the fraction of zeros")


def _share(total: int, start: int, stop: int, length: int) -> int:
    """What part start..stop of ``length`` gets of ``total``: cumulative floors, so parts add up exactly."""
    return total * stop // length - total * start // length


def _refuse_slice(pattern: Pattern, kept: int | None) -> None:
    """Raise PatternError for a slice: its count is its own, and no gradual masks follow from the sparsity."""
    if kept is not None:
        raise PatternError.sentence(f"A slice of {pattern} has no gradual masks.")


def _locked_first(scores: Scores, locked: Mask | None) -> Scores:
    """Scores that are infinite on ``locked``; by arithmetic, for torch fills a scattered mask four times slower."""
    if locked is None:
        return scores
    infinite = write_mask_(torch.empty_like(scores), locked).sub_(0.5).mul_(math.inf)
    return torch.maximum(scores, infinite, out=infinite)


def _largest_positive(scores: Float[Tensor, "rows n"], k: int) -> Bool[Tensor, "rows n"]:
    """True at the k largest scores of each row, but only where they are positive."""
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = kth_largest(scores, k).unsqueeze(1).clamp_min_(torch.finfo(scores.dtype).tiny)
    return keep_at_least(scores, threshold, k)


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.4g}%"


def _shape(matrix: Tensor) -> Shape:
    return int(matrix.shape[0]), int(matrix.shape[1])
