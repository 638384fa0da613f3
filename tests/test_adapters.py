"""PEFT's adapters on pruned models: masked products, and merging that fills no zero."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import rarefy
from models_for_tests import make_model
from rarefy.errors import InputError, ModelError
from tuning_for_tests import prune_by_magnitude, site_masks, some_windows

# Products of rank 4, summed in another order.
CLOSE = 1e-5

LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def sparse_model(architecture: str = "llama") -> PreTrainedModel:
    return prune_by_magnitude(make_model(architecture))


def with_adapter(model: PreTrainedModel, *, filled: bool = True, **options: Any) -> Any:
    """The model with LoRA adapters, whose B is not 0 if ``filled``."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **options})
    adapted = peft.get_peft_model(model, config)
    if filled:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=some_windows(2), use_cache=False).logits
    return logits


def masks_are(before: dict[str, torch.Tensor], model: PreTrainedModel) -> bool:
    return all(torch.equal(before[name], mask) for name, mask in site_masks(model).items())


def test_merging_as_peft_does_would_fill_the_zeros() -> None:
    model = sparse_model()
    before = site_masks(model)
    assert not masks_are(before, with_adapter(model).merge_and_unload())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_merged_masks_are_those_of_the_model(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    if architecture == "gpt2":
        options = {**options, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    elif options.get("lora_bias"):
        pytest.skip("the linears have no biases to merge it into")
    model = sparse_model(architecture)
    before, old = site_masks(model), {name: value.clone() for name, value in model.state_dict().items()}
    if options.get("use_dora"):
        with pytest.raises(InputError, match="has an adapter of the kind DoraLinearVariant"):
            rarefy.keep_zeros(with_adapter(model, **options))
        return
    merged = rarefy.merge(with_adapter(model, **options))
    assert merged.state_dict().keys() == old.keys()
    assert masks_are(before, merged)
    assert any(not torch.equal(old[name], value) for name, value in merged.state_dict().items())


def test_an_adapter_of_a_folder(tmp_path: Path) -> None:
    adapted = with_adapter(sparse_model())
    adapted.save_pretrained(tmp_path / "adapter")
    parts = {name: value.clone() for name, value in peft.get_peft_model_state_dict(adapted).items()}
    model = sparse_model()
    before = site_masks(model)
    merged = rarefy.merge(tmp_path / "adapter", model)
    assert masks_are(before, merged)
    expected = rarefy.merge(adapted)
    assert all(
        torch.equal(one, two) for one, two in zip(merged.state_dict().values(), expected.state_dict().values())
    )
    site = "model.layers.0.mlp.up_proj.weight"
    start = site.removesuffix(".weight").replace("model.", "base_model.model.model.", 1)
    product = 2 * parts[f"{start}.lora_B.weight"] @ parts[f"{start}.lora_A.weight"]
    weight = sparse_model().state_dict()[site]
    assert torch.allclose(merged.state_dict()[site], weight + (weight != 0) * product, atol=CLOSE)


def test_other_kinds_of_adapters(tmp_path: Path) -> None:
    for config in (
        peft.LoHaConfig(r=2, target_modules=LINEARS, init_weights=False),
        peft.IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"], init_ia3_weights=False),
        peft.LoraConfig(r=2, target_modules=LINEARS, modules_to_save=["lm_head"], init_lora_weights=False),
    ):
        model = sparse_model()
        before = site_masks(model)
        assert masks_are(before, rarefy.merge(peft.get_peft_model(model, config)))


def test_what_is_trained_under_keep_zeros_is_what_is_merged() -> None:
    model = sparse_model()
    before = site_masks(model)
    adapted = with_adapter(model, filled=False, lora_dropout=0.1)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    with rarefy.keep_zeros(adapted) as zeros:
        assert len(zeros.adapters) == 2 * len(LINEARS)
        losses = []
        for _ in range(8):
            ids = some_windows(4)
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.eval()
    trained = outputs(adapted)
    assert not torch.allclose(trained, outputs(sparse_model()), atol=1e-3)
    merged = adapted.merge_and_unload()  # PEFT's own
    assert masks_are(before, merged)
    assert torch.allclose(outputs(merged), trained, atol=1e-4)


def test_masked_products_can_be_merged_and_taken_back() -> None:
    model = sparse_model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = with_adapter(model)
    rarefy.keep_zeros(adapted).remove()
    before = outputs(adapted)
    for safe in (False, True):
        adapted.merge_adapter(safe_merge=safe)
        assert torch.allclose(outputs(adapted), before, atol=1e-4)
        adapted.unmerge_adapter()
    plain = adapted.unload()
    assert all(torch.allclose(weights[name], value, atol=CLOSE) for name, value in plain.state_dict().items())


def test_an_adapter_on_a_dense_layer_is_left_alone() -> None:
    model = sparse_model()
    model.get_submodule("model.layers.0.self_attn.q_proj").weight.copy_(
        make_model("llama").get_submodule("model.layers.0.self_attn.q_proj").weight
    )
    adapted = with_adapter(model)
    with rarefy.keep_zeros(adapted) as zeros:
        assert not any("layers.0.self_attn.q_proj" in name for name in zeros.adapters)
        assert len(zeros.adapters) == 2 * len(LINEARS) - 1


def test_half_precision_is_rounded_once() -> None:
    model = sparse_model().to(torch.bfloat16)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight.detach().clone()
    adapted = with_adapter(model)
    layer = adapted.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    A, B = (getattr(layer, name)["default"].weight.detach() for name in ("lora_A", "lora_B"))
    expected = (weight.float() + (weight != 0) * (2 * B.float() @ A.float())).to(torch.bfloat16)
    merged = rarefy.merge(adapted)
    assert torch.equal(merged.get_submodule("model.layers.0.mlp.up_proj").weight, expected)


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="model is missing: name the pruned model"):
        rarefy.merge(tmp_path)
    with pytest.raises(InputError, match=r"a folder with adapter_config\.json"):
        rarefy.merge(tmp_path, sparse_model())
    with pytest.raises(InputError, match="adapter is 'LlamaForCausalLM', but must be a PeftModel"):
        rarefy.merge(sparse_model())
    with_adapter(sparse_model()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit the model"):
        rarefy.merge(tmp_path / "adapter", sparse_model("gpt2"))
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match="An adapter of the kind PromptTuning changes no weights"):
        rarefy.merge(peft.get_peft_model(sparse_model(), prompts))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"123456789")
    with pytest.raises(ModelError, match="is damaged, or does not fit the model"):
        rarefy.merge(tmp_path / "adapter", sparse_model())
    for content in ("{", "{}", '{"peft_type": "NONE"}'):
        (tmp_path / "adapter" / "adapter_config.json").write_text(content)
        with pytest.raises(ModelError, match="is damaged, or does not fit the model"):
            rarefy.merge(tmp_path / "adapter", sparse_model())
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'rarefy\[tune\]'"):
        rarefy.merge(tmp_path / "adapter", sparse_model())
