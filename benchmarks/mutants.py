"""Mutation score: breaks the code one token at a time, and counts how often the tests notice.

    python benchmarks/mutants.py                          # 40 mutants of each group of files, drawn by the seed
    python benchmarks/mutants.py --groups layer,methods --number 100 --seed 1 --jobs 2

A mutant is one changed token of a function: another comparison, sign, operator, constant, boolean or name of a
reduction. It is caught when a test of its group fails or takes more than five times as long as it should. Docstrings,
annotations, messages and what only chooses between equal ways (numpy or torch) are left alone; a line may say
``# no mutant: REASON`` where a change cannot be noticed. Each is printed with its place once it is judged.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_MATHS = "test_problem test_pattern test_select test_passes test_gram test_brute_force test_reference"
#: Files that are mutated, and the tests that should notice, the quickest first.
GROUPS = {
    "layer": (
        ["src/rarefy/layer/*.py"],
        (
            f"{_MATHS} test_columns test_transposable test_row_weights test_against_reference test_masks "
            "test_quantize test_reparametrise test_dass test_methods"
        ),
    ),
    "methods": (
        ["src/rarefy/methods/*.py"],
        (
            "test_light test_reference test_mrp test_dass test_dsf test_against_reference test_brute_force "
            "test_masks test_quantize test_methods"
        ),
    ),
    "loop": (
        ["src/rarefy/pruning/*.py", "src/rarefy/parallel/sharing.py", "src/rarefy/parallel/reduce.py"],
        "test_pruning test_stores test_matching test_experts test_distributed",
    ),
    "structure": (
        [f"src/rarefy/structure/{name}.py" for name in ("counts", "search", "policy", "rules", "depth", "width")],
        "test_policy test_counts test_depth",
    ),
    "journal": (["src/rarefy/runs/journal.py", "src/rarefy/runs/fingerprint.py"], "test_journal test_resume"),
    "shards": (
        ["src/rarefy/models/shards.py", "src/rarefy/models/atomic.py"],
        "test_atomic test_shards test_streaming",
    ),
}
_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is"}
_OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "**": "*", "%": "+", "&": "|", "|": "&", "@": "*"}
_NAMES = {"min": "max", "max": "min", "all": "any", "any": "all", "amin": "amax", "amax": "amin"}
_NAMES |= {"argmin": "argmax", "argmax": "argmin", "add_": "sub_", "sub_": "add_", "mul_": "div_", "div_": "mul_"}
_NAMES |= {"floor": "ceil", "ceil": "floor", "minimum": "maximum", "maximum": "minimum"}
_NAMES |= {"clamp_min": "clamp_max", "clamp_min_": "clamp_max_", "tril_": "triu_", "triu_": "tril_"}


@dataclass(frozen=True)
class Mutant:
    """The characters from ``start`` to ``stop`` of ``file`` (a path below the root) replaced by ``text``."""

    file: str
    line: int
    start: int
    stop: int
    text: str

    def __str__(self) -> str:
        source = (ROOT / self.file).read_text()
        old = source[self.start : self.stop]
        return f"{self.file}:{self.line}: {old!r} -> {self.text!r}   {source.splitlines()[self.line - 1].strip()}"


def mutants(file: Path) -> Iterator[Mutant]:
    """Every mutant of the functions of a file."""
    source = file.read_text()
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    name = str(file.relative_to(ROOT))
    raw = source.encode()

    def place(node: ast.AST, end: bool = False) -> int:
        line, column = (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)
        return starts[line - 1] + column

    def make(line: int, start: int, stop: int, text: str) -> Iterator[Mutant]:
        if "no mutant" not in lines[line - 1] and raw[start:stop].decode() != text:
            # from bytes to characters
            yield Mutant(name, line, len(raw[:start].decode()), len(raw[:stop].decode()), text)

    def between(left: ast.AST, right: ast.AST, table: dict[str, str]) -> Iterator[Mutant]:
        start, stop = place(left, end=True), place(right)
        text = raw[start:stop].decode()
        for old in sorted(table, key=len, reverse=True):
            at = text.find(f" {old} ")
            if at >= 0:
                begin = start + len(text[: at + 1].encode())
                yield from make(left.end_lineno, begin, begin + len(old), table[old])
                return

    for node in _in_functions(ast.parse(source)):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from between(node.left, node.comparators[0], _COMPARISONS)
        elif isinstance(node, ast.BinOp):
            yield from between(node.left, node.right, _OPERATORS)
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1], {"and": "or", "or": "and"})
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
            yield from make(node.lineno, place(node), place(node.operand), "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield from make(node.lineno, place(node), place(node, end=True), str(not node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            new = {0: "1", 1: "2"}.get(node.value, repr(node.value * 2))
            yield from make(node.lineno, place(node), place(node, end=True), new)
        elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
            stop = place(node, end=True)
            yield from make(node.end_lineno, stop - len(node.attr), stop, _NAMES[node.attr])
        elif isinstance(node, ast.Name) and node.id in _NAMES:
            yield from make(node.lineno, place(node), place(node, end=True), _NAMES[node.id])


def _in_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes inside of functions, without docstrings, annotations, texts and errors."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
            return
        yield node
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child)

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith(("__repr", "__str")):
            for statement in node.body:
                yield from walk(statement)


def caught(mutant: Mutant | None, tests: str, limit: float, workplace: Path) -> bool:
    """Whether a test fails, or takes longer than ``limit`` seconds, with the mutant in place."""
    if mutant is not None:
        file = workplace / mutant.file
        source = (ROOT / mutant.file).read_text()
        file.write_text(source[: mutant.start] + mutant.text + source[mutant.stop :])
    child = os.fork()  # torch and transformers are imported already
    if not child:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.chdir(workplace)
        sys.path[:0] = [str(workplace / "src"), str(workplace / "tests")]
        os.environ["PYTHONPATH"] = str(workplace / "src")
        import pytest

        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-header",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
        ]
        status = pytest.main([*options, *(f"tests/{name}.py" for name in tests.split())])
        os._exit(int(status))
    ends = time.monotonic() + limit
    status = None
    while status is None and time.monotonic() < ends:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        time.sleep(0.05)
    if status is None:
        os.killpg(child, 9)
        os.waitpid(child, 0)
    if mutant is not None:
        shutil.copy(ROOT / mutant.file, workplace / mutant.file)
    return status != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=",".join(GROUPS), help="of " + ", ".join(GROUPS))
    parser.add_argument("--number", type=int, default=40, help="mutants of each group; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    import transformers.models.llama.modeling_llama  # noqa: F401 (so that no child imports it again)

    worst = 1.0
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(i) for i in range(arguments.jobs)]
        for place in places:
            shutil.copytree(
                ROOT, place, ignore=shutil.ignore_patterns(".git", ".venv", "*out", "__pycache__", ".*cache")
            )
        for group in arguments.groups.split(","):
            globs, tests = GROUPS[group]
            every = [one for glob in globs for file in sorted(ROOT.glob(glob)) for one in mutants(file)]
            drawn = random.Random(arguments.seed).sample(every, min(arguments.number or len(every), len(every)))
            started = time.monotonic()
            if caught(None, tests, 3600.0, places[0]):
                print(f"{group}: the tests fail without a mutant")
                return 1
            limit = 5 * (time.monotonic() - started) + 30

            def judge(i: int, drawn: list[Mutant] = drawn, tests: str = tests, limit: float = limit) -> list[Mutant]:
                """The survivors of every ``jobs``-th mutant."""
                survivors = []
                for one in drawn[i :: len(places)]:
                    began, was_caught = time.monotonic(), caught(one, tests, limit, places[i])
                    print(
                        f"{'caught' if was_caught else 'SURVIVED'} in {time.monotonic() - began:.0f} s: {one}",
                        flush=True,
                    )
                    survivors += [] if was_caught else [one]
                return survivors

            with ThreadPoolExecutor(len(places)) as pool:
                survivors = [one for some in pool.map(judge, range(len(places))) for one in some]
            score = 1 - len(survivors) / max(1, len(drawn))
            worst = min(worst, score)
            print(f"{group}: {len(drawn) - len(survivors)} of {len(drawn)} caught ({score:.0%}), out of {len(every)}")
            for one in survivors:
                print(f"    survived {one}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
