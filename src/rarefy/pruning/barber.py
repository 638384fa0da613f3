"""LLM-Barber: masks of a block are changed by what its attention and its MLP put out, then layers are refitted.

A layer problem does not see the softmax or the activation behind the layer. Here f_W is a module of the block,
attention or MLP, with all of its linears; it sees its inputs X on the pruned path, behind what was pruned and changed
before it. W0 are its dense weights, W those of the pruned block, M their masks. The score of a weight, kept or
pruned, is of one of two kinds.

    published:  g_j = d/dW mean (f_W(X_j) - Y_j)^2 at W0, for each window j, with Y_j = f_W(X_j) of the pruned block
                S = |W0| (mean over j of g_j^2)^(1/2)                                              (1)

    signed:     g = d/dW |f_W(X) - Y|^2 at W, with Y = f_W0(X)
                h = the diagonal of J^T J, J = df_W(X)/dW at W
                S = h W^2 - g W for kept weights, what it costs to prune one                       (2)
                S = -g W0 - h W0^2 for pruned ones, what is gained if one has its dense value      (3)

(2) and (3) are exact for a single weight where f is linear. h is estimated: the square of J^T v has h as its mean
where the entries of v are 1 or -1 at random; each batch has its own v.

Within each set of weights that the pattern counts (the matrix, a row, a group), the highest scores of pruned weights
cross the lowest ones of kept weights in c pairs. Of those,

    the floor(share c) pruned weights of the highest scores are revived, and as many of the lowest scores are pruned
    in the same sets; c is counted over a row where rows are independent, else over the matrix     (4)

so that counts stay exact. Behind the last module, W is W0 on the new masks, refitted layer by layer.

Source: Su et al., "LLM-Barber", arXiv 2408.10631, whose released code is (1), with shares of 0.001 to 0.1 chosen for
each model and start, and no refit: kept weights get their dense values back (``refit=False``). (2) and (3) are ours.
Differences: pairs of an N:M pattern cross within their group; matrices keep their counts (there, a start of
magnitudes lets all matrices of a module compete).
Cost: for each module two forward passes of the block up to its end, and a backward pass for each window of a batch
(1) or two for the batch (2, 3); then one pass that collects Grams again, and the refit. Memory: the block's dense
weights, one or two gradients of a module in float32, and the activations of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rarefy.calibration.collect import gram_groups
from rarefy.calibration.stream import hidden_place
from rarefy.calibration.trees import at
from rarefy.errors import InputError, ModelError, PatternError
from rarefy.layer.pattern import Fixed, Pattern
from rarefy.methods.compose import Then
from rarefy.methods.magnitude import Magnitude
from rarefy.methods.refit import PCG
from rarefy.models.blocks import Block
from rarefy.models.sites import Site
from rarefy.pruning.precision import computing_in
from rarefy.pruning.steps import PrunedBlock

Score = Literal["published", "signed"]
Scores = dict[str, Float[Tensor, "out inputs"]]
REVIVED = "revived"  # what a record's details call the number of weights that were revived, as many as were pruned


class _Enough(Exception):
    """Ends a block's forward pass where the module's output has been seen."""


@dataclass(frozen=True)
class Barber:
    """Revives and prunes weights of each pruned block by the error of its attention and of its MLP.

    ``score`` is "published" or "signed"; ``share`` of the pairs whose scores cross are swapped; with ``refit`` kept
    weights are refitted, else they are the dense ones. ``seed`` draws the v of "signed". Raises InputError where one
    of them is out of range.
    """

    score: Score = "published"
    share: float = 0.01
    refit: bool = True
    seed: int = 0

    needs_dense_path = False
    needs_dense_weights = True

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise InputError("barber.score", self.score, "one of " + ", ".join(get_args(Score)))
        if not 0 < self.share <= 1:
            raise InputError("barber.share", self.share, "a share above 0, up to 1")

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise PatternError where a weight cannot be swapped for another one alone, within a row or a column."""
        if pattern.rows_alike or (pattern.group > 1 and pattern.row_group > 1):
            raise PatternError.sentence(
                f"barber swaps single weights of a row, which {pattern} does not allow: it has one mask for all "
                "rows, or counts weights in columns, too."
            )

    def num_parts(self, block: Block, num_batches: int) -> int:
        """The batches of each module, and those that collect Grams again, and the layers of the refit."""
        passes = len(modules_of(block)) + len(gram_groups(block.sites))
        return passes * num_batches + len(block.sites)

    def __call__(self, pruned: PrunedBlock, on_part: Callable[[], None]) -> None:
        """Change masks and weights of the block in place. All processes of the world end with the same bits."""
        block = pruned.block
        if not block.sites:
            return
        patterns = {site.name: pruned.pattern_of(site) for site in block.sites}
        own = pruned.entering.num_batches
        others = sum(pruned.world.gather(own)) - own  # which progress counts, too
        for path, sites in modules_of(block).items():
            scores = _Scorer(pruned, path, sites, self).scores(on_part)
            _repeat(on_part, others)
            for site in sites:
                mask = pruned.masks[site.name]
                swapped = swap(mask, scores[site.name], patterns[site.name], self.share)
                pruned.records[site.name].details[REVIVED] = int((swapped & ~mask).sum())
                pruned.masks[site.name] = swapped
                with torch.no_grad():
                    site.write(_revived(site.read(), pruned.dense_weights[site.name], swapped, self.score))
        self._refit(pruned, on_part)
        _repeat(on_part, others * len(gram_groups(block.sites)))

    def _refit(self, pruned: PrunedBlock, on_part: Callable[[], None]) -> None:
        """Give each layer its dense weights on its new mask, refitted if asked for; records get the new errors."""
        for site in pruned.block.sites:
            site.write(pruned.dense_weights[site.name])  # Grams are those of the dense block, as in the loop
        masks = dict(pruned.masks)
        method = Then(Magnitude(), PCG()) if self.refit else Magnitude()
        for found in pruned.solve_again(lambda site: Fixed(masks[site.name]), method, on_part):
            record = pruned.records[found.name]
            record.relative_error, record.balanced_error = found.relative_error, found.balanced_error
            record.seconds += found.seconds
            if found.failed:
                record.status, record.failed = found.status, True


