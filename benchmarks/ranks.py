"""What several processes save: the time of the pruning stage of two processes over that of one.

    python benchmarks/ranks.py [--size 2] [--blocks 4] [--num-samples 32] [--sequence-length 512] [--method alps]

Each process has one thread, so two are to one what two cores are to one. The same run is made by one
process and by several in turn, as torchrun would start them; the ratio of medians is that of the stage
"prune" of run.json, which is loading, texts and evaluation apart. It is to be at most 0.6 for two.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def prune_seconds(size: int, words: list[str]) -> float:
    """The pruning stage of one run by ``size`` processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        output = Path(folder) / "out"
        command = [sys.executable, "-m", "rarefy", "prune", "smollm2", "-o", str(output), "--quiet", *words]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(command, env={**os.environ, **meeting, "RANK": str(rank)}, stdout=subprocess.DEVNULL)
            for rank in range(size)
        ]
        statuses = [process.wait() for process in running]
        if any(statuses):
            raise SystemExit("a process failed; what it said is above")
        facts = json.loads((output / "run.json").read_text(encoding="utf-8"))
        return float(facts["seconds"]["prune"])


def main(size: int, repeats: int, words: list[str]) -> None:
    """Time both in turn and print the ratio."""
    alone, shared = [], []
    for _ in range(repeats):
        alone.append(prune_seconds(1, words))
        shared.append(prune_seconds(size, words))
        print(f"one process {alone[-1]:.1f} s, {size} processes {shared[-1]:.1f} s", flush=True)
    ratio = statistics.median(shared) / statistics.median(alone)
    print(f"{' '.join(words)}: {size} processes take {ratio:.2f} of the time of one, with one thread each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--method", default="alps")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    blocks = [word for block in range(options.blocks) for word in ("--include", f"*.layers.{block}.*")]
    windows = ["--num-samples", str(options.num_samples), "--sequence-length", str(options.sequence_length)]
    asked = ["--method", options.method, "--calibration", "python-docs", *windows, *blocks]
    main(options.size, options.repeats, asked)
