"""The settings of one run of ``rarefy shrink``: validated, saved beside its outputs, loadable again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rarefy.errors import InputError, RecipeError
from rarefy.runs.arguments import DEVICE_WORDS, DEVICES
from rarefy.runs.recipe import (
    DEFAULT_CALIBRATION,
    FULL_WINDOWS,
    QUICK_WINDOWS,
    Number,
    Whole,
    check_tokens,
    what_is_wrong,
)
from rarefy.runs.recipe_file import Told, refuse_unknown

_WHOLE = "a whole number of at least"
_SHARE = "a share between 0 and 1"

_KINDS = ("blocks", "heads", "neurons")

#: Keys that only one rule for blocks reads.
_RULE_OF = {"generations": "search", "offspring": "search", "steps": "policy-gradient"}


class ShrinkRecipe(BaseModel):
    """What is removed from a model, and how it is chosen. A field's description is what its errors say is allowed.

    None means "not said"; of ``blocks``, ``heads`` and ``neurons`` at least one is, or else ``search`` and ``size``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="a hub id, a local folder, a .gguf file, or smollm2")
    blocks: Number | None = Field(None, gt=0, allow_inf_nan=False, description=f"{_WHOLE} 1, or {_SHARE}")
    by: Literal["kl", "perplexity", "taylor", "greedy", "search", "policy-gradient"] = Field(
        "kl", description="kl, perplexity, taylor, greedy, search or policy-gradient"
    )
    generations: Whole = Field(32, ge=1, description=f"{_WHOLE} 1")
    offspring: Whole = Field(16, ge=1, description=f"{_WHOLE} 1")
    steps: Whole = Field(500, ge=1, description=f"{_WHOLE} 1")
    copies: bool = Field(True, description="true or false")
    search: bool = Field(False, description="true or false")
    size: Number | None = Field(None, gt=0, lt=1, description=_SHARE)
    among: tuple[Literal["blocks", "heads", "neurons"], ...] = Field(
        (), description="some of blocks, heads and neurons"
    )
    candidates: Whole = Field(32, ge=1, description=f"{_WHOLE} 1")
    heads: Number | None = Field(None, gt=0, lt=1, description=_SHARE)
    neurons: Number | None = Field(None, gt=0, lt=1, description=_SHARE)
    multiple: Whole = Field(64, ge=1, description=f"{_WHOLE} 1 (neurons)")
    choose: Literal["interactions", "single", "wanda"] = Field(
        "interactions", description="interactions, single or wanda"
    )
    repair: bool = Field(True, description="true or false")
    damping: Number | None = Field(None, ge=0, le=1e4, allow_inf_nan=False, description="a number from 0 to 10,000")
    calibration: str | None = Field(None, min_length=1, description="a source of text, such as self or a .txt file")
    text_column: str | None = Field(None, min_length=1, description="the name of a column of the calibration's rows")
    num_samples: Whole | None = Field(None, ge=1, description=f"{_WHOLE} 1 (windows)")
    sequence_length: Whole | None = Field(None, ge=2, description=f"{_WHOLE} 2 (tokens)")
    batch_size: Whole = Field(4, ge=1, description=f"{_WHOLE} 1 (windows)")
    bos: bool = Field(False, description="true or false")
    seed: Whole = Field(0, ge=0, description=f"{_WHOLE} 0")
    device: str = Field("auto", pattern=DEVICES, description=DEVICE_WORDS)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto, float32, bfloat16 or float16"
    )

    @classmethod
    def read(cls, options: Mapping[str, Any], file: Path | None = None) -> Self:
        """The recipe in ``file`` (YAML), with the ``options`` of the command line replacing its keys.

        Raises InputError where an option is wrong, RecipeError where the file is.
        """
        told = Told.by(file)
        base = dict(told.values) if told else {}
        merged = {**base, **options}

        def from_file(key: str) -> bool:
            return file is not None and key in base and key not in options

        def written(key: str) -> str:
            if from_file(key):
                return f"{key} in {file}"
            return {"model": "MODEL"}.get(key, "--" + key.replace("_", "-"))

        if not merged.get("model"):
            raise InputError.sentence("MODEL is missing: name a hub id, a local folder, a .gguf file, or smollm2.")
        refuse_unknown(merged, cls.model_fields, told)
        try:
            recipe = cls.model_validate(merged)
        except ValidationError as error:
            key, given, allowed = what_is_wrong(error, cls, merged)
            kind = RecipeError if from_file(key) else InputError
            raise kind(written(key), given, allowed) from None
        recipe._check(written)
        return recipe

    def _said(self) -> list[str]:
        """The kinds of which the recipe itself says how much goes."""
        return [kind for kind in _KINDS if getattr(self, kind) is not None]

    def _check(self, written: Callable[[str], str]) -> None:
        """What one key says of another."""
        said = self._said()
        if self.search:
            self._check_search(written, said)
        elif self.size is not None or self.among:
            key = "size" if self.size is not None else "among"
            raise InputError.sentence(f"{written(key)} goes with --search, which finds how much of each kind goes.")
        elif not said:
            raise InputError.sentence(
                "Nothing is to be removed: --blocks, --heads or --neurons says what, and how much of it; or --search "
                "with --size."
            )
        if self.blocks is not None and self.blocks >= 1 and self.blocks != int(self.blocks):
            raise InputError(written("blocks"), self.blocks, f"{_WHOLE} 1, or {_SHARE}")

    def _unread(self) -> dict[str, str]:
        """The keys that nothing reads, and with what something would."""
        needs = {key: f"--by {rule}" for key, rule in _RULE_OF.items() if rule != self.by}
        kinds = set((self.among or _KINDS) if self.search else self._said())
        if not self.search:
            needs["candidates"] = "--search"
        if "blocks" not in kinds:
            needs |= dict.fromkeys(("by", "copies"), "--blocks or --search")
        if not kinds & {"heads", "neurons"}:
            needs |= dict.fromkeys(("choose", "damping"), "--heads, --neurons or --search")
        elif self.choose == "wanda" and not self.repair:
            needs["damping"] = "a repair or another --choose"
        if "neurons" not in kinds:
            needs["multiple"] = "--neurons or --search"
        if self.search and self.among:
            needs = {key: words.replace("--search", "--among") for key, words in needs.items()}
        return needs

    def check_read(self, options: Collection[str]) -> None:
        """Raise InputError where nothing reads one of these keys, which the command line has."""
        for key, words in self._unread().items():
            if key in options and getattr(self, key) != type(self).model_fields[key].default:
                option = ("--no-" if getattr(self, key) is False else "--") + key.replace("_", "-")
                raise InputError.sentence(f"{option} goes with {words}, without which nothing reads it.")

    def _check_search(self, written: Callable[[str], str], said: Sequence[str]) -> None:
        if self.size is None:
            raise InputError.sentence(
                f"{written('search')} goes with --size, the share of the parameters that is left, such as 0.8."
            )
        if said:
            raise InputError.sentence(
                f"{written('search')} finds by itself how much goes, so {written(said[0])} cannot be said, too; "
                "--among names the kinds that may go."
            )

    def resolved(self, context: int | None) -> Self:
        """The same recipe with all defaults. Raises InputError where windows exceed the model's ``context``."""
        num, length = QUICK_WINDOWS if self.calibration is None else FULL_WINDOWS
        length = self.sequence_length or min(length, context or length)
        if context is not None and length > context:
            raise InputError("--sequence-length", length, f"at most {context}, the model's longest context")
        filled = {"calibration": self.calibration or DEFAULT_CALIBRATION, "sequence_length": length}
        num = self.num_samples or num
        check_tokens(num, length)
        return self.model_copy(update={**filled, "num_samples": num})

    @property
    def window_shape(self) -> tuple[int, int]:
        """The number of calibration windows and their length in tokens; only of a resolved recipe."""
        assert self.num_samples is not None
        assert self.sequence_length is not None
        return self.num_samples, self.sequence_length

    def to_yaml(self) -> str:
        """The recipe as YAML that ``read`` reads back; what is not said, and what nothing reads, is left out."""
        values = self.model_dump(exclude_none=True, exclude={*self._unread(), "among"})
        if self.among:
            values["among"] = list(self.among)  # YAML has no tuples
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)
