"""The options of a sweep, checked as far as that goes without a model: torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rarefy.calibration.documents import Source
from rarefy.calibration.sources import has_columns, parse_source
from rarefy.errors import InputError
from rarefy.evaluation.texts import parse_texts
from rarefy.models.locate import locate
from rarefy.runs.arguments import check_goes_with_tasks
from rarefy.runs.recipe import DEFAULT_CALIBRATION, DEFAULT_SPARSITY, Recipe, as_number
from rarefy.runs.shrink_recipe import ShrinkRecipe
from rarefy.sweeps.shrinking import PREFIX, is_shrinking, shrink_recipe


@dataclass(frozen=True)
class Options:
    """What the user asked for. Texts and numbers as they were written: ``plan`` checks them.

    Lists are the axes of the sweep; ``seeds`` is their number. ``settings`` are METHOD.KEY: VALUE. Methods that make
    the model smaller (shrinking.py) go with ``sizes``, the others with ``sparsities`` and ``patterns``.
    """

    model: str
    methods: Sequence[str]
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


@dataclass(frozen=True)
class Checked:
    """Options that are none of the mistakes that can be found without a model.

    ``recipes`` has one recipe for each cell that prunes, those of a seed together, and ``shrinking`` the method and
    recipe of each that makes the model smaller; ``texts`` are to be measured on.
    """

    options: Options
    recipes: Sequence[Recipe]
    texts: dict[str, Source]
    calibration: Source
    shrinking: Sequence[tuple[str, ShrinkRecipe]] = ()


def check_options(options: Options) -> Checked:
    """Find every mistake in the options that can be found without a model. Raises InputError."""
    recipes, shrinking = _recipes(options)
    _check_numbers(options)
    locate(options.model)
    column = _calibration_column(options)
    texts = parse_texts(options.texts, options.text_column, must_apply=column is None)
    calibration = parse_source(options.calibration or DEFAULT_CALIBRATION, text_column=column)
    return Checked(options, recipes, texts, calibration, shrinking)


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


def _recipes(options: Options) -> tuple[list[Recipe], list[tuple[str, ShrinkRecipe]]]:
    """One recipe per cell, those of a seed together: of cells that prune, and of those that shrink."""
    if not options.methods:
        raise InputError.sentence("--methods is missing: name one or more, such as magnitude,wanda,sparsegpt.")
    if options.seeds < 1:
        raise InputError("--seeds", options.seeds, "a whole number of at least 1")
    for argument, values in (
        ("--methods", options.methods), ("--sparsity", options.sparsities), ("--pattern", options.patterns),
        ("--size", options.sizes),
    ):  # fmt: skip
        read = [as_number(value) for value in values]  # 0.5 and 0.50 are one
        if repeated := next((value for value, one in zip(values, read) if read.count(one) > 1), None):
            raise InputError.sentence(f"{argument} names {repeated} twice.")
    _check_axes(options)
    places: list[dict[str, Any]] = [{"sparsity": value, "scope": options.scope} for value in options.sparsities]
    places += [{"pattern": value} for value in options.patterns]
    if options.scope is not None and not options.sparsities and options.patterns:
        raise InputError.sentence("--scope goes with --sparsity; an N:M pattern says by itself where it prunes.")
    places = places or [{"sparsity": DEFAULT_SPARSITY, "scope": options.scope}]
    common: dict[str, Any] = {
        "model": options.model,
        "calibration": options.calibration,
        "text_column": _calibration_column(options),
        "num_samples": options.num_samples,
        "sequence_length": options.sequence_length,
        "batch_size": options.batch_size,
        "bos": options.bos,
        "device": options.device,
        "dtype": options.dtype,
    }
    globs: dict[str, Any] = {"include": list(options.include), "exclude": list(options.exclude)}
    used: set[str] = set()
    recipes = []
    shrinking = []
    for seed in range(options.seeds):
        for method in options.methods:
            mine = _settings_of(method, options.settings)
            used |= mine.keys()
            if is_shrinking(method):
                keys = {key.removeprefix(f"{PREFIX}."): value for key, value in mine.items()}
                if taken := next((key for key in keys if key in (*common, "seed", "size")), None):
                    raise InputError.sentence(f"--set names {PREFIX}.{taken}, which the options of the sweep say.")
                said = {key: value for key, value in {**common, "seed": seed}.items() if value is not None}
                shrinking += [(method, shrink_recipe(method, {**said, "size": size}, keys)) for size in options.sizes]
                continue
            for place in places:
                said = {**common, **globs, **place, "method": method, "settings": mine or None, "seed": seed}
                try:
                    recipes.append(Recipe.read({key: value for key, value in said.items() if value is not None}))
                except InputError as error:
                    if str(error).startswith("--method "):
                        raise type(error).sentence("--methods" + str(error).removeprefix("--method")) from None
                    raise
    if unused := next((key for key in options.settings if key not in used), None):
        raise InputError("--set", unused, "METHOD.KEY=VALUE with METHOD one of " + ", ".join(options.methods))
    return recipes, shrinking


def _check_axes(options: Options) -> None:
    """Raise InputError where sizes or sparsities have no method that they go with, or the other way round."""
    shrinks = [is_shrinking(method) for method in options.methods]
    if any(shrinks) and not options.sizes:
        raise InputError.sentence(
            "--size is missing: the shares of the parameters that are left by shrink:..., such as 0.9,0.8."
        )
    if options.sizes and not any(shrinks):
        raise InputError.sentence("--size goes with methods that make the model smaller, such as shrink:blocks.")
    if all(shrinks):
        for argument, said in (
            ("--sparsity", options.sparsities), ("--pattern", options.patterns), ("--scope", options.scope),
            ("--include", options.include), ("--exclude", options.exclude),
        ):  # fmt: skip
            if said:
                raise InputError.sentence(f"{argument} goes with methods that prune, and none of --methods does.")


def _calibration_column(options: Options) -> str | None:
    """The column that the user named, which belongs to all that has columns, if the calibration has some."""
    return options.text_column if has_columns(options.calibration or DEFAULT_CALIBRATION) else None


def _settings_of(method: str, settings: Mapping[str, str]) -> dict[str, str]:
    """The settings that belong to a part of ``method``."""
    names = [PREFIX] if is_shrinking(method) else method.split("+")
    return {key: value for key, value in settings.items() if key.rpartition(".")[0] in names}
