"""Finds the document in a row of a table: a text, or a conversation in one of the layouts that people use.

    choose_layout(source, columns, text_column)  -->  Layout  --document(row, place)-->  text, Conversation or None

A row is what a JSON object, a line of a CSV file and a row of a Parquet file or of a data set have in common:
values under the names of columns. Which column is read is chosen once, by the names of the columns alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rarefy.calibration.documents import Conversation, Document, joined, refused, shortened

TEXT = "text"

# Columns with a list of messages, each {role, content} or {from, value} (ShareGPT).
_MESSAGES = ("messages", "conversations", "conversation")

# Columns with a request, what belongs to it, and the answer: Alpaca, Dolly, TRL, GSM8K.
_EXCHANGES: tuple[tuple[str, str | None, str], ...] = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("question", None, "answer"),
)

# The keys of a message, and those of ShareGPT's.
_ROLE_CONTENT = ("role", "content")
_FROM_VALUE = ("from", "value")

# ShareGPT's names for the roles that chat templates know.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Layout:
    """The columns of a row that hold its document: one, or those of a request and its answer.

    ``source`` is named by every error. Text is a document as it stands; a list of messages is a conversation.
    ``request_input`` is the column with what a request is about, which a row may lack.
    """

    source: str
    columns: tuple[str, ...]
    request_input: str | None = None

    def document(self, row: Mapping[str, Any], place: str) -> Document | None:
        """The document of ``row``, which stands at ``place`` ("line 3"); None where the row has no value.

        Raises CalibrationError where a value is neither text nor a list of messages.
        """
        for column in self.columns:
            if column not in row:
                raise refused(
                    self.source, f'is malformed: {place} has no "{shortened(column)}" (its columns: {joined(row)})'
                )
        if len(self.columns) == 1:
            return self._in_column(row, self.columns[0], place)
        request, answer = (self._in_column(row, column, place) for column in self.columns)
        if request is None or answer is None:
            return None
        about = self._in_column(row, self.request_input, place) if self.request_input else None
        if isinstance(request, str) and isinstance(about, str) and about.strip():
            request = f"{request}\n\n{about}"
        return Conversation((*_messages(request, "user"), *_messages(answer, "assistant")), place)

    def _in_column(self, row: Mapping[str, Any], column: str, place: str) -> Document | None:
        return self.value(row.get(column), f'"{shortened(column)}" in {place}', place)

    def value(self, value: Any, what: str, place: str) -> Document | None:
        """The document that a single value is; ``what`` names it in errors."""
        if value is None or (isinstance(value, float) and value != value):  # pandas' NaN is no value
            return None
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                raise refused(self.source, f"is malformed: {what} is not UTF-8 text") from None
        if isinstance(value, str):
            return _sound(value)
        if not isinstance(value, list):
            raise refused(self.source, f"is malformed: {what} is {_kind(value)}, not text")
        messages = tuple(self._message(message, what) for message in value)
        return Conversation(messages, place) if messages else None

    def _message(self, message: Any, what: str) -> Mapping[str, Any]:
        """One message as chat templates want it: {role, content}, content being text."""
        if not isinstance(message, dict) or not message.keys() & {*_ROLE_CONTENT, *_FROM_VALUE}:
            raise refused(
                self.source, f"is malformed: {what} is a list, but not of messages with role and content, nor text"
            )
        role_key, content_key = _FROM_VALUE if "role" not in message and "from" in message else _ROLE_CONTENT
        role = message.get(role_key)
        if not isinstance(role, str) or content_key not in message:
            raise refused(
                self.source,
                f"is malformed: {what} has a message without role and content (its keys: {joined(message)})",
            )
        # Tables fill up what a message does not have; a template takes that for given.
        rest = {
            key: value for key, value in message.items() if value is not None and key not in (role_key, content_key)
        }
        return {"role": _ROLES.get(role, role), "content": self._content(message[content_key], what), **rest}

    def _content(self, content: Any, what: str) -> str:
        if content is None:  # as of a message that only calls a tool
            return ""
        if isinstance(content, str):
            return _sound(content)
        if not isinstance(content, list):
            raise refused(
                self.source, f"is malformed: {what} has a message whose content is {_kind(content)}, not text"
            )
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                kind = (
                    f"of the type {shortened(part['type'])}"
                    if isinstance(part, dict) and "type" in part
                    else _kind(part)
                )
                raise refused(
                    self.source, f"cannot be used: {what} has a message with content {kind}, and not only text"
                )
            texts.append(_sound(text))
        return "".join(texts)


def choose_layout(source: str, columns: Iterable[str], text_column: str | None = None) -> Layout:
    """The layout of rows with these ``columns``; ``text_column`` is the one that the user named.

    Without it the column is "text", else one of messages, else those of a request and its answer, else the only
    one that there is. Raises CalibrationError, with the columns that there are, where none of these is there.
    """
    names = [*map(str, columns)]
    if text_column is not None:
        if text_column not in names:
            raise refused(source, f'has no column "{shortened(text_column)}" (its columns: {joined(names)})')
        return Layout(source, (text_column,))
    for name in (TEXT, *_MESSAGES):
        if name in names:
            return Layout(source, (name,))
    for request, request_input, answer in _EXCHANGES:
        if request in names and answer in names:
            return Layout(source, (request, answer), request_input)
    if len(names) == 1:
        return Layout(source, (names[0],))
    raise refused(
        source,
        f'has no column "text", nor conversations (its columns: {joined(names)}): --text-column names one of them',
    )


def is_conversation(value: Any) -> bool:
    """Whether a list holds messages, and not rows."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and ("role" in one or "from" in one) for one in value)
    )


def _messages(document: Document, role: str) -> tuple[Mapping[str, Any], ...]:
    return ({"role": role, "content": document},) if isinstance(document, str) else document.messages


def _sound(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can spell and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _kind(value: Any) -> str:
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "true or false"),
        ((int, float), "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "an object"),
        (type(None), "null"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")
