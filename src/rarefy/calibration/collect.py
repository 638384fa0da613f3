"""Hooks that feed the inputs of a block's linears and experts into Gram matrices, one per distinct input.

q, k and v read the same tensor, and so do gate and up: the first batch shows which linears share their
input, and from then on only the first of each group is watched. An expert has Grams of its own, from the
tokens that the router sends to it; for its down projection, from what the expert makes of them. Where too
few tokens come (``starved``), ``collect_all_tokens`` sends it every token of the block instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.stream import HiddenStates
from rarefy.errors import ModelError
from rarefy.layer.gram import Gram
from rarefy.models.experts import DOWN, Call, FusedExperts, ListedExperts
from rarefy.models.sites import Expert, Mixture, Site

#: Tokens of its own that an expert needs for each of its inputs, or else it is solved with all tokens. With
#: fewer its Gram is singular; in a trial (docs/architecture.md) own tokens were better from 0.5 to 3 on.
TOKENS_PER_INPUT = 1.0
# Experts' Grams that may be in memory together: this much, or as much as the experts' weights in float32.
_GRAM_BYTES = 2 * 2**30

Grams = dict[str, Gram]


class _Enough(Exception):
    """Ends a block's forward pass where the last watched input has been seen."""


def turns(sites: Sequence[Site], gram_bytes: int | None = None) -> list[list[Site]]:
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

    Those of an expert are of the tokens that were routed to it, which may be none. ``means`` also sums the
    inputs themselves. Raises ModelError for a linear that the block never calls, and for experts that do
    not compute as assumed.
    """
    fused = _fused(sites)
    with torch.no_grad():
        grams, leaders = _first_batch(stream, module, block, sites, means)
    if on_batch:
        on_batch()
    # What is called once in every pass. Which experts of a list are called is known when the pass is over.
    awaited = {id(mixture.module) for mixture in fused} | {id(site.module) for site in leaders if not site.expert}
    open_end = any(site.expert for site in leaders)
    missing: set[int] = set()

    def seen(called: nn.Module) -> None:
        missing.discard(id(called))
        if not missing and not open_end:
            raise _Enough  # the rest of the block, its last product included, feeds no Gram

    def feed(site: Site, X: Tensor) -> None:
        grams[site.name].update(X)
        seen(site.module)

    def feed_experts(mixture: FusedExperts, call: Call) -> None:
        _feed_routed(mixture, fused[mixture], call, grams)
        seen(mixture.module)

    with torch.no_grad(), _watching(leaders, feed), _watching_fused(fused, feed_experts):
        for batch, windows in list(stream.slices())[1:]:
            missing |= awaited
            with suppress(_Enough):
                stream.run(module, block, batch, windows)
            if on_batch:
                on_batch()
    return grams


def collect_all_tokens(
    stream: HiddenStates, module: nn.Module, block: int, sites: Sequence[Site], *, means: bool = False
) -> Grams:
    """The Grams of experts' weights as they would be if the router sent every token to these experts.

    From a list of experts, each token comes as often as it is routed. Raises ModelError where an expert of
    a list cannot be called with tokens alone.
    """
    grams: Grams = {}
    fused = _fused(sites)
    for experts in fused.values():
        # what they read is the same for all of them now
        _share_inputs([site for members in experts.values() for site in members], stream, means, grams)
    pools = [_Pool(mixture, sites) for mixture in _listed(sites)]
    missing: set[int] = set()

    def feed_experts(mixture: FusedExperts, call: Call) -> None:
        _feed_all(mixture, fused[mixture], call, grams)
        missing.discard(id(mixture.module))
        if not missing and not pools:
            raise _Enough

    with torch.no_grad(), _watching_fused(fused, feed_experts):
        for batch, windows in stream.slices():
            missing |= {id(mixture.module) for mixture in fused}
            with suppress(_Enough), _pooling(pools):
                stream.run(module, block, batch, windows)
            for pool in pools:
                pool.feed(grams, lambda site: _new_gram(site, stream, means))
    return grams


def _new_gram(site: Site, stream: HiddenStates, means: bool) -> Gram:
    return Gram(site.shape[1], device=stream.device, means=means)


# --- linears, among them those of listed experts


def _first_batch(
    stream: HiddenStates, module: nn.Module, block: int, sites: Sequence[Site], means: bool
) -> tuple[Grams, list[Site]]:
    """The Grams of the first batch, and one linear of each group that reads the same input, in calling order."""
    grams: Grams = {}
    fused = _fused(sites)
    for experts in fused.values():
        for members in experts.values():
            _share_inputs(members, stream, means, grams)
    inputs: list[tuple[Tensor, list[Site]]] = []  # holds the tensors, so that no address is used twice
    calls: dict[str, int] = {site.name: 0 for site in sites if site.expert is None}
    calls |= {mixture.name: 0 for mixture in fused}

    def note(site: Site, X: Tensor) -> None:
        group = next((group for known, group in inputs if _same(known, X)), None)
        if group is None:
            inputs.append((X, [site]))
        elif not any(other is site for other in group):
            group.append(site)
        else:
            return
        if site.name in calls:
            calls[site.name] += 1

    def feed_experts(mixture: FusedExperts, call: Call) -> None:
        _feed_routed(mixture, fused[mixture], call, grams)
        calls[mixture.name] += 1

    # Of a list all experts are watched: those that are called show who reads what in those that are not.
    linears = [site for site in sites if site.expert is None]
    linears += [site for mixture in _listed(sites) for site in mixture.sites]
    batch, windows = next(stream.slices())
    with _watching(linears, note), _watching_fused(fused, feed_experts, FusedExperts.check):
        stream.run(module, block, batch, windows)
    for name, times in calls.items():
        if times != 1:
            raise ModelError.sentence(
                f"{name} is called with {times} different inputs in one pass of its block, but Rarefy "
                "needs one; leave it out with --exclude."
            )
    leaders = []
    for group, tensors in _groups(inputs, sites):
        gram = _new_gram(group[0], stream, means)
        for X in tensors:
            gram.update(X)
        grams.update({site.name: gram for site in group})
        leaders.append(group[0])
    return grams, leaders


def _groups(
    inputs: list[tuple[Tensor, list[Site]]], sites: Sequence[Site]
) -> Iterator[tuple[list[Site], list[Tensor]]]:
    """The linears of ``sites`` that read the same input, together, each group with what it has read."""
    wanted = {site.name for site in sites}
    leading: dict[tuple[Mixture, str], str] = {}  # for a part of a listed expert, the first that reads the same
    reads: dict[str, list[Tensor]] = {}
    for X, readers in inputs:
        if plain := [site for site in readers if site.expert is None]:
            yield plain, [X]
        first: dict[tuple[Mixture, int], str] = {}
        for site, place in _placed(readers):
            if X.numel():  # an expert that is called with no tokens shows nothing
                leading.setdefault(
                    (place.mixture, place.part), first.setdefault((place.mixture, place.index), place.part)
                )
            reads.setdefault(site.name, []).append(X)
    groups: dict[tuple[Mixture, int, str], list[Site]] = {}
    for mixture in _listed(sites):
        for site, place in _placed(mixture.sites):
            if site.name in wanted:
                part = leading.get((mixture, place.part), place.part)
                groups.setdefault((mixture, place.index, part), []).append(site)
    for group in groups.values():
        yield group, reads.get(group[0].name, [])


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same part of memory; empty ones never are."""
    return (
        tensor.numel() > 0
        and tensor.data_ptr() == other.data_ptr()
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
    )


