"""What every method promises on every pattern, as one table of claims, and what happens at the edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

import rarefy
from problems import FAMILIES, OfNeurons
from rarefy.errors import InputError, MethodError, NumericalError, PatternError
from rarefy.layer import passes
from rarefy.layer.columns import Columns
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import NM, Fixed, Pattern, PerRow, Unstructured
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution, Status
from rarefy.methods import METHODS, build, hyperparameters
from rarefy.methods.admm import ADMM
from rarefy.methods.alps import ALPS, ALPSPaper
from rarefy.methods.base import IterativeMethod, Method, hyper, run, wanda_scores
from rarefy.methods.compose import BestOf, Then
from rarefy.methods.dass import DaSS
from rarefy.methods.dsf import DSF
from rarefy.methods.dsnot import DSnoT
from rarefy.methods.magnitude import Magnitude
from rarefy.methods.mrp import MRP
from rarefy.methods.quantize import Quantize
from rarefy.methods.refit import PCG, Backsolve, conjugate_gradients_
from rarefy.methods.ria import RIA
from rarefy.methods.sparsefw import SparseFW
from rarefy.methods.sparsegpt import SparseGPT
from rarefy.methods.swaps import Swaps
from rarefy.methods.wanda import Wanda
from test_problem import indefinite

OUT, INPUTS = 12, 24

# Two computations of one thing, in another order: rounding (1e-16, 1e-7) times the condition of the
# damped problems (at most 1e4) and the number of steps.
SAME: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-7, "atol": 1e-8},
    torch.float32: {"rtol": 1e-2, "atol": 1e-3},
}
# A loss that must not rise may do so by the rounding of a sum in the method's own dtype.
NOT_ABOVE = {torch.float64: 1 + 1e-12, torch.float32: 1 + 1e-5}
# An exact answer has the squared rounding of its weights as its relative error.
NOTHING = {torch.float64: 1e-24, torch.float32: 1e-12}

PATTERNS: dict[str, Callable[[], Pattern]] = {
    "layer": lambda: Unstructured(0.6),
    "row": lambda: PerRow(0.6),
    "2:4": lambda: NM(2, 4),
    "1:3": lambda: NM(1, 3),
    "fixed": lambda: Fixed(uneven_mask()),
    "columns": lambda: Columns(10),
    "heads": lambda: Columns(12, 4),
}
#: Methods that do not know, or may not care, which inputs are dead.
BLIND = ("magnitude", "best of", "dass of neurons")
#: Methods that hand out a share of the budget to each block of columns, so that dead inputs may stay.
LEFT_TO_RIGHT = ("sparsegpt", "sparsegpt in blocks", "mrp")
#: Methods that change the mask of each row by itself, and refuse patterns of columns (test_columns.py).
ROW_BY_ROW = ("swaps", "dsnot")


@dataclass(frozen=True)
class Claims:
    """What a method promises beyond what all promise; ``None`` is a promise for no pattern."""

    method: Method
    #: Kept weights are those of W0.
    weights_kept: bool = False
    #: Multiplying W0 or H by a number changes the answer by that number, or not at all.
    scale: bool = True
    #: Permuting rows permutes the answer.
    rows: bool = True
    #: Permuting inputs permutes the answer, where the pattern has no groups.
    inputs: bool = True
    #: Patterns under which a row's answer depends on that row only.
    independent: tuple[str, ...] = ("row", "2:4", "1:3", "fixed")
    #: The loss is not above that of this method.
    not_above: Method | None = None
    #: H does not matter.
    ignores_inputs: bool = False
    #: Kept weights are rounded to a grid, also where everything is kept, and those of dead inputs.
    rounds: bool = False


CLAIMS: dict[str, Claims] = {
    "magnitude": Claims(Magnitude(), weights_kept=True, ignores_inputs=True),
    "wanda": Claims(Wanda(), weights_kept=True),
    # Equal counts of rows, or of columns where norms of outputs are known; which of them get one more goes by place.
    "dass": Claims(DaSS(), weights_kept=True, rows=False),
    "dass of neurons": Claims(OfNeurons(DaSS()), weights_kept=True, inputs=False),
    # Sums over columns couple all rows.
    "ria": Claims(RIA(), weights_kept=True, independent=("fixed",)),
    # Goes from left to right, so the order of the inputs matters.
    "sparsegpt": Claims(SparseGPT(), inputs=False),
    "sparsegpt in blocks": Claims(SparseGPT(block_size=7), inputs=False),
    # As sparsegpt; its refit is the best answer on the mask that it finds with the damping, not without.
    "mrp": Claims(MRP(), inputs=False),
    "admm": Claims(ADMM()),
    "admm-reselect": Claims(ADMM(schedule="reselect")),
    "admm1": Claims(ADMM(schedule="fixed")),
    "alps": Claims(ALPS()),
    # The penalty follows the changes of the whole support.
    "alps-paper": Claims(ALPSPaper(), independent=()),
    # Mask finders that start from Wanda's, with one line search or one choice of the best for all rows.
    "sparsefw": Claims(SparseFW(), weights_kept=True, independent=(), not_above=Wanda()),
    "swaps": Claims(Then(Wanda(), Swaps()), weights_kept=True, not_above=Wanda()),
    # The means that these tests make up belong to places, not to inputs.
    "dsnot": Claims(DSnoT(), weights_kept=True, inputs=False),
    # Refits, on Wanda's support.
    "pcg": Claims(Then(Wanda(), PCG()), not_above=Wanda()),
    "pcg after a solver": Claims(Then(ADMM(), PCG()), not_above=ADMM()),
    "backsolve": Claims(Then(Wanda(), Backsolve()), not_above=Then(Wanda(), PCG(steps=30))),
    # Goes from left to right.
    "quantize": Claims(Then(Wanda(), Quantize()), inputs=False, rounds=True),
    "quantize to 4 bits": Claims(Then(ALPS(), Quantize(bits=4, group=64)), inputs=False, rounds=True),
    "best of": Claims(BestOf(Magnitude(), SparseGPT()), inputs=False, independent=(), not_above=SparseGPT()),
}

each_method = pytest.mark.parametrize("method", list(CLAIMS))
each_pattern = pytest.mark.parametrize("pattern", list(PATTERNS))
each_dtype = pytest.mark.parametrize("dtype", list(SAME), ids=["float64", "float32"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fitting(request: pytest.FixtureRequest) -> None:
    """Leaves out the methods that refuse the pattern."""
    values = getattr(request.node, "callspec", None)
    if values and values.params.get("method") in ROW_BY_ROW and values.params.get("pattern") in ("columns", "heads"):
        pytest.skip("the method changes the mask of each row by itself")


def uneven_mask(out: int = OUT, inputs: int = INPUTS) -> Tensor:
    """A mask with an empty and a full row, the others with unlike counts."""
    mask = torch.rand(out, inputs, generator=torch.Generator().manual_seed(5)) > 0.6
    mask[1], mask[3] = False, True
    return mask


def draw(
    family: str = "correlated",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    out: int = OUT,
    inputs: int = INPUTS,
) -> LayerProblem:
    W0, H = FAMILIES[family](out, inputs, seed)
    return make(W0, H, dtype)


def make(W0: Tensor, H: Tensor, dtype: torch.dtype = torch.float64) -> LayerProblem:
    return LayerProblem(W0.to(dtype), gram_of(H.to(dtype)))


def gram_of(H: Tensor) -> Gram:
    """A Gram with means that H allows: each a share of its input's root mean square."""
    tokens = 8 * len(H)
    shares = torch.linspace(-0.5, 0.5, len(H), dtype=torch.float64)
    return Gram.from_matrix(H, tokens, shares * (H.diagonal().double().clamp_min(0) * tokens).sqrt())


