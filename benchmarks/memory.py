"""The peak of each method's extra memory while it solves one layer, on the CPU.

    python benchmarks/memory.py [--methods alps,admm] [--shapes 3072x1024,1024x3072] [--pattern 0.7]

Prints the peak in MiB, W0 and H not counted, as a share of what the method says in ``cost`` and its answer take, and
of W0. Checks and grades, the same for all methods, are more than the cheapest methods take where H is larger than W0.
Each solve runs in a process of its own, the second time round, and is read from the kernel (VmHWM), so that
torch's and numpy's memory count alike. The layers are random: memory does not depend on what is in them.
Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path

import torch

from rarefy import LayerProblem
from rarefy.layer.gram import Gram
from rarefy.methods import build
from rarefy.methods.base import run
from solvers import parse_pattern

_ANSWER = 1.25  # the weight and its mask, in float32 matrices (out, in)

#: Cheap settings with the same buffers.
_FEW_STEPS = {
    "alps": {"steps": 4, "levels": 2, "pcg_steps": 2},
    "alps-paper": {"steps": 7, "pcg_steps": 2},
    "admm": {"steps": 4, "mask_steps": 3},
    "sparsefw": {"steps": 4, "round_every": 2},
    "swaps": {"max_swaps": 4},
}


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak(name: str, shape: tuple[int, int], pattern: str) -> int:
    """Bytes by which a solve raises the resident memory of a fresh process."""
    generator = torch.Generator().manual_seed(0)
    out, inputs = shape
    W0 = torch.randn(out, inputs, generator=generator)
    gram = Gram(inputs, means=True)
    gram.update(torch.randn(inputs + 64, inputs, generator=generator))
    problem = LayerProblem(W0, gram)
    first = name.partition("+")[0]
    few = _FEW_STEPS.get(first, {})
    method = build(name, {f"{first}.{key}" if "+" in name else key: value for key, value in few.items()})
    pattern_ = parse_pattern(pattern, method.default_scope)
    run(method, problem, pattern_)  # imports, thread pools and the libraries' own buffers, once for all layers
    gram.forget()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    run(method, LayerProblem(W0, gram), pattern_)
    return resident("VmHWM") - before


def main(methods: list[str], shapes: list[tuple[int, int]], pattern: str) -> None:
    """Print one row per method."""
    heads = [f"{out:,} x {inputs:,}" for out, inputs in shapes]
    print("| method | " + " | ".join(heads) + " |\n" + "|---" * (1 + len(heads)) + "|")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed blocks go back to the kernel: what is seen is in use
    context = multiprocessing.get_context("spawn")
    for name in methods:
        cells = []
        for shape in shapes:
            method = build(name)
            cost = method.cost(shape, parse_pattern(pattern, method.default_scope))
            out, inputs = shape
            said = 4 * ((_ANSWER + cost.weights) * out * inputs + cost.grams * inputs * inputs)
            with context.Pool(1) as pool:
                found = pool.apply(peak, (name, shape, pattern))
            matrix = 4 * shape[0] * shape[1]
            cells.append(f"{found / 2**20:.0f} MiB ({found / said:.0%} of what it says; {found / matrix:.1f} W0)")
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


def parse_shape(text: str) -> tuple[int, int]:
    """``OUTxIN``."""
    out, inputs = text.split("x")
    return int(out), int(inputs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", default="wanda,ria,sparsegpt,admm,alps,alps-paper,wanda+pcg,sparsefw,swaps,dsnot"
    )
    parser.add_argument("--shapes", default="3072x1024,1024x3072")
    parser.add_argument("--pattern", default="0.7")
    options = parser.parse_args()
    main(options.methods.split(","), [parse_shape(text) for text in options.shapes.split(",")], options.pattern)
