"""How work says how far it is, and to whom: the command line draws it, a library call shows nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from rarefy.report.records import LayerRecord


class Stage(Protocol):
    """Shows how far a stage is."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """Part ``done`` of ``total`` is finished."""

    def layer(self, record: LayerRecord) -> None:
        """A layer is pruned."""


class Watch(Protocol):
    """Makes what shows a stage: ``with watch("pruning", linears) as stage: stage(done, total, note)``.

    ``linears`` are numbers of blocks and names of the layers that the stage will prune.
    """

    def __call__(self, what: str, linears: Sequence[tuple[int, str]] = (), /) -> AbstractContextManager[Stage]: ...


class _Unseen:
    """A stage that nobody watches."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        pass

    def layer(self, record: LayerRecord) -> None:
        pass


def unwatched(what: str, linears: Sequence[tuple[int, str]] = (), /) -> AbstractContextManager[Stage]:
    """Shows nothing."""
    return nullcontext(_Unseen())
