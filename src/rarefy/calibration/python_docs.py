"""The language documentation that every CPython carries, as text that needs no download, in two parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rarefy.calibration.documents import SEPARATOR, Document, Part, Source
from rarefy.errors import CalibrationError


@dataclass(frozen=True)
class PythonDocs(Source):
    """One of the two parts of the documentation, which share no paragraph."""

    name: str
    part: Part

    def documents(self) -> Iterator[Document]:
        yield python_docs(self.part)


def python_docs(part: Part) -> str:
    """The first two thirds ("calibration", about 75,000 tokens) or the last ("evaluation") of Python's topics.

    The topics of ``pydoc_data.topics`` are taken in alphabetical order and parted at the topic in which two
    thirds of the characters are reached. Some topics repeat paragraphs of others ("with" stands in "compound"
    too): the evaluation part leaves out every paragraph that the calibration part has, so that nothing is
    evaluated that was calibrated on. The text differs from one version of Python to the next.
    CalibrationError where this Python carries no documentation.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CalibrationError.sentence(
            "This Python comes without pydoc_data.topics, its documentation; name a text file instead."
        ) from None
    names = sorted(topics)
    total = sum(len(topics[name]) for name in names)
    calibration: list[str] = []
    taken = 0
    while 3 * taken < 2 * total:
        calibration.append(topics[names[len(calibration)]])
        taken += len(calibration[-1])
    if part == "calibration":
        return SEPARATOR.join(calibration)
    seen = {_normal(paragraph) for topic in calibration for paragraph in topic.split(SEPARATOR)}
    held_out = [
        paragraph
        for name in names[len(calibration) :]
        for paragraph in topics[name].split(SEPARATOR)
        if _normal(paragraph) not in seen
    ]
    return SEPARATOR.join(held_out)


def _normal(paragraph: str) -> str:
    """A paragraph without its indentation and line breaks, which differ where one topic quotes another."""
    return " ".join(paragraph.split())
