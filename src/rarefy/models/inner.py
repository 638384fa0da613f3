"""Inner dimensions of a block: what lies between two linears, and may be reordered without changing the block.

MLP neurons lie between the linears that make them and the one that reads them, its exit (``down_proj``). The
dimensions inside an attention head lie between the value projection and the output projection. Neither has an order
outside of the block, so rows of the one side and columns of the other may change places together; those of a head
may even be rotated, as attention only averages them over tokens.

Found by structure: linears of one module whose shapes fit, in every layout that fused matrices are known to have. A
shape says what is possible, not what is so: whoever uses an ``Inner`` has to try whether the block computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rarefy.models.blocks import Block
from rarefy.models.sites import LinearSite

Kind = Literal["neurons", "heads"]
WORDS: dict[Kind, str] = {"neurons": "MLP neurons", "heads": "dimensions inside attention heads"}


@dataclass(frozen=True, eq=False)
class Inner:
    """Inner dimensions in ``groups`` of one width each: all neurons, or those of each KV head.

    Dimension i of group g is row ``rows[g, i]`` of each of the ``sources``, given as pairs of linear and rows, and
    column ``columns[g, c, i]`` of the ``exit``, once for each of the query heads that read a KV head.
    """

    kind: Kind
    exit: LinearSite
    sources: tuple[tuple[LinearSite, Int[Tensor, "groups width"]], ...]
    columns: Int[Tensor, "groups copies width"]

    @property
    def width(self) -> int:
        """The number of dimensions in a group."""
        return int(self.columns.shape[2])

    def reorder(self, order: Int[Tensor, "groups width"]) -> None:
        """Put dimension ``order[g, i]`` in place i of group g, in all linears and their biases."""
        order = order.cpu()
        columns = self.columns.gather(2, order.unsqueeze(1).expand_as(self.columns))
        for site, rows in self.sources:
            for tensor in _row_tensors(site):
                tensor[rows.flatten()] = tensor[rows.gather(1, order).flatten()]
        weight = _matrix(self.exit)
        weight[:, self.columns.flatten()] = weight[:, columns.flatten()]

    def rotate(self, R: Float[Tensor, "groups width width"]) -> None:
        """Replace the dimensions y of group g by R[g]^T y, for orthogonal R, in all linears and their biases.

        Products are in float32 at least, and rounded once to the dtype of the weights.
        """
        R = R.to(_matrix(self.exit).device)
        for site, rows in self.sources:
            for tensor in _row_tensors(site):
                old = tensor[rows].to(R) if tensor.dtype.itemsize < R.dtype.itemsize else tensor[rows]
                turned = torch.einsum("gij,gi...->gj...", R.to(old), old)
                tensor[rows.flatten()] = turned.flatten(0, 1).to(tensor.dtype)
        weight = _matrix(self.exit)
        old = weight[:, self.columns]  # (out, groups, copies, width)
        old = old.to(R) if weight.dtype.itemsize < R.dtype.itemsize else old
        turned = torch.einsum("ogci,gij->ogcj", old, R.to(old))
        weight[:, self.columns.flatten()] = turned.flatten(1).to(weight.dtype)


def find_inner(block: Block, config: PreTrainedConfig) -> Iterator[list[Inner]]:
    """What the inner dimensions of a block may be by their shapes: a list for each module, of which one may be true.

    ``block`` has all of its sites, on the meta device or not; experts are left out. A module's last linear is its
    exit, or, of two, either one.
    """
    by_parent: dict[str, list[LinearSite]] = {}
    for site in block.sites:
        if site.expert is None and isinstance(site, LinearSite):
            by_parent.setdefault(site.name.rpartition(".")[0], []).append(site)
    for parent, sites in by_parent.items():
        width = _head_width(block.module.get_submodule(parent[len(block.name) + 1 :]), config)
        found: list[Inner] = []
        for exit in reversed(sites if len(sites) == 2 else sites[-1:]):
            others = [site for site in sites if site is not exit and site.shape[1] == exit.shape[0]]
            found += [*_heads(exit, others, width), *_neurons(exit, others)]
        if found:
            yield found


def _head_width(attention: nn.Module, config: PreTrainedConfig) -> int:
    """The number of dimensions inside a head, as the module says it, or else the config."""
    for named in (attention, config):
        width = getattr(named, "head_dim", None)
        if isinstance(width, int):
            return width
    return int(config.hidden_size) // int(config.num_attention_heads)


def _neurons(exit: LinearSite, others: Sequence[LinearSite]) -> Iterator[Inner]:
    """One or two other linears make all neurons, or one makes them twice: gate and up in it, in either layout."""
    width = exit.shape[1]
    columns = torch.arange(width).view(1, 1, width)
    if 1 <= len(others) <= 2 and all(site.shape[0] == width for site in others):
        yield Inner("neurons", exit, tuple((site, torch.arange(width).view(1, width)) for site in others), columns)
    if len(others) == 1 and others[0].shape[0] == 2 * width:
        rows = torch.arange(2 * width)
        for halves in (rows.view(2, 1, width), rows.view(1, width, 2).movedim(2, 0)):
            yield Inner("neurons", exit, tuple((others[0], half.contiguous()) for half in halves), columns)


def _heads(exit: LinearSite, others: Sequence[LinearSite], width: int) -> Iterator[Inner]:
    """One other linear makes the values: beside two for queries and keys, or all in one, in either layout."""
    inputs = exit.shape[1]
    if width < 2 or inputs % width:
        return
    heads = inputs // width
    for site in reversed(others):  # values come behind queries and keys
        out = site.shape[0]
        alone, fused = out // width, (out - inputs) // (2 * width)
        if len(others) >= 3 and out % width == 0 and 0 < alone <= heads and heads % alone == 0:
            yield _of_heads(exit, site, torch.arange(out).view(alone, width), heads)
        if out > inputs and (out - inputs) % (2 * width) == 0 and heads % fused == 0:
            rows = torch.arange(out)
            yield _of_heads(exit, site, rows[inputs + fused * width :].view(fused, width), heads)
            # or for each KV head its queries, its key and its value
            yield _of_heads(exit, site, rows.view(fused, -1, width)[:, -1], heads)


def _of_heads(exit: LinearSite, site: LinearSite, rows: Int[Tensor, "groups width"], heads: int) -> Inner:
    """Query heads that are next to each other share a KV head."""
    groups, width = rows.shape
    columns = torch.arange(heads * width).view(groups, heads // groups, width)
    return Inner("heads", exit, ((site, rows.contiguous()),), columns)


def _matrix(site: LinearSite) -> Tensor:
    """The weight (out, in), sharing its memory."""
    return site.view(site.parameter.detach())


def _row_tensors(site: LinearSite) -> Iterator[Tensor]:
    """What has a row for each output: the weight, and the bias if there is one."""
    yield _matrix(site)
    if site.module.bias is not None:
        yield site.module.bias.detach()
