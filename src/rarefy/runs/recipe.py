"""The settings of one pruning run: validated, saved beside its outputs, loadable again.

A recipe is what the command line says, what a YAML file says, or both: an option replaces the
file's key. Every mistake is one sentence that names the setting as its user wrote it
(``--num-samples`` on the command line, ``num_samples in run.yaml`` in a file).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rarefy.allocation.names import ALLOWED, FISHER, UNIFORM, is_allocation
from rarefy.errors import InputError, MethodError, PatternError, RecipeError
from rarefy.methods.settings import check
from rarefy.runs.arguments import DEVICE_WORDS, DEVICES
from rarefy.runs.recipe_file import Told, refuse_unknown

if TYPE_CHECKING:
    from rarefy.layer.pattern import NM, Pattern
    from rarefy.methods.base import Method
    from rarefy.pruning.settings import PatternOf, PruneSettings
    from rarefy.pruning.steps import BlockStep

DEFAULT_METHOD = "alps"
DEFAULT_SPARSITY = 0.5
DEFAULT_CALIBRATION = "self"
#: Windows x tokens per window: without ``--calibration`` what a laptop does in minutes, with it the papers'.
QUICK_WINDOWS = (32, 1024)
FULL_WINDOWS = (128, 2048)
#: Windows that run at once without matching; with it they are those of one step.
BATCH_SIZE = 4
#: Keys of a recipe that say what the loop over blocks does beside the method.
LOOP = (
    "along", "barber", "barber_share", "barber_refit", "match", "match_lr", "match_batch", "drift", "refresh",
    "permute", "rotate", "row_weights", "allocation",
)  # fmt: skip
#: A thousand times what papers calibrate on, and 2 GiB of token ids.
_MOST_TOKENS = 2**28


def _no_bool(value: object) -> object:
    """Refuse YAML's true and false where pydantic would read them as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


#: Which error a wrong setting is, where it is not an InputError (of an option) or RecipeError (of a file).
_ERRORS: dict[str, type[InputError]] = {
    "sparsity": PatternError,
    "pattern": PatternError,
    "scope": PatternError,
    "along": PatternError,
}

Number = Annotated[float, BeforeValidator(_no_bool)]
#: What torch counts with, and more than any machine can do.
_COUNTABLE = 2**31
Whole = Annotated[int, BeforeValidator(_no_bool), Field(lt=_COUNTABLE)]


#: Settings of a step, and the key without which there is no such step.
STEP_SETTINGS = {"match_lr": "match", "match_batch": "match", "barber_share": "barber", "barber_refit": "barber"}


