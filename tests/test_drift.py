"""Targets that correct the drift, and Grams that are collected again within a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from models_for_tests import VOCABULARY, make_model
from rarefy.layer.gram import Gram
from rarefy.models.blocks import find_blocks
from rarefy.pruning import drift, solve

WINDOWS = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))


def _pruned(architecture: str = "llama", **options: Any) -> tuple[nn.Module, rarefy.Report]:
    model = make_model(architecture)
    options = {"pattern": rarefy.Unstructured(0.6), "method": rarefy.Wanda(), "batch_size": 4} | options
    return model, rarefy.prune(model, WINDOWS, **options)


def _inputs(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """What linears read in a plain forward pass of the whole model, (tokens, in)."""
    found: dict[str, Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        model(WINDOWS)
    return found


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Of the layers of a run, by name: the target, H and D with which it was made."""
    seen: dict[str, Tensor] = {}
    original = drift.corrected

    def corrected(W0: Tensor, gram: Gram, D: Tensor, share: float) -> Tensor:
        seen[f"{len(seen) // 2}.H"], seen[f"{len(seen) // 2}.D"] = gram.H.clone(), D.clone()
        return original(W0, gram, D, share)

    monkeypatch.setattr(solve, "corrected", corrected)
    return seen


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_the_drift_is_that_between_plain_passes_of_both_models(targets: dict[str, Tensor], architecture: str) -> None:
    model, _ = _pruned(architecture, drift=0.25, include=["*.0.*", "*.1.*"])
    last = find_blocks(model)[1]
    names = [site.name for site in last.sites]
    halfway, _ = _pruned(architecture, drift=0.25, include=["*.0.*"])  # the second block is still dense
    on_pruned, on_dense = _inputs(halfway, names), _inputs(make_model(architecture), names)
    assert len(targets) == 2 * len(names)  # none of the first block, before which nothing was pruned
    for number, name in enumerate(names):
        X, X0 = on_pruned[name].double(), on_dense[name].double()
        expected = (X0 - X).T @ X
        # float32 sums of 144 tokens, against the energies of both factors
        scale = float((X0 - X).norm() * X.norm())
        torch.testing.assert_close(targets[f"{number}.D"].double(), expected, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(targets[f"{number}.H"].double(), X.T @ X, rtol=1e-4, atol=1e-4 * scale)


def test_the_whole_correction_undamped_is_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "DAMPING", 0.0)
    generator = torch.Generator().manual_seed(0)
    X, noise = torch.randn(400, 12, generator=generator), torch.randn(400, 12, generator=generator)
    X0, W0 = X + 0.3 * noise + 0.2 * X.roll(1, 1), torch.randn(5, 12, generator=generator)
    found = drift.corrected(W0, Gram.from_matrix(X.T @ X), (X0 - X).T @ X, 1.0)
    best = torch.linalg.lstsq(X.double(), X0.double() @ W0.double().T).solution.T
    torch.testing.assert_close(found.double(), best, rtol=1e-4, atol=1e-4)  # float32, condition below 10


def test_the_damped_share_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(30, 8, generator=generator) * torch.tensor([1.0, 100.0] * 4)
    X0, W0 = X + torch.randn(30, 8, generator=generator), torch.randn(5, 8, generator=generator)
    H, D = (X.T @ X).double(), ((X0 - X).T @ X).double()
    expected = W0.double() + 0.25 * W0.double() @ D @ (H + drift.DAMPING * H.diagonal().diag()).inverse()
    found = drift.corrected(W0, Gram.from_matrix(H.float()), D.float(), 0.25)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)  # float32, inputs a hundred apart


def test_a_dead_input_has_no_correction() -> None:
    X = torch.randn(30, 4, generator=torch.Generator().manual_seed(2))
    X[:, 1] = 0
    W0 = torch.ones(3, 4)
    found = drift.corrected(W0, Gram.from_matrix(X.T @ X), torch.ones(4, 30) @ X, 0.5)
    assert torch.equal(found[:, 1], W0[:, 1])
    assert not torch.equal(found, W0)


def test_later_layers_of_a_block_see_what_was_pruned_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    grams: dict[str, Tensor] = {}
    original = solve.run

    def run(method: Any, problem: rarefy.LayerProblem, pattern: Any, *, name: str, **more: Any) -> Any:
        grams[name] = problem.H.clone()
        return original(method, problem, pattern, name=name, **more)

    monkeypatch.setattr(solve, "run", run)
    model, _ = _pruned(refresh=True)
    # Within a block, what a layer read when it was solved is what it reads in the model that came out.
    for name, X in _inputs(model, list(grams)).items():
        torch.testing.assert_close(grams[name], X.T @ X, rtol=1e-3, atol=1e-3)
    _pruned()
    assert not torch.allclose(grams["model.layers.0.mlp.down_proj"], X.T @ X, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("part", [{"drift": 0.25}, {"refresh": True}], ids=["drift", "refresh"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "qwen3_moe", "gemma3"])
@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
def test_other_families_and_progress(architecture: str, part: dict[str, Any]) -> None:
    seen: list[tuple[int, int]] = []
    options = part | {"matching": rarefy.Matching(passes=1, batch_size=4)}
    _, report = _pruned(architecture, **options, on_progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]
    _, plain = _pruned(architecture)
    assert {layer.name: layer.kept for layer in report.layers} == {layer.name: layer.kept for layer in plain.layers}


def test_a_share_of_nothing_is_the_plain_target() -> None:
    states = [_pruned(drift=share)[0].state_dict() for share in (0.0, 0.5)]
    plain = _pruned()[0].state_dict()
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in plain.items())
    assert any(not torch.equal(tensor, states[1][name]) for name, tensor in plain.items())


def test_drift_and_refresh_do_not_go_together() -> None:
    with pytest.raises(rarefy.InputError, match=r"^drift does not go with refresh: "):
        _pruned(drift=0.25, refresh=True)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_beyond_the_whole_is_one_sentence(share: float) -> None:
    with pytest.raises(rarefy.InputError, match=r"^drift is .*, but must be a number from 0 to 1"):
        _pruned(drift=share)
