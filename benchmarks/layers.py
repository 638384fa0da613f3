"""Saves real layers of a model, each with its dense weight and the Gram matrix of its inputs, once.

    python benchmarks/layers.py [--model smollm2] [--calibration python-docs] [--blocks 0,1,9,19,29]

writes benchmarks/layers/NAME.safetensors with W0 (out, in), H (in, in), sum_x and sum_squares (in,), the number
of tokens, and held_out, the Gram matrix of as many other windows. The inputs are those of the dense model. The
other benchmarks read these files.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rarefy import Gram, LayerProblem

FOLDER = Path(__file__).parent / "layers"
BLOCKS = (0, 1, 9, 19, 29)
KINDS = ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")
_TENSORS = ("W0", "H", "held_out", "sum_x", "sum_squares")


@dataclass
class Layer:
    """One saved layer."""

    name: str
    W0: torch.Tensor
    H: torch.Tensor
    held_out: torch.Tensor
    sum_x: torch.Tensor
    sum_squares: torch.Tensor
    num_tokens: int

    def problem(self) -> LayerProblem:
        """A fresh problem: nothing is factored yet."""
        return LayerProblem(self.W0, Gram.from_matrix(self.H, self.num_tokens, self.sum_x, self.sum_squares))


def saved_layers(*kinds: str) -> list[Layer]:
    """The saved layers, of some kinds (``down_proj``) or all; says how to save them where there are none."""
    files = sorted(FOLDER.glob("*.safetensors"))
    if not files:
        raise SystemExit("There are no saved layers: run python benchmarks/layers.py first.")
    layers = []
    for file in files:
        if kinds and not file.stem.endswith(kinds):
            continue
        with safe_open(file, "pt") as tensors:
            num_tokens = int(tensors.metadata()["num_tokens"])
            values = {key: tensors.get_tensor(key) for key in _TENSORS}
        layers.append(Layer(file.stem, **values, num_tokens=num_tokens))
    return layers


def save_layers(model_name: str, calibration: str, blocks: tuple[int, ...], num: int, length: int, seed: int) -> None:
    """Run the dense model over the calibration windows and save the layers of ``blocks``."""
    from rarefy.calibration.collect import collect
    from rarefy.calibration.record import record
    from rarefy.calibration.sources import parse_source
    from rarefy.calibration.stream import convert_calls
    from rarefy.calibration.windows import draw_windows, token_stream
    from rarefy.models.blocks import find_blocks
    from rarefy.models.checkpoint import load_model, resolve_model
    from rarefy.pruning.precision import compute_dtype, computing_in

    model, tokenizer = load_model(resolve_model(model_name), "auto", "auto")
    tokens = token_stream(parse_source(calibration), tokenizer)
    found = find_blocks(model)
    modules = [block.module for block in found]
    streams = [record(model, modules, draw_windows(tokens, num, length, each), 4) for each in (seed, seed + 1)]
    for stream in streams:
        convert_calls(stream, compute_dtype(stream.states.dtype, stream.device))
    FOLDER.mkdir(exist_ok=True)
    for block in found[: max(blocks) + 1]:
        with computing_in(block.module, streams[0].compute_dtype):
            if block.index in blocks:
                sites = [site for site in block.sites if site.name.endswith(KINDS)]
                grams, others = (collect(each, block.module, block.index, sites, means=True) for each in streams)
                for site in sites:
                    gram = grams[site.name]
                    tensors = {
                        "W0": site.read().float().contiguous(),
                        "H": gram.H,
                        "held_out": others[site.name].H,
                        "sum_x": gram.mean * gram.num_tokens,
                        "sum_squares": (gram.variance + gram.mean.square()) * gram.num_tokens,
                    }
                    name = f"{block.index:02d}.{site.name.rpartition('.')[2]}"
                    save_file(
                        {key: tensor.cpu().clone() for key, tensor in tensors.items()},
                        FOLDER / f"{name}.safetensors",
                        {"num_tokens": str(gram.num_tokens)},
                    )
            for stream in streams:
                stream.advance(block.module, block.index)
        print(f"block {block.index} of {max(blocks)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--blocks", default=",".join(map(str, BLOCKS)))
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    save_layers(
        options.model,
        options.calibration,
        tuple(int(index) for index in options.blocks.split(",")),
        options.num_samples,
        options.sequence_length,
        options.seed,
    )
