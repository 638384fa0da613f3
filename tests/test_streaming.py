"""Models whose weights stay on disk: every part is what from_pretrained makes, and can be written back."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import Chunk, Split, Transpose, WeightConverter, WeightRenaming

from models_for_tests import _GROUPED, _SIZES, ARCHITECTURES, build, make_model, write_gguf
from rarefy.calibration.record import record
from rarefy.errors import ModelError
from rarefy.models import conversion
from rarefy.models.blocks import _block_list
from rarefy.models.copies import ShardCopies
from rarefy.models.settings import copy_settings
from rarefy.models.source import resolve_model
from rarefy.models.stored import SafeTensor
from rarefy.models.streaming import StreamedModel

_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2}
_MIXTURES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**_EXPERTS, num_local_experts=12),
    "phimoe": lambda: transformers.PhimoeConfig(**_EXPERTS, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**_EXPERTS, num_experts=4),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **_SIZES, num_experts_per_tok=2, n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=16,
        n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    ),
}  # fmt: skip
_ALL = (*ARCHITECTURES, *_MIXTURES)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the disk when is another matter (test_journal.py)."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small model in bfloat16, in several files; tests must not write into it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            model = build(_MIXTURES[name]()) if name in _MIXTURES else make_model(name)
            made[name] = tmp_path_factory.mktemp(name)
            model.to(torch.bfloat16).save_pretrained(made[name], max_shard_size="40KB")
        return made[name]

    return folder


@pytest.fixture
def llama(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A small Llama that a test may change."""
    return Path(shutil.copytree(folder_of("llama"), tmp_path / "llama"))


def _open(folder: Path) -> StreamedModel:
    return StreamedModel(resolve_model(str(folder)))


