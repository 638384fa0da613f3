"""All-reduces Grams over processes, each of which has seen the tokens of its own windows."""

from __future__ import annotations

from rarefy.layer.gram import Gram
from rarefy.parallel.world import World


def all_reduce_grams(world: World, grams: dict[str, Gram]) -> dict[str, Gram]:
    """The Grams of all windows, by name of the site, from those of this process's.

    Which sites share a Gram is seen on the first batch, which is another one on each process; so it may
    differ where an expert was not called. What shares it on rank 0 shares it everywhere.
    """
    if world.size == 1:
        return grams
    groups: dict[int, list[str]] = {}
    for name, gram in grams.items():
        groups.setdefault(id(gram), []).append(name)
    everyone = world.gather(([*groups.values()], {name: gram.num_tokens for name, gram in grams.items()}))
    parts: dict[str, Gram] = {}
    for names in everyone[0][0]:
        gram = grams[names[0]]
        shared = any(other is gram for other in parts.values())  # shared here, but not on rank 0
        parts[names[0]] = _copy(gram) if shared else gram
    found: dict[str, Gram] = {}
    for names in everyone[0][0]:
        gram = parts[names[0]]
        world.sum_(gram.sums_())
        gram.num_tokens = sum(tokens[names[0]] for _, tokens in everyone)
        found |= dict.fromkeys(names, gram)
    return found


def _copy(gram: Gram) -> Gram:
    copy = Gram(gram.size, device=gram.H.device, dtype=gram.H.dtype, means=gram.has_means)
    copy.merge(gram)
    return copy
