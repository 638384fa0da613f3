"""The survey before the loop: a look at each dense block, for an allocation that is chosen by what it finds.

Blocks come from the same store as in the loop, one at a time. Where the rule asks for Grams, the windows pass through
all blocks once; where it asks for weights alone, no text is read. Layers are shared out among processes. The patterns
that follow are remembered by the store: a run that goes on takes them from there, as the blocks that are finished are
dense no more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from rarefy.allocation.allocate import MEASURED_RULES, allocate_measured, layers_of
from rarefy.allocation.names import SEARCH
from rarefy.allocation.rule import MeasuredRule, Sensitivity
from rarefy.calibration.collect import gram_groups
from rarefy.calibration.experts import Grams
from rarefy.calibration.stream import HiddenStates, convert_calls
from rarefy.layer.pattern import pattern_from_spec
from rarefy.models.blocks import Block
from rarefy.models.sites import Site
from rarefy.parallel.world import World
from rarefy.pruning.advance import advance
from rarefy.pruning.block import PartCounter
from rarefy.pruning.collect import collect_grams
from rarefy.pruning.search import num_search_parts, own_windows, searched
from rarefy.pruning.settings import PerLayer, PruneSettings, Unmeasured
from rarefy.pruning.stores import BlockStore

_FILE = "allocation.json"


def num_survey_parts(
    store: BlockStore, blocks: Sequence[Block], windows: Tensor, first: int, num: int, settings: PruneSettings
) -> int:
    """What progress counts of the survey: batches collected and advanced, and layers; arguments of ``surveyed``."""
    if not isinstance(settings.pattern_of, Unmeasured) or store.recall(_FILE) is not None:
        return 0
    num_batches = -(-len(windows) // settings.batch_size)
    if settings.pattern_of.allocation == SEARCH:
        few = own_windows(num, range(first, first + len(windows)), store.world.size)
        return num_search_parts(store, blocks, -(-len(few) // settings.batch_size))
    blocks = up_to_last(blocks)
    layers = sum(len(block.sites) for block in blocks)
    if not MEASURED_RULES[settings.pattern_of.allocation].needs_grams:
        return layers
    collected = sum(len(gram_groups(block.sites)) for block in blocks)
    return (collected + len(blocks) - 1) * num_batches + layers


def surveyed(
    store: BlockStore,
    blocks: Sequence[Block],
    windows: Tensor,
    first: int,
    num: int,
    settings: PruneSettings,
    known: Mapping[str, Sensitivity],
    counter: PartCounter,
) -> PruneSettings:
    """The settings with the pattern of each layer, where that is to be measured; else as they are.

    ``windows`` are this process's, of which the first is number ``first`` of ``num``; ``known`` are the sensitivities
    of linears, by name. Raises OutputError where what
    was remembered is lost, or cannot be kept.
    """
    if not isinstance(settings.pattern_of, Unmeasured):
        return settings
    allocation, pattern = settings.pattern_of.allocation, settings.pattern_of.pattern
    content = store.recall(_FILE)
    if content is None:
        if allocation == SEARCH:
            few = own_windows(num, range(first, first + len(windows)), store.world.size)
            some = windows[[window - first for window in few]]
            found = searched(store, blocks, some, settings, pattern, counter)
        else:
            rule = MEASURED_RULES[allocation]
            facts = _facts(store, up_to_last(blocks), windows, first, settings, rule, known, counter)
            found = store.world.from_first(lambda: allocate_measured(allocation, pattern, layers_of(blocks), facts))
        content = json.dumps({name: each.spec() for name, each in found.items()}).encode()
        store.remember(_FILE, content)
    patterns = {name: pattern_from_spec(spec) for name, spec in json.loads(content).items()}
    return replace(settings, pattern_of=PerLayer(patterns, pattern, allocation))


def up_to_last(blocks: Sequence[Block]) -> Sequence[Block]:
    """The blocks up to the last with a layer to prune."""
    return blocks[: 1 + max(block.index for block in blocks if block.sites)]


def _facts(
    store: BlockStore,
    blocks: Sequence[Block],
    windows: Tensor,
    first: int,
    settings: PruneSettings,
    rule: MeasuredRule,
    known: Mapping[str, Sensitivity],
    counter: PartCounter,
) -> dict[str, Any]:
    """What ``rule`` measures of each layer, by name."""
    world = store.world
    states: HiddenStates | None = None
    if rule.needs_grams:
        with world.together():
            states, _ = store.hidden_states(blocks, windows, settings.batch_size, first)
        convert_calls(states, store.compute_dtype(states))
    facts: dict[str, Any] = {}
    for block, following in zip_longest(blocks, blocks[1:]):
        with ExitStack() as scope:
            with world.together():
                scope.enter_context(store.loaded(block, following))
            facts |= _of_block(world, block, states, rule, known, counter)
            if states is not None and following is not None:
                advance(world, block, states, counter.count)
    return facts


def _of_block(
    world: World,
    block: Block,
    states: HiddenStates | None,
    rule: MeasuredRule,
    known: Mapping[str, Sensitivity],
    counter: PartCounter,
) -> dict[str, Any]:
    """What is measured of the layers of one block, which all processes have in memory."""
    sites = {site.name: site for site in block.sites}
    kept: dict[str, Any] = {}
    for some, grams in _with_grams(world, block, states, counter.count):
        own = {}
        with world.together(), torch.no_grad():
            for number, site in enumerate(some):
                gram = grams.pop(site.name, None)
                if number % world.size == world.rank:
                    own[site.name] = rule.of_layer(site.read(), gram, known.get(site.name))
                counter.count()
        for others in world.gather(own):
            kept |= others
    in_order = {name: kept[name] for name in sites}
    return world.from_first(lambda: rule.of_block(in_order, lambda name: sites[name].read())) if sites else {}


def _with_grams(
    world: World, block: Block, states: HiddenStates | None, on_batch: Callable[[], None]
) -> Iterator[tuple[list[Site], Grams]]:
    """The sites of a block, as many at a time as their Grams may be in memory together; all where there are none."""
    if states is None:
        yield list(block.sites), {}
        return
    for some in gram_groups(block.sites):
        yield some, collect_grams(world, block, some, states, means=False, on_batch=on_batch)[0]
