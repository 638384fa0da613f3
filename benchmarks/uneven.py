"""What other numbers of neurons in each block would buy, which no stock config can say: a search over these numbers.

    python benchmarks/uneven.py --calibration FILE --text FILE --held-out FILE [--removed 0.1,0.2] [--levels 4]
        [--generations 60] [--windows 32x1024] [-o uneven.jsonl]

Of each block the repaired exit is computed for some numbers of neurons around the uniform one, from the dense model's
hidden states. Sets of levels of the same total mutate, as EvoPress's do (arXiv 2410.14649): units of 64 neurons move
from one block to another; what is nearer to the dense model stays. Uniform and found numbers are then removed in
order of the blocks, as ``rarefy shrink`` does, and both models are measured.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rarefy.calibration.collect import collect
from rarefy.calibration.record import record
from rarefy.layer.problem import LayerProblem
from rarefy.layer.removal import refit_columns, removal_costs
from rarefy.models.blocks import find_blocks
from rarefy.structure.counts import find_space
from rarefy.structure.depth import BlockSets
from rarefy.structure.parts import Parts, find_parts
from rarefy.structure.width import remove_parts
from rows import Ground, Rows, parser

_OFFSPRING, _FEW = 16, 8

Weights = dict[int, dict[int, Tensor]]


def database(
    model: PreTrainedModel, windows: Tensor, parts: Parts, levels: range, unit: int, uniform: int
) -> Weights:
    """Of each block and level the repaired exit with ``uniform`` + level units of neurons kept."""
    blocks = find_blocks(model)
    stream = record(model, [block.module for block in blocks], windows, 4, None)
    found: Weights = {}
    for block in blocks:
        site = parts.exits[block.index]
        problem = LayerProblem(site.read(), collect(stream, block.module, block.index, [site])[site.name])
        order = removal_costs(problem).argsort(descending=True, stable=True)
        found[block.index] = {}
        for level in levels:
            kept = torch.zeros(parts.number, dtype=torch.bool)
            kept[order[: min(parts.number, uniform + level * unit)]] = True
            found[block.index][level] = refit_columns(problem, kept)[0].to(site.dtype)
        stream.advance(block.module, block.index)
        print(f"block {block.index + 1} of {len(blocks)} at {len(levels)} levels", flush=True)
    return found


def search(sets: BlockSets, parts: Parts, weights: Weights, generations: int, levels: range) -> dict[int, int]:
    """The levels of every block, of sum 0, with the lowest KL that mutations lead to."""
    draw = random.Random(0)

    def kl(state: Mapping[int, int], num: int | None = None) -> float:
        for block, level in state.items():
            parts.exits[block].write(weights[block][level])
        return sets.measure_model(sets.model, num).kl

    best = dict.fromkeys(weights, 0)
    value = start = kl(best)
    for generation in range(generations):
        tried = [_mutated(best, levels, draw) for _ in range(_OFFSPRING)]
        chosen = min(tried, key=lambda state: kl(state, max(1, len(sets.windows) // _FEW)))
        if (found := kl(chosen)) < value:
            best, value = chosen, found
        print(f"generation {generation + 1}: KL {value:.4f}, uniform {start:.4f}", flush=True)
    return best


def _mutated(state: Mapping[int, int], levels: range, draw: random.Random) -> dict[int, int]:
    found = dict(state)
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        lower = draw.choice([block for block in found if found[block] > levels[0]])
        raised = draw.choice([block for block in found if found[block] < levels[-1] and block != lower])
        found[lower] -= 1
        found[raised] += 1
    return found


def measured(ground: Ground, windows: Tensor, number: int | Mapping[int, int]) -> list[float]:
    """Perplexities of the dense model with so many neurons left in each block, repaired in order of the blocks."""
    model = copy.deepcopy(ground.dense)
    remove_parts(model, windows, [(find_parts(model, "neurons"), number)])
    return list(ground.perplexities(model).values())


def main() -> None:
    arguments = parser(__doc__, "uneven.jsonl")
    arguments.add_argument("--removed", default="0.1,0.2", help="shares of the parameters")
    arguments.add_argument("--unit", type=int, default=64)
    arguments.add_argument("--levels", type=int, default=4, help="units more or less than the uniform number")
    arguments.add_argument("--generations", type=int, default=60)
    said = arguments.parse_args()
    ground = Ground.of(said)
    windows = ground.windows()
    rows = Rows(
        said.output, {name: getattr(said, name) for name in ("model", "windows", "unit", "levels", "generations")}
    )
    for removed in map(float, said.removed.split(",")):
        if rows.all(removed=removed):
            continue
        (counts,) = find_space(ground.dense, 1 - removed, ["neurons"], said.unit).candidates
        model = copy.deepcopy(ground.dense)
        parts = find_parts(model, "neurons")
        uniform = parts.number - counts.neurons
        spare = min(said.levels, counts.neurons // said.unit, (uniform - 1) // said.unit)
        levels = range(-spare, spare + 1)
        sets = BlockSets(model, windows)
        weights = database(model, windows, parts, levels, said.unit, uniform)
        state = search(sets, parts, weights, said.generations, levels)
        found = {block: uniform + level * said.unit for block, level in state.items()}
        results: dict[str, Any] = {}
        for name, kept in (("uniform", uniform), ("uneven", found)):
            results[name] = measured(ground, windows, kept)
        rows.add(removed=removed, **results, kept=list(found.values()))
    print("| removed | neurons of each block | text | held out | kept in each block |\n|---|---|---|---|---|")
    for line in rows.all():
        for name in ("uniform", "uneven"):
            text, held_out = line[name]
            kept = " ".join(map(str, line["kept"])) if name == "uneven" else ""
            print(f"| {line['removed']:.0%} | {name} | {text:.2f} | {held_out:.2f} | {kept} |")


if __name__ == "__main__":
    main()
