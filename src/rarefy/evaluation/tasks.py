"""Zero-shot tasks through lm-eval: its definitions, prompts and scores, on the hub's data or on local files.

    prepare(["arc_easy", "piqa"], folder)  -->  Tasks  --evaluate_tasks(model, ...)-->  TaskResult per task

lm-eval asks ``datasets`` for its data by name. With a folder, that question is answered from files in the
layouts in which the data sets are published, and nothing else about a task changes. Everything that can be
wrong with a name or a file is found by ``prepare``, before any model is loaded.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import io
import json
import logging
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from rarefy.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What ``--tasks`` knows without asking lm-eval for all that it has, and where in lm-eval they are defined.
KNOWN = ("arc_easy", "arc_challenge", "piqa", "lambada", "hellaswag", "winogrande", "boolq", "openbookqa", "mmlu")
_DEFINITIONS = (
    "arc", "piqa", "lambada", "hellaswag", "winogrande", "super_glue/boolq", "openbookqa", "mmlu/default",
)  # fmt: skip
#: Short names of the papers for lm-eval's.
_ALIASES = {"lambada": "lambada_openai"}

#: For standard errors without a formula, of lambada's perplexity alone: lm-eval takes a hundred times as many,
#: which takes minutes. Accuracies have a formula.
_RESAMPLES = 1000

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """The scores of one task over ``samples`` items: every metric of lm-eval's, with its standard error.

    ``metrics`` maps ``acc``, ``acc_norm`` ... to (value, standard error); an error is NaN where lm-eval gives
    none (a single item). Accuracies are fractions.
    """

    task: str
    samples: int
    metrics: dict[str, tuple[float, float]]

    @property
    def accuracy(self) -> tuple[float, float]:
        """``acc`` and its standard error; NaN where the task has no accuracy."""
        return self.metrics.get("acc", (math.nan, math.nan))


@dataclass(frozen=True)
class Tasks:
    """Tasks that are known to lm-eval, with their data read and found sound.

    ``names`` are what the user wrote; ``members`` lists the tasks of those that are tags, which have no result
    of their own; ``digest`` changes with the local files ("" for the hub's data).
    """

    names: tuple[str, ...]
    loaded: dict[str, Any] = field(repr=False)
    members: dict[str, list[str]] = field(default_factory=dict)
    digest: str = ""


def prepare(names: Sequence[str], folder: str | Path | None = None) -> Tasks:
    """Find the tasks called ``names`` and read their data: from files in ``folder``, else from the hub.

    Raises InputError where lm-eval is not installed, a name is unknown (with the nearest one) or said twice,
    or a file is missing or malformed; the sentence names the file and its line.
    """
    names = tuple(names)
    if not names or "" in names:
        raise InputError("--tasks", ",".join(names), f"one or more names of tasks, such as {KNOWN[0]},{KNOWN[2]}")
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError.sentence(f"--tasks names {repeated} twice.")
    local = None
    if folder is not None:
        local = _LocalData(Path(folder).expanduser())
    with _quiet():
        manager, known = _manager(names, everything=local is None)
    for name in names:
        if _ALIASES.get(name, name) not in known:
            nearest = difflib.get_close_matches(name.lower(), (*KNOWN, *known), n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(KNOWN)} and others."
            whose = "no task of lm-eval" if local is None else "no task for which --task-data knows a layout"
            raise InputError.sentence(f"--tasks names {name!r}, which is {whose}{hint}")
    try:
        with _quiet(), local.in_place_of_hub() if local else _as_it_is():
            loaded = manager.load([_ALIASES.get(name, name) for name in names])
    except InputError:
        raise
    except Exception as error:
        where = f"from {folder}" if local else "from the hub (--task-data names a folder of local files)"
        raise InputError.sentence(f"--tasks: the data cannot be read {where}: {_first_line(error)}.") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)  # as lm-eval does where nothing is said
    entries = {name: manager.task_index[_ALIASES.get(name, name)] for name in names}
    members = {name: sorted(entry.tags) for name, entry in entries.items() if entry.kind.name == "TAG"}
    return Tasks(names, dict(loaded), members, local.digest() if local else "")


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TaskResult]:
    """The results of ``tasks`` by name, on the first ``limit`` items of each (None: all).

    What lm-eval computes for the same model, files and batch size, but for errors drawn by resampling. A group
    has one result, weighted by size; a tag one for each of its tasks. ``progress(done, total)`` counts requests,
    roughly. InputError where an item does not fit into the model's context.
    """
    with _quiet():
        from lm_eval.evaluator import evaluate

        harness = _harness(model, tokenizer, batch_size, progress)
        try:
            # lm-eval would start a pool of processes for errors that it draws samples for.
            with mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}):
                found: Any = evaluate(
                    lm=harness, task_dict=tasks.loaded, limit=limit, log_samples=False, bootstrap_iters=_RESAMPLES
                )
        except AssertionError as error:  # all that lm-eval says of it
            raise InputError.sentence(
                f"--tasks: an item cannot be asked; an answer may be longer than {harness.max_length:,} tokens, "
                "the model's context."
            ) from error
    scores, counts = found["results"], found["n-samples"]
    results: dict[str, TaskResult] = {}
    for name in tasks.names:
        asked = _ALIASES.get(name, name)
        for one in tasks.members.get(name, [asked]):
            leaves = [one] if one in counts else _leaves(one, tasks.loaded["group_map"])
            samples = sum(int(counts[leaf]["effective"]) for leaf in leaves)
            key = name if one == asked else one
            results[key] = TaskResult(key, samples, _metrics(scores[one]))
    return results


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, model_name: str) -> None:
    """Raise ModelError where there is no tokenizer, without which no task can be asked."""
    if tokenizer is None:
        raise ModelError.sentence(f"{model_name} has no tokenizer, so it can be asked no --tasks.")


# --- lm-eval ----------------------------------------------------------------------------------------------


def _manager(names: Sequence[str], everything: bool) -> tuple[Any, list[str]]:
    """lm-eval's index of tasks, and the names in it: the usual ones, or all if a name is not among them."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError.sentence(
            f"--tasks needs lm-eval, which cannot be imported ({_first_line(error)}): pip install 'rarefy[tasks]'"
        ) from error
    home = Path(str(lm_eval.__file__)).parent / "tasks"
    usual: Any = TaskManager(include_defaults=False, include_path=[str(home / part) for part in _DEFINITIONS])
    if not everything or all(_ALIASES.get(name, name) in usual.task_index for name in names):
        return usual, list(usual.all_tasks)
    manager: Any = TaskManager()  # reads some 15,000 definitions, which takes many seconds
    return manager, list(manager.all_tasks)


