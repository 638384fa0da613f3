"""Row weights: exact by scaling rows, measured by plain gradients, and refused where they change nothing."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from cli_for_tests import Rarefy, is_one_sentence, prune_arguments, stopped_after_one_block
from fisher_for_tests import plain_fisher
from models_for_tests import VOCABULARY, make_model
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import Pattern, Unstructured
from rarefy.layer.problem import LayerProblem
from rarefy.layer.row_weights import LEAST, row_factors, weighted
from rarefy.models.sites import Site
from rarefy.pruning import block as pruned_block
from rarefy.pruning import fisher

WINDOWS = torch.randint(3, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))
#: Methods that compare weights of all rows, first parts or combinations.
CHOOSING = ("magnitude", "wanda", "sparsegpt", "alps", "admm", "admm-reselect", "sparsefw", "wanda+pcg")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weighted_loss(W: Tensor, W0: Tensor, H: Tensor, v: Tensor) -> float:
    """Row by row, as the formula says it."""
    return sum(float(each * (w - w0) @ H @ (w - w0)) for w, w0, each in zip(W, W0, v, strict=True))


def test_the_scaled_problem_is_the_weighted_one() -> None:
    X, W0, W, v = _random(20, 6), _random(4, 6, seed=1), _random(4, 6, seed=2), torch.tensor([1.0, 4.0, 0.25, 9.0])
    factors = row_factors(v)
    problem = weighted(LayerProblem(W0.double(), Gram.from_matrix(X.T @ X)), factors)
    expected = _weighted_loss(W.double(), W0.double(), (X.T @ X).double(), v / v.mean())
    assert problem.objective(W * factors.unsqueeze(1)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", CHOOSING)
def test_with_separate_inputs_the_best_mask_of_all_is_found(method: str) -> None:
    """With a diagonal H, a mask is as good as the sum of v_i w_ij^2 H_jj that it keeps: all masks are compared."""
    W0, v = _random(3, 4), torch.tensor([0.04, 1.0, 25.0])
    H = torch.tensor([1.0, 4.0, 0.5, 2.0]).diag()
    if method == "magnitude":
        H = torch.eye(4)
    best = min(
        (
            _weighted_loss(torch.where(mask.view(3, 4), W0, 0), W0, H, v)
            for kept in combinations(range(12), 5)
            for mask in [torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(kept), True)]
        ),
    )
    options: dict[str, Any] = {"pattern": rarefy.Unstructured(7 / 12), "method": rarefy.methods.build(method)}
    found = rarefy.solve(W0, H, row_weights=v, **options)
    assert int(found.mask.sum()) == 5
    assert _weighted_loss(found.weight, W0, H, v) == pytest.approx(best, rel=1e-4)
    plain = rarefy.solve(W0, H, **options)
    assert _weighted_loss(plain.weight, W0, H, v) > 1.5 * best
    assert found.relative_error > plain.relative_error  # grades do not have the weights


@pytest.mark.parametrize("method", ["sparsegpt", "alps", "admm", "wanda+backsolve"])
def test_correlated_inputs_lose_less_where_it_counts(method: str) -> None:
    X = _random(200, 24) @ _random(24, 24, seed=1)
    W0, v, H = _random(16, 24, seed=2), torch.logspace(-2, 2, 16), X.T @ X
    options: dict[str, Any] = {"pattern": rarefy.Unstructured(0.6), "method": rarefy.methods.build(method)}
    weighted_loss, plain = (
        _weighted_loss(rarefy.solve(W0, H, row_weights=each, **options).weight, W0, H, v)
        for each in (v, torch.ones(16))
    )
    assert weighted_loss < 0.8 * plain


@pytest.mark.parametrize("method", [name for name in CHOOSING if name != "sparsefw"])
@pytest.mark.parametrize("pattern", [rarefy.PerRow(0.5), rarefy.NM(2, 4)])
def test_they_change_nothing_where_each_row_has_its_own_count(method: str, pattern: rarefy.Pattern) -> None:
    X, W0, v = _random(60, 8) @ _random(8, 8, seed=1), _random(5, 8, seed=2), torch.tensor([1.0, 9, 0.01, 3, 100])
    options: dict[str, Any] = {"pattern": pattern, "method": rarefy.methods.build(method)}
    found, plain = (rarefy.solve(W0, X.T @ X, row_weights=each, **options) for each in (v, None))
    assert torch.equal(found.mask, plain.mask)
    torch.testing.assert_close(found.weight, plain.weight, rtol=1e-4, atol=1e-4)  # float32, rows scaled by up to 100


def test_equal_weights_change_no_bit_and_zeros_have_a_floor() -> None:
    assert row_factors(torch.full((3,), 7.0)).tolist() == [1, 1, 1]
    assert row_factors(torch.zeros(3)).tolist() == [1, 1, 1]
    assert float(row_factors(torch.tensor([0.0, 2.0]))[0]) == pytest.approx(LEAST**0.5)
    W0, H = _random(4, 6), torch.eye(6)
    options: dict[str, Any] = {"pattern": rarefy.Unstructured(0.5), "method": rarefy.ALPS()}
    found, plain = (rarefy.solve(W0, H, row_weights=each, **options) for each in (torch.full((4,), 3.0), None))
    assert torch.equal(found.weight, plain.weight)
    found = rarefy.solve(W0, H, row_weights=torch.tensor([0.0, 1, 1, 1]), **options)
    assert bool(found.weight.isfinite().all())
    assert int(found.mask[0].sum()) == 0


@pytest.mark.parametrize("v", [torch.tensor([1.0, -1.0]), torch.tensor([1.0, float("nan")]), torch.ones(3)])
def test_wrong_weights_are_one_sentence(v: Tensor) -> None:
    with pytest.raises(rarefy.InputError, match=r"^row_weights is 'a tensor .*, but must be "):
        rarefy.solve(_random(2, 4), torch.eye(4), rarefy.Unstructured(0.5), rarefy.Wanda(), row_weights=v)


# --- In a run


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor | None]:
    """The row weights with which each layer of a run was solved."""
    seen: dict[str, Tensor | None] = {}
    original = pruned_block.solve_piece

    def solve_piece(site: Any, *arguments: Any) -> Any:
        seen[site.name] = arguments[-1]
        return original(site, *arguments)

    monkeypatch.setattr(pruned_block, "solve_piece", solve_piece)
    return seen


def _pruned(architecture: str = "llama", **options: Any) -> tuple[nn.Module, rarefy.Report]:
    model = make_model(architecture)
    options = {"pattern": rarefy.Unstructured(0.6), "method": rarefy.SparseGPT(), "batch_size": 2} | options
    return model, rarefy.prune(model, WINDOWS, **options)


@pytest.mark.parametrize("at_once", [1, 7, 100])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "qwen3_moe", "gpt_neox"])
@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
def test_fisher_weights_are_those_of_a_plain_backward_pass(
    given: dict[str, Tensor | None], monkeypatch: pytest.MonkeyPatch, architecture: str, at_once: int
) -> None:
    # So many tokens have logits at a time.
    monkeypatch.setattr("rarefy.calibration.finish.LOGIT_BYTES", 4 * VOCABULARY * at_once)
    progress: list[tuple[int, int]] = []
    options: dict[str, Any] = {"on_progress": lambda done, total, _: progress.append((done, total))}
    model, report = _pruned(architecture, row_weights="fisher", **options)
    expected = plain_fisher(make_model(architecture), WINDOWS)[0]
    assert {name for name, v in given.items() if v is not None} == expected.keys()
    for name, v in expected.items():
        found = given[name]
        assert found is not None
        torch.testing.assert_close(found.float(), v, rtol=1e-3, atol=1e-4 * float(v.max()))  # float32, other batches
    assert progress == [(done, len(progress)) for done in range(1, len(progress) + 1)]
    plain = _pruned(architecture)[1]
    assert report.pruned == plain.pruned
    assert any(one.relative_error != other.relative_error for one, other in zip(report.layers, plain.layers))
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Tensor, Tensor]]:
    """The weight and the row weights with which each layer of a run was solved."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    original = pruned_block.solve_piece

    def solve_piece(site: Any, *arguments: Any) -> Any:
        seen[site.name] = site.read().clone(), arguments[-1].clone()
        return original(site, *arguments)

    monkeypatch.setattr(pruned_block, "solve_piece", solve_piece)
    return seen


