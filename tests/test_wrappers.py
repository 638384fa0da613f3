"""What is wrapped around a model is taken off or refused with the way out, before any weight changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from transformers import PreTrainedModel

import rarefy
from cli_for_tests import Rarefy, is_one_sentence
from models_for_tests import make_model, save_folder
from rarefy.errors import ModelError
from rarefy.models.blocks import find_blocks
from rarefy.models.wrappers import unwrapped

WINDOWS = torch.arange(4 * 16).view(4, 16)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def prune(model: nn.Module) -> rarefy.Report:
    return rarefy.prune(model, WINDOWS, pattern=rarefy.NM(2, 4), method=rarefy.Magnitude())


def refused(model: nn.Module, message: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=message) as error:
        prune(model)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- what is taken off


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")  # whose import is quick
    return wrapped


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda model: compiled(nn.DataParallel(model))])
def test_a_wrapped_model_is_pruned_within_its_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, inner = make_model("llama"), make_model("llama")
    expected = prune(plain)
    report = prune(wrap(inner))
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in inner.state_dict().items())
    assert unwrapped(wrap(inner)) is inner


def test_a_model_in_distributed_data_parallel_is_pruned_within_it(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inner = make_model("llama").requires_grad_(True)
        assert prune(nn.parallel.DistributedDataParallel(inner)).sparsity == 0.5
    finally:
        torch.distributed.destroy_process_group()


# --- adapters


def _peft(make: Callable[[Any], Any]) -> Callable[[PreTrainedModel], nn.Module]:
    def wrap(model: PreTrainedModel) -> nn.Module:
        peft = pytest.importorskip("peft")
        wrapped: nn.Module = peft.get_peft_model(model, make(peft))
        return wrapped

    return wrap


def _added(model: PreTrainedModel) -> nn.Module:
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def _base(model: PreTrainedModel) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).base_model.model


_ADAPTERS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "LoRA": _peft(lambda peft: peft.LoraConfig(r=2, target_modules=["q_proj"])),
    "DoRA": _peft(lambda peft: peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)),
    "IA3": _peft(
        lambda peft: peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
    ),
    "prompt tuning": _peft(lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
    "the model within": _base,
    "added by transformers": _added,
}


@pytest.mark.parametrize("adapter", _ADAPTERS)
def test_adapters_are_refused(adapter: str) -> None:
    message = r"has an adapter \(.*\), whose weights are no part of the model's: merge it first \(merge_and_unload\)"
    refused(_ADAPTERS[adapter](make_model("llama")), message)


def test_a_merged_adapter_is_no_adapter() -> None:
    model = _ADAPTERS["LoRA"](make_model("llama"))
    report = prune(model.merge_and_unload())
    assert [layer.name for layer in report.layers] == [layer.name for layer in prune(make_model("llama")).layers]


def test_a_folder_with_an_adapter_beside_its_model_is_refused_before_loading(shelf: Path, rarefy_: Rarefy) -> None:
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    save_folder(model, Path("model"))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("model")
    for command in (("prune", "model", "-o", "out", "--calibration", shelf / "text.txt"), ("eval", "model")):
        result = rarefy_(*command)
        assert result.status == 2
        assert is_one_sentence(result.err)
        assert "with an adapter beside it (adapter_config.json): merge the adapter into the model first" in result.err
        assert not Path("out").exists()


# --- weights that are none


class _Packed(Tensor):
    """A tensor that only looks like one, as those of torchao or of sharded models do."""


def _quantized(model: PreTrainedModel) -> None:
    model.is_quantized = True
    model.quantization_method = "bitsandbytes"


def _set(module: Callable[[nn.Linear], object]) -> Callable[[PreTrainedModel], None]:
    return lambda model: module(model.model.layers[0].self_attn.q_proj) and None


def _in_8_bits(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)


def _subclass(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.as_subclass(_Packed), requires_grad=False)


def _on_meta(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)


class FullyShardedDataParallel(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _sharded(model: PreTrainedModel) -> None:
    model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0])


def _compiled(model: PreTrainedModel) -> None:
    model.model.layers[0] = compiled(model.model.layers[0])


_OTHERS: dict[str, tuple[Callable[[PreTrainedModel], object], str]] = {
    "quantised": (_quantized, r"^LlamaForCausalLM is quantised \(bitsandbytes\), .*: dequantise it first"),
    "8 bits": (_set(_in_8_bits), r"^model\.layers\.0\.self_attn\.q_proj keeps its weight as float8_e4m3fn, but"),
    "another tensor": (_set(_subclass), r"q_proj keeps its weight as a _Packed, but .*: dequantise or gather it"),
    "on no device": (_set(_on_meta), "^LlamaForCausalLM has weights that are not in memory: load it without a dev"),
    "parametrized": (_set(parametrizations.weight_norm), r"q_proj computes its weight from other tensors: make it"),
    "masked": (_set(lambda linear: torch_prune.l1_unstructured(linear, "weight", 0.5)), "q_proj computes its weight"),
    "sharded": (
        _sharded,
        r"^model\.layers\.0 has its weights in shards \(FullyShardedDataParallel\): save",
    ),
    "compiled": (_compiled, r"^model\.layers\.0 is compiled: prune the model first"),
    "compiled in place": (
        lambda model: model.model.layers[1].compile(backend="eager"),
        r"^model\.layers\.1 is compiled",
    ),
}


@pytest.mark.parametrize("kind", _OTHERS)
def test_weights_that_cannot_be_written_are_refused(kind: str) -> None:
    change, message = _OTHERS[kind]
    model = copy.deepcopy(make_model("llama"))
    change(model)
    with pytest.raises(ModelError, match=message) as error:
        prune(model)
    assert "\n" not in str(error.value)
    if kind != "on no device":
        with pytest.raises(ModelError, match=message):
            find_blocks(model)