@contextmanager
def _watching(sites: Iterable[Site], see: Callable[[Site, Tensor], None]) -> Iterator[None]:
    with ExitStack() as hooks:
        for site in sites:

            def hook(_: nn.Module, args: tuple[Tensor, ...], site: Site = site) -> None:
                see(site, args[0])

            hooks.callback(site.module.register_forward_pre_hook(hook).remove)
        yield


# --- experts


def _placed(sites: Iterable[Site]) -> Iterator[tuple[Site, Expert]]:
    for site in sites:
        if site.expert is not None:
            yield site, site.expert


def _fused(sites: Iterable[Site]) -> dict[FusedExperts, dict[int, list[Site]]]:
    """The fused mixtures with sites among ``sites``, and these by the index of their expert."""
    found: dict[FusedExperts, dict[int, list[Site]]] = {}
    for site, place in _placed(sites):
        if isinstance(place.mixture, FusedExperts):
            found.setdefault(place.mixture, {}).setdefault(place.index, []).append(site)
    return found


def _listed(sites: Iterable[Site]) -> list[ListedExperts]:
    """The lists of experts with sites among ``sites``."""
    found = {place.mixture: None for _, place in _placed(sites)}
    return [mixture for mixture in found if isinstance(mixture, ListedExperts)]


def _share_inputs(sites: Sequence[Site], stream: HiddenStates, means: bool, grams: Grams) -> None:
    """Give each down projection an empty Gram of its own, and all other sites one together."""
    shared: Gram | None = None
    for site, place in _placed(sites):
        if place.part == DOWN:
            grams[site.name] = _new_gram(site, stream, means)
        else:
            shared = grams[site.name] = shared or _new_gram(site, stream, means)


