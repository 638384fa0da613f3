"""The journal of a run: a kill at any moment costs one block at most, and no run goes on with another's blocks."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from models_for_tests import _GROUPED, build
from rarefy.calibration.record import record
from rarefy.calibration.spill import StatesPart, load_states, save_states
from rarefy.errors import OutputError
from rarefy.models.copies import ShardCopies
from rarefy.models.source import resolve_model
from rarefy.models.streaming import StreamedModel
from rarefy.pruning.records import LayerRecord
from rarefy.runs.fingerprint import Fingerprint, file_digests
from rarefy.runs.folder import RunFolder
from rarefy.runs.journal import Journal

_WINDOWS = torch.randint(3, 100, (3, 6), generator=torch.Generator().manual_seed(0))
_BLOCKS = [f"model.layers.{index}" for index in range(3)]
_PARAMETERS = ("self_attn.q_proj.weight", "mlp.down_proj.weight")


def _fingerprint(**recipe: object) -> Fingerprint:
    return Fingerprint({"sparsity": 0.5, **recipe}, {"model.safetensors": "1"}, "2")


def _record(block: int, name: str = "up_proj", error: float = 0.25) -> LayerRecord:
    return LayerRecord(f"model.layers.{block}.{name}", block, [2, 3], "50 %", 3, error, "done", trace={"loss": [1.0]})


def _finish(journal: Journal, index: int, states: Tensor | None = None) -> list[StatesPart]:
    parts = [save_states(journal.folder, index + 1, torch.zeros(2, 3, 4) if states is None else states)]
    journal.finish_block(index, [_record(index), _record(index, "down_proj")], parts)
    return parts


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- The journal ------------------------------------------------------------------------------------------


def test_what_is_finished_is_there_again(tmp_path: Path) -> None:
    assert Journal.find(tmp_path) is None
    with Journal(tmp_path / "new" / "out").open(_fingerprint()) as journal:
        assert (journal.finished, journal.states, journal.records()) == (0, [], [])
        assert journal.folder == tmp_path / "new" / "out" / "unfinished"
        for index in range(3):
            parts = _finish(journal, index, torch.full((2, 3, 4), float(index)))
            assert (journal.finished, journal.states) == (index + 1, parts)
            with pytest.raises(ValueError, match=f"Block {index} was finished, but {index + 1} is the next"):
                journal.finish_block(index, [], [])
    found = Journal.find(tmp_path / "new" / "out")
    assert found is not None
    found.check(_fingerprint())
    assert found.finished == 3
    with Journal(tmp_path / "new" / "out").open(_fingerprint()) as again:
        assert (again.finished, again.states) == (3, parts)
        names = [(record.block, record.name, record.trace) for record in again.records()]
        expected = [
            (record.block, record.name, record.trace)
            for i in range(3)
            for record in (_record(i), _record(i, "down_proj"))
        ]
        assert names == expected
        states = torch.zeros(2, 3, 4)
        load_states(again.folder, again.states, states)
        assert states.eq(2).all()
        assert len(list(again.folder.glob("states-*"))) == 1
        again.finish_block(3, [], [])
        assert not list(again.folder.glob("states-*"))
        again.remove()
    assert list((tmp_path / "new" / "out").iterdir()) == []


def test_the_model_takes_its_name_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path).open(_fingerprint())
    journal.model.mkdir()
    (journal.model / "config.json").write_text("{}")
    for _ in range(2):
        journal.publish(tmp_path / "model")
        assert (tmp_path / "model" / "config.json").read_text() == "{}"
        assert not journal.model.exists()
    journal.model.mkdir()
    with pytest.raises(OutputError, match=r"model cannot be written: Directory not empty\."):
        journal.publish(tmp_path / "model")
    journal.remove()


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path) -> None:
    first = Journal(tmp_path).open(_fingerprint())
    with pytest.raises(OutputError, match=f"{tmp_path} is being written by another process"):
        Journal(tmp_path).open(_fingerprint())
    first.close()
    with Journal(tmp_path).open(_fingerprint()):
        code = (
            "import sys; from pathlib import Path; from rarefy.errors import OutputError\n"
            "from rarefy.runs.fingerprint import Fingerprint; from rarefy.runs.journal import Journal\n"
            "try: Journal(Path(sys.argv[1])).open(Fingerprint({'sparsity': 0.5}, {'model.safetensors': '1'}, '2'))\n"
            "except OutputError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path} is being written by another process.\n"


def test_of_two_processes_that_begin_at_once_one_makes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[Journal] = []
    begin = Journal._begin

    def late(self: Journal) -> None:
        if not others:
            others.append(self)
            Journal(tmp_path).open(_fingerprint()).close()  # another process, which was quicker
        begin(self)

    monkeypatch.setattr(Journal, "_begin", late)
    with Journal(tmp_path).open(_fingerprint()) as journal:
        _finish(journal, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]


def test_a_folder_comes_with_its_journal_and_loses_its_name_before_anything_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a kill at any moment leaves nothing called ``unfinished`` that is without a journal."""
    seen = []

    def look(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            folder = tmp_path / "unfinished"
            seen.append((folder.exists(), (folder / "journal.json").is_file()))
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "replace"), (Path, "rename")):
        monkeypatch.setattr(owner, name, look(getattr(owner, name)))
    journal = Journal(tmp_path).open(_fingerprint())
    _finish(journal, 0)
    journal.remove()
    assert len(seen) > 10
    assert {there == whole for there, whole in seen} == {True}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["nothing", "files", "file", "link", "old"])
