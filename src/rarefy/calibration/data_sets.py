"""Data sets as the library datasets has them: on the Hugging Face hub, or saved in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.calibration.documents import SEPARATOR, Document, Part, Source, first_line, joined, refused
from rarefy.calibration.rows import choose_layout
from rarefy.errors import CalibrationError, InputError


@dataclass(frozen=True)
class HubRows(Source):
    """A data set on the Hugging Face hub; nothing is fetched before it is read.

    Data is only ever read, never a data set's own script. With ``joined`` all rows, which must be text, are one
    document.
    """

    name: str
    dataset: str
    config: str | None = None
    split: str = "train"
    data_file: str | None = None
    joined: bool = False
    text_column: str | None = None

    @property
    def capped(self) -> bool:
        return not self.joined

    def documents(self) -> Iterator[Document]:
        documents = _documents(self.name, self._rows(), self.text_column)
        if self.joined:
            yield SEPARATOR.join(document for document in documents if isinstance(document, str))
        else:
            yield from documents

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        # Where rows are joined they are all needed, and the hub's cache keeps them for the next, offline, run.
        options: dict[str, Any] = {"split": self.split, "streaming": not self.joined}
        if self.data_file is not None:
            options["data_files"] = {self.split: self.data_file}
        try:
            import datasets

            yield from datasets.load_dataset(self.dataset, self.config, **options)
        except InputError:
            raise
        except Exception as error:
            raise CalibrationError.sentence(
                f"{self.name!r} could not be read from the Hugging Face hub ({type(error).__name__}: "
                f"{first_line(error)}); a local .txt, .jsonl or .parquet file works without the hub."
            ) from error


@dataclass(frozen=True)
class SavedRows(Source):
    """A data set that ``save_to_disk`` wrote into a folder."""

    name: str
    path: Path
    part: Part
    text_column: str | None = None
    characters: int | None = None

    @classmethod
    def is_there(cls, path: Path) -> bool:
        """Whether ``path`` is such a folder."""
        return any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))

    def documents(self) -> Iterator[Document]:
        yield from _documents(self.name, self._rows(), self.text_column)

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        import datasets

        try:
            found: Any = datasets.load_from_disk(str(self.path))
        except Exception as error:  # noqa: BLE001 (what a damaged folder raises is as it comes)
            raise refused(
                self.name, f"is a saved data set that cannot be read ({type(error).__name__}: {first_line(error)})"
            ) from None
        if isinstance(found, datasets.DatasetDict):
            split = "train" if self.part == "calibration" else "test"
            if split not in found and len(found) > 1:
                raise refused(
                    self.name,
                    f"has no split {split} (its splits: {joined(found)}): name one, as {self.name}/SPLIT",
                )
            found = found[split] if split in found else next(iter(found.values()))
        yield from found


def _documents(name: str, rows: Iterable[Mapping[str, Any]], text_column: str | None) -> Iterator[Document]:
    layout = None
    for number, row in enumerate(rows, start=1):
        layout = layout or choose_layout(name, row, text_column)
        if (document := layout.document(row, f"row {number:,}")) is not None:
            yield document
