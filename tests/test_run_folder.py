"""What a run leaves on disk: whole files or none, a folder of its own, records that read back."""

import json
import math
from pathlib import Path

import pytest

from rarefy.errors import InputError, OutputError
from rarefy.pruning.records import LayerRecord, Report, geometric_mean
from rarefy.runs.folder import RunFolder
from rarefy.runs.schema import read_records

FACTS = {"method": "wanda", "pattern": "2:4"}


def record(name: str = "model.layers.0.mlp.up_proj", **changes: object) -> LayerRecord:
    values = {
        "block": 0,
        "shape": [4, 8],
        "pattern": "2:4",
        "kept": 16,
        "relative_error": 0.25,
        "balanced_error": 0.5,
        "status": "solved",
    }
    return LayerRecord(name=name, **{**values, **changes})


def everything_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"weights")


def write(folder: RunFolder, facts: dict[str, object] | None = None) -> None:
    with folder.writing():
        folder.write_recipe("model: m\n")
        folder.write_layers([record()])
        folder.write_model(fill)
        folder.write_run(facts or FACTS)


@pytest.mark.parametrize("name", ["new", "new/deep/er", "empty"])
def test_a_new_or_empty_folder_is_fine_and_checking_leaves_no_trace(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / name).check()
    assert everything_under(tmp_path) == ["empty"]


def test_a_folder_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    with pytest.raises(OutputError, match=r"^--output is .*this one is not empty"):
        RunFolder(tmp_path).check()


def test_what_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/below", "link"):
        with pytest.raises(OutputError, match="^--output is "):
            RunFolder(tmp_path / name).check()


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    # /proc refuses root as well, which permission bits would not.
    with pytest.raises(OutputError, match=r"^--output is '/proc/rarefy', but must be a folder that can be written"):
        RunFolder("/proc/rarefy").check()


def test_a_run_writes_four_things_and_reads_them_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    write(folder, {**FACTS, "seed": 7})
    assert everything_under(folder.path) == [
        "layers.jsonl",
        "model",
        "model/model.safetensors",
        "recipe.yaml",
        "run.json",
    ]
    assert folder.read_layers() == [record()]
    assert folder.read_run() == {**FACTS, "seed": 7}


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "out")

    def full_disk(model: Path) -> None:
        fill(model)
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(OutputError, match="No space left on device; nothing was left there"),
        folder.writing(),
    ):
        folder.write_recipe("model: m\n")
        folder.write_model(full_disk)
    assert everything_under(tmp_path) == []


def test_what_is_kept_after_an_error_is_no_empty_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "out")
    with pytest.raises(OutputError, match=r"^somewhere else\.$"), folder.writing(lambda _: True):
        raise OutputError.sentence("somewhere else.")
    assert everything_under(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), folder.writing(lambda _: True):
        folder.write_recipe("model: m\n")
        raise KeyboardInterrupt
    assert "deep/out/recipe.yaml" in everything_under(tmp_path)


def test_an_interruption_while_writing_leaves_nothing_and_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt), folder.writing():
        folder.write_layers([record()])
        folder.write_model(fill)
        raise KeyboardInterrupt
    assert everything_under(tmp_path) == []


def test_a_run_folder_is_found_from_itself_and_from_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "out")
    write(folder)
    for path in (folder.path, folder.model):
        found = RunFolder.find(path)
        assert found is not None
        assert found.path.resolve() == folder.path.resolve()
    monkeypatch.chdir(folder.path)
    assert RunFolder.find("model") is not None
    assert RunFolder.find(".") is not None
    assert RunFolder.find(tmp_path) is None
    assert RunFolder.find("someone/model") is None
    folder.layers.unlink()  # lost, and so damaged; not a model like any other
    assert RunFolder.find(".") is not None


def test_an_unfinished_or_damaged_run_is_one_sentence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    write(folder)
    folder.run.write_text("{")
    with pytest.raises(InputError, match="run.json cannot be read"):
        folder.read_run()
    folder.run.unlink()
    with pytest.raises(InputError, match="unfinished run"):
        folder.read_run()
    folder.layers.write_text(record().to_json() + '\n{"name": "x"}\n')
    with pytest.raises(InputError, match="^Line 2 of .*layers.jsonl is damaged"):
        folder.read_layers()
    folder.layers.write_text(record().to_json() + "\n" + record().to_json() + "\n")
    with pytest.raises(InputError, match="layers.jsonl is damaged: it has 2 layers, but only 1 names"):
        folder.read_layers()
    folder.write_run({"method": "wanda", "pattern": "row 50%", "layers": 2})
    folder.layers.write_text(record().to_json() + "\n")
    with pytest.raises(InputError, match="layers.jsonl is damaged: it has 1 layers, but run.json says 2"):
        folder.read_layers()
    folder.layers.write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match="^Line 1 of .*layers.jsonl is damaged"):
        folder.read_layers()
    folder.layers.unlink()
    with pytest.raises(InputError, match="layers.jsonl cannot be read"):
        folder.read_layers()


def test_a_record_is_one_line_of_strict_json_and_reads_back(tmp_path: Path) -> None:
    odd = record(relative_error=math.inf, details={"damping": math.nan, "note": "a\nb"}, trace={"error": [1.0, 0.5]})
    line = odd.to_json()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (tmp_path / "layers.jsonl").write_text(f"{line}\n{record().to_json()}\n")
    first, second = read_records(tmp_path / "layers.jsonl")
    assert first.relative_error == math.inf
    assert first.trace == odd.trace
    assert second == record()
    assert "trace" not in json.loads(record().to_json())


def test_a_record_counts_zeros() -> None:
    sparse = record(shape=[4, 8], kept=8)
    assert (sparse.size, sparse.pruned, sparse.sparsity, sparse.kind) == (32, 24, 0.75, "up_proj")


def test_a_report_adds_up_and_prints_a_table() -> None:
    layers = [
        record("model.layers.0.mlp.up_proj", relative_error=0.01, seconds=1.0, peak_bytes=5),
        record("model.layers.0.mlp.down_proj", shape=[8, 4], kept=8, relative_error=0.04, peak_bytes=9),
        record("model.layers.1.mlp.up_proj", relative_error=0.16, seconds=2.0, failed=True, status="not solved"),
    ]
    report = Report(layers, pattern="2:4", method="wanda", seconds=10.0)
    assert (report.size, report.pruned, report.peak_bytes) == (96, 56, 9)
    assert report.sparsity == 56 / 96
    assert report.relative_error == pytest.approx((0.01 * 0.04 * 0.16) ** (1 / 3))
    assert [layer.name for layer in report.failed] == ["model.layers.1.mlp.up_proj"]
    kinds = report.by_kind()
    assert list(kinds) == ["up_proj", "down_proj"]
    assert kinds["up_proj"].seconds == 3.0
    assert kinds["up_proj"].relative_error == pytest.approx(0.04)
    text = str(report)
    assert text.splitlines()[0] == "wanda, 2:4: 56 of 96 weights are zero"
    assert "model.layers.1.mlp.up_proj: not solved" in text
    assert "4 x 8" in text


def test_geometric_means_are_honest_about_zero_and_nan() -> None:
    assert geometric_mean([0.0, 1.0]) == 0.0
    assert math.isnan(geometric_mean([]))
    assert math.isnan(geometric_mean([math.nan, 0.0]))
    assert geometric_mean([4.0, math.inf]) == math.inf
    assert Report([]).sparsity == 0.0
