"""The plan of a pruning run, in which every mistake is found, and what ``--dry-run`` shows of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.cli.memory import check_own_text_fits, estimated_bytes
from rarefy.cli.terminal import print_table
from rarefy.cli.words import memory_words
from rarefy.errors import InputError, ModelError, OutputError
from rarefy.identity import versions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rarefy.calibration.sources import Source
    from rarefy.layer.pattern import Pattern
    from rarefy.methods.base import Method
    from rarefy.models.blocks import Block
    from rarefy.models.source import ModelSource
    from rarefy.progress import Fingerprint
    from rarefy.recipe import Recipe


@dataclass
class Plan:
    """A run whose every setting was checked, as far as that goes without the weights."""

    recipe: Recipe
    method: Method
    pattern: Pattern
    device: torch.device
    source: ModelSource
    skeleton: PreTrainedModel
    blocks: list[Block]
    #: Token ids (num, length); None where the model is to write its own text.
    windows: torch.Tensor | None
    #: Whether the model is to stay on disk, as far as that is known.
    streams: bool
    #: A folder for the hidden states; None where they are to be in memory.
    offload: Path | None = None
    #: How many processes share the windows.
    num_ranks: int = 1

    def fingerprint(self, windows: torch.Tensor) -> Fingerprint:
        """All that the result depends on; ``windows`` is the calibration text."""
        from rarefy.progress import Fingerprint

        made_by = {name: versions()[name] for name in ("rarefy", "torch", "transformers")}
        # Which GPU it is does not matter; another process of the run has another one.
        settings = self.recipe.model_dump() | {"device": self.device.type, **made_by}
        return Fingerprint.of(settings, self.source.path, windows)

    @property
    def warnings(self) -> list[str]:
        """What is no mistake, but hardly what was meant."""
        num, length = self.recipe.window_shape
        widest = max((site for block in self.blocks for site in block.sites), key=lambda site: site.shape[1])
        if num * length >= widest.shape[1]:
            return []
        words = (
            f"the calibration has {num * length:,} tokens, fewer than the {widest.shape[1]:,} inputs of "
            f"{widest.name}: that says too little about its weights; more --num-samples say more"
        )
        return [words]


def make_plan(recipe: Recipe, output: Path | None = None, offload: Path | None = None) -> Plan:
    """Find every mistake that can be found before the weights are loaded, the cheapest first.

    ``output`` may hold an unfinished run, which must be this one. ``offload`` is where hidden states go.
    """
    from rarefy.calibration.sources import DRAW_FROM, SELF, draw_windows, parse_source
    from rarefy.distributed import World
    from rarefy.homes import kept_windows
    from rarefy.models.blocks import find_blocks, select_sites
    from rarefy.models.checkpoint import resolve_device
    from rarefy.models.source import resolve_model
    from rarefy.progress import Progress
    from rarefy.pruning import check_pattern
    from rarefy.recipe import DEFAULT_CALIBRATION

    if offload is not None and not offload.is_dir():
        raise OutputError("--offload-dir", str(offload), "a folder that exists")
    method, pattern = recipe.build_method(), recipe.build_pattern()
    world = World.current()
    device = world.place(resolve_device(recipe.device))
    text = parse_source(recipe.calibration or DEFAULT_CALIBRATION)
    source = resolve_model(recipe.model)
    recipe = recipe.resolved(source.context)
    if recipe.window_shape[0] < world.size:
        raise InputError("--num-samples", recipe.window_shape[0], f"at least {world.size}, a window for each process")
    skeleton = source.skeleton()
    blocks = select_sites(find_blocks(skeleton), recipe.include, recipe.exclude)
    check_pattern(blocks, pattern)
    windows = None
    if text is not SELF:
        num, length = recipe.window_shape
        tokens, bos_id = read_tokens(source, text, recipe.bos, enough=DRAW_FROM * num * length)
        windows = draw_windows(tokens, num, length, recipe.seed, bos_id, name=f"the text of {text.name}")
    else:
        windows = kept_windows(output) if output else None
        recipe = recipe.model_copy(update={"bos": False})  # what the model writes begins with it anyway
    streams = _streams(source, recipe)
    plan = Plan(recipe, method, pattern, device, source, skeleton, blocks, windows, streams, offload, world.size)
    if output and (progress := Progress.find(output)) and windows is not None and source.kind != "hub":
        progress.check(plan.fingerprint(windows))
    if windows is None and plan.streams:
        check_own_text_fits(plan)
    return plan


def _streams(source: ModelSource, recipe: Recipe) -> bool:
    """Whether the model has files of which parts can be read, and is to be used in their dtype."""
    from rarefy.models.checkpoint import resolve_dtype

    if source.kind == "gguf" or (recipe.dtype != "auto" and resolve_dtype(recipe.dtype) != source.config.dtype):
        return False
    files = ("model.safetensors", "model.safetensors.index.json")
    return source.kind == "hub" or any((source.path / file).is_file() for file in files)


def read_tokens(
    source: ModelSource, text: Source, bos: bool, enough: int | None = None
) -> tuple[torch.Tensor, int | None]:
    """The tokens of ``text`` in one row, and the start token if ``bos`` asks for it."""
    from rarefy.calibration.sources import token_stream
    from rarefy.models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError.sentence(
            f"{source.name} has no tokenizer, so it can read no text; --calibration self needs none."
        )
    if bos and tokenizer.bos_token_id is None:
        raise InputError.sentence(f"--bos asks for a start token, but the tokenizer of {source.name} has none.")
    return token_stream(text, tokenizer, enough), tokenizer.bos_token_id if bos else None


def print_plan(plan: Plan, texts: bool) -> None:
    """What ``--dry-run`` shows: the layers by kind with their counts of weights to prune, and the memory it takes.

    ``texts``: the models write some for the report.
    """
    sites = [site for block in plan.blocks for site in block.sites]
    kinds = Counter((site.name.rpartition(".")[2], site.shape) for site in sites)
    rows = [["layer", "count", "shape", "to prune"]]
    total = 0
    for (kind, shape), count in kinds.items():
        pruned = count * (shape[0] * shape[1] - plan.pattern.count(shape))
        rows.append([kind, f"{count:,}", f"{shape[0]} x {shape[1]}", f"{pruned:,}"])
        total += pruned
    size = sum(site.shape[0] * site.shape[1] for site in sites)
    rows.append(["all", f"{len(sites):,}", "", f"{total:,}"])
    print_table(rows)
    print(f"{plan.method}, {plan.pattern}: {total:,} of {size:,} weights would be pruned")
    print(calibration_words(plan.recipe))
    each = "" if plan.num_ranks == 1 else f" for each of {plan.num_ranks} processes"
    print(f"peak memory, estimated: {memory_words(estimated_bytes(plan, texts))} on {plan.device}{each}")


def calibration_words(recipe: Recipe) -> str:
    """How many windows of how many tokens from where."""
    num, length = recipe.window_shape
    return f"calibration: {num:,} windows of {length:,} tokens from {recipe.calibration}"
