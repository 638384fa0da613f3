"""Step 0 of a block: inner dimensions are reordered or rotated, so that the pattern will prune little.

The dense block computes the same afterwards, and the changes are merged into its weights, so the model stays an
ordinary one. Neurons of the MLP and dimensions inside attention heads get an order (layer/order.py), the latter first
a rotation (layer/rotation.py); models/inner.py finds them. Whether a block really is as its shapes say is tried on
the first batch: a random change must leave what the exit puts out as it was, and what the block does. What is tried
once holds for all blocks that look alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rarefy.calibration.stream import HiddenStates
from rarefy.errors import InputError, ModelError, NumericalError
from rarefy.layer.gram import Gram
from rarefy.layer.order import choose_order, kept_share
from rarefy.layer.problem import LayerProblem
from rarefy.layer.rotation import Heads, choose_rotation
from rarefy.layer.spectrum import inverse_factor
from rarefy.models.blocks import Block, find_blocks
from rarefy.models.inner import WORDS, Inner, find_inner
from rarefy.models.sites import LinearSite, Site
from rarefy.parallel.world import World
from rarefy.pruning.collect import Notes, collect_grams
from rarefy.pruning.precision import computing_in
from rarefy.pruning.settings import PruneSettings

_DAMPING = 0.01  # of the inverse Gram, as in SparseGPT
# Two computations of one output may differ by this share of it, in float32 and in half precision; another output
# differs by about as much as it is.
_SAME, _SAME_IN_HALF = 1e-3, 0.05
_ROUNDINGS = 4.0  # of what a block puts out, in units of its dtype's


@dataclass
class Reparametrisation:
    """What is reordered and rotated in the blocks of one run.

    ``blocks`` have all of their sites; of these, ``pruned`` are pruned, by name.
    """

    blocks: Sequence[Block]
    pruned: dict[str, Site]
    settings: PruneSettings
    config: PreTrainedConfig
    # Which of the candidates of an exit holds, for blocks that look alike.
    _known: dict[tuple[Any, ...], int | None] = field(default_factory=dict)
    _warned: bool = False

    @classmethod
    def of(cls, model: nn.Module, selected: Sequence[Block], settings: PruneSettings) -> Reparametrisation | None:
        """That of a run on ``model`` that prunes the sites of the ``selected`` blocks; None where none is asked for.

        The model may be on the meta device. Raises InputError where no pattern has groups that an order could help,
        ModelError where a model has nothing to reorder or to rotate.
        """
        if not (settings.permute or settings.rotate):
            return None
        pruned = {site.name: site for block in selected for site in block.sites}
        patterns = [settings.pattern_of(site) for site in pruned.values()]
        if settings.permute and all(pattern.group == 1 for pattern in patterns):
            raise InputError.sentence(
                f"permute goes with an N:M pattern only: for {patterns[0]}, all orders of inputs are alike."
            )
        blocks, config = find_blocks(model), model.config
        assert isinstance(config, PreTrainedConfig)
        made = cls(blocks, pruned, settings, config.get_text_config())
        found = [inner for block in blocks for some in made._candidates(block) for inner in some]
        for option, does in (("permute", made._orders), ("rotate", made._rotates)):
            if getattr(settings, option) and not any(map(does, found)):
                what = WORDS["heads"] if option == "rotate" else " or ".join(WORDS.values())
                raise ModelError.sentence(
                    f"{option} needs {what} that are read by a layer to prune; this model has none."
                )
        return made

    def __call__(
        self,
        world: World,
        block: Block,
        entering: HiddenStates,
        row_weights: dict[str, Float[Tensor, " out"]],
        on_batch: Callable[[], None],
    ) -> Notes:
        """Change one block, which is in memory; what the records of its layers should say, by name.

        ``row_weights`` are those of the block's outputs before; they become those of its outputs afterwards.
        ``on_batch`` is called once for each batch of a block with layers to prune. All processes do the same.
        """
        notes: Notes = {}
        if not block.sites:
            return notes
        tried = (self._tried(world, block, entering, some) for some in self._candidates(block))
        found = [inner for inner in tried if inner is not None]
        if self.settings.rotate and not any(map(self._rotates, found)) and world.leads and not self._warned:
            self._warned = True
            warnings.warn(
                f"Nothing is rotated in {block.name}: it does not compute the same with {WORDS['heads']} rotated, or "
                "other blocks read them as well.",
                stacklevel=2,
            )
        if not found:
            for _ in range(entering.num_batches):
                on_batch()
            return notes
        watched: dict[str, Site] = {inner.exit.name: inner.exit for inner in found}
        watched |= {site.name: site for inner in found if self._rotates(inner) for site, _ in inner.sources}
        grams, _ = collect_grams(world, block, [*watched.values()], entering, means=False, on_batch=on_batch)
        for inner in found:
            try:
                with torch.no_grad():
                    self._change(world, inner, grams, row_weights, notes)
            except NumericalError as error:  # which the solver of the layer will meet as well, and answer
                notes.setdefault(inner.exit.name, {})["order"] = f"left as it was: {error}"
        return {name: note for name, note in notes.items() if name in self.pruned}

    # --- what there is to change

    def _candidates(self, block: Block) -> Iterator[list[Inner]]:
        """For each module of a block what its inner dimensions may be, where a change of these would help."""
        for some in find_inner(self.blocks[block.index], self.config):
            if useful := [inner for inner in some if self._rotates(inner) or self._orders(inner)]:
                yield useful

    def _rotates(self, inner: Inner) -> bool:
        names = [inner.exit.name, *(site.name for site, _ in inner.sources)]
        return self.settings.rotate and inner.kind == "heads" and any(name in self.pruned for name in names)

    def _orders(self, inner: Inner) -> bool:
        """Whether an order could help, and no group would cross from head to head."""
        group = self.settings.pattern_of(inner.exit).group
        return self.settings.permute and inner.exit.name in self.pruned and group > 1 and inner.width % group == 0

    def _tried(self, world: World, block: Block, entering: HiddenStates, some: Sequence[Inner]) -> Inner | None:
        """The first of some candidates that leaves the block as it is; None where there is none."""
        shapes = tuple((site.name[len(block.name) :], site.shape) for site in self.blocks[block.index].sites)
        key = (type(block.module), shapes, some[0].exit.name[len(block.name) :])
        if key not in self._known:
            crossing = entering.crosses  # keys and values that other blocks read keep their order

            def first() -> int | None:
                with computing_in(block.module, entering.compute_dtype), torch.no_grad():
                    for number, inner in enumerate(some):
                        if not (crossing and inner.kind == "heads") and _unchanged(inner, block, entering):
                            return number
                return None

            self._known[key] = number = world.from_first(first)
            if number is None and self.settings.permute and world.leads:
                warnings.warn(
                    f"What {some[0].exit.name} reads keeps its order: the block does not compute the same in another "
                    "one, or other blocks read it as well.",
                    stacklevel=2,
                )
        number = self._known[key]
        return None if number is None else some[number]

    # --- the change

    def _change(
        self, world: World, inner: Inner, grams: dict[str, Gram], row_weights: dict[str, Tensor], notes: Notes
    ) -> None:
        """Rotate and reorder inner dimensions, as far as that is asked for."""
        exit = inner.exit
        inverse = _inverse(exit, grams[exit.name])
        if self._rotates(inner):
            ((source, _),) = inner.sources
            heads = self._heads(inner, grams[source.name], inverse)
            R, before, after = world.from_first(lambda: _rotation(heads))
            inner.rotate(R.to(inverse))
            # What a squared gradient is on average over all rotations of its head.
            _change_row_weights(row_weights, inner, lambda v: v.mean(dim=1, keepdim=True).expand_as(v))
            inverse = _rotated(inverse, inner, R.to(inverse))
            for name in (exit.name, source.name):
                notes.setdefault(name, {})["rotation"] = f"pruned share {before:.4f} -> {after:.4f}"
        if self._orders(inner):
            pattern = self.settings.pattern_of(exit)
            keep = round((1 - pattern.nominal_sparsity()) * pattern.group)
            E = exit.read().to(inverse).square_().div_(inverse.diagonal())
            order, before, after = world.from_first(lambda: _orders(E, inner, keep, pattern.group))
            inner.reorder(order)
            _change_row_weights(row_weights, inner, lambda v: v.gather(1, order.to(v.device)))
            notes.setdefault(exit.name, {})["order"] = f"pruned share {before:.4f} -> {after:.4f}"

    def _heads(self, inner: Inner, gram: Gram, inverse: Float[Tensor, "in in"]) -> Heads:
        ((source, rows),) = inner.sources
        columns = inner.columns.to(inverse.device)
        return Heads(
            source.read()[rows.to(inverse.device)].to(inverse),
            inner.exit.read()[:, columns].permute(1, 2, 0, 3).to(inverse),
            _inverse(source, gram).diagonal().reciprocal(),
            inverse[columns.unsqueeze(3), columns.unsqueeze(2)],
            *(self.settings.pattern_of(site) if site.name in self.pruned else None for site in (source, inner.exit)),
        )


def _unchanged(inner: Inner, block: Block, entering: HiddenStates) -> bool:
    """Whether the block computes the same on the first batch with other places for inner dimensions."""
    module, (batch, windows) = block.module, next(entering.slices())
    linears = [inner.exit, *(site for site, _ in inner.sources)]
    kept = [(tensor, tensor.clone()) for site in linears for tensor in _tensors(site)]

    def outputs() -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = inner.exit.module.register_forward_hook(lambda *call: seen.append(call[2].detach().float()))
        try:
            leaving = entering.run(module, block.index, batch, windows).float()
        finally:
            hook.remove()
        return torch.cat([each.flatten() for each in seen]), leaving

    before = outputs()
    try:
        _change_at_random(inner)
        after = outputs()
    finally:
        for tensor, old in kept:
            tensor.copy_(old)
    dtype = entering.compute_dtype
    same = _SAME if dtype.itemsize >= torch.float32.itemsize else _SAME_IN_HALF
    put_out, leaving = (float((new - old).norm()) for old, new in zip(before, after))
    added = float((before[1] - entering.states[windows].to(before[1])).norm())
    rounding = _ROUNDINGS * torch.finfo(dtype).eps * float(before[1].norm())
    return put_out <= same * float(before[0].norm()) and leaving <= same * added + rounding


def _tensors(site: LinearSite) -> list[Tensor]:
    bias = site.module.bias
    return [site.parameter.detach()] + ([] if bias is None else [bias.detach()])


def _change_at_random(inner: Inner) -> None:
    """Another order of neurons; another rotation of the dimensions in heads, of which an order is a special case."""
    groups, _, width = inner.columns.shape
    generator = torch.Generator().manual_seed(0)
    if inner.kind == "neurons":
        inner.reorder(torch.rand(groups, width, generator=generator).argsort(dim=1))
    else:
        inner.rotate(torch.linalg.qr(torch.randn(groups, width, width, generator=generator)).Q)


def _inverse(site: LinearSite, gram: Gram) -> Float[Tensor, "in in"]:
    """H^-1 of what a linear reads, damped. Raises NumericalError where there is none."""
    problem = LayerProblem(site.read(), gram)
    U = inverse_factor(problem, _DAMPING).U
    return (U.T @ U).div_(problem.scaled.s.outer(problem.scaled.s))


def _rotation(heads: Heads) -> tuple[Tensor, float, float]:
    R, before, after = choose_rotation(heads)
    return R.cpu(), before, after


def _rotated(inverse: Float[Tensor, "in in"], inner: Inner, R: Tensor) -> Float[Tensor, "in in"]:
    """R^T H^-1 R, with R of each head in its place."""
    groups, copies, width = inner.columns.shape
    whole = torch.zeros_like(inverse)
    columns = inner.columns.to(inverse.device)
    whole[columns.unsqueeze(3), columns.unsqueeze(2)] = R.unsqueeze(1).expand(groups, copies, width, width)
    return whole.T @ inverse @ whole


def _change_row_weights(row_weights: dict[str, Tensor], inner: Inner, changed: Callable[[Tensor], Tensor]) -> None:
    """Replace the row weights v of what makes inner dimensions, (groups, width), by ``changed(v)``."""
    for site, rows in inner.sources:
        if (v := row_weights.get(site.name)) is not None:
            v[rows.flatten()] = changed(v[rows]).flatten()


def _orders(
    E: Float[Tensor, "out in"], inner: Inner, keep: int, of: int
) -> tuple[Int[Tensor, "groups width"], float, float]:
    """The order of each group of inner dimensions, on the CPU; the share of E that N:M prunes before and after."""
    orders, before, after = [], 0.0, 0.0
    for columns in inner.columns.to(E.device):
        some = E[:, columns].flatten(0, 1)  # all query heads that read a KV head have one order
        order = choose_order(some, keep, of)
        as_it_is, weight = torch.arange(inner.width, device=E.device), float(some.sum(dtype=torch.float64))
        before += weight * (1 - kept_share(some, as_it_is, keep, of))
        after += weight * (1 - kept_share(some, order, keep, of))
        orders.append(order.cpu())
    total = float(E.sum(dtype=torch.float64)) or 1.0
    return torch.stack(orders), before / total, after / total
