"""Tensors inside of what blocks take and return: tuples, lists, mappings and dataclasses, nested in any way."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch import Tensor

#: The way to a tensor from outside: indices, keys and names of fields.
Place = tuple[Any, ...]


class Leaf:
    """Base of classes that are no containers here, though they may hold something."""


def children(value: Any) -> Iterator[tuple[Any, Any]]:
    """The elements of a container with their index, key or name of field; none for a value that is no container."""
    if isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif isinstance(value, MutableMapping):
        yield from value.items()
    elif dataclasses.is_dataclass(value) and not isinstance(value, (type, Leaf)):
        yield from ((each.name, getattr(value, each.name)) for each in dataclasses.fields(value))


def tensors_in(value: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """All tensors in ``value``, each with its place in it."""
    if isinstance(value, Tensor):
        yield place, value
    for key, child in children(value):
        yield from tensors_in(child, (*place, key))


def mapped(value: Any, change: Callable[[Place, Any], Any], place: Place = ()) -> Any:
    """A copy of ``value`` with ``change(place, leaf)`` for everything in it that is no container."""
    held = {key: mapped(child, change, (*place, key)) for key, child in children(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*held.values())
    if type(value) in (tuple, list):
        return type(value)(held.values())
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        for key, child in held.items():
            result[key] = child
        return result
    if held:
        result = copy.copy(value)
        for key, child in held.items():
            setattr(result, key, child)
        return result
    return change(place, value)


def at(value: Any, place: Place) -> Any:
    """The part of ``value`` at ``place``. Raises LookupError where there is no such place."""
    for key in place:
        value = dict(children(value))[key]
    return value
