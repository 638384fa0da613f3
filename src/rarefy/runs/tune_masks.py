"""The proof of a tuning: every mask in the written files equals that in the files it began with, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from rarefy.errors import ModelError, VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rarefy.models.source import ModelSource


def stored_masks(source: ModelSource) -> Iterator[tuple[str, Bool[Tensor, "out in"]]]:
    """Where each weight of the blocks is not zero in the files, by the names of sites, a block at a time."""
    from rarefy.models.blocks import find_blocks
    from rarefy.models.checkpoint import load_model
    from rarefy.models.streaming import StreamedModel

    try:
        streamed = StreamedModel(source)
    except ModelError:  # it cannot be had in parts
        model, _ = load_model(source, "cpu")
        for block in find_blocks(model):
            for site in block.sites:
                yield site.name, site.read() != 0
        return
    try:
        for block in find_blocks(streamed.model):
            with streamed.loaded(block.name):
                for site in block.sites:
                    yield site.name, site.read() != 0
    finally:
        streamed.close()


def verify_masks(before: ModelSource, after: ModelSource) -> int:
    """Compare all masks; returns how many weights are zero in both. Raises VerificationError where two differ."""
    zeros = 0
    for (name, old), (same, new) in zip(stored_masks(before), stored_masks(after), strict=True):
        if name != same or old.shape != new.shape:
            raise VerificationError(f"{name} is not what {same} is in the model that was tuned.")
        if filled := int((new & ~old).sum()):
            raise VerificationError(f"{name} has {filled:,} weights that were zero and are not any more.")
        if lost := int((old & ~new).sum()):
            raise VerificationError(f"{name} has {lost:,} weights that are zero and were not before.")
        zeros += int((~new).sum())
    return zeros


@torch.no_grad()
def keep_from_zero_(model: PreTrainedModel, before: ModelSource, dtypes: dict[str, torch.dtype]) -> int:
    """Give weights that are kept, and that would be stored as 0, the smallest number there is; how many they are.

    ``dtypes`` are those in which parameters are stored, by name. So the mask can be read from the files.
    """
    from rarefy.models.blocks import find_blocks

    sites = {site.name: site for block in find_blocks(model) for site in block.sites}
    raised = 0
    for name, mask in stored_masks(before):
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