def _feed_routed(mixture: FusedExperts, experts: dict[int, list[Site]], call: Call, grams: Grams) -> None:
    """Update the Grams with the tokens that reach their experts in one call of the mixture."""
    for index, X in mixture.inputs(call, experts):
        _feed_expert(mixture, index, experts[index], X, grams, set())


def _feed_all(mixture: FusedExperts, experts: dict[int, list[Site]], call: Call, grams: Grams) -> None:
    """Update the Grams with all tokens of one call of the mixture."""
    X = mixture.tokens(call)
    done: set[int] = set()
    for index, sites in experts.items():
        _feed_expert(mixture, index, sites, X, grams, done)


def _feed_expert(
    mixture: FusedExperts, index: int, sites: Sequence[Site], X: Tensor, grams: Grams, done: set[int]
) -> None:
    for site, place in _placed(sites):
        gram = grams[site.name]
        if id(gram) not in done:
            gram.update(mixture.intermediate(index, X) if place.part == DOWN else X)
            done.add(id(gram))


@contextmanager
def _watching_fused(
    mixtures: Iterable[FusedExperts],
    see: Callable[[FusedExperts, Call], None],
    after: Callable[[FusedExperts, Call, Any], None] | None = None,
) -> Iterator[None]:
    """Show ``see`` every call of the mixtures before, and ``after`` its output as well.

    Hooks are on the module, so it is all the same which of its implementations transformers runs.
    """
    with ExitStack() as hooks:
        for mixture in mixtures:

            def before(_: nn.Module, args: Any, kwargs: Any, mixture: FusedExperts = mixture) -> None:
                see(mixture, mixture.call(args, kwargs))

            hooks.callback(mixture.module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if after is not None:

                def behind(
                    _: nn.Module, args: Any, kwargs: Any, output: Any, mixture: FusedExperts = mixture
                ) -> None:
                    after(mixture, mixture.call(args, kwargs), output)

                hooks.callback(mixture.module.register_forward_hook(behind, with_kwargs=True).remove)
        yield


class _Pool:
    """All tokens that reach any expert of a list in one batch, to be sent to those that get too few."""

    def __init__(self, mixture: ListedExperts, sites: Sequence[Site]) -> None:
        self.mixture = mixture
        self._tokens: list[Tensor] = []
        self._experts: dict[int, list[Site]] = {}
        for site, place in _placed(sites):
            if place.mixture is mixture:
                self._experts.setdefault(place.index, []).append(site)

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook: keep what one expert is called with."""
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise ModelError.sentence(
                f"{self.mixture.name} has experts with too few tokens, and they cannot be called with others, "
                f"because they take more than tokens; leave them out with --exclude '{self.mixture.name}.*'."
            )
        self._tokens.append(args[0].reshape(-1, args[0].shape[-1]))

    def feed(self, grams: Grams, new: Callable[[Site], Gram]) -> None:
        """Send the tokens to the experts in need, and what their linears read to the Grams."""
        X = torch.cat(self._tokens)
        self._tokens.clear()
        for index, sites in self._experts.items():
            seen: list[tuple[Tensor, Gram]] = []

            def see(site: Site, read: Tensor, seen: list[tuple[Tensor, Gram]] = seen) -> None:
                gram = next((gram for known, gram in seen if _same(known, read)), None)
                if gram is None:
                    gram = grams.get(site.name) or new(site)
                    gram.update(read)
                    seen.append((read, gram))
                grams[site.name] = gram

            with _watching(sites, see):
                self.mixture.modules[index](X)


@contextmanager
def _pooling(pools: Iterable[_Pool]) -> Iterator[None]:
    with ExitStack() as hooks:
        for pool in pools:
            for module in pool.mixture.modules:
                hooks.callback(module.register_forward_pre_hook(pool.add, with_kwargs=True).remove)
        yield
