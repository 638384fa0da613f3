"""Opens a file that may be compressed, and decodes its text, whose byte order mark says how.

Text is UTF-8 unless a byte order mark says that it is UTF-16 or UTF-32. The last ending of a file's name says
whether and how it is compressed. What is wrong with a file becomes one sentence that says where.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rarefy.calibration.documents import first_line, refused

# UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

# How files of other kinds begin, with the ending that makes them read as what they are.
_BEGINNINGS = (
    (b"PAR1", ".parquet"),
    (b"\x1f\x8b", ".gz"),
    (b"BZh", ".bz2"),
    (b"\xfd7zXZ", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
)


def _open_zstd(path: Path) -> IO[bytes]:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}

COMPRESSED = tuple(_OPENERS)


@contextmanager
def opened(name: str, path: Path) -> Iterator[IO[bytes]]:
    """The uncompressed bytes of a file; CalibrationError, about ``name``, where they cannot be read."""
    ending = path.suffix.lower()
    opener = _OPENERS.get(ending)
    try:
        with opener(path) if opener else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
        raise refused(name, f"is no complete {ending} file") from None
    except OSError as error:
        if opener and error.errno is None:  # the file was opened: what is in it is wrong
            raise refused(name, f"is no complete {ending} file") from None
        raise refused(name, f"cannot be read: {first_line(error)}") from None


def read_text(name: str, path: Path) -> str:
    """All text of a file as it stands, without the byte order mark. Raises CalibrationError."""
    with opened(name, path) as file:
        data = file.read()
    return _decode(name, data)


def read_lines(name: str, path: Path) -> Iterator[str]:
    """The lines of a file with their ends, read one after the other. Raises CalibrationError.

    A line ends at a line feed alone, and not at the other separators that JSON allows within its strings.
    """
    with opened(name, path) as file:
        line = file.readline()
        mark, encoding = _mark(line)
        if encoding != "utf-8":
            # Such files are rare, and a line's end is no single byte of theirs.
            yield from io.StringIO(_decode(name, line + file.read()), newline="\n")
            return
        number, line = 1, line[len(mark) :]
        while line:
            if b"\0" in line:
                raise _binary(name, f"line {number:,} has a NUL", line if number == 1 else b"")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError:
                raise _not_utf8(name, f"line {number:,} cannot be decoded", line if number == 1 else b"") from None
            number, line = number + 1, file.readline()


def _mark(start: bytes) -> tuple[bytes, str]:
    """The byte order mark at the start of a file, which may be none, and the encoding of the text behind it."""
    return next(((mark, encoding) for mark, encoding in _MARKS if start.startswith(mark)), (b"", "utf-8"))


def _decode(name: str, data: bytes) -> str:
    mark, encoding = _mark(data)
    if encoding == "utf-8" and (place := data.find(b"\0")) >= 0:
        raise _binary(name, f"byte {place:,} is NUL", data)
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = len(mark) + error.start
        if encoding == "utf-8":
            raise _not_utf8(name, f"byte {place:,} cannot be decoded", data) from None
        standard = encoding[:-3].upper()
        raise refused(
            name, f"is not the {standard} text that its byte order mark says: byte {place:,} cannot be decoded"
        ) from None
    if (place := text.find("\0")) >= 0:
        raise refused(name, f"is binary: character {place:,} is NUL")
    return text


def _binary(name: str, where: str, start: bytes) -> Exception:
    what = "is binary"
    if start[1::2].count(0) + start[::2].count(0) > len(start) // 3:
        what += ", or UTF-16 or UTF-32 without a byte order mark"
    return refused(name, f"{what}: {where}{_ending_hint(start)}")


def _not_utf8(name: str, where: str, start: bytes) -> Exception:
    return refused(name, f"is not UTF-8 text: {where}{_ending_hint(start)}")


def _ending_hint(start: bytes) -> str:
    ending = next((ending for beginning, ending in _BEGINNINGS if start.startswith(beginning)), None)
    return f" (it begins like a {ending} file, but its name does not end so)" if ending else ""
