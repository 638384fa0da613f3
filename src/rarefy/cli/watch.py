"""Progress of one stage on standard error: drawn in place on a terminal, a line now and then elsewhere.

While a model is pruned, the terminal shows the linears of the block at hand in a table: which one is running,
and error, steps, time and status of those that are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from rarefy.pruning.records import LayerRecord, three_digits
from rarefy.runs.words import memory_words, time_words

#: Seconds between two progress lines where standard error is no terminal.
_SECONDS_BETWEEN_LINES = 15.0
#: Rows of the table at most; a block of experts has hundreds of linears.
_MOST_ROWS = 14


class Watch:
    """Shows how far a stage is, from its ``with`` to the end of it: ``watch(done, total, note)``.

    ``tell`` takes the plain lines, ``log`` a line for each layer. ``linears`` are (number of the block, full name)
    of the layers to prune, in their order; ``watch.layer(record)`` says that one is done.
    """

    def __init__(
        self,
        what: str,
        tell: Callable[[str], None],
        log: Callable[[str], None],
        *,
        quiet: bool = False,
        linears: Sequence[tuple[int, str]] = (),
    ) -> None:
        self._what, self._tell, self._log, self._quiet = what, tell, log, quiet
        self._started = self._last_line = time.monotonic()
        self._part = _Part(self._started)
        self._last = ""
        self._bar = self._live = None
        self._table = LayerTable(linears) if linears else None
        console = Console(stderr=True)
        if console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._bar.add_task(what, total=None, left="", note="")
            shown = Group(self._bar, self._table) if self._table else self._bar
            self._live = Live(shown, console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._live:
            self._live.stop()
        if error is None:
            self._tell(f"{self._what}: done in {time_words(time.monotonic() - self._started)}")

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Part ``done`` of ``total`` is finished; ``note`` is shown beside it unless layers are."""
        now = time.monotonic()
        left = time_words(self._part.seconds_left(done, total, now)) + " left"
        if self._bar:
            note = "" if self._table else note
            self._bar.update(self._task, completed=done, total=total, left=left, note=note)
        elif not self._quiet and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            note = self._last or note
            self._tell(f"{self._what}: {done:,} of {total:,}, {left}{', ' + note if note else ''}")

    def layer(self, record: LayerRecord) -> None:
        """A layer is done."""
        memory = f", {memory_words(record.peak_bytes)} of memory at most" if record.peak_bytes else ""
        self._log(
            f"{self._what}: {record.name}, {record.pattern}, relative error {three_digits(record.relative_error)}, "
            f"{record.steps} steps, {record.seconds:.2f} s, {record.status}{memory}"
        )
        self._last = f"last {record.name}, relative error {three_digits(record.relative_error)}"
        if self._table:
            self._table.done(record)


class _Part:
    """The time that is left; a stage may have several parts, each counted from 0 (texts, then tasks)."""

    def __init__(self, now: float) -> None:
        self._began = self._last_call = now
        self._done = self._total = 0

    def seconds_left(self, done: int, total: int, now: float) -> float:
        if total != self._total or done < self._done:
            self._began = self._last_call
        self._done, self._total, self._last_call = done, total, now
        return (now - self._began) * (total - done) / max(done, 1)


class LayerTable:
    """The linears of the block at hand, as a table that rich draws anew again and again."""

    def __init__(self, linears: Sequence[tuple[int, str]]) -> None:
        self._blocks: dict[int, list[str]] = {}
        for block, name in linears:
            self._blocks.setdefault(block, []).append(name)
        self._records: dict[str, LayerRecord] = {}
        self._memory = 0

    def done(self, record: LayerRecord) -> None:
        """A layer is done."""
        self._records[record.name] = record
        self._memory = max(self._memory, record.peak_bytes)

    def __rich__(self) -> Table:
        """The table as it is now: the first block with a linear that is not done, else the last one."""
        unfinished = (block for block, names in self._blocks.items() if not self._records.keys() >= set(names))
        block = next(unfinished, max(self._blocks))
        place = list(self._blocks).index(block) + 1
        memory = f", {memory_words(self._memory)} of memory at most" if self._memory else ""
        table = Table(
            title=f"block {block} ({place:,} of {len(self._blocks):,}){memory}",
            title_justify="left",
            title_style="none",
            box=None,
            pad_edge=False,
        )
        for heading in ("linear", "relative error", "steps", "seconds", "status"):
            table.add_column(heading, justify="left" if heading in ("linear", "status") else "right", no_wrap=True)
        names = self._blocks[block]
        running = next((i for i, name in enumerate(names) if name not in self._records), len(names))
        first = max(0, min(running - _MOST_ROWS // 2, len(names) - _MOST_ROWS))
        for i, name in enumerate(names[first : first + _MOST_ROWS], start=first):
            short = _without_block(name, block)
            if record := self._records.get(name):
                numbers = (three_digits(record.relative_error), f"{record.steps:,}", f"{record.seconds:.2f}")
                table.add_row(short, *numbers, record.status, style="red" if record.failed else "")
            else:
                table.add_row(
                    short, "", "", "", "running" if i == running else "", style="" if i == running else "dim"
                )
        return table


def _without_block(name: str, block: int) -> str:
    """What a linear is called within its block: what follows the block's number."""
    return name.rpartition(f".{block}.")[2]
