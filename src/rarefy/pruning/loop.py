"""The loop over blocks: load, collect, solve, write, propagate, keep.

For each block in order, the hidden states of all windows are replayed through the still dense block
while hooks feed its Gram matrices, every linear is solved, the sparse weights are written, and the
hidden states are replayed through the pruned block to enter the next one. Where blocks come from and go
to is a ``BlockStore``'s affair: the loop is the same for a model in memory and for one that stays on disk. So it
is for one process and for several, of which each holds the hidden states of some windows and solves some
layers: Grams are summed, and weights handed round, so that all go on with the same block.
"""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import zip_longest

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from rarefy.calibration.collect import turns
from rarefy.calibration.stream import convert_calls
from rarefy.errors import InputError
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import Pattern
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution
from rarefy.methods.base import Method, run
from rarefy.models.blocks import Block, find_blocks, select_sites
from rarefy.models.wrappers import unwrapped
from rarefy.parallel.world import World
from rarefy.pruning.block import STARVED, Progress, Ticks, prune_block
from rarefy.pruning.precision import compute_dtype, computing_in
from rarefy.pruning.records import LayerRecord, Report
from rarefy.pruning.settings import PruneSettings
from rarefy.pruning.stores import BlockStore

_NAMED = 8  # of these, so many are named in the warning


def solve(
    weight: Tensor, gram: Tensor | Gram, pattern: Pattern, method: Method, *, name: str = "the layer"
) -> Solution:
    """Prune one layer: ``weight`` (out, in) float, ``gram`` (in, in) tensor X^T X or ``Gram``.

    Returns a Solution with ``weight`` (out, in), ``mask``, ``relative_error`` and ``status``; works in
    float64 if either input does, else in float32. ``name`` is what errors call the layer. Raises
    PatternError, MethodError, NumericalError (NaN or infinity), InputError (shapes).
    """
    gram = gram if isinstance(gram, Gram) else Gram.from_matrix(gram)
    with torch.no_grad():
        return run(method, LayerProblem(weight, gram), pattern, name=name)


def prune(
    model: nn.Module,
    windows: Int64[Tensor, "num length"],
    *,
    pattern: Pattern,
    method: Method,
    batch_size: int = 4,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strict: bool = False,
    on_progress: Progress | None = None,
    on_layer: Callable[[LayerRecord], None] | None = None,
) -> Report:
    """Prune the linears in all blocks of a loaded decoder-only transformers model, in place.

    ``windows`` (num, length) are int64 token ids for calibration, replayed ``batch_size`` at a time.
    ``include`` and ``exclude`` are globs on full module names. ``on_progress(done, total, note)`` and
    ``on_layer(record)`` are called as the run goes on. What torch.compile or data parallelism wraps around a
    model is taken off. Raises ModelError for a model that cannot be pruned, such as one with adapters or quantised
    weights, PatternError before anything changes where the pattern does not fit a layer, NumericalError for NaN
    or infinity, and, if ``strict``, for a layer whose status is a failure.

    Where torch.distributed's default group is initialised, all of its processes call this alike, with the
    same model, all windows and the same settings; they share the work, and each ends with the pruned model
    and the report. Raises InputError where they differ, RankError where one of them is gone.
    """
    settings = PruneSettings(pattern, method, batch_size, include, exclude, strict)
    return prune_model(model, windows, settings, on_progress, on_layer)


def prune_model(
    model: nn.Module,
    windows: Int64[Tensor, "num length"],
    settings: PruneSettings,
    on_progress: Progress | None = None,
    on_layer: Callable[[LayerRecord], None] | None = None,
) -> Report:
    """What ``prune`` does, with the settings in one piece."""
    model = unwrapped(model)
    home = BlockStore(model)
    if home.world.size > 1:
        _check_alike(home.world, model, windows, settings)
    training = model.training
    model.eval()
    try:
        return prune_blocks(home, windows, settings, on_progress, on_layer)
    finally:
        model.train(training)


