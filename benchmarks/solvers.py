"""Each method on real layers: relative error, and time in units of one product W0 @ H.

    python benchmarks/solvers.py [--methods a,b] [--patterns 0.5,0.7,2:4] [--kinds 09.q_proj,down_proj]
        [--set steps=2000] [--threads 1]

Reads the layers that benchmarks/layers.py saved. Errors are geometric means over layers of the square root
of the relative error; costs are medians over layers of a solve's seconds in products W0 @ H timed right
before and after it, factorisations included. Freed memory is kept as on the command line.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

from layers import Layer, saved_layers
from rarefy import LayerProblem, PerRow, Unstructured
from rarefy.cli import keep_freed_memory
from rarefy.layer.pattern import Pattern
from rarefy.methods import METHODS, build
from rarefy.methods.base import Method, run
from rarefy.runs.recipe import build_pattern

_FIRST = [name for name, method in METHODS.items() if not method.needs_start]


def parse_pattern(text: str, scope: str) -> Pattern:
    """``2:4``, ``2:4t`` or a sparsity in the method's scope."""
    if ":" in text:
        return build_pattern(text)
    return PerRow(float(text)) if scope == "row" else Unstructured(float(text))


def unit_seconds(problem: LayerProblem, repeats: int = 9) -> float:
    """The median time of one product W0 @ H."""
    out = torch.empty_like(problem.W0)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(problem.W0, problem.H, out=out)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(method: Method, layer: Layer, pattern: Pattern) -> tuple[float, float, int]:
    """Relative error, cost in products, and steps of one solve."""
    problem = layer.problem()
    before = unit_seconds(problem)
    solution = run(method, problem, pattern, name=layer.name)
    unit = (before + unit_seconds(problem)) / 2
    return solution.relative_error, solution.seconds / unit, solution.steps


def main(methods: list[str], patterns: list[str], layers: list[Layer], settings: dict[str, str]) -> None:
    """Print one table of errors and one of costs, methods down, patterns across."""
    print(f"{len(layers)} layers, {torch.get_num_threads()} threads; sqrt(relative error) | products per solve")
    print("| method | " + " | ".join(patterns) + " | " + " | ".join(f"cost {text}" for text in patterns) + " |")
    print("|---" * (1 + 2 * len(patterns)) + "|")
    for name in methods:
        errors, costs = [], []
        for text in patterns:
            method = build(name, settings)
            pattern = parse_pattern(text, method.default_scope)
            results = [measure(method, layer, pattern) for layer in layers]
            logs = [math.log(max(error, 1e-30)) for error, _, _ in results]
            errors.append(f"{math.exp(statistics.fmean(logs) / 2):.4f}")
            costs.append(f"{statistics.median(cost for _, cost, _ in results):.1f}")
        print("| " + " | ".join([name, *errors, *costs]) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(_FIRST))
    parser.add_argument("--patterns", default="0.5,0.7,2:4")
    parser.add_argument("--kinds", default="", help="ends of names, such as down_proj,09.q_proj; all by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a hyperparameter")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; torch's own choice by default")
    options = parser.parse_args()
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    kinds = tuple(kind for kind in options.kinds.split(",") if kind)
    settings = dict(setting.split("=", 1) for setting in options.set)
    main(options.methods.split(","), options.patterns.split(","), saved_layers(*kinds), settings)
