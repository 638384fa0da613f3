"""What the user of a sweep asked for, as it was written; ``check`` finds the mistakes in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """What the user asked for. Texts and numbers as they were written: ``plan`` checks them.

    Lists are the axes of the sweep; ``seeds`` is their number. ``settings`` are METHOD.KEY: VALUE. Methods that make
    the model smaller (shrinking.py) go with ``sizes``, the others with ``sparsities`` and ``patterns``, and so do the
    ``systems`` of a file (systems.py). ``loop`` has keys of recipes (LOOP) for all cells that prune.
    """

    model: str
    methods: Sequence[str] = ()
    systems: Path | None = None
    sparsities: Sequence[str] = ()
    patterns: Sequence[str] = ()
    sizes: Sequence[str] = ()
    seeds: int = 1
    scope: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    calibration: str | None = None
    text_column: str | None = None
    num_samples: str | int | None = None
    sequence_length: str | int | None = None
    batch_size: str | int | None = None
    bos: bool = False
    device: str = "auto"
    dtype: str = "auto"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    texts: Sequence[str] = ()
    eval_length: int | None = None
    max_windows: int | None = None
    eval_batch_size: int = 1
    tasks: Sequence[str] = ()
    task_data: str | Path | None = None
    limit: int | float | None = None
    save: bool = False
    retry: bool = False
    loop: Mapping[str, Any] = field(default_factory=dict)
    allow_code: bool = False
