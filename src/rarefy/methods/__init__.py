"""The table of methods: command-line names, and how a name and its settings become a method."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace

from rarefy.errors import MethodError
from rarefy.methods.admm import ADMM
from rarefy.methods.alps import ALPS, ALPSPaper
from rarefy.methods.base import Method, cannot_come_first
from rarefy.methods.compose import Then
from rarefy.methods.dsnot import DSnoT
from rarefy.methods.magnitude import Magnitude
from rarefy.methods.refit import PCG, Backsolve
from rarefy.methods.ria import RIA
from rarefy.methods.sparsefw import SparseFW
from rarefy.methods.sparsegpt import SparseGPT
from rarefy.methods.swaps import Swaps
from rarefy.methods.wanda import Wanda

#: Every name of ``--method`` with the method it stands for; adding a method is one line here.
METHODS: dict[str, Method] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "ria": RIA(),
    "sparsegpt": SparseGPT(),
    "admm": ADMM(),
    "admm-reselect": ADMM(schedule="reselect"),
    "admm1": ADMM(schedule="fixed"),
    "alps": ALPS(),
    "alps-paper": ALPSPaper(),
    "sparsefw": SparseFW(),
    "swaps": Swaps(),
    "dsnot": DSnoT(),
    "pcg": PCG(),
    "backsolve": Backsolve(),
}

Setting = str | int | float | bool


def build(name: str, settings: Mapping[str, Setting] | None = None) -> Method:
    """The method called ``name`` with its hyperparameters changed by ``settings``.

    ``name`` is one of METHODS, several joined by ``+``, or ``package.module:Class`` for a method of
    the user's own. A setting's key is a hyperparameter, or ``part.hyperparameter`` where methods are
    combined; text values are read as the type of the default. Raises MethodError.
    """
    parts = [_lookup(part.strip()) for part in str(name).split("+")]
    names = _part_names(name)
    for key, value in (settings or {}).items():
        index, field_name = _find(key, names, parts)
        parts[index] = _changed(parts[index], key, field_name, value)
    if parts[0].needs_start:
        raise cannot_come_first(parts[0])
    return parts[0] if len(parts) == 1 else Then(*parts)


def hyperparameters(method: Method) -> dict[str, object]:
    """The hyperparameters of a method with their values, in order."""
    return {item.name: getattr(method, item.name) for item in fields(method) if item.name != "parts"}


def all_settings(name: str, method: Method) -> dict[str, Setting]:
    """Every hyperparameter of ``build(name)`` by the key that its settings know it by, with its value."""
    parts = method.parts if isinstance(method, Then) else (method,)
    return {
        key if len(parts) == 1 else f"{part_name}.{key}": value
        for part_name, part in zip(_part_names(name), parts, strict=True)
        for key, value in hyperparameters(part).items()
        if isinstance(value, (str, int, float, bool))
    }


def _part_names(name: str) -> list[str]:
    """The names of a combination's parts; the second ``pcg`` in it is called ``pcg2``."""
    names = [part.strip() for part in str(name).split("+")]
    return [
        part if part not in names[:index] else f"{part}{names[: index + 1].count(part)}"
        for index, part in enumerate(names)
    ]


def _lookup(name: str) -> Method:
    if ":" in name:
        return _import(name)
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise MethodError("method", name, "one of " + ", ".join(METHODS) + ", or package.module:Class" + hint)
    return METHODS[name]


def _import(path: str) -> Method:
    module_name, _, class_name = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise MethodError.sentence(f"method is {path!r}, but it cannot be imported: {error}.") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise MethodError("method", path, "a subclass of rarefy.Method")
    try:
        return cls()
    except TypeError as error:
        raise MethodError.sentence(
            f"method is {path!r}, but it cannot be made without arguments: {error}."
        ) from error


def _find(key: str, names: list[str], parts: list[Method]) -> tuple[int, str]:
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


def _changed(part: Method, key: str, field_name: str, value: Setting) -> Method:
    default = next(item.default for item in fields(part) if item.name == field_name)
    if isinstance(value, str) and default is not MISSING and not isinstance(default, str):
        value = _parsed(key, value, float if default is None else type(default))
    if (default is None or isinstance(default, float)) and isinstance(value, int) and not isinstance(value, bool):
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
