"""The journal of a tuning that is under way: after a kill the same command goes on from the last state kept.

    OUT/unfinished/journal.json    whose tuning this is, and which files hold what
    OUT/unfinished/state-N.pt      after N steps: what is trained, the optimiser's own, all that was recorded
    OUT/unfinished/best-N.pt       what was trained when the held-out windows were predicted best
    OUT/unfinished/windows.safetensors   the windows, where the dense model wrote some of them
    OUT/unfinished/dense-*         what was recorded of the dense model (teacher.py)
    OUT/unfinished/lock            held while a process works here
    OUT/unfinished/process-R/      state and best of process R, where there are several

Files are whole before journal.json speaks of them, and removed only when it no longer does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from rarefy.models.atomic import adding_folder, refusals, remove_partial, replace_file, replacing
from rarefy.parallel.world import World
from rarefy.runs.fingerprint import Fingerprint
from rarefy.runs.folder import JOURNAL, is_unfinished_run
from rarefy.runs.schema import validated
from rarefy.runs.unfinished import UnfinishedFolder, checksum_of


class TuneJournal(UnfinishedFolder):
    """The journal in the output folder of one tuning; one run at a time holds it. Use it as a context.

    Of several processes of a run (``world``), each keeps what it holds, and the first says in journal.json what
    all have kept. ``opened`` says whether the folder is this run's: until then, what is in it may be another's.
    """

    format = "tuning 1"
    kind = "tuning"

    def __init__(self, output: Path, world: World | None = None) -> None:
        self._world = world or World()
        super().__init__(output, leads=self._world.leads)
        self._own = self.folder if self._world.leads else self.folder / f"process-{self._world.rank}"
        self._content: dict[str, Any] = {"format": self.format, "state": None, "best": None, "recorded": None}
        self.opened = False

    def open(self, fingerprint: Fingerprint) -> Self:
        """Begin, or go on with what is there. Raises OutputError where another tuning or process is at work here."""
        try:
            with self._world.together(), refusals(self.folder):
                if self._world.leads:
                    self.folder.parent.mkdir(parents=True, exist_ok=True)
                    self.check(fingerprint)
                    self._content["fingerprint"] = asdict(fingerprint)
                    if not self.folder.exists():
                        with adding_folder(self.folder) as folder:
                            self._write(folder)
                    self.hold()
                    self.check(fingerprint)  # nobody else changes it from now on
            self._content = self._world.from_first(lambda: self._content)
            with self._world.together(), refusals(self.folder):
                self._own.mkdir(parents=True, exist_ok=True)
                self._remove_stale_files()
        except BaseException:
            self.close()
            raise
        self.opened = True
        return self

    def check(self, fingerprint: Fingerprint) -> None:
        """Make sure that what is there is of this tuning. Raises OutputError, which names the difference."""
        if not is_unfinished_run(self.folder):
            return
        content = self.read_journal(fingerprint)
        with self._undamaged(self._journal):
            for key in ("state", "best"):
                validated(int | None, content[key])  # type: ignore[arg-type]
        self._content = content

    @property
    def steps(self) -> int:
        """How many steps the state that is kept has made; 0 where none is kept."""
        return int(self._content["state"] or 0)

    @property
    def recorded(self) -> dict[str, Any] | None:
        """The description of the dense model's recorded files that ``note_recorded`` got; None where none are."""
        found: dict[str, Any] | None = self._content["recorded"]
        return found

    def note_recorded(self, what: Mapping[str, Any]) -> None:
        """Note that the files recorded of the dense model are on the disk; ``what`` describes them."""
        self._content["recorded"] = dict(what)
        if self._world.leads:
            self._write()

    def keep_best(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Keep what is trained as it is after ``step`` steps, as the best so far; noted with the next state."""
        with self._world.together():
            _save(self._file("best", step), dict(values))
        self._content["best"] = step

    def keep_state(self, step: int, state: Mapping[str, Any]) -> None:
        """Keep all that is needed to go on after ``step`` steps."""
        with self._world.together():
            _save(self._file("state", step), dict(state))
        self._content["state"] = step
        with self._world.together():
            if self._world.leads:
                self._write()
        self._remove_stale_files()

    def state(self) -> dict[str, Any] | None:
        """The last state that was kept; None where none was. Raises OutputError where it is damaged."""
        return self._load("state")

    def best(self) -> dict[str, Tensor] | None:
        """The best parameters that were kept; None where none were. Raises OutputError where they are damaged."""
        return self._load("best")

    # --- Files ---------------------------------------------------------------------------------------------

    def _file(self, kind: str, step: int) -> Path:
        return self._own / f"{kind}-{step:07d}.pt"

    def _load(self, kind: str) -> dict[str, Any] | None:
        step = self._content[kind]
        if step is None:
            return None
        file = self._file(kind, step)
        try:
            found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise self.damaged(file) from error
        return found

    def _write(self, folder: Path | None = None) -> None:
        content = {"checksum": checksum_of(self._content), **self._content}
        replace_file((folder or self.folder) / JOURNAL, json.dumps(content, indent=1))

    def _remove_stale_files(self) -> None:
        """Remove what journal.json does not speak of; where that fails, nothing is lost but space."""
        kept = [(kind, self._content[kind]) for kind in ("state", "best") if self._content[kind] is not None]
        known = {self._file(kind, step) for kind, step in kept}
        with suppress(OSError):
            remove_partial(self.folder.parent, self.folder.name)
            remove_partial(self._own)
            for pattern in ("state-*.pt", "best-*.pt"):
                for file in self._own.glob(pattern):
                    if file not in known:
                        file.unlink()


def _save(file: Path, content: Any) -> None:
    with replacing(file) as opened:
        torch.save(content, opened)
