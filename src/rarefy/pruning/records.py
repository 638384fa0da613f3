"""What is known about each pruned layer and about the whole run, and its form as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerRecord:
    """One pruned layer, as graded from the weight that was written; one line of ``layers.jsonl``.

    ``shape`` is [out, in], ``pattern`` the name of its pattern and ``pattern_spec`` what the pattern is made from
    again (layer/pattern.py), ``kept`` the exact count of weights that may be non-zero,
    ``relative_error`` the output energy lost (0 is exact, 1 is as bad as the zero matrix),
    ``balanced_error`` the same if all inputs had the same energy, which no single input can hide, ``status``
    the sentence in which the method says how it ended, ``failed`` whether that is a failure,
    ``details`` numbers that belong to it, ``peak_bytes`` the most memory in use while it was solved
    (0 where unknown), ``trace`` one number per step under each name (left out of the file where empty).
    """

    name: str
    block: int
    shape: list[int]
    pattern: str
    kept: int
    relative_error: float
    status: str
    failed: bool = False
    balanced_error: float = math.nan
    pattern_spec: dict[str, str | int | float] = field(default_factory=dict)
    # Whole numbers that are read again stay whole, and so a record is written again as it was.
    details: dict[str, int | float | str] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    trace: dict[str, list[int | float]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of weights, pruned or not."""
        return math.prod(self.shape)

    @property
    def pruned(self) -> int:
        """The number of weights that are zero by the pattern."""
        return self.size - self.kept

    @property
    def sparsity(self) -> float:
        """The fraction of weights that are zero by the pattern."""
        return self.pruned / self.size

    @property
    def kind(self) -> str:
        """The last part of the name, which layers of one kind share (``q_proj``)."""
        return self.name.rpartition(".")[2]

    def to_json(self) -> str:
        """One line of JSON without a line break; infinity and NaN become text, as JSON has neither."""
        values = asdict(self)
        if not self.trace:
            del values["trace"]
        return json.dumps(_finite(values), allow_nan=False)


@dataclass
class Report:
    """What ``prune`` did: one record per layer, in the order of pruning; ``print`` shows a table.

    ``pattern`` and ``method`` are the names of what was asked for, ``seconds`` the wall time, ``compute_dtype`` the
    dtype in which blocks ran.
    """

    layers: list[LayerRecord]
    pattern: str = ""
    method: str = ""
    seconds: float = 0.0
    compute_dtype: str = ""

    @property
    def size(self) -> int:
        """The number of weights in all pruned layers."""
        return sum(layer.size for layer in self.layers)

    @property
    def pruned(self) -> int:
        """The number of weights that were set to zero."""
        return sum(layer.pruned for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros over all pruned layers; embeddings, head and norms are not counted."""
        return self.pruned / self.size if self.layers else 0.0

    @property
    def relative_error(self) -> float:
        """The geometric mean of the layers' relative errors; the papers' tables show its square root."""
        return geometric_mean(layer.relative_error for layer in self.layers)

    @property
    def balanced_error(self) -> float:
        """The geometric mean of the layers' balanced errors, in which all inputs count the same."""
        return geometric_mean(layer.balanced_error for layer in self.layers)

    @property
    def failed(self) -> list[LayerRecord]:
        """The layers on which the method failed."""
        return [layer for layer in self.layers if layer.failed]

    @property
    def peak_bytes(self) -> int:
        """The most memory in use while any layer was solved; 0 where unknown."""
        return max((layer.peak_bytes for layer in self.layers), default=0)

    def by_kind(self) -> dict[str, Report]:
        """The same report for each kind of layer (``q_proj``), in the order of their first layer."""
        kinds: dict[str, Report] = {}
        for layer in self.layers:
            part = kinds.setdefault(layer.kind, Report([], self.pattern, self.method))
            part.layers.append(layer)
            part.seconds += layer.seconds
        return kinds

    def rows(self) -> list[list[str]]:
        """A table by kind of layer: heading, one row per kind, and the sum of all."""
        heading = ["layer", "count", "shape", "sparsity", "relative error", "worst", "balanced error", "seconds"]
        body = [_row(kind, part, part.seconds) for kind, part in self.by_kind().items()]
        return [heading, *body, _row("all", self, sum(layer.seconds for layer in self.layers))]

    def __str__(self) -> str:
        title = f"{self.method}, {self.pattern}: {self.pruned:,} of {self.size:,} weights are zero"
        return "\n".join([title, *aligned(self.rows()), *(f"{layer.name}: {layer.status}" for layer in self.failed)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a plain table: the first row is its heading, the first column is aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return [
        lines[0].rstrip(),
        "  ".join("-" * width for width in widths),
        *(line.rstrip() for line in lines[1:]),
    ]


def three_digits(value: float | None) -> str:
    """A number with three significant digits, however small it is; "not finite" for NaN, infinity and None."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:#.3g}".rstrip(".") if value else "0"


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of numbers >= 0; NaN of nothing or where one is NaN, 0 where one is 0."""
    numbers = list(values)
    if not numbers or any(math.isnan(value) for value in numbers):
        return math.nan
    if min(numbers) <= 0:
        return 0.0
    return math.exp(sum(math.log(value) for value in numbers) / len(numbers))


def _row(kind: str, part: Report, seconds: float) -> list[str]:
    shapes = {" x ".join(str(n) for n in layer.shape) for layer in part.layers}
    worst = max((layer.relative_error for layer in part.layers), default=math.nan)
    return [
        kind,
        str(len(part.layers)),
        shapes.pop() if len(shapes) == 1 else "",
        f"{part.sparsity:.2%}",
        three_digits(part.relative_error),
        three_digits(worst),
        three_digits(part.balanced_error),
        f"{seconds:.1f}",
    ]


def _finite(value: Any) -> Any:
    """``value`` with every non-finite number as the text that ``float`` reads again."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
