"""The options of a sweep, checked as far as that goes without a model: torch is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.calibration.documents import Source
from rarefy.calibration.sources import has_columns, parse_source
from rarefy.errors import InputError
from rarefy.evaluation.texts import parse_texts
from rarefy.models.locate import locate
from rarefy.runs.arguments import check_goes_with_tasks
from rarefy.runs.recipe import DEFAULT_CALIBRATION, as_number
from rarefy.runs.shrink_recipe import ShrinkRecipe
from rarefy.sweeps.options import Options
from rarefy.sweeps.results import LeftOut
from rarefy.sweeps.shrinking import is_shrinking
from rarefy.sweeps.systems import System, check_names, read_systems
from rarefy.sweeps.wanted import Wanted, settings_of, shrinking_cells, wanted_cells

#: Each draws windows of its own, and has a cell for each row: nobody waits for more.
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Checked:
    """Options that are none of the mistakes that can be found without a model.

    ``wanted`` are the cells that prune, each for all seeds, and ``shrinking`` the method and recipe of each that
    makes the model smaller; ``texts`` are to be measured on. ``left_out`` are systems that do not go with a pattern.
    """

    options: Options
    wanted: Sequence[Wanted]
    texts: dict[str, Source]
    calibration: Source
    shrinking: Sequence[tuple[str, ShrinkRecipe]] = ()
    left_out: Sequence[LeftOut] = ()


def check_options(options: Options) -> Checked:
    """Find every mistake in the options that can be found without a model. Raises InputError."""
    systems = read_systems(options.systems) if options.systems is not None else []
    _check_axes(options, systems)
    column = _calibration_column(options)
    common = _common(options, column)
    wanted, left_out = wanted_cells(options, systems, common)
    shrinking = shrinking_cells(options, common)
    _check_settings(options)
    _check_numbers(options)
    locate(options.model)
    texts = parse_texts(options.texts, options.text_column, must_apply=column is None)
    calibration = parse_source(options.calibration or DEFAULT_CALIBRATION, text_column=column)
    return Checked(options, wanted, texts, calibration, shrinking, left_out)


def _common(options: Options, column: str | None) -> dict[str, Any]:
    """The keys of recipes that all cells have in common, as far as they were said."""
    said = {
        "model": options.model,
        "calibration": options.calibration,
        "text_column": column,
        "num_samples": options.num_samples,
        "sequence_length": options.sequence_length,
        "batch_size": options.batch_size,
        "bos": options.bos,
        "device": options.device,
        "dtype": options.dtype,
    }
    return {key: value for key, value in said.items() if value is not None}


def _check_numbers(options: Options) -> None:
    """Raise InputError for numbers out of range, and for options that go with --tasks alone."""
    for argument, number in (
        ("--max-windows", options.max_windows),
        ("--eval-batch-size", options.eval_batch_size),
    ):
        if number is not None and number < 1:
            raise InputError(argument, number, "a whole number of at least 1")
    if options.eval_length is not None and options.eval_length < 2:
        raise InputError("--eval-length", options.eval_length, "a whole number of at least 2 (tokens)")
    limit = options.limit
    if limit is not None and not (0 < limit < 1 or (isinstance(limit, int) and limit >= 1)):
        raise InputError("--limit", limit, "a whole number of at least 1, or a fraction between 0 and 1")
    check_goes_with_tasks(options.tasks, task_data=options.task_data, limit=limit)


def _check_axes(options: Options, systems: Sequence[System]) -> None:
    """Raise InputError where lists are empty or repeat something, or have nothing that they go with."""
    if not options.methods and options.systems is None:
        raise InputError.sentence(
            "--methods is missing: name one or more, such as magnitude,wanda,sparsegpt, or a file of --systems."
        )
    if not 1 <= options.seeds <= _MOST_SEEDS:
        raise InputError("--seeds", options.seeds, f"a whole number from 1 to {_MOST_SEEDS:,}")
    for argument, values in (
        ("--methods", options.methods), ("--sparsity", options.sparsities), ("--pattern", options.patterns),
        ("--size", options.sizes),
    ):  # fmt: skip
        read = [as_number(value) for value in values]  # 0.5 and 0.50 are one
        if repeated := next((value for value, one in zip(values, read) if read.count(one) > 1), None):
            raise InputError.sentence(f"{argument} names {repeated} twice.")
    check_names(systems, options.methods)
    shrinks = [is_shrinking(method) for method in options.methods]
    if any(shrinks) and not options.sizes:
        raise InputError.sentence(
            "--size is missing: the shares of the parameters that are left by shrink:..., such as 0.9,0.8."
        )
    if options.sizes and not any(shrinks):
        raise InputError.sentence("--size goes with methods that make the model smaller, such as shrink:blocks.")
    if all(shrinks) and not systems:
        for argument, said in (
            ("--sparsity", options.sparsities), ("--pattern", options.patterns), ("--scope", options.scope),
            ("--include", options.include), ("--exclude", options.exclude),
            *((f"--{key.replace('_', '-')}", True) for key in options.loop),
        ):  # fmt: skip
            if said:
                raise InputError.sentence(f"{argument} goes with methods that prune, and none of --methods does.")
    if options.scope is not None and not options.sparsities and options.patterns:
        raise InputError.sentence("--scope goes with --sparsity; an N:M pattern says by itself where it prunes.")
    if "along" in options.loop and not options.patterns:
        raise InputError.sentence("--along goes with --pattern: it says what the groups of an N:M pattern are of.")


def _check_settings(options: Options) -> None:
    """Raise InputError where a setting belongs to none of the methods."""
    used = {key for method in options.methods for key in settings_of(method, options.settings)}
    if unused := next((key for key in options.settings if key not in used), None):
        if not options.methods:
            raise InputError.sentence("--set goes with --methods: a system of --systems says its settings itself.")
        raise InputError("--set", unused, "METHOD.KEY=VALUE with METHOD one of " + ", ".join(options.methods))


def _calibration_column(options: Options) -> str | None:
    """The column that the user named, which belongs to all that has columns, if the calibration has some."""
    return options.text_column if has_columns(options.calibration or DEFAULT_CALIBRATION) else None