def prune_blocks(
    home: BlockStore,
    windows: Int64[Tensor, "num length"],
    settings: PruneSettings,
    on_progress: Progress | None = None,
    on_layer: Callable[[LayerRecord], None] | None = None,
) -> Report:
    """Prune the linears in all unfinished blocks of the model that ``home`` keeps, which is in inference mode.

    Arguments and errors are those of ``prune``; ``on_progress`` and ``on_layer`` hear of what is done now.
    The report is of the whole run. All processes of ``home.world`` call this alike, with all windows.
    """
    started = time.perf_counter()
    world = home.world
    own, first = _own(world, windows)
    blocks = select_sites(find_blocks(home.model), settings.include, settings.exclude)
    check_pattern(blocks, settings.pattern)
    last = max(block.index for block in blocks if block.sites)
    records = home.records()
    todo = blocks[home.finished : last + 1]
    if todo:
        with world.together():
            stream = home.record(blocks, own, settings.batch_size, first)
        convert_calls(stream, compute_dtype(stream.states.dtype, stream.device))
        ticks = Ticks(on_progress, _num_parts(todo, stream.num_batches))
    for block, following in zip_longest(todo, todo[1:]):
        done = []
        with ExitStack() as turn:
            with world.together():
                turn.enter_context(home.loaded(block, following))
            for record_ in prune_block(world, block, stream, settings, ticks):
                done.append(record_)
                if on_layer:
                    on_layer(record_)
            if following is not None:
                with world.together(), computing_in(block.module, stream.compute_dtype):
                    stream.advance(block.module, block.index, ticks.one)
            with world.together():
                if world.leads:
                    home.store(block)
        home.finish(block, done, stream if following is not None else None)
        records += done
    if world.leads:
        _warn_of_starved(records)
    seconds = time.perf_counter() - started
    return Report(records, seconds=seconds, method=str(settings.method), pattern=str(settings.pattern))


def _num_parts(blocks: Sequence[Block], num_batches: int) -> int:
    """Batches collected and advanced, and layers solved: what progress counts."""
    collected = sum(len(turns(block.sites)) for block in blocks)
    advanced = len(blocks) - 1  # nothing comes after the last
    return (collected + advanced) * num_batches + sum(len(block.sites) for block in blocks)


def check_pattern(blocks: Sequence[Block], pattern: Pattern) -> None:
    """Raise PatternError, naming the first layer, where ``pattern`` does not fit its shape."""
    for block in blocks:
        for site in block.sites:
            pattern.validate(site.shape, site.name)


def _own(world: World, windows: Tensor) -> tuple[Tensor, int]:
    """The windows that are this process's, and the number of the first. Raises InputError for too few of them."""
    if world.size == 1:
        return windows, 0
    if len(windows) < world.size:
        raise InputError.sentence(
            f"windows holds {len(windows)}, but must hold at least {world.size}, one for each process."
        )
    share = world.share(len(windows))
    return windows[share.start : share.stop], share.start


def _check_alike(world: World, model: nn.Module, windows: Tensor, settings: PruneSettings) -> None:
    """Raise InputError, on all processes, where they are not about to do the same."""
    given = {
        "model": [(name, tuple(each.shape), each.dtype) for name, each in model.named_parameters()],
        "windows": hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest(),
        "pattern": str(settings.pattern),
        "method": re.sub(r" at 0x\w+", "", repr(settings.method)),  # addresses of what a method of one's own holds
        **{key: str(getattr(settings, key)) for key in ("batch_size", "include", "exclude", "strict")},
    }
    everyone = world.gather(given)
    for key in given:
        for rank, other in enumerate(everyone):
            if other[key] != everyone[0][key]:
                raise InputError.sentence(
                    f"{key} on process {rank} is not that on process 0: all processes of the group prune together."
                )


def _warn_of_starved(records: Sequence[LayerRecord]) -> None:
    names = [record.name for record in records if STARVED in record.details]
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        warnings.warn(
            f"{len(names)} weights of experts were solved with all tokens of their block, because the router sent "
            f"fewer tokens to them than they have inputs: {', '.join(names[:_NAMED])}{more}. Their records say so.",
            stacklevel=5,
        )
