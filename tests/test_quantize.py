"""Rounding kept weights: the grid that a checkpoint shows again, and that compensation pays."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rarefy
import reference
from problems import FAMILIES
from rarefy.errors import InputError, MethodError
from rarefy.layer.gram import Gram
from rarefy.layer.grid import LARGEST, choose_scale, find_scale, nearest, scales
from rarefy.layer.pattern import NM, Fixed, PerRow, Unstructured
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution, Status
from rarefy.methods import build
from rarefy.methods.base import run
from rarefy.methods.compose import Then
from rarefy.methods.magnitude import Magnitude
from rarefy.methods.quantize import Quantize
from rarefy.methods.refit import PCG
from rarefy.methods.wanda import Wanda
from rarefy.pruning.matching import Matching
from rarefy.pruning.settings import PruneSettings, Uniform
from rarefy.runs.recipe import Recipe

each_bits = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(family: str, seed: int = 0, out: int = 6, inputs: int = 80) -> LayerProblem:
    W0, H = FAMILIES[family](out, inputs, seed)
    return LayerProblem(W0 / 20, Gram.from_matrix(H))


def random_groups(seed: int, number: int = 200, size: int = 16) -> Tensor:
    """Groups of weights of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 8, (number, 1), generator=generator)
    return torch.ldexp(torch.randn(number, size, generator=generator), exponents)


# --- the grid


@each_bits
def test_scales_are_those_of_the_rewrite(bits: int) -> None:
    w, importance = random_groups(0, 40).double(), random_groups(1, 40).double().square()
    expected = [reference.grid_scale(row, weights, bits) for row, weights in zip(w, importance)]
    assert choose_scale(w, importance, bits).tolist() == expected


@each_bits
def test_the_first_scale_is_the_least_that_reaches_the_largest(bits: int) -> None:
    largest = torch.cat([random_groups(2).abs().flatten(), torch.tensor([127.0, 15.0, 254.0, 2.0**-20])])
    first, *smaller = scales(largest, bits)
    assert bool((LARGEST[bits] * first >= largest).all())
    if bits == 8:
        assert not smaller
        assert bool((LARGEST[8] * first / 2 < largest).all())
    else:
        assert bool((LARGEST[4] * smaller[0] < largest).all())
        for greater, less in itertools.pairwise([first, *smaller]):
            assert bool((greater / 1.125 <= less * 1.0001).all())
            assert bool((less < greater).all())


@each_bits
def test_the_nearest_number_is_found(bits: int) -> None:
    scale = 0.25
    numbers = torch.from_numpy(reference.grid_of(bits, scale))
    w = torch.linspace(-40, 40, 4001, dtype=torch.float64) + 1e-6
    expected = numbers[(w[:, None] - numbers).abs().argmin(dim=1)]
    assert torch.equal(nearest(w, torch.tensor(scale, dtype=torch.float64), bits) * scale, expected)


@each_bits
def test_every_number_is_exact_in_bfloat16_and_its_scale_in_float16(bits: int) -> None:
    w = random_groups(3)
    scale = choose_scale(w, torch.ones_like(w), bits)
    whole = torch.from_numpy(reference.grid_of(bits, 1.0)).float()
    every = whole * scale[:, None]
    assert torch.equal(every.bfloat16().float(), every)
    assert torch.equal(scale.half().float(), scale)


@each_bits
def test_rounded_weights_show_their_scale_again(bits: int) -> None:
    w = random_groups(4)
    scale = choose_scale(w, torch.ones_like(w), bits)
    rounded = (nearest(w, scale[:, None], bits) * scale[:, None]) * (random_groups(5) > 0)
    rounded[3] = 0
    rounded[4, 1:] = 0
    found = find_scale(rounded, bits)
    assert not found.isnan().any()
    again = nearest(rounded, found[:, None], bits) * found[:, None]
    assert torch.equal(torch.where(rounded == 0, 0, again), rounded)
    assert float(found[3]) == 0
    assert find_scale(w, bits).isnan().all()  # what was never rounded is of no grid
    broken = rounded.clone()
    broken[:, 5] = torch.where(rounded[:, 5] == 0, 0, rounded[:, 5] * 1.01)
    others = (rounded[:, :5] != 0).sum(dim=1) > 2  # a group of few weights may be of some grid by chance
    assert find_scale(broken, bits).isnan()[others & (rounded[:, 5] != 0)].float().mean() > 0.9


