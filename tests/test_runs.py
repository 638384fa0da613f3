"""``rarefy.run`` does from Python all that ``rarefy prune`` does: streaming, resuming, forecast, verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rarefy
from cli_for_tests import Rarefy
from rarefy.pruning.records import LayerRecord
from rarefy.runs.events import Silent


def _recipe(shelf: Path, **more: object) -> dict[str, object]:
    calibration = {"calibration": str(shelf / "text.txt"), "num_samples": 6, "sequence_length": 32}
    return {"model": str(shelf / "model"), "method": "wanda", "pattern": "2:4", **calibration, **more}


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "model").iterdir() if file.name != "README.md"}


class _Stop(Silent):
    """Interrupts a run when a layer of block 1 is pruned."""

    def watch(self, what: str, linears: Any = ()) -> Any:
        class Stage:
            def __enter__(self) -> Stage:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def __call__(self, *_: object) -> None:
                pass

            def layer(self, record: LayerRecord) -> None:
                if record.block == 1:
                    raise KeyboardInterrupt

        return Stage()


def test_a_run_from_python_is_that_of_the_command_line(shelf: Path, tmp_path: Path, rarefy_: Rarefy) -> None:
    result = rarefy.run(_recipe(shelf), tmp_path / "out", texts=False, offload_dir=tmp_path)
    assert result is not None
    assert result.folder.path == tmp_path / "out"
    assert [layer.kept / layer.size for layer in result.report.layers] == [0.5] * 14
    assert result.facts == result.folder.read_run()
    assert rarefy.inspect_folder(tmp_path / "out").ok
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    options = ["--calibration", shelf / "text.txt", "--num-samples", 6, "--sequence-length", 32, "--no-texts"]
    said = rarefy_("prune", shelf / "model", "-o", "cli", "--method", "wanda", "--pattern", "2:4", *options)
    assert said.status == 0
    assert _files(Path("cli")) == _files(tmp_path / "out")
    assert Path("cli/recipe.yaml").read_text() == (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_recipe_may_be_an_object_a_mapping_or_a_file(shelf: Path, tmp_path: Path) -> None:
    first = rarefy.run(_recipe(shelf), tmp_path / "mapping", texts=False)
    assert first is not None
    for name, recipe in (("object", rarefy.Recipe(**_recipe(shelf))), ("file", first.folder.recipe)):
        assert rarefy.run(recipe, tmp_path / name, texts=False) is not None
        assert _files(tmp_path / name) == _files(tmp_path / "mapping")


def test_an_interrupted_run_goes_on_from_python(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        rarefy.run(_recipe(shelf), tmp_path / "out", texts=False, events=_Stop())
    assert (tmp_path / "out" / "unfinished").is_dir()
    again = rarefy.run(_recipe(shelf), tmp_path / "out", texts=False)
    assert again is not None
    assert not (tmp_path / "out" / "unfinished").exists()
    assert rarefy.run(_recipe(shelf), tmp_path / "whole", texts=False) is not None
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_mistakes_are_found_before_anything_is_written(shelf: Path, tmp_path: Path) -> None:
    for recipe, error in (
        (_recipe(shelf, pattern="4:2"), rarefy.PatternError),
        (_recipe(shelf, model=str(shelf / "none")), rarefy.ModelError),
        ({"method": "wanda"}, rarefy.InputError),
        (tmp_path / "none.yaml", rarefy.RecipeError),
    ):
        with pytest.raises(error):
            rarefy.run(recipe, tmp_path / "out")
        with pytest.raises(error):
            rarefy.forecast(recipe)
    assert not (tmp_path / "out").exists()
    with pytest.raises(rarefy.OutputError, match="not empty"):
        rarefy.run(_recipe(shelf), shelf / "model")


def test_a_forecast_counts_weights_and_memory(shelf: Path) -> None:
    found = rarefy.forecast(_recipe(shelf, pattern="1:4"), texts=False)
    sizes = [site.shape[0] * site.shape[1] for block in found.plan.blocks for site in block.sites]
    assert (found.size, found.pruned) == (sum(sizes), sum(sizes) * 3 // 4)
    assert found.peak_bytes > 100 * 2**20  # Python and torch alone take as much
    assert torch.is_tensor(found.plan.windows)
