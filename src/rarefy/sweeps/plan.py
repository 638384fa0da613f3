"""Makes the plan of a sweep: its cells and their measurements. All mistakes that need no weights are found here.

torch and transformers are imported once all that is plain has been checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rarefy.calibration.documents import Source
from rarefy.calibration.sources import SELF
from rarefy.errors import InputError, ModelError
from rarefy.runs.fingerprint import file_digests
from rarefy.runs.recipe import Recipe
from rarefy.runs.shrink_recipe import ShrinkRecipe
from rarefy.sweeps.folder import SweepFolder
from rarefy.sweeps.options import Options, check_options
from rarefy.sweeps.shrinking import ShrinkCell, shrink_cell

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rarefy.evaluation.measure import Measures
    from rarefy.models.source import ModelSource

#: The papers' context length in tokens, for evaluation.
EVALUATION_LENGTH = 2048


@dataclass(frozen=True)
class Cell:
    """One method with one pattern and one seed, all of it in a resolved recipe."""

    recipe: Recipe

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.recipe.method

    @property
    def seed(self) -> int:
        """Draws the windows."""
        return self.recipe.seed

    @property
    def sparsity(self) -> float:
        """The fraction of zeros that was asked for."""
        return self.recipe.build_pattern().nominal_sparsity()

    @property
    def pattern(self) -> str:
        """The pattern's name, such as ``row 50%`` or ``2:4``."""
        return str(self.recipe.build_pattern())

    @property
    def name(self) -> str:
        """The name of the cell's folder; two cells never share one."""
        recipe = self.recipe
        where = recipe.pattern.replace(":", "of") if recipe.pattern else f"{recipe.scope}-{recipe.sparsity!r}"
        method = re.sub(r"[^\w.+-]", "_", recipe.method)
        return f"{method}_{where}_seed{recipe.seed}"

    def facts(self) -> dict[str, Any]:
        """What is known of the cell before it runs."""
        recipe = self.recipe
        return {
            "method": recipe.method,
            "paper": recipe.build_method().paper,
            "pattern": self.pattern,
            "pattern_spec": recipe.build_pattern().spec(),
            "pattern_words": recipe.build_pattern().describe(),
            "asked_sparsity": self.sparsity,
            "seed": recipe.seed,
            "calibration": {
                "source": recipe.calibration,
                "num_samples": recipe.num_samples,
                "sequence_length": recipe.sequence_length,
                "bos": recipe.bos,
            },
        }


@dataclass(frozen=True)
class Plan:
    """A sweep whose every setting was checked, as far as that goes without the weights."""

    cells: Sequence[Cell | ShrinkCell]
    source: ModelSource
    device: torch.device
    measures: Measures
    calibration: Source
    #: The tokens to draw windows from; None where the model writes its own text.
    tokens: Tensor | None
    bos_id: int | None
    tokenizer: PreTrainedTokenizerBase | None
    settings: Mapping[str, Any]
    #: The number of its block and the name of every layer to prune.
    linears: Sequence[tuple[int, str]]
    save: bool = False
    retry: bool = False


