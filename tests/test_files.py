"""Documents in files: the formats, encodings and layouts that people have, and what is said of broken ones."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rarefy.calibration.documents import Conversation, Document
from rarefy.calibration.sources import parse_source
from rarefy.errors import CalibrationError

DOCUMENTS = ["First document.", "", "Second,\nin two lines\u2028or three.", "Ünï\u4e2d"]


def documents(path: object, **options: Any) -> list[Document]:
    return list(parse_source(str(path), **options).documents())


def refusal(path: object, **options: Any) -> str:
    """What is said of a file after its name; always one sentence."""
    with pytest.raises(CalibrationError) as caught:
        parse_source(str(path), **options)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    start = f"--calibration: {str(path)!r} "
    return message.removeprefix(start)


def json_lines(texts: list[Any]) -> bytes:
    return b"".join(json.dumps({"text": text, "url": 1}, ensure_ascii=False).encode() + b"\n" for text in texts)


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def say(*contents: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, contents))


# --- Plain text, encodings, compression ---------------------------------------------------------------------


def test_a_text_file_is_one_document_as_it_stands(tmp_path: Path) -> None:
    for name, text in {"a.txt": "x\r\n\n y \n", "b.raw": "\ufeffx", "README": "no suffix"}.items():
        source = parse_source(str(write(tmp_path / name, text)))
        assert list(source.documents()) == [text.removeprefix("\ufeff")]
        assert source.name == str(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_says_how_text_is_encoded(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("e") else ""

    def encoded(name: str, text: str) -> Path:
        return write(tmp_path / name, (mark + text).encode(encoding))

    assert documents(encoded("a.txt", DOCUMENTS[2])) == [DOCUMENTS[2]]
    assert documents(encoded("a.jsonl", json_lines(DOCUMENTS).decode())) == DOCUMENTS
    assert documents(encoded("a.csv", 'id,text\n1,Ünï\n2,"a\r\nb"\n')) == ["Ünï", "a\r\nb"]
    assert documents(encoded("a.json", json.dumps([{"text": "Ünï"}], ensure_ascii=False))) == ["Ünï"]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_compressed_files_are_read_by_their_ending(tmp_path: Path, ending: str) -> None:
    compress = COMPRESSORS[ending]
    assert documents(write(tmp_path / f"a.txt.{ending}", compress(b"text"))) == ["text"]
    assert documents(write(tmp_path / f"A.JSONL.{ending.upper()}", compress(json_lines(DOCUMENTS)))) == DOCUMENTS
    assert documents(write(tmp_path / f"a.tsv.{ending}", compress(b"text\tid\na\t1\n"))) == ["a"]
    message = f"is no complete .{ending} file."
    data = compress(json_lines([os.urandom(50).hex() for _ in range(500)]))
    assert refusal(write(tmp_path / f"b.jsonl.{ending}", data[: len(data) // 2])) == message
    assert refusal(write(tmp_path / f"c.jsonl.{ending}", json_lines(["a"]))) == message
    # Named by what it is, where its name does not say so.
    named = refusal(write(tmp_path / "d.txt", data))
    assert f"(it begins like a .{ending} file, but its name does not end so)." in named


# --- JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.json", "c4-train.00000-of-01024.json.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    data = json_lines(DOCUMENTS[:2]) + b"\n  \n" + json_lines(DOCUMENTS[2:])[:-1]
    source = parse_source(str(write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)))
    assert list(source.documents()) == DOCUMENTS
    assert source.characters == sum(map(len, DOCUMENTS))


def test_rows_without_a_value_are_left_out(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.jsonl", json_lines(["a", None, "b"]))) == ["a", "b"]
    assert documents(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": NaN}\n')) == ["a"]
    assert documents(write(tmp_path / "a.csv", "id,text\n1,a\n2,\n\n3,b\n")) == ["a", "b"]
    assert documents(write_parquet(tmp_path / "a.parquet", text=["a", None, "b"])) == ["a", "b"]
    chat = '{"messages": null}\n{"messages": []}\n{"messages": [{"role": "user", "content": "a"}]}\n'
    assert documents(write(tmp_path / "b.jsonl", chat)) == [Conversation(say("a"), "line 3")]
    pairs = '{"prompt": "a", "completion": null}\n{"prompt": "a", "completion": "b"}\n'
    assert documents(write(tmp_path / "b.jsonl", pairs)) == [Conversation(say("a", "b"), "line 2")]


def test_a_json_array_is_a_list_of_rows(tmp_path: Path) -> None:
    rows = [{"text": text, "n": 1} for text in DOCUMENTS]
    for indent in (None, 2):
        assert documents(write(tmp_path / "a.json", json.dumps(rows, indent=indent))) == DOCUMENTS
        assert documents(write(tmp_path / "a.jsonl", "\n\n" + json.dumps(rows, indent=indent) + "\n")) == DOCUMENTS
    assert documents(write(tmp_path / "a.json", json.dumps(rows[0], indent=2))) == DOCUMENTS[:1]
    assert documents(write(tmp_path / "a.json", '["a", "b"]')) == ["a", "b"]
    assert documents(write(tmp_path / "a.jsonl", '"a"\n"b"\n')) == ["a", "b"]


def test_half_a_surrogate_pair_reaches_no_tokenizer(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.jsonl", '{"text": "a\\ud800b"}')) == ["a?b"]
    data = '{"messages": [{"role": "user", "content": "a\\ud800b"}]}'
    assert documents(write(tmp_path / "a.jsonl", data)) == [Conversation(say("a?b"), "line 1")]


# --- Tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_csv(tmp_path: Path, separator: str) -> None:
    texts = ['say "a,b;c\td|e"', "two\nlines", " spaces ", "x" * 200_000]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([["id", "text", "label"], *([str(i), text, ""] for i, text in enumerate(texts))])
    csv.field_size_limit(131_072)  # csv's own, which all of the process share
    assert documents(tmp_path / "a.csv") == texts
    assert csv.field_size_limit() == 131_072
    assert documents(tmp_path / "a.csv", text_column="id") == ["0", "1", "2", "3"]


def test_a_file_of_tabs_keeps_its_commas(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.tsv", "text, and more\tb\n1, 2\t3\n"), text_column="text, and more") == [
        "1, 2"
    ]
    assert documents(write(tmp_path / "a.csv", "body\nonly one column\n")) == ["only one column"]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array([*DOCUMENTS, None], pa.string())
    column = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    assert documents(write_parquet(tmp_path / "a.parquet", id=[1, 2, 3, 4, 5], text=column)) == DOCUMENTS
    assert documents(write_parquet(tmp_path / "b.parquet", body=column)) == DOCUMENTS  # the only column
    many = pa.array(["a"] * 2000)
    file = write_parquet(tmp_path / "c.parquet", a=many, b=many)
    assert documents(file, text_column="b") == ["a"] * 2000


def test_the_columns_that_there_are_lead_on(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", id=[1], body=["a"])
    words = 'has no column "text", nor conversations (its columns: id, body): --text-column names one of them.'
    assert refusal(file) == words
    assert refusal(write(tmp_path / "a.csv", "id,body\n1,a\n")) == words
    assert refusal(write(tmp_path / "a.jsonl", '{"id": 1, "body": "a"}')) == words
    assert documents(file, text_column="body") == ["a"]
    assert refusal(file, text_column="bodies") == 'has no column "bodies" (its columns: id, body).'
    assert refusal(file, text_column="id") == 'is malformed: "id" in row 1 is a number, not text.'
    assert "(its columns: a b, c):" in refusal(write(tmp_path / "b.csv", '"a\nb",c\n1,2\n'))
    many = write(tmp_path / "b.jsonl", json.dumps({f"column {i} {'x' * 50}": 1 for i in range(20)}))
    assert refusal(many).endswith("xx... and 8 more): --text-column names one of them.")
    text = write(tmp_path / "a.txt", "text")
    assert refusal(text, text_column="a") == 'is plain text, in which --text-column cannot name a column "a".'
    strings = write(tmp_path / "c.jsonl", '"text"')
    assert refusal(strings, text_column="a") == "is malformed: line 1 is no JSON object with columns."


def test_the_column_text_wins(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c", "messages": [{"role": "user", "content": "m"}], "text": "t"}
    file = tmp_path / "a.jsonl"
    assert documents(write(file, json.dumps(row))) == ["t"]
    assert documents(file, text_column="prompt") == ["p"]
    assert documents(file, text_column="messages") == [Conversation(say("m"), "line 1")]
    del row["text"]
    assert documents(write(file, json.dumps(row))) == [Conversation(say("m"), "line 1")]
    del row["messages"]
    assert documents(write(file, json.dumps(row))) == [Conversation(say("p", "c"), "line 1")]


# --- Conversations ------------------------------------------------------------------------------------------

CHATS: dict[str, Any] = {
    "messages": {"messages": [*say("a", "b")], "id": 1},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "text", "text": ""}, "b"]},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "sharegpt in messages": {"messages": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "alpaca without input": {"instruction": "a", "output": "b"},
    "alpaca with null": {"instruction": "a", "input": None, "output": "b"},
    "prompt": {"prompt": "a", "completion": "b"},
    "prompt of messages": {"prompt": [*say("a")], "completion": [{"role": "assistant", "content": "b"}]},
    "question": {"question": "a", "answer": "b"},
    "nothing else": {"chat": [*say("a", "b")]},
}


@pytest.mark.parametrize("layout", CHATS)
def test_layouts_of_conversations(tmp_path: Path, layout: str) -> None:
    row = CHATS[layout]
    expected = say("a", "b")
    assert documents(write(tmp_path / "a.jsonl", json.dumps(row))) == [Conversation(expected, "line 1")]
    assert documents(write(tmp_path / "a.json", json.dumps([row], indent=1))) == [Conversation(expected, "item 1")]
    if layout != "parts":  # of two kinds, which no table holds
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        assert documents(tmp_path / "a.parquet") == [Conversation(expected, "row 1")]
    if all(isinstance(value, str) for value in row.values()):
        write(tmp_path / "a.csv", ",".join(row) + "\n" + ",".join(row.values()) + "\n")
        assert documents(tmp_path / "a.csv") == [Conversation(expected, "line 2")]


def test_a_list_of_messages_by_itself_is_a_conversation(tmp_path: Path) -> None:
    line = json.dumps(say("a", "b"))
    expected = [Conversation(say("a", "b"), "line 1"), Conversation(say("a", "b"), "line 2")]
    assert documents(write(tmp_path / "a.jsonl", f"{line}\n{line}\n")) == expected
    array = write(tmp_path / "a.json", json.dumps([say("a", "b"), say("c")], indent=1))
    assert documents(array) == [Conversation(say("a", "b"), "item 1"), Conversation(say("c"), "item 2")]


def test_an_input_stands_below_its_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Haus", "output": "house"}
    (conversation,) = documents(write(tmp_path / "a.jsonl", json.dumps(row)))
    assert isinstance(conversation, Conversation)
    assert conversation.messages == say("Translate.\n\nHaus", "house")
    assert conversation.characters == len("Translate.\n\nHaus" + "house")
    lines = '{"instruction": "a", "output": "b"}\n' + json.dumps(row)
    assert documents(write(tmp_path / "a.jsonl", lines)) == [
        Conversation(say("a", "b"), "line 1"),
        Conversation(say("Translate.\n\nHaus", "house"), "line 2"),
    ]
    parquet.write_table(pa.Table.from_pylist([{**row, "n": 1}]), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == [Conversation(say("Translate.\n\nHaus", "house"), "row 1")]


def test_what_a_template_may_ask_for_is_kept(tmp_path: Path) -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    messages = [
        {"role": "user", "content": "a", "name": "A", "weight": None},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"from": "observation", "value": "1"},
        {"from": "function_call", "value": "f"},
    ]
    (conversation,) = documents(write(tmp_path / "a.jsonl", json.dumps({"messages": messages})))
    assert isinstance(conversation, Conversation)
    assert conversation.messages == (
        {"role": "user", "content": "a", "name": "A"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "f"},
    )


def chat(**message: Any) -> str:
    return json.dumps({"messages": [message], "id": 1})


BAD_CHATS = {
    'is malformed: "messages" in line 1 is an object, not text.': '{"messages": {"role": "user"}, "id": 1}',
    "in line 1 is a list, but not of messages with role and content, nor text.": '{"messages": [1], "id": 1}',
    '"messages" in line 1 has a message without role and content (its keys: content, x).': chat(content="a", x=1),
    "has a message without role and content (its keys: role).": chat(role="user"),
    "without role and content (its keys: role, content).": chat(role=5, content="a"),
    "has a message whose content is a number, not text.": chat(role="user", content=5),
    "has a message with content of the type image, and not only text.": chat(
        role="user", content=[{"type": "text", "text": "a"}, {"type": "image"}]
    ),
    "has a message with content a number, and not only text.": chat(role="user", content=[5]),
    "is empty.": chat(role="user", content=" "),
}


@pytest.mark.parametrize("words", BAD_CHATS)
def test_a_conversation_that_is_none_is_one_sentence(tmp_path: Path, words: str) -> None:
    assert refusal(write(tmp_path / "a.jsonl", BAD_CHATS[words])).endswith(words)


# --- Folders and patterns -----------------------------------------------------------------------------------


def test_a_folder_is_all_its_files_of_one_kind(tmp_path: Path) -> None:
    inner = tmp_path / "data" / "b"
    inner.mkdir(parents=True)
    write(tmp_path / "data" / "z.jsonl", json_lines(["3"]))
    write(inner / "a.jsonl", json_lines(["1"]))
    write(inner / "b.jsonl.gz", gzip.compress(json_lines(["2"])))
    for name in ("README.md", "dataset_infos.json", ".cache.jsonl", "state.bin"):
        write(tmp_path / "data" / name, "{")
    source = parse_source(str(tmp_path / "data"))
    assert list(source.documents()) == ["1", "2", "3"]
    assert (source.name, source.characters) == (str(tmp_path / "data"), 3)
    write_parquet(tmp_path / "data" / "a.parquet", text=["4"])
    assert refusal(tmp_path / "data") == (
        "is a folder of several kinds of files, 1 like a.parquet and 3 like a.jsonl: name one kind, such as "
        f"{str(tmp_path / 'data' / '*.parquet')!r}."
    )
    assert documents(tmp_path / "data" / "*.parquet") == ["4"]
    assert documents(tmp_path / "data" / "**" / "*.jsonl") == ["1", "3"]
    assert refusal(tmp_path / "data" / "*.csv") == "matches no file."
    (tmp_path / "none").mkdir()
    assert "is a folder, and none of its files ends in .txt, .jsonl" in refusal(tmp_path / "none")


def test_a_broken_file_among_several_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", json_lines(["a"]))
    broken = write(tmp_path / "b.jsonl", "{")
    with pytest.raises(CalibrationError) as caught:
        parse_source(str(tmp_path))
    assert str(caught.value) == f"--calibration: {str(broken)!r} is malformed: line 1 is not JSON."


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    write(tmp_path / "[a].txt", "brackets")
    write(tmp_path / "a.txt", "none")
    assert documents(tmp_path / "[a].txt") == ["brackets"]
    assert documents(tmp_path / "?.txt") == ["none"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    assert refusal(tmp_path / "a.txt") == "is a pipe or a device, not a file, and it is read more than once."


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    train = datasets.Dataset.from_list([{"text": "a", "id": 1}, {"text": "b", "id": 2}])
    test = datasets.Dataset.from_list([{"text": "c", "id": 3}])
    train.save_to_disk(tmp_path / "one")
    assert documents(tmp_path / "one") == ["a", "b"]
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    assert documents(tmp_path / "two") == ["a", "b"]
    assert documents(tmp_path / "two", part="evaluation") == ["c"]
    assert documents(tmp_path / "two" / "test") == ["c"]
    assert documents(tmp_path / "one", text_column="text") == ["a", "b"]
    assert 'has no column "x" (its columns: text, id).' in refusal(tmp_path / "one", text_column="x")
    datasets.DatasetDict({"a": train, "b": test}).save_to_disk(tmp_path / "three")
    assert refusal(tmp_path / "three").startswith("has no split train (its splits: a, b): name one, as ")
    write(tmp_path / "one" / "state.json", "{")
    assert refusal(tmp_path / "one").startswith("is a saved data set that cannot be read (")


# --- What is broken -----------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "is empty."),
    "blank": ("a.txt", b" \n\t\r\n", "is empty."),
    "binary": ("a.txt", b"abcabc\0def", "is binary: byte 6 is NUL."),
    "image": ("a.png", b"\x89PNG\r\n\x1a\n\0", "is binary: byte 8 is NUL."),
    "latin-1": ("a.txt", "abcdé".encode("latin-1"), "is not UTF-8 text: byte 4 cannot be decoded."),
    "bare utf-16": ("a.txt", b"a\0b\0", "is binary, or UTF-16 or UTF-32 without a byte order mark: byte 1 is NUL."),
    "odd utf-16": ("a.txt", b"\xff\xfea\0b", "not the UTF-16 text that its byte order mark says: byte 4 cannot be"),
    "NUL in utf-16": ("a.txt", b"\xff\xfea\0\0\0", "is binary: character 1 is NUL."),
    "parquet as text": (
        "a.txt",
        b"PAR1\x15\x04\0",
        "(it begins like a .parquet file, but its name does not end so).",
    ),
    "no lines": ("a.jsonl", b"", "is empty."),
    "blank lines": ("a.jsonl", b"\n\n", "is empty."),
    "empty texts": ("a.jsonl", json_lines(["", " ", "\n"]), "is empty."),
    "only nulls": ("a.jsonl", json_lines([None, None]), "is empty."),
    "no JSON": ("a.jsonl", json_lines(["a", "b"]) + b"\nplain words\n", "is malformed: line 4 is not JSON."),
    "prose": ("a.json", b"plain words\nand more\n", "is malformed: line 1 is not JSON."),
    "cut JSON": ("a.jsonl", json_lines(["a", "b"])[:-5], "is malformed: line 2 is not JSON."),
    "cut array": ("a.json", b'[\n{"text": "a"},\n{"te', "is malformed: line 3 is not JSON."),
    "late array": ("a.json", b'\n\n[\n{"text": "a"},\n{"te', "is malformed: line 5 is not JSON."),
    "two arrays": ("a.json", b"[\n1\n]\n[\n1]", "is malformed: line 4 is not JSON."),
    "no text": ("a.jsonl", json_lines(["a"]) + b'{"content": "b"}', 'line 2 has no "text" (its columns: content).'),
    "a number": ("a.jsonl", b'{"text": 5}', '"text" in line 1 is a number, not text.'),
    "a boolean": ("a.jsonl", b'{"text": true}', '"text" in line 1 is true or false, not text.'),
    "strings": (
        "a.jsonl",
        b'{"text": ["a"]}',
        '"text" in line 1 is a list, but not of messages with role and content',
    ),
    "columns": ("a.json", b'{"text": {"0": "a"}, "id": {"0": 1}}', '"text" in line 1 is an object, not text.'),
    "a wrapper": (
        "a.json",
        b'{"data": [{"text": "a"}]}',
        '"data" in line 1 is a list, but not of messages with role',
    ),
    "a bare number": ("a.jsonl", b"5", "is malformed: line 1 is no JSON object with columns."),
    "a large number": ("a.jsonl", b"1" * 5000, "is malformed: line 1 is not JSON."),
    "a bare number in an array": ("a.json", b'["a", 5]', "is malformed: item 2 is no JSON object with columns."),
    "binary lines": ("a.jsonl", json_lines(["a"]) + b"\xff\xfe", "is not UTF-8 text: line 2 cannot be decoded."),
    "NUL in a line": ("a.jsonl", json_lines(["a"]) + b"\0", "is binary: line 2 has a NUL."),
    "deep": ("a.jsonl", b"[" * 200_000, "is malformed: line 1 is not JSON."),
    "deep object": ("a.jsonl", b'{"text":' * 200_000, "is malformed: line 1 is not JSON."),
    "bad gzip": ("a.txt.gz", gzip.compress(b"abc")[:10] + b"\xff" * 20, "is no complete .gz file."),
    "no CSV": ("a.csv", b'text,id\n"a,1\n', "is malformed: line 2 is not CSV: unexpected end of data."),
    "open quote": ("a.csv", b'text,id\n"a"b,1\n', "line 2 is not CSV: ',' expected after '\"'."),
    "many fields": ("a.csv", b'text,id\n"a\nb",1\na,b,c\n', "line 4 has 3 fields, but the first line 2."),
    "few fields": ("a.csv", b"text,id\na\n", "line 2 has 1 field, but the first line 2."),
    "late header": ("a.csv", b"\n \ntext,id\na\n", "line 4 has 1 field, but the first line 2."),
    "only a header": ("a.csv", b"text,id\n", "is empty."),
    "an empty CSV": ("a.csv", b"", "is empty."),
    "blank CSV": ("a.csv", b"\n\n", "is empty."),
    "no parquet": ("a.parquet", b"abc" * 10, "cannot be read as Parquet: "),
    "empty parquet": ("a.parquet", b"", "cannot be read as Parquet: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    name, data, words = BROKEN[case]
    assert words in refusal(write(tmp_path / name, data))


def test_broken_parquet_columns(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    assert refusal(write_parquet(file, text=[1])) == 'is malformed: "text" in row 1 is a number, not text.'
    mixed = pa.array([b"a", b"b", b"\xff"])
    assert refusal(write_parquet(file, text=mixed)) == 'is malformed: "text" in row 3 is not UTF-8 text.'
    assert refusal(write_parquet(file, text=pa.array([], pa.string()))) == "is empty."
    assert refusal(write_parquet(file, text=pa.array([None], pa.string()))) == "is empty."
    assert refusal(write_parquet(file, text=pa.array([None]))) == "is empty."
    assert refusal(write_parquet(file, text=[b"\xff"])) == 'is malformed: "text" in row 1 is not UTF-8 text.'
    wrong = pa.array([b"\xff\xfe"]).view(pa.string())
    assert "cannot be read as Parquet: " in refusal(write_parquet(file, text=wrong))


def any_json() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    keys = st.sampled_from(
        ["text", "messages", "role", "content", "from", "value", "prompt", "completion", "type", "a"]
    )
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))


SEEDS: dict[str, bytes] = {
    "a.txt": b"plain words\n" * 3,
    "a.jsonl": json_lines(["a", "b"]),
    "a.json": json.dumps([{"messages": [*say("a", "b")]}], indent=1).encode(),
    "a.csv": b'text,id\n"a, ""b""\n",1\nc,2\n',
    "a.jsonl.gz": gzip.compress(json_lines(["a"] * 20)),
    "a.txt.bz2": bz2.compress(b"text" * 50),
    "a.txt.xz": lzma.compress(b"text" * 50),
    "a.txt.zst": zstd(b"text" * 50),
}


def no_traceback(path: Path) -> None:
    """The file is read, or refused in one sentence."""
    try:
        for document in documents(path):
            assert isinstance(document, str | Conversation)
    except CalibrationError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either is right)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(name=st.sampled_from(sorted(SEEDS)), data=st.data())
def test_damaged_files_leave_no_traceback(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray(SEEDS[name])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] + data.draw(st.binary(max_size=4))
    no_traceback(write(tmp_path / name, bytes(content)))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(rows=st.lists(any_json(), max_size=4), lines=st.booleans())
def test_any_json_leaves_no_traceback(tmp_path: Path, rows: list[Any], lines: bool) -> None:
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
    no_traceback(write(tmp_path / "a.json", text))
