"""How much of each kind to remove for a size: a search over the counts of blocks, KV heads and MLP neurons.

The variables are three numbers. Which blocks, heads and neurons go is for the rules that choose them by themselves,
and what is left is repaired exactly, so that a candidate is one count of each kind (counts.py), and its value the KL
to the dense model. Successive halving: all candidates are made and measured on a few windows, the best quarter on
four times as many, and so on; the last ones are made on all windows, and all that remove a single kind are among
them, so that the search ends with none that is worse than these. Windows on which candidates are measured are not
those with which they are repaired.

Source: the variables of "Search for Efficient LLMs", arXiv 2409.17372, without its masks, for which the layer problem
has an answer; successive halving is Jamieson and Talwalkar, arXiv 1502.07943.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from rarefy.errors import ModelError
from rarefy.structure.counts import Counts
from rarefy.structure.depth import BlockSets
from rarefy.structure.exits import Choice
from rarefy.structure.parts import Kind, find_parts
from rarefy.structure.rules import Rule, Watch, choose_blocks, silent
from rarefy.structure.shrink import Removal, shrink, with_order
from rarefy.structure.width import remove_parts, towards_dense

#: The share of the windows on which candidates are measured; they are repaired with the others.
MEASURED = 1 / 4
#: A round keeps one candidate in so many, and the next has so many times its windows.
RATE = 4
#: Candidates of the last round, beside those that remove a single kind.
FINALISTS = 3

_PROBE = 32  # tokens on which the order of fused rows is found


@dataclass(frozen=True)
class Round:
    """A round of the search: how many candidates, on how many windows they are ``repaired`` and ``measured``."""

    candidates: int
    repaired: int
    measured: int


@dataclass(frozen=True)
class Measured:
    """A candidate in one round. ``remove`` are its blocks.

    ``kl`` (nats) is None where it has no stock form, or computes what is no number.
    """

    counts: Counts
    round: int
    remove: tuple[int, ...]
    kl: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``run.json`` and the journal."""
        return {**asdict(self.counts), "round": self.round, "remove": list(self.remove), "kl": self.kl}


@dataclass(frozen=True)
class Searched:
    """What a search found: the ``best`` candidate and ``all`` that were measured; what it cost, as ``BlockSets``."""

    best: Measured
    all: tuple[Measured, ...]
    block_tokens: int


def plan_rounds(candidates: Sequence[Counts], num_windows: int, batch_size: int) -> list[Round]:
    """The rounds of a search over these candidates, the last on all windows."""
    measured = math.ceil(max(1, num_windows * MEASURED) / batch_size) * batch_size
    repaired = num_windows - measured
    if repaired < 1:  # too few to share out
        measured = repaired = num_windows
    last = FINALISTS + sum(counts.is_single for counts in candidates)
    numbers = [len(candidates)]
    while numbers[-1] > last:
        number = math.ceil(numbers[-1] / RATE)
        numbers.append(number if number >= 2 * last else last)
    parts = [RATE ** (place + 1 - len(numbers)) for place in range(len(numbers))]
    return [
        Round(number, math.ceil(repaired * part), math.ceil(measured * part)) for number, part in zip(numbers, parts)
    ]


def block_sets(
    sets: BlockSets,
    numbers: Iterable[int],
    rule: Rule = "kl",
    *,
    seed: int = 0,
    generations: int = 32,
    offspring: int = 16,
    steps: int = 500,
    watch: Watch = silent,
) -> dict[int, tuple[int, ...]]:
    """The blocks to remove, by their number: the best set, by KL, of those of ``rule``, ``kl`` and ``perplexity``."""
    wanted = sorted(set(numbers))
    found: dict[int, tuple[int, ...]] = {}
    rules: tuple[Rule, ...] = (rule, "kl", "perplexity")
    for done, number in enumerate(wanted):
        if number == 0:
            found[0] = ()
            continue
        chosen = [
            choose_blocks(sets, number, one, seed=seed, generations=generations, offspring=offspring, steps=steps)
            for one in dict.fromkeys(rules)
        ]
        best = min(chosen, key=lambda one: one.distance.kl)
        found[number] = best.remove
        watch(done + 1, len(wanted), f"{number} blocks: KL {best.distance.kl:.4f} nats")
    return found


