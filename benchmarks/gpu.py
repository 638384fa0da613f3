"""Layers of a 7B model on a GPU: each method's seconds, and how near they are to those of its own products.

    python benchmarks/gpu.py [--methods wanda,alps] [--sparsity 0.7] [--shapes 4096x4096,4096x11008]

Weights are random, inputs are correlated with a few outlier channels, as activations are. The floor of a
method is the time of the products W @ H that its steps need (steps x one product), measured in the same run;
``share`` is floor / seconds. Where there is no GPU, the script says what it would need and ends.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from rarefy import Gram, LayerProblem, Unstructured
from rarefy.layer.pattern import Pattern
from rarefy.methods import build
from rarefy.methods.base import run


def random_problem(out: int, inputs: int, tokens: int = 32768) -> LayerProblem:
    """A weight (out, inputs) and the Gram of ``tokens`` bfloat16 inputs on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    gram = Gram(inputs, device="cuda")
    mix = torch.randn(256, inputs, generator=generator, device="cuda") / 16
    scale = torch.ones(inputs, device="cuda")
    scale[:: inputs // 16] = 30
    for _ in range(tokens // 4096):
        low = torch.randn(4096, 256, generator=generator, device="cuda") @ mix
        noise = torch.randn(4096, inputs, generator=generator, device="cuda")
        gram.update(((low + 0.5 * noise) * scale).bfloat16())
    weight = torch.randn(out, inputs, generator=generator, device="cuda") / inputs**0.5
    return LayerProblem(weight, gram)


def seconds_of(function: object, repeats: int = 3) -> float:
    """Median seconds of a call, the device waited for."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()  # type: ignore[operator]
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main(methods: list[str], pattern: Pattern, shapes: list[tuple[int, int]]) -> None:
    """Print one table per shape."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {pattern}, float32 products")
    for out, inputs in shapes:
        problem = random_problem(out, inputs)
        unit = seconds_of(lambda: problem.W0 @ problem.H, 10)  # noqa: B023 (called at once)
        print(f"\n{out} x {inputs}: one product W @ H takes {unit * 1e3:.2f} ms")
        print("| method | seconds | steps | products' seconds | times its products | relative error | peak GiB |")
        print("|---|---|---|---|---|---|---|")
        for name in methods:
            method = build(name)
            run(method, problem, pattern)  # warm-up
            problem.gram.forget()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            torch.cuda.synchronize()
            started = time.perf_counter()
            solution = run(method, problem, pattern)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            floor = max(1, solution.steps) * unit
            peak = (torch.cuda.max_memory_allocated() - base) / 2**30
            print(
                f"| {name} | {seconds:.2f} | {solution.steps} | {floor:.2f} | {seconds / floor:.2f} "
                f"| {solution.relative_error:.4f} | {peak:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="magnitude,wanda,sparsegpt,admm,alps,sparsefw")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--shapes", default="4096x4096,4096x11008", help="OUTxIN, joined by commas")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device: this benchmark needs one with about 4 GiB free and a CUDA build of torch.")
        raise SystemExit(0)
    pairs = [tuple(int(part) for part in shape.split("x")) for shape in options.shapes.split(",")]
    main(options.methods.split(","), Unstructured(options.sparsity), [(out, inputs) for out, inputs in pairs])
