"""Local files of zero-shot tasks, in the layouts in which their data sets are published, as the hub has them.

lm-eval asks ``datasets`` for its data by name. ``LocalData(folder).in_place_of_hub()`` answers that question from
the files of one folder. A file that is missing or malformed is an InputError that names it and its line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rarefy.calibration.documents import first_line
from rarefy.errors import InputError

Row = dict[str, Any]


@dataclass(frozen=True)
class _Layout:
    """One published data set: the file that holds it, by the start of its name, and what becomes of a line.

    ``convert(row, extra)`` gives the row as the hub has it, or raises KeyError, TypeError or ValueError.
    ``splits`` says under which names the rows are asked for.
    """

    stem: str
    splits: tuple[str, ...]
    convert: Callable[[Row, str], Row]


class LocalData:
    """Answers lm-eval's questions for data sets from the files in one folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            what = "a file" if folder.exists() else "missing"
            raise InputError.sentence(f"--task-data is {str(folder)!r}, but must be a folder; it is {what}.")
        self._folder = folder
        self._read: dict[Path, tuple[str, list[tuple[int, Row]]]] = {}

    @contextmanager
    def in_place_of_hub(self) -> Iterator[None]:
        """Within the block, ``datasets.load_dataset`` reads this folder and nothing else."""
        with mock.patch("datasets.load_dataset", self._load):
            yield

    def digest(self) -> str:
        """A fingerprint of all files that were read."""
        digests = sorted(f"{path.name}:{digest}" for path, (digest, _) in self._read.items())
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]

    def _load(self, path: str, name: str | None = None, **_: Any) -> dict[str, Any]:
        import datasets

        short = path.rpartition("/")[2].lower()
        if short in ("mmlu", "mmlu_no_train"):
            splits = self._mmlu(str(name))
        else:
            layout = _LAYOUTS.get((short, name)) or _LAYOUTS.get((short, None))
            if layout is None:
                raise InputError.sentence(f"--task-data: no layout of local files is known for the data set {path}.")
            rows = self._rows(layout)
            splits = dict.fromkeys(layout.splits, rows)
        made = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        return _Splits(made)

    def _rows(self, layout: _Layout) -> list[Row]:
        path = self._file(layout.stem, (".jsonl", ".jsonl.gz", ".json", ".json.gz"))
        lines = self._lines(path)
        extras = [""] * len(lines)
        if layout.stem == "piqa":
            extras = self._labels(path, len(lines))
        return [_converted(layout, path, number, row, extra) for (number, row), extra in zip(lines, extras)]

    def _mmlu(self, subject: str) -> dict[str, list[Row]]:
        path = self._file("mmlu", (".jsonl", ".jsonl.gz"))
        splits: dict[str, list[Row]] = {"dev": [], "test": []}
        layout = _Layout("mmlu", (), _mmlu)
        for number, row in self._lines(path):
            if row.get("subject") == subject:
                split = row.get("split")
                if split not in splits:
                    raise _malformed(path, number, f'"split" is {split!r}, not "dev" or "test"')
                splits[split].append(_converted(layout, path, number, row, ""))
        if not splits["test"]:
            raise InputError.sentence(f"--task-data: {path} has no test rows of the subject {subject}.")
        return splits if splits["dev"] else {"test": splits["test"]}

    def _labels(self, path: Path, count: int) -> list[str]:
        """PIQA's answers lie beside its questions, one a line."""
        labels_path = self._file("piqa", (".lst",))
        data = _read_bytes(labels_path)
        labels = data.decode("utf-8", "replace").split()
        self._read.setdefault(labels_path, (hashlib.sha256(data).hexdigest(), []))
        if len(labels) != count:
            raise InputError.sentence(
                f"--task-data: {labels_path} has {len(labels):,} labels for the {count:,} questions of {path.name}."
            )
        return labels

    def _file(self, stem: str, suffixes: tuple[str, ...]) -> Path:
        files = sorted(
            path for path in self._folder.glob(f"{stem}*") if path.is_file() and path.name.endswith(suffixes)
        )
        if len(files) != 1:
            found = "no file" if not files else "several files, " + " and ".join(path.name for path in files) + ","
            raise InputError.sentence(
                f"--task-data: {self._folder} has {found} of the name {stem}*{suffixes[0]}, but needs one."
            )
        return files[0]

    def _lines(self, path: Path) -> list[tuple[int, Row]]:
        """The JSON objects of a file with their line numbers."""
        if path not in self._read:
            data = _read_bytes(path)
            rows: list[tuple[int, Row]] = []
            for number, line in enumerate(data.split(b"\n"), start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError):
                    raise _malformed(path, number, "it is no JSON") from None
                if not isinstance(row, dict):
                    raise _malformed(path, number, "it is no JSON object")
                rows.append((number, row))
            if not rows:
                raise InputError.sentence(f"--task-data: {path} is empty.")
            self._read[path] = (hashlib.sha256(data).hexdigest(), rows)
        return self._read[path][1]


