"""How much goes for a size: candidates against brute force, and a search that is never worse than a single rule."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rarefy.errors import InputError, ModelError
from rarefy.models.blocks import find_blocks
from rarefy.structure.counts import Counts, Removable, Space, _Weights, find_space
from rarefy.structure.depth import BlockSets
from rarefy.structure.memo import Memo
from rarefy.structure.parts import Kind, find_parts
from rarefy.structure.search import FINALISTS, Measured, Round, _next, block_sets, plan_rounds, search_counts
from rarefy.structure.shrink import Removal, shrink, shrunk_skeleton
from rarefy.structure.width import remove_parts, towards_dense
from test_shrink import deep

WINDOWS = torch.randint(3, 160, (16, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return deep("llama", 5)


def parameters_left(model: PreTrainedModel, counts: Counts) -> int:
    """Of the smaller model that transformers builds."""
    parts = []
    kinds: tuple[Kind, ...] = ("heads", "neurons")
    for kind in kinds:
        if counts.of(kind):
            found = find_parts(model, kind)
            mask = torch.arange(found.number) >= counts.of(kind)
            parts.append((found, dict.fromkeys(found.exits, mask)))
    kept = tuple(range(len(find_blocks(model)) - counts.blocks))
    made = shrunk_skeleton(model, Removal(kept, tuple(parts)))
    return sum({id(one): one.numel() for one in made.parameters()}.values())


@pytest.mark.parametrize("size", [0.9, 0.75, 0.6])
def test_candidates_are_all_that_matter(model: PreTrainedModel, size: float) -> None:
    space = find_space(model, size, multiple=16)
    assert (dict(space.numbers), space.refused) == ({"blocks": 5, "heads": 2, "neurons": 64}, {})
    every = [Counts(*one) for one in itertools.product(range(5), range(2), (0, 16, 32, 48))]
    enough = [one for one in every if parameters_left(model, one) <= size * model.num_parameters()]

    def is_least(one: Counts) -> bool:
        return not any(
            other != one and all(other.of(kind) <= one.of(kind) for kind in ("blocks", "heads", "neurons"))
            for other in enough
        )

    assert list(space.candidates) == [one for one in enough if is_least(one)]


@pytest.mark.parametrize("among", [(), ("heads",), ("neurons",), ("blocks", "heads")])
def test_the_least_size_that_is_named_can_be_asked_for(model: PreTrainedModel, among: tuple[Removable, ...]) -> None:
    with pytest.raises(InputError, match="a share of at least") as error:
        find_space(model, 0.01, among, multiple=8)
    least = float(re.findall(r"at least (\d\.\d+),", str(error.value))[0])
    assert find_space(model, least, among, multiple=8).candidates
    with pytest.raises(InputError, match="a share of at least"):
        find_space(model, least - 0.001, among, multiple=8)


def test_counts_are_found_by_bisection(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    left = _Weights.left
    monkeypatch.setattr(_Weights, "left", lambda self, counts: calls.append(counts) or left(self, counts))
    space = find_space(model, 0.75, multiple=1)
    assert len(calls) <= 10 * 7  # 10 counts of blocks and heads, 64 of neurons
    for one in space.candidates:
        for fewer in ({"blocks": one.blocks - 1}, {"heads": one.heads - 1}, {"neurons": one.neurons - 1}):
            if min(fewer.values()) >= 0:
                assert parameters_left(model, replace(one, **fewer)) > space.limit >= parameters_left(model, one)


def test_kinds_that_may_go(model: PreTrainedModel) -> None:
    for kind in ("blocks", "neurons"):
        (only,) = find_space(model, 0.8, [kind], 8).candidates
        assert only.is_single
        assert only.of(kind)
    experts = find_space(deep("mixtral", 4), 0.7)
    assert set(experts.numbers) == {"blocks", "heads"}
    assert "no MLP neurons" in experts.refused["neurons"]
    with pytest.raises(ModelError, match="no MLP neurons"):
        find_space(deep("mixtral", 4), 0.7, ["neurons"])
    with pytest.raises(
        InputError, match=r"--size is 0.01, but must be a share of at least 0\.\d+, as blocks and heads"
    ):
        find_space(model, 0.01)
    with pytest.raises(ModelError, match="a single block"):
        find_space(deep("llama", 1), 0.9, ["blocks"])


def test_few_candidates_are_drawn() -> None:
    singles = [Counts(0, 0, 9), Counts(7, 0, 0), Counts(0, 5, 0)]
    others = [Counts(i, j, 1) for i in range(1, 6) for j in range(1, 5)]
    space = Space(1, {}, 1, tuple(sorted(singles + others)), {})
    drawn = space.drawn(10, seed=0)
    assert len(drawn) == 10
    assert {*singles} <= {*drawn}
    assert drawn == sorted(drawn) == space.drawn(10, seed=0) != space.drawn(10, seed=1)
    assert space.drawn(99, 0) == sorted(space.candidates)
    assert space.drawn(1, 0) == sorted(singles)


def test_rounds_end_with_all_windows_and_all_that_is_single() -> None:
    many = [Counts(3), Counts(0, 2), *(Counts(i, 1, i) for i in range(1, 23))]
    assert plan_rounds(many, 32, 4) == [Round(24, 6, 2), Round(FINALISTS + 2, 24, 8)]
    assert plan_rounds(many[:5], 32, 4) == [Round(5, 24, 8)]
    assert plan_rounds(many, 2, 4)[-1] == Round(FINALISTS + 2, 2, 2)  # too few to share out
    sizes = [one.candidates for one in plan_rounds([*many, *many, *many, *many], 64, 4)]
    assert sizes == [96, 24, FINALISTS + 8]


def test_a_round_keeps_all_that_is_single_and_the_best_of_the_others() -> None:
    ranked = [Measured(Counts(i, 1, 1), 0, (), i / 10) for i in (4, 1, 3, 2)]
    ranked += [Measured(Counts(5), 0, (), 1.0), Measured(Counts(0, 0, 9), 0, (), 2.0)]
    assert _next(ranked, 4) == [Counts(0, 0, 9), Counts(1, 1, 1), Counts(4, 1, 1), Counts(5)]


def search(sets: BlockSets, space: Space, **options: Any) -> Any:
    candidates = space.drawn(32, 0)
    remove = block_sets(sets, [one.blocks for one in candidates])
    return search_counts(sets, candidates, remove, **options)


def test_a_search_ends_with_none_worse_than_a_single_rule(model: PreTrainedModel) -> None:
    space = find_space(model, 0.75, multiple=8)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    sets = BlockSets(model, WINDOWS, 4)
    found = search(sets, space)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    last = max(one.round for one in found.all)
    final = {one.counts: one.kl for one in found.all if one.round == last}
    assert {one for one in space.candidates if one.is_single} <= final.keys()
    assert found.best.kl == min(final.values())
    assert len([one for one in found.all if one.round == 0]) == len(space.candidates)

    # What it says of the best one is what that model is.
    wanted = []
    kept = tuple(i for i in range(5) if i not in found.best.remove)
    made = shrink(model, Removal(kept))
    made.load_state_dict({name: one.clone() for name, one in made.state_dict().items()}, assign=True)
    for kind in ("heads", "neurons"):
        if number := found.best.counts.of(kind):  # type: ignore[arg-type]
            parts = find_parts(made, kind)  # type: ignore[arg-type]
            wanted.append((parts, parts.number - number))
    wanted, path = towards_dense(model, kept, made, wanted, WINDOWS[4:], 4)
    remove_parts(made, WINDOWS[4:], wanted, dense=path)
    assert sets.measure_model(made, 4).kl == pytest.approx(found.best.kl, rel=1e-4)
    assert parameters_left(model, found.best.counts) <= 0.75 * model.num_parameters()


def test_what_is_known_is_not_measured_again(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    space = find_space(model, 0.8, multiple=16)
    memo = Memo()
    first = search(BlockSets(model, WINDOWS[:8], 4, memo), space)
    monkeypatch.setattr("rarefy.structure.search.remove_parts", None)
    monkeypatch.setattr(BlockSets, "measure_model", None)
    monkeypatch.setattr(BlockSets, "_without_each", None)
    again = search(BlockSets(model, WINDOWS[:8], 4, memo), space)
    assert again == first
    monkeypatch.undo()
    assert search(BlockSets(model, WINDOWS[:8], 4), space) == first  # the same bits without it


def test_what_has_no_stock_form_is_left_out() -> None:
    model = deep("deepseek_v3", 4)  # the first block is dense, all others have experts
    sets = BlockSets(model, WINDOWS[:4], 4)
    candidates = [Counts(1), Counts(2)]
    found = search_counts(sets, candidates, {1: (0,), 2: (1, 2)})
    assert [one.kl is None for one in found.all] == [True, False]
    assert found.best.counts == Counts(2)
    with pytest.raises(ModelError, match="No smaller DeepseekV3ForCausalLM that was tried has a stock form"):
        search_counts(sets, [Counts(1)], {1: (0,)})
