"""Held-out error where a few inputs have massive activations, as a share of Wanda's on the same pattern.

    python benchmarks/massive.py [--methods a,b] [--pattern 0.6] [--factors 1,12,1000] [--kinds 09.q_proj,down_proj]

Reads the layers that benchmarks/layers.py saved. Three inputs of each, the same for all methods, are multiplied by
the factor, in the Gram that a method sees and in that of the held-out tokens. Shares are geometric means over layers;
in parentheses the balanced error on the calibration tokens, which such inputs cannot hide.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch

from layers import Layer, saved_layers
from rarefy import Gram, LayerProblem, Wanda
from rarefy.methods import build
from rarefy.methods.base import Method, run
from solvers import parse_pattern

_NUM_MASSIVE = 3


def scaled(layer: Layer, factor: float) -> tuple[LayerProblem, LayerProblem]:
    """The layer with some inputs ``factor`` times as large: on the calibration tokens and on the held-out ones."""
    inputs = len(layer.H)
    scale = torch.ones(inputs)
    scale[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))[:_NUM_MASSIVE]] = factor
    grams = (Gram.from_matrix(H * scale * scale[:, None], layer.num_tokens) for H in (layer.H, layer.held_out))
    seen, held_out = (LayerProblem(layer.W0, gram) for gram in grams)
    return seen, held_out


def errors(method: Method, layer: Layer, pattern: str, factor: float) -> tuple[float, float]:
    """Relative error on held-out tokens, and balanced error on the calibration tokens."""
    seen, held_out = scaled(layer, factor)
    solution = run(method, seen, parse_pattern(pattern, method.default_scope), name=layer.name)
    return held_out.relative_error(solution.weight), solution.balanced_error


def main(methods: list[str], pattern: str, factors: list[float], layers: list[Layer]) -> None:
    """Print one row per method."""
    heads = [f"x {factor:g}" for factor in factors]
    print(
        f"{len(layers)} layers, {pattern}, {_NUM_MASSIVE} massive inputs: held-out error / Wanda's (balanced error)"
    )
    print("| method | " + " | ".join(heads) + " |\n" + "|---" * (1 + len(heads)) + "|")
    wandas = {factor: [errors(Wanda(), layer, pattern, factor) for layer in layers] for factor in factors}
    for name in ["wanda", *methods]:
        cells = []
        for factor in factors:
            found = [errors(build(name), layer, pattern, factor) for layer in layers]
            share = statistics.fmean(math.log(own[0] / other[0]) for own, other in zip(found, wandas[factor]))
            balanced = statistics.fmean(math.log(one[1]) for one in found)
            cells.append(f"{math.exp(share):.3f} ({math.exp(balanced):.3f})")
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="sparsegpt,admm,alps-paper,alps")
    parser.add_argument("--pattern", default="0.6")
    parser.add_argument("--factors", default="1,12,100,1000")
    parser.add_argument("--kinds", default="", help="ends of names, such as down_proj,09.q_proj; all by default")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; torch's own choice by default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    kinds = tuple(kind for kind in options.kinds.split(",") if kind)
    factors = [float(text) for text in options.factors.split(",")]
    main(options.methods.split(","), options.pattern, factors, saved_layers(*kinds))
