"""A stream of hidden states saved with all that crosses blocks beside them, and loaded again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rarefy.calibration.spill import PRUNED, StatesPart, load_states, save_states
from rarefy.calibration.stream import HiddenStates


def save_stream(
    folder: Path, block: int, stream: HiddenStates, first: int = 0, *, path: str = PRUNED
) -> list[StatesPart]:
    """Save what enters ``block``, of windows ``first`` and on, into files of ``folder``. Raises OutputError."""
    parts = [save_states(folder, block, stream.states, first, stream.release, path=path)]
    for name, rows in stream.carried.values.items():
        parts.append(save_states(folder, block, rows.tensor, first, rows.release, path=path, carried=name))
    return parts


def load_stream(
    folder: Path, parts: Sequence[StatesPart], stream: HiddenStates, first: int = 0, *, path: str = PRUNED
) -> None:
    """Fill ``stream``, windows ``first`` and on, with what ``save_stream`` saved of that path.

    Raises OutputError where a file is missing or damaged, or the parts do not hold this stream.
    """
    by_name: dict[str, list[StatesPart]] = {"": []}
    for part in parts:
        if part.path == path:
            by_name.setdefault(part.carried, []).append(part)
    load_states(folder, by_name.pop(""), stream.states, first, stream.release)
    for name, some in by_name.items():
        shape = (len(stream.states), *some[0].shape[1:])
        tensor = stream.carried.add(name, shape, getattr(torch, some[0].dtype))
        load_states(folder, some, tensor, first, stream.carried.release)
