"""Makes the plan of a pruning run from its recipe: all mistakes that need no weights are found here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.allocation.names import UNIFORM
from rarefy.calibration.sources import SELF, parse_source
from rarefy.errors import InputError, ModelError, OutputError
from rarefy.models.locate import locate
from rarefy.parallel.world import World
from rarefy.runs.plan import Plan
from rarefy.runs.recipe import DEFAULT_CALIBRATION, Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rarefy.calibration.documents import Source
    from rarefy.models.blocks import Block
    from rarefy.models.source import ModelSource
    from rarefy.pruning.settings import PerLayer, Uniform


def make_plan(recipe: Recipe, output: Path | None = None, offload: Path | None = None) -> Plan:
    """Find every mistake that can be found before the weights are loaded, the cheapest first.

    ``output`` may hold an unfinished run, which must be this one. ``offload`` is where hidden states go.
    """
    if offload is not None and not offload.is_dir():
        raise OutputError("--offload-dir", str(offload), "a folder that exists")
    locate(recipe.model)
    text = parse_source(recipe.calibration or DEFAULT_CALIBRATION, text_column=recipe.text_column)

    # What follows imports torch, which takes seconds.
    from rarefy.calibration.check import check_blocks
    from rarefy.calibration.windows import DRAW_FROM, draw_windows
    from rarefy.models.blocks import find_blocks, select_sites
    from rarefy.models.checkpoint import resolve_device
    from rarefy.models.sites import LinearSite
    from rarefy.models.source import resolve_model
    from rarefy.pruning.stores import kept_windows
    from rarefy.runs.journal import Journal
    from rarefy.runs.memory import check_own_text_fits

    journal = Journal.find(output) if output else None
    if journal:
        journal.check_kind()
    method, pattern = recipe.build_method(), recipe.build_pattern()
    world = World.current()
    device = world.place(resolve_device(recipe.device))
    source = resolve_model(recipe.model)
    skeleton = source.skeleton()
    blocks = select_sites(find_blocks(skeleton), recipe.include, recipe.exclude)
    linears = any(isinstance(site, LinearSite) for block in blocks for site in block.sites)
    recipe = recipe.resolved(source.context, follow_loss=linears)  # of experts in a stack no gradient is known
    if recipe.window_shape[0] < world.size:
        raise InputError("--num-samples", recipe.window_shape[0], f"at least {world.size}, a window for each process")
    check_blocks(skeleton, blocks)
    pattern_of = checked_patterns(recipe, skeleton, blocks)
    windows = None
    if text is not SELF:
        num, length = recipe.window_shape
        tokens, bos_id = read_tokens(source, text, recipe.bos, enough=DRAW_FROM * num * length)
        windows = draw_windows(tokens, num, length, recipe.seed, bos_id, name=f"the text of {text.name}")
    else:
        windows = kept_windows(output) if output else None
        recipe = recipe.model_copy(update={"bos": False})  # what the model writes begins with it anyway
    streams = source.kind != "gguf"
    plan = Plan(
        recipe, method, pattern, pattern_of, device, source, skeleton, blocks, windows, streams, offload, world.size
    )
    if journal and windows is not None and source.kind != "hub":
        journal.check(plan.fingerprint(windows))
    if windows is None and plan.streams:
        check_own_text_fits(plan)
    return plan


def checked_patterns(recipe: Recipe, skeleton: PreTrainedModel, blocks: Sequence[Block]) -> Uniform | PerLayer:
    """The pattern of each layer to prune, which are those of ``blocks``; ``skeleton`` is the model without weights.

    Raises PatternError where a pattern does not fit a layer or the recipe's other settings, InputError where these do
    not go together, ModelError where the model cannot be changed as they say.
    """
    from rarefy.layer.pattern import NM
    from rarefy.pruning.loop import check_patterns
    from rarefy.pruning.reparametrise import Reparametrisation
    from rarefy.pruning.settings import across_neurons, allocated

    pattern = recipe.build_pattern()
    pattern_of: Uniform | PerLayer
    if recipe.along == "neurons" and isinstance(pattern, NM):
        pattern_of = across_neurons(pattern, blocks)
    else:
        pattern_of = allocated(recipe.allocation or UNIFORM, pattern, blocks)
    settings = recipe.prune_settings(pattern_of)  # says what does not go together
    check_patterns(blocks, settings)
    Reparametrisation.of(skeleton, blocks, settings)
    return pattern_of


def read_tokens(
    source: ModelSource, text: Source, bos: bool, enough: int | None = None
) -> tuple[torch.Tensor, int | None]:
    """The tokens of ``text`` in one row, and the start token if ``bos`` asks for it."""
    from rarefy.calibration.windows import check_token_ids, token_stream
    from rarefy.models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError.sentence(
            f"{source.name} has no tokenizer, so it can read no text; --calibration self needs none."
        )
    if bos and tokenizer.bos_token_id is None:
        raise InputError.sentence(f"--bos asks for a start token, but the tokenizer of {source.name} has none.")
    tokens, bos_id = token_stream(text, tokenizer, enough), tokenizer.bos_token_id if bos else None
    check_token_ids(tokens, source.config, source.name, bos_id)
    return tokens, bos_id
