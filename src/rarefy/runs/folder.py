"""What a run leaves on disk, and how it gets there: every file and folder appears whole or not at all.

OUT/recipe.yaml    what was asked for, with every default said
OUT/layers.jsonl   one line per pruned layer (pruning/records.py)
OUT/model/         an ordinary Hugging Face folder
OUT/run.json       command, versions, times, results; written last: a folder without it is unfinished
OUT/unfinished/    while a run is under way, what is finished of it (journal.py)

A packed run (packed.py) has the model's files beside these, instead of in a folder of their own.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from rarefy.errors import InputError, OutputError
from rarefy.models.atomic import refusals, remove_partial, replace_file, replacing_folder, unfinished_name
from rarefy.pruning.records import LayerRecord

#: The journal within ``unfinished``, by which Rarefy knows that the folder is its own.
JOURNAL = "journal.json"


class RunFolder:
    """The output folder of one run; it changes nothing on disk until it is told to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.layers = self.path / "layers.jsonl"
        self.model = self.path / "model"
        with suppress(OSError):  # of a name that no file can have
            if (self.path / "config.json").is_file():
                self.model = self.path
        self.run = self.path / "run.json"
        self.unfinished = self.path / "unfinished"

    @classmethod
    def find(cls, path: str | Path) -> Self | None:
        """The run folder that ``path`` is, or whose ``model`` it is; None where it is neither."""
        path = Path(path)
        with suppress(OSError):  # of a name that no file can have
            for candidate in (path, path.absolute().parent if path.absolute().name == "model" else None):
                if candidate is not None and (folder := cls(candidate)).is_written:
                    return folder
        return None

    @property
    def is_written(self) -> bool:
        """Whether a run has left its records or its facts here, and a model."""
        return (self.layers.is_file() or self.run.is_file()) and self.model.is_dir()

    def check(self) -> None:
        """Make sure that a run can be written here, and leave no trace of it.

        A folder that holds an unfinished run and nothing else will do. Raises OutputError where the folder
        is otherwise not empty, is no folder, or nothing can be written.
        """
        with _usable(self.path):
            if self.path.is_dir():
                self._check_content()

    def _check_content(self) -> None:
        """Raise OutputError where something is in the folder that is not of an unfinished run."""
        names = {path.name for path in self.path.iterdir()}
        own = {path.name for path in (self.recipe, self.layers, self.model, self.run, self.unfinished)}
        partial = {name for name in names if unfinished_name(name) in own}
        if self.unfinished.name in names and not is_unfinished_run(self.unfinished):
            raise OutputError.sentence(
                f"{self.unfinished} is no unfinished run of this release of Rarefy (it has no {JOURNAL}), and a run "
                "needs that name: choose another folder."
            )
        # A run that was killed while it removed its journal has left that under another name.
        begun = self.unfinished.name in {*names, *map(unfinished_name, partial)}
        if names - own - partial if begun else names:
            raise OutputError("--output", str(self.path), "a new or empty folder; this one is not empty")

    def remove_partial(self) -> None:
        """Remove what a killed process left half written here."""
        with refusals(self.path):
            remove_partial(
                self.path, *(path.name for path in (self.recipe, self.layers, self.model, self.run, self.unfinished))
            )

    @contextmanager
    def writing(self, keep: Callable[[BaseException], bool] = lambda _: False) -> Iterator[None]:
        """Make the folder, and take back all that was written if the block inside fails.

        No file is taken back after an error for which ``keep`` is true, ``unfinished`` never is, and folders that
        were made and stayed empty always are. Raises OutputError where the disk refuses.
        """
        made = [folder for folder in (self.path, *self.path.absolute().parents) if not folder.exists()]
        try:
            with refusals(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                yield
        except BaseException as error:
            kept = keep(error)
            if not kept:
                for file in (self.run, self.layers, self.recipe):
                    file.unlink(missing_ok=True)
                shutil.rmtree(self.model, ignore_errors=True)
            for folder in made:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            if not kept and isinstance(error, OutputError):
                raise OutputError.sentence(f"{str(error).rstrip('.')}; nothing was left there.") from error
            raise

    def write_recipe(self, text: str) -> None:
        """Write ``recipe.yaml``. Raises OutputError, as all that writes here."""
        replace_file(self.recipe, text)

    def write_layers(self, records: Iterable[LayerRecord]) -> None:
        """Write ``layers.jsonl``, one line per record."""
        replace_file(self.layers, "".join(record.to_json() + "\n" for record in records))

    def write_run(self, facts: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        replace_file(self.run, json.dumps(facts, indent=2) + "\n")

    def write_model(self, save: Callable[[Path], None]) -> None:
        """Let ``save`` fill a folder, which becomes ``model`` once it has returned, in place of one that was it."""
        with replacing_folder(self.model) as partial:
            save(partial)

    def write_card(self, text: str) -> None:
        """Write the model card, which is the README.md of the model folder."""
        replace_file(self.model / "README.md", text)

    def read_run(self) -> dict[str, Any]:
        """What ``run.json`` holds. Raises InputError where the run is unfinished or the file damaged."""
        from rarefy.runs.schema import RunFacts, read_facts

        if not self.run.exists():
            raise InputError.sentence(f"{self.path} holds an unfinished run: it has no run.json.")
        return read_facts(self.run, RunFacts)

    def read_layers(self) -> list[LayerRecord]:
        """The records in ``layers.jsonl``.

        Raises InputError where the file is missing or damaged, names a layer twice, or has not as many as
        ``run.json`` says.
        """
        from rarefy.runs.schema import read_records

        records = read_records(self.layers)
        names = {record.name for record in records}
        said = self.read_run().get("layers") if self.run.exists() else None
        if len(names) < len(records) or (isinstance(said, int) and said != len(records)):
            of = f"run.json says {said:,}" if isinstance(said, int) else f"only {len(names):,} names"
            raise InputError.sentence(f"{self.layers} is damaged: it has {len(records):,} layers, but {of}.")
        return records


def is_unfinished_run(folder: Path) -> bool:
    """Whether ``folder`` is the ``unfinished`` of a run; a link is not, for what is behind it is somebody's."""
    return folder.is_dir() and not folder.is_symlink() and (folder / JOURNAL).is_file()


def check_new(path: Path) -> None:
    """Make sure that ``path`` is a new or empty folder, or can become one, and leave no trace of it.

    Raises OutputError.
    """
    with _usable(path):
        if path.is_dir() and any(path.iterdir()):
            raise OutputError("--output", str(path), "a new or empty folder; this one is not empty")


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Check that something can be written into the folder ``path``, after the checks of the block inside."""
    try:
        if path.is_symlink() and not path.exists():
            raise OutputError("--output", str(path), "a folder, not a link to nothing")
        if path.exists() and not path.is_dir():
            raise OutputError("--output", str(path), "a folder, not a file")
        yield
        existing = path
        while not existing.exists() and existing != existing.parent:  # a drive of Windows may be missing
            existing = existing.parent
        # Permission bits do not tell all (root, read-only file systems): try it.
        Path(tempfile.mkdtemp(prefix=".rarefy-", dir=existing)).rmdir()
    except OSError as error:
        raise OutputError(
            "--output", str(path), f"a folder that can be written ({error.strerror or error})"
        ) from error
