"""Matching a block to the dense model keeps every zero and never leaves a block worse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from models_for_tests import VOCABULARY, make_model
from rarefy.calibration.record import record
from rarefy.models.blocks import find_blocks
from rarefy.pruning.loop import prune_blocks
from rarefy.pruning.matching import Matching
from rarefy.pruning.settings import PruneSettings, Uniform
from rarefy.pruning.steps import PrunedBlock
from rarefy.pruning.stores import BlockStore

WINDOWS = torch.randint(3, VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(0))
#: A random model's blocks change little; with a large learning rate few passes show an effect.
EAGER = Matching(passes=6, learning_rate=5e-3, batch_size=2)


def _pruned(architecture: str, matching: Matching | None, **options: Any) -> tuple[nn.Module, rarefy.Report]:
    model = make_model(architecture)
    options = {"pattern": rarefy.NM(2, 4), "method": rarefy.Wanda(), "batch_size": 2} | options
    return model, rarefy.prune(model, WINDOWS, matching=matching, **options)


def _outputs(model: nn.Module, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(windows).logits


def _distance(model: nn.Module, windows: Tensor) -> float:
    """How far the logits of a pruned model are from those of the dense one."""
    dense = _outputs(make_model("llama"), windows)
    return float((_outputs(model, windows) - dense).square().sum() / dense.square().sum())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma3", "mixtral"])
@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
def test_no_zero_is_filled_and_norms_are_trained(architecture: str) -> None:
    model, report = _pruned(architecture, Matching(passes=2, learning_rate=5e-3, batch_size=2, held_out=0))
    plain, _ = _pruned(architecture, None)
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, plain.get_parameter(name))
    }
    assert any("norm" in name or "ln_" in name for name in changed)
    inside = [block.name for block in find_blocks(model)]
    assert all(any(name.startswith(f"{block}.") for block in inside) for name in changed)
    for block, other in zip(find_blocks(model), find_blocks(plain), strict=True):
        for site, same in zip(block.sites, other.sites, strict=True):
            if block.index == 0:  # behind it, other inputs lead to other masks
                assert not site.read()[same.read() == 0].any(), site.name
            assert list(rarefy.NM(2, 4).excess(site.read() != 0)) == []
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())
    assert len(report.layers) == sum(len(block.sites) for block in find_blocks(model))


def test_it_comes_closer_to_the_dense_model_on_text_that_it_never_saw() -> None:
    unseen = torch.randint(3, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(1))
    pattern = {"pattern": rarefy.Unstructured(0.7)}
    plain, matched = (_distance(_pruned("llama", each, **pattern)[0], unseen) for each in (None, EAGER))
    assert matched < 0.9 * plain


def test_in_bfloat16_the_block_follows_its_float32_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with matrix units for bfloat16, where passes run with rounded weights."""
    monkeypatch.setattr("rarefy.pruning.stores.compute_dtype", lambda dtype, _: dtype)
    models = []
    for matching in (None, EAGER, EAGER):
        model = make_model("llama").bfloat16()
        rarefy.prune(model, WINDOWS, pattern=rarefy.NM(2, 4), method=rarefy.Wanda(), batch_size=2, matching=matching)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        for site in (site for block in find_blocks(model) for site in block.sites):
            assert list(rarefy.NM(2, 4).excess(site.read() != 0)) == []
        models.append(model)
    plain, matched, again = (_distance(model.float(), WINDOWS) for model in models)
    assert matched < 0.9 * plain
    assert matched == again


def test_two_runs_are_the_same_bits_and_another_seed_others() -> None:
    states = [_pruned("llama", each)[0].state_dict() for each in (EAGER, EAGER, Matching(6, 5e-3, 2, seed=1))]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert any(not torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())