def test_rotated_outputs_have_the_mean_of_their_head(solved: dict[str, tuple[Tensor, Tensor]]) -> None:
    _pruned(row_weights="fisher", rotate=True)
    plain = plain_fisher(make_model("llama"), WINDOWS)[0]
    assert solved.keys() == plain.keys()
    width = make_model("llama").config.head_dim
    for name, v in plain.items():
        expected = v.view(-1, width).mean(1).repeat_interleave(width) if name.endswith("v_proj") else v
        torch.testing.assert_close(solved[name][1].float(), expected, rtol=1e-3, atol=1e-4 * float(v.max()))


def test_reordered_outputs_keep_their_row_weights(solved: dict[str, tuple[Tensor, Tensor]]) -> None:
    def pattern_of(site: Site) -> Pattern:
        return rarefy.NM(2, 4) if site.name.endswith(("down_proj", "o_proj")) else rarefy.Unstructured(0.6)

    _pruned(row_weights="fisher", permute=True, pattern=pattern_of)
    plain, dense = plain_fisher(make_model("llama"), WINDOWS)[0], dict(make_model("llama").named_parameters())
    moved = 0
    for name, (weight, found) in solved.items():
        rows = torch.cdist(weight.float(), dense[f"{name}.weight"].detach().float()).argmin(1)  # where each was
        if not name.endswith(("down_proj", "o_proj")):
            torch.testing.assert_close(found.float(), plain[name][rows], rtol=1e-3, atol=1e-4 * float(found.max()))
            moved += int((rows != torch.arange(len(rows))).sum())
    assert moved > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_nearly_the_same(given: dict[str, Tensor | None], dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"pattern": rarefy.Unstructured(0.6), "method": rarefy.SparseGPT(), "batch_size": 2}
    rarefy.prune(make_model("llama").to(dtype), WINDOWS, row_weights="fisher", **options)
    expected = plain_fisher(make_model("llama"), WINDOWS)[0]
    assert given.keys() == expected.keys()
    for name, v in expected.items():
        found = given[name]
        assert found is not None
        assert float((found.float() - v).norm()) < 0.05 * float(v.norm()), name


