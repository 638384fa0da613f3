"""Smaller models: they compute what the dense model does with the removed parts off, or they are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from models_for_tests import build, make_model
from rarefy.errors import ModelError
from rarefy.models.blocks import find_blocks
from rarefy.structure.parts import Kind, find_parts
from rarefy.structure.shrink import Removal, shrink, with_order

IDS = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(0))
# The same sums of float32 products in another order, in logits of size 1.
ROUNDING: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}

WITH_HEADS = ("llama", "qwen3", "gemma3", "phi3", "mistral")
WITH_NEURONS = (*WITH_HEADS, "opt", "gpt2", "gpt_neox")
DEEP = (*WITH_NEURONS, "mixtral", "qwen3_moe")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def deep(architecture: str, number: int = 5) -> PreTrainedModel:
    """A model with more blocks than the others."""
    config = make_model(architecture).config
    config.num_hidden_layers = number
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index % len(config.layer_types)] for index in range(number)]
    return build(config)


def without_blocks(model: PreTrainedModel, kept: tuple[int, ...]) -> Tensor:
    """The logits of the model in which the other blocks hand their input on."""
    hooks = [
        block.module.register_forward_hook(
            lambda _, args, kwargs, output: (
                (args[0] if args else kwargs["hidden_states"])
                if isinstance(output, Tensor)
                else ((args[0] if args else kwargs["hidden_states"]), *output[1:])
            ),
            with_kwargs=True,
        )
        for block in find_blocks(model)
        if block.index not in kept
    ]
    found = logits(model)
    for hook in hooks:
        hook.remove()
    return found


def zeroed(model: PreTrainedModel, kinds: tuple[Kind, ...], blocks: tuple[int, ...]) -> tuple[Removal, Tensor]:
    """A removal of other parts in each block, and the logits of the model in which these parts put out zero."""
    parts = []
    dense = copy.deepcopy(model)
    for kind in kinds:
        found = with_order(model, find_parts(model, kind), IDS)
        off = find_parts(dense, kind)
        kept = {}
        for index, site in off.exits.items():
            mask = torch.ones(found.number, dtype=torch.bool)
            mask[
                torch.randperm(found.number, generator=torch.Generator().manual_seed(index))[: found.number // 2]
            ] = False
            site.write(site.read() * mask.repeat_interleave(found.width))
            kept[index] = mask
        parts.append((found, kept))
    return Removal(blocks, tuple(parts)), without_blocks(dense, blocks)


def check_stock(model: PreTrainedModel, folder: Path, expected: Tensor) -> None:
    """Written by transformers and loaded again, it is the same model."""
    model.save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), expected, **ROUNDING)
    written = loaded.generate(IDS[:1, :8], max_new_tokens=4, do_sample=False)  # with its cache
    assert written.shape[1] > 8


@pytest.mark.parametrize("architecture", WITH_NEURONS)
def test_without_neurons(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    removal, expected = zeroed(model, ("neurons",), (0, 1))
    small = shrink(model, removal)
    assert small.num_parameters() < model.num_parameters()
    torch.testing.assert_close(logits(small), expected, **ROUNDING)
    check_stock(small, tmp_path, expected)


@pytest.mark.parametrize("architecture", WITH_HEADS)
def test_without_heads(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    removal, expected = zeroed(model, ("heads",), (0, 1))
    small = shrink(model, removal)
    assert small.config.num_key_value_heads == 1
    torch.testing.assert_close(logits(small), expected, **ROUNDING)
    check_stock(small, tmp_path, expected)


@pytest.mark.parametrize("architecture", DEEP)
def test_without_blocks(architecture: str, tmp_path: Path) -> None:
    model = deep(architecture)
    kept = (0, 2, 4) if architecture == "gemma3" else (0, 1, 4)
    removal = Removal(kept)
    small = shrink(model, removal)
    expected = without_blocks(model, kept)
    torch.testing.assert_close(logits(small), expected, **ROUNDING)
    check_stock(small, tmp_path, expected)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "phi3"])
def test_without_some_of_everything(architecture: str, tmp_path: Path) -> None:
    model = deep(architecture)
    removal, expected = zeroed(model, ("heads", "neurons"), (1, 2, 4))
    small = shrink(model, removal)
    torch.testing.assert_close(logits(small), expected, **ROUNDING)
    check_stock(small, tmp_path, expected)


def test_layer_types_are_cut_like_the_blocks() -> None:
    model = deep("gemma3")
    small = shrink(model, Removal((1, 2, 3)))
    assert small.config.layer_types == model.config.layer_types[1:4]


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "gpt_neox"])
def test_heads_without_a_stock_form_are_refused(architecture: str) -> None:
    with pytest.raises(ModelError, match=r"^\w+ .*KV heads.*\.$"):
        find_parts(make_model(architecture), "heads")


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_lose_no_neurons(architecture: str) -> None:
    with pytest.raises(ModelError, match=r"^[^.]+.*\.$"):
        find_parts(make_model(architecture), "neurons")


def test_a_rule_by_place_is_refused() -> None:
    config = transformers.DeepseekV3Config(**make_model("deepseek_v3").config.to_dict())
    config.num_hidden_layers = 4
    model = build(config)  # the first block is dense, all others have experts
    with pytest.raises(ModelError, match="another kind of block at place 0"):
        shrink(model, Removal((1, 2)))
    expected = without_blocks(model, (0, 2))
    torch.testing.assert_close(logits(shrink(model, Removal((0, 2)))), expected, **ROUNDING)
