"""What a model writes: the likeliest tokens after each prompt, whatever stands beside it in the batch."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from models_for_tests import ARCHITECTURES, make_model, make_tokenizer
from rarefy.errors import CalibrationError
from rarefy.runs.texts import PROMPTS, kept_texts, write_texts


def slowly(model: PreTrainedModel, prompt: str, num_tokens: int) -> str:
    """One token after the other, each from a pass over the whole text."""
    ids = make_tokenizer()(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(num_tokens):
        token = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], dim=1)
        if int(token) == model.config.eos_token_id:
            break
    return str(make_tokenizer().decode(ids[0, start:], skip_special_tokens=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_a_plain_loop_for_prompts_of_different_lengths(architecture: str) -> None:
    model = make_model(architecture)
    prompts = ("the rain", "a", "the old keeper looked out")
    texts = write_texts(model, make_tokenizer(), prompts, num_tokens=12)
    assert texts == [slowly(model, prompt, 12) for prompt in prompts]
    assert len(set(texts)) > 1


def test_the_models_own_settings_play_no_part_and_stay() -> None:
    model = make_model("llama")
    expected = write_texts(model, make_tokenizer())
    own = GenerationConfig(do_sample=True, temperature=5.0, max_new_tokens=1, eos_token_id=2)
    model.generation_config = own
    assert write_texts(model, make_tokenizer()) == expected
    assert model.generation_config is own
    with pytest.raises(CalibrationError, match="gives token 1,000, but its model has embeddings for"):
        write_texts(model, lambda prompt: {"input_ids": [1000]})  # type: ignore[arg-type]
    assert model.generation_config is own


def test_a_text_ends_where_the_model_ends_it() -> None:
    """The other texts of the batch go on; what fills up the ended one is the end itself, here no special token."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    first, second = write_texts(model, tokenizer, ("the rain", "a"), num_tokens=12)
    end = tokenizer(first[3:], add_special_tokens=False)["input_ids"][0]
    model.generation_config.eos_token_id = end
    short, other = write_texts(model, tokenizer, ("the rain", "a"), num_tokens=12)
    assert re.fullmatch(re.escape(first[:3]) + f"({re.escape(tokenizer.decode([end]))})+", short)
    assert not first.startswith(short)
    assert other == second


def test_what_is_kept() -> None:
    model = make_model("llama")
    assert kept_texts(model, None) == []
    kept = kept_texts(model, make_tokenizer())
    assert [one["prompt"] for one in kept] == list(PROMPTS)
    assert [one["text"] for one in kept] == write_texts(model, make_tokenizer())