def who(holds: Callable[[Claims], bool]) -> pytest.MarkDecorator:
    """Only the methods that claim something."""
    return pytest.mark.parametrize("method", [name for name, claims in CLAIMS.items() if holds(claims)])


def same(a: Solution, b: Solution, dtype: torch.dtype = torch.float64) -> None:
    assert torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.weight, b.weight, **SAME[dtype])


def test_the_table_has_every_method() -> None:
    assert METHODS.keys() <= CLAIMS.keys()
    for name, method in METHODS.items():
        part = CLAIMS[name].method
        assert method == (part.parts[-1] if isinstance(part, Then) else part), name


# --- what all methods promise


@each_method
@each_pattern
def test_the_answer_is_sparse_finite_and_graded(method: str, pattern: str) -> None:
    for family, dtype in [*((family, torch.float32) for family in FAMILIES), ("rank_deficient", torch.float64)]:
        check_answer(method, PATTERNS[pattern](), draw(family, dtype), dtype)


def check_answer(method: str, allowed: Pattern, problem: LayerProblem, dtype: torch.dtype) -> None:
    W0, H = problem.W0.clone(), problem.H.clone()
    solution = run(CLAIMS[method].method, problem, allowed)
    assert solution.weight.shape == solution.mask.shape == (OUT, INPUTS)
    assert solution.weight.dtype == dtype
    assert solution.mask.dtype == torch.bool
    assert int(solution.mask.sum()) == allowed.count((OUT, INPUTS))
    allowed.check(solution.mask)
    assert not solution.weight[~solution.mask].any()
    assert bool(torch.isfinite(solution.weight).all())
    assert not solution.status.failed
    assert solution.relative_error == problem.relative_error(solution.weight)
    assert 0 <= solution.relative_error < 1
    assert solution.seconds > 0
    # an input is never written to
    assert torch.equal(problem.W0, W0)
    assert torch.equal(problem.H, H)


@each_method
@each_pattern
def test_the_same_problem_twice_gives_the_same_bits(method: str, pattern: str) -> None:
    first, second = (run(CLAIMS[method].method, draw(dtype=torch.float32), PATTERNS[pattern]()) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.mask, second.mask)


@each_method
@pytest.mark.parametrize("pattern", ["layer", "2:4"])
def test_a_shared_gram_changes_nothing(method: str, pattern: str) -> None:
    W0, H = FAMILIES["correlated"](OUT, INPUTS, 0)
    gram = gram_of(H.float())
    for other in (W0.flip(0), -2 * W0[:, torch.arange(INPUTS - 1, -1, -1)]):
        run(CLAIMS[method].method, LayerProblem(other.float(), gram), PATTERNS[pattern]())
    shared = run(CLAIMS[method].method, LayerProblem(W0.float(), gram), PATTERNS[pattern]())
    alone = run(CLAIMS[method].method, draw(dtype=torch.float32), PATTERNS[pattern]())
    assert torch.equal(shared.weight, alone.weight)


@each_method
@each_pattern
def test_a_sign_in_the_weight_is_a_sign_in_the_answer(method: str, pattern: str) -> None:
    W0, H = FAMILIES["correlated"](OUT, INPUTS, 1)
    plus, minus = (run(CLAIMS[method].method, make(w, H), PATTERNS[pattern]()) for w in (W0, -W0))
    minus.weight.neg_()
    same(minus, plus)


@each_method
@each_pattern
@pytest.mark.usefixtures("checked_shapes")
def test_types_and_shapes_are_those_of_the_annotations(method: str, pattern: str) -> None:
    check_answer(method, PATTERNS[pattern](), draw(dtype=torch.float32), torch.float32)


@pytest.mark.usefixtures("checked_shapes")
def test_a_shape_that_is_not_that_of_the_annotation_is_found() -> None:
    with pytest.raises(TypeCheckError, match="in"):
        Gram.from_matrix(torch.ones(3))
    with pytest.raises(TypeCheckError):
        draw().gradient(torch.ones(3, dtype=torch.float64))


