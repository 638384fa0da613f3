"""How names and settings of methods are read: without torch, so that a mistake in them is answered at once.

``check`` takes methods from ``described.json``, which holds of each what a mistake can be seen by; ``table.build``
does the same with the methods themselves. A test holds both equal, and ``make methods`` writes the file.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields, make_dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from rarefy.errors import MethodError

Setting = str | int | float | bool

#: Hyperparameters are smaller than what torch counts with; a recipe may say anything.
_MOST = 2**63


@runtime_checkable
class Settable(Protocol):
    """What is read of a method here: a frozen dataclass of hyperparameters."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    name: ClassVar[str]
    needs_start: ClassVar[bool]
    takes_start: ClassVar[bool]
    comes_last: ClassVar[bool]


AnyMethod = TypeVar("AnyMethod", bound=Settable)


# --- Hyperparameters --------------------------------------------------------------------------------------


def hyper(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | tuple[int, ...] = (),
    by: str = "",
) -> Any:
    """A hyperparameter: its default, what it means, and the values it may take (bounds included).

    A default of None is a number that is chosen ``by`` something else where it is not given.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "by": by}
    return field(default=default, metadata=metadata)


def hyperparameters(method: Settable) -> dict[str, object]:
    """The hyperparameters of a method with their values, in order."""
    return {item.name: getattr(method, item.name) for item in fields(method) if item.name != "parts"}


def check_hyperparameters(method: Settable) -> None:
    """Raise MethodError where a field has the wrong type, is out of range or not among its choices."""
    for item in fields(method):
        if "help" not in item.metadata:
            continue  # a part of a combination, or a field of a user's own class
        value, default = getattr(method, item.name), item.default
        low, high, choices = (item.metadata[key] for key in ("low", "high", "choices"))
        argument = f"{method.name}.{item.name}"
        if choices:
            if value not in choices or type(value) is not type(default):
                raise MethodError(argument, value, "one of " + ", ".join(map(str, choices)))
        elif value is None and default is None:
            continue
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                raise MethodError(argument, value, "true or false")
        elif default is None or isinstance(default, (int, float)):
            kind = "a whole number" if isinstance(default, int) else "a number"
            right = isinstance(value, int if isinstance(default, int) else (int, float))
            allowed = kind + _bounds(low, high)
            if isinstance(value, bool) or not right or not _within(value, low, high):
                raise MethodError(argument, value, allowed)


def _within(value: float, low: float | None, high: float | None) -> bool:
    return abs(value) < _MOST and (low is None or value >= low) and (high is None or value <= high)


def _bounds(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    return f" of at least {low:g}" if low is not None else ""


# --- From what the user wrote to methods ------------------------------------------------------------------


def check(name: str, settings: Mapping[str, Setting] | None = None) -> list[Settable]:
    """The parts of a method, without importing any of Rarefy's. Raises MethodError where ``build`` would."""
    parts = assemble(name, settings, _described)
    check_order(parts)
    return parts


def assemble(
    name: str, settings: Mapping[str, Setting] | None, lookup: Callable[[str], AnyMethod]
) -> list[AnyMethod]:
    """The parts of the method called ``name``, from ``lookup``, with their hyperparameters changed by ``settings``.

    Raises MethodError.
    """
    names = part_names(name)
    parts = [_import(part) if ":" in part else lookup(part) for part in _split(name)]
    for key, value in (settings or {}).items():
        index, field_name = _find(key, names, parts)
        parts[index] = _changed(parts[index], key, field_name, value)
    if parts[0].needs_start:
        raise cannot_come_first(parts[0])
    return parts


def check_order(parts: Iterable[Settable]) -> None:
    """Raise MethodError unless the first of ``parts`` needs no start, the others take one, and the last one may end.

    What ``comes_last`` leaves its weights on a grid, which any later part would leave again.
    """
    first, *others = parts
    if first.needs_start:
        raise cannot_come_first(first)
    for part in [first, *others][:-1]:
        if part.comes_last:
            dense = getattr(part, "gives_dense", False)
            does = "gives the product of two factors" if dense else "rounds what other parts found"
            raise MethodError.sentence(f"{part} {does}, so it can only be the last part.")
    for part in others:
        if not part.takes_start:
            raise MethodError.sentence(f"{part} starts afresh, so it can only be the first part of a combination.")


