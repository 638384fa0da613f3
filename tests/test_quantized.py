"""Quantised checkpoints: dequantised while they are read, or refused with what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cli_for_tests import Rarefy
from models_for_tests import _GROUPED, build, make_model, save_folder
from rarefy.errors import ModelError
from rarefy.models.checkpoint import load_model
from rarefy.models.losses import lost_tensors
from rarefy.models.quantized import quantization_of
from rarefy.models.saving import save_model
from rarefy.models.shards import Shards
from rarefy.models.source import resolve_model
from rarefy.models.streaming import StreamedModel

Tensors = dict[str, Tensor]
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3")


def _is_quantized(name: str, tensor: Tensor) -> bool:
    kept = ("embed", "lm_head", "gate.weight")
    return tensor.ndim == 2 and not any(part in name for part in kept)


def _in_fp8(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The files of an FP8 checkpoint, as DeepSeek-V3 has them, and the weights that they stand for."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if not _is_quantized(name, tensor):
            stored[name] = meant[name] = tensor
            continue
        scale = tensor.float().abs().max() / 448
        stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
        meant[name] = (stored[name].float() * scale).bfloat16()
    return stored, meant


def _write(folder: Path, tensors: Tensors, quantization: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": quantization}))


def _fp8_folder(architecture: str, folder: Path) -> Tensors:
    """Writes an FP8 checkpoint with a quantised layer for speculation; the weights that it stands for."""
    save_folder(make_model(architecture).bfloat16(), folder)
    tensors = load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.randn(8, 8).bfloat16()}
    stored, meant = _in_fp8(tensors)
    stored["model.layers.0.self_attn.k_scale"] = torch.ones(())  # of a quantised cache
    _write(folder, stored, _FP8)
    return meant


def _assert_same(tensors: Tensors, others: Tensors) -> None:
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


@pytest.mark.filterwarnings("ignore:.* tensors that its model has no place for")
@pytest.mark.parametrize("architecture", ["llama", *_MIXTURES])
def test_an_fp8_checkpoint_is_had_in_parts_as_ordinary_weights(architecture: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    meant = _fp8_folder(architecture, folder)
    source = resolve_model(str(folder))
    assert not hasattr(source.config, "quantization_config")
    streamed = StreamedModel(source)
    assert streamed.model.dtype == torch.bfloat16
    whole, _ = load_model(source, "cpu")
    _assert_same(dict(streamed.load().named_parameters()), dict(whole.named_parameters()))
    copies = streamed.copies(tmp_path / "copy")
    copies.make()
    assert (tmp_path / "copy" / "model.safetensors").exists()
    _assert_same(load_file(tmp_path / "copy" / "model.safetensors"), meant)
    streamed.close()
    with streamed.loaded(copies=copies) as module:
        _assert_same(dict(module.named_parameters()), dict(whole.named_parameters()))
        name = next(name for name, each in module.named_parameters() if "down_proj" in name and each.ndim > 1)
        with torch.no_grad():
            module.get_parameter(name)[..., ::2] = 0
        streamed.store([name], copies)
    save_model(whole, None, tmp_path / "plain", source)
    _assert_same(load_file(tmp_path / "plain" / "model.safetensors"), meant)
    assert "quantization" not in (tmp_path / "plain" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    _assert_same(dict(again.named_parameters()), dict(whole.named_parameters()))
    assert lost_tensors(source, Shards.open(tmp_path / "plain")) == []
    written = load_file(tmp_path / "plain" / "model.safetensors")
    del written["mtp.fc.weight"]
    save_file(written, tmp_path / "plain" / "model.safetensors")
    assert "mtp.fc.weight" in lost_tensors(source, Shards.open(tmp_path / "plain"))


def test_what_is_not_quantised_keeps_its_dtype(tmp_path: Path) -> None:
    _fp8_folder("llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    norm = torch.randn(32)
    save_file(load_file(file) | {"model.norm.weight": norm}, file, metadata={"format": "pt"})
    StreamedModel(resolve_model(str(tmp_path / "model"))).copies(tmp_path / "copy").make()
    _assert_same({"": load_file(tmp_path / "copy" / "model.safetensors")["model.norm.weight"]}, {"": norm})


@pytest.mark.filterwarnings("ignore:.* weights of experts were solved with all tokens")
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_an_fp8_checkpoint_is_pruned_like_the_weights_that_it_stands_for(
    architecture: str, tmp_path: Path, rarefy_: Rarefy
) -> None:
    meant = _fp8_folder(architecture, Path("fp8"))
    save_folder(make_model(architecture).bfloat16(), Path("plain"))
    save_file(meant, "plain/model.safetensors", metadata={"format": "pt"})
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 50)
    for name in ("fp8", "plain"):
        arguments = ["--calibration", "text.txt", "--num-samples", 4, "--sequence-length", 32, "--pattern", "2:4"]
        result = rarefy_("prune", name, "-o", f"{name}-out", *arguments, "--method", "wanda", "--no-texts")
        assert result.status == 0, result.err
    written = [load_file(f"{name}-out/model/model.safetensors") for name in ("fp8", "plain")]
    _assert_same(*written)
    assert any("proj" in name and (tensor == 0).float().mean() == 0.5 for name, tensor in written[0].items())
    listed = rarefy_("inspect", "fp8")
    assert listed.status == 0, listed.err


def test_mxfp4_experts_become_ordinary_ones(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        **_GROUPED | {"hidden_size": 64}, num_experts_per_tok=2, num_local_experts=4, head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    save_folder(build(config).bfloat16(), tmp_path / "model")
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        if not name.endswith("_proj"):
            stored[name] = meant[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        codes = torch.randint(0, 16, (experts, outputs, inputs))
        scales = torch.randint(120, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
        pairs = codes.unflatten(2, (-1, 16, 2)).to(torch.uint8)
        stored[f"{name}_blocks"] = pairs[..., 0] + 16 * pairs[..., 1]
        stored[f"{name}_scales"] = scales
        values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])[codes]
        factors = 2.0 ** (scales.float() - 127)
        meant[name] = (values * factors.repeat_interleave(32, dim=2)).transpose(1, 2).bfloat16().contiguous()
    _write(tmp_path / "model", stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    streamed = StreamedModel(source := resolve_model(str(tmp_path / "model")))
    streamed.copies(tmp_path / "copy").make()
    _assert_same(load_file(tmp_path / "copy" / "model.safetensors"), meant)
    whole, _ = load_model(source, "cpu")
    _assert_same(dict(streamed.load().named_parameters()), dict(whole.named_parameters()))


@pytest.mark.parametrize("bits", [8, 4])
def test_compressed_tensors_become_ordinary_ones(
    bits: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    save_folder(make_model("llama").bfloat16(), tmp_path / "model")
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        if not _is_quantized(name, tensor):
            stored[name] = meant[name] = tensor
            continue
        scale = (tensor.float().abs().amax(1, keepdim=True) / (448 if bits == 8 else 7)).bfloat16()
        values = tensor.float() / scale.float()
        if bits == 8:
            stored[name] = values.to(torch.float8_e4m3fn)
            values = stored[name].float()
        else:
            values = values.round().clamp(-8, 7)
            place = name.removesuffix("weight")
            stored[f"{place}weight_packed"] = pack_to_int32(values.to(torch.int8), 4)
            stored[f"{place}weight_shape"] = torch.tensor(tensor.shape)
        stored[f"{name}_scale"] = scale
        meant[name] = (values * scale.float()).bfloat16()
    kind = "float-quantized" if bits == 8 else "pack-quantized"
    weights = {"num_bits": bits, "type": "float" if bits == 8 else "int", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": kind}}
    quantization = {"quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"]}
    _write(tmp_path / "model", stored, quantization | {"config_groups": groups, "quantization_status": "compressed"})
    streamed = StreamedModel(resolve_model(str(tmp_path / "model")))
    streamed.copies(tmp_path / "copy").make()
    written = load_file(tmp_path / "copy" / "model.safetensors")
    assert written.keys() == meant.keys()
    for name, tensor in written.items():  # the package multiplies in bfloat16, which rounds once more
        torch.testing.assert_close(tensor, meant[name], rtol=2**-7, atol=0)
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "hqq", "nvfp4", "quark", "nonsense", None, 3])
def test_other_formats_are_refused_with_the_way_out(tmp_path: Path, method: object) -> None:
    save_folder(make_model("llama"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    _write(tmp_path / "model", tensors, {"quant_method": method, "bits": 4})
    named = rf"is quantised \({method}\)" if isinstance(method, str) else "is quantised"
    way_out = "give the model that it was made from, or dequantise it and save it first"
    with pytest.raises(ModelError, match=rf"{named}, .*: {way_out}") as error:
        resolve_model(str(tmp_path / "model"))
    assert "\n" not in str(error.value)


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("compressed-tensors is required")

    monkeypatch.setattr("rarefy.models.quantized.AutoQuantizationConfig.from_dict", missing)
    save_folder(make_model("llama"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    _write(tmp_path / "model", tensors, {"quant_method": "compressed-tensors", "config_groups": {"a": {}}})
    with pytest.raises(ModelError, match="needs a package to be .*: pip install compressed-tensors$"):
        resolve_model(str(tmp_path / "model"))


def test_what_is_called_quantised_but_holds_ordinary_weights_is_ordinary() -> None:
    dense = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}, "config_groups": {}}
    assert quantization_of({"quantization_config": dense}) is None
    assert quantization_of({"compression_config": dense | {"config_groups": {"a": {}}}}) is not None
    assert quantization_of({"compression_config": dense | {"sparsity_config": {"format": "sparse-24"}}}) is not None
    assert quantization_of({"text_config": {"quantization_config": _FP8}}) == _FP8
    assert quantization_of({"quantization_config": None, "text_config": None}) is None