def test_what_is_called_unfinished_and_is_not_rarefys_is_left_alone(tmp_path: Path, content: str) -> None:
    """A folder or file of the user's, of another program, or of a release whose journal had another name."""
    theirs = tmp_path / "out" / "unfinished"
    (tmp_path / "out").mkdir()
    if content == "file":
        theirs.write_text("my chapters")
    elif content == "link":
        with Journal(tmp_path / "elsewhere").open(_fingerprint()) as other:
            theirs.symlink_to(other.folder)
    else:
        theirs.mkdir()
    for name in {"files": ["chapter.txt", "states-00001-000000.bin"], "old": ["progress.json"]}.get(content, []):
        (theirs / name).write_text("{")
    before = sorted(tmp_path.rglob("*"))
    assert Journal.find(tmp_path / "out") is None
    for attempt in (Journal(tmp_path / "out").check, Journal(tmp_path / "out").open):
        with pytest.raises(OutputError, match=r"unfinished holds no journal\.json, so it is not Rarefy's"):
            attempt(_fingerprint())
    with pytest.raises(OutputError, match=r"unfinished is no unfinished run of this release of Rarefy"):
        RunFolder(tmp_path / "out").check()
    Journal(tmp_path / "out").remove()
    assert sorted(tmp_path.rglob("*")) == before


# --- Whose run it is --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (_fingerprint(sparsity=0.6), "with sparsity 0.5, not 0.6"),
        (_fingerprint(include=["*.mlp.*"]), "with include unset, not ['*.mlp.*']"),
        (Fingerprint({}, {"model.safetensors": "1"}, "2"), "with sparsity 0.5, not unset"),
        (
            Fingerprint({"sparsity": 0.5}, {"model.safetensors": "3"}, "2"),
            "of another model: model.safetensors is not",
        ),
        (Fingerprint({"sparsity": 0.5}, {"model.safetensors": "1", "b": ""}, "2"), "of another model: b is not"),
        (Fingerprint({"sparsity": 0.5}, {}, "2"), "of another model: model.safetensors is not"),
        (Fingerprint({"sparsity": 0.5}, {"model.safetensors": "1"}, "3"), "on another calibration text"),
    ],
)
def test_a_run_of_another_recipe_model_or_text_is_refused_and_left_alone(
    tmp_path: Path, other: Fingerprint, difference: str
) -> None:
    with Journal(tmp_path).open(_fingerprint()) as journal:
        _finish(journal, 0)
    before = {file.name: file.read_bytes() for file in journal.folder.iterdir()}
    for attempt in (Journal(tmp_path).check, Journal(tmp_path).open):
        with pytest.raises(OutputError) as error:
            attempt(other)
        message = str(error.value)
        assert message.startswith(f"{tmp_path} holds an unfinished run {difference}")
        assert message.endswith(": repeat its command to go on with it, or choose another folder.")
    assert {file.name: file.read_bytes() for file in journal.folder.iterdir()} == before
    Journal(tmp_path).open(_fingerprint()).close()  # the lock was given back


