"""The tables of the ALPS paper on one real layer: supports, refits, support change, PCG against ADMM.

    python benchmarks/optimum.py [--layer 09.q_proj] [--tables 1,5,7,8]

1: relative error of the optimal weights on each method's support (and of the method's own weights).
5: support change and relative error along ALPS's iterations, for both penalties.
7: a magnitude support without refit, with 10 conjugate-gradient steps, and solved exactly, with times in
   products W0 @ H. 8: on ALPS's own support, conjugate gradients against ADMM with the mask fixed.
Reads the layers that benchmarks/layers.py saved. Numbers are relative errors, not their square roots.
"""

from __future__ import annotations

import argparse

import torch

from layers import Layer, saved_layers
from rarefy import ADMM, ALPS, PCG, ALPSPaper, Backsolve, Fixed, Then
from rarefy.layer.solution import Solution
from rarefy.methods import build
from rarefy.methods.base import Method, run
from solvers import parse_pattern, unit_seconds

SPARSITIES = ("0.5", "0.6", "0.7", "0.8", "0.9")


def solved(layer: Layer, method: Method, sparsity: str, scope: str = "layer") -> Solution:
    """One solve on a fresh problem."""
    return run(method, layer.problem(), parse_pattern(sparsity, scope))


def table_1(layer: Layer) -> None:
    """Optimal weights on each support."""
    print("\nTable 1: optimal weights on each method's support (own weights)")
    print("| method | " + " | ".join(SPARSITIES) + " |\n|---" + "|---" * len(SPARSITIES) + "|")
    for name in ("magnitude", "wanda", "dsnot", "sparsegpt", "sparsefw", "admm", "alps"):
        cells = []
        for sparsity in SPARSITIES:
            own = solved(layer, build(name), sparsity)
            best = run(Backsolve(), layer.problem(), Fixed(own.mask), start=own)
            cells.append(f"{best.relative_error:.2e} ({own.relative_error:.2e})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def table_5(layer: Layer) -> None:
    """Support change per iteration and the error after each of some iterations."""
    print("\nTable 5: share of the support that changed in an iteration (relative error if stopped there), 70 %")
    marks = (5, 10, 20, 30, 50, 60, 100)
    print("| penalty | " + " | ".join(map(str, marks)) + " |\n|---" + "|---" * len(marks) + "|")
    problem = layer.problem()
    kept = parse_pattern("0.7", "layer").count(problem.shape)
    for name, method in (("geometric", ALPS(steps=60)), ("support", ALPSPaper())):
        changes = solved(layer, method, "0.7").trace["support change"]
        cells = []
        for mark in marks:
            if mark > len(changes):
                cells.append("ended")
                continue
            error = solved(layer, _cut(method, mark), "0.7").relative_error
            cells.append(f"{changes[mark - 1] / (2 * kept):.2%} ({error:.2e})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _cut(method: ALPS | ALPSPaper, mark: int) -> Method:
    """The method stopped after ``mark`` steps; a geometric path is cut short, not squeezed."""
    if isinstance(method, ALPSPaper):
        return ALPSPaper(steps=mark)
    levels = max(1, round(method.levels * mark / method.steps))
    last = method.rho_first * (method.rho_last / method.rho_first) ** ((levels - 1) / (method.levels - 1))
    return ALPS(steps=mark, levels=levels, rho_last=last)


def table_7(layer: Layer) -> None:
    """Refits of a magnitude support."""
    print("\nTable 7: magnitude support: no refit / 10 PCG steps (products) / exact (products)")
    print("| sparsity | none | PCG | exact |\n|---|---|---|---|")
    for sparsity in SPARSITIES:
        start = solved(layer, build("magnitude"), sparsity)
        cells = [f"{start.relative_error:.2e}"]
        for refit in (PCG(), Backsolve()):
            problem = layer.problem()
            unit = unit_seconds(problem)
            refitted = run(refit, problem, Fixed(start.mask), start=start)
            cells.append(f"{refitted.relative_error:.2e} ({refitted.seconds / unit:.0f})")
        print(f"| {sparsity} | " + " | ".join(cells) + " |", flush=True)


def table_8(layer: Layer) -> None:
    """Refits of ALPS's own support."""
    print("\nTable 8: on ALPS's support, from W0: 10 PCG steps (products) against 20 ADMM steps with the mask fixed")
    print("| sparsity | PCG | ADMM | exact |\n|---|---|---|---|")
    for sparsity in SPARSITIES:
        support = Fixed(solved(layer, ALPS(), sparsity).mask)
        cells = []
        masked = Then(build("magnitude"), PCG())
        for method in (masked, ADMM(schedule="fixed"), Then(build("magnitude"), Backsolve())):
            problem = layer.problem()
            unit = unit_seconds(problem)
            refitted = run(method, problem, support)
            cells.append(f"{refitted.relative_error:.2e} ({refitted.seconds / unit:.0f})")
        print(f"| {sparsity} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", default="09.q_proj")
    parser.add_argument("--tables", default="1,5,7,8")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = next((item for item in saved_layers() if item.name == options.layer), None)
    if chosen is None:
        raise SystemExit(f"{options.layer} is not saved: benchmarks/layers.py saves layers.")
    print(f"{chosen.name}, {tuple(chosen.W0.shape)}, {chosen.num_tokens:,} tokens")
    for table in options.tables.split(","):
        {"1": table_1, "5": table_5, "7": table_7, "8": table_8}[table](chosen)
