"""Imports go one way, and nothing heavy is imported where it is not needed: checked on the syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rarefy"
MODULES = {
    ".".join(("rarefy", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

#: What a module, or everything in a package, may import of rarefy. The most specific row counts;
#: a package's own modules may import each other.
ALLOWED = {
    "rarefy.errors": [],
    "rarefy.layer": ["errors"],
    "rarefy.methods": ["errors", "layer"],
    "rarefy.report": ["errors", "layer"],
    "rarefy.disk": ["errors"],
    "rarefy.identity": ["__version__"],
    "rarefy.models": ["errors", "disk"],
    "rarefy.calibration": ["errors", "disk", "layer.gram", "distributed", "models"],
    "rarefy.evaluation": ["errors", "models", "calibration"],
    "rarefy.evaluation.verify": ["errors", "models", "report.records", "run_folder"],
    "rarefy.run_folder": ["errors", "report.records"],
    "rarefy.watching": ["report.records"],
    "rarefy.progress": ["errors", "disk", "distributed", "identity", "calibration.spill", "report.records"],
    "rarefy.prune_settings": ["layer.pattern", "methods.base"],
    "rarefy.recipe": ["errors", "layer.pattern", "methods", "prune_settings"],
    "rarefy.solve": ["errors", "layer", "methods"],
    "rarefy.devices": [],
    "rarefy.turn": [
        *("errors", "layer", "methods", "models", "calibration", "devices", "distributed", "prune_settings"),
        *("report.records", "sharing"),
    ],
    "rarefy.pruning": [
        *("errors", "layer", "methods", "models", "calibration", "devices", "distributed", "prune_settings"),
        *("report.records", "turn"),
    ],
    "rarefy.homes": [
        *("errors", "devices", "disk", "distributed", "models", "calibration", "progress", "pruning"),
        "report.records",
    ],
    "rarefy.distributed": ["errors"],
    "rarefy.sharing": ["layer", "report.records"],
    "rarefy.comparing": [
        *("errors", "identity", "layer", "methods", "models", "calibration", "evaluation", "report"),
        *("pruning", "recipe", "run_folder", "watching"),
    ],
    "rarefy.reporting": [
        *("__version__", "errors", "models", "evaluation", "report", "comparing.folder", "run_folder", "watching"),
    ],
    "rarefy.cli": [""],
    "rarefy.__main__": ["cli"],
    "rarefy": ["errors", "layer", "methods", "pruning", "solve", "report.records"],
}

#: Libraries that a package must do without.
FORBIDDEN = {
    "rarefy.layer": {"transformers", "torch.distributed", "logging", "pathlib", "safetensors", "datasets"},
    "rarefy.methods": {"transformers", "torch.distributed", "logging", "pathlib", "safetensors", "datasets"},
    "rarefy.report.records": {"torch", "rich", "pydantic", "jinja2"},
    "rarefy.run_folder": {"torch", "rich", "pydantic", "transformers"},
    "rarefy.reporting": {"torch", "transformers"},
    "rarefy.recipe": {"transformers", "typer", "rich"},
}

#: Libraries that are imported in one module or package only.
ONLY_IN = {
    "typer": {"rarefy.cli"},
    "rich": {"rarefy.cli"},
    "pydantic": {"rarefy.recipe"},
    "jinja2": {"rarefy.report.card", "rarefy.report.page"},
    "matplotlib": {"rarefy.report.plots"},
    "gguf": {"rarefy.models.gguf"},
    "platformdirs": {"rarefy.calibration.self_text"},
}


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """The full name of everything that is imported anywhere in the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                # A name from the package itself stands for the module that it comes from.
                yield full if full in MODULES or node.module == "rarefy" else str(node.module)


def row_of(module: str, table: dict[str, object]) -> str | None:
    """The most specific row of the table that the module falls under."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in table and (name != "rarefy" or module == "rarefy")), None)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imported_by(module: str) -> list[str]:
    return list(imports(ast.parse(MODULES[module].read_text(encoding="utf-8")), module))


def test_the_table_knows_every_module() -> None:
    assert [module for module in MODULES if row_of(module, ALLOWED) is None] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    row = row_of(module, ALLOWED)
    assert row is not None
    allowed = [f"rarefy.{name}".rstrip(".") for name in ALLOWED[row]]
    if row != "rarefy":
        allowed.append(row)
    for name in imported_by(module):
        if within(name, "rarefy"):
            assert any(within(name, package) for package in allowed), f"{module} must not import {name}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_what_it_must_do_without(module: str) -> None:
    for package, libraries in FORBIDDEN.items():
        if within(module, package):
            for name in imported_by(module):
                assert not any(within(name, library) for library in libraries), f"{module} must not import {name}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_optional_and_heavy_libraries_have_one_place(library: str) -> None:
    users = {module for module in MODULES for name in imported_by(module) if within(name, library)}
    assert [user for user in users if not any(within(user, home) for home in ONLY_IN[library])] == []


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys, rarefy.cli\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib', 'pydantic', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
