"""Every method against its plain slow rewrite: equal supports and weights in float64, equal error in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from problems import FAMILIES, OfNeurons, output_energy
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import NM, Fixed, Pattern, PerRow, Unstructured
from rarefy.layer.problem import LayerProblem
from rarefy.methods.admm import ADMM
from rarefy.methods.alps import ALPS, ALPSPaper
from rarefy.methods.base import Method, run
from rarefy.methods.compose import Then
from rarefy.methods.dass import DaSS
from rarefy.methods.magnitude import Magnitude
from rarefy.methods.mrp import MRP
from rarefy.methods.quantize import Quantize
from rarefy.methods.refit import PCG, Backsolve
from rarefy.methods.ria import RIA
from rarefy.methods.sparsegpt import SparseGPT
from rarefy.methods.wanda import Wanda

OUT, INPUTS = 8, 24

# The same mathematics in another order: rounding of 1e-16 times the condition 1e6 of the worst family,
# times the growth of rounding in ten steps of conjugate gradients, which lose orthogonality.
WEIGHTS_FLOAT64 = 1e-5
# Outputs forget the directions that H hardly sees, so here rounding is all: a share of the dense energy.
OUTPUTS_FLOAT64 = 1e-12
# Undamped conjugate gradients at a condition of 1e6 lose orthogonality within ten steps, after which two
# orders of the same sums go separate ways; the rewrite, too, moves by this much when H changes by 1e-16.
OUTPUTS_UNSTABLE = 1e-7
# Hard thresholds bifurcate: in float32 supports may differ, errors must not. An error of 0 keeps rounding.
ERROR_FLOAT32 = {"rel": 0.01, "abs": 1e-7}
# As above: ten steps in float32 are worth six to eight at a condition of 1e6, depending on the processor's products.
ERROR_UNSTABLE = {"rel": 1.0, "abs": 1e-7}

SLOW_PATTERNS: dict[str, tuple[tuple[Any, ...], Pattern]] = {
    "layer": (("layer", 0.6), Unstructured(0.6)),
    "row": (("row", 0.6), PerRow(0.6)),
    "2:4": (("nm", 2, 4), NM(2, 4)),
    "1:3": (("nm", 1, 3), NM(1, 3)),
    "4:8": (("nm", 4, 8), NM(4, 8)),
}


def uneven_mask() -> Tensor:
    mask = torch.rand(OUT, INPUTS, generator=torch.Generator().manual_seed(5)) > 0.6
    mask[1], mask[3] = False, True
    return mask


PATTERNS = {**SLOW_PATTERNS, "fixed": (("fixed", uneven_mask()), Fixed(uneven_mask()))}


@dataclass(frozen=True)
class Pair:
    """A method of the package and its rewrite."""

    method: Method
    rewrite: Callable[..., tuple[Tensor, Tensor]]


def refit(rewrite: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The rewrite of a refit, on Wanda's support."""

    def on_wanda(W0: Tensor, H: Tensor, pattern: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        weight, mask = reference.wanda(W0, H, pattern)
        return rewrite(W0, H, ("fixed", mask), start=weight)

    return on_wanda


def alps(W0: Tensor, H: Tensor, pattern: tuple[Any, ...], **changed: Any) -> tuple[Tensor, Tensor]:
    """The rewrite with the package's defaults, so that no default path is without one."""
    default = ALPS()
    names = ("damping", "refit_damping", "rho_first", "rho_last", "steps", "levels", "pcg_steps")
    settings = {name: getattr(default, name) for name in names} | {"rtol": 0.0} | changed
    return reference.alps_geometric(W0, H, pattern, **settings)


def admm_after_wanda(W0: Tensor, H: Tensor, pattern: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """ADMM that goes on from a weight that is not W0."""
    return reference.admm(W0, H, pattern, start=reference.wanda(W0, H, pattern)[0])


def in_groups_of(size: int, method: Quantize) -> Quantize:
    """With groups that are smaller than a packed checkpoint has them, so that there are several in a small layer."""
    object.__setattr__(method, "group", size)
    return method


def quantized(
    first: Callable[..., tuple[Tensor, Tensor]], **settings: Any
) -> Callable[[Tensor, Tensor, tuple[Any, ...]], tuple[Tensor, Tensor]]:
    """The rewrite of the rounding of what another rewrite finds."""

    def rounded(W0: Tensor, H: Tensor, pattern: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        weight, mask = first(W0, H, pattern)
        return reference.quantize(W0, H, weight, mask, **settings)

    return rounded


with_ = functools.partial
PAIRS: dict[str, Pair] = {
    "magnitude": Pair(Magnitude(), reference.magnitude),
    "wanda": Pair(Wanda(), reference.wanda),
    "dass": Pair(DaSS(), reference.dass),
    "dass of neurons": Pair(
        OfNeurons(DaSS()), lambda W0, H, pattern: reference.dass(W0, H, pattern, output_energy(W0, H).sqrt())
    ),
    "ria": Pair(RIA(), reference.ria),
    "ria 1": Pair(RIA(exponent=1.0), with_(reference.ria, exponent=1.0)),
    "sparsegpt": Pair(SparseGPT(), reference.sparsegpt),
    "sparsegpt 8": Pair(SparseGPT(block_size=8), with_(reference.sparsegpt, block_size=8)),
    "sparsegpt 5": Pair(SparseGPT(block_size=5, damping=0.1), with_(reference.sparsegpt, block_size=5, damping=0.1)),
    "mrp": Pair(MRP(), reference.mrp),
    "mrp damped": Pair(MRP(damping=0.1), with_(reference.mrp, damping=0.1)),
    "admm": Pair(ADMM(), reference.admm),
    "admm-reselect": Pair(ADMM(schedule="reselect"), with_(reference.admm, schedule="reselect")),
    "admm1": Pair(ADMM(schedule="fixed"), with_(reference.admm, schedule="fixed")),
    "admm other": Pair(
        ADMM(steps=12, mask_steps=7, damping=0.3, rho=0.5),
        with_(reference.admm, steps=12, mask_steps=7, damping=0.3, rho=0.5),
    ),
    "wanda, then admm": Pair(Then(Wanda(), ADMM()), admm_after_wanda),
    # The two measure convergence of the conjugate gradients differently, so neither may stop early: rtol = 0.
    "alps-paper": Pair(ALPSPaper(rtol=0.0), with_(reference.alps, rtol=0.0)),
    "alps-paper support only": Pair(
        ALPSPaper(pcg_steps=0, rho=1.0, damping=0.1), with_(reference.alps, pcg_steps=0, rho=1.0, damping=0.1)
    ),
    "alps": Pair(ALPS(rtol=0.0), alps),
    "alps, a level a step": Pair(
        ALPS(steps=40, levels=40, rho_first=0.03, rho_last=3.0, damping=0.02, refit_damping=0.02, rtol=0.0),
        with_(reference.alps_geometric, damping=0.02, rtol=0.0),
    ),
    "alps, uneven levels": Pair(
        ALPS(steps=11, levels=4, pcg_steps=0),
        lambda W0, H, pattern: alps(W0, H, pattern, steps=11, levels=4, pcg_steps=0),
    ),
    "alps, then undamped pcg": Pair(
        ALPS(refit_damping=0.0, pcg_steps=5, rtol=0.0),
        lambda W0, H, pattern: alps(W0, H, pattern, refit_damping=0.0, pcg_steps=5),
    ),
    "pcg": Pair(Then(Wanda(), PCG(rtol=0.0)), refit(with_(reference.pcg, rtol=0.0))),
    "pcg 3": Pair(Then(Wanda(), PCG(steps=3, rtol=0.0)), refit(with_(reference.pcg, steps=3, rtol=0.0))),
    "pcg damped": Pair(Then(Wanda(), PCG(damping=0.2, rtol=0.0)), refit(with_(reference.pcg, damping=0.2, rtol=0.0))),
    "quantize": Pair(Then(Wanda(), Quantize()), quantized(reference.wanda)),
    "quantize 4": Pair(Then(SparseGPT(), Quantize(bits=4)), quantized(reference.sparsegpt, bits=4)),
    "quantize 4, no sweep": Pair(
        Then(Wanda(), Quantize(bits=4, sweeps=0, damping=0.1)),
        quantized(reference.wanda, bits=4, sweeps=0, damping=0.1),
    ),
    "quantize 4 in groups": Pair(
        Then(Wanda(), in_groups_of(7, Quantize(bits=4))), quantized(reference.wanda, bits=4, group=7)
    ),
    "backsolve": Pair(Then(Wanda(), Backsolve()), refit(reference.backsolve)),
}

#: Families whose H is singular: the best weights on a support are not unique, their outputs are.
SINGULAR = ("rank_deficient", "duplicate_columns")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("pattern", list(PATTERNS))
@pytest.mark.parametrize("name", list(PAIRS))
def test_same_support_and_weights(name: str, pattern: str) -> None:
    pair, (plain, allowed) = PAIRS[name], PATTERNS[pattern]
    for family, draw in FAMILIES.items():
        W0, H = draw(OUT, INPUTS, 0)
        expected, mask = pair.rewrite(W0, H, plain)
        problem = LayerProblem(W0, Gram.from_matrix(H))
        solution = run(pair.method, problem, allowed)
        assert torch.equal(solution.mask, mask), family
        change = solution.weight - expected
        # A kept weight of a dead input stays as it was; the rewrite sets it to 0. No output knows.
        change[:, problem.dead] = 0
        outputs = float(((change @ H) * change).sum()) / float(((W0 @ H) * W0).sum())
        unstable = "pcg" in name and family == "ill_conditioned"
        assert outputs <= (OUTPUTS_UNSTABLE if unstable else OUTPUTS_FLOAT64), family
        if not unstable and not (name == "backsolve" and family in SINGULAR):
            assert float(change.abs().max()) <= WEIGHTS_FLOAT64 * float(W0.abs().max()), family

        single = LayerProblem(W0.float(), Gram.from_matrix(H.float()))
        error = reference.relative_error(expected, W0, H)
        single_error = run(pair.method, single, allowed).relative_error
        close = ERROR_UNSTABLE if unstable else ERROR_FLOAT32
        assert single_error == pytest.approx(error, **close), family


@pytest.mark.parametrize("family", list(FAMILIES))
def test_grades_are_the_references(family: str) -> None:
    W0, H = FAMILIES[family](OUT, INPUTS, 1)
    weight, _ = reference.wanda(W0, H, ("row", 0.5))
    problem = LayerProblem(W0, Gram.from_matrix(H))
    assert problem.objective(weight) == pytest.approx(reference.objective(weight, W0, H), rel=1e-12)
    assert problem.relative_error(weight) == pytest.approx(reference.relative_error(weight, W0, H), rel=1e-12)


@pytest.mark.parametrize("progress", [0.0, 1 / 15, 0.4, 14 / 15, 1.0])
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_gradual_masks_are_the_references(pattern: str, progress: float) -> None:
    plain, allowed = PATTERNS[pattern]
    scores = FAMILIES["identity"](OUT, INPUTS, 3)[0].abs()
    mask = allowed.at(1 - (1 - progress) ** 3).project(scores)
    assert torch.equal(mask, reference.project_gradual(scores, plain, progress))


def test_penalties_and_checks_of_alps_are_the_references() -> None:
    W0, H = FAMILIES["correlated"](OUT, INPUTS, 2)
    checks: list[dict[str, float]] = []
    reference.alps(W0, H, ("layer", 0.6), trace=checks)
    method, problem = ALPSPaper(), LayerProblem(W0, Gram.from_matrix(H))
    state = method.init(problem, Unstructured(0.6), None)
    for t in range(1, int(checks[-1]["step"]) + 1):
        method.step(state, t)
        if t % 3 == 0:
            check = checks[t // 3 - 1]
            assert state.rho == pytest.approx(check["rho"])
            gap = float((state.W - state.D).norm())
            # after a restart the state is that of the restart
            assert gap == pytest.approx(check["gap"], rel=1e-6, abs=1e-9)
        assert method.stop(state, t) == (t == checks[-1]["step"])