def _whole(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.requires_grad_(False)


def _blocks(model: nn.Module) -> list[str]:
    name, modules = _block_list(model)
    return [f"{name}.{index}" for index in range(len(modules))]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _files(folder: Path) -> dict[str, Tensor]:
    """All tensors in the files of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _assert_same(module: nn.Module, other: nn.Module) -> None:
    _assert_equal(_tensors(module), _tensors(other))


def _assert_equal(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def _all_on_meta(model: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in _tensors(model).values())


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Replace the files of a checkpoint by one with the tensors that ``change`` has changed."""
    tensors = _files(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- Reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _ALL)
def test_every_part_is_what_from_pretrained_makes_and_can_be_freed(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    whole, streamed = _whole(folder_of(name)), _open(folder_of(name))
    blocks = _blocks(whole)
    assert _all_on_meta(streamed.model)
    for block in blocks:
        with streamed.loaded(block) as module:
            assert module is streamed.model.get_submodule(block)
            _assert_same(module, whole.get_submodule(block))
            assert not any(tensor.requires_grad for tensor in module.parameters())
            outside = [key for key, value in _tensors(streamed.model).items() if not value.is_meta]
            assert all(key.startswith(block + ".") for key in outside)
        assert _all_on_meta(streamed.model)
    with streamed.loaded(streamed.base, without=blocks):
        for key, value in _tensors(streamed.model).items():
            in_base = key.startswith(streamed.base + ".") and not key.startswith(
                tuple(block + "." for block in blocks)
            )
            assert value.is_meta != in_base, key
    with streamed.loaded() as module:
        _assert_same(module, whole)
    assert _all_on_meta(streamed.model)
    assert streamed.surplus == []


def test_weights_that_a_model_draws_when_it_is_built_are_read_all_the_same(tmp_path: Path) -> None:
    build(transformers.DiffLlamaConfig(**_GROUPED)).to(torch.bfloat16).save_pretrained(tmp_path)
    streamed = _open(tmp_path)
    assert _all_on_meta(streamed.model)
    with streamed.loaded() as module:
        _assert_same(module, _whole(tmp_path))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_hidden_states_pass_through_the_parts_as_through_the_whole(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    whole, streamed = _whole(folder_of(name)), _open(folder_of(name))
    names = _blocks(whole)
    windows = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    expected = record(whole, [whole.get_submodule(block) for block in names], windows, 2)
    modules = [streamed.model.get_submodule(block) for block in names]
    with streamed.loaded(streamed.base, without=names[1:]):
        stream = record(streamed.model, modules, windows, 2)
    assert torch.equal(stream.states, expected.states)
    for each in (stream, expected):
        each.compute_dtype = torch.bfloat16
    for index, block in enumerate(names):
        expected.advance(whole.get_submodule(block), index)
        with streamed.loaded(block) as module:
            stream.advance(module, index)
        assert torch.equal(stream.states, expected.states)
    assert expected.states.isfinite().all()


def test_freed_parts_leave_memory(folder_of: Callable[[str], Path]) -> None:
    streamed = _open(folder_of("llama"))
    with streamed.loaded("model.layers.1.mlp") as module:
        held = [weakref.ref(parameter) for parameter in module.parameters()]
        assert len(held) == 3
    del module
    assert [reference() for reference in held] == [None] * 3


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_to_open_a_model_reads_no_tensor(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SafeTensor, "_read_into", lambda *_: pytest.fail("a tensor was read"))
    streamed = _open(folder_of(name))
    streamed.nbytes()
    streamed.copies(tmp_path, ["model.layers.0.self_attn.q_proj.weight"])


def test_a_part_is_read_once_while_it_is_loaded(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = _open(folder_of("llama"))
    reads = []
    read = SafeTensor.read
    monkeypatch.setattr(SafeTensor, "read", lambda self: reads.append(self.name) or read(self))
    up = streamed.load("model.layers.0.mlp.up_proj").weight
    assert reads == ["model.layers.0.mlp.up_proj.weight"]
    assert streamed.load("model.layers.0.mlp").up_proj.weight is up
    assert sorted(reads) == [f"model.layers.0.mlp.{part}_proj.weight" for part in ("down", "gate", "up")]
    streamed.free("model.layers.0", without=["model.layers.0.mlp.up_proj"])
    assert streamed.model.get_submodule("model.layers.0.mlp.up_proj").weight is up
    streamed.close()
    assert _all_on_meta(streamed.model)


def test_a_part_can_be_read_ahead_on_another_thread(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, streamed = _whole(folder_of("mixtral")), _open(folder_of("mixtral"))
    threads = set()
    read = SafeTensor.read
    monkeypatch.setattr(SafeTensor, "read", lambda self: threads.add(threading.get_ident()) or read(self))
    streamed.prefetch("model.layers.1")
    streamed.prefetch("model.layers.1")
    with streamed.loaded("model.layers.1") as module:
        _assert_same(module, whole.get_submodule("model.layers.1"))
    assert threads
    assert threading.get_ident() not in threads
    with streamed.loaded("model.layers.1") as module:
        _assert_same(module, whole.get_submodule("model.layers.1"))
    assert threading.get_ident() in threads
    streamed.close()


def test_what_is_read_ahead_may_be_in_part_loaded_meanwhile(folder_of: Callable[[str], Path]) -> None:
    whole, streamed = _whole(folder_of("qwen3")), _open(folder_of("qwen3"))
    streamed.load("model.embed_tokens")
    streamed.prefetch("lm_head")
    streamed.prefetch("model.layers.0")
    streamed.free("model.embed_tokens")
    streamed.load("model.layers.0.mlp")
    _assert_same(streamed.load("lm_head"), whole.lm_head)
    _assert_same(streamed.load("model.layers.0"), whole.get_submodule("model.layers.0"))
    streamed.close()


def test_the_memory_of_a_part_is_known_beforehand(folder_of: Callable[[str], Path]) -> None:
    for name in ("qwen3", "mixtral"):
        whole, streamed = _whole(folder_of(name)), _open(folder_of(name))
        block = whole.get_submodule("model.layers.0")
        assert streamed.nbytes("model.layers.0") == sum(tensor.nbytes for tensor in block.parameters())
        assert streamed.nbytes() == sum(tensor.nbytes for tensor in whole.parameters())
        assert streamed.nbytes("model", ["model.layers", "model.norm"]) == whole.model.embed_tokens.weight.nbytes


# --- Weights that are tied --------------------------------------------------------------------------------


def test_tied_weights_are_one_while_any_of_them_is_loaded(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = _open(folder_of("qwen3"))
    head, embedding = streamed.load("lm_head"), streamed.model.get_submodule("model.embed_tokens")
    assert embedding.weight.is_meta
    with monkeypatch.context() as patch:
        patch.setattr(SafeTensor, "read", lambda _: pytest.fail("what is loaded was read again"))
        streamed.load("model.embed_tokens")
    assert head.weight is embedding.weight
    streamed.free("lm_head")
    assert head.weight.is_meta
    assert not embedding.weight.is_meta
    streamed.load("lm_head")
    assert head.weight is embedding.weight
    streamed.close()
    assert head.weight is embedding.weight


@pytest.mark.parametrize("equal", [True, False])
def test_weights_that_are_tied_but_stored_twice_are_tied_only_where_they_are_equal(
    folder_of: Callable[[str], Path], tmp_path: Path, equal: bool
) -> None:
    folder = Path(shutil.copytree(folder_of("qwen3"), tmp_path / "model"))

    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() * (1 if equal else 2)

    _edit(folder, add_head)
    whole, streamed = _whole(folder), _open(folder)
    with streamed.loaded() as module:
        _assert_same(module, whole)
        assert (module.lm_head.weight is module.model.embed_tokens.weight) == equal
    assert streamed.nbytes() == sum(tensor.nbytes for tensor in whole.parameters())


def test_only_the_tied_name_may_be_in_the_file(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("qwen3"), tmp_path / "model"))
    _edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    with _open(folder).loaded() as module:
        _assert_same(module, _whole(folder))


def test_a_checkpoint_without_the_prefix_of_its_base_model(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("qwen3"), tmp_path / "model"))

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    _edit(folder, strip)
    streamed = _open(folder)
    with streamed.loaded() as module:
        _assert_same(module, _whole(folder))
        copies = ShardCopies(streamed.shards, tmp_path / "copy")
        copies.make()
        with torch.no_grad():
            module.model.layers[0].mlp.up_proj.weight.zero_()
        streamed.store(["model.layers.0.mlp.up_proj.weight"], copies)
    assert not copies.stored("layers.0.mlp.up_proj.weight").read().any()


# --- Writing ----------------------------------------------------------------------------------------------


def _changed(folder: Path, original: Path) -> Iterator[str]:
    """The tensors that are not the same in two folders; all else in their files must be."""
    for file in sorted(original.glob("*.safetensors")):
        old, new = file.read_bytes(), (folder / file.name).read_bytes()
        start = 8 + int.from_bytes(old[:8], "little")
        assert new[:start] == old[:start]
        assert len(new) == len(old)
        olds, news = load_file(file), load_file(folder / file.name)
        yield from (name for name in olds if not torch.equal(olds[name], news[name]))
    index = original / "model.safetensors.index.json"
    if index.exists():
        assert (folder / index.name).read_bytes() == index.read_bytes()


@pytest.mark.parametrize("name", _ALL)
def test_written_weights_are_in_the_place_of_the_old_ones_and_load(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, whole, streamed = folder_of(name), _whole(folder_of(name)), _open(folder_of(name))
    written = tmp_path / "written"
    parameters = [
        key
        for block in _blocks(whole)
        for key, value in whole.named_parameters()
        if key.startswith(block + ".") and value.ndim > 1 and "gate.weight" not in key and "router" not in key
    ]
    copies = streamed.copies(written, parameters)
    copies.make()
    for block in _blocks(whole):
        names = [key for key in parameters if key.startswith(block + ".")]
        with streamed.loaded(block), torch.no_grad():
            for key in names:
                weight = streamed.model.get_parameter(key)
                weight[weight.abs() < weight.abs().median()] = 0
            streamed.store(names, copies)
        with torch.no_grad():
            for key in names:
                weight = whole.get_parameter(key)
                weight[weight.abs() < weight.abs().median()] = 0
    whole.save_pretrained(tmp_path / "expected")
    original = _files(folder)
    # transformers itself would write these tensors, but into other files, and what it holds in float32 as such.
    expected = {key: tensor.to(original[key].dtype) for key, tensor in _files(tmp_path / "expected").items()}
    _assert_equal(_files(written), expected)
    changed = {key for key, tensor in expected.items() if not torch.equal(tensor, original[key])}
    assert set(_changed(written, folder)) == changed
    assert len(changed) >= len(parameters)
    for file in folder.glob("*config.json"):
        shutil.copy(file, written)
    _assert_same(_whole(written), whole)
    with streamed.loaded(copies=copies) as module:
        _assert_same(module, whole)


def test_a_weight_that_the_loop_holds_in_another_dtype_is_written_in_the_files(llama: Path, tmp_path: Path) -> None:
    streamed = _open(llama)
    copies = ShardCopies(streamed.shards, tmp_path / "copy")
    copies.make()
    name = "model.layers.0.mlp.up_proj.weight"
    with streamed.loaded("model.layers.0"):
        weight = streamed.model.get_parameter(name)
        weight.data = weight.data.float() * 2
        streamed.store([name], copies)
    assert torch.equal(copies.stored(name).read(), streamed.shards.tensors[name].read() * 2)


def test_what_one_tensor_is_split_into_is_written_together(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [f"self_attn.{letter}_proj.weight" for letter in "qkv"]
    rules = [WeightConverter("self_attn.qkv.weight", parts, [Split(0)])]
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda _: rules)
    whole = _whole(llama)

    def fuse(tensors: dict[str, Tensor]) -> None:
        for block in _blocks(whole):
            tensors[f"{block}.self_attn.qkv.weight"] = torch.cat([tensors.pop(f"{block}.{part}") for part in parts])

    _edit(llama, fuse)
    streamed = _open(llama)
    with streamed.loaded() as module:
        _assert_same(module, whole)
    copies = ShardCopies(streamed.shards, tmp_path / "copy")
    copies.make()
    key = f"model.layers.1.{parts[1]}"
    with streamed.loaded("model.layers.1"), torch.no_grad():
        streamed.model.get_parameter(key).zero_()
        streamed.store([key], copies)
    assert set(_changed(tmp_path / "copy", llama)) == {"model.layers.1.self_attn.qkv.weight"}
    with torch.no_grad():
        whole.get_parameter(key).zero_()
    with streamed.loaded(copies=copies) as module:
        _assert_same(module, whole)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_written_weight_keeps_the_dtype_of_its_file_unless_it_would_lose_by_that(
    llama: Path, tmp_path: Path, stored: torch.dtype
) -> None:
    names = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(2)]
    _edit(llama, lambda tensors: tensors.update({name: tensors[name].to(stored) for name in names}))
    streamed = _open(llama)
    with streamed.loaded() as module:
        _assert_same(module, _whole(llama))
        copies = streamed.copies(tmp_path / "copy", names[:1])
        copies.make()
        with torch.no_grad():
            streamed.model.get_parameter(names[0]).copy_(torch.full((64, 32), 1e-30))
        streamed.store(names[:1], copies)
    before, after = _files(llama), _files(tmp_path / "copy")
    assert after[names[0]].dtype == (torch.float32 if stored == torch.float32 else torch.bfloat16)
    assert after[names[0]].all()  # 1e-30 is zero in float16
    assert torch.equal(after.pop(names[0]), torch.full((64, 32), 1e-30).bfloat16())
    before.pop(names[0])
    _assert_equal(after, before)


@pytest.mark.parametrize("wanted", [torch.float32, torch.float16])
def test_in_another_dtype_what_the_model_knows_is_cast_and_all_else_stays(
    folder_of: Callable[[str], Path], tmp_path: Path, wanted: torch.dtype
) -> None:
    folder = Path(shutil.copytree(folder_of("deepseek_v3"), tmp_path / "model"))
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    first = load_file(folder / shards[0])
    extra = {"mtp.fc.weight": torch.randn(4, 4).bfloat16(), "visual.position": torch.arange(3)}
    save_file({**first, **extra}, folder / shards[0], metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, shards[0])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    streamed = StreamedModel(resolve_model(str(folder)), wanted)
    assert streamed.casts
    copies = streamed.copies(tmp_path / "copy")
    copies.make()
    before, after = _files(folder), _files(tmp_path / "copy")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        kept = torch.float32 if "e_score_correction_bias" in name else wanted
        _assert_equal({name: after[name]}, {name: tensor if name in extra else tensor.to(kept)})
    written = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == index["weight_map"]
    assert written["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert {**written["metadata"], "total_size": 0} == {**index["metadata"], "total_size": 0}
    for file in folder.glob("*config.json"):
        shutil.copy(file, tmp_path / "copy")
    with streamed.loaded(copies=copies) as module:
        _assert_same(module, AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=wanted))


# --- What cannot be had in parts --------------------------------------------------------------------------


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a GGUF file, which cannot be read in parts"):
        _open(write_gguf(tmp_path / "small.gguf", make_model("llama")))


def test_a_checkpoint_that_lacks_a_weight_or_has_one_of_another_shape_is_refused(llama: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _edit(llama, lambda tensors: tensors.update({name: tensors[name][:5].clone()}))
    with pytest.raises(ModelError, match=rf"{name} is \(5, 32\) in the checkpoint, but \(64, 32\) in its model"):
        _open(llama)
    _edit(llama, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=rf"lacks 1 weights of its model, {name} for instance"):
        _open(llama)


def test_a_missing_expert_is_noticed(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("mixtral"), tmp_path / "model"))
    _edit(folder, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"))
    with pytest.raises(
        ModelError, match=r"experts.down_proj is \(11, 32, 64\) in the checkpoint, but \(12, 32, 64\)"
    ):
        _open(folder)


def test_tensors_that_the_model_has_no_place_for_stay_in_the_files(llama: Path, tmp_path: Path) -> None:
    _edit(llama, lambda tensors: tensors.update({"extra.weight": torch.ones(3)}))
    streamed = _open(llama)
    assert streamed.surplus == ["extra.weight"]
    with streamed.loaded() as module:
        _assert_same(module, _whole(llama))
    copies = ShardCopies(streamed.shards, tmp_path / "copy")
    copies.make()
    assert "extra.weight" in load_file(tmp_path / "copy" / "model.safetensors")


def test_the_dtype_is_that_of_the_files_where_the_settings_do_not_say_it(llama: Path) -> None:
    settings = json.loads((llama / "config.json").read_text())
    del settings["dtype"]
    (llama / "config.json").write_text(json.dumps(settings))
    with _open(llama).loaded() as module:
        assert module.dtype == torch.bfloat16
        _assert_same(module, _whole(llama))
    _edit(llama, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].float()}))
    with pytest.raises(ModelError, match=r"does not say its dtype in config\.json, and its files have 2 of them"):
        _open(llama)


def test_another_dtype_than_that_of_the_files(llama: Path, tmp_path: Path) -> None:
    with StreamedModel(resolve_model(str(llama)), torch.float32).loaded() as module:
        assert module.dtype == torch.float32
        _assert_same(module, AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32))
    settings = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**settings, "dtype": "float32"}))
    streamed = _open(llama)
    with streamed.loaded() as module:
        assert module.dtype == torch.float32
        _assert_same(module, _whole(llama))
    copies = streamed.copies(tmp_path, ["model.layers.0.mlp.up_proj.weight"])
    assert copies.stored("model.layers.0.mlp.up_proj.weight").dtype == torch.float32
    assert copies.stored("model.layers.1.mlp.up_proj.weight").dtype == torch.bfloat16