# --- the method


@each_bits
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_support_stays_and_every_weight_is_of_a_grid(bits: int, family: str) -> None:
    problem = draw(family, inputs=160)
    start = run(Wanda(), problem, Unstructured(0.5))
    solution = run(Then(Wanda(), Quantize(bits=bits, group=64)), problem, Unstructured(0.5))
    assert torch.equal(solution.mask, start.mask)
    if bits == 4:
        assert torch.equal(solution.weight != 0, start.weight != 0)
    filled = torch.zeros(6, 192, dtype=torch.float64)
    filled[:, :160] = solution.weight
    assert not find_scale(filled.view(6, 3, 64), bits).isnan().any()
    assert torch.equal(solution.weight.bfloat16().double(), solution.weight)
    assert solution.details["bits"] == bits


def to_nearest(problem: LayerProblem, start: Solution, bits: int) -> Tensor:
    """The start, rounded with nothing that makes up for it."""
    w = start.weight
    scale = choose_scale(w, problem.H.diagonal().expand_as(w), bits).unsqueeze(1)
    return nearest(w, scale, bits) * scale * start.mask


@pytest.mark.parametrize("family", ["ill_conditioned", "correlated", "well_conditioned"])
def test_making_up_for_it_beats_rounding_to_nearest(family: str) -> None:
    """What 4 bits cost, as a share of what rounding to nearest costs; limits are a little above what was measured."""
    limits = {"ill_conditioned": (0.65, 0.31), "correlated": (0.94, 0.69), "well_conditioned": (0.99, 0.97)}
    for sweeps, limit in zip((0, 3), limits[family]):
        logs = []
        for seed in range(4):
            problem = draw(family, seed)
            start = run(Then(Wanda(), PCG()), problem, PerRow(0.5))
            rounded = Quantize(bits=4, sweeps=sweeps).solve(problem, PerRow(0.5), start)
            base, plain = problem.objective(start.weight), problem.objective(to_nearest(problem, start, 4))
            logs.append(math.log((problem.objective(rounded.weight) - base) / (plain - base)))
        assert math.exp(sum(logs) / len(logs)) < limit


@each_bits
@pytest.mark.parametrize("family", list(FAMILIES))
def test_no_sweep_raises_the_loss(bits: int, family: str) -> None:
    problem = draw(family)
    losses = []
    for sweeps in range(5):
        method = Then(Wanda(), Quantize(bits=bits, sweeps=sweeps, damping=1e-9))
        losses.append(run(method, problem, Unstructured(0.5)).relative_error)
    for before, after in itertools.pairwise(losses):
        assert after <= before * (1 + 1e-6)  # of the loss without damping


def test_sweeps_end_when_nothing_changes() -> None:
    problem = draw("well_conditioned")
    solution = run(Then(Wanda(), Quantize(bits=4, sweeps=100)), problem, Unstructured(0.5))
    changed = solution.trace["changed weights"]
    assert 1 < len(changed) == solution.steps < 100
    assert changed[-1] == 0 < changed[-2]


@pytest.mark.parametrize("family", ["correlated", "ill_conditioned"])
def test_the_answer_is_near_the_best_of_all_codes(family: str) -> None:
    """Brute force over the codes of four weights: nothing is better with the same scales, and how far it is."""
    ratios = []
    for seed in range(6):
        problem = draw(family, seed, out=1, inputs=8)
        pattern = PerRow(0.5)
        solution = run(Then(Wanda(), PCG(), Quantize(bits=4, damping=1e-6)), problem, pattern)
        scale = find_scale(solution.weight, 4)
        at = solution.mask[0].nonzero().flatten()
        numbers = torch.from_numpy(reference.grid_of(4, 1.0))
        # the scale that was used may be a multiple of the one that is found
        best = math.inf
        for candidate in {float(scale), float(scale) * 3, float(scale) * 5}:
            codes = torch.cartesian_prod(*[numbers * candidate] * len(at))
            D = (-problem.W0).repeat(len(codes), 1)
            D[:, at] += codes
            best = min(best, float(((D @ problem.H) * D).sum(dim=1).min()))
        loss = problem.objective(solution.weight)
        if float(scale) * 15 >= float(solution.weight.abs().max()) * 0.99:
            assert loss >= best * (1 - 1e-9)
        ratios.append(loss / best)
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 1.6


