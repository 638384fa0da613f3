"""What a command shows: tables of results, and on the way to them notes, warnings and progress.

Results go to standard output, all else to standard error; where that is a terminal, progress is drawn in
place, elsewhere it is a line now and then.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from rarefy.report.records import aligned

#: Seconds between two progress lines where standard error is no terminal.
_SECONDS_BETWEEN_LINES = 15.0


def print_table(rows: list[list[str]], title: str = "") -> None:
    """Print rows, the first of which is the heading and the last a sum, as a table or as aligned text."""
    console = Console()
    if console.is_terminal:
        table = Table(title=title or None, title_justify="left", show_footer=True)
        for i, heading in enumerate(rows[0]):
            table.add_column(heading, rows[-1][i], justify="right" if i else "left", no_wrap=True)
        for row in rows[1:-1]:
            table.add_row(*row)
        console.print(table)
    else:
        print("\n".join(filter(None, [title, *aligned(rows)])))


class Watch:
    """Shows how far a stage is: one bar on a terminal, a line now and then elsewhere, on standard error."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(what, total=None, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if error is None:
            note(f"{self._what}: done in {time_words(time.monotonic() - self._started)}")

    def __call__(self, done: int, total: int, words: str = "") -> None:
        """Part ``done`` of ``total`` is finished; ``words`` is shown beside it."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=words)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = time_words((now - self._started) * (total - done) / max(done, 1))
            note(f"{self._what}: {done:,} of {total:,}, {left} left{', last ' + words if words else ''}")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within the block, a warning is one line on standard error, without file and source line."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def note(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def complain(text: str, status: int) -> int:
    """Print one sentence about what went wrong and return the exit status."""
    sentence = " ".join(text.split())
    note(f"error: {sentence}" + ("" if sentence.endswith((".", "?", "!")) else "."))
    return status


def time_words(seconds: float) -> str:
    """Seconds as minutes:seconds, with hours before them where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def memory_words(num_bytes: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
