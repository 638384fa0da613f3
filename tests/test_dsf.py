"""Double sparse factorization: budgets, what each part lowers, known answers, and what is said of the result."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rarefy
from problems import FAMILIES
from rarefy.errors import InputError, MethodError, PatternError
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import NM, PerRow, Unstructured
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution
from rarefy.methods import build
from rarefy.methods.base import run
from rarefy.methods.dsf import DSF, refit_, stored_bits

NAME = "rarefy.methods.dsf:DSF"


def problem(out: int, inputs: int, family: str = "correlated", seed: int = 0) -> LayerProblem:
    W0, H = FAMILIES[family](out, inputs, seed)
    return LayerProblem(W0, Gram.from_matrix(H))


# --- budgets


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
@pytest.mark.parametrize("sparsity", [0.4, 0.5, 0.7])
@pytest.mark.parametrize("value_bits", [16, 8])
def test_the_factors_take_the_bits_of_the_pattern(shape: tuple[int, int], sparsity: float, value_bits: int) -> None:
    method, pattern = DSF(value_bits=value_bits), Unstructured(sparsity)
    left, right = method.budgets(shape, pattern)
    single = value_bits * pattern.count(shape) + shape[0] * shape[1]
    assert single - value_bits < stored_bits(shape, value_bits, left, right) <= single
    square, other = (left, right) if shape[0] <= shape[1] else (right, left)
    assert 0 < square <= other


@pytest.mark.parametrize("shape", [(16, 16), (12, 24), (24, 12)])
def test_the_factors_keep_what_they_may(shape: tuple[int, int]) -> None:
    one, method = problem(*shape), DSF(rounds=10)
    factors = method.factorise(one, 50, 70)
    assert factors.L.shape == (shape[0], min(shape))
    assert factors.R.shape == (min(shape), shape[1])
    assert 25 < int((factors.L != 0).sum()) <= 50
    assert 35 < int((factors.R != 0).sum()) <= 70


# --- the mathematics


def test_each_refit_lowers_the_error_of_the_true_gram() -> None:
    for seed in range(3):
        one = problem(16, 24, "ill_conditioned", seed)
        factors = DSF(rounds=6, refits=4).factorise(one, 80, 120)
        after = factors.trace["refit error"]
        assert after[0] == min(factors.trace["error"])  # the best round is taken
        assert len(factors.trace["error"]) == 6
        assert after == sorted(after, reverse=True)
        assert after[-1] < after[0]
        scaled = one.to_scaled(one.W0, one.scaled)
        D = factors.product - scaled
        expected = float((D @ one.scaled.A * D).sum() / (scaled @ one.scaled.A * scaled).sum())
        assert after[-1] == pytest.approx(expected, rel=1e-6)


def test_a_refit_is_the_least_squares_solution_on_the_support() -> None:
    """Of R for fixed L, where rows depend on each other: all unknowns in one system."""
    one = problem(6, 8)
    generator = torch.Generator().manual_seed(0)
    L = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 8, generator=generator) < 0.5
    H, W0 = one.H, one.W0
    R = torch.zeros(5, 8, dtype=torch.float64)
    refit_(R, mask, lambda X: L.T @ L @ X @ H, L.T @ W0 @ H, steps=400)
    support = mask.nonzero().tolist()
    root = torch.linalg.cholesky(H)
    columns = []
    for i, j in support:
        X = torch.zeros_like(R)
        X[i, j] = 1
        columns.append((L @ X @ root).flatten())
    best = torch.linalg.lstsq(torch.stack(columns, dim=1), (W0 @ root).flatten().unsqueeze(1)).solution.squeeze(1)
    assert bool((R[~mask] == 0).all())
    torch.testing.assert_close(R[mask], best, rtol=1e-5, atol=1e-7)


def test_a_sparse_weight_is_found_exactly() -> None:
    """The identity and the weight itself are its factors."""
    one = problem(12, 12, "well_conditioned")
    mask = Unstructured(0.8).project(one.W0.abs())
    sparse = LayerProblem(one.W0 * mask, one.gram)
    factors = DSF(rounds=20, refits=3).factorise(sparse, 24, 2 * int(mask.sum()))
    # Damping moves both factors a little from round to round; refits undo it on the supports.
    assert factors.trace["refit error"][-1] < 1e-4


def test_a_product_of_two_sparse_matrices_is_better_as_such() -> None:
    """A single sparse matrix of as many non-zeros as both factors loses more."""
    generator = torch.Generator().manual_seed(0)

    def sparse(rows: int, columns: int, density: float) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return values * (torch.rand(rows, columns, generator=generator) < density)

    L0, R0 = sparse(48, 48, 0.2), sparse(48, 48, 0.2)
    _, H = FAMILIES["well_conditioned"](48, 48, 0)
    one = LayerProblem(L0 @ R0, Gram.from_matrix(H))
    k = int((L0 != 0).sum()) + int((R0 != 0).sum())
    factors = DSF().factorise(one, k // 2, k - k // 2)
    single = run(build("alps"), one, Unstructured(1 - k / one.W0.numel()))
    assert factors.trace["refit error"][-1] < 0.7 * single.relative_error


def test_the_factors_are_near_the_best_that_there_are() -> None:
    """Of a 2 x 2 weight: all supports of both factors, each refitted in turns from many starts."""
    W0 = torch.tensor([[2.0, 1.0], [0.5, -1.5]], dtype=torch.float64)
    H = torch.tensor([[1.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    one = LayerProblem(W0, Gram.from_matrix(H))
    best = float("inf")
    generator = torch.Generator().manual_seed(0)
    for left, right in itertools.product(itertools.combinations(range(4), 2), itertools.combinations(range(4), 2)):
        masks = [torch.zeros(4, dtype=torch.bool) for _ in range(2)]
        masks[0][list(left)] = masks[1][list(right)] = True
        for _ in range(3):
            L = torch.randn(2, 2, generator=generator, dtype=torch.float64) * masks[0].view(2, 2)
            R = torch.randn(2, 2, generator=generator, dtype=torch.float64) * masks[1].view(2, 2)
            for _ in range(8):
                refit_(L, masks[0].view(2, 2), lambda X, G=R @ H @ R.T: X @ G, W0 @ H @ R.T, 4)
                refit_(R, masks[1].view(2, 2), lambda X, G=L.T @ L: G @ X @ H, L.T @ W0 @ H, 4)
            best = min(best, one.relative_error(L @ R))
    found = DSF(refits=8).factorise(one, 2, 2).trace["refit error"][-1]
    assert best - 1e-9 <= found <= 2 * best  # seen: 1.0


# --- the method, and what is said of its answer


def test_the_answer_is_the_product_and_says_so() -> None:
    one = problem(16, 24)
    solution = run(DSF(rounds=10), one, Unstructured(0.5))
    assert bool(solution.mask.all())
    assert solution.sparsity == 0
    assert not solution.status.failed
    assert 0 < solution.relative_error < 0.5
    assert str(solution.details["weights"]).startswith("the dense product of two sparse factors")
    assert solution.details["stored_bits"] <= solution.details["stored_bits_of_pattern"]  # type: ignore[operator]
    assert torch.linalg.matrix_rank(solution.weight) == 16
    assert torch.equal(solution.weight, run(DSF(rounds=10), one, Unstructured(0.5)).weight)


def test_only_a_method_that_says_so_may_give_a_dense_answer() -> None:
    class Lies(DSF):
        gives_dense = False

    with pytest.raises(MethodError, match="forbids"):
        run(Lies(rounds=4), problem(12, 12), Unstructured(0.5))


def test_what_it_refuses() -> None:
    for pattern in (NM(2, 4), rarefy.Columns(4)):
        with pytest.raises(PatternError, match="^dsf is compared with a sparsity"):
            run(DSF(), problem(12, 12), pattern)
    with pytest.raises(PatternError, match="no bits for values beside masks"):
        run(DSF(), problem(12, 12), PerRow(0.95))
    with pytest.raises(MethodError, match="dsf gives the product of two factors, so it can only be the last part"):
        build(f"{NAME}+pcg")
    with pytest.raises(InputError, match="matching does not go with dsf: it would change the product"):
        rarefy.prune(
            torch.nn.Module(), torch.zeros(1, 1), pattern=PerRow(0.5), method=DSF(), matching=rarefy.Matching()
        )


def test_a_gram_without_a_dead_or_with_one_is_solved() -> None:
    for family in ("dead_columns", "rank_deficient", "duplicate_columns"):
        solution: Solution = run(DSF(rounds=5), problem(12, 24, family), Unstructured(0.5))
        assert not solution.status.failed
        assert bool(solution.weight.isfinite().all())


def test_a_run_promises_no_zeros(shelf: Path, tmp_path: Path) -> None:
    recipe = {"model": str(shelf / "model"), "method": NAME, "sparsity": 0.4, "include": ["*.0.mlp.*"]}
    recipe |= {"calibration": str(shelf / "text.txt"), "num_samples": 4, "sequence_length": 32}
    recipe |= {"settings": {"rounds": 4}}
    result = rarefy.run(recipe, tmp_path / "out", texts=False)
    assert result is not None
    facts = result.folder.read_run()
    assert facts["pattern_spec"] == {}
    assert facts["sparsity"] == 0
    assert facts["pattern"] == "the bits of unstructured 40%"
    for line in (tmp_path / "out" / "layers.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["kept"] == record["shape"][0] * record["shape"][1]
        assert record["pattern"] == "the bits of unstructured 40%"
        assert record["pattern_spec"] == {}
    inspection = rarefy.inspect_folder(tmp_path / "out")
    assert inspection.ok
    assert inspection.sparsity < 0.2  # whole columns of zeros in a factor
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "none: each weight is the dense product of two sparse factors" in card
    assert not rarefy.inspect_folder(tmp_path / "out", Unstructured(0.4)).ok
