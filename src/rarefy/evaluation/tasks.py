"""Zero-shot tasks through lm-eval: its definitions, prompts and scores, on the hub's data or on local files.

    prepare(["arc_easy", "piqa"], folder)  -->  Tasks  --evaluate_tasks(model, ...)-->  TaskResult per task

lm-eval asks ``datasets`` for its data by name. With a folder, that question is answered from files in the
layouts in which the data sets are published, and nothing else about a task changes. Everything that can be
wrong with a name or a file is found by ``prepare``, before any model is loaded.
"""

from __future__ import annotations

import difflib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from rarefy.calibration.documents import first_line
from rarefy.errors import InputError
from rarefy.evaluation.task_data import LocalData

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
        try:
            local = LocalData(Path(folder).expanduser())
        except RuntimeError as error:  # of ~name, where nobody has that name
            reason = first_line(error)
            raise InputError.sentence(f"--task-data is {str(folder)!r}, which cannot be found: {reason}.") from None
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
        raise InputError.sentence(f"--tasks: the data cannot be read {where}: {first_line(error)}.") from error
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
    limit: int | float | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TaskResult]:
    """The results of ``tasks`` by name, on the first ``limit`` items of each, or this fraction of them (None: all).

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


# --- lm-eval ----------------------------------------------------------------------------------------------


def _manager(names: Sequence[str], everything: bool) -> tuple[Any, list[str]]:
    """lm-eval's index of tasks, and the names in it: the usual ones, or all if a name is not among them."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError.sentence(
            f"--tasks needs lm-eval, which cannot be imported ({first_line(error)}): pip install 'rarefy[tasks]'"
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

    from rarefy.calibration.windows import check_token_ids

    class Harness(HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self._total, self._done = len(requests), 0
            result = super()._loglikelihood_tokens(requests, *args, **kwargs)
            if progress:
                progress(self._total, self._total)
            return result

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            check_token_ids(inps, model.config, "the model")
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
