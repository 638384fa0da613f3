"""Writes a random Llama-shaped checkpoint of any size with little memory: 13.5 GB with LLaMA-2-7B's 32 layers.

    python benchmarks/big_checkpoint.py FOLDER [--layers 32] [--shard-gb 2]

Widths are those of LLaMA-2-7B (hidden 4096, intermediate 11008, vocabulary 32000), weights are normal numbers
in bfloat16, the same for the same seed however many layers are written. Each tensor is drawn and written by
itself, so the script holds one at a time. The tokenizer knows single characters only: enough to prune with any
text. The result is an ordinary folder that ``from_pretrained`` loads; it has learnt nothing.
"""

from __future__ import annotations

import argparse
import json
import string
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

#: Standard deviation of the weights: such that hidden states neither vanish nor explode over 32 layers.
_SPREAD = 0.02


def config_of(layers: int) -> LlamaConfig:
    """LLaMA-2-7B's settings, with another number of layers."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the checkpoint in the order in which they are written."""
    hidden, inner = config.hidden_size, config.intermediate_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        for name in ("q", "k", "v", "o"):
            yield f"{prefix}self_attn.{name}_proj.weight", (hidden, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


def drawn(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The values of one tensor in bfloat16: ones for a norm, else normal numbers that belong to its name."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = np.random.default_rng([seed, *name.encode()])
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    for rows in tensor.split(1024):
        numbers = generator.standard_normal(rows.shape, dtype=np.float32)
        rows.copy_(torch.from_numpy(numbers).mul_(_SPREAD))
    return tensor


def split(tensors: list[tuple[str, tuple[int, ...]]], limit: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in files of at most ``limit`` bytes each, or one tensor where it is larger."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensors:
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    return shards


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], seed: int) -> int:
    """Write one safetensors file, tensor by tensor; returns the bytes of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            file.write(drawn(name, shape, seed).view(torch.uint8).numpy().data)
    return end


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that makes every character one token."""
    words = ["<unk>", "<s>", "</s>", *string.printable]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=4096
    ).save_pretrained(folder)


def main(folder: Path, layers: int, shard_gb: float, seed: int) -> None:
    """Write the checkpoint and say how large it is."""
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(layers)
    config.save_pretrained(folder)
    write_tokenizer(folder)
    shards = split(list(shapes(config)), int(shard_gb * 1e9))
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += write_shard(folder / name, tensors, seed)
        weight_map.update({tensor: name for tensor, _ in tensors})
        print(f"{name}  {total / 1e9:.2f} GB  {time.perf_counter() - started:.0f} s", flush=True)
    index = {"metadata": {"total_parameters": total // 2, "total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shard-gb", type=float, default=2.0, help="most bytes of a file, in units of 1e9")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.folder, options.layers, options.shard_gb, options.seed)
