"""Which blocks to remove: how many tokens rank them stably, and what greedy and searching cost at equal tokens.

    python benchmarks/blocks.py stability --calibration FILE [--pool 64] [--length 1024] [-o blocks.jsonl]
    python benchmarks/blocks.py rules --calibration FILE --held-out FILE [--remove 3,6,9] [--windows 32x1024]

``stability`` scores every block on every window of a pool alone; a sample's scores are means over its windows. Of
samples of 1, 4, 16 and 32 windows that share none, it prints the mean rank correlation, and how many of the lowest
six two samples have in common. ``rules`` gives the evolutionary search and the policy gradient as many block tokens
as greedy re-scoring took, and measures what each found on windows of another text. Both go on where they stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

import torch

from rarefy.structure.depth import BlockSets, lowest
from rarefy.structure.rules import Rule, choose_blocks
from rows import Ground, Rows, parser

SAMPLES = (1, 4, 16, 32)  # windows
_LOWEST = 6
_OFFSPRING = 16


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, without ties."""
    ranks = [torch.tensor(one, dtype=torch.float64).argsort().argsort().double() for one in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def stability(said: argparse.Namespace, ground: Ground) -> None:
    """Score the pool window by window, and compare samples."""
    rows = Rows(said.output, {"measure": "stability", "model": said.model, "length": said.length, "pool": said.pool})
    windows = ground.windows_of(said.calibration, said.pool, said.length)
    for number in range(len(rows.all()), said.pool):
        sets = BlockSets(ground.dense, windows[number : number + 1], 1)
        found = sets.without_each(range(sets.number))
        rows.add(window=number, **{name: [getattr(one, name) for one in found.values()] for name in ("kl", "loss")})
        print(f"window {number + 1} of {said.pool}", flush=True)
    lines = rows.all()
    print(f"| tokens | samples | KL: correlation | of {_LOWEST} | loss: correlation | of {_LOWEST} |")
    print("|---|---|---|---|---|---|")
    for size in SAMPLES:
        words = []
        for name in ("kl", "loss"):
            scores = torch.tensor([line[name] for line in lines], dtype=torch.float64)
            means = [part.mean(dim=0).tolist() for part in scores.split(size) if len(part) == size]
            pairs = list(combinations(means, 2))
            if not pairs:
                break
            low = [set(lowest(dict(enumerate(one)), _LOWEST)) for one in means]
            shared = fmean(len(a & b) for a, b in combinations(low, 2))
            words += [f"{fmean(rank_correlation(a, b) for a, b in pairs):.3f}", f"{shared:.2f}"]
        if words:
            print(f"| {size * said.length:,} | {len(lines) // size} | {' | '.join(words)} |")


def rules(said: argparse.Namespace, ground: Ground) -> None:
    """Greedy, then the others at as many block tokens."""
    rows = Rows(said.output, {"measure": "rules", "model": said.model, "windows": said.windows})
    windows = ground.windows()
    held_out = BlockSets(ground.dense, ground.windows_of(said.held_out, 16, windows.shape[1], seed=1))
    for num in map(int, said.remove.split(",")):
        budget = 0
        for rule in said.rules.split(","):
            if (there := rows.all(num=num, rule=rule)) and rule == "greedy":
                budget = there[0]["block_tokens"]
            if there:
                continue
            sets = BlockSets(ground.dense, windows)
            options = equal_cost(rule, budget, sets, num) if rule != "greedy" else {}
            found = choose_blocks(sets, num, rule, **options)
            budget = found.block_tokens if rule == "greedy" else budget
            other = held_out.measure([index for index in range(sets.number) if index not in found.remove])
            line = {"num": num, "rule": rule, **options, "block_tokens": found.block_tokens}
            line |= {"removed": found.remove, "kl": found.distance.kl, "held_out_kl": other.kl}
            rows.add(**line, held_out_loss=other.loss)
            print(f"{num} blocks, {rule}: {found.distance.kl:.4f}, held out {other.kl:.4f}", flush=True)
    print("| blocks | rule | KL | held-out KL | held-out loss | 1e9 block tokens | removed |")
    print("|---|---|---|---|---|---|---|")
    for line in sorted(rows.all(), key=lambda line: (line["num"], line["held_out_kl"])):
        numbers = " | ".join(f"{line[name]:.4f}" for name in ("kl", "held_out_kl", "held_out_loss"))
        removed = " ".join(map(str, line["removed"]))
        print(f"| {line['num']} | {line['rule']} | {numbers} | {line['block_tokens'] / 1e9:.3f} | {removed} |")


def equal_cost(rule: Rule, budget: int, sets: BlockSets, num: int) -> dict[str, int]:
    """The settings with which a rule takes about as many block tokens as the budget, its first scoring included."""
    total, left = sets.number, sets.number - num
    tokens = sets.windows.numel()
    rest = max(0, budget - tokens * (total + total * (total - 1) // 2))
    if rule == "search":
        # every offspring on an eighth of the windows, the best on all
        return {"generations": max(1, rest // (tokens * left * (_OFFSPRING + 8) // 8)), "offspring": _OFFSPRING}
    if rule == "policy-gradient":
        return {"steps": max(1, rest // (2 * left * sets.batch_size * sets.windows.shape[1]))}
    return {}


def main() -> None:
    arguments = parser(__doc__, "blocks.jsonl")
    arguments.add_argument("measure", choices=["stability", "rules"])
    arguments.add_argument("--pool", type=int, default=64)
    arguments.add_argument("--length", type=int, default=1024)
    arguments.add_argument("--remove", default="3,6,9")
    arguments.add_argument("--rules", default="greedy,search,policy-gradient,kl,perplexity", help="greedy first")
    said = arguments.parse_args()
    if said.measure == "rules" and said.held_out is None:
        arguments.error("rules needs --held-out")
    (stability if said.measure == "stability" else rules)(said, Ground.of(said))


if __name__ == "__main__":
    main()
