"""Makes text of conversations by the chat template of a model's tokenizer."""

from __future__ import annotations

import datetime
import warnings
from typing import TYPE_CHECKING, Self
from unittest import mock

from rarefy.calibration.documents import CalibrationWarning, Conversation, first_line, refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _OneDay(datetime.datetime):
    """The clock of templates that write today's date: the same text must come out every day."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Self:
        return cls(2025, 1, 1, tzinfo=tz)


class ChatTemplate:
    """Makes text of conversations, and counts those that the template refuses."""

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._source, self._tokenizer = source, tokenizer
        self._rendered = self._refused = 0
        self._first_refusal = ""

    def render(self, conversation: Conversation) -> str | None:
        """The text of one conversation; None where the template refuses it. CalibrationError without a template."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise refused(
                self._source,
                "holds conversations, but the model's tokenizer has no chat template that makes text of them: "
                "prune a model that has one, or name a column of plain text with --text-column",
            )
        try:
            with mock.patch("transformers.utils.chat_template_utils.datetime", _OneDay, create=True):
                text = self._tokenizer.apply_chat_template([*map(dict, conversation.messages)], tokenize=False)
        except Exception as error:  # noqa: BLE001 (a template is a program that raises what it likes)
            self._refused += 1
            self._first_refusal = self._first_refusal or f"{conversation.place}: {first_line(error)}"
            return None
        self._rendered += 1
        return str(text)

    def report(self) -> None:
        """Warn of refused conversations; CalibrationError where all of them were."""
        if self._refused and not self._rendered:
            raise refused(
                self._source, f"holds no conversation that the model's chat template takes ({self._first_refusal})"
            )
        if self._refused:
            warnings.warn(
                f"the model's chat template refuses {self._refused:,} of {self._refused + self._rendered:,} "
                f"conversations of {self._source}, which are left out ({self._first_refusal})",
                CalibrationWarning,
                stacklevel=3,
            )
