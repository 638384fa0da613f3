"""Safetensors files read tensor by tensor, and copies of them in which tensors are replaced."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from models_for_tests import make_model
from rarefy.errors import ModelError, OutputError
from rarefy.models import stored
from rarefy.models.copies import ShardCopies
from rarefy.models.shards import Shards

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8)


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).reshape(shape)


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Bit by bit, so that NaN equals itself."""
    both = [each.reshape(-1).view(torch.uint8) for each in (tensor, other)]
    return tensor.dtype == other.dtype and tensor.shape == other.shape and torch.equal(*both)


def _sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the disk when is another matter (test_journal.py)."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama in several files."""
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return tmp_path / "llama"


_tensors = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(_DTYPES)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_tensors, st.data())
def test_a_copy_with_other_tensors_is_the_file_that_the_library_would_write(
    tmp_path: Path, kinds: dict[str, tuple[tuple[int, ...], torch.dtype]], data: st.DataObject
) -> None:
    torch.manual_seed(0)
    tensors = {name: _random(*kind) for name, kind in kinds.items()}
    original, copies = tmp_path / "original", tmp_path / "copies"
    original.mkdir(exist_ok=True)
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    (copies / "model.safetensors").unlink(missing_ok=True)
    opened = Shards.open(original)
    assert opened.index is None
    assert opened.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert _same(opened.tensors[name].read(), tensor)
        assert opened.tensors[name].meta().dtype == tensor.dtype
    changed = data.draw(st.sets(st.sampled_from(sorted(tensors))))
    copy = ShardCopies(opened, copies)
    copy.make()
    assert (copies / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
    for name in changed:
        tensors[name] = _random(*kinds[name])
        copy.write(name, tensors[name])
        assert _same(copy.stored(name).read(), tensors[name])
    copy.sync()
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (copies / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    copy.check()


def test_booleans_and_what_is_not_contiguous(tmp_path: Path) -> None:
    save_file({"mask": torch.tensor([True, False]), "weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    opened = Shards.open(tmp_path)
    assert opened.tensors["mask"].read().tolist() == [True, False]
    copy = ShardCopies(opened, tmp_path / "copy")
    copy.make()
    copy.write("weight", torch.arange(6.0).view(2, 3).T)
    assert load_file(tmp_path / "copy" / "model.safetensors")["weight"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_several_files_are_read_and_copied_with_their_index(folder: Path, tmp_path: Path) -> None:
    opened = Shards.open(folder)
    assert len(opened.files) > 3
    assert opened.index == folder / "model.safetensors.index.json"
    assert opened.tensors.keys() == json.loads(opened.index.read_text())["weight_map"].keys()
    assert opened.size == sum(file.stat().st_size for file in folder.glob("*.safetensors*"))
    copy = ShardCopies(opened, tmp_path / "copy")
    copy.make()
    for file in folder.glob("*.safetensors*"):
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "copy").iterdir())) == len(opened.files) + 1


def test_tensors_are_compared_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "CHUNK", 16)
    one = torch.arange(30.0)
    others = {f"at {i}": one.clone() for i in range(30)}
    for i, other in enumerate(others.values()):
        other[i] += 1
    save_file(
        {"one": one, "same": one.clone(), "reshaped": one.view(5, 6).clone(), **others},
        tmp_path / "model.safetensors",
    )
    tensors = Shards.open(tmp_path).tensors
    assert tensors["one"].same_as(tensors["same"])
    assert not any(tensors["one"].same_as(tensors[name]) for name in (*others, "reshaped"))


# --- Damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5, 8, 50, -100, -1])
def test_a_file_that_is_cut_off_is_refused(folder: Path, size: int) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(ModelError, match=rf"{file.name} is damaged or cut off") as error:
        Shards.open(folder)
    _sentence(error)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        [],
    ],
)
def test_a_header_that_says_what_cannot_be_is_refused(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match="damaged or cut off"):
        Shards.open(tmp_path)


