"""Makes the plan of a sweep: its cells and their measurements. All mistakes that need no weights are found here.

torch and transformers are imported once all that is plain has been checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.allocation.names import FILES
from rarefy.calibration.documents import Source
from rarefy.calibration.sources import SELF
from rarefy.errors import InputError, ModelError, PatternError
from rarefy.runs.fingerprint import file_digests
from rarefy.runs.plan import pattern_facts
from rarefy.runs.recipe import Recipe, as_number
from rarefy.runs.shrink_recipe import ShrinkRecipe
from rarefy.runs.tune_recipe import TuneRecipe
from rarefy.sweeps.check import Checked, check_options
from rarefy.sweeps.folder import SweepFolder
from rarefy.sweeps.options import Options
from rarefy.sweeps.results import LeftOut
from rarefy.sweeps.shrinking import ShrinkCell, shrink_cell
from rarefy.sweeps.systems import System, folder_name
from rarefy.sweeps.wanted import Wanted, nothing_left

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rarefy.evaluation.measure import Measures
    from rarefy.models.source import ModelSource
    from rarefy.pruning.settings import PerLayer, PruneSettings, Uniform

#: The papers' context length in tokens, for evaluation.
EVALUATION_LENGTH = 2048


@dataclass(frozen=True)
class Cell:
    """One method or system with one pattern and one seed: a resolved recipe, and how the result is tuned, if it is.

    ``method`` is the name of its row, ``asked`` the sparsity or pattern in a word. ``pattern_of`` gives each layer's
    pattern, ``linears`` are the block numbers and names of the layers.
    """

    method: str
    asked: str
    recipe: Recipe
    pattern_of: Uniform | PerLayer
    linears: Sequence[tuple[int, str]]
    system: System | None = None

    @property
    def tune(self) -> TuneRecipe | None:
        """How the pruned model is tuned; its windows and seed are those of the cell."""
        if self.system is None or self.system.tune is None:
            return None
        recipe = self.recipe
        shared = {key: getattr(recipe, key) for key in ("num_samples", "sequence_length", "bos", "seed")}
        shared |= {"against": recipe.model, "calibration": [recipe.calibration]}
        return self.system.tune.model_copy(update=shared)

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
        return self.settings().pattern_name

    def settings(self) -> PruneSettings:
        """What the loop over blocks is to do."""
        return self.recipe.prune_settings(self.pattern_of)

    @property
    def name(self) -> str:
        """The name of the cell's folder; two cells never share one."""
        recipe = self.recipe
        where = recipe.pattern.replace(":", "of") if recipe.pattern else f"{recipe.scope}-{recipe.sparsity!r}"
        method = folder_name(self.method) if self.system else re.sub(r"[^\w.+-]", "_", recipe.method)
        return f"{method}_{where}_seed{recipe.seed}"

    def facts(self) -> dict[str, Any]:
        """What is known of the cell before it runs."""
        recipe = self.recipe
        system = {"system": self.system.definition()} if self.system else {}
        return {
            "method": self.method,
            **system,
            "paper": recipe.build_method().paper,
            "pattern": self.pattern,
            **pattern_facts(recipe, self.pattern_of),
            "asked": self.asked,
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
    #: Cells that there are none of: systems that a pattern does not go with.
    left_out: Sequence[LeftOut] = ()
    save: bool = False
    retry: bool = False

    @cached_property
    def rows(self) -> dict[str, Mapping[str, Any] | None]:
        """The names of all rows, each with the definition of its system, None for a method."""
        systems = {one.name: one.system for one in self.left_out}
        for cell in self.cells:
            system = cell.system if isinstance(cell, Cell) else None
            systems[cell.method] = system.definition() if system else None
        return systems


def plan_sweep(options: Options, folder: SweepFolder) -> Plan:
    """Find every mistake that can be found before the weights are loaded.

    Raises InputError, one sentence, also where ``folder`` holds another sweep; nothing is written.
    """
    checked = check_options(options)
    folder.check()

    from rarefy.calibration.windows import DRAW_FROM, check_token_ids, draw_windows, token_stream
    from rarefy.models.checkpoint import load_tokenizer, resolve_device
    from rarefy.models.source import resolve_model

    device, calibration = resolve_device(options.device), checked.calibration
    source = resolve_model(options.model)
    skeleton = source.skeleton()
    pruning, left_out = _pruning_cells(checked, source, skeleton)
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
        _check_tuning_windows(pruning, calibration, tokens, measures.bos_id)
    settings = _settings(options, source, recipe, measures, tokens)
    folder.check_same(settings)
    plan = Plan(
        cells,
        source,
        device,
        measures,
        calibration,
        tokens,
        measures.bos_id,
        tokenizer,
        settings,
        left_out,
        options.save,
        options.retry,
    )
    folder.check_rows(plan.rows)
    return plan


def _pruning_cells(
    checked: Checked, source: ModelSource, skeleton: PreTrainedModel
) -> tuple[list[Cell], list[LeftOut]]:
    """The cells that prune, for all seeds, and what is left out. Raises InputError for what fits no model."""
    cells: list[Cell] = []
    left_out = list(checked.left_out)
    for wanted in checked.wanted:
        try:
            cells.append(_cell(wanted, source, skeleton))
        except (PatternError, ModelError) as error:  # of this pattern, or of a model that has nothing to rotate
            if wanted.system is None:
                raise
            left_out.append(LeftOut(wanted.name, wanted.asked, str(error), wanted.system.definition()))
        except InputError as error:
            if wanted.system is None:
                raise
            raise type(error).sentence(f"{wanted.system.told.where}: {error}") from None
    if checked.wanted and not cells:
        raise nothing_left(left_out[-1])
    seeds = range(checked.options.seeds)
    return [
        replace(cell, recipe=cell.recipe.model_copy(update={"seed": seed})) for seed in seeds for cell in cells
    ], left_out


def _cell(wanted: Wanted, source: ModelSource, skeleton: PreTrainedModel) -> Cell:
    from rarefy.models.blocks import find_blocks, select_sites
    from rarefy.runs.make_plan import checked_patterns
    from rarefy.tuning.parametrise import check_parametrisation

    # Methods are compared with nothing else beside them than what is said.
    recipe = wanted.recipe.resolved(source.context, follow_loss=False)
    blocks = select_sites(find_blocks(skeleton), recipe.include, recipe.exclude)
    if wanted.system and wanted.system.tune:
        check_parametrisation(wanted.system.tune.parametrisation, find_blocks(skeleton))
    pattern_of = checked_patterns(recipe, skeleton, blocks)
    linears = [(block.index, site.name) for block in blocks for site in block.sites]
    return Cell(wanted.name, wanted.asked, recipe, pattern_of, linears, wanted.system)


def _check_tuning_windows(cells: Sequence[Cell], calibration: Source, tokens: Tensor, bos_id: int | None) -> None:
    """Raise CalibrationError where a text has no room for the windows that a tuning holds out."""
    from rarefy.runs.tune_windows import Text, draw

    for seed, held_out in {(cell.seed, cell.tune.held_out) for cell in cells if cell.tune}:
        num, length = cells[0].recipe.window_shape
        draw(tokens, Text(calibration, num, held_out, seed), length, bos_id)


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
        **_loop_settings(options.loop),
    }


def _loop_settings(loop: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the loop for all cells, as far as they are said; of a file, with a digest of its content."""
    said = {key: as_number(value) for key, value in loop.items()}
    file = str(said.get("allocation", ""))
    if file.endswith(FILES):
        said["allocation"] = f"{file} ({hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8]})"
    return said


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
