"""Runs of the command line that are killed at any moment: the same command goes on, and ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import rarefy
from cli_for_tests import Rarefy, is_one_sentence
from models_for_tests import _GROUPED, build, save_folder
from rarefy.runs.folder import RunFolder

#: Of layers.jsonl, what no two runs have in common.
_MEASURED = ("seconds", "peak_bytes")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four blocks, wide enough that a block takes a moment, and a text."""
    folder = tmp_path_factory.mktemp("resume")
    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256}
    model = build(LlamaConfig(**{**_GROUPED, **sizes})).to(torch.bfloat16)
    save_folder(model, folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 200)
    return folder


def _arguments(shelf: Path, output: Path, *more: object) -> list[str]:
    said = [
        *("prune", shelf / "model", "-o", output, "--calibration", shelf / "text.txt", "--num-samples", 8),
        *("--sequence-length", 32, "--method", "sparsegpt", "--quiet", *more),
    ]
    return [str(word) for word in said]


#: Runs commands in processes of their own, which need not import anything again: for each line of standard
#: input the process number of the command, and its exit status when it has ended.
_RUNNER = """
import json, os, sys
import transformers.models.llama.modeling_llama
import rarefy.runs.run, rarefy.pruning.stores, rarefy.runs.verify, rarefy.runs.card
from rarefy.cli import main
for line in sys.stdin:
    child = os.fork()
    if not child:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            status = main(json.loads(line))
        except BaseException as error:
            status = f"{error!r}"
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 99)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class _Runner:
    """Runs one command of the command line at a time, and can kill it."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(rarefy.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        self._log = folder / "log.txt"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUNNER], env=environment, cwd=folder, stdin=-1, stdout=-1, text=True
        )

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, arguments: list[str]) -> int:
        """The number of the command's process."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """Wait for the command; its exit status, or the negative number of the signal that ended it."""
        status = int(self._line())
        assert status in (0, -signal.SIGKILL), self._log.read_text()
        return status

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()


def _result(output: Path) -> dict[str, object]:
    """All files of the model but its card, which has the run's command, and the records but their times."""
    files = {
        str(file.relative_to(output)): file.read_bytes()
        for file in (output / "model").rglob("*")
        if file.is_file() and file.name != "README.md"
    }
    records = [json.loads(line) for line in (output / "layers.jsonl").read_text().splitlines()]
    layers = [{key: value for key, value in record.items() if key not in _MEASURED} for record in records]
    return {**files, "layers": layers, "recipe": (output / "recipe.yaml").read_text()}


def _kill_and_go_on(shelf: Path, tmp_path: Path, kills: int, *more: object) -> None:
    """Kill runs ``kills`` times in all at random moments of their work; compare each with an undisturbed one."""
    with _Runner(tmp_path) as runner:
        whole = tmp_path / "undisturbed"
        runner.start(_arguments(shelf, whole, *more))
        begun = _wait_for(whole / "unfinished", whole)
        assert runner.end() == 0
        took = time.monotonic() - begun
        expected = _result(whole)
        draw, kept = random.Random(0), 0
        output = tmp_path / "run 0"
        for kill in range(kills):
            process = runner.start(_arguments(shelf, output, *more))
            _wait_for(output / "unfinished" / "journal.json", output)
            time.sleep(draw.random() * took)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            runner.end()
            kept += (output / "unfinished" / "block-00000.jsonl").exists()
            if not _is_left(output):  # it had been finished
                _assert_result(output, expected)
                output = tmp_path / f"run {kill + 1}"
        if not output.joinpath("run.json").exists() or _is_left(output):
            runner.start(_arguments(shelf, output, *more))
            assert runner.end() == 0
        _assert_result(output, expected)
        assert kept >= kills // 4


def _is_left(output: Path) -> bool:
    """Whether a journal is there, or what is left of one where the kill came while it was removed."""
    return any(output.glob("*unfinished*"))


def _wait_for(path: Path, output: Path) -> float:
    """The time when ``path`` is there, or the run in ``output`` has ended."""
    limit = time.monotonic() + 300
    while not path.exists() and not (output / "run.json").exists():
        assert time.monotonic() < limit
        time.sleep(0.002)
    return time.monotonic()


