"""The allocation ``fisher``: one threshold for the rise of the loss, within bounds, with the total that was asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rarefy
from cli_for_tests import Rarefy, is_one_sentence, prune_arguments, stopped_after_one_block
from fisher_for_tests import plain_fisher
from models_for_tests import VOCABULARY, make_model
from rarefy.allocation.budget import Layer, shifted
from rarefy.allocation.fisher import Fisher
from rarefy.allocation.rule import Sensitivity
from rarefy.models.blocks import find_blocks
from rarefy.pruning import fisher, loop
from small_architectures import ALL, make
from test_architectures import EXCLUDE, REFUSED

WINDOWS = torch.randint(3, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _example(*scales: float) -> tuple[list[Layer], dict[str, Tensor], dict[str, Tensor]]:
    """Layers, f of each by its formula, and what the rule keeps of each."""
    layers, scores, facts = [], {}, {}
    for number, scale in enumerate(scales):
        name, shape = f"model.layers.{number}.q_proj", (40 + number, 50)
        W, v, h = _random(*shape, seed=number), scale * _random(shape[0]).square(), _random(50, seed=9).square()
        layers.append(Layer(name, number, shape))
        scores[name] = torch.tensor([[float(v[i] * h[j] * W[i, j] ** 2) for j in range(50)] for i in range(shape[0])])
        kept = Fisher().of_layer(W, None, Sensitivity(v.double(), h.double()))
        assert kept is not None
        facts[name] = kept
    return layers, scores, facts


def test_a_histogram_counts_scores_by_sixteenths_of_an_octave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.allocation.fisher._AT_ONCE", 170)  # three rows at a time, and a rest
    _, scores, facts = _example(1e-9)
    (f,), (bins,) = scores.values(), facts.values()
    expected = torch.zeros_like(bins)
    for value in f.flatten().tolist():
        expected[math.floor(16 * (math.log2(value) + 126))] += 1
    assert int((bins - expected).abs().sum()) <= 4  # float32 at the edges of bins
    assert int(bins.sum()) == f.numel()


def test_scores_of_zero_are_the_smallest_and_nothing_is_lost() -> None:
    v, h = torch.tensor([0.0, 1e30]), torch.tensor([1.0, 1e30])
    bins = Fisher().of_layer(torch.ones(2, 2), None, Sensitivity(v, h))
    assert bins is not None
    assert (int(bins[0]), int(bins[-1]), int(bins.sum())) == (2, 1, 4)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("bound", [0.05, 0.2, 1.0])
def test_shares_below_one_threshold_within_bounds(sparsity: float, bound: float) -> None:
    layers, scores, facts = _example(1.0, 2.0, 0.3, 40.0, 1e-3)
    found = Fisher(bound).spread(layers, facts, sparsity)
    total = sum(layer.size for layer in layers)
    assert sum(found[layer.name] * layer.size for layer in layers) == pytest.approx(sparsity * total)

    def shares(t: float) -> dict[str, float]:
        least, most = max(0.0, sparsity - bound), min(0.99, sparsity + bound)
        return {name: min(max(float((f <= t).float().mean()), least), most) for name, f in scores.items()}

    values = sorted(torch.cat([f.flatten() for f in scores.values()]).tolist())
    pruned = (sum(shares(t)[layer.name] * layer.size for layer in layers) for t in values)
    t = next(t for t, size in zip(values, pruned, strict=True) if size >= sparsity * total)
    assert found == pytest.approx(shares(t), abs=0.02)  # within a bin, shares are on a line


def test_equal_layers_have_equal_shares_and_what_is_unknown_the_sparsity_of_the_run() -> None:
    layers, _, facts = _example(1.0)
    other = Layer("experts", 1, (8, 8))
    same = Layer("same", 2, layers[0].shape)
    known: dict[str, Any] = {**facts, "same": facts[layers[0].name], "experts": None}
    found = Fisher().spread([*layers, other, same], known, 0.6)
    assert list(found.values()) == pytest.approx([0.6, 0.6, 0.6])
    assert Fisher().of_layer(torch.ones(2, 2)) is None
    assert Fisher().spread([other], {"experts": None}, 0.6) == {"experts": 0.6}


# --- In a run


def _pruned(architecture: str = "llama", **options: Any) -> rarefy.Report:
    options = {"pattern": rarefy.Unstructured(0.7), "method": rarefy.Wanda(), "batch_size": 2} | options
    return rarefy.prune(make_model(architecture), WINDOWS, **{"allocation": "fisher", **options})


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_run_has_the_shares_of_a_plain_backward_pass(architecture: str) -> None:
    progress: list[tuple[int, int]] = []
    report = _pruned(architecture, on_progress=lambda done, total, _: progress.append((done, total)))
    squares, means = plain_fisher(make_model(architecture), WINDOWS)
    sites = [site for block in find_blocks(make_model(architecture)) for site in block.sites]
    facts = {
        site.name: Fisher().of_layer(site.read(), None, Sensitivity(squares[site.name], means[site.name]))
        for site in sites
    }
    layers = [Layer(site.name, 0, site.shape) for site in sites]
    wanted = Fisher().spread(layers, facts, 0.7)
    expected = shifted(wanted, {layer.name: layer.size for layer in layers}, 0.7)
    assert {layer.name: layer.sparsity for layer in report.layers} == pytest.approx(expected, abs=0.01)
    assert len({layer.sparsity for layer in report.layers}) > 2
    assert report.pruned == _pruned(architecture, allocation="uniform").pruned
    assert progress == [(done, len(progress)) for done in range(1, len(progress) + 1)]


@pytest.mark.parametrize("pattern", [rarefy.NM(4, 8), rarefy.PerRow(0.5)])
@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
def test_experts_rows_and_groups_have_it_too(pattern: rarefy.NM | rarefy.PerRow) -> None:
    report = _pruned("qwen3_moe", pattern=pattern)
    assert report.pruned == pytest.approx(0.5 * report.size, rel=0.02)
    assert report.pruned >= 0.5 * report.size


def test_experts_in_one_stack_alone_have_none() -> None:
    with pytest.raises(rarefy.InputError, match=r"^Allocation \(fisher\) is of linears that are modules"):
        _pruned("mixtral", include=["*.experts.*"])


@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_loss_cannot_be_followed_back_is_refused() -> None:
    with pytest.raises(rarefy.ModelError, match="cannot be followed back .*: ask for --row-weights none") as error:
        rarefy.prune(
            make("reformer"),
            WINDOWS,
            pattern=rarefy.Unstructured(0.5),
            method=rarefy.Wanda(),
            batch_size=2,
            allocation="fisher",
        )
    assert is_one_sentence(f"error: {error.value}\n")


#: Blocks that read keys and values of others, or whose head reads more than one state, of which each block's own
#: path counts alone.
CROSSED = {"gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "prophetnet", "zaya"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(ALL) - set(REFUSED) - {"reformer"}))
def test_the_loss_of_every_decoder_is_followed_back(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: dict[str, Sensitivity] = {}
    original = loop.sensitivities

    def sensitivities(*arguments: Any) -> dict[str, Sensitivity]:
        seen.update(original(*arguments))
        return seen

    monkeypatch.setattr(loop, "sensitivities", sensitivities)
    try:
        model = make(name)
    except Exception as error:  # noqa: BLE001 (of any kind, as in test_architectures.py)
        pytest.skip(f"not built: {error}")
    options: dict[str, Any] = {"pattern": rarefy.Unstructured(0.5), "method": rarefy.Wanda(), "batch_size": 2}
    rarefy.prune(model, WINDOWS, exclude=EXCLUDE.get(name, ()), **options, allocation="fisher")
    squares, means = plain_fisher(make(name), WINDOWS)
    assert seen
    for site, one in seen.items():
        if site in squares and name not in CROSSED:
            largest = float(squares[site].max())
            torch.testing.assert_close(one.outputs.float(), squares[site], rtol=1e-3, atol=1e-3 * largest)
        if site in means and name not in CROSSED:
            torch.testing.assert_close(one.inputs.float(), means[site], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weights", ["none", "fisher"])
def test_a_run_goes_on_with_what_it_measured(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    options = ("--method", "wanda", "--sparsity", 0.7, "--scope", "layer", "--allocation", "fisher", "--no-texts")
    options += ("--row-weights", weights)
    with stopped_after_one_block():
        assert rarefy_(*prune_arguments(shelf, "-o", tmp_path / "out", *options)).status == 130
    with monkeypatch.context() as patch:
        patch.setattr(fisher, "_Backward", lambda *_: pytest.fail("it went back again"))
        done = rarefy_(*prune_arguments(shelf, "-o", tmp_path / "out", *options))
        assert done.status == 0, done.err
    assert rarefy_(*prune_arguments(shelf, "-o", tmp_path / "whole", *options)).status == 0
    files = [(tmp_path / output / "model" / "model.safetensors").read_bytes() for output in ("out", "whole")]
    assert files[0] == files[1]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["allocation"] == "fisher"
    assert rarefy_("inspect", tmp_path / "out").status == 0


def test_a_run_of_alps_has_both_unless_it_is_told_otherwise(rarefy_: Rarefy, shelf: Path, tmp_path: Path) -> None:
    options: dict[str, tuple[object, ...]] = {
        "fisher": (),
        "uniform": ("--allocation", "uniform", "--row-weights", "none"),
    }
    for allocation, more in options.items():
        done = rarefy_(*prune_arguments(shelf, "-o", tmp_path / allocation, "--no-texts", *more))
        assert done.status == 0, done.err
        facts = json.loads((tmp_path / allocation / "run.json").read_text())
        weights = "fisher" if allocation == "fisher" else "none"
        assert (facts["allocation"], facts["row_weights"]) == (allocation, weights)
        assert facts["sparsity"] == pytest.approx(0.5, abs=1e-4)
        assert f"allocation: {allocation}" in (tmp_path / allocation / "recipe.yaml").read_text()


def test_a_run_that_prunes_stacks_of_experts_alone_has_neither(tmp_path: Path, shelf: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "experts")
    recipe = {"model": str(tmp_path / "experts"), "calibration": str(shelf / "text.txt"), "include": ["*.experts.*"]}
    recipe |= {"num_samples": 8, "sequence_length": 32}
    tokenizer = (shelf / "model").glob("tokenizer*")
    for file in tokenizer:
        (tmp_path / "experts" / file.name).write_bytes(file.read_bytes())
    resolved = rarefy.forecast(recipe).plan.recipe
    assert (resolved.row_weights, resolved.allocation) == ("none", "uniform")


def test_two_four_is_refused(rarefy_: Rarefy, shelf: Path, tmp_path: Path) -> None:
    done = rarefy_(*prune_arguments(shelf, "-o", tmp_path / "out", "--pattern", "2:4", "--allocation", "fisher"))
    assert done.status == 2
    assert is_one_sentence(done.err)
    assert "too few steps" in done.err
