"""The cells that were asked for, each with its recipe: methods and systems, crossed with sparsities and patterns.

A method of the command line that does not go with a pattern is a mistake. A system that goes with some patterns is
left out for the others, with the sentence that says why; one that goes with none is a mistake, and so is a wrong key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rarefy.errors import InputError
from rarefy.runs.recipe import DEFAULT_SPARSITY, STEP_SETTINGS, Recipe, as_number
from rarefy.runs.shrink_recipe import ShrinkRecipe
from rarefy.sweeps.options import Options
from rarefy.sweeps.results import LeftOut
from rarefy.sweeps.shrinking import PREFIX, is_shrinking, shrink_recipe
from rarefy.sweeps.systems import SHARED, System

#: What a system is tried with, to tell one that no pattern goes with from one that does not go with those asked for.
_TRIED: tuple[dict[str, Any], ...] = ({"sparsity": DEFAULT_SPARSITY}, {"pattern": "2:4"})


@dataclass(frozen=True)
class Wanted:
    """A cell that was asked for, of every seed: the ``name`` of its row, its recipe of seed 0, its system if any.

    ``asked`` is the sparsity or pattern as columns of tables have it, such as ``50%`` or ``2:4``.
    """

    name: str
    asked: str
    recipe: Recipe
    system: System | None = None


def nothing_left(one: LeftOut) -> InputError:
    """The error where all cells are left out, of which this is one."""
    return InputError.sentence(f"Nothing is left to compare; {one.name} at {one.asked} is left out: {one.reason}")


def wanted_cells(
    options: Options, systems: Sequence[System], common: Mapping[str, Any]
) -> tuple[list[Wanted], list[LeftOut]]:
    """The cells that prune, and those that are left out. Raises InputError; ``common`` are keys of all recipes."""
    places = list(_places(options))
    wanted: list[Wanted] = []
    left_out: list[LeftOut] = []
    for method in options.methods:
        if not is_shrinking(method):
            recipes = [_of_method(method, options, common, place) for place in places]  # finds what is no number
            wanted += [Wanted(method, _asked(place), recipe) for place, recipe in zip(places, recipes, strict=True)]
    if systems:
        _check_places(places, common)
    for system in systems:
        for found in _of_system(system, options, common, places):
            if isinstance(found, Wanted):
                wanted.append(found)
            else:
                left_out.append(replace(found, system=system.definition()))
    if left_out and not wanted and not options.sizes:
        raise nothing_left(left_out[0])
    return wanted, left_out


def shrinking_cells(options: Options, common: Mapping[str, Any]) -> list[tuple[str, ShrinkRecipe]]:
    """The method and recipe of each cell that makes the model smaller, by seeds. Raises InputError."""
    found = []
    for seed in range(options.seeds):
        for method in filter(is_shrinking, options.methods):
            mine = settings_of(method, options.settings)
            keys = {key.removeprefix(f"{PREFIX}."): value for key, value in mine.items()}
            if taken := next((key for key in keys if key in (*SHARED, "size")), None):
                raise InputError.sentence(f"--set names {PREFIX}.{taken}, which the options of the sweep say.")
            said = {**common, "seed": seed}
            found += [(method, shrink_recipe(method, {**said, "size": size}, keys)) for size in options.sizes]
    return found


def settings_of(method: str, settings: Mapping[str, str]) -> dict[str, str]:
    """The settings that belong to a part of ``method``."""
    names = [PREFIX] if is_shrinking(method) else method.split("+")
    return {key: value for key, value in settings.items() if key.rpartition(".")[0] in names}


def _places(options: Options) -> Iterator[dict[str, Any]]:
    """The keys of each sparsity and each pattern; the scope goes with sparsities, the groups with patterns."""
    scope = {} if options.scope is None else {"scope": options.scope}
    along = {"along": options.loop["along"]} if "along" in options.loop else {}
    sparsities = options.sparsities or (() if options.patterns else (DEFAULT_SPARSITY,))
    for sparsity in sparsities:
        yield {"sparsity": sparsity, **scope}
    for pattern in options.patterns:
        yield {"pattern": pattern, **along}


def _asked(place: Mapping[str, Any]) -> str:
    return str(place["pattern"]) if "pattern" in place else f"{100 * float(place['sparsity']):g}%"


def _check_places(places: Sequence[Mapping[str, Any]], common: Mapping[str, Any]) -> None:
    """Raise InputError where a sparsity or pattern of the command line is none, or a key of all recipes is wrong."""
    for place in places:
        Recipe.read({**common, **place})


def _loop(options: Options) -> dict[str, Any]:
    """What the command line says of the loop, wherever it prunes."""
    said = {key: value for key, value in options.loop.items() if key != "along"}
    globs = {"include": list(options.include), "exclude": list(options.exclude)}
    return {**said, **{key: value for key, value in globs.items() if value}}


def _of_method(method: str, options: Options, common: Mapping[str, Any], place: Mapping[str, Any]) -> Recipe:
    said = {**common, **_loop(options), **place, "method": method}
    if settings := settings_of(method, options.settings):
        said["settings"] = settings
    try:
        return Recipe.read(said)
    except InputError as error:
        raise type(error).sentence(re.sub(r"--method(?=[ :])", "--methods", str(error))) from None


def _of_system(
    system: System, options: Options, common: Mapping[str, Any], places: Sequence[Mapping[str, Any]]
) -> list[Wanted | LeftOut]:
    """What becomes of each place. Raises the first error where the system goes with no pattern at all."""
    own = system.told.values

    def takes(key: str, loop: Mapping[str, Any]) -> bool:
        """Whether a setting of the command line is of a step that the system takes, or of none."""
        switch = STEP_SETTINGS.get(key)
        if switch is None:
            return True
        off = Recipe.model_fields[switch].default
        return bool(as_number(own.get(switch, loop.get(switch, off))) != off)

    def recipe(place: Mapping[str, Any]) -> Recipe:
        said = {**_loop(options), **place}
        # What a system says itself, stays.
        said = {key: value for key, value in said.items() if key not in own and takes(key, said)}
        return Recipe.read({**common, **said}, system.told, allow_code=options.allow_code, keep_fisher=True)

    found: list[Wanted | LeftOut] = []
    errors: list[InputError] = []
    for place in places:
        asked = _asked(place)
        if not system.takes(place):
            reason = f"{system.told.where} is limited to other sparsities or patterns by itself."
            found.append(LeftOut(system.name, asked, reason))
            continue
        try:
            found.append(Wanted(system.name, asked, recipe(place), system))
        except InputError as error:
            errors.append(error)
            found.append(LeftOut(system.name, asked, str(error)))
    if not any(isinstance(one, Wanted) for one in found):
        for place in _TRIED:
            try:
                recipe(place)
                return found
            except InputError as error:
                errors.append(error)
        raise errors[0]
    return found
