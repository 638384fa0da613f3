"""Perplexity against a plain loop over windows and against answers that are known without computing."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from models_for_tests import ARCHITECTURES, VOCABULARY, build, make_model
from rarefy.errors import CalibrationError, InputError
from rarefy.evaluation import logits
from rarefy.evaluation.perplexity import perplexity
from rarefy.models import head

# float32 sums of 160 logits, in another order: some units in the last place.
RELATIVE = 1e-6

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CHANGED_LOGITS = {
    "capped": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5),
    "divided": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "multiplied": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
}


def some_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def plain_loss(model: PreTrainedModel, tokens: Tensor, length: int) -> float:
    """The papers' loop: transformers' own loss of each window, averaged."""
    losses = []
    for i in range(len(tokens) // length):
        window = tokens[i * length : (i + 1) * length][None]
        losses.append(model(input_ids=window, labels=window).loss.double())
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_equals_the_plain_loop(architecture: str) -> None:
    model, tokens = make_model(architecture), some_tokens(100)
    result = perplexity(model, tokens, 24)
    assert result.loss == pytest.approx(plain_loss(model, tokens, 24), rel=RELATIVE)
    assert result.perplexity == pytest.approx(math.exp(result.loss), rel=RELATIVE)


@pytest.mark.parametrize("config", CHANGED_LOGITS)
def test_it_equals_the_plain_loop_where_the_model_changes_its_heads_output(config: str) -> None:
    model, tokens = build(CHANGED_LOGITS[config]()), some_tokens(100)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # so that the change is felt
    assert perplexity(model, tokens, 24).loss == pytest.approx(plain_loss(model, tokens, 24), rel=RELATIVE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_runs_in_slices_where_its_output_is_left_alone(architecture: str) -> None:
    model = make_model(architecture)
    assert head.head_alone(model, some_tokens(8)[None])


def test_slices_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_model("llama"), some_tokens(7 * 24)
    loss = perplexity(model, tokens, 24).loss
    assert perplexity(model, tokens, 24, batch_size=3).loss == pytest.approx(loss, rel=RELATIVE)
    monkeypatch.setattr(logits, "LOGIT_BYTES", 5 * 4 * VOCABULARY)
    assert perplexity(model, tokens, 24).loss == pytest.approx(loss, rel=RELATIVE)
    assert perplexity(model, tokens, 24, batch_size=2).loss == pytest.approx(loss, rel=RELATIVE)


def test_no_more_logits_than_a_slice_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "LOGIT_BYTES", 10 * 4 * VOCABULARY)
    model, rows = make_model("llama"), []
    model.get_output_embeddings().register_forward_hook(lambda _, __, found: rows.append(found[..., 0].numel()))
    perplexity(model, some_tokens(48), 24)
    # The first two are the probe's, which looks at 8 positions.
    assert rows == [8, 8, 10, 10, 3, 10, 10, 3]


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert perplexity(model, some_tokens(50), 10).perplexity == pytest.approx(VOCABULARY, rel=RELATIVE)


def test_counts_and_the_partial_window() -> None:
    model, tokens = make_model("llama"), some_tokens(100)
    result = perplexity(model, tokens, 24, source="random")
    assert (result.windows, result.length, result.tokens, result.source) == (4, 24, 4 * 23, "random")
    assert perplexity(model, tokens[:96], 24) == perplexity(model, tokens, 24)
    assert perplexity(model, tokens, 24, max_windows=9).windows == 4
    assert perplexity(model, tokens, 24, max_windows=2) == perplexity(model, tokens[:48], 24)
    assert perplexity(model, tokens[:24], 24).windows == 1


def test_the_start_token_comes_before_every_window() -> None:
    model, tokens = make_model("llama"), some_tokens(100)
    windows = torch.cat([torch.ones(4, 1, dtype=torch.int64), tokens[:92].view(4, 23)], dim=1)
    result = perplexity(model, tokens, 24, bos_id=1)
    assert result.loss == perplexity(model, windows.flatten(), 24).loss
    assert (result.windows, result.tokens) == (4, 4 * 23)


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    model, tokens = make_model("llama"), some_tokens(5 * 8)
    result = perplexity(model, tokens, 8, batch_size=2, progress=lambda *step: seen.append(step))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert result == perplexity(model, tokens, 8, batch_size=2)


def test_dropout_is_off_and_the_mode_is_left_as_it_was() -> None:
    model, tokens = make_model("gpt2"), some_tokens(48)
    expected = perplexity(model, tokens, 24)
    assert perplexity(model.train(), tokens, 24) == expected
    assert model.training


def test_nan_and_infinity_are_answers() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    assert perplexity(model, some_tokens(20), 10).perplexity == math.inf
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] = math.nan
    assert math.isnan(perplexity(model, some_tokens(20), 10).perplexity)


def test_a_text_shorter_than_one_window_is_an_error_with_both_numbers() -> None:
    with pytest.raises(CalibrationError, match=r"1,999 tokens.*needs 2,000\."):
        perplexity(make_model("llama"), some_tokens(1999), 2000)
    with pytest.raises(CalibrationError, match=r"8 tokens.*needs 9\."):
        perplexity(make_model("llama"), some_tokens(8), 10, bos_id=1)
    with pytest.raises(InputError, match="window length is 1"):
        perplexity(make_model("llama"), some_tokens(8), 1)
    with pytest.raises(InputError, match="number of windows is 0"):
        perplexity(make_model("llama"), some_tokens(8), 4, max_windows=0)
