"""Progress events of a run: what it tells while it works, and the interface of whoever listens.

The command line draws them on a terminal; a call from Python is silent unless it passes a listener.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from rarefy.pruning.records import LayerRecord


class Stage(Protocol):
    """Listens to one stage of a run, such as pruning."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """``done`` of ``total`` parts of the stage are finished."""

    def layer(self, record: LayerRecord) -> None:
        """A layer is pruned."""


class Watch(Protocol):
    """Opens a stage: ``with watch("pruning", linears) as stage: stage(done, total, note)``.

    ``linears`` are the block numbers and names of the layers that the stage will prune.
    """

    def __call__(self, what: str, linears: Sequence[tuple[int, str]] = (), /) -> AbstractContextManager[Stage]: ...


class Events(Protocol):
    """Listens to a whole run; ``rarefy.run(..., events=...)`` takes one."""

    def note(self, text: str) -> None:
        """Something worth knowing that is no result."""

    def warn(self, text: object) -> None:
        """Something that the user should look at."""

    def log(self, text: str) -> None:
        """A line for a log file alone."""

    def watch(self, what: str, linears: Sequence[tuple[int, str]] = ()) -> AbstractContextManager[Stage]:
        """A stage begins."""


class _SilentStage:
    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        pass

    def layer(self, record: LayerRecord) -> None:
        pass


class Silent:
    """Ignores every event but warnings, which become Python's."""

    def note(self, text: str) -> None:
        pass

    def warn(self, text: object) -> None:
        import warnings

        warnings.warn(str(text), stacklevel=2)

    def log(self, text: str) -> None:
        pass

    def watch(self, what: str, linears: Sequence[tuple[int, str]] = ()) -> AbstractContextManager[Stage]:
        return nullcontext(_SilentStage())


def unwatched(what: str, linears: Sequence[tuple[int, str]] = (), /) -> AbstractContextManager[Stage]:
    """A ``Watch`` that ignores its stage."""
    return nullcontext(_SilentStage())
