"""The documentation names only what exists: links, headings, files, options, and Python that compiles."""

import re
from pathlib import Path

import pytest
import typer.main

from rarefy.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`((?:src|tests|docs|benchmarks|examples|\.ci)/[\w./-]*\w)`")
MAKE = re.compile(r"\bmake ([a-z-]+)\b")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def command_lines(page: Path) -> list[list[str]]:
    """Every ``rarefy`` command in the page's code blocks, as words; lines continued with a backslash are joined."""
    text = "\n".join(body for _, body in FENCE.findall(page.read_text(encoding="utf-8")))
    lines = text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").split("#")[0].split() for line in lines if re.match(r"(\$ )?rarefy \w", line)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue  # the outside world is not this test's
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(linked), f"{target} names no heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_make_targets_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [file for file in FILE.findall(text) if not (ROOT / file).exists()]
    assert missing == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    fenced = [(kind, line) for kind, body in FENCE.findall(text) for line in body.splitlines()]
    typed = [line for kind, line in fenced if not kind.startswith("console") or line.startswith("$ ")]
    code = " ".join(re.findall(r"`[^`\n]+`", text) + typed)
    assert set(MAKE.findall(code)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles(page: Path) -> None:
    for number, block in enumerate(blocks(page, "python"), start=1):
        compile(block, f"{page.name}, block {number}", "exec")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_exist(page: Path) -> None:
    for words in command_lines(page):
        if words[1].startswith("-"):
            continue
        assert words[1] in COMMANDS, " ".join(words)
        said = [(*parameter.opts, *parameter.secondary_opts) for parameter in COMMANDS[words[1]].params]
        known = {"--help", "-h"}.union(*said)
        options = {word.strip("[]").partition("=")[0] for word in words[2:] if re.match(r"\[?--?[a-zA-Z]", word)}
        assert options <= known, " ".join(words)
