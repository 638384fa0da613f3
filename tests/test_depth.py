"""Which blocks are removed: sets are measured as whole models, scores share their passes, searches get no worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rarefy.errors import InputError
from rarefy.evaluation.divergence import divergence
from rarefy.models.blocks import find_blocks
from rarefy.structure import rules
from rarefy.structure.depth import BlockSets, lowest, with_copies
from rarefy.structure.exits import CHOICES
from rarefy.structure.parts import find_parts
from rarefy.structure.rules import RULES, choose_blocks, taylor_scores
from rarefy.structure.shrink import Removal, shrink, with_order
from rarefy.structure.width import remove_parts
from test_shrink import deep

WINDOWS = torch.randint(3, 160, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return deep("llama", 6)


@pytest.fixture
def sets(model: PreTrainedModel) -> BlockSets:
    return BlockSets(model, WINDOWS, batch_size=3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3", "qwen3_moe"])
def test_a_set_is_measured_as_the_model_with_these_blocks_is(architecture: str) -> None:
    dense = deep(architecture, 4)
    kept = (0, 2) if architecture == "gemma3" else (0, 3)
    found = BlockSets(dense, WINDOWS, batch_size=3).measure(kept)
    expected = divergence(shrink(dense, Removal(kept)), dense, WINDOWS.flatten(), WINDOWS.shape[1])
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert torch.tensor(found.loss).exp() == pytest.approx(expected.perplexity.perplexity, rel=1e-4)


def test_copies_are_in_every_second_window() -> None:
    windows = torch.arange(3 * 9).view(3, 9)
    expected = windows.clone()
    expected[1] = torch.tensor([9, 10, 11, 12, 13, 10, 11, 12, 17])
    assert with_copies(windows).tolist() == expected.tolist()
    assert windows[1, 5] == 14  # the windows themselves stay


def test_sets_are_measured_on_copies(model: PreTrainedModel) -> None:
    found = BlockSets(model, WINDOWS, batch_size=3, copies=True)
    expected = BlockSets(model, with_copies(WINDOWS), batch_size=3)
    kept = (0, 2, 3, 5)
    assert found.measure(kept) == expected.measure(kept)
    assert found.measure(kept, 2) == expected.measure(kept, 2)
    assert found.measure(kept) != BlockSets(model, WINDOWS, batch_size=3).measure(kept)
    assert torch.equal(found.windows, WINDOWS)


def test_all_blocks_are_no_distance(sets: BlockSets) -> None:
    assert sets.measure(range(6)).kl == pytest.approx(0, abs=1e-5)  # sums of float32


def test_leaving_out_each_shares_passes_and_measures_the_same(sets: BlockSets) -> None:
    kept = [0, 1, 3, 4, 5]
    before = sets.block_tokens
    shared = sets.without_each(kept)
    passes = (sets.block_tokens - before) / WINDOWS.numel()
    assert passes == 5 + 5 * 4 / 2
    sets.memo.clear()
    for index in kept:
        alone = sets.measure([other for other in kept if other != index])
        assert shared[index].kl == pytest.approx(alone.kl, rel=1e-5)
        assert shared[index].loss == pytest.approx(alone.loss, rel=1e-5)


def test_some_are_left_out_on_a_part_of_the_windows(sets: BlockSets) -> None:
    kept, before = [0, 1, 3, 4, 5], sets.block_tokens
    found = sets.without_each(kept, only=[1, 4], num_windows=2)
    assert (sets.block_tokens - before) / WINDOWS[:3].numel() == 5 + 3 + 1
    assert found == {index: sets.measure([i for i in kept if i != index], 2) for index in (1, 4)}
    sets.memo.clear()
    for index, one in found.items():
        alone = BlockSets(sets.model, WINDOWS[:3], 3).measure([i for i in kept if i != index])
        assert one.kl == pytest.approx(alone.kl, rel=1e-5)


def test_greedy_measures_on_all_windows_what_is_close_on_a_few(model: PreTrainedModel) -> None:
    sets = BlockSets(model, WINDOWS, batch_size=1)
    found = choose_blocks(sets, 2, "greedy")
    first = lowest(found.scores, 1)[0]
    kept = [index for index in range(6) if index != first]
    passes = found.block_tokens / WINDOWS.numel()
    some = {index: one.kl for index, one in sets.without_each(kept, num_windows=1).items()}
    close = lowest(some, 4)
    whole = {index: one.kl for index, one in sets.without_each(kept, only=close).items()}
    assert sorted(found.remove) == sorted([first, *lowest(whole, 1)])
    assert found.trace == [found.scores[first], min(whole.values())]
    again = 5 / 4 + (5 * 4 / 2) / 4 + 5 + sum(len(kept) - 1 - kept.index(index) for index in close)
    assert passes == pytest.approx(6 + 6 * 5 / 2 + again)


def test_a_part_of_the_windows(sets: BlockSets) -> None:
    few = sets.measure([0, 1, 2], 3)
    assert few.kl == pytest.approx(BlockSets(sets.model, WINDOWS[:3], 2).measure([0, 1, 2]).kl, rel=1e-5)


def test_the_model_is_left_as_it_was(sets: BlockSets) -> None:
    sets.without_each(range(6))
    assert all("forward" not in block.module.__dict__ for block in find_blocks(sets.model))


def test_the_rules(sets: BlockSets) -> None:
    scores = {index: one.kl for index, one in sets.without_each(range(6)).items()}
    found = {rule: choose_blocks(sets, 2, rule, generations=4, offspring=4, steps=10) for rule in RULES}
    assert list(found["kl"].remove) == lowest(scores, 2)
    for rule, chosen in found.items():
        assert len({*chosen.remove}) == 2, rule
        assert chosen.distance == sets.measure([i for i in range(6) if i not in chosen.remove])
    assert found["search"].distance.kl <= min(found[rule].distance.kl for rule in ("kl", "perplexity"))
    assert found["search"].trace == sorted(found["search"].trace, reverse=True)
    first = lowest(scores, 1)[0]
    assert first in found["greedy"].remove
    again = {i: one.kl for i, one in sets.without_each([i for i in range(6) if i != first]).items()}
    assert sorted(found["greedy"].remove) == sorted([first, *lowest(again, 1)])
    assert choose_blocks(sets, 2, "search", generations=4, offspring=4).remove == found["search"].remove
    for num in (0, 6):
        with pytest.raises(InputError, match="from 1 to 5, as the model has 6 blocks"):
            choose_blocks(sets, num, "kl")


def test_a_long_search_finds_the_best_of_all_pairs(sets: BlockSets) -> None:
    best = min(sets.measure([i for i in range(6) if i not in (a, b)]).kl for a in range(6) for b in range(a + 1, 6))
    found = choose_blocks(sets, 2, "search", generations=20, offspring=12)
    assert found.distance.kl == pytest.approx(best)


@pytest.mark.parametrize("alone", [True, False])
def test_taylor_scores_are_those_of_one_backward_pass(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "LOGIT_BYTES", 4 * 160 * 5)  # the logits of a few tokens at a time
    if not alone:
        monkeypatch.setattr(rules, "head_alone", lambda *_: False)
    model = deep("llama", 3)
    scores = taylor_scores(model, WINDOWS, 3)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(True)
    logits = model(input_ids=WINDOWS).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten()).backward()
    for block in find_blocks(model):
        expected = sum(
            float((p * p.grad).detach().abs().sum()) for p in block.module.parameters() if p.grad is not None
        )
        assert scores[block.index] == pytest.approx(expected, rel=1e-4)


def kl_of(small: PreTrainedModel, dense: PreTrainedModel) -> float:
    return divergence(small, dense, WINDOWS.flatten(), WINDOWS.shape[1]).kl


@pytest.mark.parametrize("choice", CHOICES)
def test_parts_are_removed_and_what_is_left_is_repaired(choice: str) -> None:
    dense = deep("qwen3", 2)
    calibration = torch.randint(3, 160, (12, 16), generator=torch.Generator().manual_seed(2))
    found: dict[bool, float] = {}
    for repair in (True, False):
        model = deep("qwen3", 2)
        wanted = [
            (with_order(model, find_parts(model, kind), WINDOWS), num)
            for kind, num in (("heads", 1), ("neurons", 48))
        ]  # type: ignore[arg-type]
        parts, records = remove_parts(model, calibration, wanted, repair=repair, choice=choice)  # type: ignore[arg-type]
        small = shrink(model, Removal((0, 1), tuple(parts)))
        assert (small.config.num_key_value_heads, small.config.intermediate_size) == (1, 48)
        assert small.model.layers[0].mlp.down_proj.weight.shape == (32, 48)
        check_same(small, model)
        found[repair] = kl_of(small, dense)
        assert [record.kind for record in records] == ["heads", "neurons"] * 2
        for record in records:
            assert record.error < record.masked_error if repair else record.error == record.masked_error
    assert found[True] < found[False]


def check_same(small: PreTrainedModel, model: PreTrainedModel) -> None:
    def logits(of: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            result: Tensor = of(input_ids=WINDOWS, use_cache=False).logits
        return result

    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=2e-5)
