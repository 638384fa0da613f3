"""Where calibration and evaluation text comes from: names, files and the hub, as one stream of tokens.

    parse_source("c4")  -->  Source  --token_stream-->  tokens (n,)  --draw_windows-->  windows (num, length)

Everything that can be wrong with a file is found by ``parse_source``, before any model is loaded. The hub is
asked only where it is named, and only when the text is read. Documents are tokenised without special tokens
and joined by an empty line; windows start anywhere in the joined stream, so no document needs to be long.
"""

from __future__ import annotations

import difflib
import gzip
import json
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from rarefy.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["calibration", "evaluation"]

NAMES: dict[Part, tuple[str, ...]] = {
    "calibration": ("self", "python-docs", "c4", "wikitext2"),
    "evaluation": ("python-docs", "wikitext2"),
}

# What stands between two documents: an empty line, as between paragraphs, and as the papers join WikiText's rows.
SEPARATOR = "\n\n"

# A shard of C4 holds about 170 million tokens. Sixteen times the tokens that the windows hold keeps overlaps
# rare (a token is in a sixteenth of a window on average) and takes seconds.
DRAW_FROM = 16

# Of a file with more than twice this many characters for each token that is needed, every second, third, ...
# document is enough: text has 1 to 5 characters a token, so that this leaves more tokens than are needed.
_CHARACTERS_PER_TOKEN = 8

_JSON_LINES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_DOCUMENTS_PER_BATCH = 512


class CalibrationWarning(UserWarning):
    """The run goes on, but its calibration is not what it looks like."""


# --- Sources ----------------------------------------------------------------------------------------------


