"""``rarefy methods``: the methods with their hyperparameters, variants told apart by what they change."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rarefy.methods.base import Method


def methods() -> None:
    """List the methods: what each does, its hyperparameters with defaults, its paper."""
    from rarefy.methods import METHODS, hyperparameters

    first: dict[type[Method], str] = {}
    for name, method in METHODS.items():
        base = first.setdefault(type(method), name)
        values = hyperparameters(method)
        if base == name:
            paper = f" ({method.paper})" if method.paper else ""
            print(f"{name}: {method.summary}{paper}; {_place(name, method)}")
        else:
            usual = hyperparameters(METHODS[base])
            values = {key: value for key, value in values.items() if value != usual[key]}
            print(
                f"{name}: {base} with {', '.join(f'{key}={value}' for key, value in values.items())}; else the same"
            )
        for item in fields(method):
            if "help" in item.metadata and item.name in values:
                choices = f" ({', '.join(map(str, item.metadata['choices']))})" if item.metadata["choices"] else ""
                value = values[item.name]
                default = f"={value}" if value is not None else f", by {item.metadata['by']}"
                print(f"    --set {item.name}{default}    {item.metadata['help']}{choices}")
    print("\nMethods are joined by +, each going on from the one before it: --method wanda+swaps+pcg.")


def _place(name: str, method: Method) -> str:
    """Where in a combination the method may stand, and where it prunes if it comes first."""
    if method.needs_start:
        return f"needs a start: wanda+{name}"
    where = "first or later" if method.takes_start else "first"
    return f"scope {method.default_scope}; comes {where}"
