"""Runs a command in each of several processes that torchrun started: they join, and only the first prints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from rarefy.errors import InputError, RankError
from rarefy.parallel.world import Meeting, Stopped, World, joined

#: Seconds for which the first process may say why the run ends, before another one does.
_PATIENCE = 3.0
_STOPPED = 143  # as a shell reports a process that SIGTERM has ended


Complain = Callable[[str, int], int]


def answer_together(answer: Callable[[], int], complain: Complain) -> int:
    """The exit status of ``answer``, which all processes call, and of which only the first prints anything.

    ``complain`` prints a sentence about what went wrong and returns the exit status that it is given.

    Where a process is lost, the first of the others that can says so. What is no error of Rarefy's is
    raised, so that its traceback is seen, whichever process it is.
    """
    try:
        with joined() as meeting:
            return _answer(answer, meeting, complain)
    except InputError as error:
        return complain(str(error), 2)
    except RankError as error:  # nobody was met
        return complain(str(error), 1)


def _answer(answer: Callable[[], int], meeting: Meeting, complain: Complain) -> int:
    leads = World.current().leads
    status, reason = 1, ""
    try:
        with _silent(not leads):
            status = answer()
    except (RankError, Stopped) as error:
        status, reason = _STOPPED if isinstance(error, Stopped) else 1, str(error)
    except BaseException:
        meeting.first()  # its traceback says it
        raise
    if not status:
        World.current().leave()
        return 0
    if not leads:
        meeting.wait_for_first(_PATIENCE)
    if meeting.first() and reason:  # without a reason, the first process has said it
        complain(reason, status)
    return status


@contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Within the scope, nothing is printed if so ``wanted``."""
    if not wanted:
        yield
        return
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield
