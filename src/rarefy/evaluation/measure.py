"""All that is measured of one model: perplexity on each text, distance from the dense model, tasks, texts.

Measures(corpora, ...)  --record(dense)-->  what entered its head  --of(model, dense)-->  plain values
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rarefy.calibration.documents import Source
from rarefy.calibration.windows import check_token_ids, token_stream
from rarefy.errors import CalibrationError
from rarefy.evaluation.divergence import HeadInputs, divergence, record_head_inputs
from rarefy.evaluation.perplexity import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rarefy.evaluation.tasks import Tasks
    from rarefy.models.source import ModelSource

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Corpus:
    """A text to measure on: ``label`` stands in tables and column names, ``tokens`` (n,) is all of it."""

    label: str
    source: str
    tokens: Tensor

    @property
    def digest(self) -> str:
        """A fingerprint of the tokens."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Measures:
    """What is measured, and how: windows of ``length`` tokens, the first ``max_windows`` of each text."""

    corpora: Sequence[Corpus]
    length: int
    max_windows: int | None = None
    bos_id: int | None = None
    batch_size: int = 1
    tasks: Tasks | None = None
    limit: int | float | None = None

    def record(self, dense: PreTrainedModel, progress: Progress | None = None) -> list[HeadInputs]:
        """What enters the dense model's head on each text, for ``of`` to compare pruned models with."""
        return [
            record_head_inputs(
                dense,
                corpus.tokens,
                self.length,
                max_windows=self.max_windows,
                bos_id=self.bos_id,
                batch_size=self.batch_size,
                progress=_named(progress, corpus.label),
            )
            for corpus in self.corpora
        ]

    def of(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        dense: PreTrainedModel | Sequence[HeadInputs] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """``perplexity``, ``divergence`` (where ``dense`` is given) and ``tasks`` of a model, for JSON.

        ``perplexity`` is a list of text, label, value, length, windows, tokens, bos and dtype, in the order of
        the texts; ``divergence`` is the same with kl (nats) and agreement instead of the value; ``tasks`` maps
        names to samples and metrics. A value that is not finite is None.
        """
        rows: list[dict[str, Any]] = []
        distances: list[dict[str, Any]] = []
        for i, corpus in enumerate(self.corpora):
            options: dict[str, Any] = {
                "max_windows": self.max_windows,
                "bos_id": self.bos_id,
                "batch_size": self.batch_size,
                "source": corpus.source,
                "progress": _named(progress, corpus.label),
            }
            distance = None
            if dense is None:
                found = perplexity(model, corpus.tokens, self.length, **options)
            else:
                reference = dense[i] if isinstance(dense, Sequence) else dense
                distance = divergence(model, reference, corpus.tokens, self.length, **options)
                found = distance.perplexity
            row = {
                "text": corpus.source,
                "label": corpus.label,
                "length": found.length,
                "windows": found.windows,
                "tokens": found.tokens,
                "bos": self.bos_id is not None,
                "dtype": str(model.dtype).removeprefix("torch."),
            }
            rows.append({**row, "value": finite(found.perplexity)})
            if distance is not None:
                distances.append({**row, "kl": finite(distance.kl), "agreement": distance.agreement})
        return {"perplexity": rows, "divergence": distances, "tasks": self._tasks(model, tokenizer, progress)}

    def _tasks(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, progress: Progress | None
    ) -> dict[str, Any]:
        if self.tasks is None or tokenizer is None:
            return {}
        from rarefy.evaluation.tasks import evaluate_tasks

        results = evaluate_tasks(
            model,
            tokenizer,
            self.tasks,
            limit=self.limit,
            batch_size=self.batch_size,
            progress=_named(progress, "tasks"),
        )
        return {
            name: {
                "samples": result.samples,
                "metrics": {
                    metric: {"value": finite(value), "stderr": finite(error)}
                    for metric, (value, error) in result.metrics.items()
                },
            }
            for name, result in results.items()
        }


def corpora(
    sources: dict[str, Source],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    bos_id: int | None,
    model: ModelSource,
) -> list[Corpus]:
    """The tokens of all texts, which ``model`` is to read in windows of ``length`` that may begin with ``bos_id``.

    Raises CalibrationError where a text is shorter than a window, or has tokens that the model does not know.
    """
    found = []
    for label, source in sources.items():
        tokens = token_stream(source, tokenizer)
        check_token_ids(tokens, model.config, model.name, bos_id)
        body = length - (bos_id is not None)
        if len(tokens) < body:
            raise CalibrationError.sentence(
                f"The text of {source.name} has {len(tokens):,} tokens, but one window needs {body:,}."
            )
        found.append(Corpus(label, source.name, tokens))
    return found


def finite(value: float) -> float | None:
    """The value, or None where it is not finite, which JSON cannot say."""
    return value if math.isfinite(value) else None


def _named(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    watcher = progress
    return lambda done, total: watcher(done, total, name)
