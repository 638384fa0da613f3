"""Sweeps: what they write, that cells share nothing they should not, that they go on, and what they refuse."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from cli_for_tests import Rarefy, is_one_sentence
from models_for_tests import make_model, make_tokenizer, save_folder
from rarefy.calibration.sources import parse_source
from rarefy.calibration.windows import draw_windows, token_stream
from rarefy.errors import InputError, ModelError
from rarefy.evaluation.perplexity import perplexity
from rarefy.layer.pattern import NM, Pattern, Unstructured
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution
from rarefy.methods import build
from rarefy.methods.base import Method
from rarefy.models.blocks import find_blocks
from rarefy.pruning.loop import prune, prune_model
from rarefy.report.build import write_report
from rarefy.runs import schema
from rarefy.sweeps import making
from rarefy.sweeps import sweep as module
from rarefy.sweeps.folder import SweepFolder
from rarefy.sweeps.options import Options
from rarefy.sweeps.plan import Plan, plan_sweep
from rarefy.sweeps.sweep import DenseWeights, run_sweep
from task_files import write_task_files
from test_shrink import deep

Folders = Callable[[str], Path]


@dataclass(frozen=True)
class Failing(Method):
    """A method of a user's own that has a mistake."""

    name: ClassVar[str] = "failing"
    summary: ClassVar[str] = "raises"

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        raise ZeroDivisionError("a mistake\nof two lines")


@pytest.fixture
def options(sweep_options: Options) -> Options:
    return replace(sweep_options, methods=["magnitude", "wanda"])


def sweep(options: Options, out: Path) -> list[dict[str, Any]]:
    folder = SweepFolder(out)
    return run_sweep(plan_sweep(options, folder), folder, ["rarefy", "compare", "a model"])


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- What it writes ---------------------------------------------------------------------------------------


def test_writes_a_table_with_one_row_per_cell_and_seed(options: Options, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cells = sweep(replace(options, seeds=2), out)
    rows = rows_of(out)
    assert len(cells) == len(rows) == 8
    keys = [(row["method"], row["pattern"], row["sparsity"], row["seed"]) for row in rows]
    assert keys == [
        (method, pattern, "0.5", str(seed))
        for seed in range(2)
        for method in ("magnitude", "wanda")
        for pattern in ("unstructured 50%" if method == "magnitude" else "row 50%", "2:4")
    ]
    for row in rows:
        assert row["status"] == "done"
        assert float(row["perplexity_words"]) > 1
        assert float(row["kl_words"]) > 0
        assert 0 <= float(row["agreement_words"]) <= 1
        assert float(row["relative_error"]) > 0
        assert float(row["seconds"]) > 0
        assert float(row["measured_sparsity"]) == 0.5
    written = json.loads((out / "results.json").read_text())
    assert len(written["cells"]) == 8
    assert written["dense"]["perplexity"][0]["label"] == "words"
    assert [one["seeds"] for one in written["summary"]] == [2] * 4
    markdown = (out / "results.md").read_text()
    assert "| dense |" in markdown
    assert markdown.count("±") > 4
    assert "rarefy compare 'a model'" in markdown
    assert not list(out.rglob("model"))


def test_a_cell_is_what_prune_and_perplexity_give(options: Options, tmp_path: Path, text: Path) -> None:
    """Also the last one: whatever came before left nothing behind."""
    sweep(replace(options, methods=["sparsegpt", "wanda"], seeds=2, save=True), tmp_path / "out")
    model = make_model("llama")
    tokens = token_stream(parse_source(str(text)), make_tokenizer())
    windows = draw_windows(tokens, 4, 16, 1)
    report = prune(model, windows, pattern=NM(2, 4), method=build("wanda"), batch_size=8)
    expected = perplexity(model, tokens, 32, max_windows=3).perplexity
    row = next(row for row in rows_of(tmp_path / "out") if list(row.values())[:4] == ["wanda", "2:4", "0.5", "1"])
    assert float(row["perplexity_words"]) == pytest.approx(expected, rel=1e-6)
    assert float(row["relative_error"]) == report.relative_error
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "cells" / "wanda_2of4_seed1" / "model")
    for name, parameter in model.named_parameters():
        assert torch.equal(saved.get_parameter(name), parameter), name
    card = (tmp_path / "out" / "cells" / "wanda_2of4_seed1" / "model" / "README.md").read_text()
    assert "Perplexity" in card


