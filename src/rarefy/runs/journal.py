"""The journal of a run that is under way: what is finished, so that after a kill the same command goes on.

    OUT/unfinished/journal.json       whose run this is, how many blocks are finished, where the states are
    OUT/unfinished/block-NNNNN.jsonl  the records of one finished block's layers
    OUT/unfinished/weights-*          the pruned weights of one, where the model is in memory
    OUT/unfinished/allocation.json    the pattern of each layer, where it was measured; search.json what led to it
    OUT/unfinished/states-*.bin       the hidden states that enter the first unfinished block
    OUT/unfinished/model/             the model so far
    OUT/unfinished/lock               held while a process works here

A block is finished at the moment when the new journal.json takes the name of the old one; everything that
it speaks of is on the disk by then, and what only the old one spoke of is removed afterwards. So a kill at
any moment leaves one of the two, whole. The folder comes with its journal and loses its name before anything
in it is removed, so a folder ``unfinished`` without a journal is not Rarefy's, and is left alone.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Self

from rarefy.calibration.spill import StatesPart
from rarefy.errors import InputError, OutputError, RankError
from rarefy.models.atomic import (
    adding_folder,
    appears,
    refusals,
    remove_partial,
    replace_file,
    sync_folder,
)
from rarefy.parallel.world import Stopped
from rarefy.pruning.records import LayerRecord
from rarefy.runs.fingerprint import Fingerprint
from rarefy.runs.folder import JOURNAL, is_unfinished_run
from rarefy.runs.schema import parse_records, validated
from rarefy.runs.unfinished import UnfinishedFolder, checksum_of


class _DamageError(OutputError):
    """A file of the finished blocks is missing or damaged, so the same command cannot go on."""


class Journal(UnfinishedFolder):
    """The journal in the output folder of one run; one process at a time holds it.

    ``finished`` blocks are done, so the next one has this number; ``states`` says where the hidden states
    are that enter it. Use it as a context, or ``close`` it. Of several processes that work on the run, one
    ``leads``; on the others it writes nothing, and knows what they tell it (``follow``).
    """

    format = 2

    def __init__(self, output: Path, leads: bool = True) -> None:
        super().__init__(output, leads)
        self.model = self.folder / "model"
        self.states: list[StatesPart] = []
        self._finished = 0
        self._files: dict[str, int] = {}  # the checksums of what is kept
        self._fingerprint: Fingerprint | None = None

    @classmethod
    def find(cls, output: Path) -> Self | None:
        """The journal in the folder ``output``, where there is one; nothing is read."""
        journal = cls(output)
        return journal if is_unfinished_run(journal.folder) else None

    @property
    def finished(self) -> int:
        """The number of finished blocks."""
        return self._finished

    @property
    def goes_on(self) -> bool:
        """Whether there is anything from which the same command goes on."""
        return self._finished > 0 or bool(self._files)  # of blocks, only the process that leads knows the files

    @property
    def kept_words(self) -> str:
        """The subject and verb of a sentence about what is kept."""
        return finished_blocks(self.finished) if self.finished else "what was measured of the dense model is"

    def check(self, fingerprint: Fingerprint) -> None:
        """Read the journal, if there is one yet, and make sure that it is of this run; changes nothing.

        Raises OutputError where it is of another run, naming the difference, or is damaged, or where the folder
        is not Rarefy's.
        """
        if not self.folder.exists():
            self._fingerprint, self._finished, self._files, self.states = fingerprint, 0, {}, []
            return
        if not is_unfinished_run(self.folder):
            raise OutputError.sentence(f"{self.folder} holds no {JOURNAL}, so it is not Rarefy's to write into.")
        content = self.read_journal(fingerprint)
        with self._undamaged(self._journal):
            finished, files = validated(int, content["finished"]), validated(dict[str, int], content["files"])
            states = validated(list[StatesPart], content["states"])
            if any(Path(name).name != name for name in (*files, *(part.file for part in states))):
                raise ValueError("a file in another folder")
        self._fingerprint = fingerprint
        self._finished, self._files, self.states = finished, files, states

    def open(self, fingerprint: Fingerprint) -> Self:
        """Begin, or go on with what is finished: make the folder, hold its lock, remove what is left half done.

        Raises OutputError as ``check`` does, where another process works here, and where the disk refuses.
        """
        if not self._leads:
            return self
        with refusals(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.check(fingerprint)
            if not self.folder.exists():
                self._begin()
            self.hold()
            try:
                self.check(fingerprint)  # nobody else changes it from now on
                self._remove_stale_files()
            except BaseException:
                self.close()
                raise
        return self

    @property
    def position(self) -> tuple[int, dict[str, int], list[StatesPart]]:
        """The number of finished blocks, the checksums of their files, and where the states are, for ``follow``."""
        return self._finished, self._files, self.states

    def follow(self, position: tuple[int, dict[str, int], list[StatesPart]]) -> None:
        """Be where the journal of the process that leads is. Raises OutputError where its folder is not here."""
        self._finished, self._files, self.states = position
        if not self._leads and not appears(self.folder):
            raise OutputError.sentence(
                f"{self.folder.parent} is not the same folder for all processes of the run: name one that all share."
            )

    def keep(self, name: str, content: bytes) -> None:
        """Write a file of the block at hand beside the journal, which names it once the block is finished.

        Raises OutputError.
        """
        replace_file(self.folder / name, content)
        self._files = {**self._files, name: zlib.crc32(content)}

    def remember(self, name: str, content: bytes) -> None:
        """Write a file that belongs to no block beside the journal, and name it there at once.

        All processes call it with the same content; the first writes. Raises OutputError.
        """
        if self._leads:
            self.keep(name, content)
            self._write_journal()
        else:
            self._files = {**self._files, name: zlib.crc32(content)}

    def kept(self, name: str) -> bytes | None:
        """The content of a file that the journal names; None where it has none of that name.

        Raises OutputError where the file is missing or damaged.
        """
        if name not in self._files:
            return None
        path = self.folder / name
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise self.damaged(path, "missing") from error
        except OSError as error:
            raise OutputError.sentence(f"{path} cannot be read: {error.strerror or error}.") from error
        if zlib.crc32(content) != self._files[name]:
            raise self.damaged(path)
        return content

    def finish_block(self, index: int, records: Sequence[LayerRecord], states: Sequence[StatesPart]) -> None:
        """Note that block ``index`` is finished, with the states that enter the next, none after the last.

        The block's weights must be on the disk. Raises OutputError where the disk refuses; then the block
        is not finished, and all before it are.
        """
        if index != self.finished:
            raise ValueError(f"Block {index} was finished, but {self.finished} is the next.")
        before = self.position
        try:
            if self._leads:
                self.keep(_records_of(index), "".join(record.to_json() + "\n" for record in records).encode())
            self._finished, self.states = index + 1, list(states)
            if self._leads:
                self._write_journal()
        except BaseException:
            self._finished, self._files, self.states = before
            raise
        if self._leads:
            self._remove_stale_files()

    def records(self) -> list[LayerRecord]:
        """The records of all finished blocks. Raises OutputError where a file is missing or damaged."""
        records = []
        for index in range(self.finished):
            path = self.folder / _records_of(index)
            try:
                records += parse_records(self.kept(path.name) or b"", path)
            except OutputError:
                raise
            except InputError as error:
                raise self.damaged(path) from error
        return records

    def damaged(self, file: Path, what: str = "damaged") -> OutputError:
        """The error for a file of what is finished that is not there, or holds something else than was written."""
        return _DamageError.sentence(str(super().damaged(file, what)))

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within the scope, what the disk refuses ends the run with a sentence that says what is kept.

        So does the end of another process of the run.
        """
        try:
            with refusals(self.folder):
                yield
        except OutputError as error:
            if not self.goes_on or isinstance(error, _DamageError):
                raise
            raise OutputError.sentence(f"{str(error).rstrip('.')}; {self._kept()}.") from error
        except (RankError, Stopped) as error:
            kept = self._kept() if self.goes_on else "no block was finished yet, and the same command begins anew"
            raise RankError(f"{str(error).rstrip('.')}; {kept}.") from error

    def _kept(self) -> str:
        return f"{self.kept_words} kept, and the same command goes on from there"

    def publish(self, target: Path) -> None:
        """Let the finished model take the name ``target``; done already where it has. Raises OutputError."""
        with refusals(target):
            if self.model.exists():
                self.model.replace(target)
                sync_folder(target.parent)

    # --- Files --------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Make the folder with a journal in it, in which nothing is finished."""
        try:
            with adding_folder(self.folder) as folder:
                self._write_journal(folder)
        except OutputError:
            if not is_unfinished_run(self.folder):  # else another process was quicker
                raise

    def _write_journal(self, folder: Path | None = None) -> None:
        assert self._fingerprint is not None
        content = {
            "format": self.format,
            "fingerprint": asdict(self._fingerprint),
            "finished": self._finished,
            "files": self._files,
            "states": [asdict(part) for part in self.states],
        }
        text = json.dumps({"checksum": checksum_of(content), **content}, indent=1)
        replace_file((folder or self.folder) / JOURNAL, text)

    def _remove_stale_files(self) -> None:
        """Remove what the journal does not speak of; where that fails, nothing is lost but space."""
        known = {part.file for part in self.states} | self._files.keys()
        with suppress(OSError):
            remove_partial(self.folder.parent, self.folder.name)
            remove_partial(self.folder)
            for pattern in ("states-*", "block-*", "weights-*"):
                for file in self.folder.glob(pattern):
                    if file.name not in known:
                        file.unlink()


def finished_blocks(number: int) -> str:
    """The subject and verb of a sentence about finished blocks."""
    return "1 finished block is" if number == 1 else f"{number:,} finished blocks are"


def _records_of(index: int) -> str:
    return f"block-{index:05d}.jsonl"
