"""The texts that ``--text`` names, each with a label that stands in tables, and whether they are sound."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rarefy.calibration.documents import Source
from rarefy.calibration.sources import has_columns, parse_source
from rarefy.errors import InputError


def parse_texts(texts: Sequence[str], text_column: str | None = None, must_apply: bool = True) -> dict[str, Source]:
    """The texts that ``--text`` names, by label; the held-out third of Python's documentation for none.

    A text is a file, wikitext2, python-docs or hub:..., or LABEL= and one of these. Without a label, a file
    is called as its name is, and as its folder and name are where two would be the same. ``text_column`` is
    that of every text that has columns; one must, where it ``must_apply``. Raises CalibrationError where a text
    is missing, empty or binary, InputError where two have one label.
    """
    sources: dict[str, Source] = {}
    with_columns = 0
    for text in texts or ("python-docs",):
        found = re.fullmatch(r"([\w.-]+)=(.+)", text)
        named = found if found and not Path(text).exists() else None
        name = named[2] if named else text
        column = text_column if text_column is not None and has_columns(name) else None
        with_columns += column is not None
        source = parse_source(name, argument="--text", part="evaluation", text_column=column)
        label = named[1] if named else _label(text)
        if label in sources and named is None:
            label = f"{Path(text).parent.name}-{label}"
        if label in sources:
            raise InputError.sentence(f"--text gives two texts the label {label}: write LABEL=TEXT.")
        sources[label] = source
    if text_column is not None and must_apply and not with_columns:
        raise InputError("--text-column", text_column, "left out, because no text has columns")
    return sources


# Of compression first, behind which the others stand.
_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".txt", ".raw", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def _label(text: str) -> str:
    if text.startswith("hub:"):
        return re.sub(r"[^\w.-]+", "-", text[4:])
    name = Path(text).name
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "text"
