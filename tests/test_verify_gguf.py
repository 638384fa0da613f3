"""Zeros in GGUF files: counted per matrix, and the types of blocks that cannot hold them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from cli_for_tests import Rarefy, is_one_sentence
from rarefy.layer.pattern import NM
from rarefy.models.gguf import KEEP_ZEROS
from rarefy.runs.verify import inspect_folder

SHAPE = (6, 512)


def weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator).view(6, -1, 4)
    weight[:, :, 2:] = 0
    return weight.view(SHAPE)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with a matrix of 2:4 in three types, a stack of two experts, and what is no matrix of a block."""
    weight = weights().numpy()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, kind in (("blk.0.attn_q", Type.Q8_0), ("blk.0.attn_k", Type.Q4_1), ("blk.0.attn_v", Type.F32)):
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
    stack = torch.stack([weights(), torch.ones(SHAPE)]).numpy()
    writer.add_tensor("blk.1.ffn_up_exps.weight", gguf.quantize(stack, Type.Q4_0), raw_dtype=Type.Q4_0)
    for name in ("token_embd.weight", "blk.1.ffn_gate_inp.weight", "output.weight"):
        writer.add_tensor(name, weight)
    writer.add_tensor("blk.0.attn_norm.weight", weight[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def test_zeros_are_counted_per_matrix(file: Path) -> None:
    layers = {layer.name: layer for layer in inspect_folder(file, pattern=NM(2, 4)).layers}
    assert {name: (layer.type, layer.shape) for name, layer in layers.items()} == {
        "blk.0.attn_q": ("Q8_0", [*SHAPE]),
        "blk.0.attn_k": ("Q4_1", [*SHAPE]),
        "blk.0.attn_v": ("F32", [*SHAPE]),
        "blk.1.ffn_up_exps.0": ("Q4_0", [*SHAPE]),
        "blk.1.ffn_up_exps.1": ("Q4_0", [*SHAPE]),
    }
    half = SHAPE[0] * SHAPE[1] // 2
    assert layers["blk.0.attn_v"].zeros == half
    for name in ("blk.0.attn_q", "blk.1.ffn_up_exps.0"):
        assert layers[name].zeros >= half  # small weights may round to zero as well
        assert layers[name].problems == []
    assert layers["blk.0.attn_k"].zeros < half / 4
    assert "groups hold more than 2 of 4" in layers["blk.0.attn_k"].problems[0]
    assert layers["blk.1.ffn_up_exps.1"].zeros == 0


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q4_1, Type.Q5_1, Type.BF16, Type.F16])
def test_the_types_that_keep_zeros_are_those_that_are_named(kind: Type) -> None:
    """Of those that the package can write."""
    weight = weights()
    read = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    assert bool((read[weight == 0] == 0).all()) == (kind.name in KEEP_ZEROS)


def test_inspect_reads_a_file_and_warns_of_types_that_lose_zeros(rarefy_: Rarefy, file: Path) -> None:
    done = rarefy_("inspect", file)
    assert done.status == 0
    assert "Q8_0" in done.out
    assert done.err == "Q4_1: these types turn zeros into small numbers; Q8_0, Q6_K, Q5_0 and Q4_0 keep them\n"
    facts = json.loads(rarefy_("inspect", file, "--json").out)
    assert {layer["type"] for layer in facts["layers"]} == {"Q8_0", "Q4_1", "F32", "Q4_0"}
    assert rarefy_("inspect", file, "--pattern", "2:4").status == 1


def test_a_damaged_file_is_one_sentence(rarefy_: Rarefy, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])
    done = rarefy_("inspect", file)
    assert is_one_sentence(done.err), done.err
    assert "is no GGUF file, or is damaged or cut off" in done.err
    assert done.status == 2
