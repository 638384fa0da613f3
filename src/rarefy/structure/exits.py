"""The exit of one block: which of its columns are kept, and the weights that they get.

A fit to calibration text follows its noise, by more the fewer tokens there are for each input: with a quarter of
SmolLM2's 1,536 neurons removed and 2,048 tokens, a refit of little damping does worse than none. So a part of the
windows is held out of a first fit, and the damping that does best on them is taken, once for the refit of the kept
columns and once for the step towards the dense path. Both are then solved again with all windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.calibration.collect import collect
from rarefy.calibration.stream import HiddenStates
from rarefy.layer.columns import Columns
from rarefy.layer.gram import Gram
from rarefy.layer.passes import apply_mask
from rarefy.layer.problem import LayerProblem
from rarefy.layer.removal import choose_columns, refit_columns, removal_costs
from rarefy.methods.base import wanda_scores
from rarefy.models.blocks import Block
from rarefy.models.sites import LinearSite
from rarefy.structure.dense_path import DensePath, Gap
from rarefy.structure.parts import Parts

#: How columns are chosen: with their interactions, by what each costs alone, or by the sum of their Wanda scores.
Choice = Literal["interactions", "single", "wanda"]
CHOICES: tuple[Choice, ...] = ("interactions", "single", "wanda")

#: What is tried as damping, as a share of each input's own energy; the last nearly leaves weights as they are.
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
#: The damping where nothing can be held out, as there is one window.
UNSEEN = 1.0
#: One batch of so many is held out.
_PARTS = 4
#: The damping of the set of columns with which dampings are compared.
_PILOT = 0.1


@dataclass(frozen=True)
class ExitRecord:
    """What became of one exit: how many parts are kept, and its output error before and after the repair.

    Errors are relative, as those of layers (``LayerProblem.relative_error``), of the weight before rounding; where
    the exit aims at the dense path, they are those from that aim. ``drift`` is the energy by which the
    states behind its block differ from the dense model's, over the energy of these, with the exit's removed columns
    at zero and nothing else changed, ``drift_left`` with the repair. ``damping`` is that of the refit, and
    ``path_damping`` that of the step towards the dense path; None where there was none.
    """

    name: str
    block: int
    kind: str
    number: int
    kept: int
    masked_error: float
    error: float
    drift: float | None = None
    drift_left: float | None = None
    damping: float | None = None
    path_damping: float | None = None


@dataclass(frozen=True)
class _Seen:
    """What some windows show of an exit: the Gram of its inputs, and how far its block is from the dense path."""

    gram: Gram
    gap: Gap | None

    def __add__(self, other: _Seen) -> _Seen:
        H, tokens = self.gram.H + other.gram.H, self.gram.num_tokens + other.gram.num_tokens
        gap = self.gap + other.gap if self.gap and other.gap else None
        return _Seen(Gram.from_matrix(H, tokens), gap)


def holding_out(number: int, batch_size: int) -> int:
    """The size of batches, at most ``batch_size``, with which some of ``number`` windows can be held out."""
    return max(1, min(batch_size, number // _PARTS))


@dataclass(frozen=True)
class ExitSolver:
    """How the exits of a block are solved, of which ``stream`` has the states that enter it.

    ``damping`` is that of the refit; None: what does best on windows that are held out.
    """

    stream: HiddenStates
    dense: DensePath | None
    repair: bool
    choice: Choice
    damping: float | None

    def exits(
        self, block: Block, own: Sequence[tuple[Parts, int]], changed: bool
    ) -> tuple[dict[str, Tensor], list[ExitRecord]]:
        """Write the exits of one block, in order, with so many parts kept; what was written, and a record of each.

        ``changed``: something in an earlier block is not as in the dense model.
        """
        made: dict[str, Tensor] = {}
        found: list[ExitRecord] = []
        for parts, number in own:
            site, share = parts.exits[block.index], 0.0
            columns = torch.ones(parts.number, dtype=torch.bool)
            if self.dense and parts is own[-1][0]:  # nothing behind it changes what the block adds
                share = self.dense.share(block.index, changed or bool(found))
            if number < parts.number or share:
                seen = [self._look(stream, block, site, share) for stream in self._parts]
                weight, columns, record = self.exit(site, block.index, seen, parts, number)
                site.write(weight)
                found.append(record)
            made |= {f"{parts.kind}.weight": site.read(), f"{parts.kind}.kept": columns}
        return made, found

    @cached_property
    def _parts(self) -> list[HiddenStates]:
        """The windows that are fitted to and those that are held out; all together where there are too few."""
        batches = range(self.stream.num_batches)
        held_out = batches[_PARTS - 1 :: _PARTS] or batches[1:][-1:]
        if not held_out:
            return [self.stream]
        return [self.stream.of_batches([i for i in batches if i not in held_out]), self.stream.of_batches(held_out)]

    def _look(self, stream: HiddenStates, block: Block, site: LinearSite, share: float) -> _Seen:
        gap = None
        if self.dense and share:
            gram, gap = self.dense.look(stream, block, site, share)
        else:
            gram = collect(stream, block.module, block.index, [site])[site.name]
        gram.check(site.name)
        return _Seen(gram, gap)

    def exit(
        self, site: LinearSite, block: int, seen: Sequence[_Seen], parts: Parts, number: int
    ) -> tuple[Tensor, Bool[Tensor, " parts"], ExitRecord]:
        """The weight of an exit, which parts are kept, and its record, from one or two parts of the windows."""
        W0 = site.read()
        whole = seen[0] if len(seen) == 1 else seen[0] + seen[1]
        dense = LayerProblem(W0, whole.gram)
        dense.check(site.name)
        problem, path_damping = dense, None
        if whole.gap:
            path_damping = _path_damping(W0, seen)
            problem = LayerProblem(whole.gap.target(dense, path_damping), dense.gram)
        columns, masked, weight, damping = torch.ones_like(dense.dead), problem.W0, problem.W0, None
        if number < parts.number:
            pattern = Columns(number * parts.width, parts.width)
            if self.repair or self.choice != "wanda":  # which reads none
                damping = self.damping if self.damping is not None else _refit_damping(W0, seen, pattern)
            columns = chosen_columns(problem, pattern, self.choice, damping or 0.0)
            masked = apply_mask(problem.W0, columns.expand(problem.shape).contiguous())
            weight = refit_columns(problem, columns, damping or 0.0)[0] if self.repair else masked
        drifts: tuple[float | None, float | None] = (None, None)
        if whole.gap:
            unrepaired = apply_mask(W0, columns.expand(problem.shape).contiguous())
            drifts = (whole.gap.left(dense, unrepaired), whole.gap.left(dense, weight))
        errors = problem.relative_error(masked), problem.relative_error(weight)
        kept = columns.view(parts.number, parts.width)[:, 0].cpu()
        dampings = damping, path_damping
        return (
            weight,
            kept,
            ExitRecord(site.name, block, parts.kind, parts.number, number, *errors, *drifts, *dampings),
        )


def _refit_damping(W0: Float[Tensor, "out inputs"], seen: Sequence[_Seen], pattern: Columns) -> float:
    """The damping whose refit on the first windows has the least error on those held out."""
    if len(seen) == 1:
        return UNSEEN
    fit, held_out = (LayerProblem(W0, one.gram) for one in seen)
    columns = chosen_columns(fit, pattern, "single", _PILOT)
    return least(lambda damping: held_out.relative_error(refit_columns(fit, columns, damping)[0]))


def _path_damping(W0: Float[Tensor, "out inputs"], seen: Sequence[_Seen]) -> float:
    """The damping whose step, with the share of it that is taken, leaves the least drift on those held out."""
    if len(seen) == 1:
        return UNSEEN
    fit, held_out = (LayerProblem(W0, one.gram) for one in seen)
    step, drift = seen[0].gap, seen[1].gap
    assert step
    assert drift
    return least(lambda damping: drift.left(held_out, step.target(fit, damping)))


def least(error: Callable[[float], float]) -> float:
    """The one of ``DAMPINGS`` from which the ``error`` rises on both sides, looked for from the middle one."""
    place = len(DAMPINGS) // 2
    errors = {place: error(DAMPINGS[place])}
    for step in (1, -1):
        while 0 <= place + step < len(DAMPINGS):
            if place + step not in errors:
                errors[place + step] = error(DAMPINGS[place + step])
            if not errors[place + step] < errors[place]:
                break
            place += step
    return DAMPINGS[place]


def chosen_columns(
    problem: LayerProblem, pattern: Columns, choice: Choice, damping: float
) -> Bool[Tensor, " inputs"]:
    """The columns to keep."""
    if choice == "interactions":
        return choose_columns(problem, pattern, damping)
    if choice == "wanda":
        return pattern.project(wanda_scores(problem))[0]
    costs = removal_costs(problem, pattern.group, damping)
    spread = (costs / pattern.group).repeat_interleave(pattern.group).unsqueeze(0)
    return pattern.project(spread.expand(problem.shape))[0]
