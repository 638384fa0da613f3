"""Hooks that feed the inputs of a block's linears into Gram matrices, one per distinct input.

q, k and v read the same tensor, and so do gate and up: the first batch shows which linears share
their input, and from then on only the first of each group is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor, nn

from rarefy.calibration.stream import HiddenStates
from rarefy.errors import ModelError
from rarefy.layer.gram import Gram


class Watched(Protocol):
    """What is needed of a linear: its name, its shape, and the module whose input is the X of its Gram."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def shape(self) -> tuple[int, int]: ...


class _Enough(Exception):
    """Ends a block's forward pass where the last watched input has been seen."""


def collect(
    stream: HiddenStates,
    module: nn.Module,
    block: int,
    sites: Sequence[Watched],
    *,
    means: bool = False,
    on_batch: Callable[[], None] | None = None,
) -> dict[str, Gram]:
    """The Gram of every site of one block, by name; sites with the same input share one object.

    ``means`` also sums the inputs themselves. Raises ModelError for a linear that the block never calls.
    """
    grams: dict[str, Gram] = {}
    with torch.no_grad():
        leaders = []
        for X, group in _groups(stream, module, block, sites):
            gram = Gram(group[0].shape[1], device=stream.device, means=means)
            gram.update(X)  # the first batch
            grams.update({site.name: gram for site in group})
            leaders.append(group[0])
        if on_batch:
            on_batch()
        last = leaders[-1].name

        def feed(site: Watched, X: Tensor) -> None:
            grams[site.name].update(X)
            if site.name == last:
                raise _Enough  # the rest of the block, its last product included, feeds no Gram

        with _watching(leaders, feed):
            for batch, windows in list(stream.slices())[1:]:
                with suppress(_Enough):
                    stream.run(module, block, batch, windows)
                if on_batch:
                    on_batch()
    return grams


def _groups(
    stream: HiddenStates, module: nn.Module, block: int, sites: Sequence[Watched]
) -> list[tuple[Tensor, list[Watched]]]:
    """The inputs of the first batch in the order of the calls, each with the sites that read this tensor."""
    inputs: list[tuple[Tensor, list[Watched]]] = []  # holds the tensors, so that no address is used twice

    def note(site: Watched, X: Tensor) -> None:
        for known, group in inputs:
            if known.data_ptr() == X.data_ptr() and known.shape == X.shape and known.stride() == X.stride():
                if not any(other is site for other in group):
                    group.append(site)
                return
        inputs.append((X, [site]))

    batch, windows = next(stream.slices())
    with _watching(sites, note):
        stream.run(module, block, batch, windows)
    called = [site.name for _, group in inputs for site in group]
    for site in sites:
        if called.count(site.name) != 1:
            times = called.count(site.name)
            raise ModelError.sentence(
                f"{site.name} is called with {times} different inputs in one pass of its block, but Rarefy "
                "needs one; leave it out with --exclude."
            )
    return inputs


@contextmanager
def _watching(sites: Sequence[Watched], see: Callable[[Watched, Tensor], None]) -> Iterator[None]:
    handles = []
    try:
        for site in sites:

            def hook(_: nn.Module, args: tuple[Tensor, ...], site: Watched = site) -> None:
                see(site, args[0])

            handles.append(site.module.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
