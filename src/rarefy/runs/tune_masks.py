"""The proof of a tuning: every mask equals that of the model it began with, bit for bit, in memory or in files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from rarefy.errors import ModelError, NumericalError, VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rarefy.models.source import ModelSource


#: Where each weight of the blocks is not zero, by the names of sites, in their order.
Masks = Iterable[tuple[str, Bool[Tensor, "out in"]]]


def masks_of(model: PreTrainedModel) -> Iterator[tuple[str, Bool[Tensor, "out in"]]]:
    """Where each weight of the blocks of a model in memory is not zero, by the names of sites."""
    from rarefy.models.blocks import find_blocks

    for block in find_blocks(model):
        for site in block.sites:
            yield site.name, site.read() != 0


def stored_masks(source: ModelSource) -> Iterator[tuple[str, Bool[Tensor, "out in"]]]:
    """Where each weight of the blocks is not zero in the files, by the names of sites, a block at a time."""
    from rarefy.models.blocks import find_blocks
    from rarefy.models.checkpoint import load_model
    from rarefy.models.streaming import StreamedModel

    try:
        streamed = StreamedModel(source)
    except ModelError:  # it cannot be had in parts
        model, _ = load_model(source, "cpu")
        yield from masks_of(model)
        return
    try:
        for block in find_blocks(streamed.model):
            with streamed.loaded(block.name):
                for site in block.sites:
                    yield site.name, site.read() != 0
    finally:
        streamed.close()


def verify_masks(before: ModelSource, after: ModelSource) -> int:
    """Compare all masks in files, as ``compare_masks`` does."""
    return compare_masks(stored_masks(before), stored_masks(after))


def compare_masks(before: Masks, after: Masks) -> int:
    """Compare all masks; returns how many weights are zero in both. Raises VerificationError where two differ."""
    zeros = 0
    for (name, old), (same, new) in zip(before, after, strict=True):
        if name != same or old.shape != new.shape:
            raise VerificationError(f"{name} is not what {same} is in the model that was tuned.")
        if filled := int((new & ~old).sum()):
            raise VerificationError(f"{name} has {filled:,} weights that were zero and are not any more.")
        if lost := int((old & ~new).sum()):
            raise VerificationError(f"{name} has {lost:,} weights that are zero and were not before.")
        zeros += int((~new).sum())
    return zeros


@torch.no_grad()
def round_as_stored_(model: PreTrainedModel, before: Masks, dtypes: dict[str, torch.dtype]) -> int:
    """Round all parameters to what their ``dtypes``, by name, can hold, and lose no weight that is kept.

    Weights that would be stored as 0 get the smallest number there is, so that the mask can be read from what is
    stored; returns how many they are. Raises NumericalError where a value is beyond what its dtype can hold.
    """
    raised = keep_from_zero_(model, before, dtypes)
    for name, parameter in model.named_parameters():
        rounded = parameter.to(dtypes[name])
        if not bool(torch.isfinite(rounded).all()):
            raise NumericalError(f"{name} has values beyond what {dtypes[name]} can hold.")
        parameter.copy_(rounded)
    return raised


@torch.no_grad()
def keep_from_zero_(model: PreTrainedModel, before: Masks, dtypes: dict[str, torch.dtype]) -> int:
    """Give weights that are kept, and that would be stored as 0, the smallest number there is; how many they are.

    ``dtypes`` are those in which parameters are stored, by name.
    """
    from rarefy.models.blocks import find_blocks

    sites = {site.name: site for block in find_blocks(model) for site in block.sites}
    raised = 0
    for name, mask in before:
        site = sites[name]
        dtype = dtypes[site.parameter_name]
        weight = site.read()
        lost = mask.to(weight.device) & (weight.to(dtype) == 0)
        if bool(lost.any()):
            limits = torch.finfo(dtype)
            least = limits.smallest_normal * (limits.eps if dtype == torch.float16 else 1.0)
            raised += int(lost.sum())
            site.write(torch.where(lost, torch.where(weight < 0, -least, least), weight))
    return raised