class Source(ABC):
    """Text that was found sound as far as that can be told without reading the hub or loading a model.

    ``name`` is what the user wrote, ``characters`` the length of the text where it is known.
    """

    name: str
    characters: int | None = None

    @property
    def capped(self) -> bool:
        """Whether reading stops once there is enough, because nobody wants to fetch the rest."""
        return False

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents in their order; CalibrationError where they cannot be had."""

    def read_text(self) -> str:
        """All documents joined by an empty line; a text file is one document and stays as it stands."""
        return SEPARATOR.join(self.documents())


@dataclass(frozen=True)
class SelfText(Source):
    """Text that the model itself writes, of which ``SELF`` is the only one; see ``self_text.py``."""

    name: str = "self"

    def documents(self) -> Iterator[str]:
        raise CalibrationError.sentence("The text of 'self' is written by the model and cannot be read.")


SELF = SelfText()


@dataclass(frozen=True)
class PythonDocs(Source):
    """The language documentation that every CPython carries, in two parts that share no paragraph."""

    name: str
    part: Part

    def documents(self) -> Iterator[str]:
        yield python_docs(self.part)


@dataclass(frozen=True)
class TextFile(Source):
    """A text file, one document, every byte as it stands (a byte order mark aside)."""

    name: str
    path: Path

    def documents(self) -> Iterator[str]:
        with _opened(self.name, self.path) as file:
            data = file.read()
        if (place := data.find(b"\0")) >= 0:
            raise _bad(self.name, f"is binary: byte {place:,} is NUL")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _bad(self.name, f"is not UTF-8 text: byte {error.start:,} cannot be decoded") from None
        yield text


@dataclass(frozen=True)
class JsonLinesFile(Source):
    """A file of JSON objects, one a line, with the document under the key "text"; other keys are ignored."""

    name: str
    path: Path
    characters: int | None = None

    def documents(self) -> Iterator[str]:
        with _opened(self.name, self.path) as file:
            # As bytes, so that lines end at newlines alone and not at the separators that JSON allows in strings.
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield self._text(number, line)

    def _text(self, number: int, line: bytes) -> str:
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise _bad(self.name, f"is not UTF-8 text: line {number:,} cannot be decoded") from None
        except (ValueError, RecursionError):
            raise _bad(self.name, f"is malformed: line {number:,} is not JSON") from None
        if not isinstance(row, dict) or "text" not in row:
            raise _bad(self.name, f'is malformed: line {number:,} is no JSON object with a key "text"')
        if not isinstance(row["text"], str):
            raise _bad(self.name, f'is malformed: "text" in line {number:,} is not a string')
        # JSON can spell half of a surrogate pair, which no tokenizer takes.
        return row["text"].encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class ParquetFile(Source):
    """A Parquet file with a column "text"; rows without a value are left out."""

    name: str
    path: Path
    characters: int | None = None

    def documents(self) -> Iterator[str]:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped, unused-ignore]

        try:
            with parquet.ParquetFile(self.path) as file:
                schema = file.schema_arrow
                if "text" not in schema.names:
                    columns = ", ".join(schema.names) or "none"
                    raise _bad(self.name, f'has no column "text" (its columns: {columns})')
                kind = schema.field("text").type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise _bad(self.name, f'holds {kind}, not text, in its column "text"')
                for batch in file.iter_batches(_DOCUMENTS_PER_BATCH, columns=["text"]):
                    yield from (text for text in batch.column(0).to_pylist() if text is not None)
        except (pa.ArrowException, OSError) as error:
            raise _bad(self.name, f"cannot be read as Parquet: {_first_line(error)}") from None


@dataclass(frozen=True)
class HubRows(Source):
    """The column "text" of a data set on the Hugging Face hub; nothing is fetched before it is read.

    Data is only ever read, never a data set's own script. With ``joined`` all rows are one document.
    """

    name: str
    dataset: str
    config: str | None = None
    split: str = "train"
    data_file: str | None = None
    joined: bool = False

    @property
    def capped(self) -> bool:
        return not self.joined

    def documents(self) -> Iterator[str]:
        if self.joined:
            yield SEPARATOR.join(self._rows())
        else:
            yield from self._rows()

    def _rows(self) -> Iterator[str]:
        # Where rows are joined they are all needed, and the hub's cache keeps them for the next, offline, run.
        options: dict[str, Any] = {"split": self.split, "streaming": not self.joined}
        if self.data_file is not None:
            options["data_files"] = {self.split: self.data_file}
        try:
            import datasets

            for row in datasets.load_dataset(self.dataset, self.config, **options):
                text = row.get("text")
                if not isinstance(text, str):
                    columns = ", ".join(row)
                    raise _bad(self.name, f'has no text in a column "text" (its columns: {columns})')
                yield text
        except InputError:
            raise
        except Exception as error:
            raise CalibrationError.sentence(
                f"{self.name!r} could not be read from the Hugging Face hub ({type(error).__name__}: "
                f"{_first_line(error)}); a local .txt, .jsonl or .parquet file works without the hub."
            ) from error


# --- From what the user wrote to a source -----------------------------------------------------------------


def parse_source(text: str, *, argument: str = "--calibration", part: Part = "calibration") -> Source:
    """The source that ``text`` names, after every check that needs neither the hub nor a model.

    Names win over files of the same name (write ``./c4`` for such a file). A file is read through once:
    CalibrationError, naming ``argument``, where it is missing, a folder, empty, binary or malformed. ``part``
    chooses the third of python-docs and the hub's split: WikiText-2's training rows calibrate, its test rows
    are evaluated. For ``part="evaluation"`` there is neither "self" nor "c4".
    """
    if text == "python-docs":
        python_docs(part)
        return PythonDocs(text if part == "calibration" else f"{text} (held-out third)", part)
    if text == "wikitext2":
        split = "train" if part == "calibration" else "test"
        return HubRows("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split, joined=True)
    if text in ("self", "c4") and part == "evaluation":
        raise CalibrationError(argument, text, "a file, wikitext2, python-docs or hub:NAME[:CONFIG[:SPLIT]]")
    if text == "self":
        return SELF
    if text == "c4":
        return HubRows("c4", "allenai/c4", None, "train", data_file="en/c4-train.00000-of-01024.json.gz")
    if text.startswith("hub:"):
        return _parse_hub(text, argument, part)
    return _parse_file(text, argument, part)


def _parse_hub(text: str, argument: str, part: Part) -> HubRows:
    fields = [field.strip() for field in text.split(":")[1:]]
    if not fields[0] or len(fields) > 3:
        raise CalibrationError(argument, text, "hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    config = fields[1] if len(fields) > 1 and fields[1] else None
    default = "train" if part == "calibration" else "test"
    return HubRows(text, fields[0], config, fields[2] if len(fields) > 2 and fields[2] else default)


def _parse_file(text: str, argument: str, part: Part) -> Source:
    path = Path(text).expanduser()
    source: TextFile | JsonLinesFile | ParquetFile
    if text.lower().endswith(_JSON_LINES):
        source = JsonLinesFile(text, path)
    elif text.lower().endswith(".parquet"):
        source = ParquetFile(text, path)
    else:
        source = TextFile(text, path)
    try:
        if not text.strip() or not path.exists():
            raise _missing(text, path, part)
        if path.is_dir():
            raise _bad(text, "is a folder, not a file")
        # All documents are read, and not only the first, so that a broken line is found now.
        characters, blank = 0, True
        for document in source.documents():
            characters += len(document)
            blank = blank and not document.strip()
        if blank:
            raise _bad(text, "is empty")
    except OSError as error:
        raise CalibrationError.sentence(f"{argument}: {text!r} cannot be read: {_first_line(error)}.") from None
    except CalibrationError as error:
        raise CalibrationError.sentence(f"{argument}: {error}") from None
    return source if isinstance(source, TextFile) else replace(source, characters=characters)


def _missing(text: str, path: Path, part: Part) -> CalibrationError:
    if path.suffix or len(path.parts) > 1:
        return _bad(text, "does not exist")
    near = difflib.get_close_matches(text.lower(), NAMES[part], n=1)
    names = f"{', '.join(NAMES[part])}, hub:NAME[:CONFIG[:SPLIT]], or a .txt, .jsonl, .jsonl.gz or .parquet file"
    hint = f"; did you mean {near[0]!r}?" if near else f" ({names})."
    return CalibrationError.sentence(f"{text!r} is neither a file nor a known source{hint}")


def _bad(name: str, what: str) -> CalibrationError:
    return CalibrationError.sentence(f"{name!r} {what}.")


def _first_line(error: BaseException) -> str:
    """The start of another library's message, without its full stop, to fit into a sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


