"""Tokens of a source, windows that are drawn from them, and windows of several sources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from models_for_tests import make_tokenizer
from rarefy.calibration.documents import CalibrationWarning, Conversation, Document, Source
from rarefy.calibration.sources import parse_source
from rarefy.calibration.windows import apportion, check_token_ids, draw_mixture, draw_windows, token_stream
from rarefy.errors import CalibrationError, InputError


class Documents(Source):
    def __init__(self, documents: Sequence[Document]) -> None:
        self.name, self._documents = "documents", documents

    def documents(self) -> Iterator[Document]:
        return iter(self._documents)


# --- Tokens -------------------------------------------------------------------------------------------------


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
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
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


# --- Conversations ------------------------------------------------------------------------------------------


def conversation(*contents: str, first: str = "user") -> Conversation:
    roles = [first, *["assistant", "user"] * len(contents)]
    messages = tuple({"role": role, "content": content} for role, content in zip(roles, contents))
    return Conversation(messages, "line 7")


def text_of(documents: Sequence[Document], template: str | None = None) -> str:
    tokenizer = make_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return str(tokenizer.decode(token_stream(Documents(documents), tokenizer)))


def test_conversations_are_written_by_the_chat_template() -> None:
    # The end of a conversation is the template's; a text is still followed by an empty line, unless it is the last.
    assert text_of([conversation("Hi", "Yes?"), conversation("Bye")]) == "user: Hi\nassistant: Yes?\nuser: Bye\n"
    assert text_of(["a", "b", conversation("c"), "d", "e"]) == "a\n\nb\n\nuser: c\nd\n\ne"


def test_special_tokens_of_a_template_are_tokens() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokens = token_stream(Documents([conversation("a")]), tokenizer)
    assert tokens.tolist() == [1, tokenizer.convert_tokens_to_ids("a"), 2]


def test_a_template_that_writes_the_date_writes_the_same_every_day() -> None:
    assert text_of([conversation("a")], "{{ strftime_now('%Y-%m-%d') }}") == "2025-01-01"


def test_without_a_chat_template_conversations_are_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError) as caught:
        token_stream(Documents(["a", conversation("b")]), tokenizer)
    assert str(caught.value) == (
        "'documents' holds conversations, but the model's tokenizer has no chat template that makes text of them: "
        "prune a model that has one, or name a column of plain text with --text-column."
    )


STRICT = """{% if messages[0].role != "user" %}
{{ raise_exception("The first role must be user.\nReally.") }}
{% endif %}
{{- messages[0].content }};"""


def test_conversations_that_the_template_refuses_are_left_out_with_a_warning() -> None:
    rows = [
        conversation("a"),
        conversation("b", first="system"),
        conversation("c"),
        conversation("d", first="system"),
    ]
    with pytest.warns(
        CalibrationWarning,
        match=r"refuses 2 of 4 conversations of documents, .* left out \(line 7: The first role must be user\)$",
    ):
        assert text_of(rows, STRICT) == "a;c;"
    with pytest.raises(CalibrationError, match=r"'documents' holds no conversation that .* \(line 7: The first role"):
        text_of(rows[1:2], STRICT)
    with pytest.raises(CalibrationError, match="holds no conversation that"):
        text_of(rows, "{{ messages[0].content + 1 }}")


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


# --- Tokens that the model does not have --------------------------------------------------------------------


def test_a_token_beyond_the_models_embeddings_is_one_sentence() -> None:
    config = LlamaConfig(vocab_size=1000)
    check_token_ids(torch.tensor([0, 999]), config, "model", bos_id=999)
    check_token_ids(torch.tensor([], dtype=torch.int64), config, "model")
    with pytest.raises(CalibrationError) as caught:
        check_token_ids(torch.tensor([[0, 1000], [99, 100]]), config, "./model")
    assert str(caught.value) == (
        "The tokenizer of ./model gives token 1,000, but its model has embeddings for 1,000 tokens only: it is "
        "another model's tokenizer, or the model was not resized when tokens were added."
    )
    with pytest.raises(CalibrationError, match="gives token 2,000, but"):
        check_token_ids(torch.tensor([0]), config, "./model", bos_id=2000)


# --- Several sources ----------------------------------------------------------------------------------------


def test_windows_are_apportioned_by_the_largest_remainder() -> None:
    assert apportion(10, [0.7, 0.3]) == [7, 3]
    assert apportion(10, [7, 3]) == [7, 3]
    assert apportion(128, [0.7, 0.3]) == [90, 38]  # 89.6 and 38.4
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]  # equal remainders: the first
    assert apportion(5, [1, 2, 1]) == [1, 3, 1]  # 1.25, 2.5, 1.25
    assert apportion(7, [0.1]) == [7]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 300))
def test_apportioned_windows_add_up_and_are_within_one_of_their_quota(shares: list[float], num: int) -> None:
    total = sum(map(Fraction, shares))
    quotas = [num * Fraction(share) / total for share in shares]
    try:
        counts = apportion(num, shares)
    except CalibrationError:
        assert min(quotas) < 1
        return
    assert sum(counts) == num
    assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas))
    assert min(counts) >= 1


@pytest.mark.parametrize("shares", [[], [0.5, 0], [-1], [float("inf"), 1], [float("nan")]])
def test_shares_that_are_none(shares: list[float]) -> None:
    with pytest.raises(InputError, match="share"):
        apportion(10, shares)


def test_a_share_below_one_window_is_one_sentence() -> None:
    with pytest.raises(CalibrationError, match=r"^The share 0\.01 of 32 windows is less than one: more windows or"):
        apportion(32, [0.99, 0.01])
    assert apportion(64, [0.99, 0.01]) == [63, 1]  # 0.64 is rounded up


def test_a_mixture_holds_windows_of_every_source_in_seeded_order() -> None:
    asked: list[tuple[int, int, int]] = []

    def source(which: int) -> object:
        def draw(num: int, seed: int) -> Tensor:
            asked.append((which, num, seed))
            return torch.full((num, 5), which)

        return draw

    draws = [source(0), source(1)]
    windows = draw_mixture(draws, [0.75, 0.25], 40, seed=3)  # type: ignore[arg-type]
    assert windows.shape == (40, 5)
    assert (windows[:, 0] == 1).sum() == 10
    assert [(which, num) for which, num, _ in asked] == [(0, 30), (1, 10)]
    assert asked[0][2] != asked[1][2]  # the same text twice gives other windows
    # Neither end of the run has only one of them.
    assert 0 < (windows[:20, 0] == 1).sum() < 10
    again = asked.copy()
    asked.clear()
    assert torch.equal(draw_mixture(draws, [0.75, 0.25], 40, seed=3), windows)  # type: ignore[arg-type]
    assert asked == again
    other = draw_mixture(draws, [0.75, 0.25], 40, seed=4)  # type: ignore[arg-type]
    assert not torch.equal(other, windows)


def test_a_mixture_of_streams() -> None:
    low, high = torch.arange(100), torch.arange(1000, 1100)
    windows = draw_mixture(
        [lambda num, seed: draw_windows(low, num, 10, seed), lambda num, seed: draw_windows(high, num, 10, seed)],
        [1, 3],
        8,
        seed=0,
    )
    assert torch.equal(windows, windows[:, :1] + torch.arange(10))
    assert (windows[:, 0] >= 1000).sum() == 6
