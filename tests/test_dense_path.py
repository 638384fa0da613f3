"""Repair towards the dense model: exits make up for removed blocks, as far as a linear map of their inputs can."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from models_for_tests import build
from rarefy.errors import ModelError
from rarefy.models.blocks import find_blocks
from rarefy.structure import dense_path, exits
from rarefy.structure.dense_path import HOLE, LATER, DensePath, exit_factor
from rarefy.structure.depth import BlockSets
from rarefy.structure.exits import ExitRecord
from rarefy.structure.parts import find_parts
from rarefy.structure.shrink import Removal, shrink, with_order
from rarefy.structure.width import remove_parts, towards_dense
from test_shrink import deep

WINDOWS = torch.randint(3, 160, (24, 32), generator=torch.Generator().manual_seed(1))


def repaired(
    dense: PreTrainedModel, kept: Sequence[int], number: int | None = None, share_weights: bool = True
) -> tuple[PreTrainedModel, list[ExitRecord]]:
    """The model with the kept blocks, and ``number`` neurons kept in each, repaired; and the records of its exits."""
    small = shrink(dense if share_weights else copy.deepcopy(dense), Removal(tuple(kept)))
    neurons = find_parts(small, "neurons")
    removed = [] if number is None else [(with_order(small, neurons, WINDOWS[:1]), number)]
    wanted, path = towards_dense(dense, kept, small, removed, WINDOWS, 5)
    return small, remove_parts(small, WINDOWS, wanted, batch_size=5, dense=path)[1]


def behind(model: PreTrainedModel, block: int) -> Tensor:
    """What leaves a block, over all tokens, in float64."""
    seen: list[Tensor] = []
    hook = find_blocks(model)[block].module.register_forward_hook(
        lambda _module, _args, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    hook.remove()
    return seen[0].flatten(0, 1).double()


def entering(model: PreTrainedModel, linear: nn.Module) -> Tensor:
    """What a linear reads, over all tokens, in float64."""
    seen: list[Tensor] = []
    hook = linear.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    hook.remove()
    return seen[0].flatten(0, -2).double()


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox"])
def test_the_exit_before_a_hole_is_the_solution_of_plain_least_squares(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "DAMPINGS", (1e-7,))
    dense = deep(architecture, 5)
    kept = (0, 1, 4)
    plain = shrink(copy.deepcopy(dense), Removal(kept))
    site = find_parts(plain, "neurons").exits[1]
    X = entering(plain, site.module)
    missing = behind(dense, 3) - behind(plain, 1)  # Y0 - Y
    best = site.read().double() + torch.linalg.lstsq(X, missing).solution.T
    monkeypatch.setattr(dense_path, "LATER", 0.0)
    small, (record,) = repaired(dense, kept)
    found = find_parts(small, "neurons").exits[1].read().double()
    assert float((found - best).norm()) < 1e-2 * float((best - site.read()).norm())
    whole = float(behind(deep(architecture, 5), 3).square().sum())
    left = behind(deep(architecture, 5), 3) - behind(small, 1)
    assert record.block == 1
    assert record.drift == pytest.approx(float(missing.square().sum()) / whole, rel=1e-3)
    assert record.drift_left == pytest.approx(float(left.square().sum()) / whole, rel=1e-3)


def test_no_other_weight_is_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = deep("llama", 4)
    target = behind(dense, 2)
    small, _ = repaired(dense, (0, 1, 3))
    site = find_parts(small, "neurons").exits[1]
    weight = site.read()
    least = float((behind(small, 1) - target).square().sum())
    for seed in range(4):
        step = 0.2 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        site.write(weight + step)
        assert float((behind(small, 1) - target).square().sum()) > least


@pytest.mark.parametrize("kept", [(0, 1, 4), (1, 2, 4), (0, 3)])
@pytest.mark.parametrize("number", [None, 40])
def test_the_repaired_model_is_closer_to_the_dense_one(kept: tuple[int, ...], number: int | None) -> None:
    dense = deep("qwen3", 5)
    sets = BlockSets(dense, WINDOWS)
    plain = shrink(copy.deepcopy(dense), Removal(kept))
    if number is not None:
        parts = with_order(plain, find_parts(plain, "neurons"), WINDOWS[:1])
        remove_parts(plain, WINDOWS, [(parts, number)], batch_size=5)
    small, records = repaired(dense, kept, number)
    assert sets.measure_model(small).kl < sets.measure_model(plain).kl
    assert all(record.drift_left < record.drift for record in records if record.drift)


def test_weights_that_both_models_share_are_as_good_as_copies() -> None:
    found = [
        repaired(deep("llama", 5), (0, 2, 4), 40, share_weights=share)[0].state_dict() for share in (True, False)
    ]
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_blocks_that_do_nothing_leave_all_others_as_they_are() -> None:
    dense = deep("llama", 4)
    for parameter in find_blocks(dense)[2].module.parameters():
        nn.init.zeros_(parameter)
    before = copy.deepcopy(dense).state_dict()
    repaired(dense, (0, 1, 3))
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


def test_the_share_is_of_the_place() -> None:
    dense = deep("llama", 5)
    small = shrink(dense, Removal((0, 2, 4)))
    ends = find_parts(small, "neurons").exits
    path = DensePath(dense, (0, 2, 4), small, ends, WINDOWS[:2], 2)
    assert [path.share(place, changed=place > 0) for place in range(3)] == [HOLE, HOLE, LATER]
    path = DensePath(dense, (0, 1, 2), small, ends, WINDOWS[:2], 2)
    assert [path.share(place, changed=False) for place in range(3)] == [0, 0, HOLE]
    path = DensePath(dense, (2, 3, 4), small, ends, WINDOWS[:2], 2)
    assert [path.share(place, changed=False) for place in range(3)] == [LATER] * 3


def test_a_block_that_scales_what_it_adds() -> None:
    config = transformers.GraniteConfig(
        **deep("llama", 3).config.to_diff_dict() | {"residual_multiplier": 0.25, "model_type": "granite"}
    )
    dense = build(config)
    first, site = find_blocks(dense)[0], find_parts(dense, "neurons").exits[0]
    assert exit_factor(dense, first, site, WINDOWS[:1]) == pytest.approx(0.25, rel=1e-4)
    _, (record,) = repaired(dense, (0, 1))
    assert record.drift is not None
    assert record.drift_left is not None
    assert record.drift_left < 0.9 * record.drift


def test_a_norm_behind_the_exit_is_refused() -> None:
    dense = deep("gemma3", 4)
    small = shrink(dense, Removal((0, 2)))
    with pytest.raises(ModelError, match="does not add to its hidden states what .*down_proj puts out"):
        DensePath(dense, (0, 2), small, find_parts(small, "neurons").exits, WINDOWS, 4)


def test_the_drift_without_a_repair_is_that_of_removed_columns_at_zero() -> None:
    dense = deep("llama", 3)
    _, records = repaired(dense, (0, 1, 2), 32, share_weights=False)
    before = [behind(dense, block) for block in range(3)]
    unrepaired = copy.deepcopy(dense)
    neurons = find_parts(unrepaired, "neurons")
    wanted = [(with_order(unrepaired, neurons, WINDOWS[:1]), 32)]
    remove_parts(unrepaired, WINDOWS, wanted, batch_size=5, repair=False)
    # The first exit that follows the dense path is that of block 1; what enters it was repaired, and so is nearer.
    left = float((behind(unrepaired, 1) - before[1]).square().sum() / before[1].square().sum())
    (record,) = (one for one in records if one.block == 1)
    assert record.drift is not None
    assert record.drift_left is not None
    assert record.drift_left < record.drift < 1.05 * left
