"""Reads the systems of a comparison from a TOML file, which may come from anybody: one sentence for a mistake.

    ["LLM-Barber"]
    method = "wanda"
    barber = "published"
    barber_refit = false

    ["ALPS, matched, tuned"]
    method = "alps"
    match = 3
    tune = 3                    # epochs of `rarefy tune` afterwards; or a table of its keys
    patterns = ["2:4"]          # of those of the command line, only these; sparsities likewise

Each table is a row of the comparison. Its keys are those of a recipe (runs/recipe.py), which checks them.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.allocation.names import FILES
from rarefy.errors import InputError, RecipeError
from rarefy.runs.recipe import Recipe, parse_pattern
from rarefy.runs.recipe_file import Told, read_bounded, refuse_unknown
from rarefy.runs.tune_recipe import TuneRecipe
from rarefy.sweeps.shrinking import is_shrinking

#: Keys of a recipe that all cells have in common, and that only the command line says.
SHARED = (
    "model", "calibration", "text_column", "num_samples", "sequence_length", "batch_size", "seed", "bos", "device",
    "dtype", "sparsity", "pattern",
)  # fmt: skip
#: Keys of a tuning that a system may say; its text, windows, seed and dense model are those of the comparison.
_TUNE_KEYS = (
    "held_out", "parametrisation", "rank", "alpha", "learning_rate", "batch_size", "micro_batch", "epochs",
    "max_steps", "warmup_steps", "schedule", "weight_decay", "clip", "text_share", "eval_every", "patience",
    "gradient_checkpointing", "precision",
)  # fmt: skip
_OWN = ("tune", "sparsities", "patterns")
#: A name is a heading in a table.
_LONGEST_NAME = 60


@dataclass(frozen=True)
class System:
    """A row of a comparison: its ``name``, the keys of its recipe, and how it is tuned, if it is.

    ``sparsities`` and ``patterns`` are those that it is limited to, None where it is not.
    """

    name: str
    told: Told
    tune: TuneRecipe | None = None
    sparsities: tuple[float, ...] | None = None
    patterns: tuple[str, ...] | None = None

    def takes(self, place: Mapping[str, Any]) -> bool:
        """Whether the system is not limited to other sparsities or patterns than the one in ``place``."""
        if "pattern" in place:
            return self.patterns is None or place["pattern"] in self.patterns
        return self.sparsities is None or float(place["sparsity"]) in self.sparsities

    def definition(self) -> dict[str, Any]:
        """What makes the system what it is, for the record: cells of two definitions are never in one row."""
        values = dict(self.told.values)
        if (file := values.get("allocation", "")).endswith(FILES):
            values["allocation_file"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
        return values | ({"tune": self.tune.model_dump(include=set(_TUNE_KEYS))} if self.tune else {})


def read_systems(file: Path) -> list[System]:
    """The systems in a TOML file, in its order. Raises RecipeError; recipes are checked where they are made."""
    tables = _read(file)
    if not tables:
        raise RecipeError.sentence(f'{file} has no systems: each is a table such as ["ALPS"] with method = "alps".')
    return [_system(name, table, file) for name, table in tables.items()]


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bounded(file, "file of systems"))
    except OSError as error:
        raise RecipeError.sentence(f"--systems: {file} cannot be read: {error.strerror or error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError.sentence(f"{file} is no TOML file: {_first_line(error)}.") from None
    except (ValueError, RecursionError) as error:  # bytes that are no text, numbers of thousands of digits
        if isinstance(error, RecipeError):
            raise
        raise RecipeError.sentence(f"{file} is no TOML file.") from None


def _first_line(error: Exception) -> str:
    """The message of a parser, which may repeat what it has read."""
    message = " ".join(str(error).split()).rstrip(".")
    return message[:1].lower() + message[1:200]


def _system(name: str, table: Any, file: Path) -> System:
    if not (0 < len(name) <= _LONGEST_NAME and name.isprintable() and name == name.strip() and name != "dense"):
        raise RecipeError(
            f"A name of a system in {file}", name, f"1 to {_LONGEST_NAME} printable characters, not dense"
        )
    if not isinstance(table, dict):
        raise RecipeError.sentence(f'{name} in {file} is no table of keys, such as ["{name}"] with method = "alps".')
    told = Told(table, f'"{name}" of {file}')
    refuse_unknown(table, [*(key for key in Recipe.model_fields if key not in SHARED), *_OWN, *SHARED], told)
    for key in table:
        if key in SHARED:
            hint = {"sparsity": "sparsities = [0.5]", "pattern": 'patterns = ["2:4"]'}.get(key)
            more = f"; {hint} limits a system to some of these" if hint else ""
            raise RecipeError.sentence(
                f"{key} in {told.where} is the same for all systems, so the command line says it{more}."
            )
    if is_shrinking(str(table.get("method"))):
        raise RecipeError.sentence(
            f"method in {told.where} is {table['method']!r}, but a system prunes: --methods and --size compare "
            "what makes a model smaller."
        )
    keys = {key: value for key, value in table.items() if key not in _OWN}
    return System(
        name,
        Told(keys, told.where),
        _tuning(table["tune"], told) if "tune" in table else None,
        _sparsities(table, told),
        _patterns(table, told),
    )


def _tuning(said: Any, told: Told) -> TuneRecipe:
    """A number of epochs, or a table of keys of a tuning."""
    if isinstance(said, bool) or not isinstance(said, int | dict):
        raise RecipeError(f"tune in {told.where}", said, "a number of epochs, or a table such as {epochs = 3}")
    keys = Told(said if isinstance(said, dict) else {"epochs": said}, f"tune of {told.where}")
    refuse_unknown(keys.values, _TUNE_KEYS, keys)
    return TuneRecipe.read({"model": "the pruned model"}, keys)


def _sparsities(table: Mapping[str, Any], told: Told) -> tuple[float, ...] | None:
    found = table.get("sparsities")
    if found is None:
        return None
    numbers = isinstance(found, list) and all(
        isinstance(one, int | float) and not isinstance(one, bool) for one in found
    )
    if not numbers or not all(0 <= one < 1 for one in found):
        raise RecipeError(f"sparsities in {told.where}", found, "a list of numbers in [0, 1), such as [0.5, 0.6]")
    return tuple(map(float, found))


def _patterns(table: Mapping[str, Any], told: Told) -> tuple[str, ...] | None:
    found = table.get("patterns")
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise RecipeError(f"patterns in {told.where}", found, 'a list of texts, such as ["2:4"]')
    for one in found:
        parse_pattern(one, f"patterns in {told.where}")
    return tuple(found)


def folder_name(name: str) -> str:
    """A name for the folder of a system's cells, which no other system and no method has."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9+-]+', '_', name).strip('_') or 'system'}.{digest}"


def check_names(systems: Sequence[System], methods: Sequence[str]) -> None:
    """Raise InputError where a system is called as a method is that is compared as well."""
    if both := next((one.name for one in systems if one.name in methods), None):
        raise InputError.sentence(f"--methods and --systems both have a row called {both}.")