def test_weights_of_the_mlp_are_norms_of_its_neurons(given: dict[str, Tensor | None]) -> None:
    _pruned(row_weights="mlp", include=["*.0.*"])
    model, found = make_model("llama"), []
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    down.register_forward_pre_hook(lambda _, args: found.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(WINDOWS)
    for name, v in given.items():
        if name.endswith(("gate_proj", "up_proj")):
            assert v is not None
            torch.testing.assert_close(v, found[0].norm(dim=0), rtol=1e-4, atol=1e-4)
        else:
            assert v is None


@pytest.mark.parametrize("more", [(), ("--dtype", "float32")], ids=["on disk", "in memory"])
def test_a_run_goes_on_with_the_weights_that_it_began_with(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    options = ("--method", "sparsegpt", "--scope", "layer", "--row-weights", "fisher", "--no-texts", *more)
    with stopped_after_one_block():
        assert rarefy_(*prune_arguments(shelf, "-o", tmp_path / "out", *options)).status == 130
    with monkeypatch.context() as patch:
        patch.setattr(fisher, "_Backward", lambda *_: pytest.fail("it went back again"))
        done = rarefy_(*prune_arguments(shelf, "-o", tmp_path / "out", *options))
        assert done.status == 0, done.err
    offload = ("--offload-dir", tmp_path) if more else ()
    assert rarefy_(*prune_arguments(shelf, "-o", tmp_path / "whole", *options, *offload)).status == 0
    files = [(tmp_path / output / "model" / "model.safetensors").read_bytes() for output in ("out", "whole")]
    assert files[0] == files[1]
    assert "row_weights: fisher" in (tmp_path / "out" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--row-weights", "some"), "--row-weights is 'some', but must be none, mlp or fisher"),
        (("--row-weights", "mlp", "--pattern", "2:4"), "Row weights (mlp) change nothing with the pattern 2:4"),
        (
            ("--row-weights", "fisher", "--scope", "row"),
            "(fisher) change nothing with the pattern row 50%",
        ),
        (("--row-weights", "mlp", "--include", "*.gate_proj"), "(mlp) are of layers that make the neurons of an MLP"),
        (("--row-weights", "mlp", "--refresh"), "Row weights of the MLP (mlp) do not go with refresh"),
        (
            ("--row-weights", "fisher", "--method", "alps+quantize"),
            "(fisher) do not go with alps+quantize",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    shelf: Path, tmp_path: Path, rarefy_: Rarefy, options: tuple[str, ...], sentence: str
) -> None:
    done = rarefy_(*prune_arguments(shelf, "-o", tmp_path / "out", *options))
    assert is_one_sentence(done.err), done.err
    assert done.status == 2
    assert sentence in done.err
    assert not (tmp_path / "out").exists()


def test_experts_in_one_stack_have_no_row_weights_of_the_loss() -> None:
    with pytest.raises(rarefy.InputError, match=r"^Row weights \(fisher\) are of linears that are modules"):
        rarefy.prune(
            make_model("mixtral"),
            torch.zeros(1, 8, dtype=torch.int64),
            pattern=Unstructured(0.5),
            method=rarefy.Wanda(),
            include=["*.experts.*"],
            row_weights="fisher",
        )
