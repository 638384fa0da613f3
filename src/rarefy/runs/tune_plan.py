"""The plan of a tuning: every mistake that needs no model in memory is found here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rarefy.calibration.sources import has_columns, parse_source
from rarefy.errors import InputError, ModelError
from rarefy.models.locate import locate
from rarefy.parallel.world import World
from rarefy.pruning.records import LayerRecord
from rarefy.runs.folder import RunFolder
from rarefy.runs.recipe_file import read_yaml
from rarefy.runs.tune_recipe import TuneRecipe, split_share
from rarefy.runs.tune_windows import Text, read_texts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rarefy.calibration.documents import Source
    from rarefy.models.blocks import Block
    from rarefy.models.source import ModelSource
    from rarefy.runs.fingerprint import Fingerprint

#: A model with a smaller share of zeros in its blocks was not pruned: dense weights hold some by chance, those of
#: quantised origin up to a few in a hundred.
LEAST_SPARSITY = 0.05
_DEFAULT_WINDOWS = (32, 1024)


@dataclass
class TunePlan:
    """A tuning whose every setting was checked, as far as that goes without a model in memory."""

    recipe: TuneRecipe
    source: ModelSource
    dense: ModelSource
    skeleton: PreTrainedModel
    blocks: list[Block]
    records: list[LayerRecord]
    #: What run.json says of the pruning run; empty where no run folder was named.
    facts: Mapping[str, Any]
    texts: list[Text]
    device: torch.device
    precision: torch.dtype

    def fingerprint(self, windows: torch.Tensor) -> Fingerprint:
        """All that the result depends on; each process keeps a state of its own, so their number is part of it."""
        from rarefy.runs.fingerprint import Fingerprint, file_digests, versions

        made_by = {name: versions()[name] for name in ("rarefy", "torch", "transformers")}
        dense = {f"dense {name}": digest for name, digest in file_digests(self.dense.path).items()}
        settings = self.recipe.model_dump() | {"device": self.device.type, "precision": str(self.precision)}
        settings["processes"] = World.current().size
        return Fingerprint.of(settings | made_by | dense, self.source.path, windows)

    @property
    def pattern(self) -> str:
        """The pattern of the run's layers, or how many zeros there are where that is all that is known."""
        if pattern := self.facts.get("pattern"):
            return str(pattern)
        size = sum(record.size for record in self.records)
        return f"{sum(record.pruned for record in self.records) / size:.1%} zeros"


def make_tune_plan(recipe: TuneRecipe) -> TunePlan:
    """Find every mistake that can be found before a model is loaded, the cheapest first.

    Raises InputError, or one of the errors that are derived from it.
    """
    run = RunFolder.find(recipe.model)
    locate(recipe.model)
    facts = run.read_run() if run and run.run.is_file() else {}
    recipe = _with_runs_settings(recipe, run)
    if recipe.against is None:
        raise InputError.sentence(
            f"--against is missing: name the dense model that {recipe.model} was made from, as it is no run folder "
            "that says it."
        )
    with _as_against():
        locate(recipe.against)
    sources = _sources(recipe)

    # What follows imports torch, which takes seconds.
    import torch

    from rarefy.models.blocks import find_blocks
    from rarefy.models.checkpoint import resolve_device
    from rarefy.models.source import resolve_model
    from rarefy.tuning.train import make_optimizer

    make_optimizer([torch.nn.Parameter(torch.zeros(1))], recipe.settings())
    world = World.current()
    device = world.place(resolve_device(recipe.device))
    if recipe.batch_size % world.size:
        allowed = f"a multiple of {world.size}, a window of each batch or more for each process"
        raise InputError("--batch-size", recipe.batch_size, allowed)
    source = resolve_model(str(run.model if run else recipe.model))
    with _as_against():
        dense = resolve_model(recipe.against)
    _check_pair(recipe, source, dense)
    skeleton = source.skeleton()
    blocks = find_blocks(skeleton)
    _check_forms(recipe, blocks)
    _check_teacher(recipe, skeleton, dense)
    records = _records(recipe, run, source, skeleton, dense, blocks)
    num, length, seed = recipe.num_samples, recipe.sequence_length, recipe.seed
    assert num is not None
    assert length is not None
    assert seed is not None
    for model in (source, dense):
        if model.context is not None and length > model.context:
            raise InputError(
                "--sequence-length", length, f"at most {model.context}, the longest context of {model.name}"
            )
    texts = read_texts(sources, _with_tokenizer(source, dense), num, recipe.held_out, length, seed, recipe.bos)
    precision = precision_of(recipe, device)
    return TunePlan(recipe, source, dense, skeleton, blocks, records, facts, texts, device, precision)


def precision_of(recipe: TuneRecipe, device: torch.device) -> torch.dtype:
    """The dtype of the products of a tuning on ``device``."""
    import torch

    from rarefy.pruning.precision import compute_dtype

    said = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(recipe.precision)
    return said or compute_dtype(torch.bfloat16, device)


def _with_runs_settings(recipe: TuneRecipe, run: RunFolder | None) -> TuneRecipe:
    """The recipe, with what it does not say taken from the pruning run: dense model, text, windows and seed.

    Raises RecipeError where the run's own recipe is damaged.
    """
    told = read_yaml(run.recipe) if run is not None and run.recipe.is_file() else {}
    filled: dict[str, Any] = {}
    if recipe.against is None:
        filled["against"] = told.get("against") or told.get("model")
    if not recipe.calibration:
        text = told.get("calibration") or "self"
        filled["calibration"] = text if isinstance(text, list) else [text]
        filled["bos"] = recipe.bos or told.get("bos", False)
        filled["text_column"] = recipe.text_column or told.get("text_column")
    for key, default in zip(("num_samples", "sequence_length", "seed"), (*_DEFAULT_WINDOWS, 0)):
        if getattr(recipe, key) is None:
            value = told.get(key)
            filled[key] = default if value is None else value
    return recipe.filled(filled, told=f"{run.recipe}" if run is not None else "the recipe")