def _assert_result(output: Path, expected: dict[str, object]) -> None:
    assert _result(output) == expected
    assert sorted(path.name for path in output.iterdir()) == ["layers.jsonl", "model", "recipe.yaml", "run.json"]


def test_killed_runs_end_with_the_same_bits(shelf: Path, tmp_path: Path) -> None:
    _kill_and_go_on(shelf, tmp_path, 4)


@pytest.mark.slow
def test_many_killed_runs_end_with_the_same_bits(shelf: Path, tmp_path: Path) -> None:
    _kill_and_go_on(shelf, tmp_path, 20)


@pytest.mark.slow
def test_killed_runs_of_a_model_in_memory_end_with_the_same_bits(shelf: Path, tmp_path: Path) -> None:
    _kill_and_go_on(shelf, tmp_path, 5, "--dtype", "float32")


# --- Interrupts, and other runs -----------------------------------------------------------------------------


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, blocks: int, error: BaseException) -> None:
    """Let a run end with ``error`` when it has finished ``blocks`` blocks."""
    from rarefy.pruning.stores import JournaledStore

    store = JournaledStore.finish

    def finish(self: JournaledStore, block: object, *arguments: object) -> None:
        store(self, block, *arguments)  # type: ignore[arg-type]
        if self.journal.finished == blocks:
            raise error

    monkeypatch.setattr(JournaledStore, "finish", finish)


@pytest.mark.parametrize("more", [(), ("--dtype", "float32")], ids=["on disk", "in memory"])
def test_an_interrupted_run_is_kept_and_only_the_same_command_goes_on(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    output = tmp_path / "out"
    arguments = [word for word in _arguments(shelf, output, *more) if word != "--quiet"]
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 2, KeyboardInterrupt())
        done = rarefy_(*arguments)
    assert done.status == 130
    assert "2 finished blocks are kept, and the same command goes on from there" in done.err
    assert [path.name for path in output.iterdir()] == ["unfinished"]
    before = sorted(path for path in output.rglob("*"))
    text = shelf / "other.txt"
    text.write_text("another text entirely, with other words " * 200)
    for other, difference in (
        (("--sparsity", 0.6), "with sparsity 0.5, not 0.6"),
        (("--seed", 1), "with seed 0, not 1"),
        (("--calibration", text), "with calibration "),
    ):
        refused = rarefy_(*arguments, *other)
        assert is_one_sentence(refused.err)
        assert (refused.status, refused.out) == (2, "")
        assert f"{output} holds an unfinished run {difference}" in refused.err
        assert sorted(path for path in output.rglob("*")) == before
    (output / "notes.txt").touch()
    assert "this one is not empty" in rarefy_(*arguments).err
    (output / "notes.txt").unlink()
    done = rarefy_(*arguments, *(() if more else ("--offload-dir", tmp_path)))
    assert done.status == 0, done.err
    assert "2 finished blocks are there; the run goes on with the next" in done.err
    assert rarefy_(*_arguments(shelf, tmp_path / "whole", *more)).status == 0
    assert _result(output) == _result(tmp_path / "whole")
    assert "this one is not empty" in rarefy_(*arguments).err
    (output / ".unfinished.0123abcd.partial" / "model").mkdir(parents=True)  # killed while it removed its journal
    assert "the run had been finished" in rarefy_(*arguments).out
    assert sorted(path.name for path in output.iterdir()) == ["layers.jsonl", "model", "recipe.yaml", "run.json"]