@each_method
@each_pattern
def test_torch_and_numpy_find_the_same(method: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU numpy makes the passes that torch makes on all other devices."""
    by_numpy = run(CLAIMS[method].method, draw(), PATTERNS[pattern]())
    monkeypatch.setattr(passes, "NUMPY", False)
    by_torch = run(CLAIMS[method].method, draw(), PATTERNS[pattern]())
    same(by_torch, by_numpy)
    assert by_torch.relative_error == pytest.approx(by_numpy.relative_error, rel=1e-9)


# --- what each claims


@who(lambda claims: claims.weights_kept)
@each_pattern
def test_methods_that_choose_masks_only_keep_the_weights(method: str, pattern: str) -> None:
    claims = CLAIMS[method]
    problem = draw("dead_columns")
    solution = run(claims.method, problem, PATTERNS[pattern]())
    assert torch.equal(solution.weight, problem.W0 * solution.mask)


@who(lambda claims: claims.scale)
@each_pattern
@pytest.mark.parametrize("family", ["correlated", "dead_columns"])
def test_multiplying_the_gram_changes_nothing(method: str, pattern: str, family: str) -> None:
    claims = CLAIMS[method]
    W0, H = FAMILIES[family](OUT, INPUTS, 0)
    plain = run(claims.method, make(W0, H), PATTERNS[pattern]())
    scaled = run(claims.method, make(W0, 4 * H), PATTERNS[pattern]())
    same(scaled, plain)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-6)


@who(lambda claims: claims.scale)
@pytest.mark.parametrize(("weight", "gram"), [(2.0**20, 2.0**40), (2.0**-30, 2.0**-60)])
@pytest.mark.parametrize("pattern", ["layer", "1:3"])
@each_dtype
def test_huge_and_tiny_scales(method: str, pattern: str, weight: float, gram: float, dtype: torch.dtype) -> None:
    claims = CLAIMS[method]
    W0, H = (tensor.to(dtype) for tensor in FAMILIES["well_conditioned"](OUT, INPUTS, 0))
    plain = run(claims.method, make(W0, H, dtype), PATTERNS[pattern]())
    scaled = run(claims.method, make(W0 * weight, H * gram, dtype), PATTERNS[pattern]())
    if dtype == torch.float64:
        scaled.weight /= weight
        same(scaled, plain)
    # in float32 supports may differ by rounding, grades by little
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=0.01)


@who(lambda claims: claims.rows)
@each_pattern
def test_permuting_rows_permutes_the_answer(method: str, pattern: str) -> None:
    claims = CLAIMS[method]
    W0, H = FAMILIES["correlated"](OUT, INPUTS, 2)
    order = torch.randperm(OUT, generator=torch.Generator().manual_seed(0))
    allowed = PATTERNS[pattern]()
    moved = Fixed(allowed.mask[order]) if isinstance(allowed, Fixed) else allowed
    plain, permuted = run(claims.method, make(W0, H), allowed), run(claims.method, make(W0[order], H), moved)
    same(permuted, replace(plain, weight=plain.weight[order], mask=plain.mask[order]))


@who(lambda claims: claims.inputs)
@pytest.mark.parametrize("pattern", ["layer", "row", "fixed"])
def test_permuting_inputs_permutes_the_answer(method: str, pattern: str) -> None:
    claims = CLAIMS[method]
    W0, H = FAMILIES["correlated"](OUT, INPUTS, 2)
    order = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(0))
    allowed = PATTERNS[pattern]()
    moved = Fixed(allowed.mask[:, order]) if isinstance(allowed, Fixed) else allowed
    plain = run(claims.method, make(W0, H), allowed)
    permuted = run(claims.method, make(W0[:, order], H[order][:, order]), moved)
    same(permuted, replace(plain, weight=plain.weight[:, order], mask=plain.mask[:, order]))


@each_method
@each_pattern
def test_independent_rows_can_be_split(method: str, pattern: str) -> None:
    claims, allowed = CLAIMS[method], PATTERNS[pattern]()
    assert claims.method.rows_independent(allowed) <= (pattern in claims.independent)
    if pattern not in claims.independent:
        return
    W0, H = FAMILIES["correlated"](OUT, INPUTS, 3)
    whole = run(claims.method, make(W0, H), allowed)
    for a, b in ((0, 5), (5, 12)):
        part = run(claims.method, make(W0[a:b], H), allowed.rows(a, b, (OUT, INPUTS)))
        same(part, replace(whole, weight=whole.weight[a:b], mask=whole.mask[a:b]))


@who(lambda claims: claims.not_above is not None)
@each_pattern
@each_dtype
def test_no_method_is_above_what_it_improves(method: str, pattern: str, dtype: torch.dtype) -> None:
    claims = CLAIMS[method]
    assert claims.not_above is not None
    for family in FAMILIES:
        problem = draw(family, dtype)
        better = run(claims.method, problem, PATTERNS[pattern]()).relative_error
        worse = run(claims.not_above, problem, PATTERNS[pattern]()).relative_error
        assert better <= worse * NOT_ABOVE[dtype] + NOTHING[dtype], family


@who(lambda claims: claims.ignores_inputs)
@each_pattern
def test_methods_that_ignore_the_inputs(method: str, pattern: str) -> None:
    claims = CLAIMS[method]
    W0, H = FAMILIES["correlated"](OUT, INPUTS, 0)
    same(
        run(claims.method, make(W0, H), PATTERNS[pattern]()),
        run(claims.method, make(W0, torch.eye(INPUTS)), PATTERNS[pattern]()),
    )


# --- nothing or everything to choose, ties, dead inputs


@each_method
@pytest.mark.parametrize(
    ("allowed", "kept"),
    [
        (Unstructured(0.999), 0),  # 288 weights: 0.999 * 288 rounds to 288
        (PerRow(0.99), 0),
        (Fixed(torch.zeros(OUT, INPUTS, dtype=torch.bool)), 0),
        (Unstructured(0.0), OUT * INPUTS),
        (Unstructured(0.001), OUT * INPUTS),
        (PerRow(0.01), OUT * INPUTS),
        (Fixed(torch.ones(OUT, INPUTS, dtype=torch.bool)), OUT * INPUTS),
    ],
    ids=["layer none", "row none", "fixed empty", "dense", "layer all", "row all", "fixed full"],
)
def test_nothing_to_choose(method: str, allowed: Pattern, kept: int) -> None:
    problem = draw()
    solution = run(CLAIMS[method].method, problem, allowed)
    assert not solution.status.failed
    assert int(solution.mask.sum()) == kept
    if kept and CLAIMS[method].rounds:
        assert 0 < solution.relative_error < 0.02
        return
    assert solution.status is Status.TRIVIAL
    assert torch.equal(solution.weight, problem.W0 if kept else torch.zeros_like(problem.W0))
    assert solution.relative_error == pytest.approx(0 if kept else 1)


@each_method
@each_pattern
def test_one_row_and_one_column_more_than_nothing(method: str, pattern: str) -> None:
    if pattern in ("layer", "row", "1:3"):
        problem = draw("well_conditioned", out=1, inputs=3)
        allowed = PATTERNS[pattern]()
        solution = run(CLAIMS[method].method, problem, allowed)
        assert int(solution.mask.sum()) == allowed.count((1, 3)) == 1
        assert not solution.status.failed
    if pattern == "layer":  # one input: its weights compete over the rows
        solution = run(CLAIMS[method].method, draw("well_conditioned", out=5, inputs=1), Unstructured(0.6))
        assert int(solution.mask.sum()) == 2
        assert not solution.status.failed


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "admm1", "pcg"])
def test_equal_scores_keep_the_lowest_index(method: str) -> None:
    problem = make(torch.ones(4, 8), torch.eye(8))
    for allowed in (Unstructured(0.5), PerRow(0.5), NM(2, 4)):
        expected = allowed.project(torch.zeros(4, 8))
        assert torch.equal(run(CLAIMS[method].method, problem, allowed).mask, expected), str(allowed)


@pytest.mark.parametrize("method", [name for name in CLAIMS if name not in BLIND])
@each_dtype
def test_dead_inputs_are_pruned_first_and_kept_ones_stay(method: str, dtype: torch.dtype) -> None:
    problem = draw("dead_columns", dtype)
    alive = int((~problem.dead).sum()) * OUT
    solution = run(CLAIMS[method].method, problem, Unstructured(0.2))
    if method not in LEFT_TO_RIGHT:  # which hand out budgets per block of columns
        assert not solution.mask[:, problem.dead].any()
    # more is kept than there are live weights: some dead ones must stay, as they were, and nothing is lost
    few = Unstructured(0.04)
    assert few.count((OUT, INPUTS)) > alive
    solution = run(CLAIMS[method].method, problem, few)
    dead = solution.mask & problem.dead
    assert bool(dead.any())
    if CLAIMS[method].rounds:  # a large one may be beyond the last number of the grid
        torch.testing.assert_close(solution.weight[dead], problem.W0[dead], rtol=0, atol=0.6)
    elif method not in LEFT_TO_RIGHT:
        assert torch.equal(solution.weight[dead], problem.W0[dead])
        assert solution.relative_error <= (1e-20 if dtype == torch.float64 else 1e-10)


@each_method
def test_a_gram_of_no_token(method: str) -> None:
    problem = make(torch.randn(OUT, INPUTS, generator=torch.Generator().manual_seed(0)), torch.zeros(INPUTS, INPUTS))
    for pattern in ("layer", "2:4"):
        solution = run(CLAIMS[method].method, problem, PATTERNS[pattern]())
        assert not solution.status.failed
        assert solution.relative_error == 0
        assert bool(torch.isfinite(solution.weight).all())


@each_method
def test_a_weight_of_zeros(method: str) -> None:
    for pattern in ("layer", "2:4"):
        solution = run(CLAIMS[method].method, make(torch.zeros(OUT, INPUTS), draw().H), PATTERNS[pattern]())
        assert not solution.status.failed
        assert not solution.weight.any()
        assert solution.relative_error == 0


@each_dtype
@pytest.mark.parametrize("family", ["rank_deficient", "duplicate_columns"])
def test_a_refit_of_a_singular_gram_stays_near_its_start(family: str, dtype: torch.dtype) -> None:
    # Weights along directions that H says nothing about would be lost in a cast, or blow up elsewhere.
    problem = draw(family, dtype)
    for refit in (PCG(steps=50), Backsolve()):
        solution = run(Then(Wanda(), refit), problem, Unstructured(0.3))
        assert float(solution.weight.abs().max()) < 20 * float(problem.W0.abs().max()), refit


# --- mistakes, and what cannot be computed


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@each_method
def test_nan_and_infinity_are_errors_that_name_the_layer(method: str, bad: float) -> None:
    W0, H = FAMILIES["correlated"](OUT, INPUTS, 0)
    broken = W0.clone()
    broken[3, 5] = bad
    with pytest.raises(NumericalError, match=r"model\.o_proj"):
        run(CLAIMS[method].method, make(broken, H), Unstructured(0.5), name="model.o_proj")
    broken = H.clone()
    broken[2, 7] = broken[7, 2] = bad
    with pytest.raises(NumericalError, match=r"model\.o_proj"):
        run(CLAIMS[method].method, make(W0, broken), Unstructured(0.5), name="model.o_proj")
    for trivial in (Unstructured(0.0), Fixed(torch.zeros(OUT, INPUTS, dtype=torch.bool))):
        with pytest.raises(NumericalError, match=r"model\.o_proj"):
            run(CLAIMS[method].method, make(W0, broken), trivial, name="model.o_proj")


@each_method
def test_a_pattern_that_does_not_fit_names_the_layer(method: str) -> None:
    with pytest.raises(
        PatternError, match=r"pattern is 2:5, but model\.up_proj has 8 inputs, which 5 does not divide"
    ):
        run(CLAIMS[method].method, draw(inputs=8), NM(2, 5), name="model.up_proj")
    with pytest.raises(PatternError, match=r"model\.up_proj has shape \(12, 8\)"):
        run(CLAIMS[method].method, draw(inputs=8), Fixed(uneven_mask()), name="model.up_proj")


def test_solve_takes_tensors() -> None:
    W0, H = FAMILIES["correlated"](OUT, INPUTS, 0)
    by_tensor = rarefy.solve(W0, H, rarefy.PerRow(0.5), rarefy.Wanda())
    by_gram = rarefy.solve(W0, Gram.from_matrix(H), rarefy.PerRow(0.5), rarefy.Wanda())
    same(by_tensor, by_gram)
    assert by_tensor.sparsity == pytest.approx(0.5)
    assert (
        rarefy.solve(W0.bfloat16(), H.float(), rarefy.PerRow(0.5), rarefy.SparseGPT()).weight.dtype == torch.float32
    )
    skewed = H.clone()
    skewed[0, 3] *= 2
    with pytest.raises(InputError, match="gram is not symmetric"):
        rarefy.solve(W0, skewed, rarefy.PerRow(0.5), rarefy.Wanda())
    for weight, gram in ((W0[:, :5], H), (W0[0], H), (W0, H[:5]), (W0, H[0])):
        with pytest.raises(InputError):
            rarefy.solve(weight, gram, rarefy.PerRow(0.5), rarefy.Wanda())


@pytest.mark.parametrize("refit", [PCG(), Backsolve(), Quantize()], ids=str)
def test_refits_cannot_come_first(refit: Method) -> None:
    with pytest.raises(MethodError, match=f"cannot come first: write for example wanda\\+{refit}"):
        run(refit, draw(), Unstructured(0.5))
    with pytest.raises(MethodError, match="cannot come first"):
        refit.solve(draw(), Unstructured(0.5))
    with pytest.raises(MethodError, match="cannot come first"):
        Then(refit, PCG())


def test_more_damping_than_asked_for_is_said() -> None:
    W0 = torch.randn(OUT, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = make(W0, indefinite(-0.05))
    solution = run(SparseGPT(), problem, Unstructured(0.5))
    assert solution.status is Status.DAMPED
    assert not solution.status.failed
    assert solution.details["damping"] == pytest.approx(0.1)
    # and still heard of when something follows
    assert run(Then(SparseGPT(), PCG()), problem, Unstructured(0.5)).status is Status.DAMPED
    plain = run(SparseGPT(), draw(), Unstructured(0.5))
    assert plain.status is Status.SOLVED
    assert plain.details["damping"] == 0.01


def test_an_exact_refit_says_all_the_damping_that_it_took() -> None:
    W0 = torch.randn(OUT, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = run(Then(Magnitude(), Backsolve()), make(W0, indefinite(-1e-5)), Unstructured(0.1))
    assert solution.status is Status.DAMPED
    assert 0 < float(solution.details["damping"]) < 1e-3


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4"])
@pytest.mark.parametrize("tokens", [40, 90])
def test_sparsegpt_does_not_go_by_a_factor_that_is_noise(tokens: int, pattern: str) -> None:
    """Fewer tokens than inputs and next to no damping: in float32 every pivot may still be positive."""
    X = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(0)) + 0.5
    W0 = torch.randn(OUT, 96, generator=torch.Generator().manual_seed(1))
    for damping in (0.0, 1e-7, 1e-6):
        problem = LayerProblem(W0, Gram.from_matrix(X.T @ X))
        solution = run(SparseGPT(damping=damping), problem, PATTERNS[pattern]())
        assert solution.status is Status.DAMPED
        assert damping < float(solution.details["damping"]) <= 1e-3
        asked = LayerProblem(W0.double(), Gram.from_matrix(X.double().T @ X.double()))
        exact = run(SparseGPT(damping=float(solution.details["damping"])), asked, PATTERNS[pattern]())
        assert solution.relative_error <= 1.5 * exact.relative_error + 1e-4


def test_what_cannot_be_factored_is_a_failure_and_masked() -> None:
    H = torch.eye(INPUTS, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1e9
    W0 = FAMILIES["identity"](OUT, INPUTS, 0)[0]
    for name in ("sparsegpt", "admm", "alps"):
        problem = make(W0, H)
        for pattern in PATTERNS.values():
            solution = run(METHODS[name], problem, pattern())
            assert solution.status is Status.NOT_FACTORED, name
            assert solution.status.failed
            assert "positive definite" in str(solution.details["failure"])
            assert torch.equal(solution.mask, pattern().project(wanda_scores(problem)))
            assert torch.equal(solution.weight, problem.W0 * solution.mask)


@dataclass(frozen=True)
class Stub(Method):
    """Answers with whatever a test wants it to."""

    name: ClassVar[str] = "stub"
    summary: ClassVar[str] = "for tests"
    answer: Callable[[LayerProblem, Pattern], Solution] = field(
        default=lambda problem, pattern: Solution(problem.W0, problem.W0 > 9)
    )
    takes_start: ClassVar[bool] = True

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        return self.answer(problem, pattern)


def _nan(problem: LayerProblem, pattern: Pattern) -> Solution:
    mask = pattern.project(problem.W0.abs())
    return Solution((problem.W0 * mask).masked_fill(mask, torch.nan), mask)


def _raises(problem: LayerProblem, pattern: Pattern) -> Solution:
    raise NumericalError("no luck today")


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [(_nan, Status.NOT_FINITE, "NaN or infinity"), (_raises, Status.NOT_FACTORED, "no luck today")],
)
def test_a_method_that_fails_is_reported_and_masked(answer: Any, status: Status, reason: str) -> None:
    problem = draw()
    solution = run(Stub(answer), problem, PerRow(0.5))
    assert solution.status is status
    assert solution.status.failed
    assert reason in str(solution.details["failure"])
    assert torch.equal(solution.mask, PerRow(0.5).project(wanda_scores(problem)))
    assert torch.equal(solution.weight, problem.W0 * solution.mask)
    assert solution.relative_error == problem.relative_error(solution.weight)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda problem, pattern: Solution(problem.W0, pattern.project(problem.W0)), "not zero outside its mask"),
        (lambda problem, pattern: Solution(problem.W0[:2], pattern.project(problem.W0)[:2]), "another shape"),
        (lambda problem, pattern: Solution(problem.W0, torch.ones_like(problem.W0, dtype=torch.bool)), "keeps 288"),
    ],
)
def test_a_method_that_breaks_the_contract_is_an_error(answer: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        run(Stub(answer), draw(), Unstructured(0.5))


@dataclass(frozen=True)
class Exploding(IterativeMethod[Tensor]):
    """Doubles its state in the exponent until it is infinite."""

    name: ClassVar[str] = "exploding"
    summary: ClassVar[str] = "for tests"
    steps: int = hyper(30, "steps", low=1)

    def init(self, problem: LayerProblem, pattern: Pattern, start: Solution | None) -> Tensor:
        return problem.W0.clone()

    def max_steps(self, state: Tensor) -> int:
        return self.steps

    def step(self, state: Tensor, t: int) -> dict[str, float]:
        state.square_().mul_(2)
        return {"size": float(state.abs().max())}

    def iterate(self, state: Tensor) -> Tensor:
        return state

    def finish(self, state: Tensor) -> Solution:
        mask = Unstructured(0.5).project(state)
        return Solution(state * mask, mask)


def test_a_diverging_method_is_a_failure_with_its_name() -> None:
    solution = run(Exploding(), draw(), Unstructured(0.5))
    assert solution.status is Status.NOT_FINITE
    assert solution.status.failed
    assert solution.details["failure"] == "exploding diverged within 30 steps."
    assert bool(torch.isfinite(solution.weight).all())


def test_the_driver_counts_traces_and_stops() -> None:
    solution = run(Exploding(steps=2), draw(), Unstructured(0.5))
    assert solution.status is Status.STEP_LIMIT
    assert solution.steps == len(solution.trace["size"]) == 2
    by_support = run(ALPSPaper(pcg_steps=0), draw(), Unstructured(0.5))
    assert by_support.status is Status.CONVERGED
    assert by_support.steps == len(by_support.trace["rho"]) == len(by_support.trace["support change"])
    assert 3 <= by_support.steps < 300
    assert by_support.steps % 3 == 0
    assert run(ADMM(steps=7), draw(), Unstructured(0.5)).steps == 7
    alps = run(ALPS(steps=20, levels=10, pcg_steps=4, rtol=0), draw(), Unstructured(0.5))
    assert alps.steps == 24
    assert len(alps.trace["rho"]) == 20
    assert len(alps.trace["residual"]) == 5
    assert alps.trace["rho"][0] == pytest.approx(ALPS().rho_first)
    assert alps.trace["rho"][-1] == pytest.approx(ALPS().rho_last)
    assert alps.trace["rho"] == sorted(alps.trace["rho"])
    assert len(set(alps.trace["rho"])) == 10
    both_ends = run(ALPS(steps=4, levels=2, rtol=0), draw(), Unstructured(0.5)).trace["rho"]
    assert both_ends == pytest.approx([ALPS().rho_first] * 2 + [ALPS().rho_last] * 2)


def test_alps_holds_each_penalty_for_its_share_of_the_steps() -> None:
    for steps, levels in ((24, 6), (11, 4), (3, 8), (5, 1)):
        trace = run(ALPS(steps=steps, levels=levels), draw(), Unstructured(0.5)).trace["rho"]
        ratios = [10 ** (level / max(1, min(levels, steps) - 1)) for level in range(min(levels, steps))]
        expected = [0.1 * ratios[t * len(ratios) // steps] for t in range(steps)]
        assert trace == pytest.approx(expected)


# --- inputs of unlike energy


def massive(factor: float, seed: int, inputs: int = 64) -> tuple[LayerProblem, LayerProblem]:
    """A layer, and the same weight on held-out tokens, with three inputs ``factor`` times as large as they were."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.logspace(0, -2, inputs, dtype=torch.float64)  # inputs of a real layer are as correlated
    X = torch.randn(1024, inputs, generator=generator, dtype=torch.float64) @ (spectrum[:, None] * right.T)
    X[:, [5, 20, 41]] *= factor
    W0 = torch.randn(16, inputs, generator=generator, dtype=torch.float64)
    seen, held_out = (LayerProblem(W0, Gram.from_matrix(part.T @ part)) for part in X.split(512))
    return seen, held_out


@pytest.mark.parametrize("factor", [1.0, 12.0, 1000.0])
@pytest.mark.parametrize(("method", "most"), [(ALPS(), 0.2), (ADMM(), 0.2), (SparseGPT(), 0.7)], ids=str)
def test_massive_inputs_do_not_drown_the_others_in_damping(method: Method, most: float, factor: float) -> None:
    """The error on held-out tokens is at most this share of Wanda's, of three problems in the mean."""
    ours, wandas = 1.0, 1.0
    for seed in range(3):
        seen, held_out = massive(factor, seed)
        ours *= held_out.relative_error(run(method, seen, Unstructured(0.5)).weight)
        wandas *= held_out.relative_error(run(Wanda(), seen, PerRow(0.5)).weight)
    assert ours ** (1 / 3) <= most * wandas ** (1 / 3)


def test_the_papers_damping_drowns_them_and_the_balanced_error_shows_it() -> None:
    small, large = (massive(factor, 0)[0] for factor in (1.0, 1000.0))
    papers = [run(ALPSPaper(), problem, Unstructured(0.5)) for problem in (small, large)]
    ours = [run(ALPS(), problem, Unstructured(0.5)) for problem in (small, large)]
    assert papers[1].relative_error < 0.1 * papers[0].relative_error  # which looks better, and is not
    assert papers[1].balanced_error > 8 * papers[0].balanced_error
    assert ours[1].balanced_error < 3 * ours[0].balanced_error


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4"])
@pytest.mark.parametrize("name", ["sparsegpt", "admm", "admm-reselect", "admm1", "alps", "pcg"])
def test_the_unit_of_an_input_does_not_matter(name: str, pattern: str) -> None:
    """An input that is multiplied by a number, and its weights divided by it, is the same layer."""
    W0, H = FAMILIES["correlated"](OUT, INPUTS, 0)
    units = 10 ** torch.linspace(-3, 3, INPUTS, dtype=torch.float64)
    plain = run(CLAIMS[name].method, make(W0, H), PATTERNS[pattern]())
    other = run(CLAIMS[name].method, make(W0 / units, H * units * units[:, None]), PATTERNS[pattern]())
    other.weight *= units
    same(other, plain)


# --- N:M on the way


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8)], ids=str)
@pytest.mark.parametrize("family", ["ill_conditioned", "correlated"])
def test_gradual_groups_are_not_above_those_chosen_at_once(family: str, pattern: Pattern) -> None:
    gradual, at_once = 1.0, 1.0
    for seed in range(4):
        problem = draw(family, seed=seed, out=24, inputs=48)
        gradual *= run(ADMM(), problem, pattern).relative_error
        at_once *= run(ADMM(schedule="reselect"), problem, pattern).relative_error
    assert gradual <= at_once


