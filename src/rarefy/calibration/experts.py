"""Hooks on mixtures of experts: the tokens that reach each expert, or all tokens for those that get too few."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.linears import placed, same_memory, watching
from rarefy.errors import ModelError
from rarefy.layer.gram import Gram
from rarefy.models.experts import DOWN, Call, FusedExperts, ListedExperts
from rarefy.models.sites import Site

Grams = dict[str, Gram]
NewGram = Callable[[Site], Gram]
ByExpert = dict[int, list[Site]]


def fused_among(sites: Iterable[Site]) -> dict[FusedExperts, ByExpert]:
    """The fused mixtures with sites among ``sites``, and these by the index of their expert."""
    found: dict[FusedExperts, ByExpert] = {}
    for site, place in placed(sites):
        if isinstance(place.mixture, FusedExperts):
            found.setdefault(place.mixture, {}).setdefault(place.index, []).append(site)
    return found


def listed_among(sites: Iterable[Site]) -> list[ListedExperts]:
    """The lists of experts with sites among ``sites``."""
    found = {place.mixture: None for _, place in placed(sites)}
    return [mixture for mixture in found if isinstance(mixture, ListedExperts)]


def share_inputs(sites: Sequence[Site], grams: Grams, new_gram: NewGram) -> None:
    """Give each down projection an empty Gram of its own, and all other sites one together."""
    shared: Gram | None = None
    for site, place in placed(sites):
        if place.part == DOWN:
            grams[site.name] = new_gram(site)
        else:
            shared = grams[site.name] = shared or new_gram(site)


def feed_routed(mixture: FusedExperts, experts: ByExpert, call: Call, grams: Grams) -> None:
    """Update the Grams with the tokens that reach their experts in one call of the mixture."""
    for index, X in mixture.inputs(call, experts):
        _feed_expert(mixture, index, experts[index], X, grams, set())


def feed_all(mixture: FusedExperts, experts: ByExpert, call: Call, grams: Grams) -> None:
    """Update the Grams with all tokens of one call of the mixture."""
    X = mixture.tokens(call)
    done: set[int] = set()
    for index, sites in experts.items():
        _feed_expert(mixture, index, sites, X, grams, done)


def _feed_expert(
    mixture: FusedExperts, index: int, sites: Sequence[Site], X: Tensor, grams: Grams, done: set[int]
) -> None:
    for site, place in placed(sites):
        gram = grams[site.name]
        if id(gram) not in done:
            gram.update(mixture.intermediate(index, X) if place.part == DOWN else X)
            done.add(id(gram))


@contextmanager
def watching_fused(
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


class TokenPool:
    """All tokens that reach any expert of a list in one batch, to be sent to those that get too few."""

    def __init__(self, mixture: ListedExperts, sites: Sequence[Site]) -> None:
        self.mixture = mixture
        self._tokens: list[Tensor] = []
        self._experts: ByExpert = {}
        for site, place in placed(sites):
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

    def feed(self, grams: Grams, new_gram: NewGram) -> None:
        """Send the tokens to the experts in need, and what their linears read to the Grams."""
        X = torch.cat(self._tokens)
        self._tokens.clear()
        for index, sites in self._experts.items():
            seen: list[tuple[Tensor, Gram]] = []

            def see(site: Site, read: Tensor, seen: list[tuple[Tensor, Gram]] = seen) -> None:
                gram = next((gram for known, gram in seen if same_memory(known, read)), None)
                if gram is None:
                    gram = grams.get(site.name) or new_gram(site)
                    gram.update(read)
                    seen.append((read, gram))
                grams[site.name] = gram

            with watching(sites, see):
                self.mixture.modules[index](X)


@contextmanager
def pooling(pools: Iterable[TokenPool]) -> Iterator[None]:
    """Within the scope, the pools keep what their experts are called with."""
    with ExitStack() as hooks:
        for pool in pools:
            for module in pool.mixture.modules:
                hooks.callback(module.register_forward_pre_hook(pool.add, with_kwargs=True).remove)
        yield
