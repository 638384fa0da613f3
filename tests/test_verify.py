"""The verifier believes the bytes on disk: it finds every promise that was broken behind its back."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models_for_tests import make_model, save_folder
from rarefy.errors import InputError, ModelError
from rarefy.layer.pattern import NM, Pattern, PerRow, Unstructured
from rarefy.methods import build
from rarefy.pruning.loop import prune
from rarefy.runs.folder import RunFolder
from rarefy.runs.verify import inspect_folder

WINDOWS = torch.arange(4 * 16).view(4, 16)


def run(folder: Path, pattern: Pattern, architecture: str = "llama", **options: object) -> RunFolder:
    """A run folder as ``rarefy prune`` leaves it, of a small random model."""
    model = make_model(architecture)
    report = prune(model, WINDOWS, pattern=pattern, method=build("magnitude"), **options)
    out = RunFolder(folder)
    with out.writing():
        out.write_layers(report.layers)
        out.write_model(lambda path: save_folder(model, path))
        out.write_run({"method": "magnitude", "pattern": str(pattern)})
    return out


def change(out: RunFolder, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Rewrite one tensor of the model's file behind the back of the run; None takes it out."""
    file = out.model / "model.safetensors"
    tensors = load_file(file)
    edited = edit(tensors.pop(f"{name}.weight").clone())
    if edited is not None:
        tensors[f"{name}.weight"] = edited.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def with_one_more_weight(weight: torch.Tensor) -> torch.Tensor:
    first_zero = (weight == 0).nonzero()[0]
    weight[tuple(first_zero)] = 1.0
    return weight


def with_two_swapped(weight: torch.Tensor) -> torch.Tensor:
    """As many zeros as before, but two in the first row's first group have moved elsewhere."""
    group = weight[0, :4]
    donor = weight[1, :4]
    weight[0, :4] = torch.where(group == 0, 1.0, group)
    weight[1, :4] = torch.where(donor != 0, 0.0, donor)
    return weight


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.0), PerRow(0.7), NM(2, 4), NM(1, 8)], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_was_written_keeps_its_promise(tmp_path: Path, architecture: str, pattern: Pattern) -> None:
    out = run(tmp_path / "out", pattern, architecture)
    for name in (out.path, out.model):
        inspection = inspect_folder(name)
        assert inspection.problems == []
        assert inspection.promised
        records = out.read_layers()
        assert [layer.name for layer in inspection.layers] == [record.name for record in records]
        assert [layer.zeros for layer in inspection.layers] == [record.pruned for record in records]
        assert [layer.shape for layer in inspection.layers] == [record.shape for record in records]
        assert inspection.sparsity == sum(r.pruned for r in records) / sum(r.size for r in records)


@pytest.mark.parametrize(
    ("pattern", "edit", "problem"),
    [
        (Unstructured(0.5), with_one_more_weight, r"it holds [\d,]+ zeros, promised were [\d,]+"),
        (PerRow(0.5), with_one_more_weight, r"1 of its \d+ rows hold more than \d+ non-zero weights"),
        (PerRow(0.5), with_two_swapped, r"1 of its \d+ rows hold more than \d+ non-zero weights"),
        (NM(2, 4), with_one_more_weight, r"1 of its \d+ groups hold more than 2 of 4 non-zero weights"),
        (NM(2, 4), with_two_swapped, r"1 of its \d+ groups hold more than 2 of 4 non-zero weights"),
        (NM(2, 4), lambda weight: weight * torch.nan, "it holds NaN or infinity"),
        (NM(2, 4), lambda weight: weight[:, :8], r"its shape in the file is \[\d+, 8\]"),
        (NM(2, 4), lambda weight: None, "it is missing from the model's files"),
    ],
)
def test_a_broken_promise_is_found_and_named(
    tmp_path: Path, pattern: Pattern, edit: Callable[[torch.Tensor], torch.Tensor | None], problem: str
) -> None:
    out = run(tmp_path / "out", pattern)
    change(out, LAYER, edit)
    inspection = inspect_folder(out.path)
    assert not inspection.ok
    assert any(re.fullmatch(f"{LAYER}: {problem}", line) for line in inspection.problems)
    assert all(line.startswith(LAYER) for line in inspection.problems)


