"""The output folder of a sweep: cells appear whole or not at all, results are written anew after each."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rarefy.errors import InputError, OutputError
from rarefy.runs.fingerprint import versions
from rarefy.runs.folder import RunFolder, write_atomically
from rarefy.sweeps.results import summarise, to_csv, to_markdown

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
        """Raise OutputError unless the folder is empty, can be made, or holds a sweep."""
        if not self.exists:
            RunFolder(self.path).check()

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raise OutputError, naming the difference, where the folder's sweep measures something else."""
        if not self.exists:
            return
        there = self.read_sweep()["settings"]
        for key, value in settings.items():
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

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Make the folder and say in it what the sweep is; clear away what a killed command left."""
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            for left in self.cells.glob(".*"):
                shutil.rmtree(left, ignore_errors=True)
            write_atomically(self.sweep, json.dumps(facts, indent=2) + "\n")
        except OSError as error:
            raise OutputError("--output", str(self.path), f"a folder that can be written ({error})") from error

    def read_sweep(self) -> dict[str, Any]:
        """What ``compare.json`` holds. Raises InputError where it is damaged or there is none."""
        found = _read_object(self.sweep)
        if not isinstance(found.get("settings"), dict):
            raise InputError.sentence(f"{self.sweep} is damaged: it says nothing of a sweep.")
        return found

    def read_cell(self, name: str) -> dict[str, Any] | None:
        """The facts of a finished cell; None where it is not finished."""
        file = self.cells / name / "run.json"
        return _read_object(file) if file.is_file() else None

    def finished(self) -> list[dict[str, Any]]:
        """The facts of all finished cells except the dense one, each with its folder's name under ``cell``."""
        names = sorted(file.parent.name for file in self.cells.glob("*/run.json"))
        kept = [name for name in names if name != "dense" and not name.startswith(".")]
        return [{**(self.read_cell(name) or {}), "cell": name} for name in kept]

    def write_cell(self, name: str, fill: Callable[[RunFolder], None]) -> None:
        """Let ``fill`` write into a folder, which becomes the cell once it has returned."""
        partial = self.cells / f".{name}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            fill(RunFolder(partial))
            shutil.rmtree(self.cells / name, ignore_errors=True)  # of a failed one that is tried again
            partial.replace(self.cells / name)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def write_results(self, cells: Sequence[Mapping[str, Any]], command: str) -> None:
        """Write the three files of results anew."""
        dense = self.read_cell("dense")
        settings = self.read_sweep()["settings"]
        content = {
            "command": command,
            "versions": versions(),
            "settings": settings,
            "dense": dense,
            "summary": [vars(one) for one in summarise(cells)],
            "cells": list(cells),
        }
        write_atomically(self.path / "results.csv", to_csv(cells))
        write_atomically(self.path / "results.md", to_markdown(cells, dense, settings, command))
        write_atomically(self.path / "results.json", json.dumps(content, indent=2) + "\n")


def _said(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, dict):
        return ",".join(str(one) for one in value.values()) or "not given"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "not given"
    return str(value)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError.sentence(f"{file} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise InputError.sentence(f"{file} is damaged: it must hold one JSON object.")
    return found
