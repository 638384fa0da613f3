"""Which texts are measured and what they are called, and that one measurement says all that was asked."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from models_for_tests import make_model, make_tokenizer
from rarefy.calibration.documents import Source
from rarefy.calibration.windows import token_stream
from rarefy.errors import CalibrationError, InputError
from rarefy.evaluation.divergence import divergence
from rarefy.evaluation.measure import Corpus, Measures, corpora
from rarefy.evaluation.perplexity import perplexity
from rarefy.evaluation.texts import parse_texts
from rarefy.models.source import ModelSource

MODEL = ModelSource("model", "folder", Path(), make_model("llama").config)


def read(source: Source) -> str:
    """The only document of a source."""
    (document,) = source.documents()
    assert isinstance(document, str)
    return document


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "wiki.test.raw"
    path.write_bytes(b" = A =\r\n\n x  \n\n\n" * 40)
    return path


def test_without_a_name_the_text_is_the_held_out_third() -> None:
    ((label, source),) = parse_texts([]).items()
    assert (label, source.name) == ("python-docs", "python-docs (held-out third)")
    assert len(read(source)) > 50_000


def test_a_file_is_read_as_it_stands_and_called_by_its_name(file: Path) -> None:
    ((label, source),) = parse_texts([str(file)]).items()
    assert (label, source.name) == ("wiki.test", str(file))
    assert read(source).encode() == file.read_bytes()
    tokens = token_stream(source, make_tokenizer())
    assert tokens.tolist() == make_tokenizer()(read(source), add_special_tokens=False)["input_ids"]


def test_labels_are_chosen_or_made_different(file: Path, tmp_path: Path) -> None:
    twin = tmp_path / "deep" / file.name
    twin.parent.mkdir()
    twin.write_text("other words")
    assert list(parse_texts([str(file), str(twin), f"w2={file}", "hub:owner/name:part"])) == [
        "wiki.test", "deep-wiki.test", "w2", "owner-name-part",
    ]  # fmt: skip
    with pytest.raises(InputError, match="two texts the label w2"):
        parse_texts([f"w2={file}", f"w2={twin}"])
    odd = tmp_path / "a=b.txt"
    odd.write_text("a file whose name looks like a label")
    assert list(parse_texts([str(odd)])) == ["a-b"]
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"text\na\n"))
    assert list(parse_texts([str(tmp_path / "rows.csv.gz")])) == ["rows"]
    assert list(parse_texts([str(tmp_path / "*.csv.gz"), str(tmp_path / "[ab]*.txt")])) == ["text", "ab"]


def test_a_text_column_is_that_of_every_text_with_columns(file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("id,body\n1,a\n2,b\n")
    sources = parse_texts([str(file), f"r={rows}", "hub:a/b"], "body")
    assert list(sources["r"].documents()) == ["a", "b"]
    assert sources["a-b"].text_column == "body"  # type: ignore[attr-defined]
    with pytest.raises(CalibrationError, match=r"^--text: .*rows\.csv' has no column \"text\""):
        parse_texts([str(rows)])
    with pytest.raises(
        InputError, match="--text-column is 'body', but must be left out, because no text has columns"
    ):
        parse_texts([str(file)], "body")
    assert list(parse_texts([str(file)], "body", must_apply=False)) == ["wiki.test"]


def test_tokens_beyond_the_model_are_refused(file: Path) -> None:
    small = ModelSource("small", "folder", Path(), LlamaConfig(vocab_size=20))
    with pytest.raises(CalibrationError, match="The tokenizer of small gives token .* has embeddings for 20 tokens"):
        corpora(parse_texts([str(file)]), make_tokenizer(), 8, None, small)


@pytest.mark.parametrize("name", ["self", "c4", "wikitxt2", "no/such/file.txt", "label=no/such/file.txt"])
def test_what_cannot_be_evaluated_on_is_refused(name: str) -> None:
    with pytest.raises(CalibrationError, match=r"--text.*" + name.removeprefix("label=")):
        parse_texts([name])


def test_a_text_shorter_than_a_window_is_refused_with_both_numbers(file: Path) -> None:
    sources = parse_texts([str(file)])
    count = len(token_stream(sources["wiki.test"], make_tokenizer()))
    assert len(corpora(sources, make_tokenizer(), count, None, MODEL)) == 1
    assert len(corpora(sources, make_tokenizer(), count + 1, 1, MODEL)) == 1  # the start token is not of the text
    with pytest.raises(CalibrationError, match=rf"{count:,} tokens, but one window needs {count + 1:,}"):
        corpora(sources, make_tokenizer(), count + 1, None, MODEL)


def test_one_measurement_says_what_each_part_says_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(100, (90,), generator=generator) for _ in range(2)]
    measures = Measures([Corpus("a", "a text", tokens[0]), Corpus("b", "b text", tokens[1])], 16, 3, bos_id=1)
    dense, model = make_model("llama"), make_model("llama")
    model.model.layers[0].mlp.up_proj.weight.mul_(3)
    alone = measures.of(model, None)
    assert alone["divergence"] == []
    assert alone["tasks"] == {}
    seen: list[tuple[int, int, str]] = []
    for reference in (dense, measures.record(dense)):
        found = measures.of(model, None, reference, progress=lambda *step: seen.append(step))
        for i, row in enumerate(found["perplexity"]):
            expected = perplexity(model, tokens[i], 16, max_windows=3, bos_id=1)
            assert row["value"] == pytest.approx(expected.perplexity, rel=1e-6)
            assert {key: value for key, value in row.items() if key != "value"} == {
                "text": "ab"[i] + " text", "label": "ab"[i], "length": 16, "windows": 3, "tokens": 45, "bos": True,
                "dtype": "float32",
            }  # fmt: skip
            distance = divergence(model, dense, tokens[i], 16, max_windows=3, bos_id=1)
            assert found["divergence"][i]["kl"] == pytest.approx(distance.kl, rel=1e-4)
            assert found["divergence"][i]["agreement"] == distance.agreement
            assert found["divergence"][i]["label"] == "ab"[i]
    assert seen[:4] == [(1, 3, "a"), (2, 3, "a"), (3, 3, "a"), (1, 3, "b")]


def test_what_is_not_finite_is_none() -> None:
    model = make_model("llama")
    model.get_output_embeddings().weight[3, 3] = torch.nan
    measures = Measures([Corpus("a", "a text", torch.arange(40))], 16)
    found = measures.of(model, None, make_model("llama"))
    assert found["perplexity"][0]["value"] is None
    assert found["divergence"][0]["kl"] is None
