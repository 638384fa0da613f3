"""The journal of a shrinking that is under way: after a kill the same command goes on with what has been found.

    OUT/unfinished/journal.json    whose run this is, all that has been measured, which blocks are repaired
    OUT/unfinished/block-N.safetensors   the repaired linears of block N, and which of its parts are kept
    OUT/unfinished/windows.safetensors   the windows, where the dense model wrote them
    OUT/unfinished/lock            held while a process works here

Files are whole before journal.json speaks of them, with their checksums.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rarefy.models.atomic import adding_folder, refusals, remove_partial, replace_file
from rarefy.pruning.stores import keep_windows, kept_windows
from rarefy.runs.fingerprint import Fingerprint
from rarefy.runs.folder import JOURNAL, is_unfinished_run
from rarefy.runs.unfinished import UnfinishedFolder, checksum_of
from rarefy.structure.memo import Memo


class ShrinkJournal(UnfinishedFolder):
    """The journal in the output folder of one run; one process at a time holds it. Use it as a context.

    ``memo`` is what has been measured; what is kept in it is on the disk at once. ``opened`` says whether the folder
    is this run's: until then, what is in it may be another's.
    """

    format = "shrinking 3"

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.memo: Memo = _Written(self._write)
        self._fingerprint: Fingerprint | None = None
        self.opened = False

    def open(self, fingerprint: Fingerprint) -> Self:
        """Begin, or go on with what is there. Raises OutputError where another run or process is at work here."""
        try:
            with refusals(self.folder):
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                self.check(fingerprint)
                self._fingerprint = fingerprint
                if not self.folder.exists():
                    with adding_folder(self.folder) as folder:
                        self._write(folder)
                self.hold()
                self.check(fingerprint)  # nobody else changes it from now on
                remove_partial(self.folder.parent, self.folder.name)
                remove_partial(self.folder)
        except BaseException:
            self.close()
            raise
        self.opened = True
        return self

    def check(self, fingerprint: Fingerprint) -> None:
        """Make sure that what is there is of this run. Raises OutputError, which names the difference."""
        if not is_unfinished_run(self.folder):
            return
        content = self.read_journal(fingerprint)
        with self._undamaged(self._journal):
            memo = dict(content["memo"])
        self.memo.update(memo)

    def recall(self, block: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """What ``keep`` kept of a block; None where nothing is. Raises OutputError where it is damaged."""
        known = self.memo.get(_block_key(block))
        if known is None:
            return None
        file = self._file(block)
        try:
            content = file.read_bytes()
            if zlib.crc32(content) != known["checksum"]:
                raise self.damaged(file)
            return load(content), known["records"]
        except (OSError, SafetensorError) as error:
            raise self.damaged(file) from error

    def keep(self, block: int, tensors: Mapping[str, Tensor], records: Sequence[Mapping[str, Any]]) -> None:
        """Keep the repaired linears of a block, and its records. Raises OutputError where the disk refuses."""
        content = save({name: one.contiguous().cpu() for name, one in tensors.items()})
        with refusals(self.folder):
            replace_file(self._file(block), content)
        known = {"checksum": zlib.crc32(content), "records": [dict(record) for record in records]}
        self.memo.keep({_block_key(block): known})

    def windows(self) -> Tensor | None:
        """What ``keep_windows`` kept; None where nothing is, or something else is there now."""
        found = kept_windows(self.folder.parent)
        return None if found is None or self.memo.get(_WINDOWS) != _checksum(found) else found

    def keep_windows(self, windows: Tensor) -> None:
        """Keep the windows that the dense model wrote. Raises OutputError where the disk refuses."""
        keep_windows(self.folder.parent, windows)
        self.memo.keep({_WINDOWS: _checksum(windows)})

    @property
    def has_something(self) -> bool:
        """Whether there is something to go on with."""
        return bool(self.memo)

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _write(self, folder: Path | None = None) -> None:
        assert self._fingerprint is not None
        content: dict[str, Any] = {"format": self.format, "fingerprint": asdict(self._fingerprint), "memo": self.memo}
        with refusals(self.folder):
            replace_file(
                (folder or self.folder) / JOURNAL, json.dumps({"checksum": checksum_of(content), **content}, indent=0)
            )


class _Written(Memo):
    """A memo that is written whenever something new is kept."""

    def __init__(self, write: Callable[[], None]) -> None:
        super().__init__()
        self._writes = write

    def keep(self, found: Mapping[str, Any]) -> None:
        super().keep(found)
        self._writes()


#: In a memo, the checksum of the windows.
_WINDOWS = "windows"


def _block_key(block: int) -> str:
    return f"block {block}"


def _checksum(windows: Tensor) -> int:
    return zlib.crc32(windows.cpu().numpy().tobytes())