class Recipe(BaseModel):
    """One pruning run. A field's description is what its error messages say is allowed.

    None means "not said"; ``resolved`` fills it in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="a hub id, a local folder, a .gguf file, or smollm2")
    method: str = Field(DEFAULT_METHOD, description="a method that `rarefy methods` lists, or package.module:Class")
    settings: dict[str, bool | int | float | str] = Field({}, description="hyperparameters of the method, KEY: VALUE")
    sparsity: Number | None = Field(
        None, ge=0, lt=1, allow_inf_nan=False, description="a number in [0, 1), the fraction of zeros"
    )
    pattern: str | None = Field(None, description="text such as 2:4")
    along: Literal["inputs", "neurons"] = Field("inputs", description="inputs or neurons")
    scope: Literal["layer", "row"] | None = Field(None, description="layer or row")
    calibration: str | None = Field(None, min_length=1, description="a source of text, such as self or a .txt file")
    text_column: str | None = Field(None, min_length=1, description="the name of a column of the calibration's rows")
    num_samples: Whole | None = Field(None, ge=1, description="a whole number of at least 1 (windows)")
    sequence_length: Whole | None = Field(None, ge=2, description="a whole number of at least 2 (tokens)")
    batch_size: Whole | None = Field(None, ge=1, description="a whole number of at least 1 (windows)")
    seed: Annotated[int, BeforeValidator(_no_bool)] = Field(
        0, ge=0, lt=2**63, description="a whole number of at least 0"
    )
    bos: bool = Field(False, description="true or false")
    device: str = Field("auto", pattern=DEVICES, description=DEVICE_WORDS)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto, float32, bfloat16 or float16"
    )
    include: list[str] = Field([], description="a list of patterns of module names, such as '*.mlp.*'")
    exclude: list[str] = Field([], description="a list of patterns of module names, such as '*.mlp.*'")
    strict: bool = Field(False, description="true or false")
    barber: Literal["none", "published", "signed"] = Field("none", description="none, published or signed")
    barber_share: Number = Field(0.01, gt=0, le=1, description="a number above 0, up to 1, the share of the pairs")
    barber_refit: bool = Field(True, description="true or false")
    match: Whole = Field(0, ge=0, description="a whole number of at least 0 (passes over the windows; 0 = off)")
    match_lr: Number = Field(2e-4, gt=0, lt=1, description="a number between 0 and 1, the learning rate")
    match_batch: Whole = Field(1, ge=1, description="a whole number of at least 1 (windows)")
    drift: Number = Field(0.0, ge=0, le=1, description="a number from 0 to 1, the share of the drift (0 = off)")
    refresh: bool = Field(False, description="true or false")
    permute: bool = Field(False, description="true or false")
    rotate: bool = Field(False, description="true or false")
    row_weights: Literal["none", "mlp", "fisher"] | None = Field(None, description="none, mlp or fisher")
    allocation: str | None = Field(None, min_length=1, description=ALLOWED)

    @classmethod
    def read(
        cls,
        options: Mapping[str, Any],
        file: Path | Told | None = None,
        *,
        allow_code: bool = False,
        keep_fisher: bool = False,
    ) -> Self:
        """The recipe in ``file`` (YAML, or what is told), with ``options`` of the command line replacing its keys.

        A sparsity replaces the file's pattern, a pattern its sparsity and scope, another method its
        settings; settings of the command line are added to those that stay. A method that is not Rarefy's
        (package.module:Class) is code that runs when it is imported: an option may name it, a file only with
        ``allow_code``. ``fisher`` in the file is forgotten where a pattern of the options leaves it no choice, as it
        was the default of the run that wrote the file, unless it was meant (``keep_fisher``). Raises InputError where
        an option is wrong, RecipeError where the file is.
        """
        told = Told.by(file)
        base = dict(told.values) if told else {}
        if "sparsity" in options:
            base.pop("pattern", None)
            base.pop("along", None)
        if "pattern" in options:
            base.pop("sparsity", None)
            base.pop("scope", None)
        if not keep_fisher and ("pattern" in options or options.get("scope") == "row"):
            for key in ("row_weights", "allocation"):
                if base.get(key) == FISHER:
                    base.pop(key)
        if options.get("method", base.get("method")) != base.get("method"):
            base.pop("settings", None)
        settings = base.get("settings")
        merged = {**base, **options}
        if "settings" in options and isinstance(settings, dict):
            merged["settings"] = {**settings, **options["settings"]}

        def from_file(key: str) -> bool:
            return key in base and key not in options

        def written(key: str) -> str:
            if told is not None and from_file(key):
                return f"{key} in {told.where}"
            return {"model": "MODEL", "settings": "--set"}.get(key, "--" + key.replace("_", "-"))

        if not merged.get("model"):
            raise InputError.sentence("MODEL is missing: name a hub id, a local folder, a .gguf file, or smollm2.")
        refuse_unknown(merged, cls.model_fields, told)
        if merged.get("pattern") is not None:
            for key in ("sparsity", "scope"):
                if merged.get(key) is not None:
                    raise PatternError.sentence(
                        f"{written(key)} does not go with {written('pattern')}: an N:M pattern says by itself "
                        "how many weights are kept, and where."
                    )
        try:
            recipe = cls.model_validate(merged)
        except ValidationError as error:
            key, given, allowed = what_is_wrong(error, cls, merged)
            kind = _ERRORS.get(key, RecipeError if from_file(key) else InputError)
            raise kind(written(key), given, allowed) from None
        if recipe.pattern is not None:
            parse_pattern(recipe.pattern, written("pattern"))
        if recipe.permute and recipe.pattern is None:
            raise PatternError.sentence(
                f"{written('permute')} goes with an N:M pattern only: for a sparsity, all orders of inputs are alike."
            )
        if recipe.allocation is not None and not is_allocation(recipe.allocation):
            kind = RecipeError if from_file("allocation") else InputError
            raise kind(written("allocation"), recipe.allocation, ALLOWED)
        plain = recipe.pattern is not None and not parse_pattern(recipe.pattern)[2]
        if recipe.along == "neurons" and not (plain and recipe.allocation in (None, UNIFORM)):
            raise PatternError.sentence(
                f"{written('along')} is 'neurons', which goes with an N:M {written('pattern')} that is the same for "
                "all layers."
            )
        if ":" in recipe.method and from_file("method") and not allow_code:
            raise RecipeError.sentence(
                f"{written('method')} is {recipe.method!r}, which is code from outside Rarefy: --allow-code lets a "
                "recipe run it, and so does --method with that name."
            )
        try:
            parts = check(recipe.method, recipe.settings)
        except MethodError as error:
            raise MethodError.sentence(_named(str(error), written)) from None
        for key, switch in STEP_SETTINGS.items():
            fields = cls.model_fields
            if getattr(recipe, key) != fields[key].default and getattr(recipe, switch) == fields[switch].default:
                raise InputError.sentence(
                    f"{written(key)} goes with {written(switch)}, and changes nothing without it."
                )
        if recipe.drift and recipe.refresh:
            raise InputError.sentence(
                f"{written('drift')} does not go with {written('refresh')}: the drift is that of a block's inputs "
                "before it is pruned, and refreshed Grams are of others."
            )
        changes = "match" if recipe.match else "barber" if recipe.barber != "none" else ""
        if changes and any(part.comes_last for part in parts):
            raise InputError.sentence(
                f"{written(changes)} does not go with {written('method')} {recipe.method}: it would move weights "
                "that only stand for others, or off the grid they are rounded to."
            )
        if recipe.barber != "none" and recipe.drift:
            raise InputError.sentence(
                f"{written('barber')} does not go with {written('drift')}: it puts weights of the dense model back, "
                "which are not what layers aim at then."
            )
        return recipe

    @classmethod
    def from_yaml(cls, file: Path) -> Self:
        """The recipe in a YAML file. Raises RecipeError, or the InputError of what is wrong in it."""
        return cls.read({}, file)

    def to_yaml(self) -> str:
        """The recipe as YAML that ``from_yaml`` reads back; what is not said is left out."""
        values = self.model_dump(exclude_none=True)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)

    @property
    def window_shape(self) -> tuple[int, int]:
        """(num, length) of the calibration windows of a resolved recipe."""
        assert self.num_samples is not None
        assert self.sequence_length is not None
        return self.num_samples, self.sequence_length

    @property
    def windows_at_once(self) -> int:
        """How many windows run through the model together."""
        return self.batch_size or (self.match_batch if self.match else BATCH_SIZE)

    def build_method(self) -> Method:
        """The method with its hyperparameters. Raises MethodError."""
        from rarefy.methods import build

        return build(self.method, self.settings)

    def build_pattern(self) -> Pattern:
        """The pattern of every layer. Raises PatternError where N:M is none."""
        from rarefy.layer.pattern import PerRow, Unstructured

        if self.pattern is not None:
            return build_pattern(self.pattern, "pattern")
        sparsity = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        scope = self.scope or self.build_method().default_scope
        return PerRow(sparsity) if scope == "row" else Unstructured(sparsity)

    def prune_settings(self, pattern_of: PatternOf | None = None) -> PruneSettings:
        """What the loop over blocks is to do; ``pattern_of`` None: the same pattern for all. Raises MethodError."""
        from rarefy.pruning.barber import Barber
        from rarefy.pruning.matching import Matching
        from rarefy.pruning.settings import PruneSettings, Uniform

        steps: list[BlockStep] = []
        if self.barber != "none":
            steps.append(Barber(self.barber, self.barber_share, self.barber_refit, self.seed))
        if self.match:
            steps.append(Matching(self.match, self.match_lr, self.match_batch, seed=self.seed))
        return PruneSettings(
            pattern_of or Uniform(self.build_pattern()),
            self.build_method(),
            self.windows_at_once,
            self.include,
            self.exclude,
            self.strict,
            steps,
            self.drift,
            self.refresh,
            self.permute,
            self.rotate,
            self.row_weights or "none",
        )

    def resolved(self, context: int | None, *, follow_loss: bool = True) -> Self:
        """The same recipe with every default filled in, so that it says all that the run will do.

        ``context`` is the model's longest context in tokens, None where it has no limit. ``follow_loss`` allows row
        weights and an allocation by the loss, for the methods that have them by default, where a sparsity of the
        whole matrix leaves both a choice. Raises InputError where the sequence length exceeds the context.
        """
        from rarefy.allocation.budget import MOST
        from rarefy.methods import all_settings

        method = self.build_method()
        num_samples, length = QUICK_WINDOWS if self.calibration is None else FULL_WINDOWS
        filled: dict[str, Any] = {
            "settings": all_settings(self.method, method),
            "calibration": self.calibration or DEFAULT_CALIBRATION,
            "batch_size": self.windows_at_once,
            "num_samples": self.num_samples or num_samples,
            "sequence_length": self.sequence_length or min(length, context or length),
        }
        if context is not None and filled["sequence_length"] > context:
            raise InputError(
                "--sequence-length",
                filled["sequence_length"],
                f"at most {context}, the model's longest context",
            )
        check_tokens(filled["num_samples"], filled["sequence_length"])
        if self.pattern is None:
            filled["sparsity"] = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
            filled["scope"] = self.scope or method.default_scope
        follow_loss &= filled.get("scope") == "layer" and method.follows_loss
        filled["row_weights"] = self.row_weights or ("fisher" if follow_loss else "none")
        spread = follow_loss and filled["sparsity"] <= MOST
        filled["allocation"] = self.allocation or (FISHER if spread else UNIFORM)
        return self.model_copy(update=filled)


def what_is_wrong(
    error: ValidationError, recipe: type[BaseModel], values: Mapping[str, Any]
) -> tuple[str, object, str]:
    """The first key of ``values`` that a recipe does not take, what was given for it, and what is allowed."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    allowed = recipe.model_fields[key].description or "something else"
    limit = first.get("ctx", {}).get("lt")
    if first["type"] == "less_than" and isinstance(limit, int) and limit >= _COUNTABLE:
        allowed += f", below {limit:,}"
    return key, as_number(values[key]), allowed