def test_a_text_column_is_that_of_the_calibration_and_of_the_texts(
    options: Options, tmp_path: Path, text: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text('id,body\n1,"' + text.read_text() + '"\n')
    folder = SweepFolder(tmp_path / "out")
    plain = plan_sweep(options, folder)
    for change in (
        {"calibration": str(rows)},
        {"texts": [f"words={rows}"]},
        {"calibration": str(rows), "texts": [f"words={rows}"]},
    ):
        plan = plan_sweep(replace(options, text_column="body", **change), folder)  # type: ignore[arg-type]
        assert plan.tokens is not None
        assert plain.tokens is not None
        assert torch.equal(plan.tokens, plain.tokens)
        assert torch.equal(plan.measures.corpora[0].tokens, plain.measures.corpora[0].tokens)
        assert plan.cells[0].recipe.text_column == ("body" if "calibration" in change else None)


def test_dense_weights_come_back_bit_for_bit() -> None:
    model = make_model("llama").bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = DenseWeights(find_blocks(model))
    prune(model, torch.randint(3, 100, (2, 16)), pattern=Unstructured(0.9), method=build("magnitude"))
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    weights.restore()
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_cells_of_a_seed_share_windows_and_seeds_do_not(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def watching(model: Any, windows: torch.Tensor, *more: Any) -> Any:
        seen.append(windows.clone())
        return prune_model(model, windows, *more)

    monkeypatch.setattr(making, "prune_model", watching)
    sweep(replace(options, seeds=2), tmp_path / "out")
    assert len(seen) == 8
    assert all(torch.equal(one, seen[0]) for one in seen[:4])
    assert all(torch.equal(one, seen[4]) for one in seen[4:])
    assert not torch.equal(seen[0], seen[4])


def test_the_models_own_text_and_defaults(
    model_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = Options(
        model=str(model_folder("llama")), methods=["wanda"], num_samples=2, sequence_length=16, max_windows=1
    )
    (cell,) = sweep(options, tmp_path / "out")
    assert cell["pattern"] == "row 50%"
    assert cell["perplexity"][0]["label"] == "python-docs"
    assert cell["perplexity"][0]["length"] == 128  # the model's context
    assert cell["calibration"]["source"] == "self"


def test_several_texts_have_columns_of_their_own(options: Options, tmp_path: Path, text: Path) -> None:
    other = tmp_path / "deep" / "words.txt"
    other.parent.mkdir()
    other.write_text(text.read_text().upper())
    texts = [str(text), str(other), f"named={text}"]
    sweep(replace(options, texts=texts, methods=["wanda"], patterns=[]), tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert [key for key in row if key.startswith("perplexity_")] == [
        "perplexity_words", "perplexity_deep-words", "perplexity_named",
    ]  # fmt: skip
    assert row["perplexity_words"] == row["perplexity_named"] != row["perplexity_deep-words"]


def test_settings_reach_their_method(options: Options, tmp_path: Path) -> None:
    asked = replace(options, methods=["sparsegpt", "wanda"], patterns=[], settings={"sparsegpt.damping": "0.5"})
    sweep(asked, tmp_path / "out")
    recipe = (tmp_path / "out" / "cells" / "sparsegpt_layer-0.5_seed0" / "recipe.yaml").read_text()
    assert "damping: 0.5" in recipe
    with pytest.raises(InputError, match="--set"):
        plan_sweep(replace(asked, settings={"damping": "0.5"}), SweepFolder(tmp_path / "new"))


# --- Failing and going on ---------------------------------------------------------------------------------


def test_a_failing_cell_is_recorded_and_the_others_go_on(options: Options, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = replace(options, methods=["wanda", "test_sweeps:Failing", "magnitude"], patterns=[])
    cells = sweep(asked, out)
    assert [cell["status"] for cell in cells] == ["done", "failed", "done"]
    failed = rows_of(out)[1]
    assert failed["reason"] == "ZeroDivisionError: a mistake of two lines"
    assert failed["perplexity_words"] == ""
    assert "ZeroDivisionError: a mistake of two lines" in (out / "results.md").read_text()
    good = rows_of(out)[2]
    sweep(replace(asked, methods=["magnitude"]), tmp_path / "alone")
    assert good["perplexity_words"] == rows_of(tmp_path / "alone")[0]["perplexity_words"]


def test_a_failed_cell_is_only_tried_again_on_request(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(options, methods=["test_sweeps:Failing"], patterns=[])
    sweep(asked, tmp_path / "out")
    monkeypatch.setattr(
        Failing, "solve", lambda _, problem, pattern, start: build("magnitude").solve(problem, pattern)
    )
    assert sweep(asked, tmp_path / "out")[0]["status"] == "failed"
    assert sweep(replace(asked, retry=True), tmp_path / "out")[0]["status"] == "done"


def test_what_is_finished_is_not_computed_again(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = sweep(options, out)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.*")}

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_model", never)
        assert sweep(options, out) == first
    more = sweep(replace(options, methods=["magnitude", "wanda", "ria"]), out)
    assert [cell["method"] for cell in more] == ["magnitude"] * 2 + ["wanda"] * 2 + ["ria"] * 2
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    fewer = sweep(replace(options, methods=["ria"]), out)
    assert len(fewer) == 6


@pytest.mark.slow
def test_a_killed_sweep_goes_on(model_folder: Folders, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "rarefy", "compare", str(model_folder("llama")), "-o", str(out)]
    command += ["--methods", "wanda,sparsegpt,magnitude", "--sparsity", "0.5", "--pattern", "2:4", "--seeds", "2"]
    command += ["--calibration", str(text), "--num-samples", "4", "--sequence-length", "16"]
    command += ["--text", str(text), "--eval-length", "32"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(out.glob("cells/[!.]*_seed*/run.json"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("cells/[!.]*/run.json")}
    assert 3 < len(finished) < 13
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cells are there already" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    rows = rows_of(out)
    assert len(rows) == 12
    assert {row["status"] for row in rows} == {"done"}
    assert not list(out.glob("cells/.*"))


def test_what_a_killed_command_left_is_cleared_away(options: Options, tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = out / "cells" / ".wanda_2of4_seed0.0123abcd.partial"
    sweep(replace(options, methods=["magnitude"], patterns=[]), out)
    for folder in (left, out / "cells" / ".theirs"):
        folder.mkdir()
        (folder / "run.json").write_text("{")
    assert len(sweep(options, out)) == 4
    assert not left.exists()
    assert (out / "cells" / ".theirs" / "run.json").exists()


# --- Several processes in one folder ----------------------------------------------------------------------


def test_a_cell_that_another_process_holds_is_left_to_it(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one whose process was killed before it was done is taken over in the end."""
    out = tmp_path / "out"
    folder, other = SweepFolder(out), SweepFolder(out)
    plan = plan_sweep(options, folder)
    names = [cell.name for cell in plan.cells]
    (out / "cells").mkdir(parents=True)
    with other.claim(names[1]) as held:
        assert held
        with folder.claim(names[1]) as twice:
            assert not twice
        cells = run_sweep(plan, folder)
    assert [cell["cell"] for cell in cells] == [names[0], *names[2:]]
    # It ends while this process computes the cells behind, and did not write the cell.
    folder = SweepFolder(tmp_path / "second")
    folder.cells.mkdir(parents=True)
    claims = ExitStack()
    claims.enter_context(SweepFolder(folder.path).claim(names[1]))
    free_at_the_last(monkeypatch, names[3], claims)
    cells = run_sweep(plan_sweep(options, folder), folder)
    assert [cell["cell"] for cell in cells] == names
    assert not list(folder.cells.glob(".*"))


def free_at_the_last(monkeypatch: pytest.MonkeyPatch, last: str, claims: ExitStack) -> None:
    """Let go of the claims where the cell called ``last`` is written."""
    write_cell = SweepFolder.write_cell

    def write(self: SweepFolder, name: str, fill: Callable[[Any], None]) -> None:
        if name == last:
            claims.close()
        write_cell(self, name, fill)

    monkeypatch.setattr(SweepFolder, "write_cell", write)


def test_a_cell_that_another_process_finished_meanwhile_is_not_computed_again(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    folder = SweepFolder(out)
    plan = plan_sweep(options, folder)
    made: list[str] = []
    of = making.Making.of

    def with_another(self: Any, cell: Any, label: str) -> Any:
        made.append(cell.name)
        if len(made) == 1:  # all others are computed while this one is
            assert len(run_sweep(plan, SweepFolder(out))) == 3
        return of(self, cell, label)

    monkeypatch.setattr(making.Making, "of", with_another)
    cells = run_sweep(plan, folder)
    assert sorted(made) == sorted(cell.name for cell in plan.cells)
    assert [cell["cell"] for cell in cells] == [cell.name for cell in plan.cells]
    assert len(rows_of(out)) == 4


def test_two_definitions_of_one_row_are_refused_before_a_cell_is_finished(options: Options, tmp_path: Path) -> None:
    file, folder = tmp_path / "rows.toml", SweepFolder(tmp_path / "out")
    plans = []
    for method in ("sparsegpt", "magnitude"):
        file.write_text(f'["X"]\nmethod = "{method}"\n')
        plans.append(plan_sweep(replace(options, methods=[], systems=file), folder))

    def begin(plan: Plan) -> None:
        wanted = {(cell.method, cell.asked) for cell in plan.cells}
        folder.begin({"settings": dict(plan.settings)}, plan.rows, wanted, [])

    begin(plans[0])
    begin(plans[0])
    with pytest.raises(InputError, match='holds a sweep in which "X" was defined otherwise'):
        begin(plans[1])
    with pytest.raises(InputError, match='"X" was defined otherwise'):
        plan_sweep(replace(options, methods=[], systems=file), folder)


def test_what_killed_processes_left_anywhere_is_cleared_away(options: Options, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = replace(options, methods=["magnitude"], patterns=[])
    sweep(asked, out)
    (finished,) = [path.name for path in (out / "cells").glob("magnitude*")]
    left = [".compare.json.0123abcd.partial", ".results.csv.0123abcd.partial", f"cells/.{finished}.lock"]
    left += ["cells/.wanda_of_another_command.lock", "cells/.wanda_of_another_command.0123abcd.partial"]
    for name in left:
        (out / name).write_text("")
    with SweepFolder(out).claim("ria") as held:
        assert held
        (out / "cells" / ".ria.0123abcd.partial").mkdir()
        sweep(asked, out)
        assert (out / "cells" / ".ria.0123abcd.partial").is_dir()  # its process is alive
    assert [name for name in left if (out / name).exists()] == []


def test_the_dense_model_is_measured_by_one_process(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for it, and measure it themselves where that process was killed."""
    folder = SweepFolder(tmp_path / "out")
    folder.cells.mkdir(parents=True)
    held, notes = ExitStack(), []
    held.enter_context(SweepFolder(folder.path).claim("dense"))

    def note(text: str) -> None:
        notes.append(text)
        held.close()

    plan = plan_sweep(replace(options, methods=["magnitude"], patterns=[]), folder)
    run_sweep(plan, folder, note=note)
    assert notes[0] == "another process measures the dense model, for which this one waits"
    assert [text.split(":")[0] for text in notes].count("dense") == 1


def test_a_cell_that_is_tried_again_elsewhere_is_gone_for_a_moment(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SweepFolder(tmp_path / "out")
    sweep(options, folder.path)
    found = {cell["cell"] for cell in folder.finished()}
    gone = min(found)
    read = schema.read_facts

    def late(path: Path, kind: Any) -> Any:
        if path.parent.name == gone and path.is_file():
            path.parent.rename(folder.path / "aside")
        return read(path, kind)

    monkeypatch.setattr(schema, "read_facts", late)
    assert {cell["cell"] for cell in folder.finished()} == found - {gone}


def test_what_other_processes_compute_is_said_with_the_table(rarefy_: Rarefy, options: Options) -> None:
    out = Path("out")
    (out / "cells").mkdir(parents=True)
    asked = [
        "compare",
        options.model,
        "-o",
        out,
        "--methods",
        "magnitude,wanda",
        "--calibration",
        options.calibration,
    ]
    asked += ["--num-samples", 4, "--sequence-length", 16, "--text", options.texts[0], "--eval-length", 32, "-q"]
    with SweepFolder(out).claim("wanda_row-0.5_seed0"):
        done = rarefy_(*asked)
    assert done.status == 0, done.err
    assert "not there yet: 1 of 2 cells, which other processes compute" in done.out
    assert "not there yet" not in rarefy_(*asked).out


def test_all_commands_that_have_worked_in_a_folder_are_in_its_results(options: Options, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "out")
    for number, method in enumerate(("magnitude", "wanda", "wanda")):
        asked = replace(options, methods=[method], patterns=[])
        run_sweep(plan_sweep(asked, folder), folder, ["rarefy", "compare", str(min(number, 1))])
    assert "```\nrarefy compare 0\nrarefy compare 1\n```" in (folder.path / "results.md").read_text()
    assert json.loads((folder.path / "results.json").read_text())["commands"] == [
        "rarefy compare 0",
        "rarefy compare 1",
    ]
    write_report([folder.path])
    assert "rarefy compare 0\nrarefy compare 1" in (folder.path / "report.html").read_text()


def test_another_sweep_that_began_meanwhile_is_refused(options: Options, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "out")
    plan = plan_sweep(options, folder)
    sweep(replace(options, methods=["magnitude"], patterns=[], max_windows=2), folder.path)
    with pytest.raises(InputError, match="--max-windows was 2 and is 3 now"):
        run_sweep(plan, folder)


@pytest.mark.slow
def test_two_processes_share_a_sweep(model_folder: Folders, tmp_path: Path, text: Path) -> None:
    command = [sys.executable, "-m", "rarefy", "compare", str(model_folder("llama"))]
    command += [
        "--methods",
        "wanda,sparsegpt,magnitude,alps",
        "--sparsity",
        "0.5",
        "--pattern",
        "2:4",
        "--seeds",
        "3",
    ]
    command += ["--calibration", str(text), "--num-samples", "4", "--sequence-length", "16"]
    command += ["--text", str(text), "--eval-length", "32", "-o"]
    both = [
        subprocess.Popen([*command, str(tmp_path / "both")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    notes = [process.communicate()[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(note.count("perplexity") > 1 for note in notes)
    assert sum(note.count("] ") for note in notes) >= 24
    subprocess.run([*command, str(tmp_path / "one")], capture_output=True, check=True)
    measured = [
        [{key: value for key, value in row.items() if "seconds" not in key and "peak" not in key} for row in rows]
        for rows in (rows_of(tmp_path / "both"), rows_of(tmp_path / "one"))
    ]
    assert measured[0] == measured[1]
    assert len(measured[0]) == 24


# --- What it refuses --------------------------------------------------------------------------------------


def test_another_command_is_refused_with_the_difference(
    options: Options, tmp_path: Path, text: Path, model_folder: Folders
) -> None:
    out = tmp_path / "out"
    asked = replace(options, methods=["magnitude"], patterns=[])
    sweep(asked, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "more")
    for change, words in (
        ({"model": str(model_folder("mistral"))}, r"MODEL was .*llama.* and is .*mistral.* now"),
        ({"calibration": "python-docs"}, r"--calibration was .*words.txt and is python-docs now"),
        ({"calibration": str(other)}, r"--calibration was .*words.txt and is .*other.txt now"),
        ({"num_samples": 5}, r"--num-samples was 4 and is 5 now"),
        ({"texts": [str(text), str(other)]}, r"--text was .*words.txt and is .*words.txt,.*other.txt now"),
        ({"eval_length": 16}, r"--eval-length was 32 and is 16 now"),
        ({"max_windows": None}, r"--max-windows was 3 and is not given now"),
        ({"dtype": "bfloat16"}, r"--dtype was auto and is bfloat16 now"),
    ):
        with pytest.raises(InputError, match=words):
            plan_sweep(replace(asked, **change), SweepFolder(out))  # type: ignore[arg-type]
    text.write_text(text.read_text() + "more")
    with pytest.raises(InputError, match="the text of --calibration changed|the contents of --text"):
        plan_sweep(asked, SweepFolder(out))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_changed_weights_are_noticed(options: Options, tmp_path: Path) -> None:
    folder = save_folder(make_model("llama", seed=1), tmp_path / "model")
    asked = replace(options, model=str(folder), methods=["magnitude"], patterns=[])
    sweep(asked, tmp_path / "out")
    save_folder(make_model("llama", seed=2), folder)
    with pytest.raises(InputError, match="the weights of MODEL changed"):
        plan_sweep(asked, SweepFolder(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": []}, "--methods is missing"),
        ({"methods": ["wandaa"]}, r"^--methods is 'wandaa'.*did you mean wanda"),
        ({"methods": ["wanda", "wanda"]}, "--methods names wanda twice"),
        ({"sparsities": ["1.5"]}, r"--sparsity is 1.5"),
        ({"sparsities": ["half"]}, r"--sparsity is 'half'"),
        ({"patterns": ["4:2"]}, r"--pattern is '4:2'"),
        ({"patterns": ["3:5"]}, r"model.layers.0.*5"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"sparsities": [], "scope": "row"}, "--scope goes with --sparsity"),
        ({"scope": "column"}, "--scope is 'column'"),
        ({"model": "./nowhere"}, "no folder"),
        ({"model": ""}, "MODEL"),
        ({"texts": ["missing.txt"]}, r"--text: 'missing.txt' does not exist"),
        ({"calibration": "missing.txt"}, r"--calibration: 'missing.txt' does not exist"),
        ({"eval_length": 1}, "--eval-length is 1"),
        ({"eval_length": 1000}, "--eval-length is 1000, but must be at most 128"),
        ({"sequence_length": 1000}, "--sequence-length is 1000, but must be at most 128"),
        ({"max_windows": 0}, "--max-windows is 0"),
        ({"limit": 0}, "--limit is 0"),
        ({"limit": 1.5}, "--limit is 1.5, but must be a whole number of at least 1, or a fraction"),
        ({"text_column": "body"}, "--text-column is 'body', but must be left out, because no text has columns"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"dtype": "int4"}, "--dtype is 'int4'"),
        ({"include": ["nothing"]}, "include is 'nothing'"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    options: Options, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        plan_sweep(replace(options, **change), SweepFolder(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_empty_text_missing_tokenizer_and_a_full_folder(options: Options, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(InputError, match=r"empty.txt' is empty"):
        plan_sweep(replace(options, texts=[str(empty)]), SweepFolder(tmp_path / "out"))
    short = tmp_path / "short.txt"
    short.write_text("short")
    with pytest.raises(InputError, match=r"has \d+ tokens, but one window needs 32"):
        plan_sweep(replace(options, texts=[str(short)]), SweepFolder(tmp_path / "out"))
    make_model("llama").save_pretrained(tmp_path / "mute")
    with pytest.raises(InputError, match="no tokenizer"):
        plan_sweep(replace(options, model=str(tmp_path / "mute")), SweepFolder(tmp_path / "out"))
    with pytest.raises(InputError, match="not empty"):
        plan_sweep(options, SweepFolder(tmp_path))


def test_two_texts_of_one_label(options: Options, tmp_path: Path, text: Path) -> None:
    with pytest.raises(InputError, match="label words"):
        plan_sweep(replace(options, texts=[f"words={text}", f"words={text}"]), SweepFolder(tmp_path / "out"))


def test_a_damaged_folder_is_a_sentence(options: Options, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text("{")
    with pytest.raises(InputError, match="compare.json cannot be read"):
        plan_sweep(options, SweepFolder(tmp_path / "out"))


# --- Smaller models ---------------------------------------------------------------------------------------


def test_sparse_and_smaller_models_in_one_table(options: Options, text: Path, tmp_path: Path) -> None:
    model = save_folder(deep("llama", 4), tmp_path / "model")
    methods = ["wanda", "shrink:blocks", "shrink:neurons:single", "shrink:heads", "shrink:search:kl"]
    asked = replace(options, model=str(model), methods=methods, patterns=[], sizes=["0.75"], save=True)
    asked = replace(asked, settings={"shrink.multiple": "16", "shrink.repair": "false", "shrink.steps": "9"})
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"--size is 0.75, but must be a share of at least 0\.\d+, as heads go no"):
        plan_sweep(asked, SweepFolder(out))
    asked = replace(asked, methods=[one for one in methods if one != "shrink:heads"])
    cells = sweep(asked, out)
    assert [(cell["method"], cell["pattern"]) for cell in cells] == [
        ("wanda", "row 50%"),
        *((one, "75% of the parameters") for one in asked.methods[1:]),
    ]
    whole = deep("llama", 4).num_parameters()
    assert all(cell["status"] == "done" for cell in cells), [cell["reason"] for cell in cells]
    for cell in cells[1:]:
        small = AutoModelForCausalLM.from_pretrained(out / "cells" / cell["cell"] / "model")
        assert small.num_parameters() == whole * (1 - cell["sparsity"])
        assert 1 - cell["sparsity"] <= 1 - cell["asked_sparsity"]
        tokens = token_stream(parse_source(str(text)), make_tokenizer())
        (measured,) = cell["perplexity"]
        assert perplexity(small, tokens, 32, max_windows=3).perplexity == pytest.approx(measured["value"], rel=1e-4)
    # Cells share nothing: alone, a later one is the same.
    (alone,) = sweep(replace(asked, methods=["shrink:neurons:single"], sparsities=[]), tmp_path / "alone")
    assert alone["perplexity"] == cells[2]["perplexity"]
    recipe = yaml.safe_load((out / "cells" / cells[1]["cell"] / "recipe.yaml").read_text())
    assert recipe["blocks"] == len(cells[1]["shrink"]["blocks"]["removed"])
    assert "size" not in recipe
    rows = {(row["method"], row["sparsity"]): row for row in rows_of(out)}
    assert float(rows["shrink:search:kl", "0.25"]["seconds"]) > 0
    assert "Of smaller models, sparsity is the share of the parameters that went." in (out / "results.md").read_text()
    again = [cell["started"] for cell in sweep(asked, out)]
    assert again == [cell["started"] for cell in cells]  # nothing is computed twice
    write_report([out])
    page = (out / "report.html").read_text()
    assert "shrink:search:kl" in page
    assert "<td>shrink:search:kl</td><td>75% of the parameters</td><td>0</td><td>0</td>" not in page  # no zeros


def test_a_weight_that_is_no_number_is_named_before_a_model_becomes_smaller(options: Options, tmp_path: Path) -> None:
    model = deep("llama", 3)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    folder = save_folder(model, tmp_path / "nan")
    asked = replace(options, model=str(folder), methods=["shrink:blocks"], patterns=[], sparsities=[], sizes=["0.75"])
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight of .* has NaN or infinity"):
        sweep(asked, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ["shrink:rows"]}, "--methods is 'shrink:rows', but must be shrink:blocks, shrink:heads"),
        ({"methods": ["shrink"]}, "--methods is 'shrink', but must be shrink:blocks"),
        ({"methods": ["shrink:blocks:"]}, "--methods is 'shrink:blocks:', but must be shrink:blocks, shrink:heads"),
        ({"seeds": 10**9}, "--seeds is 1000000000, but must be a whole number from 1 to 1,000"),
        ({"methods": ["shrink:blocks:luck"]}, "names shrink:blocks:luck, of which the rule must be kl, perplexity"),
        ({"methods": ["shrink:heads:kl"]}, "names shrink:heads:kl, of which the rule must be interactions, single"),
        ({"sizes": []}, "--size is missing: the shares of the parameters"),
        ({"sizes": ["1.5"]}, "--size is 1.5, but must be a share between 0 and 1"),
        ({"sizes": ["0.9", "0.9"]}, "--size names 0.9 twice"),
        ({"sizes": ["0.9", "0.8", "0.90"]}, "--size names 0.9 twice"),
        ({"settings": {"shrink.num_samples": "2"}}, "--set names shrink.num_samples, which the options of the sweep"),
        ({"settings": {"shrink.seed": "2"}}, "--set names shrink.seed, which the options of the sweep say"),
        ({"methods": ["wanda"]}, "--size goes with methods that make the model smaller"),
        ({"sparsities": ["0.5"]}, "--sparsity goes with methods that prune"),
        ({"patterns": ["2:4"]}, "--pattern goes with methods that prune"),
        ({"include": ["*"]}, "--include goes with methods that prune"),
        ({"settings": {"shrink.luck": "1"}}, "luck"),
        (
            {"settings": {"shrink.multiple": "0"}},
            "--set shrink.multiple is 0, but must be a whole number of at least",
        ),
    ],
)
def test_mistakes_in_sweeps_of_smaller_models(
    options: Options, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    asked = replace(options, methods=["shrink:blocks"], sparsities=[], patterns=[], sizes=["0.9"])
    with pytest.raises(InputError, match=words):
        plan_sweep(replace(asked, **change), SweepFolder(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- The command ------------------------------------------------------------------------------------------


def test_the_command(rarefy_: Rarefy, model_folder: Folders, tmp_path: Path, text: Path) -> None:
    arguments = ["compare", str(model_folder("llama")), "-o", str(tmp_path / "out"), "--methods", "wanda, magnitude"]
    arguments += ["--sparsity", "0.5,0.6", "--pattern", "2:4", "--calibration", str(text), "--num-samples", "4"]
    arguments += ["--sequence-length", "16", "--text", str(text), "--eval-length", "32", "--max-windows", "2"]
    printed = rarefy_(*arguments)
    assert printed.status == 0, printed.err
    assert len([line for line in printed.out.splitlines() if line.startswith(("wanda", "magnitude"))]) == 6
    assert "[6/6] magnitude, 2:4, seed 0: perplexity" in printed.err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["commands"][0].startswith("rarefy compare ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "--methods is missing: name one or more, such as magnitude,wanda,sparsegpt, or a file of --systems"),
        ("--methods wandaa", "--methods is 'wandaa', but must be"),
        ("--methods pcg", "cannot come first: write for example wanda+pcg"),
        ("--methods wanda --sparsity 0.5,1.5", "--sparsity is 1.5, but must be a number in [0, 1)"),
        ("--methods wanda --sparsity 0.5,", "--sparsity is '', but must be"),
        ("--methods wanda --pattern 4:2", "--pattern is '4:2', but must be N:M"),
        ("--methods wanda --seeds 0", "'--seeds'"),
        ("--methods wanda --set damping=1", "--set is 'damping', but must be METHOD.KEY=VALUE"),
        ("--methods wanda --text SHELF/empty.txt", "empty.txt' is empty"),
        ("--methods wanda --text a=SHELF/text.txt --text a=SHELF/text.txt", "two texts the label a"),
        ("--methods wanda --text SHELF/short.txt", "one window needs 128"),
        ("--methods wanda --calibration SHELF/missing.txt", "missing.txt' does not exist"),
        ("--methods wanda --device abacus", "--device is 'abacus', but must be"),
        ("--methods wanda --output SHELF/no_model", "this one is not empty"),
        ("--methods wanda --limit 3", "--limit goes with --tasks"),
        ("--methods wanda --task-data SHELF", "--task-data goes with --tasks"),
    ],
)
def test_every_mistake_in_the_command_is_one_sentence(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, arguments: str, sentence: str
) -> None:
    words = arguments.replace("SHELF", str(shelf)).split()
    done = rarefy_("compare", shelf / "model", "-o", "out", *words)
    assert is_one_sentence(done.err), done.err
    assert sentence in done.err
    assert (done.status, done.out) == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_tokenizer_cannot_be_compared(rarefy_: Rarefy, shelf: Path, tmp_path: Path) -> None:
    done = rarefy_("compare", shelf / "mute", "-o", "out", "--methods", "wanda")
    assert is_one_sentence(done.err), done.err
    assert "has no tokenizer" in done.err
    assert (done.status, list(tmp_path.iterdir())) == (2, [])


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs pip install 'rarefy[tasks]'")
@pytest.mark.filterwarnings("ignore")
def test_tasks_of_a_sweep(rarefy_: Rarefy, shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = write_task_files(tmp_path_factory.mktemp("tasks"))
    text = shelf / "text.txt"
    common = ("compare", shelf / "model", "--methods", "wanda", "--calibration", text, "--num-samples", 4)
    common += ("--sequence-length", 16, "--text", text, "--eval-length", 32, "--max-windows", 2, "--task-data", data)
    for name, sentence in (("arc_eazy", "did you mean arc_easy?"), ("piqa,piqa", "names piqa twice")):
        done = rarefy_(*common, "-o", "out", "--tasks", name)
        assert is_one_sentence(done.err), done.err
        assert sentence in done.err
        assert not Path("out").exists()
    done = rarefy_(*common, "-o", "out", "--tasks", "piqa,arc_easy", "--limit", 3)
    assert done.status == 0, done.err
    (row,) = rows_of(Path("out"))
    assert 0 <= float(row["piqa_acc"]) <= 1
    assert 0 <= float(row["arc_easy_acc_stderr"]) < 1
    assert "piqa accuracy" in Path("out/results.md").read_text()
    done = rarefy_(*common, "-o", "half", "--tasks", "piqa,arc_easy", "--limit", 0.5)
    assert done.status == 0, done.err
    assert "by lm-eval, the first 50% of the items of each." in Path("half/results.md").read_text()
    (data / "piqa_valid_labels.lst").write_text("1\n1\n1\n0\n1\n")
    done = rarefy_(*common, "-o", "out", "--tasks", "piqa,arc_easy", "--limit", 3)
    assert "the files of --task-data changed" in done.err
    assert done.status == 2
