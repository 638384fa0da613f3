"""How far a pruned model's next-token distribution is from the dense model's: damage that shows early.

For every predicted position with the dense model's distribution p and the pruned model's q,

    KL(p || q) = sum over the vocabulary of p (log p - log q)        in nats, 0 where nothing changed,

and whether both put the same token first. The positions are those of perplexity, whose value comes out
of the same forward pass. The dense side is either a second model that runs beside, or what entered its
head, recorded once: pruning leaves the head alone, so the recorded states (hidden numbers a position
instead of a whole vocabulary) give the dense logits again at the price of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rarefy.errors import InputError
from rarefy.evaluation.logits import (
    Rows,
    cut_windows,
    evaluating,
    rows_of,
    slices,
)
from rarefy.evaluation.perplexity import Perplexity, mean_perplexity
from rarefy.models.head import base_output, head_alone, predicting, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Divergence:
    """Mean over all predicted tokens: ``kl`` in nats, ``agreement`` the share with the same first token.

    ``perplexity`` is the pruned model's, of the same windows.
    """

    kl: float
    agreement: float
    perplexity: Perplexity


@dataclass(frozen=True)
class HeadInputs:
    """What entered the dense model's head: (windows, length, hidden) in its dtype, on the CPU."""

    states: Float[Tensor, "windows length hidden"]


def divergence(
    model: PreTrainedModel,
    dense: PreTrainedModel | HeadInputs,
    tokens: Int64[Tensor, " tokens"],
    length: int = 2048,
    *,
    max_windows: int | None = None,
    bos_id: int | None = None,
    batch_size: int = 1,
    source: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Compare ``model`` with ``dense`` on the windows that ``perplexity`` reads of the same arguments.

    ``dense`` is a model with the same vocabulary, or its HeadInputs for the same windows, which are only
    right where ``model`` has the dense model's head. Distributions are compared in float32 and added in
    float64. InputError where the vocabularies differ, CalibrationError where the text is too short.
    """
    ids = cut_windows(tokens, length, max_windows, bos_id)
    if not isinstance(dense, HeadInputs):
        check_vocabularies(model, dense)
    elif dense.states.shape[:2] != ids.shape:
        given = tuple(dense.states.shape[:2])
        raise InputError("dense", given, f"the head inputs of {tuple(ids.shape)} windows and tokens")
    total_loss = total_kl = 0.0
    equal = 0
    with evaluating(model, *([] if isinstance(dense, HeadInputs) else [dense])):
        alone = head_alone(model, ids)
        dense_alone = alone if isinstance(dense, HeadInputs) else head_alone(dense, ids)
        for first in range(0, len(ids), batch_size):
            batch = ids[first : first + batch_size].to(model.device)
            if isinstance(dense, HeadInputs):
                pairs = _with_recorded(model, batch, dense.states[first : first + batch_size], alone)
            else:
                pairs = _side_by_side(model, dense, batch, alone, dense_alone)
            targets = batch[:, 1:].flatten()
            row = 0
            for logits, dense_logits in pairs:
                part = targets[row : row + len(logits)]
                row += len(logits)
                loss, kl, same = _compare(logits, dense_logits, part)
                total_loss, total_kl, equal = total_loss + loss, total_kl + kl, equal + same
            if progress:
                progress(min(first + batch_size, len(ids)), len(ids))
    found = mean_perplexity(total_loss, ids, source)
    return Divergence(total_kl / found.tokens, equal / found.tokens, found)


def record_head_inputs(
    model: PreTrainedModel,
    tokens: Int64[Tensor, " tokens"],
    length: int = 2048,
    *,
    max_windows: int | None = None,
    bos_id: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> HeadInputs:
    """Run the dense model over the windows once and keep what enters its head."""
    ids = cut_windows(tokens, length, max_windows, bos_id)
    states: Tensor | None = None
    with evaluating(model):
        alone = head_alone(model, ids)
        for first in range(0, len(ids), batch_size):
            batch = ids[first : first + batch_size].to(model.device)
            hidden = base_output(model, batch) if alone else _seen_by_head(model, batch)
            if states is None:
                states = torch.empty(*ids.shape, hidden.shape[-1], dtype=hidden.dtype)
            states[first : first + len(batch)] = hidden.to(states)
            if progress:
                progress(min(first + batch_size, len(ids)), len(ids))
    assert states is not None  # there is at least one window
    return HeadInputs(states)


def check_vocabularies(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raise InputError unless both models give a logit for the same number of tokens."""
    size, dense_size = (vocabulary_size(one) for one in (model, dense))
    if size != dense_size:
        raise InputError(
            "the dense model", f"one with {dense_size:,} tokens", f"one with {size:,}, as the pruned one"
        )


# --- One batch --------------------------------------------------------------------------------------------


def _compare(
    logits: Float[Tensor, "rows vocabulary"],
    dense: Float[Tensor, "rows vocabulary"],
    targets: Int64[Tensor, " rows"],
) -> tuple[float, float, int]:
    """Sums over rows: the loss of the targets, KL(dense || pruned), and how many first tokens agree."""
    same = int((logits.argmax(-1) == dense.argmax(-1)).sum())
    log_q = logits.float().log_softmax(-1)
    log_p = dense.float().log_softmax(-1)
    loss = nn.functional.nll_loss(log_q, targets, reduction="none")
    kl = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    kl.masked_fill_(torch.isneginf(log_p), 0.0)  # what cannot come adds nothing, even where q is 0, too
    return float(loss.cpu().double().sum()), float(kl.sum(-1).cpu().double().sum()), same


Pairs = Iterator[tuple[Tensor, Tensor]]


def _with_recorded(model: PreTrainedModel, ids: Tensor, states: Tensor, alone: bool) -> Pairs:
    """Logits of the model and of the dense one, (rows, vocabulary) each; ``states`` are (batch, length, hidden)."""
    states = states.to(model.device)
    if alone:
        rows = rows_of(model, ids, alone)
        dense_rows = Rows(predicting(states), rows.to_logits)
    else:
        # What the model does after its head is its own affair: both go through it in one batch.
        with _head_hook(model, lambda hidden: torch.cat([hidden, states.to(hidden)])):
            both = model(input_ids=ids, use_cache=False).logits.chunk(2)
        rows, dense_rows = (Rows(predicting(logits), lambda rows: rows) for logits in both)
    yield from _pairs(model, rows, dense_rows)


def _side_by_side(
    model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor, alone: bool, dense_alone: bool
) -> Pairs:
    """Logits of two models, (rows, vocabulary) each."""
    yield from _pairs(model, rows_of(model, ids, alone), rows_of(dense, ids.to(dense.device), dense_alone))


def _pairs(model: PreTrainedModel, rows: Rows, dense_rows: Rows) -> Pairs:
    for part in slices(len(rows), model):
        yield rows.logits(part), dense_rows.logits(part).to(model.device)


# --- Models -----------------------------------------------------------------------------------------------


def _seen_by_head(model: PreTrainedModel, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    with _head_hook(model, keep):
        model(input_ids=ids, use_cache=False)
    return seen[0]


@contextmanager
def _head_hook(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, the head's input (b, length, hidden) goes through ``change``."""
    head = model.get_output_embeddings()
    if head is None:
        raise InputError.sentence(f"{type(model).__name__} names no output head, so it cannot be compared.")
    handle = head.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()