# --- conjugate gradients and exact refits


@each_dtype
@each_pattern
@pytest.mark.parametrize("family", ["ill_conditioned", "rank_deficient", "correlated", "dead_columns"])
def test_each_pcg_step_lowers_the_loss(family: str, pattern: str, dtype: torch.dtype) -> None:
    problem, allowed = draw(family, dtype), PATTERNS[pattern]()
    start = run(Wanda(), problem, allowed)
    refits = (Then(Wanda(), PCG(steps=steps, rtol=0)) for steps in range(1, 11))
    losses = [start.relative_error, *(run(refit, problem, allowed).relative_error for refit in refits)]
    for before, after in itertools.pairwise(losses):
        assert after <= before * NOT_ABOVE[dtype] + NOTHING[dtype]
    assert losses[-1] < 0.999 * losses[0]


@each_pattern
@pytest.mark.parametrize("family", ["well_conditioned", "correlated", "dead_columns", "diagonal"])
def test_pcg_ends_where_the_gradient_is_zero_on_the_support(family: str, pattern: str) -> None:
    problem, allowed = draw(family), PATTERNS[pattern]()
    many = run(Then(Wanda(), PCG(steps=4 * INPUTS, rtol=1e-12)), problem, allowed)
    exact = run(Then(Wanda(), Backsolve()), problem, allowed)
    scale = float(problem.target.abs().max())
    for solution in (many, exact):
        assert float((problem.gradient(solution.weight) * solution.mask).abs().max()) <= 1e-8 * scale
    same(many, exact)
    assert exact.status is Status.SOLVED
    # and it is the dense solve, row by row
    for i in range(OUT):
        support = exact.mask[i] & ~problem.dead
        if support.any():
            dense = torch.linalg.solve(problem.H[support][:, support], problem.target[i, support])
            torch.testing.assert_close(exact.weight[i, support], dense, **SAME[torch.float64])


