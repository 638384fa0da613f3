"""Packed folders: packed, loaded, saved and unpacked again, for every architecture; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from models_for_tests import ARCHITECTURES, EXPERT_ARCHITECTURES, make_model, save_folder
from rarefy.errors import InputError, ModelError, OutputError
from rarefy.models.blocks import find_blocks
from rarefy.models.shards import Shards
from rarefy.models.source import resolve_model
from rarefy.packing import kernel
from rarefy.packing.loading import packed_modules
from rarefy.packing.modules import PackedModule
from rarefy.packing.pack import pack
from rarefy.packing.unpack import PackedCheckpoint, unpack

#: Sums of products in another order, in float32, through two blocks.
_REORDERED = 1e-5


def make_sparse(model: PreTrainedModel, share: float = 0.6, keep_dense: str = "") -> PreTrainedModel:
    """Set that share of the weights in the model's blocks to zero, but for sites whose name ends so."""
    generator = torch.Generator().manual_seed(1)
    for block in find_blocks(model):
        for site in block.sites:
            if not keep_dense or not site.name.endswith(keep_dense):
                weight = site.read()
                weight[torch.rand(weight.shape, generator=generator) < share] = 0
                site.write(weight)
    return model


@pytest.fixture(scope="session")
def sparse_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of a sparse model, by architecture and dtype; tests must not write into it."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def folder(architecture: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        if (architecture, dtype) not in made:
            model = make_sparse(make_model(architecture)).to(dtype)
            made[architecture, dtype] = save_folder(model, tmp_path_factory.mktemp(architecture))
        return made[architecture, dtype]

    return folder


def pack_folder(dense: Path, out: Path, values: str = "auto") -> Path:
    pack(resolve_model(str(dense)), out, values)
    return out


def load(folder: Path, **options: object) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


