"""The loop over blocks, end to end on a random small model of every architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from models_for_tests import ARCHITECTURES, VOCABULARY, make_model
from rarefy.calibration.collect import collect
from rarefy.calibration.record import record
from rarefy.calibration.stream import HiddenStates
from rarefy.errors import CalibrationError, InputError, NumericalError, PatternError
from rarefy.layer.pattern import NM, Fixed, Pattern, PerRow, Unstructured
from rarefy.layer.problem import LayerProblem
from rarefy.methods.base import Method
from rarefy.methods.compose import Then
from rarefy.methods.refit import PCG
from rarefy.models.blocks import Block, find_blocks
from rarefy.pruning.records import LayerRecord

NUM, LENGTH, BATCH = 5, 20, 2  # longer than a sliding window of 16; the last batch is a half

# The same products of one block, alone and within the model, in batches of another size.
HIDDEN = {"rtol": 1e-5, "atol": 1e-5}
# A sum of 100 products in float32, relative to its largest entry.
GRAM = 1e-5

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def windows(seed: int = 0, num: int = NUM) -> Tensor:
    return torch.randint(3, VOCABULARY, (num, LENGTH), generator=torch.Generator().manual_seed(seed))


def prune(model: nn.Module, pattern: Pattern, method: Method, **more: Any) -> rarefy.Report:
    return rarefy.prune(model, windows(), pattern=pattern, method=method, **({"batch_size": BATCH} | more))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def site_names(model: nn.Module) -> list[str]:
    return [site.name for block in find_blocks(model) for site in block.sites]


def inputs_of(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What modules read in a plain forward pass of the model, (num, length, in)."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in modules.items():

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"]).clone()

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.inference_mode():
        model(input_ids=windows(), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def recorded(model: nn.Module) -> tuple[HiddenStates, list[Block]]:
    blocks = find_blocks(model)
    stream = record(model, [block.module for block in blocks], windows(), BATCH)
    return stream, blocks


# --- the stream of hidden states


@each_architecture
def test_replayed_hidden_states_are_those_of_the_model(architecture: str) -> None:
    model = make_model(architecture)
    before = parameters(model)
    plain = inputs_of(model, {block.name: block.module for block in find_blocks(model)})
    outputs: list[Tensor] = []
    handle = find_blocks(model)[-1].module.register_forward_hook(
        lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        model(input_ids=windows(), use_cache=False)
    handle.remove()
    stream, blocks = recorded(model)
    assert stream.num_batches == 3
    for block in blocks:
        torch.testing.assert_close(stream.states, plain[block.name], **HIDDEN)
        stream.advance(block.module, block.index)
    torch.testing.assert_close(stream.states, outputs[0], **HIDDEN)
    assert not any("forward" in block.module.__dict__ for block in blocks)
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


@each_architecture
def test_grams_are_those_of_a_plain_forward_pass(architecture: str) -> None:
    model = make_model(architecture)
    stream, blocks = recorded(model)
    modules = {site.name: site.module for block in blocks for site in block.sites}
    inputs = inputs_of(model, modules)
    assert len(modules) >= 8
    for block in blocks:
        grams = collect(stream, block.module, block.index, block.sites, means=True)
        assert grams.keys() == {site.name for site in block.sites}
        for site in block.sites:
            X = inputs[site.name].flatten(0, -2).double()
            gram = grams[site.name]
            assert gram.num_tokens == len(X) == NUM * LENGTH
            assert gram.size == site.shape[1]
            exact = X.T @ X
            assert float((gram.H - exact).abs().max()) <= GRAM * float(exact.abs().max()), site.name
            torch.testing.assert_close(gram.mean, X.mean(0), rtol=1e-4, atol=1e-5)
            for other in block.sites:  # one Gram for each distinct input
                equal = torch.equal(inputs[site.name], inputs[other.name]) if gram.size == other.shape[1] else False
                assert (grams[other.name] is gram) == equal, (site.name, other.name)
        assert all(not module._forward_pre_hooks for module in block.module.modules())
        stream.advance(block.module, block.index)


def test_q_k_v_share_a_gram_and_so_do_gate_and_up() -> None:
    stream, blocks = recorded(make_model("llama"))
    grams = {
        name.rpartition(".")[2]: gram for name, gram in collect(stream, blocks[0].module, 0, blocks[0].sites).items()
    }
    assert grams["q_proj"] is grams["k_proj"] is grams["v_proj"]
    assert grams["gate_proj"] is grams["up_proj"]
    assert len({id(gram) for gram in grams.values()}) == 4
    assert not grams["q_proj"].has_means


# --- pruning


@each_architecture
@pytest.mark.parametrize(
    ("pattern", "method"),
    [(Unstructured(0.6), rarefy.SparseGPT()), (NM(2, 4), Then(rarefy.Wanda(), PCG()))],
    ids=["layer", "2:4"],
)
def test_counts_are_exact_and_all_else_is_untouched(architecture: str, pattern: Pattern, method: Method) -> None:
    model = make_model(architecture)
    before, names = parameters(model), site_names(model)
    seen: list[LayerRecord] = []
    report = prune(model, pattern, method, on_layer=seen.append)
    assert [layer.name for layer in report.layers] == names
    assert seen == report.layers
    sites = {site.name: (block.index, site) for block in find_blocks(model) for site in block.sites}
    for layer in report.layers:
        block, site = sites[layer.name]
        weight = site.read()
        assert tuple(layer.shape) == site.shape
        assert layer.block == block
        assert layer.pattern == str(pattern)
        assert layer.kept == pattern.count(site.shape) == int((weight != 0).sum()), layer.name
        pattern.check(weight != 0)
        assert not torch.signbit(weight[weight == 0]).any()
        assert 0 < layer.relative_error < 1
        assert not layer.failed
        assert layer.seconds > 0
        assert layer.peak_bytes > 0
    assert report.sparsity == pytest.approx(sum(r.pruned for r in report.layers) / sum(r.size for r in report.layers))
    assert report.seconds > 0
    assert str(method) in str(report)
    after = parameters(model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(value, before[name]), name
    with torch.inference_mode():
        assert bool(torch.isfinite(model(input_ids=windows()).logits).all())


@each_architecture
def test_the_same_seed_gives_the_same_bits(architecture: str) -> None:
    results = []
    for _ in range(2):
        model = make_model(architecture)
        report = prune(model, PerRow(0.5), rarefy.SparseGPT())
        results.append((parameters(model), [layer.relative_error for layer in report.layers]))
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())
    assert results[0][1] == results[1][1]


def test_each_block_sees_what_the_pruned_blocks_before_it_make() -> None:
    model = make_model("llama")
    dense = copy.deepcopy(model)
    report = prune(model, Unstructured(0.6), rarefy.Wanda())
    # In the pruned model a layer of the second block that comes first reads what it was calibrated on.
    name = "model.layers.1.self_attn.q_proj"
    X = inputs_of(model, {name: model.get_submodule(name)})[name].flatten(0, -2)
    W0, H = dense.get_submodule(name).weight, X.T @ X
    expected = rarefy.solve(W0, H, Unstructured(0.6), rarefy.Wanda())
    assert torch.equal(model.get_submodule(name).weight, expected.weight)
    errors = {layer.name: layer.relative_error for layer in report.layers}
    assert errors[name] == pytest.approx(expected.relative_error, rel=1e-4)
    dense_X = inputs_of(dense, {name: dense.get_submodule(name)})[name].flatten(0, -2)
    assert not torch.allclose(X, dense_X, rtol=1e-2, atol=1e-2)


def test_dense_is_a_pattern_too() -> None:
    model = make_model("llama")
    before = parameters(model)
    report = prune(model, Unstructured(0.0), rarefy.Wanda())
    assert report.sparsity == 0
    assert all(layer.relative_error == 0 for layer in report.layers)
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


def test_tied_weights_stay_tied() -> None:
    model = make_model("qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prune(model, Unstructured(0.5), rarefy.Magnitude())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_half_precision_stays_and_so_do_all_other_bits(architecture: str, dtype: torch.dtype) -> None:
    model = make_model(architecture).to(dtype)
    before, names = parameters(model), site_names(model)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    addresses = {name: id(value) for name, value in model.named_parameters()}
    report = prune(model, NM(2, 4), rarefy.SparseGPT())
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype, name
        if name.removesuffix(".weight") not in names:
            assert torch.equal(value, before[name]), name
    for name, value in model.named_buffers():
        assert value.dtype == buffers[name].dtype
        assert torch.equal(value, buffers[name]), name
    assert {name: id(value) for name, value in model.named_parameters()} == addresses
    sites = {site.name: site for block in find_blocks(model) for site in block.sites}
    for layer in report.layers:
        weight = sites[layer.name].read()
        assert weight.dtype == dtype
        assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())
        assert layer.kept == weight.numel() // 2
        assert 0 < layer.relative_error < 1


def test_errors_are_those_of_the_weights_as_written() -> None:
    model = make_model("llama").to(torch.bfloat16)
    dense = copy.deepcopy(model)
    stream, blocks = recorded(dense)
    report = prune(model, PerRow(0.5), rarefy.SparseGPT())
    # The first block's Grams are known: its first layer is graded on what is in the model now.
    site = blocks[0].sites[0]
    from rarefy.calibration.stream import convert_calls
    from rarefy.pruning.precision import compute_dtype, computing_in

    convert_calls(stream, compute_dtype(stream.states.dtype, stream.device))
    with computing_in(blocks[0].module, stream.compute_dtype):
        gram = collect(stream, blocks[0].module, 0, blocks[0].sites)[site.name]
    problem = LayerProblem(site.read(), gram)
    written = model.get_submodule(site.name).weight
    assert report.layers[0].relative_error == problem.relative_error(written)


# --- what is pruned


def test_include_and_exclude() -> None:
    model = make_model("llama")
    before = parameters(model)
    report = prune(model, PerRow(0.5), rarefy.Wanda(), include=["*.mlp.*"], exclude=["*.down_proj"])
    names = [layer.name for layer in report.layers]
    assert names == [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up")]
    for name, value in parameters(model).items():
        assert torch.equal(value, before[name]) == (name.removesuffix(".weight") not in names), name
    second = make_model("llama")
    report = prune(second, PerRow(0.5), rarefy.Wanda(), include=["model.layers.1.*"])
    assert {layer.block for layer in report.layers} == {1}
    # The last block is left out: only the first is run.
    third = make_model("llama")
    assert {layer.block for layer in prune(third, PerRow(0.5), rarefy.Wanda(), exclude=["*.layers.1.*"]).layers} == {
        0
    }


@pytest.mark.parametrize("more", [{"include": ["*.nothing"]}, {"exclude": ["*.nothing"]}, {"exclude": ["*"]}])
def test_globs_that_match_nothing_are_refused(more: dict[str, Any]) -> None:
    model = make_model("llama")
    before = parameters(model)
    with pytest.raises(InputError, match="include|exclude"):
        prune(model, PerRow(0.5), rarefy.Wanda(), **more)
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (NM(2, 5), r"2:5, but model\.layers\.0\.self_attn\.q_proj has 32 inputs, which 5 does not divide"),
        (NM(1, 64), r"1:64, but model\.layers\.0\.self_attn\.q_proj has 32 inputs"),
        (Fixed(torch.ones(32, 32, dtype=torch.bool)), r"model\.layers\.0\.self_attn\.k_proj has shape"),
    ],
    ids=str,
)
def test_patterns_that_do_not_fit_name_the_layer_and_change_nothing(pattern: Pattern, reason: str) -> None:
    model = make_model("llama")
    before = parameters(model)
    with pytest.raises(PatternError, match=reason):
        prune(model, pattern, rarefy.Wanda())
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


def test_refits_cannot_come_first() -> None:
    with pytest.raises(rarefy.MethodError, match="cannot come first"):
        prune(make_model("llama"), PerRow(0.5), PCG())


# --- windows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ids: ids.index_fill(1, torch.tensor([3]), VOCABULARY), f"token ids from 0 to {VOCABULARY - 1}"),
        (lambda ids: ids.index_fill(1, torch.tensor([3]), -1), "ids from -1 to"),
        (lambda ids: ids.int(), "must be int64 token ids"),
        (lambda ids: ids[0], r"shape \(20,\)"),
        (lambda ids: ids[:0], "must be int64 token ids"),
        (lambda ids: ids[:, :0], "must be int64 token ids"),
        (lambda ids: ids.float(), "float32"),
    ],
)
def test_windows_that_are_none(change: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(CalibrationError, match=reason):
        rarefy.prune(make_model("llama"), change(windows()), pattern=PerRow(0.5), method=rarefy.Wanda())


def test_the_size_of_batches_changes_rounding_only() -> None:
    errors = []
    for size in (1, 2, 100):
        report = prune(make_model("gemma3"), PerRow(0.5), rarefy.SparseGPT(), batch_size=size)
        errors.append([layer.relative_error for layer in report.layers])
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert errors[2] == pytest.approx(errors[0], rel=0.02)


# --- failures


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_a_weight_names_the_layer(bad: float) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight[2, 3] = bad
    with pytest.raises(NumericalError, match=r"weight of model\.layers\.1\.mlp\.up_proj"):
        prune(model, PerRow(0.5), rarefy.Wanda(), include=["*.up_proj"])


def test_nan_in_the_inputs_names_the_layer() -> None:
    model = make_model("llama")
    model.model.embed_tokens.weight[int(windows()[0, 0])] = torch.nan
    with pytest.raises(NumericalError, match=r"Gram matrix of model\.layers\.0\.self_attn\.q_proj"):
        prune(model, PerRow(0.5), rarefy.Wanda())


class Failing(rarefy.Magnitude):
    """Fails on the up projections."""

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Any = None) -> rarefy.Solution:
        if problem.shape == (64, 32):
            raise NumericalError("no luck today")
        return super().solve(problem, pattern, start)


def test_a_failing_layer_is_reported_masked_and_strict_makes_it_an_error() -> None:
    model = make_model("llama")
    report = prune(model, PerRow(0.5), Failing())
    failed = [layer.name for layer in report.layers if layer.failed]
    assert failed == [layer.name for layer in report.failed]
    assert {name.rpartition(".")[2] for name in failed} == {"gate_proj", "up_proj"}
    for name in failed:
        weight = model.get_submodule(name).weight
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert name in str(report)
    assert report.failed[0].details["failure"] == "no luck today"
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.gate_proj: no luck today"):
        prune(make_model("llama"), PerRow(0.5), Failing(), strict=True)
    assert not [
        layer
        for layer in prune(make_model("llama"), PerRow(0.5), rarefy.Magnitude(), strict=True).layers
        if layer.failed
    ]


def test_an_error_leaves_no_hooks_and_no_other_dtype() -> None:
    model = make_model("llama").to(torch.bfloat16)
    model.train()
    with pytest.raises(NumericalError):
        prune(model, PerRow(0.5), Failing(), strict=True)
    assert model.training
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__


# --- progress


@pytest.mark.parametrize(
    "more", [{}, {"include": ["*.layers.1.*"]}, {"exclude": ["*.layers.1.*"]}, {"batch_size": 1}]
)
def test_progress_rises_by_ones_to_its_total(more: dict[str, Any]) -> None:
    seen: list[tuple[int, int, str]] = []
    report = prune(
        make_model("llama"), PerRow(0.5), rarefy.Wanda(), on_progress=lambda *args: seen.append(args), **more
    )
    totals = {total for _, total, _ in seen}
    assert len(totals) == 1
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]
    last = report.layers[-1]
    assert any(last.name in note and f"{last.relative_error:.4f}" in note for _, _, note in seen)


def test_training_mode_is_kept() -> None:
    model = make_model("opt")
    model.train()
    prune(model, PerRow(0.5), rarefy.Magnitude())
    assert model.training
    model.eval()
    prune(model, PerRow(0.5), rarefy.Magnitude())
    assert not model.training


def test_weights_beyond_float16_are_clipped_and_said() -> None:
    class Doubling(rarefy.Magnitude):
        """A method that leaves float16's range."""

        def solve(self, problem: Any, pattern: Any, start: Any = None) -> Any:
            solution = super().solve(problem, pattern, start)
            solution.weight.mul_(1e6)
            return solution

    model = make_model("llama").half()
    windows = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"weights beyond the range .* clipped: model\.layers\.0"):
        report = rarefy.prune(
            model, windows, pattern=rarefy.NM(2, 4), method=Doubling(), include=["model.layers.0.*.o_proj"]
        )
    assert report.layers[0].details["overflowed"] > 0
    assert bool(torch.isfinite(model.get_submodule("model.layers.0.self_attn.o_proj").weight).all())
