"""The settings of one tuning: validated, saved beside its outputs, loadable again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rarefy.errors import InputError, RecipeError
from rarefy.runs.arguments import DEVICE_WORDS, DEVICES
from rarefy.runs.recipe import Number, Whole, _no_bool, what_is_wrong
from rarefy.runs.recipe_file import Told, refuse_unknown
from rarefy.tuning.settings import TuneSettings

#: What a form of training takes for a learning rate unless one is given: weights that are trained themselves,
#: norms alone, SPP's factors (its paper's), LoRA's matrices.
LEARNING_RATES = {"full": 2e-4, "norms": 1e-3, "spp": 5e-2, "lora": 1e-3}
_WHOLE = "a whole number of at least"


class TuneRecipe(BaseModel):
    """One tuning. A field's description is what its error messages say is allowed; None means "not said"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="a folder that `rarefy prune` wrote, or any model folder")
    against: str | None = Field(None, min_length=1, description="the dense model: a hub id, a folder or a .gguf file")
    calibration: list[str] = Field([], description="sources of text, each SOURCE or SOURCE=SHARE")
    text_column: str | None = Field(None, min_length=1, description="the name of a column of the texts' rows")
    num_samples: Whole | None = Field(None, ge=1, description=f"{_WHOLE} 1 (windows)")
    sequence_length: Whole | None = Field(None, ge=2, description=f"{_WHOLE} 2 (tokens)")
    held_out: Whole = Field(4, ge=0, description=f"{_WHOLE} 0 (windows)")
    bos: bool = Field(False, description="true or false")
    parametrisation: Literal["full", "norms", "spp", "lora"] = Field("full", description="full, norms, spp or lora")
    rank: Whole = Field(16, ge=1, description=f"{_WHOLE} 1")
    alpha: Number = Field(32.0, gt=0, allow_inf_nan=False, description="a number above 0")
    learning_rate: Number | None = Field(None, gt=0, allow_inf_nan=False, description="a number above 0")
    batch_size: Whole = Field(1, ge=1, description=f"{_WHOLE} 1 (windows)")
    micro_batch: Whole | None = Field(None, ge=1, description=f"{_WHOLE} 1 (windows)")
    epochs: Whole = Field(3, ge=1, description=f"{_WHOLE} 1")
    max_steps: Whole | None = Field(None, ge=1, description=f"{_WHOLE} 1")
    warmup_steps: Whole = Field(8, ge=0, description=f"{_WHOLE} 0")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="linear, cosine or constant")
    weight_decay: Number = Field(0.0, ge=0, allow_inf_nan=False, description="a number of at least 0")
    clip: Number = Field(1.0, ge=0, allow_inf_nan=False, description="a number of at least 0")
    text_share: Number = Field(0.0, ge=0, le=1, allow_inf_nan=False, description="a number in [0, 1]")
    hidden_weight: Number = Field(0.0, ge=0, allow_inf_nan=False, description="a number of at least 0")
    teacher: str = Field("auto", description="auto, model, states, or top-K such as top-64")
    eval_every: Whole = Field(0, ge=0, description=f"{_WHOLE} 0 (steps; 0: once an epoch)")
    patience: Whole = Field(0, ge=0, description=f"{_WHOLE} 0 (measurements; 0: never stop early)")
    optimizer: str = Field("adamw", min_length=1, description="adamw, or package.module:Class")
    gradient_checkpointing: bool = Field(False, description="true or false")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto, float32 or bfloat16")
    device: str = Field("auto", pattern=DEVICES, description=DEVICE_WORDS)
    seed: Annotated[int, BeforeValidator(_no_bool)] | None = Field(None, ge=0, lt=2**63, description=f"{_WHOLE} 0")

    @classmethod
    def read(cls, options: Mapping[str, Any], file: Path | Told | None = None, *, allow_code: bool = False) -> Self:
        """The recipe in ``file`` (YAML, or what is told), with ``options`` of the command line replacing its keys.

        An optimiser that is not torch's is code that runs when it is imported: an option may name it, a file only
        with ``allow_code``. Raises InputError where an option is wrong, RecipeError where the file is.
        """
        told = Told.by(file)
        base = dict(told.values) if told else {}
        merged = {**base, **options}

        def from_file(key: str) -> bool:
            return key in base and key not in options

        def written(key: str) -> str:
            if told is not None and from_file(key):
                return f"{key} in {told.where}"
            return {"model": "MODEL"}.get(key, "--" + key.replace("_", "-"))

        if not merged.get("model"):
            raise InputError.sentence("MODEL is missing: name a folder that `rarefy prune` wrote.")
        refuse_unknown(merged, cls.model_fields, told)
        try:
            recipe = cls.model_validate(merged)
        except ValidationError as error:
            key, given, allowed = what_is_wrong(error, cls, merged)
            kind = RecipeError if from_file(key) else InputError
            raise kind(written(key), given, allowed) from None
        recipe._check(written)
        if from_file("optimizer") and not allow_code and recipe.needs_code:
            raise RecipeError.sentence(
                f"{written('optimizer')} is {recipe.optimizer!r}, which is code from outside torch: --allow-code "
                "lets a recipe run it, and so does --optimizer with that name."
            )
        return recipe

    @property
    def needs_code(self) -> bool:
        """Whether the optimiser is code from outside torch, which runs when it is imported."""
        return self.optimizer != "adamw" and not self.optimizer.startswith("torch.optim:")

    def _check(self, written: Callable[[str], str]) -> None:
        """Raise InputError where two keys contradict each other; ``written`` names a key as its user wrote it."""
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            given, batch = written("micro_batch"), written("batch_size")
            raise InputError(given, self.micro_batch, f"a divisor of {batch}, which is {self.batch_size}")
        if self.top_k() is None and self.teacher not in ("auto", "model", "states"):
            raise InputError(written("teacher"), self.teacher, "auto, model, states, or top-K such as top-64")
        if self.hidden_weight and self.teacher not in ("auto", "model"):
            raise InputError.sentence(
                f"{written('hidden_weight')} needs the dense model's hidden states, which {written('teacher')} "
                f"{self.teacher} does not keep: model does."
            )
        for key in ("rank", "alpha") if self.parametrisation in ("full", "norms") else ():
            if (value := getattr(self, key)) != type(self).model_fields[key].default:
                raise InputError.sentence(
                    f"{written(key)} is {value:g}, but {written('parametrisation')} "
                    f"{self.parametrisation} has none: spp and lora do."
                )
        for text in self.calibration:
            split_share(text, written("calibration"))

    def filled(self, values: Mapping[str, Any], told: str) -> Self:
        """The same recipe with these ``values`` of another, which errors call ``told``. Raises RecipeError."""
        fields = type(self).model_fields
        try:
            return self.model_validate({**self.model_dump(exclude_unset=True), **values})
        except ValidationError as error:
            key = str(error.errors()[0]["loc"][0])
            allowed = fields[key].description or "something else"
            raise RecipeError(f"{key} in {told}", values[key], allowed) from None

    def top_k(self) -> int | None:
        """How many tokens of each position are kept, where the teacher is top-K."""
        found = re.fullmatch(r"top-([1-9][0-9]{0,5})", self.teacher)
        return int(found[1]) if found else None

    def settings(self) -> TuneSettings:
        """What the loop is to do; ``micro_batch`` is one window unless the recipe says another number."""
        return TuneSettings(
            learning_rate=self.learning_rate or LEARNING_RATES[self.parametrisation],
            micro_batch=self.micro_batch or 1,
            seed=self.seed or 0,
            **{name: getattr(self, name) for name in _SHARED},
        )

    def to_yaml(self) -> str:
        """The recipe as YAML that ``read`` reads back; what is not said is left out."""
        values = self.model_dump(exclude_none=True)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)


#: Keys that the loop's settings have as well.
_SHARED = (
    "batch_size", "epochs", "max_steps", "warmup_steps", "schedule", "weight_decay", "clip", "text_share",
    "hidden_weight", "eval_every", "patience", "optimizer", "gradient_checkpointing",
)  # fmt: skip


def split_share(text: str, argument: str) -> tuple[str, float]:
    """``"c4=0.7"`` as ("c4", 0.7); without a share it is 1. Raises InputError where a share is not above 0."""
    name, equals, share = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        value = float(share)
    except ValueError:
        return text, 1.0  # a file whose name has the sign in it
    if not (name and 0 < value < float("inf")):
        raise InputError(argument, text, "SOURCE or SOURCE=SHARE with a share above 0")
    return name, value
