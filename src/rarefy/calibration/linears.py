"""Hooks on linears, which show what each reads and which of them share an input.

q, k and v read the same tensor, and so do gate and up: one batch shows which linears share their input, and from
then on only the first of each group is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from rarefy.models.sites import Expert, Mixture, Site


@dataclass
class Group:
    """Linears that read the same, and what they have read, call by call."""

    sites: list[Site]
    inputs: list[Tensor]


@dataclass
class Reads:
    """The inputs of linears in one batch. The tensors are held, so that no address is used twice."""

    inputs: list[Tensor] = field(default_factory=list)
    calls: dict[str, list[int]] = field(default_factory=dict)  # of a site by name, the inputs by number
    sites: dict[str, Site] = field(default_factory=dict)  # in the order of their first calls

    def note(self, site: Site, X: Tensor) -> None:
        """``site`` reads X."""
        number = next((number for number, known in enumerate(self.inputs) if same_memory(known, X)), None)
        if number is None:
            number = len(self.inputs)
            self.inputs.append(X)
        self.sites.setdefault(site.name, site)
        self.calls.setdefault(site.name, []).append(number)

    def readers(self, number: int) -> Iterator[Site]:
        """The linears that read one input."""
        for name, site in self.sites.items():
            if number in self.calls[name]:
                yield site

    def groups(self) -> list[Group]:
        """The linears outside of experts: together where they read the same in the same calls."""
        groups: dict[tuple[int, ...], Group] = {}
        for name, site in self.sites.items():
            if site.expert is None:
                numbers = tuple(self.calls[name])
                group = groups.setdefault(numbers, Group([], [self.inputs[number] for number in numbers]))
                group.sites.append(site)
        return list(groups.values())

    def groups_of_listed(self, experts: Sequence[Site], wanted: set[str]) -> list[Group]:
        """The ``wanted`` linears of listed experts: together where they read the same.

        All experts of a list are alike: what is seen of those that are called holds for the others.
        """
        leading: dict[tuple[Mixture, str], str] = {}  # for a part of an expert, the first that reads the same
        for number, X in enumerate(self.inputs):
            first: dict[tuple[Mixture, int], str] = {}
            for _, place in placed(self.readers(number)):
                if X.numel():  # an expert that is called with no tokens shows nothing
                    of_expert = first.setdefault((place.mixture, place.index), place.part)
                    leading.setdefault((place.mixture, place.part), of_expert)
        groups: dict[tuple[Mixture, int, str], Group] = {}
        for site, place in placed(experts):
            if site.name in wanted:
                part = leading.get((place.mixture, place.part), place.part)
                numbers = self.calls.get(site.name, [])
                group = groups.setdefault(
                    (place.mixture, place.index, part), Group([], [self.inputs[number] for number in numbers])
                )
                group.sites.append(site)
        return list(groups.values())


def placed(sites: Iterable[Site]) -> Iterator[tuple[Site, Expert]]:
    """The weights of experts among ``sites``, each with its place."""
    for site in sites:
        if site.expert is not None:
            yield site, site.expert


def same_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same part of memory; empty ones never are."""
    return (
        tensor.numel() > 0
        and tensor.data_ptr() == other.data_ptr()
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
    )


@contextmanager
def watching(sites: Iterable[Site], see: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Within the scope, ``see`` hears of everything that these linears read, just before they do."""
    with ExitStack() as hooks:
        for site in sites:

            def hook(_: nn.Module, args: tuple[Tensor, ...], site: Site = site) -> None:
                see(site, args[0])

            hooks.callback(site.module.register_forward_pre_hook(hook).remove)
        yield
