"""Documents, each plain text or a conversation, and the interface of the sources that give them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rarefy.errors import CalibrationError

# What stands between two documents: an empty line, as between paragraphs, and as the papers join WikiText rows.
SEPARATOR = "\n\n"

Part = Literal["calibration", "evaluation"]


class CalibrationWarning(UserWarning):
    """The run goes on, but its calibration is not what it looks like."""


@dataclass(frozen=True)
class Conversation:
    """Messages that a chat template makes one text of; ``place`` says where they stand ("line 3").

    Each message has a ``role`` and a ``content``, which is text, and whatever else a template may ask for.
    """

    messages: tuple[Mapping[str, Any], ...]
    place: str

    @property
    def characters(self) -> int:
        """The length of all contents; what a template adds is not counted."""
        return sum(len(message["content"]) for message in self.messages)

    @property
    def is_blank(self) -> bool:
        return not any(message["content"].strip() for message in self.messages)


Document = str | Conversation


class Source(ABC):
    """Text that was found sound as far as that can be told without reading the hub or loading a model.

    ``name`` is what the user wrote, ``characters`` the length of the text where it is known.
    """

    name: str
    characters: int | None = None

    @property
    def capped(self) -> bool:
        """Whether reading stops once there is enough, because nobody wants to fetch the rest."""
        return False

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents in their order; CalibrationError where they cannot be had."""


def refused(name: str, what: str) -> CalibrationError:
    """The error that says about the source ``name`` what is wrong with it: ``'a.txt' is empty.``"""
    return CalibrationError.sentence(f"{name!r} {what}.")


def first_line(error: BaseException) -> str:
    """The start of another library's message, without its full stop, to fit into a sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def joined(names: Iterable[Any], most: int = 12) -> str:
    """The names of columns in one line; of many or long ones only the beginnings."""
    short = [shortened(name) for name in names]
    more = f" and {len(short) - most} more" if len(short) > most else ""
    return ", ".join(short[:most]) + more or "none"


def shortened(name: Any, most: int = 40) -> str:
    """A name from a file, which may be anything, as it can stand in a sentence."""
    words = " ".join(str(name).split())
    return words if len(words) <= most else words[: most - 3] + "..."
