"""Systems of a comparison: what a file of them may say, which cells it makes, and that a cell is what a run gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import rarefy
from cli_for_tests import Rarefy, is_one_sentence
from models_for_tests import save_folder
from rarefy.errors import InputError, VerificationError
from rarefy.report.build import write_report
from rarefy.runs import tune_in_memory as in_memory
from rarefy.runs.tune import tune
from rarefy.sweeps.folder import SweepFolder
from rarefy.sweeps.options import Options
from rarefy.sweeps.plan import Plan, plan_sweep
from rarefy.sweeps.sweep import run_sweep
from test_shrink import deep

Folders = Callable[[str], Path]


@pytest.fixture
def options(sweep_options: Options) -> Options:
    return sweep_options


def write(folder: Path, content: str, name: str = "systems.toml") -> Path:
    file = folder / name
    file.write_text(content)
    return file


def plan(options: Options, out: Path) -> Plan:
    return plan_sweep(options, SweepFolder(out))


def sweep(options: Options, out: Path) -> list[dict[str, Any]]:
    folder = SweepFolder(out)
    return run_sweep(plan_sweep(options, folder), folder, ["rarefy", "compare", "a model"])


def assert_same_model(folder: Path, other: Path) -> None:
    one, two = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (folder, other))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


# --- Cells are what runs give -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ({"match": 2, "drift": 0.25, "rotate": True}, {"sparsity": "0.5"}),
        ({"permute": True, "refresh": True}, {"pattern": "2:4"}),
        ({"method": "sparsegpt", "allocation": "owl", "row_weights": "fisher"}, {"sparsity": "0.5"}),
        ({"barber": "signed", "barber_share": 0.2, "barber_refit": False}, {"pattern": "2:4"}),
        ({"along": "neurons", "method": "dass", "include": ["*.mlp.*"]}, {"pattern": "2:4"}),
    ],
    ids=lambda value: "-".join(value),
)
def test_a_cell_with_steps_is_what_prune_gives(
    said: dict[str, Any], place: dict[str, str], options: Options, text: Path, tmp_path: Path
) -> None:
    """As options of all cells and as a system; also behind another cell, which leaves nothing behind."""
    values = {"method": "wanda", **said}
    keys = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    file = write(tmp_path, f'["before"]\nmethod = "magnitude"\nrotate = true\n["mine"]\n{keys}\n')
    axes = {"sparsities": [place["sparsity"]] if "sparsity" in place else [], "patterns": [*place.values()]}
    axes["patterns"] = axes["patterns"] if "pattern" in place else []
    asked = replace(options, systems=file, save=True, **axes)  # type: ignore[arg-type]
    before, mine = sweep(asked, tmp_path / "systems")
    assert (before["method"], mine["method"], mine["status"]) == ("before", "mine", "done"), mine["reason"]
    recipe = {
        "model": options.model,
        "calibration": str(text),
        "num_samples": 4,
        "sequence_length": 16,
        "dtype": "auto",
    }
    rarefy.run({**recipe, **values, **place}, tmp_path / "run", texts=False)
    assert_same_model(tmp_path / "systems" / "cells" / mine["cell"] / "model", tmp_path / "run" / "model")
    loop = {key: value for key, value in said.items() if key not in ("method", "include")}
    asked = replace(asked, systems=None, methods=[values["method"]], include=said.get("include", []), loop=loop)
    (cell,) = sweep(asked, tmp_path / "options")
    assert cell["perplexity"] == mine["perplexity"]
    assert cell["peak_bytes"] > 0


@pytest.mark.parametrize(("form", "rate"), [("full", 1e-3), ("lora", 1e-2)])
def test_a_tuned_cell_is_what_prune_and_tune_give(
    form: str, rate: float, options: Options, text: Path, tmp_path: Path
) -> None:
    words = f'tune = {{epochs = 2, learning_rate = {rate}, parametrisation = "{form}"}}'
    file = write(tmp_path, f'["tuned"]\nmethod = "wanda"\n{words}\n["plain"]\nmethod = "wanda"\n')
    model = save_folder(deep("llama", 2).bfloat16(), tmp_path / "model")
    asked = replace(options, model=str(model), systems=file, patterns=[], save=True)
    tuned, plain = sweep(asked, tmp_path / "out")
    assert [tuned["status"], plain["status"]] == ["done", "done"], tuned["reason"]
    recipe = {"model": str(model), "method": "wanda", "sparsity": 0.5, "calibration": str(text)}
    rarefy.run({**recipe, "num_samples": 4, "sequence_length": 16}, tmp_path / "run", texts=False)
    tune(
        {"model": str(tmp_path / "run"), "epochs": 2, "learning_rate": rate, "parametrisation": form}, tmp_path / "on"
    )
    cells = tmp_path / "out" / "cells"
    assert_same_model(cells / tuned["cell"] / "model", tmp_path / "on" / "model")
    assert_same_model(cells / plain["cell"] / "model", tmp_path / "run" / "model")  # the dense model came back
    facts = json.loads((tmp_path / "on" / "run.json").read_text())["tuning"]
    for key in ("curve", "measurements", "best_step", "written", "trained", "teacher"):
        assert tuned["tuning"][key] == facts[key], key
    assert tuned["tuning"]["zeros"] == tuned["pruned"]
    assert set(tuned["seconds"]) == {"record", "prune", "tune", "evaluate"}
    assert tuned["tuning"]["best_step"] > 0  # else the tuned model is the one before
    assert tuned["perplexity"] != plain["perplexity"]
    written = (tmp_path / "out" / "results.md").read_text()
    assert "| seconds | seconds of tuning | peak GB |" in written


def test_a_mask_that_changed_fails_the_cell(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, '["tuned"]\nmethod = "wanda"\ntune = {max_steps = 1}\n')

    def fill(model: Any, *_: Any) -> int:
        model.model.layers[0].mlp.up_proj.weight.fill_(1.0)
        return 0

    monkeypatch.setattr(in_memory, "round_as_stored_", fill)
    (cell,) = sweep(replace(options, systems=file, patterns=[]), tmp_path / "out")
    assert cell["status"] == "failed"
    assert cell["reason"].startswith(VerificationError.__name__)


# --- Which cells there are --------------------------------------------------------------------------------


SYSTEMS = """
["DaSS"]
method = "dass"
along = "neurons"
include = ["*.mlp.*"]

