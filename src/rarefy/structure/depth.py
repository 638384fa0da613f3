"""How far a model without some of its blocks is from the dense one: KL divergence and loss over calibration windows.

A block that is off hands its input on. Hidden states are shared: where each block in turn is left out, what enters it
is known from one pass, so that L blocks take L + L (L - 1) / 2 block passes instead of L (L - 1).

Ordinary text hardly shows whether a model can still copy from its context, which a few blocks do (induction heads)
and which many tasks need. So every second window can be made to say its first half twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from rarefy.calibration.stream import hidden_place
from rarefy.calibration.trees import mapped
from rarefy.errors import ModelError
from rarefy.layer.passes import row_dots
from rarefy.models.blocks import find_blocks
from rarefy.models.head import LOGIT_BYTES, base_output, head_alone, predicting, vocabulary_size
from rarefy.structure.memo import Memo

#: Tokens on which a smaller model is compared with the dense one, and how far they may be apart: both do the same
#: products in the same order, but for what a model derives from the number of its blocks.
_PROBE, _SAME = 32, 1e-3

#: In a memo, the tokens times blocks that what is in it took.
_TOKENS = "block_tokens"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Distance:
    """Means over all predicted tokens, in nats: ``kl`` to the dense model, and ``loss`` of the text itself."""

    kl: float
    loss: float


class BlockSets:
    """Measures sets of kept blocks of one model on some windows, token ids (num, length).

    What enters the dense model's head (or its logits, where the head does not stand alone) is kept of all windows.
    ``block_tokens`` counts tokens times the blocks that they went through, the measure of what a search costs.
    What is in ``memo`` is not measured again, and counts as it did. With ``copies``, what is measured on are
    ``with_copies(windows)``. Raises ModelError where the model does not run its blocks one after the other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Int64[Tensor, "num length"],
        batch_size: int = 4,
        memo: Memo | None = None,
        copies: bool = False,
    ) -> None:
        self.model, self.windows, self.batch_size = model, windows, batch_size
        self._measured = with_copies(windows) if copies else windows
        self.blocks = [block.module for block in find_blocks(model)]
        self.memo = Memo() if memo is None else memo
        self.block_tokens = 0
        self._output: Any = None  # what a block puts out, for its form
        self._forwards = [block.forward for block in self.blocks]
        with torch.no_grad():
            self._alone = head_alone(model, windows)
            everything = range(len(self.blocks))
            self._dense = [self._rows(self._ids(batch), _Run(everything)) for batch in range(self.num_batches)]
        self.block_tokens = int(self.memo.get(_TOKENS, self.block_tokens))

    @property
    def number(self) -> int:
        """How many blocks the dense model has."""
        return len(self.blocks)

    @property
    def num_batches(self) -> int:
        """In how many batches the windows are measured."""
        return self._batches(len(self.windows))

    def covers_all(self, num_windows: int) -> bool:
        """Whether a part of the windows, in whole batches, is all of them."""
        return self._batches(num_windows) == self.num_batches

    def measure(self, kept: Collection[int], num_windows: int | None = None) -> Distance:
        """The distance of the model with these blocks only, on the first ``num_windows`` windows (None: all).

        Batches are whole, so that it may be a few windows more.
        """
        num = num_windows or len(self.windows)
        return self._remembered(_key(f"{num} windows", kept), lambda: self._sums(range(self._batches(num)), kept))

    def measure_batch(self, kept: Collection[int], batch: int) -> Distance:
        """The distance of the model with these blocks only, on one of the batches of windows."""
        return self._remembered(_key(f"batch {batch}", kept), lambda: self._sums([batch], kept))

    def measure_model(self, model: PreTrainedModel, num_windows: int | None = None) -> Distance:
        """The distance of a model with the dense one's head, and other blocks; windows as for ``measure``."""
        number, sums = len(find_blocks(model)), []
        with torch.no_grad():
            for batch in range(self._batches(num_windows or len(self.windows))):
                ids = self._ids(batch)
                hidden = base_output(model, ids) if self._alone else model(input_ids=ids, use_cache=False).logits
                sums += self._compare([predicting(hidden)], self._dense[batch], ids)
                self.block_tokens += ids.numel() * number
        return self._mean(sums)

    def without_each(
        self,
        kept: Sequence[int],
        progress: Progress | None = None,
        *,
        only: Sequence[int] | None = None,
        num_windows: int | None = None,
    ) -> dict[int, Distance]:
        """The distance with each one of the ``kept`` blocks left out, by its index.

        ``only`` these are left out (None: each), on the first ``num_windows`` windows, as ``measure`` counts them.
        """
        num, left_out = num_windows or len(self.windows), kept if only is None else only
        keys = {index: _key(f"{num} windows", {*kept} - {index}) for index in left_out}
        if not all(key in self.memo for key in keys.values()):
            sums = self._without_each(kept, left_out, self._batches(num), progress)
            self._remember({keys[index]: self._mean(of) for index, of in sums.items()})
        return {index: Distance(*self.memo[key]) for index, key in keys.items()}

    def _without_each(
        self, kept: Sequence[int], left_out: Sequence[int], number: int, progress: Progress | None
    ) -> dict[int, list[tuple[float, float, int]]]:
        sums: dict[int, list[tuple[float, float, int]]] = {index: [] for index in left_out}
        with torch.no_grad():
            for batch in range(number):
                ids, whole = self._ids(batch), _Run(kept, keeps_entries=True)
                self._rows(ids, whole)
                found = []
                for index in left_out:
                    left = [other for other in kept if other != index]
                    found.append(self._rows(ids, _Run(left, first=index, entry=whole.entries.pop(index))))
                for index, one in zip(left_out, self._compare(found, self._dense[batch], ids)):
                    sums[index].append(one)
                if progress:
                    progress(batch + 1, number)
        return sums

    def _sums(self, batches: Iterable[int], kept: Collection[int]) -> list[tuple[float, float, int]]:
        with torch.no_grad():
            return [
                self._compare([self._rows(self._ids(batch), _Run(kept))], self._dense[batch], self._ids(batch))[0]
                for batch in batches
            ]

    def _remembered(self, key: str, found: Callable[[], Sequence[tuple[float, float, int]]]) -> Distance:
        if key not in self.memo:
            self._remember({key: self._mean(found())})
        return Distance(*self.memo[key])

    def _remember(self, found: Mapping[str, Distance]) -> None:
        self.memo.keep({key: [one.kl, one.loss] for key, one in found.items()} | {_TOKENS: self.block_tokens})

    def confirm(self, smaller: PreTrainedModel, kept: Collection[int]) -> None:
        """Raise ModelError unless a model of the ``kept`` blocks alone computes what was measured of them."""
        ids = self.windows[:1, :_PROBE].to(self.model.device)
        with torch.no_grad():
            with self._standing_in(_Run(kept)):
                expected = self.model(input_ids=ids, use_cache=False).logits.float()
            try:
                found = smaller(input_ids=ids, use_cache=False).logits.float()
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, LookupError):  # what one block shares with others may be gone
                found = torch.full_like(expected, torch.nan)
        if not float((found - expected).norm()) <= _SAME * float(expected.norm()):
            raise ModelError.sentence(
                f"{type(self.model).__name__} without some of its blocks does not compute what it does with these "
                "blocks handing their input on, so that Rarefy cannot remove them."
            )

    def _batches(self, num: int) -> int:
        """How many batches the first ``num`` windows are in; always the same ones, as the dense rows are of each."""
        return -(-num // self.batch_size)

    def _ids(self, batch: int) -> Tensor:
        return self._measured[batch * self.batch_size :][: self.batch_size].to(self.model.device)

    def _rows(self, ids: Tensor, run: _Run) -> Float[Tensor, "rows _"]:
        """What enters the head at the predicted positions, or the logits, of a model of which a part runs."""
        with self._standing_in(run):
            hidden = (
                base_output(self.model, ids) if self._alone else self.model(input_ids=ids, use_cache=False).logits
            )
        if run.called != list(range(len(self.blocks))):
            raise ModelError.sentence(f"{type(self.model).__name__} does not run its blocks one after the other.")
        self.block_tokens += ids.numel() * sum(index >= run.first for index in run.kept)
        return predicting(hidden)

    def _compare(self, found: Sequence[Tensor], dense: Tensor, ids: Tensor) -> list[tuple[float, float, int]]:
        """For the rows of each of several models the sums of KL and loss, and the number of rows."""
        head = self.model.get_output_embeddings() if self._alone else nn.Identity()
        targets = ids[:, 1:].flatten()
        size = max(1, LOGIT_BYTES // (4 * vocabulary_size(self.model)))
        sums = [[0.0, 0.0] for _ in found]
        for start in range(0, len(dense), size):
            part = slice(start, start + size)
            log_p = head(dense[part]).float().log_softmax(-1)
            p = log_p.exp()
            impossible = torch.isneginf(log_p)
            masked = bool(impossible.any())
            entropy = -row_dots(p, log_p.masked_fill_(impossible, 0.0) if masked else log_p)
            target = targets[part].unsqueeze(1)
            for rows, total in zip(found, sums):
                # sum p (log p - log q) with log q = z - log sum exp z: two passes over the vocabulary
                z = head(rows[part]).float()
                norm = z.logsumexp(-1)
                loss = norm - z.gather(1, target).squeeze(1)
                cross = norm - row_dots(p, z.masked_fill(impossible, 0.0) if masked else z)
                total[0] += float((cross - entropy).sum(dtype=torch.float64))
                total[1] += float(loss.sum(dtype=torch.float64))
        return [(kl, loss, len(dense)) for kl, loss in sums]

    @staticmethod
    def _mean(sums: Sequence[tuple[float, float, int]]) -> Distance:
        kl, loss, rows = (sum(values) for values in zip(*sums))
        return Distance(kl / rows, loss / rows)

    @contextmanager
    def _standing_in(self, run: _Run) -> Iterator[None]:
        """Within the scope, only the blocks of ``run`` compute."""
        own = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for index, block in enumerate(self.blocks):
                block.forward = self._stand_in(index, self._forwards[index], run)
            yield
        finally:
            for block, forward in zip(self.blocks, own):
                block.__dict__.pop("forward", None)  # the class's own forward shows again
                if forward is not None:
                    block.forward = forward

    def _stand_in(self, index: int, forward: Callable[..., Any], run: _Run) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            run.called.append(index)
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == run.first and run.entry is not None:
                hidden = run.entry
            if index in run.kept and index >= run.first:
                if run.keeps_entries:
                    run.entries[index] = hidden
                output = (
                    forward(hidden, *args[1:], **kwargs) if args else forward(**{**kwargs, "hidden_states": hidden})
                )
                self._output = output
                return output
            if self._output is None:
                return hidden
            place = hidden_place(self._output)
            return mapped(self._output, lambda where, leaf: hidden if where == place else leaf)

        return called


class _Run:
    """One pass: the blocks that compute, from ``first`` on, what enters that one, and what is seen on the way."""

    def __init__(
        self, kept: Collection[int], first: int = 0, entry: Tensor | None = None, keeps_entries: bool = False
    ) -> None:
        self.kept, self.first, self.entry, self.keeps_entries = frozenset(kept), first, entry, keeps_entries
        self.entries: dict[int, Tensor] = {}
        self.called: list[int] = []


def _key(windows: str, kept: Collection[int]) -> str:
    return f"{windows}, blocks {','.join(map(str, sorted(kept)))}"


def with_copies(windows: Int64[Tensor, "num length"]) -> Int64[Tensor, "num length"]:
    """The windows, of which every second has its first half once more in place of its second.

    The first token, which may be a start token, is not repeated.
    """
    half = windows.shape[1] // 2
    made = windows.clone()
    made[1::2, half + 1 : 2 * half] = windows[1::2, 1:half]
    return made


def lowest(scores: Mapping[int, float], num: int) -> list[int]:
    """The indices of the ``num`` lowest scores, in order of the blocks; of equal ones the later is taken first."""
    return sorted(sorted(scores, key=lambda index: (scores[index], -index))[:num])