def test_pcg_stops_where_its_residual_has_fallen() -> None:
    problem = draw("well_conditioned")
    solution = run(Then(Wanda(), PCG(steps=200, rtol=1e-3)), problem, PerRow(0.5))
    residuals = solution.trace["residual"]
    assert solution.status is Status.CONVERGED
    assert 2 < solution.steps == len(residuals) - 1 < 50
    assert residuals[-1] <= 1e-3 * residuals[0]
    assert run(Then(Wanda(), PCG(steps=3)), problem, PerRow(0.5)).status is Status.STEP_LIMIT
    none = run(Then(Wanda(), PCG(steps=0)), problem, PerRow(0.5))
    torch.testing.assert_close(none.weight, run(Wanda(), problem, PerRow(0.5)).weight)


def test_rows_that_are_done_stand_still() -> None:
    problem = draw("well_conditioned")
    scaled = problem.scaled
    W0 = problem.to_scaled(problem.W0, scaled)
    mask = PerRow(0.5).project(W0.abs())
    W = W0 * mask
    W[0] = W0[0] * mask[0]
    mask[0] = True
    W[0] = W0[0]  # row 0 is full and exact from the start
    conjugate_gradients_(W, problem.W0, mask, scaled, 0.0, 20, 1e-6)
    assert torch.equal(W[0], W0[0])
    assert bool(torch.isfinite(W).all())


