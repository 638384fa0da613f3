"""Step 1 of a block: the Grams of its sites, from the hidden states of all windows on all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rarefy.calibration.collect import collect, collect_all_tokens, starved
from rarefy.calibration.experts import Grams
from rarefy.calibration.linears import Reads, watching
from rarefy.calibration.stream import HiddenStates
from rarefy.models.blocks import Block
from rarefy.models.sites import Site
from rarefy.parallel.reduce import all_reduce_grams
from rarefy.parallel.world import World
from rarefy.pruning.precision import computing_in

STARVED = "starved"  # what a record's details call a weight of an expert that saw too few tokens

Notes = dict[str, dict[str, float | str]]


def collect_grams(
    world: World,
    block: Block,
    sites: Sequence[Site],
    entering: HiddenStates,
    *,
    means: bool,
    on_batch: Callable[[], None] | None,
) -> tuple[Grams, Notes]:
    """The Gram of each site, by name, summed over all windows; and what its record should say of its tokens.

    An expert that the router sent fewer tokens to than it has inputs gets the Gram of all tokens of the block.
    """
    with world.together(), computing_in(block.module, entering.compute_dtype):
        grams = collect(entering, block.module, block.index, sites, means=means, on_batch=on_batch)
    grams = all_reduce_grams(world, grams)
    notes: Notes = {
        site.name: {"routed_tokens": grams[site.name].num_tokens} if site.expert else {} for site in sites
    }
    if short := starved(sites, grams):
        with world.together(), computing_in(block.module, entering.compute_dtype):
            all_tokens = collect_all_tokens(entering, block.module, block.index, short, means=means)
        grams |= all_reduce_grams(world, all_tokens)
        for site in short:
            notes[site.name][STARVED] = f"solved with {grams[site.name].num_tokens} tokens, all of the block's"
    return grams, notes


def reading_order(world: World, block: Block, sites: Sequence[Site], entering: HiddenStates) -> list[list[Site]]:
    """The sites in groups that read the same, in the order in which the block calls them; experts come last.

    One batch on the first process shows it.
    """
    if all(site.expert is not None for site in sites):
        return [list(sites)]

    def names() -> list[list[str]]:
        reads, linears = Reads(), [site for site in sites if site.expert is None]
        batch, windows = next(entering.slices())
        with torch.no_grad(), computing_in(block.module, entering.compute_dtype), watching(linears, reads.note):
            entering.run(block.module, block.index, batch, windows)
        return [[site.name for site in group.sites] for group in reads.groups()]

    groups, by_name = world.from_first(names), {site.name: site for site in sites}
    ordered = [[by_name.pop(name) for name in group] for group in groups]
    return [*ordered, list(by_name.values())] if by_name else ordered