def _repeat(on_part: Callable[[], None], number: int) -> None:
    for _ in range(number):
        on_part()


def modules_of(block: Block) -> Mapping[str, Sequence[Site]]:
    """The sites of a block by the part of it that they are in, ``self_attn`` or ``mlp``; "" for the block itself."""
    found: dict[str, list[Site]] = {}
    for site in block.sites:
        head, dot, _ = site.name.removeprefix(f"{block.name}.").partition(".")
        found.setdefault(head if dot else "", []).append(site)
    return found


def swap(
    mask: Bool[Tensor, "out inputs"], scores: Float[Tensor, "out inputs"], pattern: Pattern, share: float
) -> Bool[Tensor, "out inputs"]:
    """(4): the mask with the floor(share c) best of the weights that would be revived if all c pairs were swapped."""
    better = pattern.project(scores) & ~mask
    width = mask.shape[1] if pattern.rows_independent else mask.numel()
    lines, values = better.view(-1, width), scores.reshape(-1, width)
    room = (share * lines.sum(dim=1, keepdim=True).double() + 1e-9).floor()  # 0.1 * 30 is 3
    order = values.masked_fill(~lines, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(width, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, ranks)
    revived = (lines & (rank < room)).view_as(mask)
    return pattern.project(scores.masked_fill(~(mask | revived), -torch.inf), revived)


def _revived(W: Tensor, W0: Tensor, mask: Tensor, score: Score) -> Tensor:
    """What a module's weight is for the modules behind it: the dense one, or only revived weights are."""
    kept = W0 if score == "published" else torch.where(W == 0, W0, W)
    return torch.where(mask, kept, 0)


class _Scorer:
    """One module of a block, whose weights are scored by its output."""

    def __init__(self, pruned: PrunedBlock, path: str, sites: Sequence[Site], settings: Barber) -> None:
        self.pruned, self.path, self.sites, self.settings = pruned, path, sites, settings
        self.block, self.entering = pruned.block, pruned.entering
        # Direct linears of the block have no module of their own: their output is that of the last.
        self.module: nn.Module = self.block.module.get_submodule(path) if path else sites[-1].module
        self.dense = [pruned.dense_weights[site.name] for site in sites]
        self.sparse = [site.read() for site in sites]
        self.parameters = list({id(site.parameter): site.parameter for site in sites}.values())
        # The range of float16 is too small for gradients: there products are in bfloat16, weights in float32.
        self.autocast = self.entering.compute_dtype == torch.float16
        self.generator = torch.Generator().manual_seed(settings.seed + self.block.index)

    def scores(self, on_part: Callable[[], None]) -> Scores:
        """(1), or (2) and (3), by the name of the site, from the windows of all processes."""
        sums = [torch.zeros(site.shape, device=site.parameter.device) for site in self.sites]
        squares = [torch.zeros_like(each) for each in sums]
        number = torch.zeros(1, dtype=torch.float64)
        add = self._add_published if self.settings.score == "published" else self._add_signed
        with self.pruned.world.together(), self._differentiable():
            for batch, windows in self.entering.slices():
                number += self.entering.states[windows].shape[0]
                add(batch, windows, sums, squares)
                on_part()
        self.pruned.world.sum_([number, *sums, *squares])
        result: Scores = {}
        for i, site in enumerate(self.sites):
            W0, W = self.dense[i].float(), self.sparse[i].float()
            if self.settings.score == "published":
                result[site.name] = W0.abs() * (squares[i] / float(number)).sqrt()  # (1)
            else:
                cost, gain = squares[i] * W.square() - sums[i] * W, -sums[i] * W0 - squares[i] * W0.square()
                result[site.name] = torch.where(self.pruned.masks[site.name], cost, gain)  # (2), (3)
        return result

    def _add_published(self, batch: int, windows: slice, sums: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        self._write(self.sparse)
        with torch.no_grad():
            target = self._output(batch, windows)
        self._write(self.dense)
        output = self._output(batch, windows)
        losses = (output - target).square().flatten(1).mean(dim=1)  # of each window
        for j, loss in enumerate(losses):
            for total, g in zip(squares, self._gradients(loss, retain=j + 1 < len(losses)), strict=True):
                total.addcmul_(g, g)
        self._write(self.sparse)

    def _add_signed(self, batch: int, windows: slice, sums: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        self._write(self.dense)
        with torch.no_grad():
            target = self._output(batch, windows)
        self._write(self.sparse)
        output = self._output(batch, windows)
        for total, g in zip(sums, self._gradients((output - target).square().sum(), retain=True), strict=True):
            total += g
        v = torch.randint(0, 2, output.shape, generator=self.generator).to(output).mul_(2).sub_(1)
        for total, g in zip(squares, self._gradients((output * v).sum(), retain=False), strict=True):
            total.addcmul_(g, g)

    def _gradients(self, loss: Tensor, retain: bool) -> Iterator[Tensor]:
        """The gradient of each site, in float32."""
        found = torch.autograd.grad(loss, self.parameters, retain_graph=retain, allow_unused=True)
        of = {id(parameter): gradient for parameter, gradient in zip(self.parameters, found)}
        for site in self.sites:
            gradient = of[id(site.parameter)]
            # None: an expert that no token of the batch has reached
            yield torch.zeros(site.shape, device=loss.device) if gradient is None else site.view(gradient).float()

    def _output(self, batch: int, windows: slice) -> Float[Tensor, "num ..."]:
        """What the module puts out for one batch, in float32, a row for each window."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: object, output: object) -> None:
            seen.append(at(output, hidden_place(output)))
            raise _Enough

        handle = self.module.register_forward_hook(hook)
        try:
            with torch.autocast(self.entering.device.type, torch.bfloat16, enabled=self.autocast):
                self.entering.run(self.block.module, self.block.index, batch, windows)
        except _Enough:
            pass
        finally:
            handle.remove()
        if not seen:
            name = f"{self.block.name}.{self.path}".rstrip(".")
            raise ModelError.sentence(
                f"{name} is not called as a whole in its block, so that barber does not see what it puts out; leave "
                f"it out with --exclude '{name}.*'."
            )
        output = seen[0].float()
        if output.ndim < 3:  # all tokens in a row
            return output.reshape(self.entering.states[windows].shape[0], -1)
        return output.movedim(self.entering.window_dim, 0)

    def _write(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for site, weight in zip(self.sites, weights):
                site.write(weight)

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Within the scope, gradients of the module's weights are taken; afterwards all is as before."""
        stored = [(each, each.requires_grad) for each in self.block.module.parameters()]
        dtype = torch.float32 if self.autocast else self.entering.compute_dtype
        try:
            with computing_in(self.block.module, dtype), torch.enable_grad():
                self.block.module.requires_grad_(False)
                for weight in self.parameters:
                    weight.requires_grad_(True)
                yield
        finally:
            for parameter, requires_grad in stored:
                parameter.requires_grad_(requires_grad)
            self._write(self.sparse)
