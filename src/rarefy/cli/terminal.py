"""What a command shows: tables of results, and on the way to them notes, warnings, progress and a log.

Results go to standard output, all else to standard error; where that is a terminal, progress is drawn in
place, elsewhere it is a line now and then.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rarefy.cli.watch import Watch
from rarefy.errors import OutputError
from rarefy.pruning.records import aligned


class Terminal:
    """Notes, warnings and progress of one command, from its ``with`` to the end of it.

    ``quiet`` leaves out notes and progress. ``log`` is a file that gets a line, with the time, for each note,
    warning and pruned layer, and for an error that ends the command. It is opened by ``begin``, which a command
    calls once it has found no mistake: until then lines are kept, and a mistake leaves no file. Raises
    OutputError where the file cannot be written, or lies in the folder ``output`` of a run, which holds nothing else.
    """

    def __init__(self, quiet: bool = False, log: Path | None = None, output: Path | None = None) -> None:
        self.quiet = quiet
        self._path = log
        self._begun = False
        self._lines: list[str] = []
        if log is not None:
            _check_log(log, output)

    def __enter__(self) -> Self:
        self._warnings = _warnings_to(self.warn)
        self._warnings.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._warnings.__exit__(kind, error, trace)
        if error is not None:
            self.log(f"ended: {' '.join(str(error).split()) or type(error).__name__}")

    def begin(self) -> None:
        """Write what was kept for the log, and from now on each line as it comes."""
        self._begun = True
        lines, self._lines = self._lines, []
        for line in lines:
            self._append(line)

    def note(self, text: str) -> None:
        """Say something that is no result."""
        self.log(text)
        if not self.quiet:
            say(text)

    def warn(self, text: object) -> None:
        """Say something that is shown even if quiet."""
        self.log(f"warning: {text}")
        say(f"warning: {text}")

    def log(self, text: str) -> None:
        """A line of the log alone."""
        if self._path is None:
            return
        line = f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}"
        if self._begun:
            self._append(line)
        else:
            self._lines.append(line)

    def watch(self, what: str, linears: Sequence[tuple[int, str]] = ()) -> Watch:
        """What shows how far stage ``what`` is; ``linears`` are block numbers and names of layers to prune."""
        return Watch(what, self.note, self.log, quiet=self.quiet, linears=linears)

    def _append(self, line: str) -> None:
        # Opened for each line: they are few, and the file can be read, moved or cut while the run goes on.
        assert self._path is not None
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            say(f"warning: {self._path} cannot be written any more ({error.strerror or error}); the run goes on")
            self._path = None


def _check_log(path: Path, output: Path | None) -> None:
    """Raise OutputError unless lines can be appended to ``path``, outside ``output``; a file that is there stays."""
    folder = path.absolute().parent
    if output is not None and path.resolve().is_relative_to(output.resolve()):
        raise OutputError("--log", str(path), "a file outside of --output, which holds nothing but the run")
    if not folder.is_dir():
        raise OutputError("--log", str(path), f"a file in a folder that exists; there is no folder {folder}")
    if path.is_dir():
        raise OutputError("--log", str(path), "a file, not a folder")
    try:
        if path.exists():
            path.open("a").close()
        else:
            Path(tempfile.mkdtemp(prefix=".rarefy-", dir=folder)).rmdir()
    except OSError as error:
        raise OutputError("--log", str(path), f"a file that can be written ({error.strerror or error})") from error


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


def print_texts(facts: Mapping[str, Any], after: str) -> None:
    """Print what the dense model and the one made from it write, side by side; nothing where no text was written.

    ``facts`` are those of run.json, ``after`` is what was done to the model ("pruned").
    """
    dense = {one["prompt"]: one["text"] for one in facts.get("dense_texts", [])}
    table = Table("prompt", "dense", after, show_lines=True, box=box.SIMPLE)
    for one in facts.get("texts", []):
        if one["prompt"] in dense:
            texts = (one["prompt"], dense[one["prompt"]], one["text"])
            table.add_row(*(Text(" ".join(text.split())) for text in texts))
    if table.row_count:
        Console().print(table)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within the block, a warning is one line on standard error, without file and source line."""
    with _warnings_to(lambda message: say(f"warning: {message}")):
        yield


@contextmanager
def _warnings_to(take: Callable[[object], None]) -> Iterator[None]:
    def show(message: Warning | str, *_: object, **__: object) -> None:
        take(message)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def say(text: str) -> None:
    """Print a line on standard error, in which nothing that a file says can steer a terminal."""
    plain = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    print(plain, file=sys.stderr, flush=True)


def complain(text: str, status: int) -> int:
    """Print one sentence about what went wrong and return the exit status."""
    sentence = " ".join(text.split())
    say(f"error: {sentence}" + ("" if sentence.endswith((".", "?", "!")) else "."))
    return status
