"""Writes files so that a crash, a kill or a full disk leaves the old file or the new one, never a part.

A file gets its name only when all of its bytes are on the disk, so whatever is found under a name later
may be relied on. What the disk refuses becomes one sentence of OutputError.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from rarefy.errors import OutputError

#: Bytes moved at a time where the kernel does not copy by itself.
CHUNK = 8 * 2**20

_PARTIAL = ".partial"


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn what the disk refuses within the scope into OutputError about ``path``."""
    try:
        yield
    except OSError as error:
        raise OutputError.sentence(f"{path} cannot be written: {error.strerror or error}.") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name ``path`` when the block ends, and only if it ends well.

    By then its bytes and its name are on the disk. Raises OutputError where the disk refuses; a file
    that had the name before is still there.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    with refusals(path):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file at once. Raises OutputError."""
    with replacing(path) as file:
        file.write(content)


def copy_file(source: Path, target: Path) -> None:
    """Copy ``source`` to ``target`` with little memory, by the file system itself where it can.

    Raises OutputError where ``target`` cannot be written or ``source`` not be read to its end.
    """
    with replacing(target) as new, source.open("rb", buffering=0) as old:
        size = os.fstat(old.fileno()).st_size
        done = _copied_by_kernel(old.fileno(), new.fileno(), size)
        old.seek(done)
        new.seek(done)
        while done < size:
            chunk = old.read(min(CHUNK, size - done))
            if not chunk:
                raise OutputError.sentence(f"{target} cannot be written: {source} became shorter meanwhile.")
            new.write(chunk)
            done += len(chunk)


def sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to the disk, where the file system has a way to do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse, and keep names in order anyway
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def appears(path: Path, seconds: float = 60.0) -> bool:
    """Whether ``path`` is there, or is so soon: network file systems show late what another machine has made."""
    limit = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed process left half written in ``folder``."""
    for file in folder.glob(f".*{_PARTIAL}"):
        file.unlink(missing_ok=True)


def _copied_by_kernel(source: int, target: int, size: int) -> int:
    """How many of the first bytes the kernel copied; it shares blocks instead where the file system can."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    with suppress(OSError):  # another file system, or one without this call; a full disk shows again below
        while done < size and (copied := os.copy_file_range(source, target, size - done, done, done)):
            done += copied
    return done
