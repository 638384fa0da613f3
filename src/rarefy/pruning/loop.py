"""The loop over blocks: load, reparametrise, collect, solve, write, step, advance, store.

For each block in order, its inner dimensions may be reordered (reparametrise.py), the hidden states of all windows
are replayed through the still dense block while hooks feed its Grams (collect.py), every linear is solved
(solve.py), the sparse weights are written (write.py), further steps may change the block (steps.py), and the hidden
states are replayed through the pruned block to enter the next one (advance.py). A block store (stores.py) hides
where blocks come from and go to, so that the loop is the same for a model in memory and one that is streamed.
Several processes each hold the hidden states of some windows and solve some layers; Grams are all-reduced and
weights broadcast, so that all go on with the same block.
"""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import zip_longest

from jaxtyping import Int64
from torch import Tensor, nn

from rarefy.allocation.names import UNIFORM
from rarefy.calibration.check import check_blocks
from rarefy.calibration.collect import gram_groups
from rarefy.calibration.stream import HiddenStates, convert_calls
from rarefy.errors import InputError, PatternError
from rarefy.layer.pattern import Pattern
from rarefy.methods.base import Method
from rarefy.models.blocks import Block, find_blocks, select_sites
from rarefy.models.sites import LinearSite
from rarefy.models.wrappers import unwrapped
from rarefy.parallel.world import World
from rarefy.pruning.advance import advance
from rarefy.pruning.barber import Barber
from rarefy.pruning.block import Masks, OnProgress, PartCounter, prune_layers
from rarefy.pruning.collect import STARVED
from rarefy.pruning.drift import advance_dense
from rarefy.pruning.fisher import num_fisher_parts, sensitivities
from rarefy.pruning.matching import Matching
from rarefy.pruning.outputs import has_known_norms
from rarefy.pruning.precision import full_float32
from rarefy.pruning.records import LayerRecord, Report
from rarefy.pruning.reparametrise import Reparametrisation
from rarefy.pruning.settings import FISHER, MLP, NONE, PatternOf, PruneSettings, allocated, as_pattern_of
from rarefy.pruning.steps import PrunedBlock
from rarefy.pruning.stores import BlockStore
from rarefy.pruning.survey import num_survey_parts, surveyed
from rarefy.pruning.write import OVERFLOWED

_NAMED = 8  # of these, so many are named in the warning


def prune(
    model: nn.Module,
    windows: Int64[Tensor, "num length"],
    *,
    pattern: Pattern | PatternOf,
    method: Method,
    batch_size: int = 4,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strict: bool = False,
    barber: Barber | None = None,
    matching: Matching | None = None,
    drift: float = 0.0,
    refresh: bool = False,
    permute: bool = False,
    rotate: bool = False,
    allocation: str = UNIFORM,
    row_weights: str = NONE,
    on_progress: OnProgress | None = None,
    on_layer: Callable[[LayerRecord], None] | None = None,
) -> Report:
    """Prune the linears in all blocks of a loaded decoder-only transformers model, in place.

    ``windows`` (num, length) are int64 token ids for calibration, replayed ``batch_size`` at a time. ``pattern`` is
    one for all layers, or a function that gives the pattern of a ``Site``.
    ``include`` and ``exclude`` are globs on full module names. ``barber`` changes the masks of each block by what its
    attention and its MLP put out, and ``matching`` trains what is kept of it to match the dense model. ``drift`` is
    the share of the drift from the dense path that targets correct (0 = off), and ``refresh`` lets each group of a
    block's layers see what was pruned before it in the block. ``permute`` reorders MLP neurons and the dimensions
    inside attention heads, for N:M patterns, and ``rotate`` rotates the latter: both are merged into the weights
    before a block is pruned, and change nothing that it computes.
    ``allocation`` spreads the zeros of a pattern over the layers: "uniform", "profile", a .json or .csv file, or
    "fisher", "owl", "alphapruning", "lsa" or "search", which measure the dense model first. ``row_weights`` says
    which outputs count more where the rows of a matrix compete for weights: "none", "mlp" (by the norm of the neuron
    that an output makes) or "fisher" (by the squared gradient of the loss).
    ``on_progress(done, total, note)`` and ``on_layer(record)`` are called as the run goes on. What torch.compile or
    data parallelism wraps around a model is taken off. Raises ModelError for a model that cannot be pruned, such as
    one with adapters or quantised weights, PatternError before anything changes where the pattern does not fit a
    layer, NumericalError for NaN or infinity, and, if ``strict``, for a layer whose status is a failure.

    Where torch.distributed's default group is initialised, all of its processes call this alike, with the
    same model, all windows and the same settings; they share the work, and each ends with the pruned model
    and the report. Raises InputError where they differ, RankError where one of them is gone.
    """
    steps = [step for step in (barber, matching) if step is not None]
    pattern_of = as_pattern_of(pattern)
    if allocation != UNIFORM:
        if not isinstance(pattern, Pattern):
            raise InputError("allocation", allocation, f'"{UNIFORM}" beside a function that gives each layer its own')
        blocks = select_sites(find_blocks(unwrapped(model)), include, exclude)
        pattern_of = allocated(allocation, pattern, blocks)
    settings = PruneSettings(
        pattern_of, method, batch_size, include, exclude, strict, steps, drift, refresh, permute, rotate, row_weights
    )
    return prune_model(model, windows, settings, on_progress, on_layer)