def logits(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 3 + tokens)[None]).logits


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXPERT_ARCHITECTURES])
def test_a_model_is_the_same_packed_and_unpacked(
    architecture: str, sparse_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = sparse_folder(architecture, torch.float32)
    packed = load(pack_folder(folder, tmp_path / "packed"))
    dense = load(folder)
    sites = {site.parameter_name for block in find_blocks(dense) for site in block.sites}
    held = {f"{path}.{name}" for path, module in packed_modules(packed) for name in module.packed_names()}
    assert held == sites
    for tokens in (1, 5, 40):  # the kernel; the kernel; torch, on the unpacked matrix
        expected = logits(dense, tokens)
        assert (logits(packed, tokens) - expected).abs().max() <= _REORDERED * expected.abs().max()
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    before, after = Shards.open(folder).tensors, Shards.open(tmp_path / "unpacked").tensors
    assert sorted(before) == sorted(after)
    for name, stored in before.items():
        assert torch.equal(stored.read(), after[name].read()), name
        assert stored.dtype == after[name].dtype


def test_a_long_text_gives_the_same_bits_as_the_dense_model(
    sparse_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """More rows than the kernel takes go through the same product as the dense weight."""
    folder = sparse_folder("llama")
    packed = load(pack_folder(folder, tmp_path / "packed"))
    assert torch.equal(logits(packed, 40), logits(load(folder), 40))


def test_the_same_text_is_generated(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = sparse_folder("llama", torch.float32)
    texts = []
    for model in (load(folder), load(pack_folder(folder, tmp_path / "packed"))):
        prompt = torch.arange(3, 20)[None]
        texts.append(model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


@pytest.mark.parametrize("values", ["auto", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_oss"])
def test_save_pretrained_writes_it_packed_again(
    architecture: str, values: str, sparse_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(pack_folder(sparse_folder(architecture), tmp_path / "packed", values))
    model.save_pretrained(tmp_path / "saved")
    sizes = [Shards.open(tmp_path / name).size for name in ("packed", "saved")]
    assert sizes[1] == pytest.approx(sizes[0], abs=4096)  # headers differ
    again = load(tmp_path / "saved")
    for tokens in (3, 20):
        assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_codes_come_back_as_the_weights_they_stand_for(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    for values in ("int8", "int4"):
        packed = pack_folder(sparse_folder("llama"), tmp_path / values, values)
        unpack(packed, tmp_path / f"{values}-unpacked")
        dense = load(tmp_path / f"{values}-unpacked")
        assert dense.dtype == torch.bfloat16
        assert torch.equal(logits(load(packed), 40), logits(dense, 40))
        few, expected = logits(load(packed), 3).float(), logits(dense, 3).float()
        assert (few - expected).abs().max() <= 0.03 * expected.abs().max()  # codes against weights in bfloat16


def test_values_can_be_cast_to_bfloat16(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = sparse_folder("llama", torch.float32)
    packed = pack_folder(folder, tmp_path / "packed", "bf16")
    model = load(packed)
    name, module = packed_modules(model)[0]
    weight = load(folder).get_submodule(name).weight
    assert module.packed("weight").values.dtype == torch.bfloat16
    assert torch.equal(module.dense("weight", torch.float32), weight.bfloat16().float())
    unpack(packed, tmp_path / "unpacked")
    assert Shards.open(tmp_path / "unpacked").tensors[f"{name}.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_can_be_loaded_in_another_dtype(
    dtype: torch.dtype, sparse_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = sparse_folder("llama")
    packed, dense = (load(path, dtype=dtype) for path in (pack_folder(folder, tmp_path / "packed"), folder))
    assert packed.dtype == dtype
    assert torch.equal(logits(packed, 40), logits(dense, 40))
    few, expected = logits(packed, 3).float(), logits(dense, 3).float()
    assert (few - expected).abs().max() <= 0.02 * expected.abs().max()


def test_a_packed_model_can_be_cast_and_copied(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = load(pack_folder(sparse_folder("llama"), tmp_path / "packed", "int8"))
    expected = logits(model, 3)
    cast = nn.Module.float(deepcopy(model))  # transformers' own method refuses
    assert all(module.packed("weight").scale.dtype == torch.float16 for _, module in packed_modules(cast))
    assert (logits(cast, 3) - expected).abs().max() <= 0.02 * expected.abs().max()
    assert torch.equal(logits(deepcopy(model), 3), expected)


def test_a_model_unpacks_itself(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    for architecture in ("llama", "gpt2", "mixtral", "gpt_oss"):
        folder = sparse_folder(architecture)
        model = load(pack_folder(folder, tmp_path / architecture))
        model.dequantize()
        assert not packed_modules(model)
        assert not getattr(model, "is_quantized", False)
        dense = load(folder)
        assert {name: type(module) for name, module in model.named_modules()} == {
            name: type(module) for name, module in dense.named_modules()
        }
        assert torch.equal(logits(model, 9), logits(dense, 9))


def test_layers_with_few_zeros_stay_dense(tmp_path: Path) -> None:
    model = make_sparse(make_model("llama"), keep_dense="down_proj")
    summary = pack(resolve_model(str(save_folder(model, tmp_path / "dense"))), tmp_path / "packed")
    assert {layer.name.rsplit(".", 2)[1] for layer in summary.layers if not layer.packed} == {"down_proj"}
    tensors = Shards.open(tmp_path / "packed").tensors
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (32, 64)
    assert len(tensors["model.layers.0.mlp.up_proj.weight"].shape) == 1
    assert isinstance(load(tmp_path / "packed").model.layers[0].mlp.down_proj, nn.Linear)


def test_one_stack_of_experts_may_stay_dense(tmp_path: Path) -> None:
    for architecture in ("mixtral", "gpt_oss"):
        model = make_sparse(make_model(architecture), keep_dense="down_proj")
        dense = save_folder(model, tmp_path / architecture)
        packed = pack_folder(dense, tmp_path / f"{architecture}-packed")
        held = {name for _, module in packed_modules(load(packed)) for name in module.packed_names()}
        assert held == {"weight", "gate_up_proj"}
        expected = logits(load(dense), 12)
        assert (logits(load(packed), 12) - expected).abs().max() <= _REORDERED * expected.abs().max()
        unpack(packed, tmp_path / f"{architecture}-unpacked")
        before, after = (Shards.open(path).tensors for path in (dense, tmp_path / f"{architecture}-unpacked"))
        assert sorted(before) == sorted(after)
        assert all(torch.equal(before[name].read(), after[name].read()) for name in before)


def test_several_files_stay_several(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    for architecture in ("llama", "mixtral"):
        model = load(sparse_folder(architecture))
        dense, packed, unpacked = (tmp_path / architecture / name for name in ("dense", "packed", "unpacked"))
        model.save_pretrained(dense, max_shard_size="20KB")
        assert len(Shards.open(dense).files) > 3
        pack_folder(dense, packed)
        unpack(packed, unpacked)
        before, between, after = (Shards.open(path) for path in (dense, packed, unpacked))
        assert [file.name for file in before.files] == [file.name for file in between.files]
        assert sorted(before.tensors) == sorted(after.tensors)
        assert all(torch.equal(stored.read(), after.tensors[name].read()) for name, stored in before.tensors.items())
        expected = logits(load(unpacked), 30).float()
        assert (logits(load(packed), 30).float() - expected).abs().max() <= 0.02 * expected.abs().max()


def test_all_else_in_the_folder_comes_along(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    dense = shutil.copytree(sparse_folder("llama"), tmp_path / "dense")
    (dense / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n\nIt is good.\n")
    (dense / "generation_config.json").write_text('{"temperature": 0.5}\n')
    packed = pack_folder(dense, tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (packed / name).read_bytes() == (dense / name).read_bytes()
    card = (packed / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# A model\n\nIt is good.\n")
    assert "import rarefy" in card
    settings = json.loads((packed / "config.json").read_text())
    assert settings.pop("quantization_config") == {"quant_method": "rarefy", "format": "bitmap-1", "group_size": 0}
    assert settings == json.loads((dense / "config.json").read_text())
    unpack(packed, tmp_path / "unpacked")
    for name in ("config.json", "tokenizer.json", "generation_config.json", "README.md"):
        assert (tmp_path / "unpacked" / name).read_text() == (dense / name).read_text()
    assert all(file.stat().st_mode & 0o044 for file in packed.iterdir())


def test_the_sizes_are_those_that_the_format_has(tmp_path: Path) -> None:
    """Of dense bfloat16: 1 - s + 1/16, and for codes of b bits (1 - s) b/16 + 1/16 + 1/group; 8 bytes of checksum."""
    model = make_model("llama").to(torch.bfloat16)
    for block in find_blocks(model):
        for site in block.sites:
            weight = site.read()
            weight[:, 1::2] = 0
            site.write(weight)
    dense = resolve_model(str(save_folder(model, tmp_path / "dense")))
    one_group = sum(site.shape[0] * 2 for block in find_blocks(model) for site in block.sites)  # float16 for each row
    for values, bits in (("auto", 16), ("int8", 8), ("int4", 4)):
        summary = pack(dense, tmp_path / values, values)
        scales = one_group if bits < 16 else 0
        expected = sum(layer.size * (bits / 2 + 1) / 8 + 8 for layer in summary.layers) + scales
        assert sum(layer.nbytes for layer in summary.layers) == expected
        assert summary.nbytes == sum(tensor.size for tensor in Shards.open(tmp_path / values).tensors.values())


# --- Mistakes --------------------------------------------------------------------------------------------------


def test_a_model_without_zeros_is_refused_in_a_sentence(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has nothing to pack: no layer holds 30% zeros \(the most is 0\.0%\)\.$"):
        pack_folder(model_folder("llama"), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_an_output_that_is_not_empty_is_refused(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    packed = pack_folder(sparse_folder("llama"), tmp_path / "deep" / "packed")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (packed, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(OutputError, match=r"^--output is "):
            pack_folder(sparse_folder("llama"), out)
        with pytest.raises(OutputError, match=r"^--output is "):
            unpack(packed, out)
    (tmp_path / "empty").mkdir()
    pack_folder(sparse_folder("llama"), tmp_path / "empty")


def test_unknown_values_are_refused(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--values is 'int2', but must be auto, bf16, int8 or int4"):
        pack_folder(sparse_folder("llama"), tmp_path / "packed", "int2")


@pytest.mark.parametrize("step", ["pack", "unpack"])
def test_nothing_is_left_of_what_fails(
    step: str, sparse_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_folder(sparse_folder("llama"), tmp_path / "packed")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"rarefy.packing.{step}.copy_settings", refuse)
    with pytest.raises(OSError, match="No space"):
        if step == "pack":
            pack_folder(sparse_folder("llama"), tmp_path / "new" / "out")
        else:
            unpack(packed, tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_what_a_killed_process_left_is_replaced(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    partial = tmp_path / ".packed.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_text("half")
    pack_folder(sparse_folder("llama"), tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_a_full_disk_is_found_before_anything_is_written(
    sparse_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OutputError, match="needs 0.0 GB, but its disk has 0.0 GB left"):
        pack_folder(sparse_folder("llama"), tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_what_is_not_packed_cannot_be_unpacked(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not packed: its config.json does not say so"):
        unpack(sparse_folder("llama"), tmp_path / "unpacked")


def test_weights_that_no_kernel_takes_are_refused(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    dense = save_folder(make_sparse(make_model("llama")).double(), tmp_path / "dense")
    with pytest.raises(ModelError, match="is float64, which cannot be packed"):
        pack_folder(dense, tmp_path / "packed")


# --- Without the kernel -----------------------------------------------------------------------------------------


def test_without_a_kernel_torch_does_it_and_a_warning_says_so(
    sparse_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sparse_folder("mixtral")
    pack_folder(folder, tmp_path / "packed")
    monkeypatch.setattr(kernel, "library", lambda: None)
    monkeypatch.setattr(kernel, "path", lambda: None)
    with pytest.warns(UserWarning, match="packed weights are slow here: no kernel, since Rarefy was installed"):
        model = load(tmp_path / "packed")
    for tokens in (1, 3, 30):
        expected = logits(load(folder), tokens).float()
        assert (logits(model, tokens).float() - expected).abs().max() <= 0.02 * expected.abs().max()


def test_on_another_device_it_is_unpacked_while_it_is_loaded(
    sparse_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is decided by the device of the values is tried without one: as if they were elsewhere."""
    folder = sparse_folder("llama")
    pack_folder(folder, tmp_path / "packed")
    monkeypatch.setattr(PackedModule, "on_cpu", property(lambda _: False))
    model = load(tmp_path / "packed")
    assert not packed_modules(model)
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model, 3), logits(load(folder), 3))
    model.save_pretrained(tmp_path / "saved")
    assert Shards.open(tmp_path / "saved").size == Shards.open(folder).size


def test_a_reader_of_single_parameters(sparse_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = sparse_folder("gpt_oss")
    checkpoint = PackedCheckpoint(pack_folder(folder, tmp_path / "packed"))
    dense = load(folder).state_dict()
    assert len(checkpoint.packed) == 12
    for name in checkpoint.packed:
        assert torch.equal(checkpoint.read(name), dense[name])
