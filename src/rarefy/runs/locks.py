"""Locks between processes, also of several machines with one disk; the system frees those of a process that ends."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

#: How a file system says that it has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class BusyError(Exception):
    """Another process holds the lock."""


def lock(file: Path, seconds: float = 0) -> Callable[[], object]:
    """Take the lock that is ``file``, and wait ``seconds`` for it, without an end where they are negative.

    Call what is returned to free it. Where the file system has no locks, nobody holds one. Raises BusyError where
    another process still does, and OSError.
    """
    taken = FileLock(file, thread_local=False)
    try:
        taken.acquire(timeout=seconds)
    except Timeout:
        raise BusyError from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
    return taken.release