def prune_model(
    model: nn.Module,
    windows: Int64[Tensor, "num length"],
    settings: PruneSettings,
    on_progress: OnProgress | None = None,
    on_layer: Callable[[LayerRecord], None] | None = None,
) -> Report:
    """What ``prune`` does, with the settings in one piece."""
    model = unwrapped(model)
    store = BlockStore(model)
    if store.world.size > 1:
        _check_alike(store.world, model, windows, settings)
    check_blocks(model, select_sites(find_blocks(model), settings.include, settings.exclude))
    training = model.training
    model.eval()
    try:
        return prune_blocks(store, windows, settings, on_progress, on_layer)
    finally:
        model.train(training)


@full_float32()
def prune_blocks(
    store: BlockStore,
    windows: Int64[Tensor, "num length"],
    settings: PruneSettings,
    on_progress: OnProgress | None = None,
    on_layer: Callable[[LayerRecord], None] | None = None,
) -> Report:
    """Prune the linears in all unfinished blocks of the model in ``store``, which is in inference mode.

    Arguments and errors are those of ``prune``; ``on_progress`` and ``on_layer`` hear of what is done now.
    The report is of the whole run. All processes of ``store.world`` call this alike, with all windows.
    """
    started = time.perf_counter()
    world = store.world
    own, first = _own(world, windows, settings.batch_size if settings.steps else 1)
    blocks = select_sites(find_blocks(store.model), settings.include, settings.exclude)
    check_patterns(blocks, settings)
    reparametrise = Reparametrisation.of(store.model, blocks, settings)
    last = max(block.index for block in blocks if block.sites)
    records = store.records()
    todo = blocks[store.finished : last + 1]
    num_batches = -(-len(own) // settings.batch_size)
    measuring = num_survey_parts(store, blocks, own, first, len(windows), settings)
    measuring += num_fisher_parts(store, blocks, own, first, len(windows), settings)
    of_all = sum(world.gather(num_batches))
    counter = PartCounter(on_progress, measuring + _num_parts(todo, num_batches, of_all, settings))
    known = sensitivities(store, blocks, own, first, len(windows), settings, counter)
    settings = surveyed(store, blocks, own, first, len(windows), settings, known, counter)
    row_weights = {name: one.outputs for name, one in known.items()} if settings.row_weights == FISHER else {}
    if todo:
        with world.together():
            entering, dense = store.hidden_states(
                blocks, own, settings.batch_size, first, dense_path=settings.needs_dense_path
            )
        for states in filter(None, (entering, dense)):
            convert_calls(states, store.compute_dtype(entering))
    for block, following in zip_longest(todo, todo[1:]):
        done = []
        masks: Masks | None = {} if settings.steps else None
        with ExitStack() as scope:
            with world.together():
                scope.enter_context(store.loaded(block, following))
            notes = reparametrise(world, block, entering, row_weights, counter.count) if reparametrise else {}
            drifts = None
            drifting = any(other.sites for other in blocks[: block.index])  # before it, both paths are the same
            if dense is not None and settings.drift > 0 and block.sites and drifting:
                drifts = advance_dense(world, block, entering, dense, counter.count)
            elif dense is not None:
                advance(world, block, dense, counter.count)
            dense_weights = {site.name: site.read() for site in block.sites} if settings.needs_dense_weights else {}
            for layer in prune_layers(world, block, entering, settings, counter, masks, drifts, row_weights):
                layer.details |= notes.get(layer.name, {})
                done.append(layer)
                if on_layer:
                    on_layer(layer)
            by_name = {layer.name: layer for layer in done}
            again = partial(_solved_again, world, block, entering, settings)
            pruned = PrunedBlock(
                block, entering, dense, masks or {}, world, settings.pattern_of, dense_weights, by_name, again
            )
            for step in settings.steps:
                step(pruned, counter.count)
            if following is not None:
                advance(world, block, entering, counter.count)
            with world.together():
                if world.leads:
                    store.store(block, changed_parameters(block, settings))
        if block is todo[0]:
            store.keep_compute_dtype()
        if following is None:
            store.finish(block, done, None)
        else:
            store.finish(block, done, entering, dense)
        records += done
    if world.leads:
        _warn_of(records)
    seconds = time.perf_counter() - started
    ran_in = str(store.computing).removeprefix("torch.") if store.computing is not None else ""
    return Report(records, settings.pattern_name, str(settings.method), seconds, ran_in)


def _solved_again(
    world: World,
    block: Block,
    entering: HiddenStates,
    settings: PruneSettings,
    pattern_of: PatternOf,
    method: Method,
    on_part: Callable[[], None],
) -> list[LayerRecord]:
    """The layers of a block with other patterns and another method, from the weights that they have."""
    settings = replace(settings, pattern_of=pattern_of, method=method, steps=[])
    counter = PartCounter(lambda *_: on_part(), 0)
    return list(prune_layers(world, block, entering, settings, counter))


def changed_parameters(block: Block, settings: PruneSettings) -> list[str]:
    """The full names of the parameters of a block that a run may change; none where it has no site."""
    if not block.sites:
        return []
    if settings.steps or settings.permute or settings.rotate:
        return [name for name, _ in block.module.named_parameters(prefix=block.name)]
    return list(dict.fromkeys(site.parameter_name for site in block.sites))


def _num_parts(blocks: Sequence[Block], num_batches: int, of_all: int, settings: PruneSettings) -> int:
    """What progress counts: batches collected and advanced, layers solved, parts of steps.

    ``num_batches`` are this process's, ``of_all`` those of all processes.
    """
    collected = sum(len(gram_groups(block.sites)) for block in blocks)
    if settings.permute or settings.rotate:
        collected += sum(bool(block.sites) for block in blocks)
    advanced = len(blocks) - 1  # nothing comes after the last
    if settings.needs_dense_path:
        advanced += len(blocks)
    layers = sum(len(block.sites) for block in blocks)
    steps = sum(step.num_parts(block, of_all) for step in settings.steps for block in blocks)
    return (collected + advanced) * num_batches + layers + steps


def check_patterns(blocks: Sequence[Block], settings: PruneSettings) -> None:
    """Raise PatternError, naming the first layer, where its pattern does not fit its shape, or not the settings.

    Raises InputError where no layer has the row weights that the settings ask for.
    """
    patterns = []
    for block in blocks:
        for site in block.sites:
            pattern = settings.pattern_of(site)
            settings.method.check_pattern(pattern)
            for step in settings.steps:
                step.check_pattern(pattern)
            pattern.validate(site.shape, site.name)
            patterns.append(pattern)
    if settings.row_weights != NONE and patterns and all(pattern.rows_independent for pattern in patterns):
        raise PatternError.sentence(
            f"Row weights ({settings.row_weights}) change nothing with the pattern {settings.pattern_name}, which "
            "says how many weights each row keeps: they need a sparsity of the whole matrix (scope layer)."
        )
    if settings.row_weights == MLP and not any(map(has_known_norms, blocks)):
        raise InputError.sentence(
            "Row weights (mlp) are of layers that make the neurons of an MLP, and known where the layer that reads "
            "these is pruned, too: no layer to prune is such a one."
        )
    if settings.needs_sensitivities and not any(isinstance(site, LinearSite) for b in blocks for site in b.sites):
        what = "Row weights (fisher) are" if settings.row_weights == FISHER else "Allocation (fisher) is"
        raise InputError.sentence(
            f"{what} of linears that are modules: the layers to prune are experts in one stack."
        )


def _own(world: World, windows: Tensor, together: int) -> tuple[Tensor, int]:
    """The windows that are this process's, and the number of the first. Raises InputError for too few of them.

    So many of them stay ``together``, as one process would have them in a batch, if there are enough for all.
    """
    if world.size == 1:
        return windows, 0
    if len(windows) < world.size:
        raise InputError.sentence(
            f"windows holds {len(windows)}, but must hold at least {world.size}, one for each process."
        )
    together = together if len(windows) > together * (world.size - 1) else 1
    share = world.share(-(-len(windows) // together))
    return windows[share.start * together : share.stop * together], share.start * together


def _check_alike(world: World, model: nn.Module, windows: Tensor, settings: PruneSettings) -> None:
    """Raise InputError, on all processes, where they are not about to do the same."""
    compared = (
        *("batch_size", "include", "exclude", "strict", "steps", "drift", "refresh"),
        *("permute", "rotate", "row_weights"),
    )
    given = {
        "model": [(name, tuple(each.shape), each.dtype) for name, each in model.named_parameters()],
        "windows": hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest(),
        "pattern": [
            settings.pattern_name,
            *(str(settings.pattern_of(site)) for block in find_blocks(model) for site in block.sites),
        ],
        "method": re.sub(r" at 0x\w+", "", repr(settings.method)),  # addresses of what a method of one's own holds
        **{key: str(getattr(settings, key)) for key in compared},
    }
    everyone = world.gather(given)
    for key in given:
        for rank, other in enumerate(everyone):
            if other[key] != everyone[0][key]:
                raise InputError.sentence(
                    f"{key} on process {rank} is not that on process 0: all processes of the group prune together."
                )


#: What is warned of where a record's details have the key: {number} and {names} of layers.
_WARNINGS = {
    STARVED: "{number} weights of experts were solved with all tokens of their block, because the router sent fewer "
    "tokens to them than they have inputs: {names}. Their records say so.",
    OVERFLOWED: "{number} layers have weights beyond the range of the dtype in which they are stored, which were "
    "clipped: {names}. Another --dtype, bfloat16 for instance, has the range.",
}


def _warn_of(records: Sequence[LayerRecord]) -> None:
    for key, sentence in _WARNINGS.items():
        names = [record.name for record in records if key in record.details]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            warnings.warn(sentence.format(number=len(names), names=", ".join(names[:_NAMED]) + more), stacklevel=5)
