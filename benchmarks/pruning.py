"""What a whole Wanda run costs beside the forward passes that it cannot do without.

    python benchmarks/pruning.py [--blocks 6] [--num-samples 16] [--sequence-length 1024]

A run replays every window twice through every block: once dense, for the Gram matrices, and once pruned,
for the next block's inputs. The plain cost is that of these passes alone, by the same code without hooks,
Grams or solves. Both are timed in turn, several times; the ratio of medians is printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

import rarefy
from rarefy.calibration.record import record
from rarefy.calibration.sources import parse_source
from rarefy.calibration.stream import convert_calls
from rarefy.calibration.windows import draw_windows, token_stream
from rarefy.models.blocks import find_blocks
from rarefy.models.checkpoint import load_model, resolve_model
from rarefy.pruning.precision import compute_dtype, computing_in


def plain_passes(model: torch.nn.Module, windows: torch.Tensor, batch_size: int) -> None:
    """Two passes of all windows through every block, and nothing else."""
    blocks = find_blocks(model)
    stream = record(model, [block.module for block in blocks], windows, batch_size)
    convert_calls(stream, compute_dtype(stream.states.dtype, stream.device))
    for block in blocks:
        with computing_in(block.module, stream.compute_dtype):
            kept = stream.states.clone()
            stream.advance(block.module, block.index)
            stream.states.copy_(kept)
            stream.advance(block.module, block.index)


def main(num_blocks: int, num: int, length: int, batch_size: int, repeats: int) -> None:
    """Time both in turn and print the ratio."""
    model, tokenizer = load_model(resolve_model("smollm2"), "auto", "auto")
    base = model.base_model
    base.layers = base.layers[:num_blocks]
    windows = draw_windows(token_stream(parse_source("python-docs"), tokenizer), num, length, 0)
    plain_passes(model, windows[:batch_size], batch_size)  # warm-up
    plain, whole = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        plain_passes(model, windows, batch_size)
        plain.append(time.perf_counter() - started)
        fresh = copy.deepcopy(model)
        started = time.perf_counter()
        rarefy.prune(fresh, windows, pattern=rarefy.PerRow(0.5), method=rarefy.Wanda(), batch_size=batch_size)
        whole.append(time.perf_counter() - started)
        print(f"plain {plain[-1]:.1f} s, Wanda {whole[-1]:.1f} s", flush=True)
    ratio = statistics.median(whole) / statistics.median(plain)
    print(f"{num} windows x {length:,} tokens, {num_blocks} blocks: a Wanda run costs {ratio:.2f} times its passes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    main(options.blocks, options.num_samples, options.sequence_length, options.batch_size, options.repeats)
