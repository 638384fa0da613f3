"""Code that is shown runs: the examples, the Python of the documentation, and the file trees are real."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rarefy
from models_for_tests import VOCABULARY, make_model
from rarefy.methods import build

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of some languages on a page; "" is a block that names none."""
    if not page.is_file():
        pytest.skip(f"{page.relative_to(ROOT)} is not written yet")
    return [body for found, body in FENCE.findall(page.read_text(encoding="utf-8")) if found in languages]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert "relative error" in capsys.readouterr().out


def test_the_python_of_add_a_method_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/add-a-method.md"
    module = ModuleType("add_a_method")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look for their annotations
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), module.__dict__)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert len(tests) >= 3
    for test in tests:
        test()


def test_add_a_method_shows_the_example() -> None:
    shown = [block for block in blocks(ROOT / "docs/add-a-method.md", "python") if "\nclass " in block]
    example = (ROOT / "examples/my_method.py").read_text(encoding="utf-8")
    assert len(shown) == 2
    for block in shown:
        assert block.strip() in example


def test_the_python_of_the_readme_runs() -> None:
    page = ROOT / "README.md"
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 32, generator=generator)
    space: dict[str, object] = {
        "weight": torch.randn(16, 32, generator=generator),
        "gram": inputs.T @ inputs,
        "model": make_model("llama"),
        "windows": torch.randint(3, VOCABULARY, (2, 16), generator=generator),
    }
    for code in blocks(page, "python"):
        if "from_pretrained" not in code:  # needs a model that is not here
            exec(compile(code, str(page), "exec"), space)


@each_page
def test_file_trees_are_real(page: Path) -> None:
    """Every name in a tree, indented under its folder, exists."""
    for tree in blocks(page, "", "text"):
        if not re.search(r"^src/rarefy/", tree, re.MULTILINE):
            continue
        folders: list[tuple[int, Path]] = []
        for line in tree.splitlines():
            indent = len(line) - len(line.lstrip())
            while folders and folders[-1][0] >= indent:
                folders.pop()
            parent = folders[-1][1] if folders else ROOT
            names = re.split(r"\s{2,}", line.strip())[0].split()
            assert [name for name in names if not (parent / name).exists()] == [], line
            if len(names) == 1 and names[0].endswith("/"):
                folders.append((indent, parent / names[0]))


def test_the_tree_of_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / "src/rarefy").rglob("*.py")}
    assert [name for name in sorted(modules) if name not in text] == []


def test_a_method_of_ones_own_has_a_name_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    assert str(build("my_method:Saliency+pcg", {"my_method:Saliency.damping": "0.1"})) == "saliency+pcg"
    assert isinstance(build("wanda+my_method:HardThresholding", {"steps": "5"}), rarefy.Then)
