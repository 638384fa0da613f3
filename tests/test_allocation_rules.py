"""Allocations that measure the dense model: each rule against its formulas written plainly, and within a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from cli_for_tests import Rarefy, prune_arguments, stopped_after_one_block
from models_for_tests import VOCABULARY, make_model
from rarefy.allocation.alphapruning import AlphaPruning, exponent
from rarefy.allocation.budget import Layer, shifted
from rarefy.allocation.lsa import Lsa, bound, removal_error
from rarefy.allocation.owl import Owl
from rarefy.layer.gram import Gram
from rarefy.models.blocks import find_blocks
from rarefy.pruning import survey

WINDOWS = torch.randint(3, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))
MEASURED = ("owl", "alphapruning", "lsa")


def _layers(*blocks: int, size: tuple[int, int] = (4, 4)) -> list[Layer]:
    return [Layer(f"model.layers.{block}.q_proj", block, size) for block in blocks]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- OWL


def test_owl_counts_the_scores_above_five_times_their_mean() -> None:
    weights = {"a": _random(6, 8) ** 3, "b": _random(3, 5, seed=1) ** 3}
    inputs = {"a": _random(20, 8, seed=2), "b": 7 * _random(20, 5, seed=3)}
    rule = Owl()
    facts = {name: rule.of_layer(weights[name], Gram.from_matrix(X.T @ X, 20)) for name, X in inputs.items()}
    found = rule.of_block(facts, weights.__getitem__)
    scores = [
        abs(float(w)) * math.sqrt(sum(float(x) ** 2 for x in column) / 20)
        for name, W in weights.items()
        for row in W
        for w, column in zip(row, inputs[name].T, strict=True)
    ]
    outliers = sum(score > 5 * sum(scores) / len(scores) for score in scores)
    assert outliers > 0
    assert found == pytest.approx(dict.fromkeys("ab", 100 * outliers / len(scores)))


def test_owl_spreads_blocks_over_twice_lambda_around_the_mean() -> None:
    layers = _layers(0, 1, 2, 3)
    facts = dict(zip([layer.name for layer in layers], [1.0, 4.0, 2.0, 3.0], strict=True))
    found = list(Owl().spread(layers, facts, 0.7).values())
    # r is 0, .16, .0533, .1067 and has a mean of .08: the most outliers, the least sparsity.
    assert found == pytest.approx([0.78, 0.62, 0.7 + 0.08 / 3, 0.7 - 0.08 / 3])
    assert list(Owl().spread(layers, dict.fromkeys(facts, 2.0), 0.7).values()) == [0.7] * 4


# --- AlphaPruning


def _plain_exponent(values: list[float]) -> float:
    """The published procedure, value by value."""
    logs = [math.log10(value) for value in values]
    width = (logs[-1] - logs[0]) / 100
    bins = [0] * 100
    for each in logs:
        bins[min(99, int((each - logs[0]) / width))] += 1
    peak = 10 ** (logs[0] + width * bins.index(max(bins)))
    found = []
    for i, start in enumerate(values[:-1]):
        if math.log10(0.95 * peak) <= start <= 1.5 * peak:
            tail = values[i:]
            m = len(tail)
            alpha = 1 + m / (sum(map(math.log, tail)) - m * math.log(start))
            distances = [abs(1 - (each / start) ** (1 - alpha) - j / m) for j, each in enumerate(tail)]
            found.append((max(distances), alpha))
    return min(found)[1]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_the_exponent_is_that_of_the_published_procedure(scale: float) -> None:
    values = (scale * torch.linalg.svdvals(_random(40, 60).double() ** 3) ** 2).flip(0)
    assert exponent(values) == pytest.approx(_plain_exponent(values.tolist()), rel=1e-9)


def test_a_power_law_has_its_exponent() -> None:
    # Quantiles of a density of x^-2.5 from 1 on: (1 - u)^(-1 / 1.5).
    values = (1 - (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000) ** (-1 / 1.5)
    assert exponent(values) == pytest.approx(2.5, rel=0.02)


def test_spectra_without_a_tail() -> None:
    assert exponent(torch.ones(5, dtype=torch.float64)) == math.inf
    assert math.isfinite(exponent(torch.tensor([0.0, 0.0, 1.0, 2.0, 5.0], dtype=torch.float64)))
    layers, rule = _layers(0, 1), AlphaPruning()
    names = [layer.name for layer in layers]
    assert rule.spread(layers, dict.fromkeys(names, math.inf), 0.6) == dict.fromkeys(names, 0.6)
    assert rule.of_layer(_random(1, 9), None) == math.inf


def test_alphas_of_llama_2_7b_give_the_published_sparsities() -> None:
    """What the published files give at 70 %, for the first two blocks, the most and the last."""
    layers = _layers(*range(32))
    # Relative to the least and the most, as the files for eps 0.3 give them back; their mean is 0.601.
    alphas = [0.0, 0.26, 1.0, *[(0.601 * 32 - 0.26 - 1.0 - 0.614) / 28] * 28, 0.614]
    facts = {layer.name: 3 + 2 * alpha for layer, alpha in zip(layers, alphas, strict=True)}
    for eps, expected in ((0.3, (0.462, 0.565, 0.858, 0.705)), (0.2, (0.538, 0.608, 0.807, 0.703))):
        found = list(AlphaPruning(eps).spread(layers, facts, 0.7).values())
        assert (found[0], found[1], max(found), found[-1]) == pytest.approx(expected, abs=1e-3)
        assert sum(found) / 32 == pytest.approx(0.7)


# --- LSA


def _plain_removal(W: Tensor, H: Tensor, group: int) -> float:
    """Row by row; what is left of a row's error is computed anew for every candidate."""
    total = 0.0
    for w in W.double():
        gone: list[int] = []

        def error(removed: list[int], w: Tensor = w) -> float:
            v = torch.zeros_like(w)
            v[removed] = w[removed]
            return float(v @ H.double() @ v)

        for a in range(0, len(w), group):
            here = range(a, min(a + group, len(w)))
            for _ in range(len(here) // 2):
                gone.append(min((j for j in here if j not in gone), key=lambda j: error([*gone, j])))
        total += error(gone)
    return total


@pytest.mark.parametrize("group", [4, 6, 128])
def test_removal_is_greedy_by_what_each_weight_adds(group: int) -> None:
    X = _random(30, 14) @ _random(14, 14, seed=1)
    W, H = _random(5, 14, seed=2), X.T @ X
    assert removal_error(W, H, group) == pytest.approx(_plain_removal(W, H, group), rel=1e-4)


def test_lsa_prunes_blocks_with_large_absolute_errors_more() -> None:
    layers = _layers(0, 1, 2)
    facts = dict(zip([layer.name for layer in layers], [1.0, 2.0, 5.0], strict=True))
    # I = 1 - E / 8 = .875, .75, .375; d = .16, .12, 0 at 60 %, with a mean of .09333.
    assert list(Lsa().spread(layers, facts, 0.6).values()) == pytest.approx([0.5333333, 0.5733333, 0.6933333])
    assert [bound(s) for s in (0.05, 0.5, 0.55, 0.7, 0.9)] == pytest.approx([0.06, 0.04, 0.06, 0.08, 0.08])
    assert list(Lsa().spread(layers, dict.fromkeys(facts, 0.0), 0.6).values()) == [0.6] * 3


# --- In a run


def _pruned(allocation: str, architecture: str = "llama", **options: Any) -> tuple[nn.Module, rarefy.Report]:
    model = make_model(architecture)
    options = {"pattern": rarefy.Unstructured(0.7), "method": rarefy.Wanda(), "batch_size": 2} | options
    return model, rarefy.prune(model, WINDOWS, allocation=allocation, **options)


def _plain_facts(allocation: str, architecture: str) -> dict[str, float]:
    """What the rule measures, from a plain forward pass of the whole dense model."""
    rule, model = survey.MEASURED_RULES[allocation], make_model(architecture)
    facts: dict[str, float] = {}
    inputs: dict[str, Tensor] = {}
    blocks = find_blocks(model)
    for site in (site for block in blocks for site in block.sites):
        site.module.register_forward_pre_hook(
            lambda _, args, name=site.name: inputs.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        model(WINDOWS)
    for block in blocks:
        sites = {site.name: site for site in block.sites}
        kept = {
            name: rule.of_layer(site.read(), Gram.from_matrix(inputs[name].T @ inputs[name], len(inputs[name])))
            for name, site in sites.items()
        }
        facts |= rule.of_block(kept, lambda name, sites=sites: sites[name].read())
    return facts


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the survey of a run has measured, by layer."""
    seen: dict[str, float] = {}
    original = survey.allocate_measured

    def allocate(allocation: str, pattern: Any, layers: Any, facts: dict[str, float]) -> Any:
        seen.update(facts)
        return original(allocation, pattern, layers, facts)

    monkeypatch.setattr(survey, "allocate_measured", allocate)
    return seen


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("allocation", MEASURED)
def test_what_is_measured_is_of_the_dense_model(
    measured: dict[str, float], allocation: str, architecture: str
) -> None:
    progress: list[tuple[int, int]] = []
    _, report = _pruned(allocation, architecture, on_progress=lambda done, total, _: progress.append((done, total)))
    assert measured == pytest.approx(_plain_facts(allocation, architecture), rel=1e-3)
    assert progress == [(done, len(progress)) for done in range(1, len(progress) + 1)]
    assert report.pruned == _pruned("uniform", architecture)[1].pruned
    wanted = survey.MEASURED_RULES[allocation].spread(
        [Layer(one.name, one.block, (one.shape[0], one.shape[1])) for one in report.layers], measured, 0.7
    )
    expected = shifted(wanted, {one.name: one.shape[0] * one.shape[1] for one in report.layers}, 0.7)
    for one in report.layers:
        assert one.sparsity == pytest.approx(expected[one.name], abs=1 / (one.shape[0] * one.shape[1]))
    assert str(report).startswith(f"wanda, {allocation} unstructured 70%: ")


@pytest.mark.parametrize("allocation", MEASURED)
@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
def test_experts_rows_and_groups_have_an_allocation_too(allocation: str) -> None:
    for pattern in (rarefy.NM(4, 8), rarefy.PerRow(0.5)):
        model, report = _pruned(allocation, "qwen3_moe", pattern=pattern)
        size = sum(site.read().numel() for block in find_blocks(model) for site in block.sites)
        assert report.pruned == pytest.approx(0.5 * size, rel=0.02)
        assert report.pruned >= 0.5 * size


def test_the_survey_ends_with_the_last_block_that_is_pruned(measured: dict[str, float]) -> None:
    _pruned("lsa", include=["*.0.*"])
    assert {name.split(".")[2] for name in measured} == {"0"}


@pytest.mark.parametrize("more", [(), ("--dtype", "float32")], ids=["on disk", "in memory"])
def test_a_run_goes_on_with_the_allocation_that_it_began_with(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    options = ("--method", "wanda", "--sparsity", 0.7, "--scope", "layer", "--allocation", "lsa", "--no-texts", *more)
    dry = rarefy_(*prune_arguments(shelf, "--dry-run", *options))
    assert "lsa measures the dense model first" in dry.out
    with stopped_after_one_block():
        assert rarefy_(*prune_arguments(shelf, "-o", tmp_path / "out", *options)).status == 130
    with monkeypatch.context() as patch:
        patch.setattr(survey, "_facts", lambda *_: pytest.fail("it measured again"))
        done = rarefy_(*prune_arguments(shelf, "-o", tmp_path / "out", *options))
        assert done.status == 0, done.err
    assert rarefy_(*prune_arguments(shelf, "-o", tmp_path / "whole", *options)).status == 0
    results = [
        [
            [(one["name"], one["kept"], one["pattern_spec"], one["relative_error"]) for one in _records(output)],
            (output / "model" / "model.safetensors").read_bytes(),
        ]
        for output in (tmp_path / "out", tmp_path / "whole")
    ]
    assert results[0] == results[1]
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (facts["allocation"], facts["pattern"]) == ("lsa", "lsa unstructured 70%")
    assert f"{facts['pruned']:,} of {facts['size']:,} weights would be pruned" in dry.out
    assert len({one["pattern_spec"]["sparsity"] for one in _records(tmp_path / "out")}) > 1
    assert rarefy_("inspect", tmp_path / "out").status == 0


def _records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "layers.jsonl").read_text().splitlines()]


def test_few_steps_and_too_much_are_refused_before_the_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_facts", lambda *_: pytest.fail("it measured"))
    refused: list[tuple[rarefy.Pattern, str]] = [
        (rarefy.NM(2, 4), "pattern is 2:4, which has too few steps"),
        (rarefy.Unstructured(0.995), "prunes no layer beyond 99%"),
    ]
    for pattern, sentence in refused:
        with pytest.raises(rarefy.PatternError, match=sentence):
            _pruned("owl", pattern=pattern)
