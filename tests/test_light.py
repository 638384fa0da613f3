"""What is wrong with plain arguments is said before torch is imported: at once, and not after seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import rarefy
from rarefy.errors import MethodError
from rarefy.methods import METHODS, build
from rarefy.methods.settings import check
from rarefy.methods.table import described

#: Libraries that take longer to import than an answer may take.
_HEAVY = {"torch", "transformers", "numpy", "datasets", "pyarrow", "matplotlib", "huggingface_hub", "lm_eval"}

_REFUSED = """
prune
prune m
prun m
prune m -o out --sparcity 1
prune m -o out --sparsity 2
prune m -o out --sparsity half
prune m -o out --pattern 4:2
prune m -o out --pattern 2:4 --sparsity .5
prune m -o out --scope column
prune m -o out --num-samples 0
prune m -o out --sequence-length many
prune m -o out --batch-size -1
prune m -o out --seed x
prune m -o out --device abacus
prune m -o out --dtype int8
prune m -o out --method wnada
prune m -o out --method wanda+nothing
prune m -o out --method pcg
prune m -o out --method wanda+wanda
prune m -o out --method no.such:Class
prune m -o out --method ..:Class
prune m -o out --method FOLDER:Class
prune m -o LONG
prune LONG -o out
prune m -o out --method sparsegpt --set blok_size=64
prune m -o out --method sparsegpt --set block_size=many
prune m -o out --method sparsegpt --set block_size=0
prune m -o out --method admm --set schedule=square
prune m -o out --set damping
prune m -o FOLDER
prune m -o FOLDER/unfinished/..
prune m -o /proc/rarefy
prune ./missing -o out
prune FOLDER/text -o out
prune m -o out --calibration FOLDER/missing.txt
prune m -o out --calibration FOLDER/empty.txt
prune m -o out --calibration nonsense
prune m -o out --offload-dir missing
prune m -o out --log missing/log
prune --recipe FOLDER/missing.yaml -o out
prune --recipe FOLDER/wrong.yaml -o out
prune --recipe FOLDER/code.yaml -o out
compare m -o out
compare m -o out --methods wnada
compare m -o out --methods wanda --sparsity 3
compare m -o out --methods wanda,wanda
compare m -o out --methods wanda --seeds 0
compare m -o out --methods wanda --set wanda.x=1
compare m -o out --methods wanda --eval-length 1
compare m -o out --methods wanda --text FOLDER/missing.txt
compare m -o out --methods wanda --limit 3
compare m -o FOLDER --methods wanda
compare ./missing -o out --methods wanda
eval
eval m --device abacus
eval m --dtype int8
eval m --limit 3
eval m --limit x
eval m --text FOLDER/missing.txt
eval m --max-windows 0
eval ./missing
eval m --against ./missing
inspect m --pattern 4:2
inspect ./missing
inspect FOLDER/run
inspect LONG
report LONG
report ~nobody-has-this-name
report
report FOLDER/missing
report FOLDER/run
methods --all
"""

_ANSWER = """
import json, sys
from rarefy.cli import main
for line in sys.stdin:
    status = main(line.split())
    heavy = sorted(set(json.loads(sys.argv[1])) & set(sys.modules))
    print(json.dumps([status, heavy]), flush=True)
    print("END", file=sys.stderr, flush=True)
"""


def test_refusals_come_before_torch_is_imported(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "unfinished").mkdir(parents=True)
    (folder / "text").write_text("text")
    (folder / "empty.txt").touch()
    (folder / "wrong.yaml").write_text("model: m\nsparsity: [1]\n")
    (folder / "code.yaml").write_text("model: m\nmethod: os.path:join\n")
    (folder / "run" / "model").mkdir(parents=True)
    (folder / "run" / "layers.jsonl").write_text("{}\n")
    (folder / "run" / "run.json").write_text("{}")
    lines = _REFUSED.strip().replace("FOLDER", str(folder)).replace("LONG", "long" * 100).splitlines()
    environment = {**os.environ, "PYTHONPATH": str(Path(rarefy.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", _ANSWER, json.dumps(sorted(_HEAVY))],
        input="\n".join(["--version", "--help", *lines]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    sentences = done.stderr.split("END\n")[2:-1]
    assert [heavy for _, heavy in answers] == [[]] * (2 + len(lines))
    assert [status for status, _ in answers] == [0, 0] + [2] * len(lines)
    for line, sentence in zip(lines, sentences, strict=True):
        assert sentence.startswith("error: "), (line, sentence)
        assert sentence.count("\n") == 1, (line, sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# --- Methods, of which a description is read in place of the classes --------------------------------------------


def test_the_description_of_methods_is_that_of_the_methods() -> None:
    described_ = json.loads(files("rarefy.methods").joinpath("described.json").read_text("utf-8"))
    assert described_ == json.loads(json.dumps(described())), "make methods writes src/rarefy/methods/described.json"


_SETTINGS = [
    *((name, {}) for name in METHODS),
    *((f"wanda+{name}", {}) for name in METHODS),
    ("nothing", {}),
    ("sparsgpt", {}),
    ("", {}),
    ("wanda+", {}),
    ("no.such.module:Class", {}),
    ("os:sep", {}),
    ("sparsegpt", {"blok_size": "64"}),
    ("sparsegpt", {"block_size": "64"}),
    ("sparsegpt", {"block_size": 64}),
    ("sparsegpt", {"block_size": 64.5}),
    ("sparsegpt", {"block_size": True}),
    ("sparsegpt", {"block_size": 10**30}),
    ("sparsegpt", {"block_size": "many"}),
    ("sparsegpt", {"block_size": "0"}),
    ("sparsegpt", {"damping": 1}),
    ("sparsegpt", {"damping": "1e999"}),
    ("sparsegpt", {"damping": 10**400}),
    ("sparsegpt", {"damping": float("nan")}),
    ("sparsegpt", {"damping": "-1"}),
    ("sparsegpt", {"other.damping": "1"}),
    ("magnitude", {"damping": "1"}),
    ("admm", {"schedule": "square"}),
    ("admm", {"schedule": 3}),
    ("sparsefw", {"alpha": "0.3"}),
    ("sparsefw", {"alpha": 1}),
    ("sparsefw", {"alpha": "2"}),
    ("sparsefw", {"alpha": "x"}),
    ("wanda+pcg+pcg", {"pcg2.steps": "3"}),
    ("wanda+pcg+pcg", {"steps": "3"}),
    ("wanda+pcg", {"wanda.steps": "3"}),
]


@pytest.mark.parametrize(("name", "settings"), _SETTINGS)
def test_a_description_is_refused_where_the_method_would_be(name: str, settings: dict[str, object]) -> None:
    answers = []
    for attempt in (check, build):
        try:
            attempt(name, settings)  # type: ignore[operator]
        except MethodError as error:
            answers.append(str(error))
        else:
            answers.append("")
    assert answers[0] == answers[1]