def cannot_come_first(method: Settable) -> MethodError:
    """The error for a method that only improves a start, used without one."""
    return MethodError.sentence(
        f"{method} improves what another method found, so it cannot come first: write for example wanda+{method}."
    )


def unknown_method(name: str, known: Iterable[str]) -> MethodError:
    """The error for a name that no method has, with the nearest one that one has."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return MethodError("method", name, "one of " + ", ".join(known) + ", or package.module:Class" + hint)


def part_names(name: str) -> list[str]:
    """The names of a combination's parts; the second ``pcg`` in it is called ``pcg2``."""
    names = _split(name)
    return [
        part if part not in names[:index] else f"{part}{names[: index + 1].count(part)}"
        for index, part in enumerate(names)
    ]


def _split(name: str) -> list[str]:
    return [part.strip() for part in str(name).split("+")]


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(
        files("rarefy.methods").joinpath("described.json").read_text("utf-8")
    )
    return table


def _described(name: str) -> Settable:
    """A dataclass with the hyperparameters of a method of Rarefy's, and no more of it."""
    table = _table()
    if name not in table:
        raise unknown_method(name, table)
    entry = dict(table[name])
    items = [(key, object, hyper(help="", **item)) for key, item in entry.pop("hyperparameters").items()]
    namespace = {**entry, "__post_init__": check_hyperparameters, "__str__": lambda _: name}
    described: Settable = make_dataclass(entry["name"], items, frozen=True, namespace=namespace)()
    return described


def _import(path: str) -> Any:
    module_name, _, class_name = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # whatever its author's code raises
        raise MethodError.sentence(f"method is {path!r}, but it cannot be imported: {error}.") from error
    method = importlib.import_module("rarefy.methods.base").Method
    if not (isinstance(cls, type) and issubclass(cls, method)):
        raise MethodError("method", path, "a subclass of rarefy.Method")
    try:
        return cls()
    except TypeError as error:
        raise MethodError.sentence(
            f"method is {path!r}, but it cannot be made without arguments: {error}."
        ) from error


def _find(key: str, names: list[str], parts: list[AnyMethod]) -> tuple[int, str]:
    """Which part a setting belongs to, and the name of its field there."""
    prefix, _, field_name = key.rpartition(".")
    if prefix and prefix not in names:
        raise MethodError("set", key, "KEY or PART.KEY with PART one of " + ", ".join(names))
    owners = [i for i, part in enumerate(parts) if field_name in hyperparameters(part) and prefix in ("", names[i])]
    if not owners:
        known = [item for i, part in enumerate(parts) for item in hyperparameters(part) if prefix in ("", names[i])]
        nearest = difflib.get_close_matches(field_name, known, n=1, cutoff=0.4)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        whose = prefix or "+".join(names)
        if not known:
            raise MethodError.sentence(f"set is {key!r}, but {whose} has no hyperparameters.")
        raise MethodError.sentence(
            f"set is {key!r}, but {whose} has no hyperparameter of that name: it must be one of "
            f"{', '.join(known)}{hint}."
        )
    if len(owners) > 1:
        raise MethodError.sentence(
            f"set is {key!r}, which several parts have: write "
            + " or ".join(f"{names[i]}.{field_name}" for i in owners)
            + "."
        )
    return owners[0], field_name


def _changed(part: AnyMethod, key: str, field_name: str, value: Setting) -> AnyMethod:
    default = next(item.default for item in fields(part) if item.name == field_name)
    if isinstance(value, str) and default is not MISSING and not isinstance(default, str):
        value = _parsed(key, value, float if default is None else type(default))
    wants_float = default is None or isinstance(default, float)
    if wants_float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST:
        value = float(value)
    return replace(part, **{field_name: value})


def _parsed(key: str, text: str, kind: type) -> Setting:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return int(text) if kind is int else float(text)
    except (KeyError, ValueError):
        names = {bool: "true or false", int: "a whole number", float: "a number"}
        raise MethodError("set " + key, text, names.get(kind, kind.__name__)) from None
