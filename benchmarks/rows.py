"""Rows of a table, kept in a file one by one, and what they are measured on; for other benchmarks."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rarefy.calibration.sources import parse_source
from rarefy.calibration.windows import DRAW_FROM, draw_windows, token_stream
from rarefy.cli import keep_freed_memory
from rarefy.evaluation.perplexity import perplexity
from rarefy.models.checkpoint import load_model, load_tokenizer, resolve_model
from rarefy.models.source import ModelSource


def parser(doc: str | None, output: str) -> argparse.ArgumentParser:
    """The arguments that all such benchmarks have."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--calibration", required=True, help="calibration text, as of `rarefy prune`")
    arguments.add_argument("--text", help="a text to measure on: 20 windows of 2,048 tokens")
    arguments.add_argument("--held-out", help="text of the calibration's kind that it never saw: 8 windows")
    arguments.add_argument("--windows", default="32x1024", help="calibration windows x tokens")
    arguments.add_argument("--eval-dtype", default="float32")
    arguments.add_argument("-o", "--output", type=Path, default=Path(output))
    return arguments


class Rows:
    """The rows of ``file`` that have these entries (``key``)."""

    def __init__(self, file: Path, key: dict[str, Any]) -> None:
        self.file, self.key = file, key

    def all(self, **cell: Any) -> list[dict[str, Any]]:
        """Those that have these entries as well."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        asked = {**self.key, **cell}
        return [
            line for line in map(json.loads, lines) if all(line.get(name) == value for name, value in asked.items())
        ]

    def add(self, **line: Any) -> None:
        """Add one."""
        with self.file.open("a") as file:
            file.write(json.dumps({**self.key, **line}) + "\n")


@dataclass(frozen=True)
class Ground:
    """What rows are measured on."""

    said: argparse.Namespace
    source: ModelSource
    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, said: argparse.Namespace) -> Ground:
        """The model that was named, on the CPU."""
        keep_freed_memory()
        source = resolve_model(said.model)
        tokenizer = load_tokenizer(source)
        assert tokenizer is not None
        return cls(said, source, load_model(source, torch.device("cpu"), "auto")[0], tokenizer)

    def windows(self, seed: int = 0) -> Tensor:
        """Calibration windows of shape (number, length), as ``rarefy prune`` draws them."""
        number, length = map(int, self.said.windows.split("x"))
        return self.windows_of(self.said.calibration, number, length, seed)

    def windows_of(self, text: str, number: int, length: int, seed: int = 0) -> Tensor:
        """Windows of a text."""
        tokens = token_stream(parse_source(text), self.tokenizer, enough=DRAW_FROM * number * length)
        return draw_windows(tokens, number, length, seed)

    @cached_property
    def _texts(self) -> list[tuple[Tensor, int]]:
        return [
            (token_stream(parse_source(name), self.tokenizer), most)
            for name, most in ((self.said.text, 20), (self.said.held_out, 8))
        ]

    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexity of the two texts; the model is in --eval-dtype afterwards."""
        model.to(getattr(torch, self.said.eval_dtype))
        values = [perplexity(model, tokens, max_windows=most).perplexity for tokens, most in self._texts]
        return dict(zip(("text", "held_out"), values, strict=True))
