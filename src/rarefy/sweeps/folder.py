"""The output folder of a sweep: cells appear whole or not at all, results are written anew after each.

Several processes may work on one folder: each cell, the file that says what the sweep is, and the results have a
lock, and a process takes a cell that no other holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rarefy.errors import InputError, OutputError
from rarefy.models.atomic import refusals, remove_partial, replace_file, replacing_folder, unfinished_name
from rarefy.runs.fingerprint import versions
from rarefy.runs.folder import RunFolder, check_new
from rarefy.runs.locks import BusyError, lock
from rarefy.sweeps.markdown import to_markdown
from rarefy.sweeps.results import LeftOut, summarise, to_csv

#: What a difference between two commands is called.
_WORDS = {
    "model": "MODEL",
    "weights": "the weights of MODEL",
    "calibration_text": "the text of --calibration",
    "texts": "--text",
    "text_contents": "the contents of --text",
    "settings": "--set",
    "task_data": "the files of --task-data",
}
_LOCK = ".lock"
#: The name under which the lock of the whole sweep stands among those of its cells.
_SWEEP = "sweep"
_RESULTS = ("results.csv", "results.md", "results.json")


class SweepFolder:
    """The output folder of a sweep; it does nothing on disk until it is told to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.sweep = self.path / "compare.json"
        self.cells = self.path / "cells"

    @property
    def exists(self) -> bool:
        """Whether there is a sweep in the folder."""
        return self.sweep.is_file()

    def check(self) -> None:
        """Raise OutputError unless the folder is empty, can be made, or holds a sound sweep, else InputError."""
        # Looked at twice, as another process may begin in between.
        if not self.exists and not self._is_about_to_begin() and not self.exists:
            check_new(self.path)
        if not self.exists:
            return
        self.read_sweep()
        self.finished()
        self.read_cell("dense")
        for folder in self.cells.iterdir() if self.cells.is_dir() else ():
            if not folder.name.startswith(".") and not _holds_run(folder):
                raise OutputError.sentence(f"{folder} is no cell of a sweep: it has no run.json.")

    def _is_about_to_begin(self) -> bool:
        """Whether another process is in ``begin``, or was killed in it, and there is nothing else in the folder."""
        if not self.cells.is_dir():
            return False
        names = [path.name for path in (*self.path.iterdir(), *self.cells.iterdir()) if path != self.cells]
        return all(name.startswith(".") and name.endswith((_LOCK, ".partial")) for name in names)

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raise OutputError, naming the difference, where the folder's sweep measures something else."""
        if not self.exists:
            return
        there = self.read_sweep()["settings"]
        for key in dict.fromkeys([*settings, *there]):
            value = settings.get(key)
            if there.get(key) != value:
                what = _WORDS.get(key, "--" + key.replace("_", "-"))
                if isinstance(value, str) and len(value) == 16 and key not in ("model", "calibration"):
                    change = f"{what} changed"
                else:
                    change = f"{what} was {_said(there.get(key))} and is {_said(value)} now"
                raise OutputError.sentence(
                    f"{self.path} holds a sweep of another command: {change}. Repeat that command, with more methods "
                    "or seeds if you like, or name another folder."
                )

    def check_rows(self, rows: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Raise OutputError where a row of these names is of another system in the folder.

        ``rows`` has the definition of the system of each row by its name, None for a method.
        """
        known = [(cell["method"], cell.get("system")) for cell in self.finished()]
        if self.exists:  # of which another process may compute the first cell now
            known += self.read_sweep().get("rows", {}).items()
        for name, system in known:
            if name in rows and system != rows[name]:
                raise OutputError.sentence(
                    f'{self.path} holds a sweep in which "{name}" was defined otherwise: give what changed another '
                    "name, or name another folder."
                )

    def begin(
        self,
        facts: Mapping[str, Any],
        rows: Mapping[str, Mapping[str, Any] | None],
        wanted: Collection[tuple[str, str]],
        left_out: Sequence[LeftOut],
        command: str = "",
    ) -> None:
        """Make the folder and say in it what the sweep is; clear away what killed processes left.

        ``command`` joins those that have worked in the folder before.
        What is ``left_out`` joins what earlier commands on the folder left out, unless that is ``wanted`` now (a row
        and a column), or of one of these ``rows`` that was defined otherwise. Raises OutputError where the disk
        refuses, or another process has begun another sweep in the folder.
        """

        def holds(one: Mapping[str, Any]) -> bool:
            system = one.get("system")
            return (one["name"], one["asked"]) not in wanted and rows.get(one["name"], system) == system

        with refusals(self.path):
            self.cells.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self.check_same(facts["settings"])  # once more, as another process may have begun meanwhile
            self.check_rows(rows)
            self._clear()
            before = self.read_sweep() if self.exists else {}
            known = [*filter(holds, before.get("left_out", [])), *map(vars, left_out)]
            content = {
                **facts,
                "commands": [*dict.fromkeys([*before.get("commands", []), command])],
                "rows": {**before.get("rows", {}), **{name: rows[name] for name, _ in wanted}},
                "left_out": [*{(one["name"], one["asked"]): one for one in known}.values()],
            }
            replace_file(self.sweep, json.dumps(content, indent=2) + "\n")

    def read_sweep(self) -> dict[str, Any]:
        """What ``compare.json`` holds. Raises InputError where it is damaged or there is none."""
        from rarefy.runs.schema import SweepFacts, read_facts

        return read_facts(self.sweep, SweepFacts)

    def read_cell(self, name: str) -> dict[str, Any] | None:
        """The facts of a finished cell; None where it is not finished. Raises InputError where they are damaged."""
        from rarefy.runs.schema import CellFacts, read_facts

        file = self.cells / name / "run.json"
        try:
            return read_facts(file, CellFacts) if file.is_file() else None
        except InputError:
            if file.is_file():
                raise
            return None  # another process has just put it aside, to try the cell again

    def finished(self) -> list[dict[str, Any]]:
        """The facts of all finished cells except the dense one, each with its folder's name under ``cell``."""
        names = sorted(file.parent.name for file in self.cells.glob("*/run.json"))
        kept = [name for name in names if name != "dense" and not name.startswith(".")]
        found = [(name, self.read_cell(name)) for name in kept]
        return [{"seed": 0, "reason": "", **facts, "cell": name} for name, facts in found if facts]

    @contextmanager
    def claim(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Hold the cell called ``name``; whether it is held, which another process can keep it from being.

        ``wait`` until that one is done. What a killed process left half written of the cell is removed. Whoever
        holds a cell looks whether it is finished by now. Raises OutputError where the disk refuses.
        """
        file = self.cells / f".{name}{_LOCK}"
        try:
            with refusals(file):
                free = lock(file, -1 if wait else 0)
        except BusyError:
            yield False
            return
        if free is None:
            yield True
            return
        try:
            with refusals(self.path):
                remove_partial(self.cells, name)
            yield True
        finally:
            with suppress(OSError):  # as on Windows, where an open file keeps its name
                file.unlink()
            free()

    def _clear(self) -> None:
        """Remove what killed processes left of cells that nobody holds, and of what is of the whole sweep."""
        with refusals(self.path):
            remove_partial(self.path, self.sweep.name, *_RESULTS)
            left = [path.name for path in self.cells.iterdir()]
        names = {name[1:].removesuffix(_LOCK) for name in left if name.startswith(".") and name.endswith(_LOCK)}
        for name in {*names, *filter(None, map(unfinished_name, left))} - {_SWEEP}:
            with self.claim(name):
                pass

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no other process writes what is of the whole sweep."""
        with self.claim(_SWEEP, wait=True):
            yield

    def write_cell(self, name: str, fill: Callable[[RunFolder], None]) -> None:
        """Let ``fill`` write into a folder, which becomes the cell once it has returned. Raises OutputError."""
        with replacing_folder(self.cells / name) as partial:  # in place of a failed one that is tried again
            fill(RunFolder(partial))

    def write_results(self, in_order: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Write the three files of results anew, of all finished cells as they are put ``in_order``; these."""
        with self._alone():
            cells = in_order(self.finished())
            self._write_results(cells)
        return cells

    def _write_results(self, cells: Sequence[Mapping[str, Any]]) -> None:
        dense, sweep = self.read_cell("dense"), self.read_sweep()
        left_out = [LeftOut(one["name"], one["asked"], one["reason"]) for one in sweep.get("left_out", [])]
        content = {
            "commands": sweep.get("commands", []),
            "versions": versions(),
            "settings": sweep["settings"],
            "rows": sweep.get("rows", {}),
            "dense": dense,
            "summary": [vars(one) for one in summarise(cells)],
            "left_out": [vars(one) for one in left_out],
            "cells": list(cells),
        }
        replace_file(self.path / "results.csv", to_csv(cells))
        replace_file(self.path / "results.md", to_markdown(cells, dense, sweep, left_out))
        replace_file(self.path / "results.json", json.dumps(content, indent=2) + "\n")


def _holds_run(folder: Path) -> bool:
    """Whether a cell's folder has its facts, or is not there any more; one that is replaced is gone for a moment."""
    return (folder / "run.json").is_file() or not folder.exists() or (folder / "run.json").is_file()


def _said(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, dict):
        return ",".join(str(one) for one in value.values()) or "not given"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "not given"
    return str(value)
