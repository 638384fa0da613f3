"""Notes, progress, the live table and the log: what is shown where, and what is written when."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from cli_for_tests import Rarefy, is_one_sentence, prune_arguments
from rarefy.cli import watch as module
from rarefy.cli.terminal import Terminal, print_texts
from rarefy.cli.watch import LayerTable
from rarefy.errors import OutputError
from rarefy.pruning.records import LayerRecord, three_digits
from rarefy.runs.words import memory_words, time_words

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d "


def record(block: int, linear: str, error: float = 0.0123456, failed: bool = False) -> LayerRecord:
    return LayerRecord(
        name=f"model.layers.{block}.{linear}",
        block=block,
        shape=[8, 16],
        pattern="2:4",
        kept=64,
        relative_error=error,
        status="diverged" if failed else "converged",
        failed=failed,
        steps=12,
        seconds=1.5,
        peak_bytes=3 * 2**30,
    )


def drawn(table: LayerTable) -> list[str]:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


# --- Numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "0.0123"), (0.00000123456, "1.23e-06"), (0.01, "0.0100"), (0.9999, "1.00"), (1.0, "1.00"),
        (123.4, "123"), (0.0, "0"), (float("nan"), "not finite"), (float("inf"), "not finite"), (None, "not finite"),
    ],
)  # fmt: skip
def test_three_significant_digits_however_small(value: float | None, text: str) -> None:
    assert three_digits(value) == text


def test_times_and_sizes() -> None:
    assert [time_words(seconds) for seconds in (0.4, 59.6, 3599, 3661)] == ["0:00", "1:00", "59:59", "1:01:01"]
    assert [memory_words(size) for size in (5 * 2**20, 2**30, 1.25 * 2**30)] == ["5 MiB", "1.0 GiB", "1.2 GiB"]


# --- Notes and the log ------------------------------------------------------------------------------------


def test_quiet_leaves_warnings_and_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "run.log"
    for quiet in (False, True):
        with Terminal(quiet, log) as terminal:
            terminal.begin()
            terminal.note("a note")
            with terminal.watch("pruning") as watch:
                watch(1, 2)
                watch.layer(record(0, "up_proj"))
            warnings.showwarning("take care", UserWarning, "file.py", 1)
        err = capsys.readouterr().err
        assert "warning: take care\n" in err
        assert ("a note\n" in err) is ("pruning: done in 0:00\n" in err) is not quiet
    lines = log.read_text().splitlines()
    assert len(lines) == 8  # the second run appends to the first
    assert all(re.match(TIME, line) for line in lines)
    layer = "model.layers.0.up_proj, 2:4, relative error 0.0123, 12 steps, 1.50 s, converged"
    assert [re.sub(TIME, "", line) for line in lines[4:]] == [
        "a note",
        f"pruning: {layer}, 3.0 GiB of memory at most",
        "pruning: done in 0:00",
        "warning: take care",
    ]


def test_the_log_begins_when_no_mistake_was_found(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    with pytest.raises(ValueError, match="a mistake"), Terminal(log=log) as terminal:
        terminal.note("before")
        raise ValueError("a mistake")
    assert not log.exists()
    with pytest.raises(ValueError, match="a failure"), Terminal(log=log) as terminal:
        terminal.note("before")
        terminal.begin()
        assert log.read_text().endswith(" before\n")
        terminal.note("after")
        raise ValueError("a failure\nof two lines")
    assert [re.sub(TIME, "", line) for line in log.read_text().splitlines()] == [
        "before", "after", "ended: a failure of two lines",
    ]  # fmt: skip


def test_a_log_that_cannot_be_written_any_more_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "folder" / "run.log"
    log.parent.mkdir()
    with Terminal(log=log) as terminal:
        terminal.begin()
        log.parent.rmdir()
        terminal.note("one")
        terminal.note("two")
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {log} cannot be written any more (No such file or directory); the run goes on", "one", "two",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [("none/run.log", "there is no folder"), (".", "not a folder"), ("/proc/rarefy.log", "can be written")],
)
def test_a_log_that_cannot_be_written_is_found_at_once(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=f"--log is .*{words}"):
        Terminal(log=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# --- Progress ---------------------------------------------------------------------------------------------


def test_lines_now_and_then_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0)
    with Terminal() as terminal, terminal.watch("pruning") as watch:
        watch(1, 4, "a note")
        watch.layer(record(0, "up_proj"))
        watch(2, 4, "a note")
    assert capsys.readouterr().err.splitlines() == [
        "pruning: 1 of 4, 0:00 left, a note",
        "pruning: 2 of 4, 0:00 left, last model.layers.0.up_proj, relative error 0.0123",
        "pruning: done in 0:00",
    ]


def test_time_left_is_that_of_the_part_at_hand() -> None:
    part = module._Part(100)
    assert part.seconds_left(1, 2, 110) == 10  # a text of two windows
    assert part.seconds_left(2, 2, 120) == 0
    assert part.seconds_left(1, 5, 123) == 12  # then five items that take three seconds each
    assert part.seconds_left(2, 5, 126) == 9
    assert part.seconds_left(1, 5, 130) == 16  # another part of as many


def test_the_table_follows_the_blocks() -> None:
    linears = ["self_attn.q_proj", "mlp.up_proj"]
    table = LayerTable([(block, f"model.layers.{block}.{name}") for block in (2, 3) for name in linears])
    assert drawn(table)[0].strip() == "block 2 (1 of 2)"
    assert [line.split()[-1] for line in drawn(table)[2:]] == ["running", "mlp.up_proj"]
    table.done(record(2, "self_attn.q_proj"))
    lines = drawn(table)
    assert lines[0].strip() == "block 2 (1 of 2), 3.0 GiB of memory at most"
    assert lines[2].split() == ["self_attn.q_proj", "0.0123", "12", "1.50", "converged"]
    assert lines[3].split() == ["mlp.up_proj", "running"]
    table.done(record(2, "mlp.up_proj", error=1e-9, failed=True))
    assert drawn(table)[0].startswith("block 3 (2 of 2)")
    for name in linears:
        table.done(record(3, name))
    assert [line.split()[-1] for line in drawn(table)[2:]] == ["converged", "converged"]


def test_the_table_of_a_block_with_hundreds_of_linears_stays_short() -> None:
    names = [f"experts.{i}.up_proj" for i in range(200)]
    table = LayerTable([(0, f"model.layers.0.{name}") for name in names])
    for name in names[:100]:
        table.done(record(0, name))
    lines = drawn(table)
    assert len(lines) == 2 + module._MOST_ROWS
    assert any(line.split() == ["experts.100.up_proj", "running"] for line in lines)


def test_a_terminal_shows_the_running_linear(rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("TERM", "xterm-256color"),
        ("TTY_COMPATIBLE", "1"),
        ("FORCE_COLOR", "1"),
        ("COLUMNS", "110"),
    ):
        monkeypatch.setenv(name, value)
    done = rarefy_(*prune_arguments(shelf, "-o", "out"))
    assert done.status == 0, done.err
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.err)
    assert "block 0 (1 of 2)" in plain
    assert re.search(r"self_attn\.q_proj +running", plain)
    assert "┃ relative error ┃" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.out)  # the table of results


# --- Commands ---------------------------------------------------------------------------------------------


def test_prune_writes_a_log_and_can_be_quiet(rarefy_: Rarefy, shelf: Path, tmp_path: Path) -> None:
    done = rarefy_(*prune_arguments(shelf, "-o", "out", "--quiet", "--log", "run.log"))
    assert (done.status, done.err) == (0, "")
    assert "weights are zero" in done.out
    log = [re.sub(TIME, "", line) for line in Path("run.log").read_text().splitlines()]
    layers = [line for line in log if line.startswith("pruning: model.layers.")]
    assert len(layers) == 14
    assert all("relative error 0." in line for line in layers)
    assert log[0].startswith("calibration: 8 windows of 32 tokens")
    assert log[-1].endswith("out/model holds the model")


def test_eval_and_compare_write_a_log(rarefy_: Rarefy, shelf: Path) -> None:
    text = shelf / "text.txt"
    common = ("--text", text, "--max-windows", 2, "-q", "--log", "run.log")
    done = rarefy_("eval", shelf / "model", "--sequence-length", 32, *common)
    assert (done.status, done.err) == (0, "")
    assert f" {done.out}" in Path("run.log").read_text()
    arguments = ("--methods", "wanda", "--calibration", text, "--num-samples", 8, "--sequence-length", 32)
    done = rarefy_("compare", shelf / "model", "-o", "out", *arguments, "--eval-length", 32, *common)
    assert (done.status, done.err) == (0, "")
    log = Path("run.log").read_text()
    assert log.count("[1/1] wanda, row 50%, seed 0: pruning: model.layers.") == 14
    assert "[1/1] wanda, row 50%, seed 0: perplexity " in log


@pytest.mark.parametrize("more", [["--sparsity", "2"], ["--calibration", "gone.txt"], ["--pattern", "2:5"]])
def test_a_mistake_leaves_no_log(rarefy_: Rarefy, shelf: Path, tmp_path: Path, more: list[str]) -> None:
    done = rarefy_(*prune_arguments(shelf, "-o", "out", "--log", "run.log", *more))
    assert done.status == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["prune", "eval", "compare"])
def test_a_log_in_no_folder_is_a_mistake(rarefy_: Rarefy, shelf: Path, tmp_path: Path, command: str) -> None:
    more = {"prune": ["-o", "out"], "eval": [], "compare": ["-o", "out", "--methods", "wanda"]}[command]
    done = rarefy_(command, shelf / "model", *more, "--log", "none/run.log")
    assert is_one_sentence(done.err), done.err
    assert "--log is 'none/run.log', but must be a file in a folder that exists" in done.err
    assert done.status == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["prune", "shrink", "tune"])
@pytest.mark.parametrize("log", ["out/run.log", "out/model/run.log", "../{here}/out/run.log", "out", "link"])
def test_a_log_in_the_output_is_a_mistake(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, command: str, log: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out/run.log")
    more = ["--blocks", 1] if command == "shrink" else ["--against", shelf / "model"] if command == "tune" else []
    asked = (command, shelf / "model", "-o", "out", *more, "--calibration", shelf / "text.txt")
    done = rarefy_(*asked, "--log", log.format(here=tmp_path.name))
    assert (done.status, is_one_sentence(done.err)) == (2, True), done.err
    assert "a file outside of --output, which holds nothing but the run" in done.err
    assert {*tmp_path.iterdir()} == {tmp_path / "out", tmp_path / "link"}
    assert not any((tmp_path / "out").iterdir())


def test_a_failure_is_the_last_line_of_the_log(rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rarefy.runs.run.prune_blocks", interrupted)
    assert rarefy_(*prune_arguments(shelf, "-o", "out", "--log", "run.log")).status == 130
    assert Path("run.log").read_text().endswith(" ended: KeyboardInterrupt\n")


def test_what_both_models_write_stands_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    dense = [{"prompt": "One [b]", "text": " two\nthree"}, {"prompt": "Lost", "text": "never"}]
    pruned = [{"prompt": "One [b]", "text": " two two"}, {"prompt": "Found", "text": "never"}]
    print_texts({"dense_texts": dense, "texts": pruned}, "pruned")
    heading, row = (re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines() if "e" in line)
    assert heading == ["prompt", "dense", "pruned"]
    assert row == ["One [b]", "two three", "two two"]
    print_texts({"dense_texts": dense, "texts": []}, "pruned")
    assert capsys.readouterr().out == ""