def test_groups_run_along_the_inputs_also_where_the_file_keeps_them_the_other_way(tmp_path: Path) -> None:
    out = run(tmp_path / "out", NM(2, 4), "gpt2")
    name = "transformer.h.0.attn.c_proj"  # square, so that its shape tells nothing
    assert inspect_folder(out.path).ok
    change(out, name, lambda weight: weight.T)
    assert any(name in problem for problem in inspect_folder(out.path).problems)


def test_a_kept_weight_may_be_zero_by_chance(tmp_path: Path) -> None:
    out = run(tmp_path / "out", NM(2, 4))
    change(out, LAYER, torch.zeros_like)
    assert inspect_folder(out.path).ok


def test_only_pruned_layers_are_held_to_a_promise(tmp_path: Path) -> None:
    out = run(tmp_path / "out", NM(2, 4), include=["*.mlp.*"])
    inspection = inspect_folder(out.path, pattern=NM(2, 4))
    assert inspection.ok
    assert len(inspection.layers) == 6


def test_any_other_model_is_listed_without_a_promise(tmp_path: Path) -> None:
    folder = save_folder(make_model("llama"), tmp_path / "dense")
    inspection = inspect_folder(folder)
    assert inspection.ok
    assert not inspection.promised
    assert len(inspection.layers) == 14
    assert inspection.zeros == 0
    assert not any("embed" in layer.name or "lm_head" in layer.name for layer in inspection.layers)


def test_a_pattern_can_be_asked_for(tmp_path: Path) -> None:
    out = run(tmp_path / "out", NM(1, 4))
    assert inspect_folder(out.path, pattern=NM(2, 4)).ok
    assert inspect_folder(out.path, pattern=NM(2, 8)).ok
    dense = save_folder(make_model("llama"), tmp_path / "dense")
    assert len(inspect_folder(dense, pattern=NM(2, 4)).problems) == 14
    assert "its 32 inputs cannot be cut into groups of 5" in inspect_folder(dense, pattern=NM(2, 5)).problems[0]


def test_the_prefix_that_a_base_models_file_leaves_out_is_found(tmp_path: Path) -> None:
    folder = save_folder(make_model("gpt2"), tmp_path / "gpt2")
    file = folder / "model.safetensors"
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert inspect_folder(folder).problems == []


def test_a_model_in_several_files_is_read(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    inspection = inspect_folder(tmp_path)
    assert inspection.ok
    assert len(inspection.layers) == 14


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        inspect_folder(tmp_path / "missing")
    out = run(tmp_path / "out", NM(2, 4))
    out.layers.write_text("{}\n")
    with pytest.raises(InputError, match=r"layers.jsonl is damaged"):
        inspect_folder(out.path)
    file = out.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError):
        inspect_folder(out.model)


def test_the_inspection_is_plain_data(tmp_path: Path) -> None:
    facts = inspect_folder(run(tmp_path / "out", NM(2, 4)).path).to_dict()
    assert facts["ok"] is True
    assert facts["sparsity"] == 0.5
    assert facts["layers"][0] == {
        "name": "model.layers.0.self_attn.q_proj",
        "shape": [32, 32],
        "zeros": 512,
        "pattern": "2:4",
        "problems": [],
        "type": "",
        "sparsity": 0.5,
    }


def test_stacks_are_counted_in_the_dtype_of_the_files(tmp_path: Path) -> None:
    """A number that the model's own dtype would round to zero is none in the file."""
    folder = save_folder(make_model("mixtral"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if ".experts.2.w1." in name]
    assert names
    for name in names:
        tensors[name][0, :3] = 1e-20
        tensors[name][0, 3] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    zeros = {layer.name: layer.zeros for layer in inspect_folder(folder).layers}
    assert [zeros[f"model.layers.{block}.mlp.experts.2.gate_proj"] for block in range(2)] == [1, 1]
