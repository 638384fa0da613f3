"""Sources of text by their names: Python's documentation, the hub, and what is not there."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models_for_tests import make_tokenizer
from rarefy.calibration.data_sets import HubRows
from rarefy.calibration.documents import Conversation
from rarefy.calibration.python_docs import python_docs
from rarefy.calibration.sources import SELF, has_columns, parse_source
from rarefy.calibration.windows import token_stream
from rarefy.errors import CalibrationError


def refusal(text: object, **options: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        parse_source(str(text), **options)
    message = str(caught.value)
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return message


# --- Names --------------------------------------------------------------------------------------------------


def test_a_file_named_like_a_source_needs_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text("words")
    assert parse_source("self") is SELF
    assert list(parse_source("./self").documents()) == ["words"]


def test_what_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.txt") == f"--calibration: {str(tmp_path / 'none.txt')!r} does not exist."
    assert refusal("none.jsonl", argument="--text") == "--text: 'none.jsonl' does not exist."
    for blank in ("", "  "):
        assert "is neither a file nor a known source (self, python-docs, c4, wikitext2, hub:" in refusal(blank)
    assert "'a\\x00b'" in refusal("a\0b")
    assert "File name too long" in refusal("x" * 5000)
    assert "'~nobody-has-this/a.txt' cannot be read: " in refusal("~nobody-has-this/a.txt")
    assert not has_columns("~nobody-has-this/a.csv")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("wikitxt2", "wikitext2"),
        ("wikitext", "wikitext2"),
        ("C4", "c4"),
        ("slef", "self"),
        ("python_docs", "python-docs"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(given: str, meant: str) -> None:
    assert refusal(given) == f"--calibration: {given!r} is neither a file nor a known source; did you mean {meant!r}?"


def test_an_unknown_name_is_answered_with_all() -> None:
    message = refusal("redpajama")
    for name in ("self", "python-docs", "c4", "wikitext2", "hub:NAME", ".jsonl", ".csv", ".parquet"):
        assert name in message
    assert "(python-docs, wikitext2, hub:NAME" in refusal("redpajama", part="evaluation")


@pytest.mark.parametrize("name", ["self", "c4", "wikitext2", "python-docs"])
def test_a_name_without_columns_takes_no_text_column(name: str) -> None:
    assert refusal(name, text_column="body") == (
        f"--text-column is 'body', but must be left out with {name}, which has no columns to choose."
    )


def test_the_models_own_text_cannot_be_read() -> None:
    with pytest.raises(CalibrationError, match="written by the model"):
        list(SELF.documents())


# --- The documentation of Python ----------------------------------------------------------------------------


def test_the_two_parts_of_the_documentation_share_no_paragraph() -> None:
    calibration, evaluation = python_docs("calibration"), python_docs("evaluation")
    paragraphs = [{" ".join(p.split()) for p in part.split("\n\n")} for part in (calibration, evaluation)]
    assert not paragraphs[0] & paragraphs[1]
    assert 0.2 < len(evaluation) / (len(calibration) + len(evaluation)) < 0.4
    assert len(calibration) > 200_000
    assert calibration.startswith('The "assert" statement')
    assert "yield" in evaluation
    assert list(parse_source("python-docs").documents()) == [calibration]
    assert list(parse_source("python-docs", part="evaluation").documents()) == [evaluation]
    assert "held-out" in parse_source("python-docs", part="evaluation").name


def test_a_python_without_its_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "pydoc_data.topics" in refusal("python-docs")


# --- The hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any]], list[Any]]:
    """Puts rows, or an error, where the hub would be; gives the list of calls."""
    calls: list[Any] = []

    def put(rows: list[Any]) -> list[Any]:
        def load_dataset(*arguments: Any, **options: Any) -> Iterator[Any]:
            calls.append((arguments, options))
            for row in rows:
                if isinstance(row, Exception):
                    raise row
                calls[-1][1]["read"] = calls[-1][1].get("read", 0) + 1
                yield row

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        return calls

    return put


def test_wikitext2_is_its_rows_joined_by_an_empty_line(hub: Callable[[list[Any]], list[Any]]) -> None:
    calls = hub([{"text": ""}, {"text": " = A = \n"}, {"text": " b\n"}])
    calibration, evaluation = parse_source("wikitext2"), parse_source("wikitext2", part="evaluation")
    assert calls == []
    assert list(evaluation.documents()) == list(calibration.documents()) == ["\n\n = A = \n\n\n b\n"]
    (arguments, options), (_, training) = calls
    assert arguments == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert (options["split"], training["split"], options["streaming"]) == ("test", "train", False)
    assert len(token_stream(calibration, make_tokenizer(), enough=3)) > 3  # windows come from all of it


def test_c4_is_the_first_shard_row_by_row_and_ends_when_there_is_enough(
    hub: Callable[[list[Any]], list[Any]],
) -> None:
    calls = hub([{"text": "x" * 100}] * 5000)
    tokens = token_stream(parse_source("c4"), make_tokenizer(), enough=1000)
    assert len(tokens) == 1000
    ((arguments, options),) = calls
    assert arguments == ("allenai/c4", None)
    assert options["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert (options["split"], options["streaming"]) == ("train", True)
    assert options["read"] < 1000
    assert len(token_stream(parse_source("c4"), make_tokenizer())) > 500_000


@pytest.mark.parametrize(
    ("text", "dataset", "config", "split"),
    [
        ("hub:a/b", "a/b", None, "train"),
        ("hub:a/b:c", "a/b", "c", "train"),
        ("hub:a/b:c:validation", "a/b", "c", "validation"),
        ("hub:a/b::test", "a/b", None, "test"),
    ],
)
def test_hub_names(text: str, dataset: str, config: str | None, split: str) -> None:
    assert parse_source(text) == HubRows(text, dataset, config, split)
    assert parse_source(text, text_column="body") == HubRows(text, dataset, config, split, text_column="body")


@pytest.mark.parametrize("text", ["hub:", "hub: :x", "hub:::test", "hub:a:b:c:d"])
def test_hub_names_that_are_none(text: str) -> None:
    assert "hub:NAME:CONFIG:SPLIT" in refusal(text)


def test_a_hub_without_an_answer_is_one_sentence_that_offers_a_file(hub: Callable[[list[Any]], list[Any]]) -> None:
    hub([{"text": "a"}, ConnectionError("Couldn't reach it.\nTraceback ...")])
    for name in ("c4", "wikitext2", "hub:a/b"):
        with pytest.raises(CalibrationError) as caught:
            list(parse_source(name).documents())
        assert str(caught.value) == (
            f"{name!r} could not be read from the Hugging Face hub (ConnectionError: Couldn't reach it); "
            "a local .txt, .jsonl or .parquet file works without the hub."
        )


def test_rows_of_the_hub_are_read_like_those_of_a_file(hub: Callable[[list[Any]], list[Any]]) -> None:
    hub([{"text": "a", "id": 1}, {"text": None, "id": 2}, {"text": "b", "id": 3}])
    assert list(parse_source("hub:a/b").documents()) == ["a", "b"]
    hub([{"messages": [{"role": "user", "content": "a"}], "source": "x"}])
    (conversation,) = parse_source("hub:a/b").documents()
    assert conversation == Conversation(({"role": "user", "content": "a"},), "row 1")
    hub([{"body": "a", "id": "x"}, {"body": 5, "id": "x"}])
    documents = parse_source("hub:a/b", text_column="body").documents()
    assert next(documents) == "a"
    with pytest.raises(
        CalibrationError, match=r"^'hub:a/b' is malformed: \"body\" in row 2 is a number, not text\.$"
    ):
        next(documents)
    with pytest.raises(CalibrationError, match=r"\(its columns: body, id\): --text-column names one of them\.$"):
        list(parse_source("hub:a/b").documents())
