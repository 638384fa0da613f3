"""What tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

#: Runs the command line; gives ``.status``, ``.out`` and ``.err``.
Rarefy = Callable[..., SimpleNamespace]


def prune_arguments(shelf: Path, *more: object) -> list[object]:
    """A run that takes a second: eight windows of 32 tokens."""
    text = shelf / "text.txt"
    return ["prune", shelf / "model", "--calibration", text, "--num-samples", 8, "--sequence-length", 32, *more]


def is_one_sentence(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1 and text.rstrip().endswith((".", "?"))