def test_strips_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw("well_conditioned")
    method = Then(Wanda(), PCG(steps=30, rtol=1e-3))
    whole = run(method, problem, PerRow(0.5))
    monkeypatch.setattr("rarefy.methods.refit._STRIP", 2 * problem.shape[1])
    strips = run(method, problem, PerRow(0.5))
    assert (strips.steps, strips.status) == (whole.steps, whole.status)
    torch.testing.assert_close(strips.weight, whole.weight)
    torch.testing.assert_close(strips.trace["residual"], whole.trace["residual"])


def test_pcg_damping_pulls_towards_the_dense_weight() -> None:
    problem = draw("rank_deficient")
    distances = []
    for damping in (0.0, 0.1, 100.0):
        solution = run(Then(Wanda(), PCG(steps=100, damping=damping)), problem, PerRow(0.5))
        distances.append(float((solution.weight - problem.W0 * solution.mask).norm()))
    assert distances[0] > distances[1] > distances[2]


def test_backsolve_in_batches_of_unlike_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, allowed = draw(), Fixed(uneven_mask())
    whole = run(Then(Wanda(), Backsolve()), problem, allowed)
    monkeypatch.setattr("rarefy.methods.refit._BATCH_BYTES", 8 * 2 * 12**2)
    same(run(Then(Wanda(), Backsolve()), problem, allowed), whole)


# --- ALPS, ADMM and SparseGPT in closed form


