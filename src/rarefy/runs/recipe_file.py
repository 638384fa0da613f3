"""Reads the YAML of a recipe, which may come from anybody: plain values only, and one sentence for all else."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rarefy.errors import RecipeError

#: A recipe has a few hundred bytes in two levels.
_MOST_BYTES, _MOST_LEVELS = 2**18, 10


@dataclass(frozen=True)
class Told:
    """Keys and values that a file says; ``where`` is what errors call it, such as ``run.yaml``."""

    values: Mapping[str, Any]
    where: str

    @classmethod
    def by(cls, file: Path | Told | None) -> Told | None:
        """What a YAML file says, or what is told already. Raises RecipeError."""
        return cls(read_yaml(file), str(file)) if isinstance(file, Path) else file


def read_bounded(file: Path, what: str) -> str:
    """The text of a small file, ``what`` it should be. Raises RecipeError where it is larger, OSError, ValueError."""
    with file.open("rb") as opened:
        content = opened.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise RecipeError.sentence(f"{file} is no {what}: it has more than {_MOST_BYTES:,} bytes.")
    return content.decode()


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values in ``file``. Raises RecipeError, which names the line where there is one to name."""
    try:
        found = yaml.load(read_bounded(file, "recipe"), Loader=_Loader)
    except OSError as error:
        raise RecipeError.sentence(f"The recipe {file} cannot be read: {error.strerror or error}.") from error
    except _Refused as error:
        raise RecipeError.sentence(f"The recipe {file} {error.problem}{_line(error)}.") from None
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text, numbers of thousands of digits
        if isinstance(error, RecipeError):
            raise
        raise RecipeError.sentence(f"The recipe {file} is no YAML file{_line(error)}.") from None
    if not isinstance(found, dict):
        raise RecipeError.sentence(f"The recipe {file} must hold lines of KEY: VALUE.")
    return found


def refuse_unknown(keys: Iterable[object], known: Collection[str], told: Told | None) -> None:
    """Raise RecipeError where one of ``keys`` is not ``known``; it says where that was told, if it was."""
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; its keys are {', '.join(known)}."
            where = f" in {told.where}" if told is not None and key in told.values else ""
            raise RecipeError.sentence(f"{str(key)[:100]}{where} is no key of a recipe{hint}")


def _line(error: Exception) -> str:
    where = getattr(error, "problem_mark", None)
    return f" (line {where.line + 1})" if where else ""


class _Refused(yaml.MarkedYAMLError):
    """YAML that is none of a recipe; ``problem`` says why."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """YAML as people write it today: 2:4 is text (YAML 1.1 reads 124), 1e-3 is a number, no is text.

    Aliases (a few lines of which stand for billions of values), tags and deep nesting are refused, and so is a key
    that is there twice.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class's attribute)
        first: [(tag, regex) for tag, regex in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _Refused("has an alias, which no recipe needs", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _Refused("has a tag, which no recipe needs", event.start_mark)
        if self._level == _MOST_LEVELS:
            raise _Refused("is nested too deeply for a recipe", event.start_mark)
        self._level += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("has a key that is no word", key.start_mark)
            if key.value in seen:
                raise _Refused(f"has the key {key.value} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_EXPONENT = r"(?:[eE][-+]?[0-9]+)?"
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(rf"^[-+]?(?:[0-9]+\.?[0-9]*{_EXPONENT}|\.[0-9]+{_EXPONENT}|\.(?:inf|nan))$"),
    list("-+.0123456789"),
)