def search_counts(
    sets: BlockSets,
    candidates: Sequence[Counts],
    remove: Mapping[int, tuple[int, ...]],
    *,
    choice: Choice = "interactions",
    repair: bool = True,
    damping: float | None = None,
    watch: Watch = silent,
) -> Searched:
    """The candidate whose model has the lowest KL to the dense one, and all that were measured.

    ``remove`` are the blocks to remove, by their number; ``choice`` chooses heads and neurons. Until the last round
    what each costs alone stands in for ``interactions``, which takes ten times as long. Raises ModelError where no
    candidate has a stock form.
    """
    rounds = plan_rounds(candidates, len(sets.windows), sets.batch_size)
    total, done = sum(one.candidates for one in rounds), 0
    found: list[Measured] = []
    alive, ranked = list(candidates), list[Measured]()
    for place, one in enumerate(rounds):
        last = place == len(rounds) - 1
        chosen_by: Choice = choice if last or choice != "interactions" else "single"
        results = []
        for counts in alive:
            maker = _Maker(sets, counts, remove[counts.blocks], chosen_by, repair, damping)
            kl = maker.kl(one, rounds[-1])
            results.append(Measured(counts, place, maker.remove, kl))
            done += 1
            told = "cannot be made" if kl is None else f"KL {kl:.4f} nats"
            watch(min(done, total), total, f"{_words(counts)}: {told}")
        found += results
        ranked = sorted((one for one in results if one.kl is not None), key=lambda one: (one.kl, one.counts))
        if not last:
            alive = _next(ranked, rounds[place + 1].candidates)
    if not ranked:
        raise ModelError.sentence(f"No smaller {type(sets.model).__name__} that was tried has a stock form.")
    return Searched(ranked[0], tuple(found), sets.block_tokens)


def _next(ranked: Sequence[Measured], number: int) -> list[Counts]:
    """The candidates of the next round: all that remove a single kind, and the best of the others."""
    singles = [one.counts for one in ranked if one.counts.is_single]
    others = [one.counts for one in ranked if not one.counts.is_single]
    return sorted([*singles, *others[: max(0, number - len(singles))]])


def _words(counts: Counts) -> str:
    return f"{counts.blocks} blocks, {counts.heads} KV heads, {counts.neurons} neurons"


@dataclass(frozen=True)
class _Maker:
    """One candidate: made of the dense model, whose weights stay as they are, and measured."""

    sets: BlockSets
    counts: Counts
    remove: tuple[int, ...]
    choice: Choice
    repair: bool
    damping: float | None

    def kl(self, one: Round, last: Round) -> float | None:
        """The KL in a round, of which ``last`` is the last one; None where the candidate has no stock form."""
        key = f"{_words(self.counts)}, without {self.remove}, {self.choice}, on {one.repaired} and {one.measured}"
        memo = self.sets.memo
        if key not in memo:
            try:
                kl = self._made_and_measured(one, last)
            except ModelError:
                kl = math.nan
            found = kl if math.isfinite(kl) else None
            memo.keep({key: found, "block_tokens": self.sets.block_tokens})
        known: float | None = memo[key]
        return known

    def _made_and_measured(self, one: Round, last: Round) -> float:
        sets, windows = self.sets, self.sets.windows
        kept = tuple(index for index in range(sets.number) if index not in self.remove)
        small = shrink(sets.model, Removal(kept))
        if self.remove:
            sets.confirm(small, kept)
        kinds: tuple[Kind, ...] = ("heads", "neurons")
        wanted = [
            (with_order(small, parts, windows[:1, :_PROBE]), parts.number - self.counts.of(parts.kind))
            for parts in (find_parts(small, kind) for kind in kinds if self.counts.of(kind))
        ]
        # The first windows are measured on; where they are too few to share out, all are used for both.
        start = 0 if last.repaired == len(windows) else len(windows) - last.repaired
        repairing = windows[start : start + one.repaired]
        path = None
        if self.repair:
            with suppress(ModelError):  # no exit of this model can aim at the dense path
                wanted, path = towards_dense(sets.model, kept, small, wanted, repairing, sets.batch_size)
        if not wanted:
            return sets.measure(kept, one.measured).kl
        # Until now the weights of exits are the dense model's.
        for site in (site for parts, _ in wanted for site in parts.exits.values()):
            site.module.weight = nn.Parameter(site.parameter.detach().clone(), requires_grad=False)
        remove_parts(
            small,
            repairing,
            wanted,
            batch_size=sets.batch_size,
            repair=self.repair,
            choice=self.choice,
            damping=self.damping,
            dense=path,
        )
        if path:  # the dense path, and the distance from it
            sets.block_tokens += repairing.numel() * (sets.number + len(kept))
        # Each kind's Grams take a pass of every block, and so do the hidden states that enter the next one.
        sets.block_tokens += repairing.numel() * len(kept) * (len(wanted) + 1)
        return sets.measure_model(small, one.measured).kl
