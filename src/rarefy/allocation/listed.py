"""``--allocation FILE``: sparsities by glob on full module names, from a JSON object or a CSV file of two columns.

    {"*.self_attn.*": 0.5, "model.layers.0.*": 0.3}          or          *.self_attn.*,0.5

The last glob that matches a layer decides; layers that none matches get the sparsity of the run. The file is taken
at its word: the total is what follows from it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rarefy.allocation.budget import Layer
from rarefy.errors import InputError

_LARGEST = 2**24  # bytes of such a file


def read_listed(path: Path) -> dict[str, float]:
    """The globs of ``path`` and their sparsities, in order. Raises InputError where it has something else."""
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError("--allocation", str(path), f"a file of at most {_LARGEST:,} bytes")
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise InputError.sentence(f"--allocation {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError:
        raise InputError.sentence(f"--allocation {path} is no text.") from None
    except ValueError:  # of a name that no file can have
        raise InputError("--allocation", str(path), "the path of a file") from None
    try:
        entries = list(json.loads(text).items()) if path.suffix == ".json" else _rows(text)
        found = {str(glob): float(value) for glob, value in entries}
    except (csv.Error, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise InputError.sentence(
            f"--allocation {path} is no list of sparsities: it must be a JSON object or CSV rows of glob and number."
        ) from None
    for glob, value in found.items():
        if not 0 <= value < 1:
            raise InputError(f"the sparsity of {glob} in {path}", value, "a number in [0, 1)")
    if not found:
        raise InputError.sentence(f"--allocation {path} names no layer.")
    return found


def listed(layers: Sequence[Layer], sparsity: float, globs: dict[str, float], source: str) -> dict[str, float]:
    """The sparsity of each layer by name. Raises InputError for a glob that matches none."""
    for glob in globs:
        if not any(fnmatchcase(layer.name, glob) for layer in layers):
            raise InputError.sentence(f"{glob!r} in {source} matches no layer that is pruned.")
    return {
        layer.name: next((globs[g] for g in reversed(globs) if fnmatchcase(layer.name, g)), sparsity)
        for layer in layers
    }


def _rows(text: str) -> list[list[str]]:
    """The rows of a CSV file; a first row without a number is its heading."""
    rows = [row for row in csv.reader(text.splitlines()) if row]
    if rows and len(rows[0]) == 2:
        try:
            float(rows[0][1])
        except ValueError:
            rows = rows[1:]
    if any(len(row) != 2 for row in rows):
        raise ValueError
    return rows
