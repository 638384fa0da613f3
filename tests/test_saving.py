"""Whatever the way of loading, tensors and settings that are not pruned come out as they went in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cli_for_tests import Rarefy
from models_for_tests import build, make_model, save_composite, save_folder
from rarefy.models import streaming
from rarefy.models.checkpoint import load_model
from rarefy.models.copies import ShardCopies
from rarefy.models.losses import lost_tensors
from rarefy.models.saving import save_model
from rarefy.models.shards import Shards
from rarefy.models.source import resolve_model
from rarefy.models.streaming import StreamedModel
from rarefy.runs.run import run

_PRUNED = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that also sees, with a layer for speculation; tests must not write into it."""
    return save_composite(tmp_path_factory.mktemp("composite"))


def _files(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _settings(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


def _pickle(folder: Path, tensors: dict[str, Tensor], num_files: int = 1, zipped: bool = True) -> None:
    """Put the weights of a folder into pickled files."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if num_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return
    weight_map = {}
    for number in range(num_files):
        name = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        part = dict([*tensors.items()][number::num_files])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1, "made_by": "hand"}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _say_no_dtype(folder: Path, *keys: str) -> None:
    settings = _settings(folder)
    for section in (settings, *(settings[key] for key in keys)):
        section.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(settings))


_WAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "in parts": (lambda folder: None, "auto"),
    "no dtype for the language model": (lambda folder: _say_no_dtype(folder, "text_config"), "auto"),
    "another dtype": (lambda folder: None, "float32"),
    "pickled": (lambda folder: _pickle(folder, _files(folder)), "auto"),
    "pickled, in another dtype": (lambda folder: _pickle(folder, _files(folder), 3), "float16"),
}


@pytest.mark.parametrize("way", _WAYS)
def test_a_run_keeps_what_it_does_not_prune(way: str, composite: Path, rarefy_: Rarefy) -> None:
    folder = Path(shutil.copytree(composite, "model"))
    before = _files(folder)
    arrange, dtype = _WAYS[way]
    arrange(folder)
    settings = _settings(folder)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 50)
    arguments = ["--calibration", "text.txt", "--num-samples", 4, "--sequence-length", 16, "--no-texts"]
    arguments += ["--method", "wanda", "--dtype", dtype, "--include", "*.layers.1.mlp.up_proj"]
    result = rarefy_("prune", folder, "-o", "out", *arguments)
    assert result.status == 0, result.err
    assert "34 tensors that its model has no place for" not in result.err  # this one has fewer
    assert "tensors that its model has no place for" in result.err
    after = _files(Path("out/model"))
    assert after.keys() == before.keys()
    wanted = before[_PRUNED].dtype if dtype == "auto" else getattr(torch, dtype)
    for name, tensor in before.items():
        known = "visual" not in name and not name.startswith("mtp")
        expected = tensor.to(wanted) if known else tensor
        assert after[name].dtype == expected.dtype, name
        if name != _PRUNED:
            assert torch.equal(after[name], expected), name
    assert int((after[_PRUNED] == 0).sum()) == after[_PRUNED].numel() // 2
    if dtype != "auto":
        settings["dtype"] = settings["text_config"]["dtype"] = dtype
    assert _settings(Path("out/model")) == settings
    facts = json.loads(Path("out/run.json").read_text())
    assert sum(facts["tensors"].values()) == len(before)
    assert facts["tensors"]["model.language_model.layers.*.mlp.up_proj.weight"] == 2
    assert rarefy_("inspect", "out").out.endswith("every promise is kept\n")
    kept = load_file("out/model/" + next(name.name for name in Path("out/model").glob("*.safetensors")))
    gone = next(name for name in kept if name.startswith("model.visual"))
    del kept[gone]
    save_file(kept, next(Path("out/model").glob("*.safetensors")), metadata={"format": "pt"})
    index = Path("out/model/model.safetensors.index.json")
    if index.exists():
        content = json.loads(index.read_text())
        del content["weight_map"][gone]
        index.write_text(json.dumps(content))
    again = rarefy_("inspect", "out")
    assert again.status == 1
    assert "the files hold 0 tensors of this name, promised were 1" in again.err
    assert "every promise is kept" not in again.out


@pytest.mark.parametrize(("way", "dtype"), [("pickled", "auto"), ("safetensors", "float32")])
def test_a_run_that_is_broken_off_goes_on_with_a_copy_that_is_written_anew(
    way: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_folder(make_model("llama").bfloat16(), tmp_path / "model")
    if way == "pickled":
        _pickle(folder, _files(folder), 3)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 50)
    recipe = {"model": str(folder), "calibration": str(tmp_path / "text.txt"), "num_samples": 4, "dtype": dtype}
    recipe |= {"sequence_length": 16, "method": "sparsegpt"}
    run(recipe, tmp_path / "whole", texts=False)
    write, written = ShardCopies.write, []

    def torn(copies: ShardCopies, name: str, tensor: Tensor) -> None:
        written.append(name)
        if len(written) == 10:  # in the second block
            write(copies, name, torch.zeros_like(tensor))
            raise KeyboardInterrupt
        write(copies, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardCopies, "write", torn)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "out", texts=False)
    run(recipe, tmp_path / "out", texts=False)
    whole, broken_off = (_files(tmp_path / name / "model") for name in ("whole", "out"))
    assert all(torch.equal(tensor, broken_off[name]) for name, tensor in whole.items())
    assert whole.keys() == broken_off.keys() == _names_in(folder)


def _names_in(folder: Path) -> set[str]:
    return {*Shards.open(folder).tensors}


def test_files_of_weights_that_are_no_part_of_the_model_are_named(rarefy_: Rarefy) -> None:
    folder = save_folder(make_model("llama"), Path("model"))
    save_file({"a": torch.zeros(1)}, folder / "consolidated.safetensors")
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 50)
    arguments = ["--calibration", "text.txt", "--num-samples", 4, "--sequence-length", 16, "--no-texts"]
    result = rarefy_("prune", folder, "-o", "out", *arguments, "--method", "wanda")
    assert result.status == 0, result.err
    assert "files of weights that are no part of its model, consolidated.safetensors for instance" in result.err
    assert not Path("out/model/consolidated.safetensors").exists()


def test_what_a_file_says_beside_its_tensors_is_kept(tmp_path: Path) -> None:
    folder = save_folder(make_model("llama").bfloat16(), tmp_path / "model")
    save_file(_files(folder), folder / "model.safetensors", metadata={"format": "pt", "made by": "hand"})
    for dtype in (torch.bfloat16, torch.float32):
        copies = StreamedModel(resolve_model(str(folder)), dtype).copies(tmp_path / str(dtype))
        copies.make()
        with safe_open(tmp_path / str(dtype) / "model.safetensors", framework="pt") as opened:
            assert opened.metadata() == {"format": "pt", "made by": "hand"}


@pytest.mark.parametrize(("num_files", "zipped"), [(1, True), (1, False), (3, True)])
def test_pickled_weights_are_had_in_parts_and_become_safetensors(
    tmp_path: Path, num_files: int, zipped: bool
) -> None:
    folder = save_folder(make_model("llama"), tmp_path / "model")
    tensors = _files(folder)
    tensors["odd"] = torch.arange(12).view(3, 4).T
    _pickle(folder, tensors, num_files, zipped)
    streamed = StreamedModel(resolve_model(str(folder)))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name, parameter in streamed.load().named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name))
    copies = streamed.copies(tmp_path / "copy")
    copies.make()
    after = _files(tmp_path / "copy")
    assert after.keys() == tensors.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    names = sorted(file.name for file in (tmp_path / "copy").iterdir())
    if num_files == 1:
        assert names == ["model.safetensors"]
    else:
        parts = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
        assert names == [*parts, "model.safetensors.index.json"]
        index = json.loads((tmp_path / "copy" / names[-1]).read_text())
        assert index["metadata"]["made_by"] == "hand"
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert list(Shards.open(tmp_path / "copy").tensors) != []
    (tmp_path / "copy" / names[0]).write_bytes(b"damaged")
    with pytest.raises(Exception, match="has not the layout of a copy of"):
        copies.check()


def test_a_pickle_that_holds_more_than_tensors_is_not_read(tmp_path: Path) -> None:
    folder = save_folder(make_model("llama"), tmp_path / "model")
    _pickle(folder, {"a": Path("a")})
    with pytest.raises(streaming.ModelError, match="is damaged, or holds more than tensors .*: it is not read"):
        StreamedModel(resolve_model(str(folder)))


def test_a_changed_model_in_memory_is_saved_into_copies_of_its_files(tmp_path: Path, composite: Path) -> None:
    source = resolve_model(str(composite))
    model, tokenizer = load_model(source, "cpu")
    weight = model.model.layers[1].mlp.up_proj.weight
    weight[:, ::2] = 0
    save_model(model, tokenizer, tmp_path / "out", source)
    before, after = _files(composite), _files(tmp_path / "out")
    assert torch.equal(after[_PRUNED], weight)
    after[_PRUNED] = before[_PRUNED]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert _settings(tmp_path / "out") == _settings(composite)
    (tmp_path / "out" / "model.safetensors").unlink()
    save_model(model.float(), tokenizer, tmp_path / "wide", source)
    assert torch.equal(_files(tmp_path / "wide")[_PRUNED], weight)
    assert _settings(tmp_path / "wide")["text_config"]["dtype"] == "float32"


@pytest.mark.parametrize("shards", ["1GB", "40KB"])
def test_where_transformers_must_write_the_model_the_rest_is_put_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composite: Path, shards: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise streaming.ModelError.sentence("It cannot be turned back.")

    monkeypatch.setattr(streaming, "plan_conversion", refuse)
    source = resolve_model(str(composite))
    model, tokenizer = load_model(source, "cpu")
    plain = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda folder: plain(folder, max_shard_size=shards))
    weight = model.model.layers[1].mlp.up_proj.weight
    weight[:, ::2] = 0
    save_model(model, tokenizer, tmp_path / "out", source)
    before, after = _files(composite), _files(tmp_path / "out")
    assert after.keys() == before.keys()
    assert torch.equal(after[_PRUNED], weight)
    after[_PRUNED] = before[_PRUNED]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert _settings(tmp_path / "out") == _settings(composite)
    files = Shards.open(tmp_path / "out").files
    assert [file.name for file in files] == [
        f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))
    ]
    assert lost_tensors(source, Shards.open(tmp_path / "out")) == []
    again = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(again.model.language_model.layers[1].mlp.up_proj.weight, weight)


def test_names_that_the_model_has_a_place_for_may_change(tmp_path: Path) -> None:
    model = build(transformers.MixtralConfig(**make_model("mixtral").config.to_diff_dict()))
    folder = save_folder(model.bfloat16(), tmp_path / "model")
    tensors = {name.removeprefix("model."): tensor for name, tensor in _files(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = resolve_model(str(folder))
    save_model(*load_model(source, "cpu"), tmp_path / "out", source)  # experts have no way back without the prefix
    written = Shards.open(tmp_path / "out")
    assert written.tensors.keys() != tensors.keys()
    assert lost_tensors(source, written) == []
    kept = _files(tmp_path / "out")
    name = next(name for name in kept if "layers.1" in name and "experts.3" in name)
    norm = "model.layers.0.input_layernorm.weight"
    save_file({key: value for key, value in kept.items() if key not in (name, norm)}, written.files[0])
    lost = lost_tensors(source, Shards.open(tmp_path / "out"))
    assert lost == [norm.removeprefix("model.")]  # of experts, others make the same parameter: inspect counts these