["ALPS, ordered"]
method = "alps"
permute = true

["OWL"]
method = "sparsegpt"
settings = {damping = 0.1}
allocation = "owl"

["Wanda, only 2:4"]
method = "wanda"
scope = "row"
sparsities = []
patterns = ["2:4"]
"""


def test_systems_beside_methods_and_what_is_left_out(options: Options, tmp_path: Path) -> None:
    asked = replace(options, systems=write(tmp_path, SYSTEMS), methods=["magnitude"], seeds=2, save=False)
    planned = plan(asked, tmp_path / "out")
    assert [(cell.method, cell.asked) for cell in planned.cells if cell.seed == 1] == [  # type: ignore[union-attr]
        ("magnitude", "50%"),
        ("magnitude", "2:4"),
        ("DaSS", "50%"),
        ("DaSS", "2:4"),
        ("ALPS, ordered", "2:4"),
        ("OWL", "50%"),
        ("Wanda, only 2:4", "2:4"),
    ]
    assert len({cell.name for cell in planned.cells}) == 14
    assert [cell.pattern for cell in planned.cells[2:4]] == ["unstructured 50%", "2:4 of neurons"]
    assert len(planned.cells[2].linears) < len(planned.cells[0].linears)  # type: ignore[union-attr]
    assert planned.cells[5].recipe.settings["damping"] == 0.1  # type: ignore[union-attr]
    reasons = {(one.name, one.asked): one.reason for one in planned.left_out}
    assert "permute" in reasons["ALPS, ordered", "50%"]
    assert "steps" in reasons["OWL", "2:4"]
    assert "limited" in reasons["Wanda, only 2:4", "50%"]
    assert len(reasons) == 3


def test_a_sweep_of_systems_goes_on_and_shows_what_is_left_out(options: Options, tmp_path: Path) -> None:
    out, file = tmp_path / "out", write(tmp_path, SYSTEMS)
    first = sweep(replace(options, systems=file, patterns=[]), out)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.*")}
    cells = sweep(replace(options, systems=file), out)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (len(first), len(cells)) == (2, 5)
    written = json.loads((out / "results.json").read_text())
    assert {one["name"] for one in written["left_out"]} == {"ALPS, ordered", "OWL", "Wanda, only 2:4"}
    markdown = (out / "results.md").read_text()
    assert "## Perplexity words" in markdown
    assert "| method | 50% | 2:4 |" in markdown
    assert "| ALPS, ordered | left out |" in markdown
    assert "- OWL, 2:4: " in markdown
    # A later command on the folder, of another file, knows why.
    other = write(tmp_path, '["more"]\nmethod = "magnitude"\nsparsities = [0.5]\npatterns = []\n')
    sweep(replace(options, systems=other, patterns=[]), out)
    markdown = (out / "results.md").read_text()
    assert "| ALPS, ordered | left out |" in markdown
    assert "- OWL, 2:4: " in markdown
    write_report([out])
    assert ">left out<" in (out / "report.html").read_text()
    (row,) = [line for line in markdown.splitlines() if line.startswith("| more |") and line.count("|") == 4]
    assert row.endswith(" |  |")  # not computed yet
    assert '- more: `method = "magnitude"`' in markdown
    write(tmp_path, SYSTEMS.replace("damping = 0.1", "damping = 0.2"))
    with pytest.raises(InputError, match='holds a sweep in which "OWL" was defined otherwise'):
        plan(replace(options, systems=file), out)
    write(tmp_path, SYSTEMS.replace("damping = 0.1", "damping = 0.2").replace("OWL", "OWL 2"))
    assert len(plan(replace(options, systems=file), out).cells) == 5


def test_what_was_left_out_is_forgotten_where_its_row_is_another_or_wanted(options: Options, tmp_path: Path) -> None:
    def begin(now: Plan) -> None:
        wanted = {(cell.method, cell.asked) for cell in now.cells}
        SweepFolder(out).begin({"settings": dict(now.settings)}, now.rows, wanted, now.left_out)

    out, asked = tmp_path / "out", replace(options, patterns=["2:4"], sparsities=[])
    first = write(tmp_path, '["Wanda"]\nmethod = "wanda"\n["OWL"]\nmethod = "sparsegpt"\nallocation = "owl"\n')
    sweep(replace(asked, systems=first), out)
    assert [one["name"] for one in SweepFolder(out).read_sweep()["left_out"]] == ["OWL"]
    other = plan(replace(asked, systems=write(tmp_path, '["OWL"]\nmethod = "magnitude"\n')), out)
    begin(other)
    assert SweepFolder(out).read_sweep()["left_out"] == []
    # At another sparsity it is the same row.
    out = tmp_path / "second"
    write(tmp_path, '["Wanda"]\nmethod = "wanda"\n["OWL"]\nmethod = "sparsegpt"\nallocation = "owl"\n')
    sweep(replace(asked, systems=first), out)
    begin(plan(replace(asked, systems=first, sparsities=["0.5"], patterns=[]), out))
    assert [one["name"] for one in SweepFolder(out).read_sweep()["left_out"]] == ["OWL"]


@pytest.mark.parametrize("keys", ["allocation", "row_weights", "allocation,row_weights"])
def test_a_row_that_follows_the_loss_is_left_out_where_that_changes_nothing(
    options: Options, tmp_path: Path, keys: str
) -> None:
    lines = "".join(f'{key} = "fisher"\n' for key in keys.split(","))
    file = write(tmp_path, f'["Fisher"]\nmethod = "sparsegpt"\n{lines}')
    found = plan(replace(options, systems=file, sparsities=["0.5"], patterns=["2:4"]), tmp_path / "out")
    assert [cell.asked for cell in found.cells] == ["50%"]
    assert [one.asked for one in found.left_out] == ["2:4"]


def test_options_of_all_cells_belong_to_the_folder(options: Options, tmp_path: Path) -> None:
    asked = replace(options, methods=["magnitude"], patterns=[], loop={"match": "1"})
    sweep(asked, tmp_path / "out")
    assert "All cells: `--match 1`." in (tmp_path / "out" / "results.md").read_text()
    for loop, words in (({}, "--match was 1 and is not given now"), ({"match": "2"}, "--match was 1 and is 2 now")):
        with pytest.raises(InputError, match=words):
            plan(replace(asked, loop=loop), tmp_path / "out")
    plan(asked, tmp_path / "out")


def test_what_a_system_says_itself_stays(options: Options, tmp_path: Path) -> None:
    file = write(tmp_path, '["own"]\nmethod = "wanda"\ndrift = 0\nscope = "layer"\n["other"]\nmethod = "wanda"\n')
    asked = replace(options, systems=file, patterns=[], scope="row", loop={"drift": "0.5", "match": "1"})
    own, other = (cell.recipe for cell in plan(asked, tmp_path / "out").cells)
    assert (own.drift, own.scope, own.match) == (0, "layer", 1)  # type: ignore[union-attr]
    assert (other.drift, other.scope, other.match) == (0.5, "row", 1)  # type: ignore[union-attr]


def test_the_systems_of_the_papers(options: Options, tmp_path: Path) -> None:
    """The file of the benchmarks is sound, and each of its rows goes with a sparsity or with 2:4."""
    file = Path(__file__).parents[1] / "benchmarks" / "systems.toml"
    planned = plan(replace(options, systems=file), tmp_path / "out")
    names = {cell.method for cell in planned.cells}
    left = {(one.name, one.asked) for one in planned.left_out}
    assert len(names) >= 20
    assert not {name for name, asked in left if asked == "50%"} & {name for name, asked in left if asked == "2:4"}
    assert any(cell.tune for cell in planned.cells)  # type: ignore[union-attr]


# --- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no systems: each is a table"),
        ("method =", "is no TOML file: "),
        ('["A"]\nmethod = "alps"\n["A"]\nmatch = 1', "is no TOML file: cannot declare"),
        ('method = "alps"', "method in .* is no table of keys"),
        ('["A"]\nmethd = "alps"', r'methd in "A" of .*systems.toml is no key of a recipe; did you mean method'),
        ('["A"]\nmethod = "alpss"', r'method in "A" of .* is .alpss., but must be .*did you mean alps'),
        ('["A"]\nmatch = "many"', r'match in "A" of .* is .many., but must be a whole number'),
        ('["A"]\nmatch = -1\npatterns = []\nsparsities = []', r'match in "A" of .* is -1'),
        ('["A"]\nmatch = true', r'match in "A" of .* is True'),
        ('["A"]\nbarber_refit = "yes, please"', r'barber_refit in "A"'),
        ('["A"]\ndrift = nan', r'drift in "A" of .* is nan'),
        ('["A"]\ninclude = "*.mlp.*"', r'include in "A" of .* must be a list of patterns'),
        ('["A"]\ninclude = ["nothing"]', r'"A" of .*systems.toml: include is .nothing.'),
        ('["A"]\nsettings = {steps = {a = 1}}', r'settings in "A"'),
        ('["A"]\nsettings = {luck = 1}', "luck"),
        ('["A"]\nmethod = "shrink:blocks"', r'method in "A" of .* is .shrink:blocks., but a system prunes'),
        ('["A"]\nseed = 1', r'seed in "A" of .* is the same for all systems'),
        ('["A"]\nsparsity = 0.5', r"sparsities = \[0.5\] limits a system"),
        ('["A"]\nsparsities = [1.5]', r'sparsities in "A" of .* must be a list of numbers'),
        ('["A"]\nsparsities = [true]', r'sparsities in "A"'),
        ('["A"]\npatterns = ["4:2"]', r'patterns in "A" of .* is .4:2., but must be N:M'),
        ('["A"]\npatterns = "2:4"', r'patterns in "A" of .* must be a list of texts'),
        ('["A"]\ntune = 0', r'epochs in tune of "A" of .* is 0, but must be'),
        ('["A"]\ntune = true', r'tune in "A" of .* is True, but must be a number of epochs'),
        ('["A"]\ntune = {optimizer = "os:system"}', r'optimizer in tune of "A" of .* is no key'),
        ('["A"]\ntune = {rank = 4}', r'rank in tune of "A" of .* is 4, but --parametrisation full'),
        ('["A"]\ntune = {held_out = 999}', "leave room for"),
        ('["A"]\nmethod = "test_sweeps:Failing"', r'method in "A" of .* is code from outside Rarefy'),
        ('["A"]\ndrift = 0.5\nbarber = "signed"', r'barber in "A" of .* does not go with drift in "A"'),
        ('["A"]\nrefresh = true\nmethod = "dass"', r'"A" of .*systems.toml: refresh does not go with'),
        ('["A"]\nallocation = "nowhere.json"', r'"A" of .*nowhere.json'),
        ('["dense"]\nmethod = "alps"', "name of a system"),
        ('["a\\nb"]\nmethod = "alps"', "name of a system"),
        ('["wanda"]\nmethod = "alps"', "--methods and --systems both have a row called wanda"),
        ("a = " + "[" * 5000, "is no TOML file"),
        ("a = 1" + "0" * 5000, "is no TOML file"),
    ],
)
def test_mistakes_in_a_file_of_systems(options: Options, content: str, words: str, tmp_path: Path) -> None:
    methods = ["wanda"] if '["wanda"]' in content else []
    with pytest.raises(InputError, match=words) as raised:
        plan(replace(options, systems=write(tmp_path, content), methods=methods), tmp_path / "out")
    assert str(raised.value).count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_a_file_may_name_code_only_where_that_is_allowed(options: Options, tmp_path: Path) -> None:
    asked = replace(options, systems=write(tmp_path, '["A"]\nmethod = "test_sweeps:Failing"'), allow_code=True)
    assert len(plan(asked, tmp_path / "out").cells) == 2


def test_a_file_that_cannot_be_read(options: Options, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--systems: .* cannot be read"):
        plan(replace(options, systems=tmp_path / "missing.toml"), tmp_path / "out")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is no TOML file"):
        plan(replace(options, systems=tmp_path / "bytes.toml"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loop": {"permute": True}}, "--permute goes with an N:M pattern only"),
        ({"loop": {"along": "neurons"}, "patterns": []}, "--along goes with --pattern"),
        ({"loop": {"along": "sideways"}}, "--along is 'sideways', but must be inputs or neurons"),
        ({"loop": {"match": "-1"}}, "--match is -1"),
        ({"loop": {"drift": "0.5", "refresh": True}}, "--drift does not go with --refresh"),
        ({"loop": {"match": "1"}, "methods": ["wanda+quantize"]}, r"--match does not go with --methods wanda"),
        ({"loop": {"allocation": "owl"}}, "steps"),
        ({"loop": {"row_weights": "mlp"}}, "Row weights"),
        ({"methods": [], "settings": {"wanda.steps": "1"}, "systems": "SYSTEMS"}, "--set goes with --methods"),
        ({"methods": ["shrink:blocks"], "sizes": ["0.9"], "sparsities": [], "patterns": [], "loop": {"match": "1"}},
         "--match goes with methods that prune"),
        ({"sparsities": ["1.5"], "methods": [], "systems": "SYSTEMS"}, "--sparsity is 1.5"),
        ({"patterns": ["4:2"], "methods": [], "systems": "SYSTEMS"}, "--pattern is '4:2'"),
        ({"patterns": ["3:5"], "methods": [], "systems": "SYSTEMS", "sparsities": []}, " at 3:5 is left out: "),
    ],
)  # fmt: skip
def test_options_that_do_not_go_with_a_cell(
    options: Options, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    if change.get("systems"):
        change = {**change, "systems": write(tmp_path, SYSTEMS)}
    with pytest.raises(InputError, match=words):
        plan(replace(options, **{"methods": ["wanda"], **change}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_with_systems(rarefy_: Rarefy, options: Options, tmp_path: Path, text: Path) -> None:
    file = write(tmp_path, SYSTEMS)
    common = ["compare", options.model, "--pattern", "2:4", "--calibration", text, "--num-samples", 4]
    common += ["--sequence-length", 16, "--text", text, "--eval-length", 32, "--max-windows", 1, "--systems", file]
    done = rarefy_(*common, "-o", tmp_path / "out", "--match", 1, "--no-barber-refit")
    assert done.status == 0, done.err
    assert "left out: OWL, 2:4: " in done.err
    assert len([line for line in done.out.splitlines() if line.startswith(("DaSS", "ALPS", "Wanda"))]) == 3
    settings = json.loads((tmp_path / "out" / "compare.json").read_text())["settings"]
    assert (settings["match"], settings["barber_refit"]) == (1, False)
    file.write_text("[")
    done = rarefy_(*common, "-o", tmp_path / "new")
    assert (done.status, done.out) == (2, "")
    assert is_one_sentence(done.err), done.err
