"""Turns a source of text into tokens, and draws windows of them; several sources take shares of the windows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int64
from torch import Tensor

from rarefy.calibration.chat_template import ChatTemplate
from rarefy.calibration.documents import SEPARATOR, CalibrationWarning, Document, Source
from rarefy.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# A shard of C4 holds about 170 million tokens. Sixteen times the tokens that the windows hold keeps overlaps
# rare (a token is in a sixteenth of a window on average) and takes seconds.
DRAW_FROM = 16

# Of a file with more than twice this many characters for each token that is needed, every second, third, ...
# document is enough: text has 1 to 5 characters a token, so that this leaves more tokens than are needed.
_CHARACTERS_PER_TOKEN = 8

_DOCUMENTS_PER_BATCH = 512


def token_stream(
    source: Source, tokenizer: PreTrainedTokenizerBase, enough: int | None = None
) -> Int64[Tensor, " tokens"]:
    """All tokens of ``source`` in one row, int64 on the CPU, without special tokens of the tokenizer's own.

    Documents are tokenised in batches. A text is followed by an empty line, except the last; a conversation is
    what the tokenizer's chat template makes of it, and its end is the template's. For evaluation all text is read.
    For windows that are drawn, ``enough`` (``DRAW_FROM * num * length`` is meant) keeps this to seconds: rows from
    the hub end with the first ``enough`` tokens, and of a large file of documents every second, third or n-th is
    taken, from its beginning to its end. CalibrationError where the text cannot be read, or where the tokenizer
    has no chat template for conversations; CalibrationWarning where its template refuses some of them.
    """
    pieces: list[Tensor] = []
    count = 0
    stride = (source.characters or 0) // (_CHARACTERS_PER_TOKEN * enough) if enough else 1
    template = ChatTemplate(source.name, tokenizer)
    texts = _texts(islice(source.documents(), 0, None, max(1, stride)), template)
    while batch := list(islice(texts, _DOCUMENTS_PER_BATCH)):
        # verbose=False: a stream is longer than any model's context, which the tokenizer would warn about.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        pieces += [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]
        count += sum(len(ids) for ids in encoded["input_ids"])
        if source.capped and enough is not None and count >= enough:
            pieces = [torch.cat(pieces)[:enough]]
            break
    template.report()
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _texts(documents: Iterable[Document], template: ChatTemplate) -> Iterator[str]:
    """Every document as it is tokenised, a plain text with the separator behind it unless it is the last."""
    waiting: str | None = None
    for document in documents:
        if waiting is not None:
            yield waiting + SEPARATOR
            waiting = None
        if isinstance(document, str):
            waiting = document
        elif (text := template.render(document)) is not None:
            yield text
    if waiting is not None:
        yield waiting


def check_token_ids(
    tokens: Int64[Tensor, "..."], config: PreTrainedConfig, model: str, bos_id: int | None = None
) -> None:
    """Raise CalibrationError where ``tokens``, or the start token, is beyond the embeddings of ``model``.

    A model often has more embeddings than its tokenizer has tokens. Fewer are the sign of another model's
    tokenizer, or of embeddings that were not resized when tokens were added; only what occurs is refused.
    """
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    largest = max(int(tokens.max()) if tokens.numel() else 0, bos_id or 0)
    if isinstance(size, int) and largest >= size:
        raise CalibrationError.sentence(
            f"The tokenizer of {model} gives token {largest:,}, but its model has embeddings for {size:,} tokens "
            "only: it is another model's tokenizer, or the model was not resized when tokens were added."
        )


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


# --- Several sources ----------------------------------------------------------------------------------------

#: Draws (num, length) windows of one source: ``draw(num, seed)``.
Draw = Callable[[int, int], Tensor]


def apportion(num: int, shares: Sequence[float]) -> list[int]:
    """``num`` windows parted by ``shares``: whole numbers that add up to ``num``, by the largest remainder.

    Shares are relative to their sum. Each source gets its quota, ``num * share / sum(shares)``, rounded down;
    what is left goes, one each, to the largest fractions, of equal ones to the first. InputError unless every
    share is a finite number above 0, CalibrationError where a share is too small for a single window.
    """
    if not shares:
        raise InputError("the shares", list(shares), "one number above 0 for each source")
    for share in shares:
        if not 0 < share < float("inf"):
            raise InputError("the share of a source", share, "a finite number above 0")
    exact = [Fraction(share) for share in shares]  # floats are exact fractions: no quota is rounded
    quotas = [num * share / sum(exact) for share in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: num - sum(counts)]:
        counts[i] += 1
    for share, count in zip(shares, counts, strict=True):
        if count == 0:
            raise CalibrationError.sentence(
                f"The share {share:g} of {num:,} windows is less than one: more windows or a larger share are needed."
            )
    return counts


def draw_mixture(draws: Sequence[Draw], shares: Sequence[float], num: int, seed: int) -> Int64[Tensor, "num length"]:
    """``num`` windows of several sources, as many of each as ``apportion`` says, in seeded random order.

    ``draws[i](count, seed)`` gives the windows of source i: from a stream of tokens, or written by a model. Every
    source gets a seed of its own, so that two sources of one text do not give the same windows. The order mixes
    the sources, so that every batch, and every process's part, holds some of each.
    """
    counts = apportion(num, shares)
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**31, (len(draws),), generator=generator).tolist()
    windows = torch.cat([draw(count, own) for draw, count, own in zip(draws, counts, seeds, strict=True)])
    return windows[torch.randperm(num, generator=generator)]
