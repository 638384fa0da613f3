"""LLM-Barber swaps weights by the error of attention and MLP: exact counts, scores as they are worked out plainly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
import reference
from models_for_tests import VOCABULARY, make_model
from rarefy.layer.across import AcrossNM
from rarefy.layer.pattern import NM, Pattern, PerRow, Unstructured
from rarefy.layer.transposable import TransposableNM
from rarefy.models.blocks import find_blocks
from rarefy.pruning.barber import REVIVED, Barber, _Scorer, modules_of, swap
from rarefy.pruning.loop import prune_blocks
from rarefy.pruning.settings import PruneSettings, Uniform
from rarefy.pruning.steps import PrunedBlock
from rarefy.pruning.stores import BlockStore
from rarefy.runs.recipe import Recipe

WINDOWS = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
#: Gradients of the same sums in float32, in another order.
SAME = {"rtol": 1e-3, "atol": 1e-7}
PATTERNS: dict[str, tuple[tuple[Any, ...], Pattern]] = {
    "layer": (("layer", 0.6), Unstructured(0.6)),
    "row": (("row", 0.6), PerRow(0.6)),
    "2:4": (("nm", 2, 4), NM(2, 4)),
    "1:4": (("nm", 1, 4), NM(1, 4)),
}
each_score = pytest.mark.parametrize("score", ["published", "signed"])


def pruned_with(barber: Barber | None, architecture: str = "llama", **more: Any) -> tuple[nn.Module, rarefy.Report]:
    model = make_model(architecture)
    options: dict[str, Any] = {"pattern": PerRow(0.5), "method": rarefy.Wanda(), "batch_size": 4, **more}
    return model, rarefy.prune(model, WINDOWS, barber=barber, **options)


class Capture:
    """A step that keeps what it sees of block 0, with its own copies of the weights."""

    needs_dense_path, needs_dense_weights = False, True

    def check_pattern(self, *_: object) -> None:
        pass

    def num_parts(self, *_: object) -> int:
        return 0

    def __call__(self, pruned: PrunedBlock, _: object) -> None:
        if pruned.block.index == 0:
            self.pruned = replace(pruned, masks=dict(pruned.masks), entering=pruned.entering.fork())
            self.weights = {site.name: site.read() for site in pruned.block.sites}


def captured(method: rarefy.Method, pattern: Pattern, batch_size: int = 4) -> tuple[Capture, nn.Module]:
    """What a step sees of block 0 of a small Llama, which is as it is then."""
    capture, model = Capture(), make_model("llama")
    settings = PruneSettings(Uniform(pattern), method, batch_size, include=["*.layers.0.*"], steps=[capture])
    prune_blocks(BlockStore(model), WINDOWS, settings)
    return capture, model


# --- which weights are swapped


@pytest.mark.parametrize("share", [0.001, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_swaps_are_those_of_sorted_pairs(pattern: str, share: float) -> None:
    plain, allowed = PATTERNS[pattern]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        scores, others = (torch.randn(7, 24, generator=generator) for _ in range(2))
        mask = allowed.project(others)
        swapped = swap(mask, scores, allowed, share)
        assert torch.equal(swapped, reference.barber_swap(mask, scores, plain, share))
        allowed.check(swapped)
    if share == 1.0:
        assert torch.equal(swapped, allowed.project(scores))
    if share == 0.001 and pattern != "layer":
        assert torch.equal(swapped, mask)  # the floor of less than one pair


def test_equal_scores_are_not_swapped() -> None:
    mask = PerRow(0.5).project(torch.rand(4, 8, generator=torch.Generator().manual_seed(0)))
    best_kept = mask.float()
    assert torch.equal(swap(mask, best_kept, PerRow(0.5), 1.0), mask)


def test_groups_across_outputs_keep_their_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = AcrossNM(2, 4).project(torch.rand(8, 12, generator=generator))
    swapped = swap(mask, torch.rand(8, 12, generator=generator), AcrossNM(2, 4), 0.5)
    AcrossNM(2, 4).check(swapped)
    assert not torch.equal(swapped, mask)


# --- the scores


def module_output(block: nn.Module, capture: Capture, weights: dict[str, Tensor], path: str) -> Tensor:
    """What a module of a Llama block gives for all windows with some of its weights, in float64, differentiable.

    Written down: the norms, attention as the model's own module computes it, and the MLP.
    """
    states, call = capture.pruned.entering.states.double(), capture.pruned.entering.calls[0][0]
    block = block.double()
    kwargs = {
        key: tuple(each.double() for each in value) if key == "position_embeddings" else value
        for key, value in call.kwargs.items()
    }
    attention_in = block.input_layernorm(states)
    if path == "self_attn":
        own = {name.rpartition("self_attn.")[2] + ".weight": weight for name, weight in weights.items()}
        result: Tensor = torch.func.functional_call(
            block.self_attn, own, (), {**kwargs, "hidden_states": attention_in, "attention_mask": None}
        )[0]
        return result
    hidden = states + block.self_attn(hidden_states=attention_in, **{**kwargs, "attention_mask": None})[0]
    X = block.post_attention_layernorm(hidden)
    gate, up, down = (weights[f"model.layers.0.mlp.{kind}_proj"] for kind in ("gate", "up", "down"))
    return (nn.functional.silu(X @ gate.T) * (X @ up.T)) @ down.T


@pytest.mark.parametrize("batch_size", [8, 3])
@pytest.mark.parametrize("path", ["self_attn", "mlp"])
def test_published_scores_are_those_of_a_plain_backward_pass(path: str, batch_size: int) -> None:
    capture, model = captured(rarefy.SparseGPT(), PerRow(0.5), batch_size)
    block = find_blocks(model)[0]
    sites = modules_of(block)[path]
    # captured before the loop was over: block 0 has not changed since
    scores = _Scorer(capture.pruned, path, sites, Barber()).scores(lambda: None)
    whole, _ = captured(rarefy.SparseGPT(), PerRow(0.5), 8)  # the calls of one batch with all windows
    dense = {site.name: capture.pruned.dense_weights[site.name].double().requires_grad_() for site in sites}
    sparse = {site.name: capture.weights[site.name].double() for site in sites}
    target = module_output(block.module, whole, sparse, path).detach()
    output = module_output(block.module, whole, dense, path)
    squares = {name: torch.zeros_like(weight) for name, weight in dense.items()}
    for j in range(len(WINDOWS)):
        loss = (output[j] - target[j]).square().mean()
        for name, g in zip(dense, torch.autograd.grad(loss, list(dense.values()), retain_graph=True), strict=True):
            squares[name] += g.square() / len(WINDOWS)
    for name, weight in dense.items():
        expected = weight.detach().abs() * squares[name].sqrt()
        torch.testing.assert_close(scores[name].double(), expected, **SAME)


def losses_of_single_changes(capture: Capture, model: nn.Module, path: str, name: str) -> tuple[Tensor, Tensor]:
    """The loss of a module as it is pruned, and its change if one weight of ``name`` is pruned, or revived."""
    block = find_blocks(model)[0]
    sites = modules_of(block)[path]
    dense = {site.name: capture.pruned.dense_weights[site.name].double() for site in sites}
    sparse = {site.name: capture.weights[site.name].double() for site in sites}
    target = module_output(block.module, capture, dense, path)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return (module_output(block.module, capture, weights, path) - target).square().sum()

    before, changes = loss(sparse), torch.zeros_like(sparse[name])
    for i, j in torch.cartesian_prod(torch.arange(4), torch.arange(changes.shape[1])).tolist():  # a few rows
        weight = sparse[name].clone()
        weight[i, j] = 0 if capture.pruned.masks[name][i, j] else dense[name][i, j]
        changes[i, j] = loss({**sparse, name: weight}) - before
    return before, changes


@pytest.mark.parametrize(
    ("path", "kind", "least"), [("mlp", "down_proj", 0.99), ("mlp", "gate_proj", 0.95), ("self_attn", "v_proj", 0.95)]
)
def test_signed_scores_are_the_changes_of_the_loss(path: str, kind: str, least: float) -> None:
    """Against brute force over single weights; the curvature, which is estimated, is averaged over many v."""
    capture, model = captured(rarefy.Wanda(), PerRow(0.5), 8)
    name = f"model.layers.0.{path}.{kind}"
    sites = modules_of(find_blocks(model)[0])[path]
    every = [
        _Scorer(capture.pruned, path, sites, Barber("signed", seed=seed)).scores(lambda: None)[name]
        for seed in range(60)
    ]
    mask = capture.pruned.masks[name]
    predicted = torch.stack(every).mean(dim=0).double()[:4]
    with torch.no_grad():
        before, changes = losses_of_single_changes(capture, model, path, name)
    actual = torch.where(mask, changes, -changes)[:4]
    assert float(torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1]) > least
    # what is predicted to be a gain by more than the noise of the estimate is one, and the other way round
    clear = predicted.abs() > predicted.abs().median()
    assert float((predicted.sign() == actual.sign())[clear].double().mean()) > least
    assert float(before) > 0


def test_signed_swaps_lower_the_error_of_the_block() -> None:
    """By the share of the energy of the states behind it, on the windows of the calibration, without a refit."""

    def leaving(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(WINDOWS, output_hidden_states=True).hidden_states[1]  # type: ignore[no-any-return]

    def lost(barber: Barber | None) -> float:
        more = {"include": ["*.layers.0.*"], "pattern": PerRow(0.6), "method": rarefy.Magnitude()}
        ours, dense = leaving(pruned_with(barber, **more)[0]), leaving(make_model("llama"))
        return float((ours - dense).square().sum() / dense.square().sum())

    plain, signed = lost(None), lost(Barber("signed", 0.3, refit=False))
    assert signed < 0.97 * plain


# --- the step


@each_score
@pytest.mark.parametrize("pattern", [Unstructured(0.6), PerRow(0.6), NM(2, 4)], ids=str)
def test_counts_are_exact_and_masks_change(score: Any, pattern: Pattern) -> None:
    model, report = pruned_with(Barber(score, 0.6), pattern=pattern, method=rarefy.Magnitude())
    plain, before = pruned_with(None, pattern=pattern, method=rarefy.Magnitude())
    sites = [site for block in find_blocks(model) for site in block.sites]
    for site, record, unchanged in zip(sites, report.layers, before.layers, strict=True):
        pattern.check(site.read() != 0)
        assert record.kept == unchanged.kept
        assert record.pattern == unchanged.pattern
        assert 0 < int(record.details[REVIVED]) <= record.size // 4, record.name
    first = find_blocks(plain)[0].sites
    changed = [int(((a.read() != 0) & (b.read() == 0)).sum()) for a, b in zip(sites, first)]
    assert changed == [record.details[REVIVED] for record in report.layers[: len(first)]]


@pytest.mark.parametrize(
    ("architecture", "score"),
    [
        ("opt", "published"),
        ("gpt2", "signed"),
        ("gemma3", "published"),
        ("phi3", "signed"),
        ("gpt_neox", "published"),
        ("mixtral", "published"),
        ("mixtral", "signed"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
def test_blocks_of_every_kind_are_seen_module_by_module(architecture: str, score: Any) -> None:
    model, report = pruned_with(Barber(score, 0.3), architecture, pattern=NM(2, 4))
    for site in (site for block in find_blocks(model) for site in block.sites):
        assert not list(NM(2, 4).excess(site.read() != 0)), site.name
    assert sum(int(record.details[REVIVED]) for record in report.layers) > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(modules_of(find_blocks(model)[0])) == 2


def test_records_have_the_errors_of_what_was_written() -> None:
    barber = Barber("published", 0.2, refit=False)
    model, report = pruned_with(barber, include=["*.layers.0.*"])
    dense = make_model("llama")
    site = find_blocks(model)[0].sites[-1]
    assert site.name.endswith("down_proj")
    seen: list[Tensor] = []
    dense.get_submodule(site.name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        dense(WINDOWS)
    W0, X = dense.get_submodule(site.name).weight, torch.cat(seen)
    error = reference.relative_error(site.read(), W0, X.T @ X)
    assert report.layers[-1].relative_error == pytest.approx(error, rel=1e-3)
    assert torch.equal(site.read(), W0 * (site.read() != 0))  # dense values, as published
    refitted = pruned_with(replace(barber, refit=True), include=["*.layers.0.*"])[1]
    assert all(a.relative_error < b.relative_error for a, b in zip(refitted.layers, report.layers, strict=True))


@each_score
def test_two_runs_are_the_same_bits(score: Any) -> None:
    states = [pruned_with(each)[0].state_dict() for each in [Barber(score, 0.1)] * 2]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    other = pruned_with(Barber(score, 0.1, seed=1))[0].state_dict()
    same = all(torch.equal(tensor, other[name]) for name, tensor in states[0].items())
    assert same == (score == "published")


@each_score
def test_progress_counts_every_part(score: Any) -> None:
    with_another = {"refresh": True} if score == "signed" else {"matching": rarefy.Matching(passes=1, batch_size=4)}
    for more in ({}, with_another):
        seen: list[tuple[int, int]] = []
        pruned_with(Barber(score), on_progress=lambda done, total, _, seen=seen: seen.append((done, total)), **more)
        assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]


def test_the_steps_behind_it_see_its_masks() -> None:
    swapped, _ = pruned_with(Barber("published", 1.0))
    matched, _ = pruned_with(Barber("published", 1.0), matching=rarefy.Matching(1, 1e-3, 4, held_out=0))
    plain, _ = pruned_with(None)
    for one, other, before in zip(*(find_blocks(each)[0].sites for each in (swapped, matched, plain)), strict=True):
        assert torch.equal(one.read() != 0, other.read() != 0)
        assert not torch.equal(one.read(), other.read())
        assert not torch.equal(one.read() != 0, before.read() != 0)


@each_score
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(score: Any, dtype: torch.dtype) -> None:
    model = make_model("llama").to(dtype)
    rarefy.prune(model, WINDOWS, pattern=NM(2, 4), method=rarefy.Wanda(), barber=Barber(score, 0.2))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for site in (site for block in find_blocks(model) for site in block.sites):
        NM(2, 4).check(site.read() != 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"score": "other"}, "barber.score is 'other', but must be one of published, signed"),
        ({"share": 0.0}, "barber.share is 0.0, but must be a share above 0, up to 1"),
        ({"share": 1.5}, "barber.share is 1.5"),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(rarefy.InputError, match=sentence):
        Barber(**options)


def test_what_does_not_go_with_it_is_said() -> None:
    for read in (
        lambda: PruneSettings(Uniform(NM(2, 4)), rarefy.Wanda(), steps=[Barber()], drift=0.2),
        lambda: Recipe.read({"model": "model", "barber": "signed", "drift": 0.2}),
    ):
        with pytest.raises(rarefy.InputError, match="barber does not go with .*drift: it puts weights of the dense"):
            read()
    method = rarefy.Then(rarefy.Wanda(), rarefy.Quantize())
    with pytest.raises(rarefy.InputError, match=r"barber does not go with wanda\+quantize: it would move weights"):
        PruneSettings(Uniform(NM(2, 4)), method, steps=[Barber()])
    with pytest.raises(rarefy.InputError, match="--barber does not go with --method"):
        Recipe.read({"model": "model", "method": "wanda+quantize", "barber": "published"})
    for pattern in (rarefy.Columns(16), TransposableNM(2, 4)):
        with pytest.raises(rarefy.PatternError, match=f"barber swaps single weights of a row, which {pattern} does"):
            pruned_with(Barber(), pattern=pattern)


def test_a_recipe_says_it() -> None:
    steps = Recipe.read({"model": "model", "barber": "signed", "barber_share": "0.2", "match": 1, "seed": 3})
    settings = steps.prune_settings()
    assert settings.steps == [Barber("signed", 0.2, seed=3), rarefy.Matching(1, seed=3)]
    assert settings.needs_dense_weights
    assert Recipe.read({"model": "model"}).prune_settings().steps == []
