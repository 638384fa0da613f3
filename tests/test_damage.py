"""Run folders that are damaged, or made to do harm: one sentence or an answer, never a traceback, and nothing lost.

Every file of a small run, a sweep and an unfinished run is damaged in several ways, and given to every command that
reads it. The quick test takes a few of each by chance, the slow one hundreds.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from cli_for_tests import Rarefy, stopped_after_one_block
from models_for_tests import _GROUPED, build, save_folder
from rarefy.cli import main
from rarefy.runs.unfinished import checksum_of

_RUN = ["--num-samples", "4", "--sequence-length", "16", "--method", "sparsegpt", "--quiet", "--no-texts"]
_SWEEP = ["--methods", "wanda", "--max-windows", "1", "--eval-length", "16", "--num-samples", "4"]
_SWEEP += ["--sequence-length", "16", "--save", "--quiet"]

Sources = dict[str, Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A model, a run, a sweep, and unfinished runs of a model on disk and in memory."""
    base = tmp_path_factory.mktemp("damage")
    save_folder(build(LlamaConfig(**{**_GROUPED, "num_hidden_layers": 2})).to(torch.bfloat16), base / "model")
    (base / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 200)
    model, text = str(base / "model"), str(base / "text.txt")
    run = ["prune", model, "--calibration", text, *_RUN]
    assert main([*run, "-o", str(base / "run"), "--pattern", "2:4"]) == 0
    assert main(["compare", model, "-o", str(base / "sweep"), "--text", text, "--calibration", text, *_SWEEP]) == 0
    with stopped_after_one_block():
        for name, more in (("half", []), ("half in memory", ["--dtype", "float32"])):
            assert main([*run, "-o", str(base / name), *more]) == 130
    return {path.name: path for path in base.iterdir()}


def _commands(sources: Sources) -> dict[str, tuple[str, list[str]]]:
    """What is damaged, and the command that reads it; FOLDER is the damaged copy."""
    model, text = str(sources["model"]), str(sources["text.txt"])
    resume = ["prune", model, "-o", "FOLDER", "--calibration", text, *_RUN]
    sweep = ["compare", model, "-o", "FOLDER", "--text", text, "--calibration", text, *_SWEEP]
    measure = ["eval", "FOLDER", "--text", text, "--max-windows", "1", "--sequence-length", "16", "--quiet"]
    return {
        "inspect": ("run", ["inspect", "FOLDER", "--pattern", "2:4"]),
        "inspect --json": ("run", ["inspect", "FOLDER", "--json"]),
        "report": ("run", ["report", "FOLDER", "--quiet"]),
        "report of a sweep": ("sweep", ["report", "FOLDER", "--quiet"]),
        "eval": ("run", measure),
        "recipe": ("run", ["prune", "--recipe", "FOLDER/recipe.yaml", "--dry-run", "--quiet"]),
        "resume": ("half", resume),
        "resume in memory": ("half in memory", [*resume, "--dtype", "float32"]),
        "compare": ("sweep", sweep),
    }


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*place, key))


_JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    "x",
    "",
    "1",
    [],
    {},
    [1],
    {"a": 1},
    10**30,
    1e308,
]
_JUNK += ["\0", "\x1b[31m", [[[]]], [None], "$a_{b$", "<script>", "../../x", "a" * 5_000]


def _other_json(draw: random.Random, value: Any) -> Any:
    """The same with something missing, renamed, or replaced by what does not belong there."""
    places = list(_places(value))
    if not places:
        return draw.choice(_JUNK)
    *way, key = draw.choice(places)
    parent = value
    for step in way:
        parent = parent[step]
    kind = draw.randrange(4)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[draw.choice(["x", "", "\x1b", "$"])] = parent.pop(key)
    else:
        parent[key] = draw.choice(_JUNK)
    return value


def _other_bytes(draw: random.Random, content: bytes) -> bytes:
    """Cut off, with bits flipped, with something in between, or something else entirely."""
    kind, place = draw.randrange(4), draw.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1 and content:
        changed = bytearray(content)
        for _ in range(draw.randrange(1, 6)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 2:
        extra = draw.choice([b"\0", b"\xff", b"{", b"[", b'"', b"1e999", b"9" * 400, b"\n", b"NaN", b"- ", b"&a *a"])
        return content[:place] + extra + content[place:]
    return draw.choice([b"", b"[" * 50_000, b'{"a":' * 2_000, b"null", b"{}", b'"x"', b"1" * 6_000, b"a: b: c"])


def _damage(draw: random.Random, file: Path) -> None:
    content = file.read_bytes()
    if draw.random() < 0.15:
        file.unlink()
    elif file.suffix == ".json" and draw.random() < 0.7:
        found = _other_json(draw, json.loads(content))
        if file.name == "journal.json" and isinstance(found, dict):  # by somebody who knows of the checksum
            found.pop("checksum", None)
            found = {"checksum": checksum_of(found), **found}
        file.write_text(json.dumps(found))
    elif file.suffix == ".jsonl" and draw.random() < 0.7:
        lines = content.decode().splitlines()
        number = draw.randrange(len(lines))
        lines[number] = json.dumps(_other_json(draw, json.loads(lines[number])))
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_bytes(_other_bytes(draw, content))


def _content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _try(rarefy_: Rarefy, sources: Sources, name: str, seed: int) -> None:
    draw = random.Random(f"{name} {seed}")
    source, command = _commands(sources)[name]
    folder = Path("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sources[source], folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    if name == "recipe":
        files = [folder / "recipe.yaml"]
    file = draw.choice(files)
    _damage(draw, file)
    before = _content(folder)
    done = rarefy_(*(word.replace("FOLDER", str(folder)) for word in command))
    what = f"seed {seed}, {file}: {done.err}"
    assert done.status in (0, 1, 2), what
    assert (done.out + done.err).replace("\n", "").isprintable(), what
    if done.status == 2:
        assert done.err.count("error: ") == 1, what
        assert done.err.splitlines()[-1].startswith("error: "), what
        after = _content(folder)
        assert {path: digest for path, digest in before.items() if after.get(path) != digest} == {}, what


_NAMES = ["inspect", "inspect --json", "report", "report of a sweep", "eval", "recipe", "resume", "resume in memory"]
_NAMES += ["compare"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _NAMES)
def test_damage_is_one_sentence_and_loses_nothing(rarefy_: Rarefy, sources: Sources, name: str) -> None:
    for seed in range(3):
        _try(rarefy_, sources, name, seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _NAMES)
def test_much_damage_is_one_sentence_and_loses_nothing(rarefy_: Rarefy, sources: Sources, name: str) -> None:
    for seed in range(3, 100):
        _try(rarefy_, sources, name, seed)