@contextmanager
def _opened(name: str, path: Path) -> Iterator[gzip.GzipFile | BufferedReader]:
    """A file to read bytes from, unpacked where its name ends in .gz; what goes wrong in reading is one sentence."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise _bad(name, "is no complete gzip file") from None
    except OSError as error:
        raise _bad(name, f"cannot be read: {_first_line(error)}") from None


# --- The documentation that Python carries ----------------------------------------------------------------


def python_docs(part: Part) -> str:
    """The first two thirds ("calibration", about 75,000 tokens) or the last ("evaluation") of Python's topics.

    The topics of ``pydoc_data.topics`` are taken in alphabetical order and parted at the topic in which two
    thirds of the characters are reached. Some topics repeat paragraphs of others ("with" stands in "compound"
    too): the evaluation part leaves out every paragraph that the calibration part has, so that nothing is
    evaluated that was calibrated on. The text differs from one version of Python to the next.
    CalibrationError where this Python carries no documentation.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CalibrationError.sentence(
            "This Python comes without pydoc_data.topics, its documentation; name a text file instead."
        ) from None
    names = sorted(topics)
    total = sum(len(topics[name]) for name in names)
    calibration: list[str] = []
    taken = 0
    while 3 * taken < 2 * total:
        calibration.append(topics[names[len(calibration)]])
        taken += len(calibration[-1])
    if part == "calibration":
        return SEPARATOR.join(calibration)
    seen = {_normal(paragraph) for topic in calibration for paragraph in topic.split(SEPARATOR)}
    held_out = [
        paragraph
        for name in names[len(calibration) :]
        for paragraph in topics[name].split(SEPARATOR)
        if _normal(paragraph) not in seen
    ]
    return SEPARATOR.join(held_out)


def _normal(paragraph: str) -> str:
    """A paragraph without its indentation and line breaks, which differ where one topic quotes another."""
    return " ".join(paragraph.split())


# --- Tokens and windows -----------------------------------------------------------------------------------


def token_stream(
    source: Source, tokenizer: PreTrainedTokenizerBase, enough: int | None = None
) -> Int64[Tensor, " tokens"]:
    """All tokens of ``source`` in one row, int64 on the CPU, without special tokens.

    Documents are tokenised in batches, each but the last followed by an empty line. For evaluation all text is
    read. For windows that are drawn, ``enough`` (``DRAW_FROM * num * length`` is meant) keeps this to seconds:
    rows from the hub end with the first ``enough`` tokens, and of a large file of documents every second, third or
    n-th is taken, from its beginning to its end. CalibrationError where the text cannot be read.
    """
    pieces: list[Tensor] = []
    count = 0
    stride = (source.characters or 0) // (_CHARACTERS_PER_TOKEN * enough) if enough else 1
    documents = _followed_by_separator(islice(source.documents(), 0, None, max(1, stride)))
    while batch := list(islice(documents, _DOCUMENTS_PER_BATCH)):
        # verbose=False: a stream is longer than any model's context, which the tokenizer would warn about.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        pieces += [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]
        count += sum(len(ids) for ids in encoded["input_ids"])
        if source.capped and enough is not None and count >= enough:
            return torch.cat(pieces)[:enough]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _followed_by_separator(documents: Iterator[str]) -> Iterator[str]:
    """Every document with the separator behind it, except the last."""
    previous: str | None = None
    for document in documents:
        if previous is not None:
            yield previous + SEPARATOR
        previous = document
    if previous is not None:
        yield previous


def draw_windows(
    tokens: Int64[Tensor, " tokens"],
    num: int,
    length: int,
    seed: int,
    bos_id: int | None = None,
    *,
    name: str = "the calibration text",
) -> Int64[Tensor, "num length"]:
    """``num`` windows of ``length`` tokens that start at seeded random places of ``tokens`` and may overlap.

    The same seed gives the same windows on every machine. With ``bos_id`` each window is that token and then
    ``length - 1`` tokens of text. CalibrationError, with both numbers, where the text is shorter than one
    window; CalibrationWarning where it has fewer tokens than a quarter of what the windows hold.
    """
    if num < 1:
        raise InputError("the number of windows", num, "at least 1")
    body = length if bos_id is None else length - 1
    if body < 1:
        raise InputError("the window length", length, f"at least {1 + length - body}")
    if len(tokens) < body:
        raise CalibrationError.sentence(
            f"{name[0].upper()}{name[1:]} has {len(tokens):,} tokens, but one window needs {body:,}."
        )
    if 4 * len(tokens) < num * body:
        warnings.warn(
            f"{name} has {len(tokens):,} tokens, fewer than a quarter of the {num * body:,} that "
            f"{num:,} windows of {body:,} hold: the windows overlap and say less than they seem to.",
            CalibrationWarning,
            stacklevel=2,
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - body + 1, (num,), generator=generator)
    windows = tokens.cpu().unfold(0, body, 1)[starts]
    if bos_id is None:
        return windows
    return torch.cat([windows.new_full((num, 1), bos_id), windows], dim=1)
