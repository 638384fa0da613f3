"""What a run leaves on disk, and how it gets there: every file appears whole or not at all.

OUT/recipe.yaml    what was asked for, with every default said
OUT/layers.jsonl   one line per pruned layer (report/records.py)
OUT/model/         an ordinary Hugging Face folder
OUT/run.json       command, versions, times, results; written last: a folder without it is unfinished
OUT/unfinished/    while a run is under way, what is finished of it (progress.py)
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rarefy.errors import InputError, OutputError
from rarefy.pruning.records import LayerRecord, read_records


class RunFolder:
    """The output folder of one run; it does nothing on disk until it is told to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.layers = self.path / "layers.jsonl"
        self.model = self.path / "model"
        self.run = self.path / "run.json"
        self.unfinished = self.path / "unfinished"

    @classmethod
    def find(cls, path: str | Path) -> Self | None:
        """The run folder that ``path`` is, or whose ``model`` it is; None where it is neither."""
        path = Path(path)
        for candidate in (path, path.absolute().parent if path.absolute().name == "model" else None):
            if candidate is not None and (folder := cls(candidate)).layers.is_file() and folder.model.is_dir():
                return folder
        return None

    def check(self) -> None:
        """Make sure that a run can be written here, and leave no trace of it.

        A folder that holds an unfinished run and nothing else will do. Raises OutputError where the folder
        is otherwise not empty, is no folder, or nothing can be written.
        """
        if self.path.is_symlink() and not self.path.exists():
            raise OutputError("--output", str(self.path), "a folder, not a link to nothing")
        try:
            if self.path.exists() and not self.path.is_dir():
                raise OutputError("--output", str(self.path), "a folder, not a file")
            if self.path.is_dir() and self._has_others():
                raise OutputError("--output", str(self.path), "a new or empty folder; this one is not empty")
            existing = self.path
            while not existing.exists():
                existing = existing.parent
            # Permission bits do not tell all (root, read-only file systems): try it.
            Path(tempfile.mkdtemp(prefix=".rarefy-", dir=existing)).rmdir()
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutputError("--output", str(self.path), f"a folder that can be written ({reason})") from error

    def _has_others(self) -> bool:
        """Whether something is in the folder that is not of an unfinished run."""
        if not self.unfinished.is_dir():
            return any(self.path.iterdir())
        own = (self.recipe, self.layers, self.model, self.run)
        known = {self.unfinished.name, *(file.name for file in own)}
        partial = tuple(f".{file.name}." for file in own)
        return any(file.name not in known and not file.name.startswith(partial) for file in self.path.iterdir())

    def remove_partial_files(self) -> None:
        """Remove what a killed process left half written here."""
        for file in (self.recipe, self.layers, self.model, self.run):
            for partial in self.path.glob(f".{file.name}.*"):
                if partial.is_dir():
                    shutil.rmtree(partial, ignore_errors=True)
                else:
                    partial.unlink(missing_ok=True)

    @contextmanager
    def writing(self, keep: Callable[[BaseException], bool] = lambda _: False) -> Iterator[None]:
        """Make the folder, and take back all that was written if the block inside fails.

        Nothing is taken back after an error for which ``keep`` is true, and ``unfinished`` never is. Raises
        OutputError where the disk refuses.
        """
        made = [folder for folder in (self.path, *self.path.absolute().parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            yield
        except BaseException as error:
            if keep(error):
                raise
            for file in (self.run, self.layers, self.recipe):
                file.unlink(missing_ok=True)
            shutil.rmtree(self.model, ignore_errors=True)
            for folder in made:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            if isinstance(error, OSError):
                raise OutputError.sentence(
                    f"{self.path} cannot be written: {error.strerror or error}; nothing was left there."
                ) from error
            raise

    def write_recipe(self, text: str) -> None:
        """Write ``recipe.yaml``."""
        write_atomically(self.recipe, text)

    def write_layers(self, records: Iterable[LayerRecord]) -> None:
        """Write ``layers.jsonl``, one line per record."""
        write_atomically(self.layers, "".join(record.to_json() + "\n" for record in records))

    def write_run(self, facts: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        write_atomically(self.run, json.dumps(facts, indent=2) + "\n")

    def write_model(self, save: Callable[[Path], None]) -> None:
        """Let ``save`` fill a folder, which becomes ``model`` once it has returned, in place of one that was it."""
        partial = self.path / f".model.{os.getpid()}"
        try:
            partial.mkdir()
            save(partial)
            if self.model.exists():
                shutil.rmtree(self.model)
            partial.replace(self.model)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def write_card(self, text: str) -> None:
        """Write the model card, which is the README.md of the model folder."""
        write_atomically(self.model / "README.md", text)

    def read_run(self) -> dict[str, Any]:
        """What ``run.json`` holds. Raises InputError where the run is unfinished or the file damaged."""
        try:
            facts = json.loads(self.run.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError.sentence(f"{self.path} holds an unfinished run: it has no run.json.") from None
        except (OSError, ValueError) as error:
            raise InputError.sentence(f"{self.run} cannot be read: {error}.") from error
        if not isinstance(facts, dict):
            raise InputError.sentence(f"{self.run} is damaged: it must hold one JSON object.")
        return facts

    def read_layers(self) -> list[LayerRecord]:
        """The records in ``layers.jsonl``. Raises InputError where the file is missing or damaged."""
        try:
            return read_records(self.layers)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError.sentence(f"{self.layers} cannot be read: {error}.") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary sibling, then give it the name: readers see the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
