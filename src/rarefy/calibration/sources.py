"""Finds the source of text that a user names (a name, a file, a data set of the hub), and checks that it is sound.

    parse_source("c4")  -->  Source  --token_stream-->  tokens (n,)  --draw_windows-->  windows (num, length)

Everything that can be wrong with a file is found here, before any model is loaded. The hub is asked only where
it is named, and only when the text is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rarefy.calibration.data_sets import HubRows, SavedRows
from rarefy.calibration.documents import Conversation, Document, Part, Source, first_line, refused
from rarefy.calibration.files import ENDINGS, Files, RowFile, find_files
from rarefy.calibration.python_docs import PythonDocs, python_docs
from rarefy.errors import CalibrationError

NAMES: dict[Part, tuple[str, ...]] = {
    "calibration": ("self", "python-docs", "c4", "wikitext2"),
    "evaluation": ("python-docs", "wikitext2"),
}

# Sources without columns.
_WITHOUT_COLUMNS = ("self", "python-docs", "c4", "wikitext2")


@dataclass(frozen=True)
class SelfText(Source):
    """Text that the model itself writes, of which ``SELF`` is the only one; see ``self_text.py``."""

    name: str = "self"

    def documents(self) -> Iterator[Document]:
        raise CalibrationError.sentence("The text of 'self' is written by the model and cannot be read.")


SELF = SelfText()


def parse_source(
    text: str, *, argument: str = "--calibration", part: Part = "calibration", text_column: str | None = None
) -> Source:
    """The source that ``text`` names, after every check that needs neither the hub nor a model.

    Names win over files of the same name (write ``./c4`` for such a file). A file, a folder of files of one kind,
    or all files that match a pattern are read through once: CalibrationError, naming ``argument``, where one is
    missing, empty, binary or malformed. ``text_column`` is the column of a table, a data set or of JSON objects
    that holds text or messages (None: see ``rows.choose_layout``). ``part`` chooses the third of python-docs and
    the hub's split: WikiText-2's training rows calibrate, its test rows are evaluated. For ``part="evaluation"``
    there is neither "self" nor "c4".
    """
    if text_column is not None and text in _WITHOUT_COLUMNS:
        raise CalibrationError("--text-column", text_column, f"left out with {text}, which has no columns to choose")
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
        return _parse_hub(text, argument, part, text_column)
    return _parse_file(text, argument, part, text_column)


def has_columns(text: str) -> bool:
    """Whether ``text`` names something with columns, of which one can be chosen. Nothing is read."""
    if text.startswith("hub:") or text in _WITHOUT_COLUMNS:
        return text.startswith("hub:")
    try:
        if SavedRows.is_there(Path(text).expanduser()):
            return True
        source = find_files(text, None)
    except (CalibrationError, OSError, RuntimeError):
        return False  # what is wrong with it is said where it is read
    files = source.files if isinstance(source, Files) else (source,)
    return any(isinstance(file, RowFile) for file in files)


def _parse_hub(text: str, argument: str, part: Part, text_column: str | None) -> HubRows:
    fields = [field.strip() for field in text.split(":")[1:]]
    if not fields[0] or len(fields) > 3:
        raise CalibrationError(argument, text, "hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    config = fields[1] if len(fields) > 1 and fields[1] else None
    default = "train" if part == "calibration" else "test"
    split = fields[2] if len(fields) > 2 and fields[2] else default
    return HubRows(text, fields[0], config, split, text_column=text_column)


def _parse_file(text: str, argument: str, part: Part, text_column: str | None) -> Source:
    try:
        source: Source | None
        if SavedRows.is_there(path := Path(text).expanduser()):
            source = SavedRows(text, path, part, text_column)
        else:
            source = find_files(text, text_column)
        if source is None:
            raise _missing(text, part)
        # All documents are read, and not only the first, so that a broken line is found now.
        characters, is_blank = 0, True
        for document in source.documents():
            if isinstance(document, Conversation):
                characters, is_blank = characters + document.characters, is_blank and document.is_blank
            else:
                characters, is_blank = characters + len(document), is_blank and not document.strip()
        if is_blank:
            raise refused(text, "is empty")
    except (OSError, RuntimeError) as error:  # the latter of ~name, where nobody has that name
        raise CalibrationError.sentence(f"{argument}: {text!r} cannot be read: {first_line(error)}.") from None
    except CalibrationError as error:
        raise CalibrationError.sentence(f"{argument}: {error}") from None
    return replace(source, characters=characters) if isinstance(source, RowFile | Files | SavedRows) else source


def _missing(text: str, part: Part) -> CalibrationError:
    path = Path(text).expanduser()
    if path.suffix or len(path.parts) > 1:
        return refused(text, "does not exist")
    near = difflib.get_close_matches(text.lower(), NAMES[part], n=1)
    names = f"{', '.join(NAMES[part])}, hub:NAME[:CONFIG[:SPLIT]], or a {ENDINGS} file"
    hint = f"; did you mean {near[0]!r}?" if near else f" ({names})."
    return CalibrationError.sentence(f"{text!r} is neither a file nor a known source{hint}")
