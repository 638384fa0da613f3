"""The folder ``OUT/unfinished`` of a run or tuning that is under way, held by one process at a time."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from rarefy.errors import OutputError
from rarefy.models.atomic import remove_folder
from rarefy.runs.fingerprint import Fingerprint
from rarefy.runs.folder import JOURNAL, is_unfinished_run
from rarefy.runs.locks import BusyError, lock
from rarefy.runs.schema import validated


class UnfinishedFolder:
    """The folder with its lock; use it as a context, or ``close`` it.

    Of several processes that work on the same run, only the one that ``leads`` locks and removes it.
    """

    #: What journal.json names as its format; each kind of run has its own.
    format: ClassVar[int | str]
    #: The kind of run, as sentences name it.
    kind: ClassVar[str] = "run"

    def __init__(self, output: Path, leads: bool = True) -> None:
        self.folder = output / "unfinished"
        self._leads = leads
        self._journal = self.folder / JOURNAL
        self._free: Callable[[], object] | None = None

    def read_journal(self, fingerprint: Fingerprint) -> dict[str, Any]:
        """What journal.json says. Raises OutputError where it is damaged, or of another run."""
        content = self._read()
        with self._undamaged(self._journal):
            difference = validated(Fingerprint, content["fingerprint"]).difference(fingerprint)
        if difference:
            raise OutputError.sentence(
                f"{self.folder.parent} holds an unfinished {self.kind} {difference}: repeat its command "
                "to go on with it, or choose another folder."
            )
        return content

    def check_kind(self) -> None:
        """Raise OutputError where journal.json is damaged, or of another command or release."""
        self._read()

    def _read(self) -> dict[str, Any]:
        with self._undamaged(self._journal):
            content: dict[str, Any] = json.loads(self._journal.read_bytes())
            if content.pop("checksum") != checksum_of(content):
                raise ValueError("another checksum")
            known = content["format"] == self.format
        if not known:
            raise OutputError.sentence(
                f"{self.folder.parent} holds an unfinished run of another command or release of Rarefy: go on with "
                "that one, or choose another folder."
            )
        return content

    def damaged(self, file: Path, what: str = "missing or damaged") -> OutputError:
        """The error for a file that is not there, or holds something else than was written."""
        return OutputError.sentence(
            f"{file} is {what}, so the unfinished {self.kind} cannot go on: remove {self.folder} to begin anew."
        )

    @contextmanager
    def _undamaged(self, file: Path) -> Iterator[None]:
        """Within the scope, content of ``file`` that is not as it was written raises OutputError."""
        try:
            yield
        except FileNotFoundError as error:
            raise self.damaged(file) from error
        except OSError as error:
            raise OutputError.sentence(f"{file} cannot be read: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self.damaged(file) from error

    def hold(self) -> None:
        """Take the lock, where the file system has locks. Raises OutputError where another process holds it."""
        try:
            self._free = lock(self.folder / "lock")
        except BusyError:
            raise OutputError.sentence(f"{self.folder.parent} is being written by another process.") from None

    def remove(self) -> None:
        """Remove the folder: what it was kept for is finished, or given up."""
        if sys.platform == "win32":  # where a folder in which a file is open keeps its name
            self.close()
        if self._leads and is_unfinished_run(self.folder):
            remove_folder(self.folder)
        self.close()

    def close(self) -> None:
        """Let another process hold the folder."""
        if self._free:
            self._free()
            self._free = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def checksum_of(content: Mapping[str, Any]) -> int:
    """A number that changes with what a journal says."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