def test_a_dtype_that_torch_does_not_have_can_be_there_but_not_be_read(tmp_path: Path) -> None:
    header = json.dumps({"odd": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    odd = Shards.open(tmp_path).tensors["odd"]
    assert not odd.known
    with pytest.raises(ModelError, match="odd in .* is of type F4, which cannot be read"):
        odd.read()


def test_a_folder_without_safetensors_or_with_a_wrong_index_is_refused(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(folder.glob("*.safetensors"))[0]
    first.rename(folder / "kept")
    with pytest.raises(ModelError, match=rf"{first.name} is missing, although the index of weights names it"):
        Shards.open(folder)
    (folder / "kept").rename(first)
    second = sorted(folder.glob("*.safetensors"))[1]
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=rf"is in two files of .*: {first.name} and {second.name}"):
        Shards.open(folder)
    second.write_bytes(kept)
    name = next(iter(content["weight_map"]))
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], name: "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match="names ../elsewhere.safetensors, which is not in its own folder"):
        Shards.open(folder)
    for wrong in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(wrong)
        with pytest.raises(
            ModelError, match="cannot be read as JSON|is JSON, but no object|names no files of weights"
        ):
            Shards.open(folder)
    index.unlink()
    with pytest.raises(ModelError, match="has no files of weights"):
        Shards.open(folder)


def test_a_file_that_changes_after_it_was_opened_is_noticed(folder: Path) -> None:
    opened = Shards.open(folder)
    tensor = next(iter(opened.tensors.values()))
    tensor.file.write_bytes(tensor.file.read_bytes()[: tensor.start + 3])
    with pytest.raises(ModelError, match=f"is cut off: it ends within {tensor.name}"):
        tensor.read()
    tensor.file.unlink()
    with pytest.raises(ModelError, match="is missing; it was there when the run began"):
        tensor.read()


# --- Copies -----------------------------------------------------------------------------------------------


def test_only_what_fits_is_written(folder: Path, tmp_path: Path) -> None:
    opened = Shards.open(folder)
    copy = ShardCopies(opened, tmp_path / "copy")
    copy.make()
    name, stored = next(iter(opened.tensors.items()))
    for wrong in (torch.zeros(stored.shape), torch.zeros(3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=f"{name} is torch.bfloat16"):
            copy.write(name, wrong)


def test_copies_that_are_there_are_kept_and_the_others_made(folder: Path, tmp_path: Path) -> None:
    opened = Shards.open(folder)
    copy = ShardCopies(opened, tmp_path / "copy")
    copy.make()
    name = sorted(opened.tensors)[0]
    written = torch.ones(opened.tensors[name].shape, dtype=torch.bfloat16)
    copy.write(name, written)
    lost = next(file for file in opened.files if file != opened.tensors[name].file)
    (tmp_path / "copy" / lost.name).unlink()
    (tmp_path / "copy" / f".{lost.name}.0123abcd.partial").write_text("half")
    with pytest.raises(OutputError, match=f"{lost.name} is missing, although the unfinished run had made it"):
        copy.check()
    again = ShardCopies(opened, tmp_path / "copy")
    assert again.missing == [tmp_path / "copy" / lost.name]
    again.make()
    assert again.missing == []
    assert torch.equal(again.stored(name).read(), written)
    assert not list((tmp_path / "copy").glob(".*"))


def test_what_was_written_is_on_the_disk_after_sync(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    opened = Shards.open(folder)
    copy = ShardCopies(opened, tmp_path / "copy")
    copy.make()
    made = {path.stat().st_ino for path in (tmp_path / "copy", *(tmp_path / "copy").iterdir())}
    assert made <= {*synced}
    synced.clear()
    name = sorted(opened.tensors)[0]
    copy.write(name, torch.ones(opened.tensors[name].shape, dtype=torch.bfloat16))
    assert synced == []
    copy.sync()
    assert synced == [copy.stored(name).file.stat().st_ino]
    copy.sync()
    assert len(synced) == 1


def test_a_copy_that_is_none_is_noticed(folder: Path, tmp_path: Path) -> None:
    copy = ShardCopies(Shards.open(folder), tmp_path / "copy")
    copy.make()
    file = sorted((tmp_path / "copy").glob("*.safetensors"))[1]
    content = file.read_bytes()
    for damaged in (content[:-1], b"", content[:9] + b"}" + content[10:], b"\xff" * len(content)):
        file.write_bytes(damaged)
        with pytest.raises(OutputError, match=rf"{file.name} is damaged: it has not the layout of") as error:
            copy.check()
        _sentence(error)
        with pytest.raises(OutputError, match="is damaged"):
            copy.make()
    file.write_bytes(content)
    copy.check()


def test_too_little_space_is_found_before_anything_is_copied(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = ShardCopies(Shards.open(folder), tmp_path / "copy")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3000))
    with pytest.raises(OutputError, match=r"needs 0\.0 GB for the copy of the model, but its disk has 0\.0 GB left"):
        copy.make()
    assert list((tmp_path / "copy").iterdir()) == []


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_disk_that_fills_up_while_copying(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_kernel: bool
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if not by_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    copy = ShardCopies(Shards.open(folder), tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"model-.* cannot be written: No space left on device\.") as error:
            copy.make()
        _sentence(error)
        assert list((tmp_path / "copy").iterdir()) == []
    copy.make()
    assert copy.missing == []
