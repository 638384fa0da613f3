"""Sources of text: what is accepted, what is refused and in which words, and the windows that are drawn."""

from __future__ import annotations

import gzip
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from models_for_tests import make_tokenizer
from rarefy.calibration.sources import (
    SELF,
    CalibrationWarning,
    HubRows,
    Source,
    draw_windows,
    parse_source,
    python_docs,
    token_stream,
)
from rarefy.errors import CalibrationError, InputError

DOCUMENTS = ["First document.", "", "Second,\nin two lines\u2028or three.", "Ünï\u4e2d"]


def refusal(text: object, **options: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        parse_source(str(text), **options)
    message = str(caught.value)
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return message


# --- Files --------------------------------------------------------------------------------------------------


def json_lines(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "url": 1}, ensure_ascii=False).encode() + b"\n" for text in documents)


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def test_a_text_file_is_one_document_as_it_stands(tmp_path: Path) -> None:
    for name, text in {"a.txt": "x\r\n\n y \n", "b.raw": "\ufeffx", "README": "no suffix"}.items():
        (tmp_path / name).write_bytes(text.encode())
        source = parse_source(str(tmp_path / name))
        assert list(source.documents()) == [text.removeprefix("\ufeff")]
        assert source.name == str(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "A.JSONL.GZ", "c4-train.00000-of-01024.json.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    data = json_lines(DOCUMENTS[:2]) + b"\n  \n" + json_lines(DOCUMENTS[2:])[:-1]
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    source = parse_source(str(tmp_path / name))
    assert list(source.documents()) == DOCUMENTS
    assert source.read_text() == "\n\n".join(DOCUMENTS)


def test_half_a_surrogate_pair_reaches_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    assert list(parse_source(str(tmp_path / "a.jsonl")).documents()) == ["a?b"]


def test_parquet(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", id=[1, 2, 3, 4, 5], text=[*DOCUMENTS, None])
    assert list(parse_source(str(file)).documents()) == DOCUMENTS
    large = pa.array(DOCUMENTS, pa.large_string())
    file = write_parquet(tmp_path / "b.parquet", text=large)  # type: ignore[arg-type]
    assert list(parse_source(str(file)).documents()) == DOCUMENTS


def test_a_gzipped_text_file_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    assert parse_source(str(tmp_path / "a.txt.gz")).read_text() == "text"


def test_a_file_named_like_a_source_needs_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text("words")
    assert parse_source("self") is SELF
    assert parse_source("./self").read_text() == "words"


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "is empty."),
    "blank": ("a.txt", b" \n\t\r\n", "is empty."),
    "binary": ("a.txt", b"abc\0def", "is binary: byte 3 is NUL."),
    "image": ("a.png", b"\x89PNG\r\n\x1a\n\0", "is binary: byte 8 is NUL."),
    "latin-1": ("a.txt", "abcdé".encode("latin-1"), "is not UTF-8 text: byte 4 cannot be decoded."),
    "utf-16": ("a.txt", "abc".encode("utf-16"), "is binary: byte 3 is NUL."),
    "no lines": ("a.jsonl", b"", "is empty."),
    "blank lines": ("a.jsonl", b"\n\n", "is empty."),
    "empty texts": ("a.jsonl", json_lines(["", " ", "\n"]), "is empty."),
    "no JSON": ("a.jsonl", json_lines(["a", "b"]) + b"\nplain words\n", "is malformed: line 4 is not JSON."),
    "cut JSON": ("a.jsonl", json_lines(["a", "b"])[:-5], "is malformed: line 2 is not JSON."),
    "no text": ("a.jsonl", json_lines(["a"]) + b'{"content": "b"}', 'line 2 is no JSON object with a key "text".'),
    "a list": ("a.json", b'["a", "b"]', 'line 1 is no JSON object with a key "text".'),
    "a number": ("a.jsonl", b'{"text": 5}', '"text" in line 1 is not a string.'),
    "null": ("a.jsonl", b'{"text": null}', '"text" in line 1 is not a string.'),
    "binary lines": ("a.jsonl", json_lines(["a"]) + b"\xff\xfe", "is not UTF-8 text: line 2 cannot be decoded."),
    "deep": ("a.jsonl", b"[" * 200_000, "is malformed: line 1 is not JSON."),
    "no gzip": ("a.jsonl.gz", json_lines(["a"]), "is no complete gzip file."),
    "cut gzip": ("a.jsonl.gz", gzip.compress(json_lines(["a"] * 50))[:-9], "is no complete gzip file."),
    "bad gzip": ("a.txt.gz", gzip.compress(b"abc")[:10] + b"\xff" * 20, "is no complete gzip file."),
    "no parquet": ("a.parquet", b"abc" * 10, "cannot be read as Parquet: "),
    "empty parquet": ("a.parquet", b"", "cannot be read as Parquet: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    name, data, words = BROKEN[case]
    (tmp_path / name).write_bytes(data)
    message = refusal(tmp_path / name)
    assert message.startswith(f"--calibration: {str(tmp_path / name)!r} ")
    assert words in message


def test_broken_parquet_columns(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", id=[1], body=["a"])
    assert 'has no column "text" (its columns: id, body).' in refusal(file)
    assert 'holds int64, not text, in its column "text".' in refusal(write_parquet(file, text=[1]))
    assert "is empty." in refusal(write_parquet(file, text=pa.array([], pa.string())))  # type: ignore[arg-type]
    assert "is empty." in refusal(write_parquet(file, text=pa.array([None], pa.string())))  # type: ignore[arg-type]


def test_what_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.txt") == f"--calibration: {str(tmp_path / 'none.txt')!r} does not exist."
    assert refusal("none.jsonl", argument="--text") == "--text: 'none.jsonl' does not exist."
    assert "is a folder, not a file." in refusal(tmp_path)
    assert "is a folder, not a file." in refusal(".")
    for blank in ("", "  "):
        assert "is neither a file nor a known source (self, python-docs, c4, wikitext2, hub:" in refusal(blank)
    assert "'a\\x00b'" in refusal("a\0b")
    assert "File name too long" in refusal("x" * 5000)


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
    for name in ("self", "python-docs", "c4", "wikitext2", "hub:NAME", ".jsonl.gz", ".parquet"):
        assert name in message
    assert "(python-docs, wikitext2, hub:NAME" in refusal("redpajama", part="evaluation")


# --- The documentation of Python ----------------------------------------------------------------------------


def test_the_two_parts_of_the_documentation_share_no_paragraph() -> None:
    calibration, evaluation = python_docs("calibration"), python_docs("evaluation")
    paragraphs = [{" ".join(p.split()) for p in part.split("\n\n")} for part in (calibration, evaluation)]
    assert not paragraphs[0] & paragraphs[1]
    assert 0.2 < len(evaluation) / (len(calibration) + len(evaluation)) < 0.4
    assert len(calibration) > 200_000
    assert calibration.startswith('The "assert" statement')
    assert "yield" in evaluation
    assert parse_source("python-docs").read_text() == calibration
    assert parse_source("python-docs", part="evaluation").read_text() == evaluation
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


@pytest.mark.parametrize("text", ["hub:", "hub: :x", "hub:::test", "hub:a:b:c:d"])
def test_hub_names_that_are_none(text: str) -> None:
    assert "hub:NAME:CONFIG:SPLIT" in refusal(text)


def test_a_hub_without_an_answer_is_one_sentence_that_offers_a_file(hub: Callable[[list[Any]], list[Any]]) -> None:
    hub([{"text": "a"}, ConnectionError("Couldn't reach it.\nTraceback ...")])
    for name in ("c4", "wikitext2", "hub:a/b"):
        with pytest.raises(CalibrationError) as caught:
            parse_source(name).read_text()
        assert str(caught.value) == (
            f"{name!r} could not be read from the Hugging Face hub (ConnectionError: Couldn't reach it); "
            "a local .txt, .jsonl or .parquet file works without the hub."
        )


def test_rows_of_the_hub_without_text(hub: Callable[[list[Any]], list[Any]]) -> None:
    hub([{"question": "a", "answer": "b"}])
    with pytest.raises(CalibrationError, match=r'no text in a column "text" \(its columns: question, answer\)\.$'):
        parse_source("hub:a/b").read_text()


def test_the_models_own_text_cannot_be_read() -> None:
    with pytest.raises(CalibrationError, match="written by the model"):
        SELF.read_text()


# --- Tokens -------------------------------------------------------------------------------------------------


class Documents(Source):
    def __init__(self, documents: list[str]) -> None:
        self.name, self._documents = "documents", documents

    def documents(self) -> Iterator[str]:
        return iter(self._documents)


@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 1025])
def test_documents_are_joined_by_an_empty_line(count: int) -> None:
    tokenizer, documents = make_tokenizer(), [f"the {i}th" for i in range(count)]
    tokens = token_stream(Documents(documents), tokenizer)
    assert tokens.dtype == torch.int64
    # No token of this tokenizer reaches across the place where documents meet.
    assert tokens.tolist() == tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    assert not torch.isin(tokens, torch.tensor(tokenizer.all_special_ids)).any()


def test_of_a_large_file_every_nth_document_is_enough(tmp_path: Path) -> None:
    tokenizer, documents = make_tokenizer(), [f"{i:05}{'x' * 95}" for i in range(1000)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(documents))
    source = parse_source(str(tmp_path / "a.jsonl"))

    def numbers(enough: int | None) -> list[int]:
        text = tokenizer.decode(token_stream(source, tokenizer, enough))
        return [int(document[:5]) for document in text.split("\n\n")]

    assert numbers(None) == numbers(100_000) == numbers(6_251) == list(range(1000))
    assert numbers(6_250) == list(range(0, 1000, 2))
    assert numbers(130) == list(range(0, 1000, 96))
    assert len(token_stream(source, tokenizer, 130)) >= 130


def test_no_documents_are_no_tokens() -> None:
    assert token_stream(Documents([]), make_tokenizer()).shape == (0,)
    assert len(token_stream(Documents(["x" * 100] * 2000), make_tokenizer(), enough=10)) > 200_000


# --- Windows ------------------------------------------------------------------------------------------------

TOKENS = torch.arange(1000) + 7


def test_windows_are_cut_from_the_stream_anywhere() -> None:
    windows = draw_windows(TOKENS, 50, 20, seed=0)
    assert windows.shape == (50, 20)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(20))
    assert windows[:, 0].unique().numel() > 40
    assert windows.min() >= 7
    assert windows.max() <= 1006