def plan_sweep(options: Options, folder: SweepFolder) -> Plan:
    """Find every mistake that can be found before the weights are loaded.

    Raises InputError, one sentence, also where ``folder`` holds another sweep; nothing is written.
    """
    checked = check_options(options)
    folder.check()

    from rarefy.calibration.windows import DRAW_FROM, check_token_ids, draw_windows, token_stream
    from rarefy.models.blocks import find_blocks, select_sites
    from rarefy.models.checkpoint import load_tokenizer, resolve_device
    from rarefy.models.source import resolve_model
    from rarefy.pruning.loop import check_patterns

    device, calibration = resolve_device(options.device), checked.calibration
    source = resolve_model(options.model)
    skeleton = source.skeleton()
    pruning = [Cell(recipe.resolved(source.context)) for recipe in checked.recipes]
    blocks = select_sites(find_blocks(skeleton), options.include, options.exclude) if pruning else []
    for cell in pruning:
        check_patterns(blocks, cell.recipe.prune_settings())
    shrinking = [
        shrink_cell(method, recipe.resolved(source.context), source, device, skeleton)
        for method, recipe in checked.shrinking
    ]
    cells: list[Cell | ShrinkCell] = sorted([*pruning, *shrinking], key=lambda cell: cell.seed)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError.sentence(f"{source.name} has no tokenizer, so nothing can be measured of it.")
    if options.bos and tokenizer.bos_token_id is None:
        raise InputError.sentence(f"--bos asks for a start token, but the tokenizer of {source.name} has none.")
    measures = _measures(options, checked.texts, source, tokenizer)
    recipe = cells[0].recipe
    tokens = None
    if calibration is not SELF:
        num, length = recipe.window_shape
        tokens = token_stream(calibration, tokenizer, enough=DRAW_FROM * num * length)
        check_token_ids(tokens, source.config, source.name, measures.bos_id)
        # Drawn once for its errors; warnings come when the sweep runs.
        if len(tokens) < length - options.bos:
            draw_windows(tokens, num, length, 0, measures.bos_id, name=f"the text of {calibration.name}")
    settings = _settings(options, source, recipe, measures, tokens)
    folder.check_same(settings)
    return Plan(
        cells,
        source,
        device,
        measures,
        calibration,
        tokens,
        measures.bos_id,
        tokenizer,
        settings,
        [(block.index, site.name) for block in blocks for site in block.sites],
        options.save,
        options.retry,
    )


def _measures(
    options: Options, texts: dict[str, Source], source: ModelSource, tokenizer: PreTrainedTokenizerBase
) -> Measures:
    """What is measured of the dense model and of each cell."""
    from rarefy.evaluation.measure import Measures, corpora

    length = _evaluation_length(options.eval_length, source)
    tasks = None
    if options.tasks:
        from rarefy.evaluation.tasks import prepare

        tasks = prepare(options.tasks, options.task_data)
    bos_id = tokenizer.bos_token_id if options.bos else None
    return Measures(
        corpora(texts, tokenizer, length, bos_id, source),
        length,
        options.max_windows,
        bos_id,
        batch_size=options.eval_batch_size,
        tasks=tasks,
        limit=options.limit,
    )


def _settings(
    options: Options, source: ModelSource, recipe: Recipe | ShrinkRecipe, measures: Measures, tokens: Tensor | None
) -> dict[str, Any]:
    """All that the cells of a sweep have in common; a folder goes on only with the same."""
    return {
        "model": source.name,
        "weights": _fingerprint(source),
        "calibration": recipe.calibration,
        "num_samples": recipe.num_samples,
        "sequence_length": recipe.sequence_length,
        "calibration_text": None if tokens is None else _digest(tokens),
        "bos": options.bos,
        "dtype": options.dtype,
        "include": list(options.include),
        "exclude": list(options.exclude),
        "settings": dict(options.settings),
        "texts": {corpus.label: corpus.source for corpus in measures.corpora},
        "text_contents": {corpus.label: corpus.digest for corpus in measures.corpora},
        "eval_length": measures.length,
        "max_windows": options.max_windows,
        "tasks": list(options.tasks),
        "task_data": measures.tasks.digest if measures.tasks else "",
        "limit": options.limit,
    }


def _evaluation_length(asked: int | None, source: ModelSource) -> int:
    if asked is None:
        return min(EVALUATION_LENGTH, source.context or EVALUATION_LENGTH)
    if source.context is not None and asked > source.context:
        raise InputError("--eval-length", asked, f"at most {source.context}, the model's longest context")
    return asked


def _fingerprint(source: ModelSource) -> str:
    """A digest of the files of a local model; the revision of one on the hub."""
    if source.kind == "hub":
        return source.path.name
    return hashlib.sha256(repr(file_digests(source.path)).encode()).hexdigest()[:16]


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