def test_weights_that_stay_in_float32_stay_in_float32(folder_of: Callable[[str], Path]) -> None:
    with _open(folder_of("deepseek_v3")).loaded() as module:
        dtypes = {value.dtype for name, value in _tensors(module).items() if "e_score_correction_bias" in name}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("how", ["random", "left alone"])
def test_a_buffer_that_cannot_be_made_is_refused(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    streamed = _open(folder_of("llama"))

    def make(module: nn.Module) -> None:
        if how == "random":
            module.inv_freq.copy_(torch.rand(module.inv_freq.shape))

    monkeypatch.setattr(streamed.model.model, "_init_weights", make)
    with pytest.raises(ModelError, match=r"model\.rotary_emb\.(original_)?inv_freq is in no file"):
        streamed.load("model.rotary_emb")
    streamed.load("model.layers.0")


def test_another_transformers_that_does_it_in_another_way_is_one_sentence(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(transformers.core_model_loading.WeightTransform, "was_used")
    version = re.escape(transformers.__version__)
    with pytest.raises(ModelError, match=f"llama.* cannot be read in parts with transformers {version}: .*was_used"):
        _open(folder_of("llama"))


class _OneWay(Transpose):
    @property
    def reverse_op(self) -> Chunk:
        return Chunk(0)  # in one piece: nothing happens


def test_a_conversion_without_a_way_back_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rules = [WeightConverter("0.mlp.up_proj", "0.mlp.up_proj", [Transpose()])]
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda _: rules)
    _edit(llama, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    assert _open(llama).load("model.layers.0.mlp").up_proj.weight.shape == (64, 32)
    rules[0] = WeightConverter("0.mlp.up_proj", "0.mlp.up_proj", [_OneWay()])
    with pytest.raises(ModelError, match=f"{name} cannot be written by itself: transformers has no way back"):
        _open(llama)
    both = ["0.self_attn.q_proj", "0.self_attn.o_proj"]
    rules[:] = [
        WeightConverter("0.mlp.up_proj", "0.mlp.up_proj", [Transpose()]),
        WeightConverter(both, both[0], [Chunk(0)]),
    ]
    with pytest.raises(ModelError, match=r"q_proj\.weight cannot be loaded by itself"):
        _open(llama)


def test_experts_without_the_prefix_of_their_model_have_no_way_back(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folder_of("mixtral"), tmp_path / "model"))

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    _edit(folder, strip)
    _whole(folder)
    with pytest.raises(ModelError, match="experts.* cannot be written by itself"):
        _open(folder)


def test_two_tensors_for_one_parameter_are_refused(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [WeightRenaming("gate_proj", "up_proj")]
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda _: rules)
    with pytest.raises(ModelError, match=r"gate_proj\.weight and .*up_proj\.weight are both for .*up_proj\.weight"):
        _open(folder_of("llama"))


# --- Settings ---------------------------------------------------------------------------------------------


def test_all_but_the_weights_is_copied_without_what_a_pruned_model_must_not_say(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source, target = Path(shutil.copytree(model_folder("llama"), tmp_path / "source")), tmp_path / "target"
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "sparsity_config": {"a": 1}, "name": "é"}))
    (source / "additional_chat_templates").mkdir()
    others = {"additional_chat_templates/rag.jinja": "{{ x }}", "preprocessor_config.json": "{}", "merges.txt": "a b"}
    left = {
        "README.md": "",
        "code.py": "",
        "model.safetensors.index.json": "{}",
        "pytorch_model.bin.index.json": "{}",
    }
    for name, text in {**others, **left}.items():
        (source / name).write_text(text)
    for _ in range(2):
        copy_settings(source, target)
    copied = {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}
    original = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    assert original - copied == {*left, "model.safetensors"}
    assert copied <= original
    for name in copied - {"config.json", "tokenizer_config.json"}:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((target / "config.json").read_text()) == {**settings, "name": "é"}
    shutil.copy(source / "model.safetensors", target)
    _assert_same(_whole(target), make_model("llama"))
    tokenizer, expected = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (target, source))
    assert tokenizer("The theatre").input_ids == expected("The theatre").input_ids
    assert tokenizer.chat_template == expected.chat_template