def test_a_run_goes_on_in_the_dtype_that_it_began_to_compute_in(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(gain: float) -> None:
        monkeypatch.setattr("rarefy.pruning.precision.bfloat16_gain", lambda: gain)

    measured(8.0)
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 2, KeyboardInterrupt())
        assert rarefy_(*_arguments(shelf, tmp_path / "out")).status == 130
    assert rarefy_(*_arguments(shelf, tmp_path / "whole")).status == 0
    shutil.copytree(tmp_path / "out", tmp_path / "lost")
    for file in (tmp_path / "lost" / "unfinished").glob("states-*.bin"):
        file.unlink()
    measured(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = rarefy_(*_arguments(shelf, tmp_path / "lost"))
    assert "They are computed again from the finished blocks." in done.err
    assert _result(tmp_path / "lost") == _result(tmp_path / "whole")
    assert rarefy_(*_arguments(shelf, tmp_path / "out")).status == 0
    assert rarefy_(*_arguments(shelf, tmp_path / "other")).status == 0
    assert _result(tmp_path / "out") == _result(tmp_path / "whole")
    assert _result(tmp_path / "other") != _result(tmp_path / "whole")
    computed = {
        name: json.loads((tmp_path / name / "run.json").read_text())["compute_dtype"] for name in ("out", "other")
    }
    assert computed == {"out": "bfloat16", "other": "float32"}


@pytest.mark.parametrize("more", [(), ("--dtype", "float32")], ids=["on disk", "in memory"])
def test_a_run_with_all_that_sees_beyond_the_layer_goes_on_with_the_same_bits(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    parts = ("--match", 1, "--match-lr", 1e-3, "--drift", 0.25, "--allocation", "profile", *more)
    parts += ("--rotate",)
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 2, KeyboardInterrupt())
        assert rarefy_(*_arguments(shelf, tmp_path / "out", *parts)).status == 130
    refused = rarefy_(*_arguments(shelf, tmp_path / "out", *parts, "--drift", 0.5))
    assert "holds an unfinished run with drift 0.25, not 0.5" in refused.err
    for output in ("out", "whole"):
        done = rarefy_(*_arguments(shelf, tmp_path / output, *parts))
        assert done.status == 0, done.err
    assert _result(tmp_path / "out") == _result(tmp_path / "whole")
    assert rarefy_(*_arguments(shelf, tmp_path / "plain", *more)).status == 0
    assert _result(tmp_path / "plain")["layers"] != _result(tmp_path / "whole")["layers"]


def test_a_run_that_swaps_weights_of_modules_goes_on_with_the_same_bits(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("--pattern", "2:4", "--barber", "signed", "--barber-share", 0.2, "--match", 1)
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 2, KeyboardInterrupt())
        assert rarefy_(*_arguments(shelf, tmp_path / "out", *parts)).status == 130
    refused = rarefy_(*_arguments(shelf, tmp_path / "out", *parts, "--barber", "published"))
    assert "holds an unfinished run with barber signed, not published" in refused.err
    for output in ("out", "whole"):
        done = rarefy_(*_arguments(shelf, tmp_path / output, *parts))
        assert done.status == 0, done.err
    found = _result(tmp_path / "out")
    assert found == _result(tmp_path / "whole")
    assert all(layer["details"]["revived"] > 0 for layer in found["layers"])


@pytest.mark.parametrize("name", ["chapter.txt", "progress.json", None])
def test_a_folder_called_unfinished_that_is_not_rarefys_is_left_alone(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, name: str | None
) -> None:
    theirs = tmp_path / "out" / "unfinished"
    theirs.mkdir(parents=True)
    if name:
        (theirs / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    done = rarefy_(*_arguments(shelf, tmp_path / "out"))
    assert is_one_sentence(done.err), done.err
    assert (done.status, done.out) == (2, "")
    assert f"{theirs} is no unfinished run of this release of Rarefy" in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_would_fail_again_leaves_nothing(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt_after(monkeypatch, 2, rarefy.NumericalError("a layer holds NaN."))
    done = rarefy_(*_arguments(shelf, tmp_path / "deep" / "out"))
    assert done.status == 1
    assert not (tmp_path / "deep").exists()


def test_the_text_that_the_model_wrote_is_kept_with_an_unfinished_run(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*_arguments(shelf, tmp_path / "out"), "--calibration", "self"]
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 2, KeyboardInterrupt())
        assert rarefy_(*arguments).status == 130
    with monkeypatch.context() as patch:
        patch.setattr("rarefy.calibration.self_text.write_text", lambda *_, **__: pytest.fail("it wrote again"))
        assert rarefy_(*arguments).status == 0
    assert rarefy_(*_arguments(shelf, tmp_path / "whole"), "--calibration", "self").status == 0
    assert _result(tmp_path / "out") == _result(tmp_path / "whole")
    assert RunFolder(tmp_path / "out").read_run()["texts"]