def _sources(recipe: TuneRecipe) -> list[tuple[Source, float]]:
    """The sources of text with their shares. Raises CalibrationError, and InputError for a column that none has."""
    column, found, used = recipe.text_column, [], False
    for text in recipe.calibration:
        name, share = split_share(text, "--calibration")
        chosen = column is not None and has_columns(name)
        used = used or chosen
        found.append((parse_source(name, text_column=column if chosen else None), share))
    if column is not None and not used:
        raise InputError("--text-column", column, "left out, because no text has columns")
    return found


@contextmanager
def _as_against() -> Iterator[None]:
    """Within the scope, a mistake in a model is one in --against."""
    try:
        yield
    except ModelError as error:
        raise ModelError.sentence(f"--against: {error}") from None


def _check_pair(recipe: TuneRecipe, source: ModelSource, dense: ModelSource) -> None:
    """Raise InputError or ModelError unless both models read and predict the same tokens."""
    from rarefy.models.checkpoint import load_tokenizer

    if source.quantization is not None:
        raise ModelError.sentence(
            f"{recipe.model} is quantised, and weights are trained as floating-point numbers: tune it before it is "
            "quantised."
        )
    if dense.path.resolve() == source.path.resolve():
        raise InputError("--against", recipe.against, "the dense model, not the pruned one itself")
    sizes = [one.config.get_text_config(decoder=True).vocab_size for one in (source, dense)]
    if sizes[0] != sizes[1]:
        raise InputError(
            "--against", recipe.against, f"a model with {sizes[0]:,} tokens in its vocabulary; it has {sizes[1]:,}"
        )
    mine, theirs = load_tokenizer(source), load_tokenizer(dense)
    if mine is not None and theirs is not None and mine.get_vocab() != theirs.get_vocab():
        raise InputError(
            "--against",
            recipe.against,
            f"a model with the tokenizer of {recipe.model}: the same tokens have other ids",
        )


def _with_tokenizer(source: ModelSource, dense: ModelSource) -> ModelSource:
    from rarefy.models.checkpoint import load_tokenizer

    return source if load_tokenizer(source) is not None else dense


def _check_forms(recipe: TuneRecipe, blocks: list[Block]) -> None:
    from rarefy.tuning.parametrise import check_parametrisation

    check_parametrisation(recipe.parametrisation, blocks)


def _check_teacher(recipe: TuneRecipe, skeleton: PreTrainedModel, dense: ModelSource) -> None:
    """Raise InputError where the settings of both models show that the teacher cannot be had."""
    from rarefy.models.blocks import find_blocks
    from rarefy.models.head import vocabulary_size

    if (k := recipe.top_k()) is not None and k >= vocabulary_size(skeleton):
        raise InputError(
            "--teacher", recipe.teacher, f"top-K with K below {vocabulary_size(skeleton):,}, the vocabulary"
        )
    mine, theirs = skeleton.config.get_text_config(), dense.config.get_text_config()
    if recipe.teacher == "states" and mine.hidden_size != theirs.hidden_size:
        raise InputError.sentence(
            f"--teacher states needs models of one width, but {recipe.model} has {mine.hidden_size:,} and "
            f"{recipe.against} {theirs.hidden_size:,}: model or top-K do not."
        )
    if recipe.hidden_weight:
        numbers = len(find_blocks(skeleton)), len(find_blocks(dense.skeleton()))
        if numbers[0] != numbers[1] or mine.hidden_size != theirs.hidden_size:
            raise InputError.sentence(
                f"--hidden-weight compares blocks one by one, but {recipe.model} has {numbers[0]} of width "
                f"{mine.hidden_size:,} and {recipe.against} {numbers[1]} of width {theirs.hidden_size:,}."
            )


def _records(
    recipe: TuneRecipe,
    run: RunFolder | None,
    source: ModelSource,
    skeleton: PreTrainedModel,
    dense: ModelSource,
    blocks: list[Block],
) -> list[LayerRecord]:
    """One record for each layer, which says how many zeros must stay: as the run promised, else as in the files.

    Raises ModelError where the files break a promise, InputError where nothing was pruned and nothing taken out.
    """
    from rarefy.runs.verify import inspect_folder

    inspection = inspect_folder(run.path if run else source.path)
    if inspection.problems:
        raise ModelError.sentence(f"{recipe.model} does not hold what it promises: {inspection.problems[0]}.")
    if inspection.sparsity < LEAST_SPARSITY and _shapes(skeleton) == _shapes(dense.skeleton()):
        raise InputError.sentence(
            f"{recipe.model} has zeros in {inspection.sparsity:.1%} of its blocks' weights and the shapes of "
            f"{recipe.against}, so nothing was pruned that could be recovered."
        )
    place = {site.name: block.index for block in blocks for site in block.sites}
    promised = {record.name: record for record in run.read_layers()} if run else {}
    records = []
    for layer in inspection.layers:
        record = LayerRecord(
            layer.name, place[layer.name], layer.shape, f"{layer.sparsity:.2%} zeros", layer.size - layer.zeros,
            float("nan"), "tuned",
        )  # fmt: skip
        if (known := promised.get(layer.name)) is not None:
            record = replace(record, pattern=known.pattern, pattern_spec=known.pattern_spec, kept=known.kept)
        records.append(record)
    return records


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