def test_rounding_of_a_diagonal_gram_is_to_nearest() -> None:
    problem = draw("diagonal")
    start = run(Wanda(), problem, Unstructured(0.5))
    for bits in (4, 8):
        solution = Quantize(bits=bits).solve(problem, Unstructured(0.5), start)
        torch.testing.assert_close(solution.weight, to_nearest(problem, start, bits), rtol=0, atol=0)


@pytest.mark.parametrize("pattern", [Unstructured(0.0), Fixed(torch.ones(6, 80, dtype=torch.bool))], ids=str)
def test_what_is_kept_whole_is_rounded_too(pattern: Any) -> None:
    problem = draw("correlated")
    solution = run(Then(Magnitude(), Quantize(bits=4)), problem, pattern)
    assert bool(solution.mask.all())
    assert solution.status is Status.SOLVED
    assert not find_scale(solution.weight, 4).isnan().any()
    assert run(Then(Magnitude(), Quantize()), problem, Unstructured(0.9999)).status is Status.TRIVIAL


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantize.bits": "5"}, "quantize.bits is 5, but must be one of 8, 4"),
        ({"quantize.bits": "many"}, "'many'"),
        ({"quantize.group": "32"}, "quantize.group is 32, but must be one of 64, 128, 256, 512"),
        ({"quantize.bits": 4.0}, "quantize.bits is 4.0, but must be one of 8, 4"),
        ({"quantize.sweeps": "-1"}, "at least 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MethodError) as caught:
        build("wanda+quantize", settings)
    assert sentence in str(caught.value)


def test_two_to_four_stays_two_to_four() -> None:
    solution = rarefy.solve(*draw_tensors(), NM(2, 4), build("wanda+quantize", {"quantize.bits": "4"}))
    assert bool((solution.weight.view(6, 20, 4) != 0).sum(dim=2).le(2).all())


def draw_tensors() -> tuple[Tensor, Tensor]:
    problem = draw("correlated")
    return problem.W0, problem.H


def test_nothing_comes_after_it() -> None:
    with pytest.raises(MethodError, match="quantize rounds what other parts found, so it can only be the last part"):
        build("wanda+quantize+pcg")
    with pytest.raises(InputError, match="off the grid"):
        PruneSettings(Uniform(Unstructured(0.5)), build("wanda+quantize"), steps=[Matching(passes=1)])
    with pytest.raises(InputError, match="--match does not go with --method wanda\\+quantize"):
        Recipe.read({"model": "model", "method": "wanda+quantize", "match": 1})


@each_bits
def test_rows_in_which_rounding_runs_away_are_rounded_to_nearest(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in layers whose inputs are nearly alike, where what a full column cannot take is handed on and grows."""
    problem = draw("correlated", out=6, inputs=80)
    start = run(Then(Wanda(), PCG()), problem, PerRow(0.5))
    method = Quantize(bits=bits, sweeps=0)
    plain = method.solve(problem, PerRow(0.5), start).weight
    inner = Quantize._round_columns

    def runs_away(*arguments: Any) -> tuple[Tensor, Tensor]:
        Q, step = inner(*arguments)
        Q[:, 2], Q[:, 4] = 1e6, math.inf
        return Q, step

    monkeypatch.setattr(Quantize, "_round_columns", runs_away)
    found = method.solve(problem, PerRow(0.5), start).weight
    expected = to_nearest(problem, start, bits)
    for row in range(6):
        torch.testing.assert_close(found[row], expected[row] if row in (2, 4) else plain[row])
