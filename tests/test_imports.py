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

#: The floors of the house, from the top. A module imports from its own room and from rooms below; of two
#: rooms on one floor, the first may import from the second.
FLOORS = [
    ["__main__"],
    ["cli"],
    ["report", "sweeps"],
    ["evaluation"],
    ["runs"],
    ["tuning", "packing", "structure"],
    ["pruning"],
    ["allocation"],
    ["calibration"],
    ["parallel", "models"],
    ["methods"],
    ["layer"],
    ["errors"],
]
LEVEL = {f"rarefy.{room}": (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)}

#: Stricter than the floors: of Rarefy, these import from these alone.
NARROWED = {
    "rarefy.errors": set(),
    "rarefy.layer": {"rarefy.errors"},
    "rarefy.methods": {"rarefy.errors", "rarefy.layer"},
    "rarefy.models": {"rarefy.errors"},
    "rarefy.parallel": {"rarefy.errors", "rarefy.layer"},
    "rarefy.calibration": {"rarefy.errors", "rarefy.layer", "rarefy.models"},
}

#: Libraries that a package must do without.
FORBIDDEN = {
    "rarefy.layer": {"transformers", "torch.distributed", "logging", "pathlib", "safetensors", "datasets"},
    "rarefy.methods": {"transformers", "torch.distributed", "logging", "pathlib", "safetensors", "datasets"},
    "rarefy.pruning.records": {"torch", "rich", "pydantic", "jinja2"},
    "rarefy.runs.folder": {"torch", "rich", "pydantic", "transformers"},
    "rarefy.report": {"torch", "transformers"},
    "rarefy.runs.recipe": {"transformers", "typer", "rich"},
}

#: Libraries that are imported in one module or package only.
ONLY_IN = {
    "typer": {"rarefy.cli"},
    "rich": {"rarefy.cli"},
    "pydantic": {"rarefy.runs.recipe", "rarefy.runs.schema", "rarefy.runs.shrink_recipe", "rarefy.runs.tune_recipe"},
    "filelock": {"rarefy.runs.locks"},
    "jinja2": {"rarefy.runs.card", "rarefy.report.page"},
    "matplotlib": {"rarefy.report.plots"},
    "gguf": {"rarefy.models.gguf"},
    "platformdirs": {"rarefy.calibration.self_text"},
    "psutil": {"rarefy.models.memory"},
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


def room_of(name: str) -> str:
    """The room of a module, or the name itself where it stands loose at the top."""
    return ".".join(name.split(".")[:2])


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imported_by(module: str) -> list[str]:
    return list(imports(ast.parse(MODULES[module].read_text(encoding="utf-8")), module))


def test_nothing_stands_loose_at_the_top() -> None:
    assert {room_of(module) for module in MODULES} <= {"rarefy", *LEVEL}
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "errors"}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "rarefy"])
def test_imports_go_one_way(module: str) -> None:
    room = room_of(module)
    for name in imported_by(module):
        if not within(name, "rarefy") or name in ("rarefy.__version__", "rarefy") or room_of(name) == room:
            continue
        assert LEVEL[room_of(name)] > LEVEL[room], f"{module} must not import {name}"
        if room in NARROWED:
            assert room_of(name) in NARROWED[room], f"{module} must not import {name}"


def test_no_two_files_import_each_other() -> None:
    uses = {
        module: {name if name in MODULES else name.rpartition(".")[0] for name in imported_by(module)}
        for module in MODULES
        if module != "rarefy"
    }
    assert [(one, two) for one in uses for two in uses[one] if two != one and one in uses.get(two, ())] == []


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


#: What Windows does not have: modules, and attributes of modules that it has.
_UNIX_MODULES = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "curses", "readline", "syslog"}
_UNIX_ATTRIBUTES = {
    "os": {"sched_getaffinity", "statvfs", "posix_fallocate", "copy_file_range", "pread", "pwrite", "fork", "getuid"}
    | {"geteuid", "uname", "mkfifo", "chown", "killpg", "setsid", "sysconf", "getpgid", "O_NOFOLLOW", "O_DIRECTORY"},
    "mmap": {"MADV_DONTNEED", "MAP_PRIVATE", "MAP_SHARED", "PROT_READ", "PROT_WRITE"},
    "signal": {"SIGKILL", "SIGHUP", "SIGALRM", "alarm", "pause"},
}


@pytest.mark.parametrize("module", MODULES)
def test_what_windows_does_not_have_is_asked_for_first(module: str) -> None:
    """A module within ``try``, an attribute in a function that asks ``hasattr``."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    tried = {id(node) for attempt in ast.walk(tree) if isinstance(attempt, ast.Try) for node in ast.walk(attempt)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert not _UNIX_MODULES & {*names} or id(node) in tried, f"{module}, line {node.lineno}"
    scopes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner, name = node.value.id, node.attr
            if name in _UNIX_ATTRIBUTES.get(owner, ()):
                inside = [ast.unparse(scope) for scope in scopes if node in ast.walk(scope)]
                question = f"hasattr({owner}, '{name}')"
                assert any(question in text for text in inside), f"{module}, line {node.lineno}: {owner}.{name}"


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys, rarefy.cli\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib', 'pydantic', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