def test_the_same_seed_draws_the_same_windows() -> None:
    windows = draw_windows(TOKENS, 5, 100, seed=3)
    torch.rand(5)
    assert torch.equal(draw_windows(TOKENS, 5, 100, seed=3), windows)
    assert not torch.equal(draw_windows(TOKENS, 5, 100, seed=4), windows)
    # Fixed for good: another torch or machine must not draw other windows.
    assert draw_windows(TOKENS, 4, 10, seed=0)[:, 0].tolist() == [929, 594, 439, 983]


def test_the_first_and_the_last_window_can_be_drawn() -> None:
    starts = [draw_windows(torch.arange(12), 1, 10, seed)[0, 0].item() for seed in range(20)]
    assert set(starts) == {0, 1, 2}
    assert draw_windows(torch.arange(10), 3, 10, seed=0).tolist() == [list(range(10))] * 3


def test_the_start_token_takes_one_place_of_each_window() -> None:
    windows = draw_windows(TOKENS, 50, 20, seed=0, bos_id=1)
    assert windows.shape == (50, 20)
    assert (windows[:, 0] == 1).all()
    assert torch.equal(windows[:, 1:], windows[:, 1:2] + torch.arange(19))
    assert draw_windows(torch.arange(9), 3, 10, seed=0, bos_id=50).tolist() == [[50, *range(9)]] * 3


