"""The windows of a tuning: those to train on, and others of the same text that are held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int64
from torch import Tensor

from rarefy.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from rarefy.calibration.documents import Source
    from rarefy.models.source import ModelSource


@dataclass(frozen=True)
class Text:
    """One source of text: how many windows to train on and to hold out, and these, once they are there.

    ``windows`` are token ids (num + held_out, length), those to train on first; None where the dense model is to
    write them.
    """

    source: Source
    num: int
    held_out: int
    seed: int
    windows: Int64[Tensor, "windows length"] | None = None

    def written_by(self, write: Callable[[int, int], Tensor]) -> Text:
        """The same text, written by ``write(num, seed)`` where it is not there yet."""
        if self.windows is not None:
            return self
        return replace(self, windows=write(self.num + self.held_out, self.seed))


def read_texts(
    sources: Sequence[tuple[Source, float]],
    model: ModelSource,
    num: int,
    held_out: int,
    length: int,
    seed: int,
    bos: bool,
) -> list[Text]:
    """The windows of all sources, each with its share of them.

    The windows of one source to train on are those that ``rarefy prune`` draws of the same source, number, length
    and seed. Raises CalibrationError where there is too little text.
    """
    from rarefy.calibration.sources import SELF
    from rarefy.calibration.windows import DRAW_FROM, apportion
    from rarefy.runs.make_plan import read_tokens

    counts = apportion(num, [share for _, share in sources])
    # Each source has the same share of the held-out windows as of the others, rounded: a small share may have none.
    ends = [held_out * sum(counts[: i + 1]) // num for i in range(len(counts))]
    held_counts = [end - begin for begin, end in zip([0, *ends], ends)]
    texts = []
    for place, ((source, _), train, held) in enumerate(zip(sources, counts, held_counts)):
        text = Text(source, train, held, seed + place)
        if source is not SELF:
            tokens, bos_id = read_tokens(model, source, bos, enough=DRAW_FROM * train * length)
            text = replace(text, windows=draw(tokens, text, length, bos_id))
        texts.append(text)
    return texts


def joined(texts: Sequence[Text]) -> tuple[Int64[Tensor, "windows length"], int]:
    """All windows to train on, then all that are held out, and the number of these."""
    windows = [text.windows for text in texts if text.windows is not None]
    train = [each[: text.num] for text, each in zip(texts, windows, strict=True)]
    held = [each[text.num :] for text, each in zip(texts, windows, strict=True)]
    return torch.cat([*train, *held]), sum(text.held_out for text in texts)


def draw(
    tokens: Int64[Tensor, " tokens"], text: Text, length: int, bos_id: int | None
) -> Int64[Tensor, "windows length"]:
    """The windows of one text: first those to train on, then those to hold out, which share no token with them.

    Raises CalibrationError where the text has no room for as many.
    """
    from rarefy.calibration.windows import draw_windows

    name = f"the text of {text.source.name}"
    body = length if bos_id is None else length - 1
    if body < 1:
        raise InputError("--sequence-length", length, "at least 2 with --bos")
    if len(tokens) < body:
        raise CalibrationError.sentence(
            f"{name[0].upper()}{name[1:]} has {len(tokens):,} tokens, but one window needs {body:,}."
        )
    # Places are drawn as tokens would be, so that windows are the same and it is known where they lie.
    places = torch.arange(len(tokens))
    train = draw_windows(places, text.num, body, text.seed, name=name)[:, 0]
    held: list[int] = []
    if text.held_out:
        free = torch.ones(max(len(tokens) - body + 1, 0), dtype=torch.bool)
        for start in train.tolist():
            free[max(0, start - body + 1) : start + body] = False
        candidates = free.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(text.seed)
        for number in torch.randperm(len(candidates), generator=generator).tolist():
            start = int(candidates[number])
            if all(abs(start - other) >= body for other in held):
                held.append(start)
            if len(held) == text.held_out:
                break
    if len(held) < text.held_out:
        raise CalibrationError.sentence(
            f"{name[0].upper()}{name[1:]} has {len(tokens):,} tokens, of which {text.num:,} windows leave room for "
            f"{len(held):,} windows of {body:,} to hold out: fewer --num-samples, or --held-out {len(held)}."
        )
    windows = tokens.unfold(0, body, 1)[torch.tensor([*train.tolist(), *held])]
    if bos_id is None:
        return windows
    return torch.cat([windows.new_full((len(windows), 1), bos_id), windows], dim=1)
