"""The folder ``OUT/unfinished`` of a run or tuning that is under way, held by one process at a time."""

from __future__ import annotations

import errno
import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from rarefy.errors import OutputError
from rarefy.models.atomic import remove_folder
from rarefy.runs.folder import JOURNAL, is_unfinished_run

#: How a file system says that it has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class UnfinishedFolder:
    """The folder with its lock; use it as a context, or ``close`` it.

    Of several processes that work on the same run, only the one that ``leads`` locks and removes it.
    """

    def __init__(self, output: Path, leads: bool = True) -> None:
        self.folder = output / "unfinished"
        self._leads = leads
        self._journal = self.folder / JOURNAL
        self._lock: FileLock | None = None

    def hold(self) -> None:
        """Take the lock, where the file system has locks. Raises OutputError where another process holds it."""
        lock = FileLock(self.folder / "lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError.sentence(f"{self.folder.parent} is being written by another process.") from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
        else:
            self._lock = lock

    def remove(self) -> None:
        """Remove the folder: what it was kept for is finished, or given up."""
        if sys.platform == "win32":  # where a folder in which a file is open keeps its name
            self.close()
        if self._leads and is_unfinished_run(self.folder):
            remove_folder(self.folder)
        self.close()

    def close(self) -> None:
        """Let another process hold the folder."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def checksum_of(content: Mapping[str, Any]) -> int:
    """A number that changes with what a journal says."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