class _Splits(dict[str, Any]):
    """Splits of a data set; one that the files do not hold is empty, for it is asked for, but not used."""

    def __missing__(self, split: str) -> Any:
        return next(iter(self.values())).select([])


def _converted(layout: _Layout, path: Path, number: int, row: Row, extra: str) -> Row:
    try:
        return layout.convert(row, extra)
    except KeyError as error:
        raise _malformed(path, number, f"it has no {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise _malformed(path, number, first_line(error)) from None


def _malformed(path: Path, number: int, what: str) -> InputError:
    return InputError.sentence(f"--task-data: line {number:,} of {path} is malformed: {what}.")


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InputError.sentence(f"--task-data: {path} is no complete gzip file.") from None
    except OSError as error:
        raise InputError.sentence(f"--task-data: {path} cannot be read: {error.strerror or error}.") from None


def _text(row: Row, *keys: str) -> list[str]:
    """The texts under ``keys``."""
    for key in keys:
        if not isinstance(row[key], str):
            raise TypeError(f'"{key}" is no text')
    return [row[key] for key in keys]


def _one_of(what: str, value: Any, allowed: Iterable[Any]) -> Any:
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}, not one of {', '.join(map(str, allowed))}")
    return value


def _choices(row: Row, question_key: str) -> Row:
    """AI2's layout: the question with its choices in one object, the key of the answer beside it."""
    question = row["question"]
    if not isinstance(question, dict):
        raise TypeError('"question" is no object')
    (stem,) = _text(question, "stem")
    pairs = [_text(choice, "text", "label") for choice in question["choices"]]
    texts, labels = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    key = _one_of('"answerKey"', row["answerKey"], labels)
    return {question_key: stem, "choices": {"text": texts, "label": labels}, "answerKey": key}


def _piqa(row: Row, label: str) -> Row:
    goal, first, second = _text(row, "goal", "sol1", "sol2")
    return {"goal": goal, "sol1": first, "sol2": second, "label": int(_one_of("its label", label, "01"))}


def _lambada(row: Row, _: str) -> Row:
    (text,) = _text(row, "text")
    if " " not in text:
        raise ValueError('"text" has no last word to ask for')
    return {"text": text}


def _hellaswag(row: Row, _: str) -> Row:
    activity, first, second = _text(row, "activity_label", "ctx_a", "ctx_b")
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(one, str) for one in endings):
        raise ValueError('"endings" are not four texts')
    label = str(_one_of('"label"', row["label"], [0, 1, 2, 3, "0", "1", "2", "3"]))
    return {"activity_label": activity, "ctx_a": first, "ctx_b": second, "endings": endings, "label": label}


def _winogrande(row: Row, _: str) -> Row:
    sentence, first, second = _text(row, "sentence", "option1", "option2")
    if "_" not in sentence:
        raise ValueError('"sentence" has no gap (_)')
    answer = _one_of('"answer"', row["answer"], ["1", "2"])
    return {"sentence": sentence, "option1": first, "option2": second, "answer": answer}


def _boolq(row: Row, _: str) -> Row:
    question, passage = _text(row, "question", "passage")
    label = int(_one_of('"label"', row["label"], [False, True]))
    return {"question": question, "passage": passage, "label": label}


def _mmlu(row: Row, _: str) -> Row:
    question, subject = _text(row, "question", "subject")
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(one, str) for one in choices):
        raise ValueError('"choices" are not four texts')
    answer = _one_of('"answer"', row["answer"], range(4))
    return {"question": question, "subject": subject, "choices": choices, "answer": answer}


#: By the last part of the data set's name on the hub and its configuration (None: any).
_LAYOUTS: dict[tuple[str, str | None], _Layout] = {
    ("ai2_arc", "ARC-Easy"): _Layout("arc_easy", ("test",), lambda row, _: _choices(row, "question")),
    ("ai2_arc", "ARC-Challenge"): _Layout("arc_challenge", ("test",), lambda row, _: _choices(row, "question")),
    ("openbookqa", None): _Layout("openbookqa", ("test",), lambda row, _: _choices(row, "question_stem")),
    ("piqa", None): _Layout("piqa", ("validation",), _piqa),
    ("lambada_openai", None): _Layout("lambada", ("test",), _lambada),
    ("hellaswag", None): _Layout("hellaswag", ("validation",), _hellaswag),
    ("winogrande", None): _Layout("winogrande", ("validation",), _winogrande),
    ("super_glue", "boolq"): _Layout("boolq", ("validation",), _boolq),
}
