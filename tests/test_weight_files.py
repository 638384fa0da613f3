"""The one reader of an index of weights: what it finds, and what it refuses of an index that somebody else made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models_for_tests import make_model
from rarefy.errors import ModelError
from rarefy.models.shards import Shards
from rarefy.models.source import resolve_model
from rarefy.models.weight_files import find_weight_files
from rarefy.runs.verify import inspect_folder

_INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama in several files."""
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama", max_shard_size="40KB")
    return tmp_path / "llama"


def _edit_index(folder: Path, **changes: object) -> None:
    content = json.loads((folder / _INDEX).read_text())
    (folder / _INDEX).write_text(json.dumps(content | changes))


def _name_instead(name: object) -> Callable[[Path], None]:
    """Let the index name this for the first of its tensors."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / _INDEX).read_text())
        content["weight_map"][next(iter(content["weight_map"]))] = name
        (folder / _INDEX).write_text(json.dumps(content))

    return edit


def _link_outside(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    first.rename(folder.parent / "elsewhere.safetensors")
    first.symlink_to(folder.parent / "elsewhere.safetensors")


def _link_to_nothing(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    first.unlink()
    first.symlink_to(folder / "nothing.safetensors")


def _nested(folder: Path) -> None:
    (folder / _INDEX).write_text('{"weight_map": ' + "[" * 100_000)


_WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "absolute": (_name_instead("/etc/passwd"), "names /etc/passwd, which is not in its own folder"),
    "above": (_name_instead("../other.safetensors"), r"names \.\./other\.safetensors, which is not in its own"),
    "below": (_name_instead("sub/model.safetensors"), "names sub/model.safetensors, which is not in its own"),
    "dots": (_name_instead(".."), r"names \.\., which is not in its own folder"),
    "windows": (_name_instead("..\\other"), "which is not in its own folder"),
    "zero": (_name_instead("a\0b"), "which is not in its own folder"),
    "number": (_name_instead(3), "names 3, which is no name of a file"),
    "list": (_name_instead(["a"]), r"names \['a'\], which is no name of a file"),
    "null": (_name_instead(None), "names None, which is no name of a file"),
    "empty name": (_name_instead(""), "names '', which is no name of a file"),
    "missing": (_name_instead("model-9.safetensors"), "model-9.safetensors is missing, although the index"),
    "link": (_link_outside, "is a link to .*elsewhere.safetensors, outside of the model's folder: copy"),
    "dead link": (_link_to_nothing, "is a link to nothing"),
    "map a list": (lambda folder: _edit_index(folder, weight_map=["a"]), "names no files of weights"),
    "map empty": (lambda folder: _edit_index(folder, weight_map={}), "names no files of weights"),
    "no map": (lambda folder: (folder / _INDEX).write_text("{}"), "names no files of weights"),
    "no object": (lambda folder: (folder / _INDEX).write_text("[]"), "is JSON, but no object"),
    "no JSON": (lambda folder: (folder / _INDEX).write_text("{"), "cannot be read as JSON"),
    "nested": (_nested, "cannot be read as JSON"),
    "binary": (lambda folder: (folder / _INDEX).write_bytes(b"\xff\xfe{"), "cannot be read as JSON"),
}  # fmt: skip


@pytest.mark.parametrize("read", [lambda folder: resolve_model(str(folder)), Shards.open, inspect_folder])
@pytest.mark.parametrize("wrong", _WRONG)
def test_every_reader_refuses_a_wrong_index_in_one_sentence(
    folder: Path, read: Callable[[Path], object], wrong: str
) -> None:
    break_it, message = _WRONG[wrong]
    break_it(folder)
    with pytest.raises(ModelError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_a_single_file_comes_before_an_index_and_safetensors_before_pickles(folder: Path) -> None:
    found = find_weight_files(folder)
    assert found is not None
    assert [*found.files] == sorted(folder.glob("*.safetensors"))
    assert found.index == folder / _INDEX
    assert {name for names in found.tensors.values() for name in names} == set(Shards.open(folder).tensors)
    torch.save({}, folder / "pytorch_model.bin")
    assert find_weight_files(folder) == found
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert find_weight_files(folder).files == (folder / "model.safetensors",)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert find_weight_files(folder).files == (folder / "pytorch_model.bin",)
    (folder / "pytorch_model.bin").unlink()
    assert find_weight_files(folder) is None


def test_files_that_the_config_names_are_the_files(folder: Path) -> None:
    index = folder / _INDEX
    index.rename(folder / "own.safetensors.index.json")
    settings = json.loads((folder / "config.json").read_text())
    for name, message in (
        ("own.safetensors.index.json", None),
        ("../own.safetensors", "config.json names ../own.safetensors, which is not in its own folder"),
        ("other.safetensors", "other.safetensors is missing, although config.json names it"),
    ):
        (folder / "config.json").write_text(json.dumps({**settings, "transformers_weights": name}))
        if message is None:
            assert find_weight_files(folder).index == folder / name
        else:
            with pytest.raises(ModelError, match=message):
                find_weight_files(folder)


def test_links_within_the_folder_and_into_the_cache_of_the_hub_are_followed(folder: Path, tmp_path: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    first.rename(folder / "kept")
    first.symlink_to("kept")
    find_weight_files(folder).check()
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert resolve_model(str(snapshot)).path == snapshot
    other = tmp_path / "other"
    other.write_bytes(first.read_bytes())
    (snapshot / first.name).unlink()
    (snapshot / first.name).symlink_to(other)
    with pytest.raises(ModelError, match=r"outside of the model's folder"):
        resolve_model(str(snapshot))


def test_settings_that_are_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / "notes.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"notes\.json is a link to .*secret, outside of the model's folder"):
        resolve_model(str(folder))


def test_a_folder_that_is_itself_a_link_is_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert resolve_model(str(tmp_path / "link")).path == tmp_path / "link"
