"""The search for an allocation: its steps on a known function, its distances against runs of whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

import rarefy
from cli_for_tests import Rarefy, prune_arguments
from models_for_tests import _GROUPED, VOCABULARY, build, make_model, save_folder
from rarefy.allocation.budget import Layer
from rarefy.allocation.profile import Profile, published
from rarefy.allocation.search import UNIT, Point, changeable, num_evaluations, profile_at, search
from rarefy.calibration.finish import Ending, output_form
from rarefy.calibration.record import record
from rarefy.models.blocks import find_blocks
from rarefy.pruning import search as searching
from rarefy.pruning.search import own_windows

WINDOWS = torch.randint(3, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")


def _layers(blocks: int, kinds: tuple[str, ...] = KINDS) -> list[Layer]:
    return [Layer(f"model.layers.{block}.{kind}", block, (8, 8)) for block in range(blocks) for kind in kinds]


def _four_blocks() -> nn.Module:
    return build(LlamaConfig(**{**_GROUPED, "num_hidden_layers": 4}))


# --- The steps


@pytest.mark.parametrize("best", [(0.05, 0.03, -0.04), (-0.03, 0.0, 0.05), (0.0, 0.0, 0.0)])
def test_the_search_finds_the_best_profile_within_a_step(best: tuple[float, ...]) -> None:
    tried: list[Point] = []

    def distance(point: Point) -> float:
        tried.append(point)
        profile = profile_at(point)
        found = (profile.slope, profile.query_key, profile.value_output)
        return sum((one - other) ** 2 for one, other in zip(found, best, strict=True))

    found = profile_at(search(_layers(8), 0.7, distance))
    assert (found.slope, found.query_key, found.value_output) == pytest.approx(best, abs=0.011)
    assert len(tried) == len(set(tried)) == num_evaluations(_layers(8)) == 20
    assert profile_at(tried[0]) == Profile()
    start = published(0.7)
    assert profile_at(tried[1]).slope == pytest.approx(start.slope, abs=UNIT / 2)
    assert profile_at(tried[1]).value_output == pytest.approx(start.value_output, abs=UNIT / 2)


def test_only_what_makes_a_difference_is_changed() -> None:
    assert changeable(_layers(8)) == ["slope", "query_key", "value_output"]
    assert changeable(_layers(3)) == ["query_key", "value_output"]
    assert changeable(_layers(8, ("c_attn", "c_fc"))) == ["slope"]
    assert changeable(_layers(8, ("q_proj", "k_proj"))) == ["slope"]  # one offset for all of them changes nothing
    assert search(_layers(1, ("c_fc",)), 0.5, lambda _: pytest.fail("nothing is to be found")) == (0, 0, 0)
    slopes: list[Point] = []
    search(_layers(8, ("c_fc",)), 0.5, lambda point: slopes.append(point) or abs(point[0] - 40.0))
    assert {point[1:] for point in slopes} == {(0, 0)}
    assert len(slopes) <= num_evaluations(_layers(8, ("c_fc",))) == 8


@pytest.mark.parametrize(("number", "size"), [(32, 1), (32, 3), (7, 3), (5, 5), (40, 12)])
def test_every_process_has_some_of_the_evenly_spaced_windows(number: int, size: int) -> None:
    shares = [range(rank * number // size, (rank + 1) * number // size) for rank in range(size)]
    found = [own_windows(number, share, size) for share in shares]
    assert all(found)
    all_of_them = [window for own in found for window in own]
    assert len(all_of_them) == min(number, max(8, size))
    assert all_of_them == own_windows(number, range(number), 1) or size > 8


# --- What follows the blocks


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3", "qwen3_moe", "gpt_neox"])
def test_the_ending_makes_the_logits_of_a_plain_pass(architecture: str) -> None:
    model = make_model(architecture)
    blocks = find_blocks(model)
    modules = [block.module for block in blocks]
    stream = record(model, modules, WINDOWS, 2)
    for block in blocks:
        form = output_form(stream, block.module, block.index)
        stream.advance(block.module, block.index)
    ending = Ending(model, modules, form, stream.window_dim)
    with ending.instead_of_blocks():
        found = torch.cat([ending.logits(WINDOWS[i : i + 2], stream.states[i : i + 2]) for i in (0, 2, 4)])
    with torch.no_grad():
        torch.testing.assert_close(found, model(WINDOWS).logits, rtol=0, atol=1e-4)  # logits of some units, float32


# --- In a run


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, float]]:
    """The allocations that were tried, and their distances."""
    seen: list[tuple[Any, float]] = []
    original = searching._Distances.of

    def of(self: Any, pattern_of: Any) -> float:
        found = original(self, pattern_of)
        seen.append((pattern_of, found))
        return found

    monkeypatch.setattr(searching._Distances, "of", of)
    return seen


def _kl(model: nn.Module, dense: nn.Module) -> float:
    with torch.no_grad():
        q, p = (each(WINDOWS).logits.double().log_softmax(-1) for each in (model, dense))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_best_allocation_is_taken_by_distances_of_whole_models(tried: list[tuple[Any, float]]) -> None:
    progress: list[tuple[int, int]] = []
    options: dict[str, Any] = {"method": rarefy.SparseGPT(), "batch_size": 2}
    model = _four_blocks()
    report = rarefy.prune(
        model,
        WINDOWS,
        pattern=rarefy.Unstructured(0.6),
        allocation="search",
        on_progress=lambda done, total, _: progress.append((done, total)),
        **options,
    )
    assert len(tried) == 20
    assert progress == [(done, len(progress)) for done in range(1, len(progress) + 1)]
    for pattern_of, distance in tried[::9]:
        again = _four_blocks()
        rarefy.prune(again, WINDOWS, pattern=pattern_of, **options)
        assert distance == pytest.approx(_kl(again, _four_blocks()), rel=1e-4)
    best = min(tried, key=lambda one: one[1])[0]
    assert [layer.kept for layer in report.layers] == [
        best.patterns[layer.name].count((layer.shape[0], layer.shape[1])) for layer in report.layers
    ]
    # The loop found the model as it was, so with the solver of the search it ends where the search was.
    assert _kl(model, _four_blocks()) == pytest.approx(min(distance for _, distance in tried), rel=1e-4)
    assert report.pruned == sum(round(0.6 * layer.shape[0] * layer.shape[1]) for layer in report.layers)


@pytest.mark.parametrize("options", [{"allocation": "search"}, {"allocation": "fisher", "row_weights": "fisher"}])
def test_a_model_in_float16_has_them_as_well(options: dict[str, Any]) -> None:
    model = make_model("llama").half()
    report = rarefy.prune(model, WINDOWS, pattern=rarefy.Unstructured(0.5), method=rarefy.SparseGPT(), **options)
    assert len({layer.sparsity for layer in report.layers}) > 1


@pytest.mark.parametrize("options", [{"allocation": "search"}, {"row_weights": "fisher"}])
def test_a_model_without_a_head_is_refused_in_one_sentence(options: dict[str, Any]) -> None:
    with pytest.raises(rarefy.ModelError, match="^LlamaModel gives no logits"):
        rarefy.prune(
            make_model("llama").model, WINDOWS, pattern=rarefy.Unstructured(0.5), method=rarefy.Wanda(), **options
        )


@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gemma3"])
def test_experts_and_excluded_blocks(tried: list[tuple[Any, float]], architecture: str) -> None:
    model = make_model(architecture)
    rarefy.prune(
        model,
        WINDOWS,
        pattern=rarefy.NM(4, 8),
        method=rarefy.Wanda(),
        allocation="search",
        batch_size=5,
        include=["*.0.*"],
    )
    assert len(tried) == 14  # two offsets: two blocks have no slope
    distances = [distance for _, distance in tried]
    assert min(distances) > 0


def test_a_search_goes_on_in_the_dtype_that_it_began_to_compute_in(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_folder(_four_blocks().to(torch.bfloat16), tmp_path / "four")
    options = ("--method", "wanda", "--sparsity", 0.6, "--allocation", "search", "--no-texts")
    arguments = [folder if each == shelf / "model" else each for each in prune_arguments(shelf, *options)]
    original, calls = searching._Distances.of, []
    kept: list[dict[str, float]] = []

    def of(self: Any, pattern_of: Any) -> float:
        calls.append(self._entering().compute_dtype)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return original(self, pattern_of)

    monkeypatch.setattr(searching._Distances, "of", of)
    for gain in (8.0, 0.5):  # the machine is busy with other things when the run goes on
        monkeypatch.setattr("rarefy.pruning.precision.bfloat16_gain", lambda gain=gain: gain)
        assert rarefy_(*arguments, "-o", tmp_path / "out").status == 130
        kept.append(json.loads((tmp_path / "out" / "unfinished" / "search.json").read_text()))
    assert [len(one) for one in kept] == [1, 2]
    assert set(calls) == {torch.bfloat16}


@pytest.mark.parametrize("more", [(), ("--dtype", "float32")], ids=["on disk", "in memory"])
def test_a_search_that_was_killed_goes_on_with_what_it_knows(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    folder = save_folder(_four_blocks(), tmp_path / "four")
    options = ("--method", "wanda", "--sparsity", 0.6, "--allocation", "search", "--no-texts", *more)
    arguments = [folder if each == shelf / "model" else each for each in prune_arguments(shelf, *options)]
    original, calls = searching._Distances.of, []

    def of(self: Any, pattern_of: Any) -> float:
        calls.append(pattern_of)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, pattern_of)

    monkeypatch.setattr(searching._Distances, "of", of)
    stopped = rarefy_(*arguments, "-o", tmp_path / "out")
    assert stopped.status == 130
    assert "what was measured of the dense model is kept, and the same command goes on" in stopped.err
    done = rarefy_(*arguments, "-o", tmp_path / "out")
    assert done.status == 0, done.err
    assert len(calls) == 1 + 20
    assert rarefy_(*arguments, "-o", tmp_path / "whole").status == 0
    files = [(tmp_path / output / "model" / "model.safetensors").read_bytes() for output in ("out", "whole")]
    assert files[0] == files[1]
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (facts["allocation"], facts["pattern"]) == ("search", "search row 60%")
    assert rarefy_("inspect", tmp_path / "out").status == 0
