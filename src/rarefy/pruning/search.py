"""The search for an allocation: how far the predictions of the model are from the dense one's when it has a profile.

For each profile, the model is pruned by SparseGPT block by block, as in the loop, with a part of the windows: a block
is loaded, solved, run, and put back as it was. Behind the last block, the model's own norm and head make logits of
the states of both paths, and KL(dense || pruned) over all positions of these windows is the distance. So the model is
streamed as in the loop, but for embeddings and head, which are in memory together with the logits of two windows. The
store remembers each distance as soon as it is known, and a run that goes on begins with the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import zip_longest

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rarefy.allocation.allocate import layers_of
from rarefy.allocation.budget import patterns
from rarefy.allocation.names import SEARCH
from rarefy.allocation.search import Point, num_evaluations, profile_at, search
from rarefy.calibration.collect import gram_groups
from rarefy.calibration.finish import Ending, output_form
from rarefy.calibration.stream import HiddenStates, convert_calls
from rarefy.layer.pattern import Pattern
from rarefy.methods.sparsegpt import SparseGPT
from rarefy.models.blocks import Block
from rarefy.pruning.advance import advance
from rarefy.pruning.block import PartCounter, prune_layers
from rarefy.pruning.precision import computing_in
from rarefy.pruning.settings import NONE, PerLayer, PruneSettings
from rarefy.pruning.stores import BlockStore

#: Windows of the calibration that the search looks at: for its order of profiles a few are enough.
WINDOWS = 8
_FILE = "search.json"
SLICE = 256  # positions that are compared at a time


def own_windows(number: int, mine: range, size: int) -> list[int]:
    """Which of this process's windows the search looks at: of the ``number`` of all, evenly spaced ones.

    ``mine`` are this process's, of ``size`` processes, of which each has one at least.
    """
    few = min(number, max(WINDOWS, size))
    spaced = {place * number // few for place in range(few)}
    return [window for window in mine if window in spaced]


def num_search_parts(store: BlockStore, blocks: Sequence[Block], num_batches: int) -> int:
    """What progress counts: batches advanced on the dense path, and for each profile batches, layers and logits."""
    layers = layers_of(blocks)
    collected = sum(len(gram_groups(block.sites)) for block in blocks)
    each = (collected + len(blocks) + 1) * num_batches + len(layers)
    left = num_evaluations(layers) - len(_known(store))
    return len(blocks) * num_batches + left * each


def searched(
    store: BlockStore,
    blocks: Sequence[Block],
    windows: Int64[Tensor, "num length"],
    settings: PruneSettings,
    pattern: Pattern,
    counter: PartCounter,
) -> dict[str, Pattern]:
    """The pattern of each layer by name. ``blocks`` are all of the model's, ``windows`` those of ``own_windows``."""
    layers = layers_of(blocks)
    by_name = {layer.name: layer for layer in layers}

    def allocated(point: Point) -> dict[str, Pattern]:
        wanted = profile_at(point).spread(layers, pattern.nominal_sparsity())
        return patterns(pattern, wanted, by_name)

    distances = _Distances(store, blocks, windows, settings, counter)
    known = _known(store)

    def distance(point: Point) -> float:
        key = ",".join(map(str, point))
        if key not in known:
            known[key] = distances.of(PerLayer(allocated(point), pattern, SEARCH))
            store.remember(_FILE, json.dumps(known).encode())
        return known[key]

    return allocated(search(layers, pattern.nominal_sparsity(), distance))


def _known(store: BlockStore) -> dict[str, float]:
    """The distances that an earlier part of the run has found, by point."""
    found: dict[str, float] = json.loads(store.recall(_FILE) or b"{}")
    return found


class _Distances:
    """The dense path of some windows through the whole model, and distances of pruned paths from it."""

    def __init__(
        self,
        store: BlockStore,
        blocks: Sequence[Block],
        windows: Int64[Tensor, "num length"],
        settings: PruneSettings,
        counter: PartCounter,
    ) -> None:
        self.store, self.blocks, self.windows, self.counter = store, blocks, windows, counter
        self.settings = replace(
            settings,
            method=SparseGPT(),
            strict=False,
            steps=[],
            drift=0.0,
            refresh=False,
            permute=False,
            rotate=False,
            row_weights=NONE,
        )
        states = self._entering()
        for block, following in zip_longest(blocks, blocks[1:]):
            with self._loaded(block, following):
                if following is None:
                    with store.world.together(), computing_in(block.module, states.compute_dtype):
                        form = output_form(states, block.module, block.index)
                advance(store.world, block, states, counter.count)
        self.dense = states.states
        modules = [block.module for block in blocks]
        self.ending = Ending(store.model, modules, form, states.window_dim)

    def of(self, pattern_of: PerLayer) -> float:
        """The mean over positions of KL(dense || pruned) in nats, the same on all processes."""
        settings, states = replace(self.settings, pattern_of=pattern_of), self._entering()
        for block, following in zip_longest(self.blocks, self.blocks[1:]):
            with self._loaded(block, following), _as_it_was(block):
                for _ in prune_layers(self.store.world, block, states, settings, self.counter):
                    pass
                advance(self.store.world, block, states, self.counter.count)
        total = torch.zeros(2, dtype=torch.float64)
        with self.store.world.together(), self.store.ending(self.blocks), self.ending.instead_of_blocks():
            for _, some in states.slices():
                for window, pruned, dense in zip(self.windows[some], states.states[some], self.dense[some]):
                    pair = [self.ending.logits(window[None], each[None])[0] for each in (pruned, dense)]
                    total += torch.tensor([_kl(*pair), len(window)], dtype=torch.float64)
                self.counter.count()
        self.store.world.sum_([total])
        return float(total[0] / total[1])

    def _entering(self) -> HiddenStates:
        with self.store.world.together():
            states, _ = self.store.hidden_states(self.blocks, self.windows, self.settings.batch_size)
        convert_calls(states, self.store.compute_dtype(states))
        return states

    @contextmanager
    def _loaded(self, block: Block, following: Block | None) -> Iterator[None]:
        with ExitStack() as scope:
            with self.store.world.together():
                scope.enter_context(self.store.loaded(block, following))
            yield


@contextmanager
def _as_it_was(block: Block) -> Iterator[None]:
    """Behind the scope, the block's layers have the weights that they had before."""
    parameters = {site.parameter_name: site.parameter for site in block.sites}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def _kl(pruned: Float[Tensor, "rows vocabulary"], dense: Float[Tensor, "rows vocabulary"]) -> float:
    """The sum over positions of KL(dense || pruned) in nats, in float32 and summed in float64."""
    total = 0.0
    for q, p in zip(pruned.split(SLICE), dense.split(SLICE)):
        log_q, log_p = q.float().log_softmax(-1), p.float().log_softmax(-1)
        share = log_p.exp()
        # What cannot come has a share of 0 and a logarithm of -inf, and adds nothing.
        terms = (log_p - log_q).mul_(share).masked_fill_(share == 0, 0.0)
        total += float(terms.sum(dtype=torch.float64))
    return total
