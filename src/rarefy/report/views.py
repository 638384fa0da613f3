"""The runs and sweeps as the report sees them, and the pieces that its sections are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rarefy.pruning.records import LayerRecord
from rarefy.report.plots import Picture
from rarefy.sweeps.results import Facts


@dataclass(frozen=True)
class LayerProof:
    """What the written file holds of one layer: zeros ``promised`` and ``counted``, and what is wrong with it."""

    name: str
    pattern: str
    size: int
    promised: int
    counted: int
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class RunView:
    """One pruned model: ``facts`` is its run.json; ``proof`` is empty where no model was written.

    ``dense_texts`` and ``texts`` are what the dense and the pruned model write, as (prompt, text);
    ``no_texts`` says why there are none.
    """

    name: str
    facts: Facts
    layers: Sequence[LayerRecord]
    recipe: str = ""
    proof: Sequence[LayerProof] = ()
    dense_texts: Sequence[tuple[str, str]] = ()
    texts: Sequence[tuple[str, str]] = ()
    no_texts: str = ""

    @property
    def label(self) -> str:
        """Method and pattern, as legends have it."""
        return f"{self.facts['method']}, {self.facts['pattern']}"


@dataclass(frozen=True)
class SweepView:
    """A folder that ``compare`` wrote: compare.json, the dense model's facts, and a view for each cell."""

    name: str
    sweep: Facts
    dense: Facts | None
    cells: Sequence[RunView]
    failed: Sequence[Facts] = ()


@dataclass
class Part:
    """A piece of a section; what is empty is not shown."""

    heading: str = ""
    text: str = ""
    cards: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    folded: str = ""
    left: bool = False
    code: str = ""
    texts: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Section:
    """A titled section of the page."""

    id: str
    title: str
    parts: list[Part]
