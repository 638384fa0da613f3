"""Hooks that feed the inputs of a block's linears and experts into Gram matrices, one per distinct input.

The first batch shows which linears read the same (linears.py). An expert has Grams of its own, from the tokens
that the router sends to it; for its down projection, from what the expert makes of them (experts.py). Where too
few tokens come (``starved``), ``collect_all_tokens`` sends it every token of the block instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from rarefy.calibration.experts import (
    Grams,
    TokenPool,
    feed_all,
    feed_routed,
    fused_among,
    listed_among,
    pooling,
    share_inputs,
    watching_fused,
)
from rarefy.calibration.linears import Group, Reads, watching
from rarefy.calibration.stream import HiddenStates
from rarefy.errors import ModelError
from rarefy.layer.gram import Gram
from rarefy.layer.passes import finite
from rarefy.models.experts import Call, FusedExperts
from rarefy.models.sites import Site

#: Tokens of its own that an expert needs for each of its inputs, or else it is solved with all tokens. With
#: fewer its Gram is singular; in a trial (docs/architecture.md) own tokens were better from 0.5 to 3 on.
TOKENS_PER_INPUT = 1.0
# Experts' Grams that may be in memory together: this much, or as much as the experts' weights in float32.
_GRAM_BYTES = 2 * 2**30


class _Enough(Exception):
    """Ends a block's forward pass where the last watched input has been seen."""


def gram_groups(sites: Sequence[Site], gram_bytes: int | None = None) -> list[list[Site]]:
    """The sites of a block in groups, to be collected and solved one group after the other.

    All at once where the Grams of the experts fit in ``gram_bytes``, as they do for all models with few
    experts. Else as many experts at a time as fit, and then the linears outside of experts: experts read
    nothing of each other, so no Gram but that of a linear behind the experts sees what was pruned before.
    """
    experts: dict[tuple[int, int], list[Site]] = {}
    for site in sites:
        if site.expert is not None:
            experts.setdefault((id(site.expert.mixture), site.expert.index), []).append(site)
    needed = {key: 4 * sum(width**2 for width in {site.shape[1] for site in experts[key]}) for key in experts}
    if gram_bytes is None:
        gram_bytes = max(_GRAM_BYTES, 4 * sum(site.shape[0] * site.shape[1] for site in sites if site.expert))
    if sum(needed.values()) <= gram_bytes:
        return [list(sites)] if sites else []
    groups: list[list[Site]] = []
    room = 0
    for key, members in experts.items():
        if not groups or needed[key] > room:
            groups.append([])
            room = gram_bytes
        groups[-1] += members
        room -= needed[key]
    rest = [site for site in sites if site.expert is None]
    return [*groups, rest] if rest else groups


def starved(sites: Iterable[Site], grams: Grams, tokens_per_input: float = TOKENS_PER_INPUT) -> list[Site]:
    """The experts' weights among ``sites`` whose Gram in ``grams`` is of fewer tokens than they need."""
    return [site for site in sites if site.expert and grams[site.name].num_tokens < tokens_per_input * site.shape[1]]


def collect(
    stream: HiddenStates,
    module: nn.Module,
    block: int,
    sites: Sequence[Site],
    *,
    means: bool = False,
    on_batch: Callable[[], None] | None = None,
) -> Grams:
    """The Gram of every site of one block, by name; sites with the same input share one object.

    Those of an expert are of the tokens that were routed to it, which may be none. A linear that the block calls
    several times has one Gram of all that it reads. ``means`` also sums the inputs themselves. Raises ModelError
    for a linear that the block never calls, and for experts that do not compute as assumed; NumericalError where
    inputs leave the range of float16.
    """
    fused = fused_among(sites)
    with torch.no_grad():
        grams, groups = _first_batch(stream, module, block, sites, means)
    if on_batch:
        on_batch()
    leaders = [group.sites[0] for group in groups]
    # What is called once in every pass. Which experts of a list are called is known when the pass is over.
    awaited = {id(mixture.module) for mixture in fused} | {id(site.module) for site in leaders}
    open_end = any(group.sites[0].expert or len(group.inputs) > 1 for group in groups)
    missing: set[int] = set()

    def seen(called: nn.Module) -> None:
        missing.discard(id(called))
        if not missing and not open_end:
            raise _Enough  # the rest of the block, its last product included, feeds no Gram

    def feed(site: Site, X: Tensor) -> None:
        grams[site.name].update(X)
        seen(site.module)

    def feed_experts(mixture: FusedExperts, call: Call) -> None:
        feed_routed(mixture, fused[mixture], call, grams)
        seen(mixture.module)

    with torch.no_grad(), watching(leaders, feed), watching_fused(fused, feed_experts):
        for batch, windows in list(stream.slices())[1:]:
            missing |= awaited
            with suppress(_Enough):
                stream.run(module, block, batch, windows)
            if on_batch:
                on_batch()
    _check_range(stream, module, grams)
    return grams


