"""What a step of tuning costs, and what its gradient loses when only the dense model's likeliest tokens are kept.

    python benchmarks/tuning.py RUN --against smollm2 --text FILE [--length 1024] [--windows 2]

Prints seconds of the process (not of the clock, as other work may share the machine) for one step of one window in
float32 and in bfloat16. Then for top-K teachers, over all predicted positions of the windows: bytes a position, the
part of the full KL divergence that is seen, and the cosine between the gradient at what enters the head and that of
the full divergence, for the K tokens and the event of another one (what Rarefy does), and for the K tokens alone,
renormalised.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from rarefy.calibration.sources import parse_source
from rarefy.calibration.windows import draw_windows, token_stream
from rarefy.cli import keep_freed_memory
from rarefy.models.blocks import find_blocks
from rarefy.models.checkpoint import load_model, load_tokenizer, resolve_model
from rarefy.tuning.distill import FullTarget, compare, top_of
from rarefy.tuning.logits import Logits
from rarefy.tuning.masks import keep_zeros
from rarefy.tuning.parametrise import parametrise
from rarefy.tuning.settings import TuneSettings
from rarefy.tuning.teacher import ModelTeacher
from rarefy.tuning.train import Tuner


def seconds_of_a_step(run: str, dense: str, windows: Tensor, precision: torch.dtype) -> float:
    """CPU seconds of the second step of three."""
    model, _ = load_model(resolve_model(run), "cpu", "float32")
    teacher = ModelTeacher(Logits(load_model(resolve_model(dense), "cpu", precision)[0], precision))
    logits, blocks = Logits(model, precision), find_blocks(model)
    parameters = parametrise("full", model, blocks)
    modules = [block.module for block in blocks]
    tuner = Tuner(model, logits, parameters, modules, teacher, windows, 0, TuneSettings(max_steps=3))
    with keep_zeros(model):
        tuner._train(torch.tensor([0]))
        began = time.process_time()
        tuner._train(torch.tensor([1]))
        return time.process_time() - began


def renormalised(z: Tensor, dense: Tensor, k: int) -> tuple[float, Tensor]:
    """KL over the k tokens alone, p renormalised, and its gradient at the logits."""
    top = top_of(dense, k)
    p = (top.log_p - top.log_p.logsumexp(-1, keepdim=True)).exp()
    log_q = z.float().log_softmax(-1)
    kl = (p * (p.log() - log_q.gather(-1, top.tokens.long()))).sum()
    return float(kl), log_q.exp().scatter_add_(-1, top.tokens.long(), -p)


@torch.no_grad()
def top_k(run: str, dense: str, windows: Tensor, numbers: list[int]) -> None:
    """Compare gradients at what enters the head."""
    mine = Logits(load_model(resolve_model(run), "cpu", "bfloat16")[0], torch.bfloat16)
    theirs = Logits(load_model(resolve_model(dense), "cpu", "bfloat16")[0], torch.bfloat16)
    head = mine.head.weight.float()
    rows, dense_rows = mine.rows(windows), theirs.rows(windows)
    next_tokens = windows[:, 1:].flatten()
    full = torch.empty(len(rows), head.shape[1])
    found = {(k, how): torch.empty_like(full) for k in numbers for how in ("rest", "alone")}
    kl = dict.fromkeys(found, 0.0)
    whole = 0.0
    for part in mine.slices(len(rows)):
        z, p = mine.of(rows[part]), theirs.of(dense_rows[part])
        compared = compare(z, FullTarget(p), next_tokens[part], 0.0)
        whole += compared.kl
        full[part] = compared.gradient @ head
        for k in numbers:
            seen = compare(z, top_of(p, k), next_tokens[part], 0.0)
            kl[k, "rest"] += seen.kl
            found[k, "rest"][part] = seen.gradient @ head
            value, gradient = renormalised(z, p, k)
            kl[k, "alone"] += value
            found[k, "alone"][part] = gradient @ head
    print(f"full KL {whole / len(rows):.4f} nats; {2 * head.shape[1]} bytes a position as states")
    print("   K  bytes  KL seen  cosine  with its K alone: KL  cosine")
    for k in numbers:
        cosines = [
            float(torch.cosine_similarity(found[k, how].flatten(), full.flatten(), 0)) for how in ("rest", "alone")
        ]
        print(
            f"{k:4}  {6 * k:5}  {kl[k, 'rest'] / whole:7.1%}  {cosines[0]:.4f}"
            f"  {kl[k, 'alone'] / len(rows):20.4f}  {cosines[1]:.4f}"
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run")
    arguments.add_argument("--against", default="smollm2")
    arguments.add_argument("--text", required=True)
    arguments.add_argument("--length", type=int, default=1024)
    arguments.add_argument("--windows", type=int, default=2)
    arguments.add_argument("--k", default="4,16,64,256,1024")
    said = arguments.parse_args()
    keep_freed_memory()
    tokenizer = load_tokenizer(resolve_model(said.against))
    assert tokenizer is not None
    tokens = token_stream(parse_source(said.text), tokenizer)
    windows = draw_windows(tokens, max(2, said.windows), said.length, 0)
    for precision in (torch.float32, torch.bfloat16):
        print(f"{precision}: {seconds_of_a_step(said.run, said.against, windows, precision):.1f} s of the CPU a step")
    top_k(said.run, said.against, windows, [int(k) for k in said.k.split(",")])


if __name__ == "__main__":
    main()
