"""Locks between processes, also of several machines with one disk; the system frees those of a process that ends."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

#: How a file system says that it has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class BusyError(Exception):
    """Another process holds the lock."""


def lock(file: Path, seconds: float = 0) -> Callable[[], object] | None:
    """Take the lock that is ``file``, and wait ``seconds`` for it, without an end where they are negative.

    Call what is returned to free it. None where the file system has no locks, so that nobody can hold one. Raises
    BusyError where another process still holds it, and OSError.
    """
    taken = FileLock(file, thread_local=False)
    try:
        with warnings.catch_warnings():  # of a file system for which filelock has a way of its own
            warnings.simplefilter("ignore")
            taken.acquire(timeout=seconds)
    except Timeout:
        raise BusyError from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        return None
    return taken.release
