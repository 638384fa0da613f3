"""The JSON of runs and sweeps, which may come from anybody: what is wrong with it is one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rarefy.errors import InputError
from rarefy.pruning.records import LayerRecord
from rarefy.runs.schema import CellFacts, RunFacts, SweepFacts, parse_records, read_facts, read_records

_RUN: dict[str, Any] = {
    "method": "wanda",
    "pattern": "2:4",
    "seconds": {"prune": 1, "total": 2.5},
    "peak_bytes": 3,
    "perplexity": [{"text": "t", "length": 8, "windows": 1, "value": 3.5}],
    "divergence": [{"text": "t", "label": "t", "length": 8, "windows": 1, "kl": None, "agreement": 0.5}],
    "tasks": {"piqa": {"samples": 3, "metrics": {"acc": {"value": 0.5, "stderr": None}}}},
    "texts": [{"prompt": "a", "text": "b"}],
    "something": {"else": [1]},
}
_CELL = {**_RUN, "status": "done", "asked_sparsity": 0.5, "seed": 0, "perplexity": []}
_SWEEP = {
    "settings": {
        "model": "m",
        "calibration": "self",
        "num_samples": 1,
        "sequence_length": 2,
        "eval_length": 3,
        "max_windows": None,
        "limit": 0.1,
    }
}
_LAYER = {"name": "up", "block": 0, "shape": [2, 4], "pattern": "2:4", "kept": 4, "relative_error": 0.5}
_LAYER |= {"status": "solved"}
_KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "run": (RunFacts, _RUN),
    "cell": (CellFacts, _CELL),
    "sweep": (SweepFacts, _SWEEP),
}


def _read(tmp_path: Path, content: str | bytes, kind: str = "run") -> dict[str, Any]:
    file = tmp_path / "run.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_facts(file, _KINDS[kind][0])


def _sentence(caught: pytest.ExceptionInfo[InputError], tmp_path: Path) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert str(tmp_path) in text
    return text


@pytest.mark.parametrize("kind", _KINDS)
def test_what_was_written_reads_back(tmp_path: Path, kind: str) -> None:
    assert _read(tmp_path, json.dumps(_KINDS[kind][1]), kind) == _KINDS[kind][1]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "1", "null", '"x"', b"\xff", b"\x00", "[" * 100_000, '{"a":' * 5_000, '{"seed": ' + "1" * 6_000],
)
@pytest.mark.parametrize("kind", _KINDS)
def test_what_is_no_object_is_one_sentence(tmp_path: Path, content: str | bytes, kind: str) -> None:
    with pytest.raises(InputError, match="cannot be read|is damaged") as caught:
        _read(tmp_path, content, kind)
    _sentence(caught, tmp_path)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("run", ("method",), None),
        ("run", ("method",), ["wanda"]),
        ("run", ("pattern",), 1),
        ("run", ("seconds",), [1]),
        ("run", ("seconds", "prune"), "1"),
        ("run", ("seconds", "prune"), math.nan),
        ("run", ("peak_bytes",), -1),
        ("run", ("peak_bytes",), 10**30),
        ("run", ("peak_bytes",), 1.5),
        ("run", ("peak_bytes",), True),
        ("run", ("perplexity",), {}),
        ("run", ("perplexity", 0), []),
        ("run", ("perplexity", 0, "value"), "3"),
        ("run", ("perplexity", 0, "value"), math.inf),
        ("run", ("perplexity", 0, "length"), None),
        ("run", ("divergence", 0, "label"), 3),
        ("run", ("divergence", 0, "agreement"), "half"),
        ("run", ("tasks", "piqa"), 1),
        ("run", ("tasks", "piqa", "metrics", "acc"), 0.5),
        ("run", ("tasks", "piqa", "metrics", "acc", "value"), "x"),
        ("run", ("texts", 0), "text"),
        ("run", ("texts", 0, "text"), None),
        ("run", ("versions",), {"torch": 2}),
        ("cell", ("status",), "unknown"),
        ("cell", ("asked_sparsity",), "0.5"),
        ("cell", ("seed",), -1),
        ("cell", ("perplexity",), [{"text": "t", "length": 8, "windows": 1, "value": 3.5}]),  # without a label
        ("sweep", ("settings",), None),
        ("sweep", ("settings", "model"), 1),
        ("sweep", ("settings", "num_samples"), "1"),
        ("sweep", ("settings", "eval_length"), None),
    ],
)
def test_a_wrong_type_or_number_is_one_sentence(
    tmp_path: Path, kind: str, path: tuple[str | int, ...], value: object
) -> None:
    content = json.loads(json.dumps(_KINDS[kind][1]))
    place: Any = content
    for step in path[:-1]:
        place = place.setdefault(step, {}) if isinstance(place, dict) else place[step]
    place[path[-1]] = value
    with pytest.raises(InputError, match=r"run\.json is damaged: ") as caught:
        _read(tmp_path, json.dumps(content), kind)
    assert str(path[-1]) in _sentence(caught, tmp_path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    for kind, key in (("run", "method"), ("run", "pattern"), ("cell", "status"), ("sweep", "settings")):
        content = {name: value for name, value in _KINDS[kind][1].items() if name != key}
        with pytest.raises(InputError, match=rf"is damaged: {key}: field required\.$"):
            _read(tmp_path, json.dumps(content), kind)


# --- Records ----------------------------------------------------------------------------------------------


def test_a_record_is_written_again_as_it_was() -> None:
    record = LayerRecord(
        **{**_LAYER, "relative_error": math.inf},  # type: ignore[arg-type]
        details={"whole": 3, "number": 3.0, "text": "3", "nothing": math.nan},
        trace={"error": [1, 2.5, math.inf]},
        seconds=0.1,
    )
    (again,) = parse_records(record.to_json().encode(), Path("layers.jsonl"))
    assert again.to_json() == record.to_json()
    assert again.relative_error == math.inf
    assert again.trace["error"] == [1, 2.5, math.inf]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("shape", shape) for shape in ([4], [2, 4, 1], [0, 4], [-2, 4], "2 x 4", {})),
        *(("shape", shape) for shape in ([2, None], [2.5, 4], [2, 10**30])),
        *(("kept", kept) for kept in (-1, 9, "four", None, 1.5, 10**400, [4])),
        *(("block", block) for block in (-1, 10**9, "x", None)),
        *(("relative_error", error) for error in ("small", None, [1], {})),
        *(("name", name) for name in ("", None, 3, "a\x1b[31m", "a\nb")),
        ("status", "\x07"),
        ("pattern", ["2:4"]),
        ("failed", "perhaps"),
        ("details", [1]),
        ("details", {"a": {"b": 1}}),
        ("steps", "many"),
        ("trace", {"error": 1}),
        ("trace", {"error": [[1]]}),
        ("trace", [1]),
    ],
)
def test_a_wrong_record_is_one_sentence_that_names_its_line(tmp_path: Path, key: str, value: object) -> None:
    file = tmp_path / "layers.jsonl"
    file.write_text("".join(json.dumps(layer) + "\n" for layer in (_LAYER, {**_LAYER, key: value})))
    with pytest.raises(InputError, match=r"^Line 2 of .*layers\.jsonl is damaged: ") as caught:
        read_records(file)
    assert key in _sentence(caught, tmp_path)


@pytest.mark.parametrize("line", ["", "{", "1", "[]", "null", "[" * 100_000, '{"a":' * 5_000, "\x00", "{}"])
def test_a_line_that_is_no_record_is_one_sentence(tmp_path: Path, line: str) -> None:
    file = tmp_path / "layers.jsonl"
    file.write_text(json.dumps(_LAYER) + "\n" + line + "\n" + json.dumps(_LAYER) + "\n")
    with pytest.raises(InputError, match=r"^Line 2 of .* is damaged: ") as caught:
        read_records(file)
    _sentence(caught, tmp_path)


def test_separators_within_a_string_do_not_end_a_line(tmp_path: Path) -> None:
    file = tmp_path / "layers.jsonl"
    file.write_text(json.dumps({**_LAYER, "details": {"note": "a\u2028b\x0bc"}}, ensure_ascii=False) + "\n")
    assert read_records(file)[0].details["note"] == "a\u2028b\x0bc"