def test_a_block_that_would_get_worse_is_left_as_it_was() -> None:
    model, _ = _pruned("llama", Matching(passes=2, learning_rate=0.9, batch_size=2))
    plain, _ = _pruned("llama", None)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_progress_counts_every_part() -> None:
    for matching in (EAGER, Matching(passes=1, held_out=0)):
        seen: list[tuple[int, int]] = []
        _pruned("llama", matching, on_progress=lambda done, total, _, seen=seen: seen.append((done, total)))
        assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe", "gemma3"])
@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
def test_the_dense_path_is_a_plain_pass_of_the_dense_model(architecture: str) -> None:
    leaving: list[Tensor] = []

    class Capture:
        needs_dense_path = True
        needs_dense_weights = False

        def check_pattern(self, *_: object) -> None:
            pass

        def num_parts(self, *_: object) -> int:
            return 0

        def __call__(self, pruned: PrunedBlock, on_part: object) -> None:
            assert pruned.leaving_dense is not None
            leaving.append(pruned.leaving_dense.states.clone())

    settings = PruneSettings(Uniform(rarefy.PerRow(0.7)), rarefy.Wanda(), batch_size=5, steps=[Capture()])
    prune_blocks(BlockStore(make_model(architecture)), WINDOWS, settings)
    dense, expected = make_model(architecture), []
    for block in find_blocks(dense):
        block.module.register_forward_hook(
            lambda _module, _args, output: expected.append(output[0] if isinstance(output, tuple) else output)
        )
    _outputs(dense, WINDOWS)
    for found, plain in zip(leaving, expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)  # float32, in batches of 5


def test_two_steps_are_those_of_a_plain_training_loop() -> None:
    """Matching one block, against autograd and torch's AdamW written down plainly."""
    model, plain = make_model("llama"), make_model("llama")
    matching = Matching(passes=2, learning_rate=1e-2, batch_size=12, held_out=0)
    captured: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    class Capture:
        needs_dense_path = True
        needs_dense_weights = False

        def check_pattern(self, *_: object) -> None:
            pass

        def num_parts(self, *_: object) -> int:
            return 0

        def __call__(self, pruned: PrunedBlock, on_part: object) -> None:
            assert pruned.leaving_dense is not None
            if pruned.block.index == 0:
                states = pruned.entering.states.clone(), pruned.leaving_dense.states.clone()
                captured.append((*states, dict(pruned.masks)))

    settings = PruneSettings(
        Uniform(rarefy.PerRow(0.5)), rarefy.Wanda(), batch_size=12, include=["*.0.*"], steps=[Capture(), matching]
    )
    prune_blocks(BlockStore(model.eval()), WINDOWS, settings)
    rarefy.prune(plain, WINDOWS, pattern=rarefy.PerRow(0.5), method=rarefy.Wanda(), batch_size=12, include=["*.0.*"])
    entering, leaving, masks = captured[0]
    block = find_blocks(plain)[0]
    dense = make_model("llama")
    stream = record(dense, [each.module for each in find_blocks(dense)], WINDOWS, 12)
    call = stream.calls[0][0]
    block.module.requires_grad_(True)
    optimizer = torch.optim.AdamW(block.module.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    for learning_rate in (1e-2, 5e-3):  # falling linearly to 0
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        output = block.module(entering, *call.args, **call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        ((output - leaving).square().sum() / leaving.square().sum()).backward()
        for site in block.sites:
            site.module.weight.grad.mul_(masks[site.name])
        optimizer.step()
    for name, parameter in block.module.named_parameters():
        trained = find_blocks(model)[0].module.get_parameter(name)
        torch.testing.assert_close(trained, parameter, rtol=0, atol=1e-4)  # a step moves weights by 1e-2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"passes": 0}, "matching.passes is 0, but must be a whole number of at least 1"),
        ({"learning_rate": 0.0}, "matching.learning_rate is 0.0, but must be a number between 0 and 1"),
        ({"batch_size": 0}, "matching.batch_size is 0"),
        ({"held_out": 1.0}, "matching.held_out is 1.0"),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(rarefy.InputError, match=sentence):
        Matching(**options)
