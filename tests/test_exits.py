"""The damping of an exit's repair: what does best on windows that are held out of the fit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rarefy.calibration.record import record
from rarefy.layer.columns import Columns
from rarefy.layer.problem import LayerProblem
from rarefy.models.blocks import find_blocks
from rarefy.structure import exits
from rarefy.structure.dense_path import LATER
from rarefy.structure.depth import BlockSets
from rarefy.structure.exits import DAMPINGS, UNSEEN, ExitRecord, ExitSolver, holding_out, least
from rarefy.structure.parts import find_parts
from rarefy.structure.shrink import Removal, shrink, with_order
from rarefy.structure.width import remove_parts, towards_dense
from test_shrink import deep

WINDOWS = torch.randint(3, 160, (24, 32), generator=torch.Generator().manual_seed(1))
FEW = WINDOWS[:4, :24]  # 72 tokens to fit to, 24 held out


def solver(model: PreTrainedModel, num: int, batch_size: int) -> ExitSolver:
    """One that has recorded so many windows."""
    stream = record(model, [block.module for block in find_blocks(model)], WINDOWS[:num], batch_size)
    return ExitSolver(stream, None, True, "interactions", None)


def repaired(
    dense: PreTrainedModel, number: int | None, kept: tuple[int, ...], damping: float | None, repair: bool = True
) -> tuple[PreTrainedModel, list[ExitRecord]]:
    """The smaller model, from few windows, and the records of its exits."""
    small = shrink(copy.deepcopy(dense), Removal(kept))
    neurons = find_parts(small, "neurons")
    removed = [] if number is None else [(with_order(small, neurons, FEW[:1]), number)]
    wanted, path = towards_dense(dense, kept, small, removed, FEW, 4)
    return small, remove_parts(small, FEW, wanted, dense=path, damping=damping, repair=repair)[1]


@pytest.mark.parametrize("place", range(len(DAMPINGS)))
def test_the_least_error_is_found_wherever_it_is(place: int) -> None:
    asked: list[float] = []

    def error(damping: float) -> float:
        asked.append(damping)
        return abs(math.log(damping / DAMPINGS[place]))

    assert least(error) == DAMPINGS[place]
    assert len(asked) == len(set(asked)) <= 2 + abs(place - len(DAMPINGS) // 2) + 1


def test_of_equal_errors_the_middle_one_is_taken() -> None:
    assert least(lambda _: 1.0) == DAMPINGS[len(DAMPINGS) // 2]


@pytest.mark.parametrize(("num", "batch_size"), [(24, 4), (24, 5), (9, 2), (4, 1), (3, 1), (2, 1)])
def test_a_quarter_of_the_batches_is_held_out(num: int, batch_size: int) -> None:
    one = solver(deep("llama", 2), num, batch_size)
    fit, held_out = ([batch for batch, _ in part.slices()] for part in one._parts)
    assert sorted([*fit, *held_out]) == list(range(-(-num // batch_size)))
    assert fit
    assert held_out
    assert len(held_out) <= max(len(fit), 1)
    assert all(part.states is one.stream.states for part in one._parts)


def test_of_one_window_nothing_is_held_out() -> None:
    model = deep("llama", 2)
    assert len(solver(model, 1, 1)._parts) == 1
    parts = with_order(model, find_parts(model, "neurons"), WINDOWS[:1])
    _, records = remove_parts(model, WINDOWS[:1], [(parts, 40)])
    assert [one.damping for one in records] == [UNSEEN, UNSEEN]


@pytest.mark.parametrize(
    ("number", "batch_size", "found"), [(32, 4, 4), (8, 4, 2), (7, 4, 1), (1, 4, 1), (100, 1, 1)]
)
def test_batches_are_small_enough_to_hold_some_out(number: int, batch_size: int, found: int) -> None:
    assert holding_out(number, batch_size) == found


def test_two_parts_of_the_windows_show_what_all_of_them_show() -> None:
    dense = deep("llama", 3)
    small = shrink(copy.deepcopy(dense), Removal((0, 2)))
    site, block = find_parts(small, "neurons").exits[0], find_blocks(small)[0]
    _, path = towards_dense(dense, (0, 2), small, [], WINDOWS, 4)
    stream = record(small, [one.module for one in find_blocks(small)], WINDOWS, 4)
    one = ExitSolver(stream, path, True, "interactions", None)
    path.advance(0)
    fit, held_out = (one._look(part, block, site, LATER) for part in one._parts)
    whole, together = one._look(stream, block, site, LATER), fit + held_out
    assert whole.gap
    assert together.gap
    assert together.gram.num_tokens == whole.gram.num_tokens == WINDOWS.numel()
    torch.testing.assert_close(together.gram.H, whole.gram.H)
    torch.testing.assert_close(together.gap.M, whole.gap.M)
    assert together.gap.energy == pytest.approx(whole.gap.energy)
    assert together.gap.dense_energy == pytest.approx(whole.gap.dense_energy)
    assert (together.gap.factor, together.gap.share) == (whole.gap.factor, LATER)


def test_a_repair_of_neurons_with_few_tokens_does_no_harm() -> None:
    dense = deep("llama", 3)
    sets = BlockSets(dense, WINDOWS[4:], copies=False)
    kl = {
        name: sets.measure_model(repaired(dense, 40, (0, 1, 2), damping, repair)[0]).kl
        for name, damping, repair in (("held out", None, True), ("light", 1e-4, True), ("none", None, False))
    }
    assert kl["held out"] < kl["none"] < kl["light"]


def test_a_repair_of_blocks_with_few_tokens_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = deep("llama", 4)
    sets = BlockSets(dense, WINDOWS[4:], copies=False)
    plain = sets.measure_model(shrink(dense, Removal((0, 2, 3)))).kl
    careful = sets.measure_model(repaired(dense, None, (0, 2, 3), None)[0]).kl
    monkeypatch.setattr(exits, "DAMPINGS", (1e-4,))
    light = sets.measure_model(repaired(dense, None, (0, 2, 3), None)[0]).kl
    assert careful < 1.05 * plain
    assert careful < light


def test_more_tokens_take_less_damping() -> None:
    found = []
    for windows in (FEW, torch.randint(3, 160, (64, 64), generator=torch.Generator().manual_seed(3))):
        model = deep("llama", 2)
        parts = with_order(model, find_parts(model, "neurons"), WINDOWS[:1])
        _, records = remove_parts(model, windows, [(parts, 40)])
        found.append([one.damping for one in records])
    assert all(few > many for few, many in zip(*found))  # type: ignore[operator]


def test_columns_are_chosen_with_the_damping_of_their_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen_with: list[float] = []
    choose = exits.choose_columns

    def noted(problem: LayerProblem, pattern: Columns, damping: float) -> Tensor:
        chosen_with.append(damping)
        return choose(problem, pattern, damping)

    monkeypatch.setattr(exits, "choose_columns", noted)
    _, records = repaired(deep("llama", 3), 40, (0, 1, 2), None)
    assert chosen_with == [one.damping for one in records]


def test_what_is_asked_for_is_taken() -> None:
    _, records = repaired(deep("llama", 3), 40, (0, 1, 2), 0.25)
    assert [one.damping for one in records] == [0.25] * 3
    assert records[0].path_damping is None  # nothing before it has changed
    assert all(one.path_damping in DAMPINGS for one in records[1:])


def test_a_choice_that_reads_no_damping_has_none() -> None:
    model = deep("llama", 2)
    parts = with_order(model, find_parts(model, "neurons"), WINDOWS[:1])
    _, records = remove_parts(model, FEW, [(parts, 40)], choice="wanda", repair=False)
    assert [one.damping for one in records] == [None, None]
    assert isinstance(parts.exits[0].module, nn.Linear)