def _harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Any:
    """The model as lm-eval wants it; its tokenizer is a copy, because lm-eval gives it a padding token."""
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self._total, self._done = len(requests), 0
            result = super()._loglikelihood_tokens(requests, *args, **kwargs)
            if progress:
                progress(self._total, self._total)
            return result

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            result = super()._model_call(inps, *args, **kwargs)
            self._done = min(self._done + len(inps), self._total)
            if progress:
                progress(self._done, self._total)
            return result

    return Harness(pretrained=model, tokenizer=deepcopy(tokenizer), backend="causal", batch_size=batch_size)


def _metrics(scores: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """lm-eval's "acc,none" and "acc_stderr,none" as pairs."""
    values = {}
    for key, value in scores.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = scores.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else f"{metric}_{filtered}"
        values[name] = (float(value), float(error) if isinstance(error, (int, float)) else math.nan)
    return values


def _leaves(group: str, children: dict[str, list[str]]) -> list[str]:
    found = []
    for child in children.get(group, []):
        found += _leaves(child, children) if child in children else [child]
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, lm-eval and what it uses neither log, warn, print nor draw progress bars."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


# --- Local files ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """One published data set: the file that holds it, by the start of its name, and what becomes of a line.

    ``convert(row, extra)`` gives the row as the hub has it, or raises KeyError, TypeError or ValueError.
    ``splits`` says under which names the rows are asked for.
    """

    stem: str
    splits: tuple[str, ...]
    convert: Callable[[Row, str], Row]


class _LocalData:
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
        raise _malformed(path, number, _first_line(error)) from None


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