def collect_all_tokens(
    stream: HiddenStates, module: nn.Module, block: int, sites: Sequence[Site], *, means: bool = False
) -> Grams:
    """The Grams of experts' weights as they would be if the router sent every token to these experts.

    From a list of experts, each token comes as often as it is routed. Raises ModelError where an expert of
    a list cannot be called with tokens alone.
    """
    grams: Grams = {}
    new_gram = partial(_new_gram, stream, means)
    fused = fused_among(sites)
    for experts in fused.values():
        # what they read is the same for all of them now
        share_inputs([site for members in experts.values() for site in members], grams, new_gram)
    pools = [TokenPool(mixture, sites) for mixture in listed_among(sites)]
    missing: set[int] = set()

    def feed_experts(mixture: FusedExperts, call: Call) -> None:
        feed_all(mixture, fused[mixture], call, grams)
        missing.discard(id(mixture.module))
        if not missing and not pools:
            raise _Enough

    with torch.no_grad(), watching_fused(fused, feed_experts):
        for batch, windows in stream.slices():
            missing |= {id(mixture.module) for mixture in fused}
            with suppress(_Enough), pooling(pools):
                stream.run(module, block, batch, windows)
            for pool in pools:
                pool.feed(grams, new_gram)
    return grams


def _first_batch(
    stream: HiddenStates, module: nn.Module, block: int, sites: Sequence[Site], means: bool
) -> tuple[Grams, list[Group]]:
    """The Grams of the first batch, and the linears that read the same together, in calling order."""
    grams: Grams = {}
    fused = fused_among(sites)
    for experts in fused.values():
        for members in experts.values():
            share_inputs(members, grams, partial(_new_gram, stream, means))
    reads = Reads()
    calls = {mixture.name: 0 for mixture in fused}

    def feed_experts(mixture: FusedExperts, call: Call) -> None:
        feed_routed(mixture, fused[mixture], call, grams)
        calls[mixture.name] += 1

    # Of a list all experts are watched: those that are called show who reads what in those that are not.
    listed = [site for mixture in listed_among(sites) for site in mixture.sites]
    linears = [site for site in sites if site.expert is None]
    batch, windows = next(stream.slices())
    with watching([*linears, *listed], reads.note), watching_fused(fused, feed_experts, FusedExperts.check):
        stream.run(module, block, batch, windows)
    for site in linears:
        if site.name not in reads.calls:
            raise ModelError.sentence(
                f"{site.name} is not called in a pass of its block, so that Rarefy does not see what it reads; "
                "leave it out with --exclude."
            )
    for name, times in calls.items():
        if times != 1:
            raise ModelError.sentence(
                f"{name} is called {times} times in one pass of its block, but Rarefy needs one call; "
                f"leave it out with --exclude '{name}.*'."
            )
    groups = [*reads.groups(), *reads.groups_of_listed(listed, {site.name for site in sites})]
    for group in groups:
        gram = _new_gram(stream, means, group.sites[0])
        for X in group.inputs:
            gram.update(X)
        grams.update({site.name: gram for site in group.sites})
    return grams, groups


def _new_gram(stream: HiddenStates, means: bool, site: Site) -> Gram:
    return Gram(site.shape[1], device=stream.device, means=means)


def _check_range(stream: HiddenStates, module: nn.Module, grams: Grams) -> None:
    """Raise NumericalError where what a layer reads has left the range of float16."""
    if stream.states.dtype == torch.float16:
        for name, gram in grams.items():
            if not finite(gram.H):
                stream.refuse_range(module, f"What {name} reads leaves")