def test_a_fingerprint_depends_on_all_that_the_result_depends_on(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    for name in ("a.safetensors", "other.safetensors", "tokenizer.json", "README.md"):
        (folder / name).write_bytes(name.encode() * 300_000)

    def fingerprint(windows: Tensor = _WINDOWS, **recipe: object) -> Fingerprint:
        return Fingerprint.of({"globs": ("a", "b"), "pattern": None, **recipe}, folder, windows)

    original = fingerprint()
    assert original.difference(fingerprint()) is None
    assert fingerprint().difference(fingerprint(globs=["a", "b"])) is None  # JSON has lists only
    assert sorted(original.model) == ["a.safetensors", "config.json", "model.safetensors.index.json"]
    changed = _WINDOWS.clone()
    changed[2, 5] += 1
    for windows in (changed, _WINDOWS.view(6, 3), _WINDOWS[:2]):
        assert original.difference(fingerprint(windows)) == "on another calibration text"
    weights = folder / "a.safetensors"
    content = weights.read_bytes()
    middle = len(content) // 2  # where a merged checkpoint differs, although it begins and ends alike
    for other in (
        content + b"x",
        b"x" + content[1:],
        content[:-1] + b"x",
        content[:middle] + b"X" + content[middle + 1 :],
    ):
        weights.write_bytes(other)
        assert original.difference(fingerprint()) == "of another model: a.safetensors is not the same file"
    weights.write_bytes(content)
    assert original.difference(fingerprint()) is None
    assert list(file_digests(weights)) == ["a.safetensors"]
    assert file_digests(weights)["a.safetensors"] == original.model["a.safetensors"]


# --- Damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "list", "format"])
def test_a_damaged_journal_is_one_sentence_and_nothing_is_removed(tmp_path: Path, damage: str) -> None:
    with Journal(tmp_path).open(_fingerprint()) as journal:
        _finish(journal, 0)
    file = journal.folder / "journal.json"
    text = file.read_text()
    changed = {
        "bit": text.replace("0.5", "0.6"),
        "cut": text[:-20],
        "empty": "",
        "list": "[1]",
        "format": text.replace('"format": 2', '"format": 1'),
    }[damage]
    assert changed != text
    file.write_text(changed)
    files = sorted(journal.folder.iterdir())
    for attempt in (Journal(tmp_path).check, Journal(tmp_path).open):
        with pytest.raises(
            OutputError, match=r"journal\.json is damaged, so the unfinished run cannot go on"
        ) as error:
            attempt(_fingerprint())
        assert "\n" not in str(error.value)
    assert sorted(journal.folder.iterdir()) == files


def test_damaged_or_lost_records_are_one_sentence(tmp_path: Path) -> None:
    with Journal(tmp_path).open(_fingerprint()) as journal:
        _finish(journal, 0)
        path = journal.folder / "block-00000.jsonl"
        content = path.read_text()
        path.write_text(content.replace("0.25", "0.35"))
        with pytest.raises(OutputError, match=r"block-00000\.jsonl is damaged, .* begin anew\.$"), journal.keeping():
            journal.records()
        path.unlink()
        with pytest.raises(OutputError, match=r"block-00000\.jsonl is missing, so .* to begin anew\.$"):
            journal.records()


@pytest.mark.parametrize("survived", range(3))
def test_a_full_disk_loses_nothing_that_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    with Journal(tmp_path).open(_fingerprint()) as journal:
        parts = _finish(journal, 0)
        fsync, calls = os.fsync, []

        def full(descriptor: int) -> None:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):  # not a folder
                calls.append(1)
                if len(calls) > survived:
                    _full()
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OutputError) as error, journal.keeping():
                _finish(journal, 1)
        message = "No space left on device; 1 finished block is kept, and the same command goes on from there."
        assert str(error.value).endswith(f"cannot be written: {message}")
        assert (journal.finished, journal.states) == (1, parts)
    with Journal(tmp_path).open(_fingerprint()) as again:
        assert (again.finished, again.states) == (1, parts)
        load_states(again.folder, again.states, torch.empty(2, 3, 4))
        _finish(again, 1)
        assert [record.block for record in again.records()] == [0, 0, 1, 1]


def test_what_the_disk_refuses_anywhere_says_what_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path).open(_fingerprint())
    with pytest.raises(OutputError, match=r"No space left on device\.$"), journal.keeping():
        _full()
    _finish(journal, 0)
    with pytest.raises(OutputError, match=r"No space left on device; 1 finished block is kept"), journal.keeping():
        _full()
    with pytest.raises(KeyError), journal.keeping():
        raise KeyError
    journal.close()


# --- A whole run, killed ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    """A small Llama of three blocks in several files."""
    folder = tmp_path_factory.mktemp("model")
    model = build(transformers.LlamaConfig(**{**_GROUPED, "num_hidden_layers": 3}))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
    return StreamedModel(resolve_model(str(folder)))


