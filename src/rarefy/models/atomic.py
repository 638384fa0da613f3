"""Atomic writes: a crash, a kill or a full disk leaves the old file or folder or the new one, never a part.

What is new is made under a name that nobody can guess, beside the old, and gets its own name only when all of it
is on the disk; so whatever is found under a name later may be relied on, and no link that somebody has laid is
followed. What the disk refuses becomes one sentence of OutputError.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from rarefy.errors import OutputError

#: Bytes moved at a time where the kernel does not copy by itself.
CHUNK = 8 * 2**20

_PARTIAL = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.partial")


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn what the disk refuses within the scope into OutputError about ``path``."""
    try:
        yield
    except OSError as error:
        raise OutputError.sentence(f"{path} cannot be written: {error.strerror or error}.") from error


# --- Files ------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name ``path`` when the block ends, and only if it ends well.

    By then its bytes and its name are on the disk. Raises OutputError where the disk refuses; a file
    that had the name before is still there.
    """
    partial = _partial(path)
    with refusals(path):
        file = partial.open("xb")  # never what is there already, be it a link
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a small file at once, text as UTF-8. Raises OutputError."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


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


# --- Folders ----------------------------------------------------------------------------------------------


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the name ``path`` when the block ends well, in place of one that had it.

    By then all that is in it is on the disk. Raises OutputError where the disk refuses; a folder that had the
    name before is still there.
    """
    with _new_folder(path) as partial:
        yield partial
        _sync_content(partial)
        if path.exists():
            old = _partial(path)
            path.replace(old)
            try:
                partial.replace(path)
            except BaseException:
                old.replace(path)
                raise
            _remove(old)
        else:
            partial.replace(path)


@contextmanager
def adding_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the name ``path``, which no folder has, when the block ends well.

    By then all that is in it is on the disk. Raises OutputError where the disk refuses, or a folder has the name.
    """
    with _new_folder(path) as partial:
        yield partial
        _sync_content(partial)
        partial.rename(path)  # refused for a folder in which something is


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    partial = _partial(path)
    with refusals(path):
        partial.mkdir()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder: all of it loses its name at once. What cannot be removed stays under another name."""
    aside = _partial(path)
    with suppress(OSError):
        path.replace(aside)
        _remove(aside)


# --- What both need ---------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk. Raises OSError."""
    # Windows syncs only what is open for writing, and that no folder can be.
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to the disk, where the system has a way to do that."""
    with suppress(OSError):  # some network file systems refuse, and keep names in order anyway
        sync(folder)


def appears(path: Path, seconds: float = 60.0) -> bool:
    """Whether ``path`` is there, or is so soon: network file systems show late what another machine has made."""
    limit = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


def unfinished_name(name: str) -> str | None:
    """The name that a file or folder called ``name`` would have got; None where it is not on the way to one."""
    found = _PARTIAL.fullmatch(name)
    return found["name"] if found else None


def remove_partial(folder: Path, *names: str) -> None:
    """Remove what a killed process left half written in ``folder``, of all files or of those called ``names``."""
    for path in folder.iterdir():
        name = unfinished_name(path.name)
        if name is not None and (not names or name in names):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder with what is in it, as far as that can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """A name beside ``path`` that nobody can guess, for what is not finished."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _sync_content(folder: Path) -> None:
    """Bring all files below ``folder``, and their names, to the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            if not (file := Path(parent, name)).is_symlink():
                sync(file)
        sync_folder(Path(parent))


def _copied_by_kernel(source: int, target: int, size: int) -> int:
    """How many of the first bytes the kernel copied; it shares blocks instead where the file system can."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    with suppress(OSError):  # another file system, or one without this call; a full disk shows again below
        while done < size and (copied := os.copy_file_range(source, target, size - done, done, done)):
            done += copied
    return done
