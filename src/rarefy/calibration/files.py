"""Documents in files: plain text, JSON, CSV and Parquet, each of them possibly compressed, one file or many."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rarefy.calibration.decoding import COMPRESSED, read_lines, read_text
from rarefy.calibration.documents import Document, Source, first_line, refused
from rarefy.calibration.rows import Layout, choose_layout, is_conversation

_ROWS_PER_BATCH = 512

# csv's own limit of 131,072 characters is less than a book.
_LONGEST_FIELD = 2**31 - 1

# What lies beside the files of a data set and holds none of its rows.
_SETTINGS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class TextFile(Source):
    """A text file: one document, every character as it stands (a byte order mark aside)."""

    name: str
    path: Path
    text_column: str | None = None
    characters: int | None = None

    def documents(self) -> Iterator[Document]:
        if self.text_column is not None:
            raise refused(
                self.name, f'is plain text, in which --text-column cannot name a column "{self.text_column}"'
            )
        yield read_text(self.name, self.path)


@dataclass(frozen=True)
class RowFile(Source):
    """A file of rows, of which each holds a document; subclasses say how the rows are read.

    ``text_column`` is the column that the user named, or None.
    """

    name: str
    path: Path
    text_column: str | None = None
    characters: int | None = None


@dataclass(frozen=True)
class JsonFile(RowFile):
    """A file of JSON: one value a line, or one array of values. A value is an object, a text or a conversation."""

    def documents(self) -> Iterator[Document]:
        layout: Layout | None = None
        for place, value in self._values():
            if isinstance(value, dict):
                layout = layout or choose_layout(self.name, value, self.text_column)
                document = layout.document(value, place)
            elif isinstance(value, str | list) and self.text_column is None:
                document = Layout(self.name, ()).value(value, place, place)
            else:
                raise refused(self.name, f"is malformed: {place} is no JSON object with columns")
            if document is not None:
                yield document

    def _values(self) -> Iterator[tuple[str, Any]]:
        lines = read_lines(self.name, self.path)
        is_first = True
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                if not is_first or not line.lstrip().startswith(("[", "{")):
                    raise refused(self.name, f"is malformed: line {number:,} is not JSON") from None
                # A value of many lines: everything is one, or nothing is JSON.
                yield from self._items(self._single_value(chain([line], lines), number))
                return
            is_first = False
            if isinstance(value, list) and not is_conversation(value):
                yield from self._items(value)
            else:
                yield f"line {number:,}", value

    def _single_value(self, lines: Iterator[str], first: int) -> Any:
        try:
            return json.loads("".join(lines))
        except json.JSONDecodeError as error:
            number = first + error.lineno - 1
        except (ValueError, RecursionError):
            number = first
        raise refused(self.name, f"is malformed: line {number:,} is not JSON") from None

    def _items(self, value: Any) -> Iterator[tuple[str, Any]]:
        """The rows of an array with their numbers; another value is a row by itself."""
        if isinstance(value, list) and not is_conversation(value):
            for number, item in enumerate(value, start=1):
                yield f"item {number:,}", item
        else:
            yield "its only value", value


@dataclass(frozen=True)
class CsvFile(RowFile):
    """A CSV file with the names of its columns in the first line; the separator is what that line has most of."""

    def documents(self) -> Iterator[Document]:
        lines = enumerate(read_lines(self.name, self.path), start=1)
        start, first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
        text = chain([first], (line for _, line in lines))
        reader = csv.reader(text, delimiter=self._separator(first), strict=True)
        header = self._next(reader, start)
        if not header:
            return
        layout = choose_layout(self.name, header, self.text_column)
        while True:
            place = f"line {start + reader.line_num:,}"
            if (fields := self._next(reader, start)) is None:
                return
            if not fields:  # an empty line
                continue
            if len(fields) != len(header):
                count = f"{len(fields)} field{'s' * (len(fields) != 1)}, but the first line {len(header)}"
                raise refused(self.name, f"is malformed: {place} has {count}")
            # A table without a value there writes nothing.
            row = {column: field or None for column, field in zip(header, fields, strict=True)}
            if (document := layout.document(row, place)) is not None:
                yield document

    def _separator(self, header: str) -> str:
        names = self.name.lower()
        for ending in COMPRESSED:
            names = names.removesuffix(ending)
        return "\t" if names.endswith(".tsv") else max(",;\t|", key=header.count)

    def _next(self, reader: Any, start: int) -> list[str] | None:
        """The next row of ``reader``, whose first line is line ``start`` of the file; None at the end."""
        limit = csv.field_size_limit(_LONGEST_FIELD)
        try:
            return next(reader, None)
        except csv.Error as error:
            line = start + max(reader.line_num - 1, 0)
            raise refused(self.name, f"is malformed: line {line:,} is not CSV: {first_line(error)}") from None
        finally:
            csv.field_size_limit(limit)


@dataclass(frozen=True)
class ParquetFile(RowFile):
    """A Parquet file."""

    def documents(self) -> Iterator[Document]:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped, unused-ignore]

        try:
            with parquet.ParquetFile(self.path) as file:
                layout = choose_layout(self.name, file.schema_arrow.names, self.text_column)
                wanted = {*layout.columns, layout.request_input}
                there = [column for column in file.schema_arrow.names if column in wanted]
                number = 0
                for batch in file.iter_batches(_ROWS_PER_BATCH, columns=there):
                    for row in batch.select(there).to_pylist():
                        number += 1
                        if (document := layout.document(row, f"row {number:,}")) is not None:
                            yield document
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise refused(self.name, f"cannot be read as Parquet: {first_line(error)}") from None


@dataclass(frozen=True)
class Files(Source):
    """Several files, one after the other."""

    name: str
    files: tuple[Source, ...]
    characters: int | None = None

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            yield from file.documents()


# --- From names to files ------------------------------------------------------------------------------------

_KINDS: dict[str, Callable[[str, Path, str | None], Source]] = {
    ".txt": TextFile,
    ".jsonl": JsonFile,
    ".ndjson": JsonFile,
    ".json": JsonFile,
    ".csv": CsvFile,
    ".tsv": CsvFile,
    ".parquet": ParquetFile,
}

ENDINGS = ".txt, .jsonl, .json, .csv, .tsv or .parquet"


def find_files(text: str, text_column: str | None) -> Source | None:
    """The file, the folder of files, or the files that match the pattern ``text``; None where there is none.

    Nothing is read yet. Raises CalibrationError where a folder has no such files or those of several kinds,
    OSError where a name cannot be one, RuntimeError for the home folder of somebody who has none.
    """
    path = Path(text).expanduser()
    if not text.strip():
        return None
    if path.is_dir():
        return _folder(text, path, text_column)
    if path.is_file():
        return _file(text, path, text_column)
    if path.exists():
        raise refused(text, "is a pipe or a device, not a file, and it is read more than once")
    if not glob.has_magic(text):
        return None
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path's own takes no absolute pattern)
    found = sorted(one for one in matches if Path(one).is_file())
    if not found:
        raise refused(text, "matches no file")
    return Files(text, tuple(_file(one, Path(one), text_column) for one in found))


def _folder(text: str, folder: Path, text_column: str | None) -> Source:
    found: dict[Any, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        if _ending(path) in _KINDS and path.name not in _SETTINGS and not hidden and path.is_file():
            found.setdefault(_KINDS[_ending(path)], []).append(path)
    if not found:
        raise refused(text, f"is a folder, and none of its files ends in {ENDINGS}")
    if len(found) > 1:
        counts = " and ".join(f"{len(paths):,} like {paths[0].name}" for paths in found.values())
        some = str(folder / f"*{_ending(next(iter(found.values()))[0])}")
        raise refused(text, f"is a folder of several kinds of files, {counts}: name one kind, such as {some!r}")
    (paths,) = found.values()
    return Files(text, tuple(_file(str(path), path, text_column) for path in paths))


def _file(name: str, path: Path, text_column: str | None) -> Source:
    return _KINDS.get(_ending(path), TextFile)(name, path, text_column)


def _ending(path: Path) -> str:
    """A file's ending in small letters, which says its kind; one of compression is not counted."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        del endings[-1]
    return endings[-1] if endings else ""
