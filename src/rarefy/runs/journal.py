"""The journal of a run that is under way: what is finished, so that after a kill the same command goes on.

    OUT/unfinished/progress.json      whose run this is, how many blocks are finished, where the states are
    OUT/unfinished/block-NNNNN.jsonl  the records of one finished block's layers
    OUT/unfinished/states-*.bin       the hidden states that enter the first unfinished block
    OUT/unfinished/model/             the model so far
    OUT/unfinished/lock               held while a process works here

A block is finished at the moment when the new progress.json takes the name of the old one; everything that
it speaks of is on the disk by then, and what only the old one spoke of is removed afterwards. So a kill at
any moment leaves one of the two, whole.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from rarefy.calibration.spill import StatesPart
from rarefy.errors import OutputError, RankError
from rarefy.models.atomic import appears, refusals, remove_partial_files, replace_file, sync_folder
from rarefy.parallel.world import Stopped
from rarefy.pruning.records import LayerRecord
from rarefy.runs.fingerprint import Fingerprint

if TYPE_CHECKING:
    pass

_FORMAT = 1


class Journal:
    """The journal in the output folder of one run; one process at a time holds it.

    ``finished`` blocks are done, so the next one has this number; ``states`` says where the hidden states
    are that enter it. Use it as a context, or ``close`` it. Of several processes that work on the run, one
    ``leads``; on the others it writes nothing, and knows what they tell it (``follow``).
    """

    def __init__(self, output: Path, leads: bool = True) -> None:
        self._leads = leads
        self.folder = output / "unfinished"
        self.model = self.folder / "model"
        self.states: list[StatesPart] = []
        self._journal = self.folder / "progress.json"
        self._blocks: list[int] = []  # a checksum of the records of each finished block
        self._fingerprint: Fingerprint | None = None
        self._lock: BinaryIO | None = None

    @classmethod
    def find(cls, output: Path) -> Self | None:
        """The journal in the folder ``output``, where there is one; nothing is read."""
        progress = cls(output)
        return progress if progress.folder.is_dir() else None

    @property
    def finished(self) -> int:
        """The number of finished blocks."""
        return len(self._blocks)

    def check(self, fingerprint: Fingerprint) -> None:
        """Read the journal, if there is one yet, and make sure that it is of this run; changes nothing.

        Raises OutputError where it is of another run, naming the difference, or is damaged.
        """
        if not self._journal.is_file():  # killed before it was first written: nothing is finished
            self._fingerprint, self._blocks, self.states = fingerprint, [], []
            return
        content = self._read_journal()
        if difference := content.difference(fingerprint):
            raise OutputError.sentence(
                f"{self.folder.parent} holds an unfinished run {difference}: "
                "repeat its command to go on with it, or choose another folder."
            )
        self._fingerprint = content

    def open(self, fingerprint: Fingerprint) -> Self:
        """Begin, or go on with what is finished: make the folder, hold its lock, remove what is left half done.

        Raises OutputError as ``check`` does, where another process works here, and where the disk refuses.
        """
        if not self._leads:
            return self
        with refusals(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                self.check(fingerprint)
                if not self._journal.is_file():
                    self._write_journal()
                self._remove_stale_files()
            except BaseException:
                self.close()
                raise
        return self

    @property
    def position(self) -> tuple[list[int], list[StatesPart]]:
        """What ``follow`` takes: of each finished block a checksum, and where the states are."""
        return self._blocks, self.states

    def follow(self, position: tuple[list[int], list[StatesPart]]) -> None:
        """Be where the journal of the process that leads is. Raises OutputError where its folder is not here."""
        self._blocks, self.states = position
        if not self._leads and not appears(self.folder):
            raise OutputError.sentence(
                f"{self.folder.parent} is not the same folder for all processes of the run: name one that all share."
            )

    def finish_block(self, index: int, records: Sequence[LayerRecord], states: Sequence[StatesPart]) -> None:
        """Note that block ``index`` is finished, with the states that enter the next, none after the last.

        The block's weights must be on the disk. Raises OutputError where the disk refuses; then the block
        is not finished, and all before it are.
        """
        if index != self.finished:
            raise ValueError(f"Block {index} was finished, but {self.finished} is the next.")
        if not self._leads:
            self._blocks, self.states = [*self._blocks, 0], list(states)
            return
        content = "".join(record.to_json() + "\n" for record in records).encode()
        replace_file(self._records_of(index), content)
        before = self._blocks, self.states
        self._blocks, self.states = [*self._blocks, zlib.crc32(content)], list(states)
        try:
            self._write_journal()
        except BaseException:
            self._blocks, self.states = before
            raise
        self._remove_stale_files()

    def records(self) -> list[LayerRecord]:
        """The records of all finished blocks. Raises OutputError where a file is missing or damaged."""
        records = []
        for index, checksum in enumerate(self._blocks):
            path = self._records_of(index)
            content = self._read(path)
            if zlib.crc32(content) != checksum:
                raise self._damaged(path)
            records += [LayerRecord.from_json(line) for line in content.decode().splitlines()]
        return records

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within the scope, what the disk refuses ends the run with a sentence that says what is kept.

        So does the end of another process of the run.
        """
        try:
            with refusals(self.folder):
                yield
        except OutputError as error:
            raise OutputError.sentence(f"{str(error).rstrip('.')}; {self._kept()}.") from error
        except (RankError, Stopped) as error:
            kept = self._kept() if self.finished else "no block was finished yet, and the same command begins anew"
            raise RankError(f"{str(error).rstrip('.')}; {kept}.") from error

    def _kept(self) -> str:
        return f"{finished_blocks(self.finished)} kept, and the same command goes on from there"

    def publish(self, target: Path) -> None:
        """Let the finished model take the name ``target``; done already where it has. Raises OutputError."""
        with refusals(target):
            if self.model.exists():
                self.model.replace(target)
                sync_folder(target.parent)

    def remove(self) -> None:
        """Remove the journal: the run is finished, or given up."""
        self.close()
        if self._leads:
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let another process hold the journal."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- Files --------------------------------------------------------------------------------------------

    def _records_of(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.jsonl"

    def _take_lock(self) -> None:
        self._lock = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise OutputError.sentence(f"{self.folder.parent} is being written by another process.") from None
        except OSError:
            pass  # a file system without locks

    def _write_journal(self) -> None:
        assert self._fingerprint is not None
        content = {
            "format": _FORMAT,
            "fingerprint": asdict(self._fingerprint),
            "blocks": self._blocks,
            "states": [asdict(part) for part in self.states],
        }
        text = json.dumps({"checksum": _checksum(content), **content}, indent=1)
        replace_file(self._journal, text.encode())

    def _read_journal(self) -> Fingerprint:
        """Take over what the journal says, and return whose it is."""
        try:
            content = json.loads(self._read(self._journal))
            checksum = content.pop("checksum")
            if checksum != _checksum(content) or content["format"] != _FORMAT:
                raise ValueError("another checksum or format")
            fingerprint = Fingerprint(**content["fingerprint"])
            states = [StatesPart(**part) for part in content["states"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(self._journal) from error
        self._blocks, self.states = content["blocks"], states
        return fingerprint

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise OutputError.sentence(f"{path} cannot be read: {error.strerror or error}.") from error

    def _damaged(self, path: Path) -> OutputError:
        return OutputError.sentence(
            f"{path} is damaged, so the unfinished run cannot go on: remove {self.folder} to begin anew."
        )

    def _remove_stale_files(self) -> None:
        """Remove what the journal does not speak of; where that fails, nothing is lost but space."""
        known = {part.file for part in self.states} | {self._records_of(i).name for i in range(self.finished)}
        with suppress(OSError):
            remove_partial_files(self.folder)
            for pattern in ("states-*.bin", "block-*.jsonl"):
                for file in self.folder.glob(pattern):
                    if file.name not in known:
                        file.unlink()


def finished_blocks(number: int) -> str:
    """The subject and verb of a sentence about finished blocks."""
    return "1 finished block is" if number == 1 else f"{number:,} finished blocks are"


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
