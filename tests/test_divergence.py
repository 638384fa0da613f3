"""KL divergence and agreement: against a slow rewrite, for every way in which the logits are had."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from models_for_tests import VOCABULARY, build, make_model
from rarefy.errors import CalibrationError, InputError
from rarefy.evaluation import divergence as module
from rarefy.evaluation import logits
from rarefy.evaluation.divergence import divergence, record_head_inputs
from rarefy.evaluation.logits import cut_windows
from rarefy.evaluation.perplexity import perplexity

LENGTH = 24
#: Sums over thousands of float32 numbers, taken in another order.
RELATIVE = 1e-5


def tokens(count: int = 100, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def capped(seed: int) -> PreTrainedModel:
    """A model that does something to the logits after its head."""
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager",
    )  # fmt: skip
    return build(config, seed)


def changed(model: PreTrainedModel, amount: float = 0.3) -> None:
    """Change all linears in the blocks, and nothing else."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layers" in name:
            parameter.add_(amount * torch.randn_like(parameter))


def slowly(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> tuple[float, float]:
    """Mean KL and agreement by the formula, window by window, in float64."""
    kl, same, count = 0.0, 0, 0
    for window in ids:
        q = model(input_ids=window[None]).logits[0, :-1].double().softmax(-1)
        p = dense(input_ids=window[None]).logits[0, :-1].double().softmax(-1)
        kl += float((p * (p.log() - q.log())).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    return kl / count, same / count


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama": lambda seed: make_model("llama", seed),
    "opt": lambda seed: make_model("opt", seed),
    "softcapped": capped,
}


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("bos_id", [None, 1])
def test_equals_the_formula(architecture: str, bos_id: int | None) -> None:
    dense, model = MODELS[architecture](0), MODELS[architecture](0)
    changed(model)
    ids = cut_windows(tokens(), LENGTH, None, bos_id)
    kl, agreement = slowly(model, dense, ids)
    recorded = record_head_inputs(dense, tokens(), LENGTH, bos_id=bos_id, batch_size=3)
    for reference in (dense, recorded):
        found = divergence(model, reference, tokens(), LENGTH, bos_id=bos_id, batch_size=3)
        assert found.kl == pytest.approx(kl, rel=RELATIVE)
        assert found.agreement == agreement
        assert found.kl > 0
        assert found.agreement < 1


@pytest.mark.parametrize("architecture", MODELS)
def test_a_model_does_not_differ_from_itself(architecture: str) -> None:
    model = MODELS[architecture](0)
    for reference in (MODELS[architecture](0), record_head_inputs(model, tokens(), LENGTH, batch_size=2)):
        found = divergence(model, reference, tokens(), LENGTH, batch_size=2)
        assert found.kl == pytest.approx(0, abs=1e-9)
        assert found.agreement == 1


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("bos_id", [None, 1])
def test_perplexity_is_that_of_perplexity(architecture: str, bos_id: int | None) -> None:
    dense, model = MODELS[architecture](0), MODELS[architecture](0)
    changed(model)
    options = {"bos_id": bos_id, "batch_size": 2, "max_windows": 3, "source": "a text"}
    expected = perplexity(model, tokens(), LENGTH, **options)
    recorded = record_head_inputs(dense, tokens(), LENGTH, bos_id=bos_id, max_windows=3)
    for reference in (dense, recorded):
        found = divergence(model, reference, tokens(), LENGTH, **options).perplexity
        assert (found.windows, found.length, found.tokens, found.source) == (3, LENGTH, expected.tokens, "a text")
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model = make_model("llama"), make_model("llama")
    changed(model)
    whole = divergence(model, dense, tokens(), LENGTH)
    monkeypatch.setattr(logits, "LOGIT_BYTES", 4 * VOCABULARY * 5)
    sliced = divergence(model, dense, tokens(), LENGTH)
    assert sliced.kl == pytest.approx(whole.kl, rel=RELATIVE)
    assert sliced.agreement == whole.agreement
    assert sliced.perplexity.loss == pytest.approx(whole.perplexity.loss, rel=RELATIVE)


def test_is_taken_from_the_dense_side() -> None:
    dense, model = make_model("llama"), make_model("llama")
    changed(model, 1.0)
    for one in (dense, model):
        one.lm_head.weight.mul_(20)  # what is nearly uniform is nearly the same from both sides
    there = divergence(model, dense, tokens(), LENGTH).kl
    back = divergence(dense, model, tokens(), LENGTH).kl
    assert there == pytest.approx(slowly(model, dense, cut_windows(tokens(), LENGTH, None, None))[0], rel=RELATIVE)
    assert abs(there - back) > 100 * RELATIVE * there


def test_a_token_that_cannot_come_adds_nothing() -> None:
    row = torch.tensor([[0.0, 1.0, float("-inf")]])
    loss, kl, same = module._compare(row, row, torch.tensor([1]))
    assert kl == 0
    assert same == 1
    assert loss == pytest.approx(float(-row[0, :2].log_softmax(-1)[1]))


def test_other_vocabulary_is_refused() -> None:
    config = make_model("llama").config
    config.vocab_size = 200
    with pytest.raises(InputError, match=r"200 tokens.*160"):
        divergence(make_model("llama"), build(config), tokens(), LENGTH)


def test_states_of_other_windows_are_refused() -> None:
    model = make_model("llama")
    recorded = record_head_inputs(model, tokens(), LENGTH, max_windows=2)
    with pytest.raises(InputError, match="head inputs"):
        divergence(model, recorded, tokens(), LENGTH)


def test_too_short_a_text_is_refused_with_both_numbers() -> None:
    with pytest.raises(CalibrationError, match=r"10 tokens.*24"):
        cut_windows(tokens(10), LENGTH, None, None)
    with pytest.raises(InputError, match="at least 2"):
        cut_windows(tokens(10), 1, None, None)


def test_progress_and_training_mode() -> None:
    model = make_model("llama").train()
    seen: list[tuple[int, int]] = []
    divergence(model, make_model("llama"), tokens(), LENGTH, batch_size=3, progress=lambda *both: seen.append(both))
    assert seen == [(3, 4), (4, 4)]
    assert model.training


def test_bfloat16() -> None:
    """What is recorded stays in the dtype of the model, and loses nothing."""
    dense, model = make_model("llama").bfloat16(), make_model("llama").bfloat16()
    changed(model)
    recorded = record_head_inputs(dense, tokens(), LENGTH)
    assert recorded.states.dtype == torch.bfloat16
    beside = divergence(model, dense, tokens(), LENGTH)
    assert divergence(model, recorded, tokens(), LENGTH).kl == pytest.approx(beside.kl, rel=RELATIVE)