@pytest.mark.parametrize("family", ["well_conditioned", "correlated", "ill_conditioned", "rank_deficient"])
@pytest.mark.parametrize("pattern", ["layer", "row", "2:4"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alps_gap_falls_as_its_penalty_grows(family: str, pattern: str, seed: int) -> None:
    # Theorem 1: ||W - D|| <= C / rho.
    problem, method = draw(family, seed=seed), ALPSPaper()
    state = method.init(problem, PATTERNS[pattern](), None)
    products = []
    for t in range(1, method.max_steps(state) + 1):
        method.step(state, t)
        products.append(state.rho * float((state.W - state.D).norm()))
        if method.stop(state, t):
            break
    half = len(products) // 2
    assert half >= 3
    assert max(products[half:]) < 2 * max(products[:half])


def test_alps_multiplies_its_penalty_by_the_papers_factors() -> None:
    method = ALPSPaper()
    state = method.init(draw(seed=4), Unstructured(0.6), None)
    looked, kept = state.mask, int(state.mask.sum())
    seen = set()
    for t in range(1, 301):
        rho = state.next_rho
        method.step(state, t)
        assert state.rho == rho
        if t % 3:
            assert state.next_rho == rho
            continue
        changed = int((state.mask ^ looked).sum())
        looked = state.mask
        if changed == 0:
            assert method.stop(state, t)
            break
        factor = 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
        assert state.next_rho == pytest.approx(rho * factor)
        seen.add(factor)
    assert seen >= {1.2, 1.3}


def test_alps_restarts_with_a_lower_penalty_where_its_support_does_not_move() -> None:
    method = ALPSPaper(rho=1e4)  # so stiff that nothing moves
    solution = run(method, draw("well_conditioned"), Unstructured(0.6))
    assert min(solution.trace["rho"]) <= 1e4 / 5
    assert sum(solution.trace["support change"]) > 0
    loose = run(ALPSPaper(), draw("well_conditioned"), Unstructured(0.6))
    assert solution.relative_error < 1.3 * loose.relative_error


def test_admm_chooses_gradually_and_freezes() -> None:
    method = ADMM()
    state = method.init(draw(), Unstructured(0.6), None)
    size, masks = OUT * INPUTS, []
    for t in range(1, 21):
        method.step(state, t)
        masks.append(state.mask)
        sparsity = 0.6 * (1 - (1 - min(t, 15) / 15) ** 3)
        assert int((~state.mask).sum()) == round(sparsity * size)
    assert all(torch.equal(mask, masks[14]) for mask in masks[14:])
    counts = [int(mask.sum()) for mask in run_masks(ADMM(schedule="reselect"))]
    assert set(counts) == {size - round(0.6 * size)}
    fixed = run_masks(ADMM(schedule="fixed"))
    wanda = run(Wanda(), draw(), Unstructured(0.6)).mask
    assert all(torch.equal(mask, wanda) for mask in fixed)


def run_masks(method: ADMM) -> list[Tensor]:
    state = method.init(draw(), Unstructured(0.6), None)
    masks = []
    for t in range(1, 21):
        method.step(state, t)
        masks.append(state.mask)
    return masks


def test_one_removal_by_sparsegpt_is_the_optimal_brain_surgeons() -> None:
    problem = draw("well_conditioned", out=3)
    mask = torch.ones(3, INPUTS, dtype=torch.bool)
    mask[:, 0] = False  # the first column: all others may make up for it
    solution = run(SparseGPT(damping=0.0), problem, Fixed(mask))
    inverse = torch.linalg.inv(problem.H)
    expected = problem.W0 - problem.W0[:, :1] / inverse[0, 0] * inverse[:1]
    expected[:, 0] = 0
    torch.testing.assert_close(solution.weight, expected, **SAME[torch.float64])
    lost = (problem.W0[:, 0].square() / inverse[0, 0]).sum()
    assert problem.objective(solution.weight) == pytest.approx(float(lost))


def test_sparsegpt_hands_out_exact_budgets_in_blocks() -> None:
    for size, sparsity in itertools.product((1, 5, 7, 24, 128), (0.37, 0.5, 0.9)):
        for allowed in (Unstructured(sparsity), PerRow(sparsity)):
            mask = run(SparseGPT(block_size=size), draw(), allowed).mask
            allowed.check(mask)
            for a in range(0, INPUTS, size):
                b = min(a + size, INPUTS)
                kept, fair = int(mask[:, a:b].sum()), allowed.count((OUT, INPUTS)) * (b - a) / INPUTS
                assert abs(kept - fair) <= (1 if isinstance(allowed, Unstructured) else OUT)
    for size in (1, 6):  # a block is rounded up to whole groups
        NM(2, 4).check(run(SparseGPT(block_size=size), draw(), NM(2, 4)).mask)


# --- what a solve takes


@each_method
@pytest.mark.parametrize("pattern", ["layer", "2:4"])
def test_methods_say_what_they_cost(method: str, pattern: str) -> None:
    small, wide = (CLAIMS[method].method.cost(shape, PATTERNS[pattern]()) for shape in ((OUT, INPUTS), (512, 4096)))
    for cost in (small, wide):
        assert 0 <= cost.products < 1000
        assert cost.weights >= 1
        assert 0 <= cost.grams <= 4


#: (products, weights, grams) at 64 x 128 and 2:4: what the docstring of each method derives, so that a slip is seen.
COSTS = {
    "magnitude": (0, 1, 0),
    "wanda": (0, 1, 0),
    "ria": (0, 4, 0),
    "dass": (0, 2, 0),
    "sparsegpt": (0.5 + 2 / 3, 3, 3),
    "admm": (20 + 1, 7, 2),
    "admm-reselect": (20 + 1, 5, 2),
    "admm1": (20 + 1, 5, 2),
    "alps": (24 + 10 + 1 + 6, 4, 2),
    "sparsefw": (1 + 200 + 10, 6, 0),
    "dsnot": (1, 12, 0),
    "pcg": (10 + 1, 5, 1),
    "backsolve": (8 / 3, 71, 3),
    "quantize": (5.5 + 2 / 3, 6, 3),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_those_of_the_algorithm(name: str) -> None:
    cost = METHODS[name].cost((64, 128), NM(2, 4))
    assert (cost.products, cost.weights, cost.grams) == pytest.approx(COSTS[name])


def test_costs_follow_the_steps_and_add_up() -> None:
    shape, pattern = (64, 32), Unstructured(0.5)
    inverse = 32 / (2 * 64)
    assert ADMM(steps=7).cost(shape, pattern).products == 7 + inverse
    assert ALPS(steps=20, levels=5, pcg_steps=4).cost(shape, pattern).products == 20 + 4 + 1 + 5 * inverse
    assert PCG(steps=3).cost(shape, pattern).products == 4
    assert Swaps().cost(shape, pattern).products > Swaps().cost(shape, NM(2, 4)).products  # groups have fewer pairs
    refits = [DSF(rounds=4, refits=3, refit_steps=steps).cost(shape, pattern).products for steps in (1, 5)]
    assert refits == [4 * 9 + 3 * 6, 4 * 9 + 3 * 6 * 5]
    both = Then(ADMM(steps=7), PCG(steps=3)).cost(shape, pattern)
    assert both.products == 7 + inverse + 4
    assert both.weights >= ADMM().cost(shape, pattern).weights
    assert Stub().cost(shape, pattern).weights >= 8  # nothing is known of a method of the user's own


# --- composition


def test_then_goes_on_from_what_was_found() -> None:
    problem, allowed = draw(), PerRow(0.6)
    wanda = run(Wanda(), problem, allowed)
    refitted = run(Then(Wanda(), PCG(), Backsolve()), problem, allowed)
    assert torch.equal(refitted.mask, wanda.mask)
    assert refitted.relative_error < wanda.relative_error
    assert refitted.steps == run(Then(Wanda(), PCG()), problem, allowed).steps
    admm1 = run(Then(SparseGPT(), ADMM(schedule="fixed")), problem, allowed)
    assert torch.equal(admm1.mask, run(SparseGPT(), problem, allowed).mask)
    assert str(Then(Wanda(), ADMM(schedule="fixed"), PCG())) == "wanda+admm1+pcg"
    assert Then(Wanda(), PCG()) == Then(Wanda(), PCG())
    assert Then(Wanda(), PCG()) != Then(Wanda(), PCG(steps=3))


def test_then_adds_up_steps_and_traces() -> None:
    both = run(Then(ADMM(steps=6), PCG(steps=4, rtol=0)), draw(), Unstructured(0.6))
    assert both.steps == 10
    assert len(both.trace["residual"]) == 5


def test_then_refuses_what_cannot_follow() -> None:
    for starts_afresh in (Wanda(), SparseGPT(), ALPS()):
        with pytest.raises(MethodError, match="only be the first part"):
            Then(Magnitude(), starts_afresh)
    for wrong in ((), (Wanda,), (Wanda(), "pcg")):
        with pytest.raises(MethodError, match="takes one or more methods"):
            Then(*wrong)  # type: ignore[arg-type]


def test_what_parts_need_the_whole_needs() -> None:
    assert Then(Wanda(), PCG()).default_scope == "row"
    assert Then(Magnitude(), PCG()).default_scope == "layer"
    assert not Then(Wanda(), PCG()).needs_means
    assert Then(Wanda(), PCG()).rows_independent(PerRow(0.5))
    assert not Then(Wanda(), PCG()).rows_independent(Unstructured(0.5))


def test_best_of_keeps_the_lowest_loss() -> None:
    parts = (Magnitude(), Wanda(), Then(Wanda(), PCG()), SparseGPT())
    for family, pattern in itertools.product(("correlated", "ill_conditioned"), ("layer", "2:4")):
        problem = draw(family)
        best = run(BestOf(*parts), problem, PATTERNS[pattern]())
        errors = {str(part): run(part, problem, PATTERNS[pattern]()).relative_error for part in parts}
        assert best.relative_error == min(errors.values())
        assert best.details["best"] == min(errors, key=errors.__getitem__)
    assert str(BestOf(Magnitude(), Wanda())) == "best of magnitude, wanda"
    refitted = run(Then(BestOf(Magnitude(), Wanda()), PCG()), problem, NM(2, 4))
    assert refitted.relative_error < run(BestOf(Magnitude(), Wanda()), problem, NM(2, 4)).relative_error


# --- names and hyperparameters


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in METHODS if not METHODS[name].needs_start),
        "wanda+pcg",
        "magnitude+backsolve",
        "sparsegpt+admm1+pcg",
    ],
)
def test_a_name_makes_the_method_of_that_name(name: str) -> None:
    method = build(name)
    assert str(method) == name
    for part in method.parts if isinstance(method, Then) else (method,):
        assert part.summary
        assert part.default_scope in ("layer", "row")


