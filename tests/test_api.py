"""What ``import rarefy`` offers: these names and no others, and five lines that prune a model."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rarefy
from rarefy import errors
from rarefy.layer.pattern import Pattern
from rarefy.methods import METHODS
from rarefy.methods.base import Method

README = Path(__file__).parents[1] / "README.md"

FUNCTIONS = {"solve", "prune", "run", "forecast", "inspect_folder", "keep_zeros", "merge", "tune", "shrink"}
LAYER = {"Gram", "LayerProblem", "Solution", "Status", "Unstructured", "PerRow", "NM", "Fixed", "Columns"}
RUN = {
    "Report",
    "Recipe",
    "RunResult",
    "Barber",
    "Matching",
    "TuneRecipe",
    "TuneResult",
    "ShrinkRecipe",
    "ShrinkResult",
}
METHOD = {"Method", "IterativeMethod", "Magnitude", "Wanda", "RIA", "SparseGPT", "Then", "BestOf"}
ERRORS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.RarefyError) and value.__module__ == errors.__name__
}


def test_exported_names() -> None:
    assert set(rarefy.__all__) >= FUNCTIONS | LAYER | RUN | METHOD | ERRORS
    assert len(set(rarefy.__all__)) == len(rarefy.__all__)
    for name in rarefy.__all__:
        value = getattr(rarefy, name)
        assert value.__name__ == name
        assert value.__doc__, name
    extra = set(rarefy.__all__) - FUNCTIONS - LAYER - RUN - METHOD - ERRORS
    assert all(issubclass(getattr(rarefy, name), Method) for name in extra), extra


def test_every_method_of_the_command_line_is_exported() -> None:
    for name, method in METHODS.items():
        for part in getattr(method, "parts", (method,)):
            assert getattr(rarefy, type(part).__name__) is type(part), name
            assert type(part).__name__ in rarefy.__all__


def test_star_import_and_dir_agree() -> None:
    space: dict[str, object] = {}
    exec("from rarefy import *", space)
    assert set(rarefy.__all__) <= space.keys()
    assert set(rarefy.__all__) <= set(dir(rarefy))


def test_names_are_found_where_type_checkers_look() -> None:
    listed = re.findall(
        r"^    from (rarefy\S*) import (?:\(([^)]*)\)|(.*))$", Path(str(rarefy.__file__)).read_text(), re.M
    )
    found = {}
    for module, several, one in listed:
        for name in re.findall(r"\w+", several or one):
            found[name] = getattr(importlib.import_module(module), name)
    assert found.keys() == set(rarefy.__all__)
    assert all(getattr(rarefy, name) is value for name, value in found.items())


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'pruned'"):
        _ = rarefy.pruned
    assert not hasattr(rarefy, "__path_that_is_not__")
    assert re.fullmatch(r"\d+\.\d+\.\d+", rarefy.__version__)


def test_errors_are_one_tree() -> None:
    for name in ERRORS:
        assert issubclass(getattr(rarefy, name), rarefy.RarefyError)
    assert issubclass(rarefy.InputError, ValueError)
    for name in ("PatternError", "MethodError", "ModelError", "CalibrationError", "RecipeError", "OutputError"):
        assert issubclass(getattr(rarefy, name), rarefy.InputError)
    assert str(rarefy.InputError("--sparsity", 1.5, "a number in [0, 1)")) == (
        "--sparsity is 1.5, but must be a number in [0, 1)."
    )
    assert isinstance(rarefy.PatternError.sentence("So it is."), rarefy.PatternError)
    assert str(rarefy.PatternError.sentence("So it is.")) == "So it is."


def test_patterns_are_patterns() -> None:
    for name in ("Unstructured", "PerRow", "NM", "Fixed", "Columns"):
        assert issubclass(getattr(rarefy, name), Pattern)


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, rarefy; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.skipif(not README.exists(), reason="there is no README yet")
def test_the_readmes_lines_run() -> None:
    import torch

    from models_for_tests import make_model

    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = next((block for block in blocks if "rarefy.solve(" in block and "rarefy.prune(" in block), None)
    assert lines, "the README has no Python example with rarefy.solve and rarefy.prune"
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, 16, generator=generator)
    space: dict[str, object] = {
        "weight": torch.randn(8, 16, generator=generator),
        "gram": X.T @ X,
        "model": make_model("llama"),
        "windows": torch.randint(3, 160, (2, 16), generator=generator),
    }
    exec(lines, space)
    assert isinstance(space["solution"], rarefy.Solution)
    assert isinstance(space["report"], rarefy.Report)
