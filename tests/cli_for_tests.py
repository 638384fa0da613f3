"""What tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

#: Runs the command line; gives ``.status``, ``.out`` and ``.err``.
Rarefy = Callable[..., SimpleNamespace]


def prune_arguments(shelf: Path, *more: object) -> list[object]:
    """A run that takes a second: eight windows of 32 tokens."""
    text = shelf / "text.txt"
    return ["prune", shelf / "model", "--calibration", text, "--num-samples", 8, "--sequence-length", 32, *more]


def is_one_sentence(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1 and text.rstrip().endswith((".", "?"))


@contextmanager
def stopped_after_one_block() -> Iterator[None]:
    """Within the scope, a run is interrupted when its first block is finished."""
    from rarefy.pruning.stores import JournaledStore

    finish = JournaledStore.finish

    def stop(self: JournaledStore, *arguments: Any) -> None:
        finish(self, *arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JournaledStore, "finish", stop)
        yield
