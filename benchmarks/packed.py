"""What packed matrices gain in time on the CPU: single products, and the decoding of a random model of a given shape.

    python benchmarks/packed.py products [--threads 1,2] [--shapes 8192x4096,4096x11008] [--zeros 0.5,0.6,0.7,0.8]
    python benchmarks/packed.py model [--blocks 16 --hidden 2048 --mlp 8192] [--zeros 0.6] [--values auto,int8]

Products of one row of x: dense by torch as it comes, dense without oneDNN, packed with values in bfloat16, and with
codes of 8 and 4 bits. All are measured in turn in one run, on copies of more bytes than caches hold, and the shortest
time of each counts, so that the ratios stand on a machine that does other things too. The model has random weights;
it is written to a temporary folder, packed, and measured by `rarefy bench`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from rarefy.cli import main as rarefy_main
from rarefy.packing import kernel
from rarefy.packing.bench import without_onednn
from rarefy.packing.operator import packed_linear
from rarefy.packing.weight import PackedWeight

#: Values, with the bits of a code and the columns that share a scale.
_VALUES = {"bf16": (None, 0), "int8": (8, 128), "int4": (4, 64)}


def sparse(shape: tuple[int, int], zeros: float, generator: torch.Generator) -> Tensor:
    """A random matrix in bfloat16 with that share of zeros, anywhere."""
    weight = torch.randn(shape, generator=generator)
    return (weight * (torch.rand(shape, generator=generator) >= zeros)).bfloat16()


def copies(weight: PackedWeight, beyond: int) -> list[tuple[Tensor, ...]]:
    """The tensors of as many copies as take more than ``beyond`` bytes."""
    number = beyond // weight.nbytes + 2
    parts = (weight.values, weight.mask, weight.offsets, weight.scale)
    return [tuple(part if part is None else part.clone() for part in parts) for _ in range(number)]


def seconds(ways: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """The shortest time of each way; all in turn."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way(turn)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def dense_product(x: Tensor, weights: list[Tensor], plain: bool, turn: int) -> None:
    weight = weights[turn % len(weights)]
    if plain:
        functional.linear(x, weight)
    else:
        with without_onednn():
            functional.linear(x, weight)


def packed_product(x: Tensor, weights: list[tuple[Tensor, ...]], width: int, group: int, turn: int) -> None:
    values, mask, offsets, scale = weights[turn % len(weights)]
    packed_linear(x, values, mask, offsets, scale, None, width, group)


def measure_products(arguments: argparse.Namespace) -> None:
    """Print a line for each shape, share of zeros and number of threads."""
    print(f"{kernel.describe()}; milliseconds, and how many times as fast as the better dense product")
    print(f"{'shape':>13} {'zeros':>5} {'threads':>7} {'torch':>7} {'no 1DNN':>7}", end="")
    print(
        "".join(f" {name:>7} {'gain':>5}" for name in _VALUES),
        f"{'over torch':>10} {'int8/bf16':>9} {'int4/bf16':>9}",
    )
    generator = torch.Generator().manual_seed(0)
    for shape in arguments.shapes:
        weight = sparse(shape, 0, generator)
        dense = [weight.clone() for _ in range(arguments.beyond // (2 * weight.numel()) + 2)]
        for zeros in arguments.zeros:
            weight = sparse(shape, zeros, generator)
            packed = {
                name: copies(PackedWeight.pack(weight, bits, group), arguments.beyond)
                for name, (bits, group) in _VALUES.items()
            }
            x = torch.randn(1, shape[1], generator=generator).bfloat16()
            ways: dict[str, Callable[[int], object]] = {
                "torch": partial(dense_product, x, dense, True),
                "plain": partial(dense_product, x, dense, False),
                **{
                    name: partial(packed_product, x, packed[name], shape[1], group)
                    for name, (_, group) in _VALUES.items()
                },
            }
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                best = seconds(ways, arguments.rounds)
                fastest = min(best["torch"], best["plain"])
                print(f"{shape[0]:>6} x{shape[1]:>5} {zeros:>5.0%} {threads:>7}", end="")
                print(f" {1e3 * best['torch']:7.2f} {1e3 * best['plain']:7.2f}", end="")
                print("".join(f" {1e3 * best[name]:7.2f} {fastest / best[name]:5.2f}" for name in _VALUES), end="")
                print(f" {best['torch'] / best['bf16']:10.2f}", end="")
                print(f" {best['bf16'] / best['int8']:9.2f} {best['bf16'] / best['int4']:9.2f}", flush=True)


def measure_model(arguments: argparse.Namespace) -> None:
    """Write the random model, pack it, and let `rarefy bench` measure it."""
    config = LlamaConfig(
        hidden_size=arguments.hidden, intermediate_size=arguments.mlp, num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.hidden // 64, num_key_value_heads=max(1, arguments.hidden // 256),
        vocab_size=32000, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = LlamaForCausalLM(config)
    generator, drawn = torch.Generator().manual_seed(0), {}
    for name, parameter in model.named_parameters():
        shape, zeros = tuple(parameter.shape), arguments.zeros if "_proj" in name else 0.0
        if len(shape) == 2:  # all blocks have the same matrices, which is as good and quicker
            if (shape, zeros) not in drawn:
                drawn[shape, zeros] = sparse(shape, zeros, generator).mul_(0.02)
            parameter.copy_(drawn[shape, zeros])
        else:
            parameter.fill_(1)
    del drawn
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "dense")
        del model
        for values in arguments.values:
            packed = str(Path(folder) / values)
            rarefy_main(["pack", str(Path(folder) / "dense"), "-o", packed, "--values", values, "--quiet"])
            for threads in arguments.threads:
                tokens = ["--prompt-tokens", "64", "--new-tokens", "8", "--rounds", str(arguments.rounds)]
                rarefy_main(["bench", packed, *tokens, "--threads", str(threads)])


def _shape(text: str) -> tuple[int, int]:
    rows, width = text.split("x")
    return int(rows), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("products", "model"), nargs="?", default="products")
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument(
        "--shapes",
        type=lambda text: [_shape(part) for part in text.split(",")],
        default=[(8192, 4096), (4096, 11008)],
    )
    parser.add_argument("--zeros", type=lambda text: [float(part) for part in text.split(",")], default=None)
    parser.add_argument("--values", type=lambda text: text.split(","), default=["auto"])
    parser.add_argument("--rounds", type=int, default=None, help="how often each is measured")
    parser.add_argument("--beyond", type=int, default=1 << 30, help="bytes of copies")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=8192)
    arguments = parser.parse_args()
    if arguments.what == "products":
        arguments.zeros = arguments.zeros or [0.5, 0.6, 0.7, 0.8]
        arguments.rounds = arguments.rounds or 100
        measure_products(arguments)
    else:
        arguments.zeros = (arguments.zeros or [0.6])[0]
        arguments.rounds = arguments.rounds or 5
        measure_model(arguments)


if __name__ == "__main__":
    with torch.no_grad():
        main()
