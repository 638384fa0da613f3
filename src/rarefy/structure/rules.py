"""Which blocks to remove: by their scores one at a time, one after the other, or by a search over sets.

| rule       | score of a block                                     | source                                  |
|------------|------------------------------------------------------|-----------------------------------------|
| kl         | KL to the dense model without this block alone       | as perplexity, with EvoPress's measure  |
| perplexity | loss of the text without this block alone            | Shortened LLaMA, arXiv 2402.02834       |
| taylor     | sum of abs(w dL/dw) over its weights                 | Shortened LLaMA, with protected ends    |
| greedy     | as kl, again after every block that is removed (*)   | ours                                    |
| search     | KL of whole sets, which mutate                       | EvoPress, arXiv 2410.14649, blocks only |
| policy-gradient | how often it is kept, as random sets teach (policy.py) | arXiv 2406.10576, for blocks     |

(*) After the first: all on an eighth of the windows, and the four that cost least there on all windows.

The search is (1 + offspring) evolution: of a set, up to three blocks are exchanged with removed ones; the offspring
are measured on a few windows, the best of them on all, and it replaces its parent where it is nearer to the dense
model.
Differences: it starts from the best set of the rules kl and perplexity, whose scores come from one pass, instead of
the best of 64 random sets, so that it is never worse than either; windows are fixed; only whole blocks are removed,
because attention or MLP alone have no stock form.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from rarefy.errors import InputError
from rarefy.models.blocks import find_blocks
from rarefy.models.head import LOGIT_BYTES, base_output, head_alone, predicting, vocabulary_size
from rarefy.structure.depth import BlockSets, Distance, lowest
from rarefy.structure.policy import policy_gradient

Rule = Literal["kl", "perplexity", "taylor", "greedy", "search", "policy-gradient"]
RULES: tuple[Rule, ...] = get_args(Rule)

#: Shortened LLaMA's "+": blocks at both ends that Taylor scores, which are low there without reason, never remove.
TAYLOR_ENDS = (4, 2)

_FEW = 8  # a part of one in so many windows is where sets are measured first
_CLOSEST = 4  # blocks that greedy measures on all windows

Watch = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Chosen:
    """What a rule found: the blocks to ``remove``, the distance without them, and the scores it looked at.

    ``block_tokens`` are tokens times blocks, of all that was computed forward.
    """

    remove: tuple[int, ...]
    distance: Distance
    scores: dict[int, float] = field(default_factory=dict)
    trace: list[float] = field(default_factory=list)
    block_tokens: int = 0


def silent(done: int, total: int, note: str) -> None:
    """A ``Watch`` that ignores how far it is."""


def choose_blocks(
    sets: BlockSets,
    num: int,
    rule: Rule,
    *,
    seed: int = 0,
    generations: int = 32,
    offspring: int = 16,
    steps: int = 500,
    watch: Watch = silent,
) -> Chosen:
    """The ``num`` blocks that a rule removes. Raises InputError where fewer than one block would be left."""
    if not 1 <= num < sets.number:
        raise InputError("blocks", num, f"from 1 to {sets.number - 1}, as the model has {sets.number} blocks")
    start = f"block_tokens before {rule} {num}"  # those of a run that was killed, where it goes on
    sets.memo.setdefault(start, sets.block_tokens)
    everything = list(range(sets.number))
    trace: list[float] = []
    if rule == "taylor":
        if "taylor" not in sets.memo:
            found = taylor_scores(sets.model, sets.windows, sets.batch_size, watch)
            sets.memo.keep({"taylor": {str(index): score for index, score in found.items()}})
        scores = {int(index): score for index, score in sets.memo["taylor"].items()}
        first, last = TAYLOR_ENDS if sets.number - sum(TAYLOR_ENDS) >= num else (0, 0)
        remove = lowest({index: scores[index] for index in everything[first : sets.number - last]}, num)
    elif rule == "greedy":
        remove, scores, trace = _greedy(sets, num, watch)
    else:
        distances = sets.without_each(everything, lambda done, total: watch(done, total, ""))
        by_kl, by_loss = ({i: getattr(one, key) for i, one in distances.items()} for key in ("kl", "loss"))
        scores = by_loss if rule == "perplexity" else by_kl
        remove = lowest(scores, num)
        if rule == "search":
            starts = [lowest(by_kl, num), lowest(by_loss, num)]
            remove, trace = _search(sets, starts, seed, generations, offspring, watch)
        elif rule == "policy-gradient":
            remove, trace = policy_gradient(sets, num, by_kl, seed=seed, steps=steps, watch=watch)
    distance = sets.measure(_rest(everything, remove))
    return Chosen(tuple(remove), distance, scores, trace, sets.block_tokens - sets.memo[start])


def _rest(everything: Iterable[int], remove: Iterable[int]) -> list[int]:
    gone = set(remove)
    return [index for index in everything if index not in gone]


def _greedy(sets: BlockSets, num: int, watch: Watch) -> tuple[list[int], dict[int, float], list[float]]:
    """Remove the block whose absence costs least, ``num`` times; the scores are those of the first time."""
    kept = list(range(sets.number))
    first: dict[int, float] = {}
    trace = []
    for done in range(num):
        scores = {index: one.kl for index, one in _closest(sets, kept).items()}
        first = first or scores
        (gone,) = lowest(scores, 1)
        kept.remove(gone)
        trace.append(scores[gone])
        watch(done + 1, num, f"KL {scores[gone]:.4f} nats")
    return _rest(range(sets.number), kept), first, trace


def _closest(sets: BlockSets, kept: Sequence[int]) -> dict[int, Distance]:
    """The distance without each of the kept blocks: of all of the dense model, later of those that cost least."""
    few = max(1, len(sets.windows) // _FEW)
    if len(kept) == sets.number or len(kept) <= _CLOSEST or sets.covers_all(few):
        return sets.without_each(kept)
    some = sets.without_each(kept, num_windows=few)
    return sets.without_each(kept, only=lowest({index: one.kl for index, one in some.items()}, _CLOSEST))


def _search(
    sets: BlockSets, starts: Sequence[list[int]], seed: int, generations: int, offspring: int, watch: Watch
) -> tuple[list[int], list[float]]:
    """The best set that mutations of the best start lead to, and the KL after every generation."""
    everything = range(sets.number)
    draw = random.Random(seed)
    few = max(1, len(sets.windows) // _FEW)

    def kl(remove: Iterable[int], windows: int | None = None) -> float:
        return sets.measure(_rest(everything, remove), windows).kl

    parent = min(starts, key=kl)
    trace = [kl(parent)]
    for generation in range(generations):
        drawn = {tuple(_mutated(parent, sets.number, draw)) for _ in range(offspring)}
        best = min(sorted(drawn), key=lambda remove: kl(remove, few))
        if kl(best) < trace[-1]:
            parent = list(best)
        trace.append(kl(parent))
        watch(generation + 1, generations, f"KL {trace[-1]:.4f} nats")
    return sorted(parent), trace


def _mutated(remove: Sequence[int], number: int, draw: random.Random) -> list[int]:
    """The set with up to three of its blocks exchanged."""
    gone = set(remove)
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        out = draw.choice(sorted(gone))
        into = draw.choice([index for index in range(number) if index not in gone])
        gone = gone - {out} | {into}
    return sorted(gone)


def taylor_scores(
    model: PreTrainedModel, windows: Int64[Tensor, "num length"], batch_size: int, watch: Watch = silent
) -> dict[int, float]:
    """Of each block the sum of |w dL/dw| over all its weights; L is the mean loss of the text over all windows."""
    blocks = find_blocks(model)
    with torch.no_grad():
        alone = head_alone(model, windows)
    weights = [parameter for block in blocks for parameter in block.module.parameters()]
    try:
        for parameter in weights:
            parameter.requires_grad_(True)
        for start in range(0, len(windows), batch_size):
            ids = windows[start : start + batch_size].to(model.device)
            _backward(model, ids, alone, 1 / windows[:, 1:].numel())
            watch(min(start + batch_size, len(windows)), len(windows), "")
        return {
            block.index: float(
                sum(
                    (parameter.detach().float() * parameter.grad.float()).abs().sum(dtype=torch.float64)
                    for parameter in block.module.parameters()
                    if parameter.grad is not None
                )
            )
            for block in blocks
        }
    finally:
        for parameter in weights:
            parameter.requires_grad_(False)
            parameter.grad = None


def _backward(model: PreTrainedModel, ids: Int64[Tensor, "batch length"], alone: bool, scale: float) -> None:
    """Add ``scale`` times the gradient of the text's loss, summed over tokens, to all weights that want one.

    Where the head stands ``alone``, only some of the logits exist at once: in float32 those of a batch, their
    probabilities and their gradient would take several times the memory of the model.
    """
    head = model.get_output_embeddings() if alone else nn.Identity()
    rows = predicting(base_output(model, ids) if alone else model(input_ids=ids, use_cache=False).logits)
    targets = ids[:, 1:].flatten()
    size = max(1, LOGIT_BYTES // (4 * vocabulary_size(model))) if alone else len(rows)
    gradients: list[Tensor] = []
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        leaf = rows[part].detach().requires_grad_(True)
        loss = scale * nn.functional.cross_entropy(head(leaf).float(), targets[part], reduction="sum")
        gradients += torch.autograd.grad(loss, leaf)
    rows.backward(torch.cat(gradients))