def _run(streamed: StreamedModel, output: Path) -> int:
    """Prune by a rule that depends on the hidden states, and return how many blocks were done in this go."""
    done = 0
    fingerprint = Fingerprint.of({"rule": "mean"}, streamed.shards.folder, _WINDOWS)
    with Journal(output).open(fingerprint) as journal, journal.keeping():
        copies = ShardCopies(streamed.shards, journal.model)
        if journal.finished == len(_BLOCKS):
            pass
        elif journal.finished:
            copies.check()
        else:
            copies.make()
        with streamed.loaded(streamed.base, without=_BLOCKS[1:]):
            modules = [streamed.model.get_submodule(block) for block in _BLOCKS]
            stream = record(streamed.model, modules, _WINDOWS, 2)
        stream.compute_dtype = torch.bfloat16
        if journal.states:
            load_states(journal.folder, journal.states, stream.states)
        for index in range(journal.finished, len(_BLOCKS)):
            block = _BLOCKS[index]
            with streamed.loaded(block) as module, torch.no_grad():
                for parameter in _PARAMETERS:
                    weight = module.get_parameter(parameter)
                    weight[weight < stream.states.float().mean()] = 0
                streamed.store([f"{block}.{parameter}" for parameter in _PARAMETERS], copies)
                stream.advance(module, index)
            last = index == len(_BLOCKS) - 1
            parts = [] if last else [save_states(journal.folder, index + 1, stream.states)]
            journal.finish_block(index, [_record(index, error=float(stream.states.float().std()))], parts)
            done += 1
        text = "".join(record.to_json() + "\n" for record in journal.records())
        journal.publish(output / "model")
        (output / "layers.jsonl").write_text(text)
        (output / "run.json").write_text("{}")
        journal.remove()
    return done


def _result(output: Path) -> dict[str, bytes]:
    files = [file for file in output.rglob("*") if file.is_file()]
    return {str(file.relative_to(output)): file.read_bytes() for file in files}


def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(
    streamed: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    output, moments = tmp_path / "undisturbed", []

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        """What a kill just before ``function`` would leave."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if output.exists():
                moments.append(shutil.copytree(output, tmp_path / f"moment {len(moments)}"))
            return function(*args, **kwargs)

        return call

    write, opened = ShardCopies.write, Path.open

    def begun(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """A file of which nothing is written yet."""
        file = opened(self, mode, *args, **kwargs)
        if mode == "xb":
            before(lambda: None)()
        return file

    def torn(self: ShardCopies, name: str, tensor: Tensor) -> None:
        """A write of which only a part is there, for a while."""
        half = tensor.clone()
        half.view(-1)[: half.numel() // 2] = 7
        write(self, name, half)
        before(write)(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", before(os.fsync))
        patch.setattr(Path, "open", begun)
        patch.setattr(Path, "replace", before(Path.replace))
        patch.setattr(Path, "rename", before(Path.rename))
        patch.setattr(Path, "unlink", before(Path.unlink))
        patch.setattr(ShardCopies, "write", torn)
        assert _run(streamed, output) == 3
    expected = _result(output)
    assert "unfinished" not in "".join(expected)
    assert len(expected) == len(streamed.shards.files) + 3
    assert len(moments) > 50
    counts = set()
    for moment in moments:
        counts.add(_run(streamed, moment))
        assert _result(moment) == expected, moment
    assert counts == {0, 1, 2, 3}


def test_what_the_journal_speaks_of_is_on_the_disk_before_the_journal(
    streamed: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards, records, states, and the names of all new files: synced after they were last written."""
    waiting: dict[int, str] = {}  # by number of the file or folder, what of it may not be on the disk yet
    finished, synced = [], set()
    fsync, write, replace, rename = os.fsync, ShardCopies.write, Path.replace, Path.rename

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)
        waiting.pop(os.fstat(descriptor).st_ino, None)

    def written(self: ShardCopies, name: str, tensor: Tensor) -> None:
        write(self, name, tensor)
        file = self.stored(name).file
        waiting[file.stat().st_ino] = f"{name} in {file.name}"

    def named(function: Callable[..., Path]) -> Callable[..., Path]:
        def call(self: Path, target: Path) -> Path:
            if target.name == "journal.json":
                finished.append(dict(waiting))
            if self.is_file():
                assert self.stat().st_ino in synced, f"{target} has its name before its bytes are on the disk"
            found = function(self, target)
            waiting[target.parent.stat().st_ino] = f"the name of {target}"
            return found

        return call

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(ShardCopies, "write", written)
    monkeypatch.setattr(Path, "replace", named(replace))
    monkeypatch.setattr(Path, "rename", named(rename))
    assert _run(streamed, tmp_path / "out") == 3
    assert finished == [{}] * 4  # the first journal, and one for each block


def test_a_lost_file_of_the_model_so_far_is_one_sentence(streamed: StreamedModel, tmp_path: Path) -> None:
    fingerprint = Fingerprint.of({"rule": "mean"}, streamed.shards.folder, _WINDOWS)
    with Journal(tmp_path).open(fingerprint) as journal:
        ShardCopies(streamed.shards, journal.model).make()
        _finish(journal, 0)
    lost = journal.model / streamed.shards.files[1].name
    lost.unlink()
    with pytest.raises(
        OutputError, match=rf"{lost.name} is missing, although the unfinished run had made it; 1 finish"
    ):
        _run(streamed, tmp_path)