def parse_pattern(text: str, argument: str = "--pattern") -> tuple[int, int, bool]:
    """``"2:4"`` as (2, 4, False): keep 2 of every 4; ``"2:4t"`` as (2, 4, True), for the transpose as well.

    Raises PatternError, naming ``argument``, unless 1 <= N < M.
    """
    found = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})(t?)", text)
    if not found or not 1 <= int(found[1]) < int(found[2]):
        allowed = "N:M with 1 <= N < M, which keeps N of every M weights, or N:Mt, which does so in columns as well"
        raise PatternError(argument, text, allowed)
    return int(found[1]), int(found[2]), bool(found[3])


def build_pattern(text: str, argument: str = "--pattern") -> NM:
    """The pattern that ``parse_pattern`` reads. Raises PatternError."""
    from rarefy.layer.pattern import NM
    from rarefy.layer.transposable import TransposableNM

    keep, of, transposable = parse_pattern(text, argument)
    return TransposableNM(keep, of) if transposable else NM(keep, of)


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """``["block_size=64"]`` as ``{"block_size": "64"}``. Raises MethodError where one is no KEY=VALUE."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise MethodError("--set", pair, "KEY=VALUE, such as block_size=64")
        settings[key.strip()] = value.strip()
    return settings


def as_number(value: object) -> object:
    """Text of the command line that is a number is shown as one, without quotes."""
    if isinstance(value, str):
        for read in (int, float):
            try:
                return read(value)
            except ValueError:
                pass
    return value


def _named(message: str, written: Callable[[str], str]) -> str:
    """The message of a method's error, which begins with the name of an argument, as the user wrote it."""
    for argument, key in (("method ", "method"), ("set ", "settings")):
        if message.startswith(argument):
            return written(key) + message[len(argument) - 1 :]
    return message


def check_tokens(num_samples: int, sequence_length: int) -> None:
    """Raise InputError where there would be too many calibration tokens for any memory."""
    if (tokens := num_samples * sequence_length) > _MOST_TOKENS:
        raise InputError.sentence(
            f"--num-samples and --sequence-length make {tokens:,} tokens, but at most {_MOST_TOKENS:,} can be "
            "calibrated on."
        )