def test_settings_change_hyperparameters() -> None:
    assert build("sparsegpt", {"block_size": "64", "damping": 1}) == SparseGPT(damping=1.0, block_size=64)
    assert build("wanda+pcg", {"steps": "3"}) == Then(Wanda(), PCG(steps=3))
    assert build("admm+pcg", {"admm.steps": 5, "pcg.steps": 6}) == Then(ADMM(steps=5), PCG(steps=6))
    assert build("admm", {"schedule": "reselect"}) == ADMM(schedule="reselect")
    assert hyperparameters(SparseGPT()) == {"damping": 0.01, "block_size": 128, "score": "single"}
    assert METHODS["sparsegpt"] == SparseGPT()
    assert build("sparsefw", {"alpha": "0"}).alpha == build("sparsefw", {"alpha": 0}).alpha == 0.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("sparsgpt", {}, "did you mean sparsegpt"),
        ("zzz", {}, "method is 'zzz', but must be one of magnitude, wanda"),
        ("", {}, "method is ''"),
        ("wanda+", {}, "method is ''"),
        ("pcg", {}, "cannot come first"),
        ("backsolve", {}, "write for example wanda+backsolve"),
        ("pcg+wanda", {}, "can"),
        ("wanda+sparsegpt", {}, "only be the first part"),
        ("sparsegpt", {"blocksize": "64"}, "did you mean block_size"),
        ("sparsegpt", {"block_size": "many"}, "must be a whole number"),
        ("sparsegpt", {"block_size": "1.5"}, "must be a whole number"),
        ("sparsegpt", {"block_size": 1.5}, "must be a whole number"),
        ("sparsegpt", {"block_size": True}, "must be a whole number"),
        ("sparsegpt", {"block_size": 0}, "of at least 1"),
        ("sparsegpt", {"damping": "nan"}, "sparsegpt.damping is nan, but must be a number of at least 0"),
        ("sparsegpt", {"damping": "inf"}, "must be a number"),
        ("sparsegpt", {"damping": -0.1}, "of at least 0"),
        ("wanda", {"damping": 1}, "wanda has no hyperparameters"),
        ("admm", {"rho": 0}, "admm.rho is 0.0"),
        ("sparsefw", {"alpha": "most"}, "must be a number"),
        ("sparsefw", {"alpha": 1.5}, "sparsefw.alpha is 1.5, but must be a number from 0 to 1"),
        ("admm", {"steps": -3}, "admm.steps is -3"),
        ("admm", {"schedule": "linear"}, "one of cubic, reselect, fixed"),
        ("sparsefw", {"rule": "x"}, "one of line-search, open-loop"),
        ("admm+pcg", {"steps": 3}, "which several parts have"),
        ("admm+pcg", {"wanda.steps": 3}, "PART one of admm, pcg"),
        ("nowhere.at_all:Method", {}, "cannot be imported"),
        ("rarefy:Gram", {}, "a subclass of rarefy.Method"),
    ],
)
def test_bad_names_and_settings_are_one_sentence(name: str, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MethodError) as caught:
        build(name, settings)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in METHODS if hyperparameters(METHODS[name])])
def test_every_number_refuses_what_is_none(name: str) -> None:
    for key, value in hyperparameters(METHODS[name]).items():
        for bad in (math.nan, math.inf, "text", True, -1, *([] if value is None else [None])):
            with pytest.raises(MethodError, match=f"{type(METHODS[name]).name}.{key}"):
                replace(METHODS[name], **{key: bad})
        assert replace(METHODS[name], **{key: value}) == METHODS[name]