def test_text_shorter_than_a_window_is_an_error_with_both_numbers() -> None:
    with pytest.raises(CalibrationError) as caught:
        draw_windows(TOKENS, 2, 2048, seed=0)
    assert str(caught.value) == "The calibration text has 1,000 tokens, but one window needs 2,048."
    with pytest.raises(CalibrationError, match=r"'a\.txt' has 1,000 tokens, but one window needs 1,001"):
        draw_windows(TOKENS, 2, 1002, seed=0, bos_id=1, name="'a.txt'")
    draw_windows(TOKENS, 2, 1001, seed=0, bos_id=1)


def test_little_text_is_a_warning_with_both_numbers() -> None:
    draw_windows(TOKENS, 40, 100, seed=0)  # exactly a quarter
    with pytest.warns(
        CalibrationWarning, match=r"1,000 tokens, fewer than a quarter of the 4,100 .* 41 windows of 100"
    ):
        windows = draw_windows(TOKENS, 41, 100, seed=0)
    assert windows.shape == (41, 100)
    draw_windows(TOKENS, 40, 101, seed=0, bos_id=1)


def test_no_window_is_an_error() -> None:
    for num, length, bos_id, words in (
        (0, 5, None, "windows is 0"),
        (2, 0, None, "length is 0"),
        (2, 1, 1, "at least 2"),
    ):
        with pytest.raises(InputError, match=words):
            draw_windows(TOKENS, num, length, 0, bos_id)
