"""Several processes that prune one model: like one process, but for rounding; and none of them alone ends well."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

import rarefy
from models_for_tests import _GROUPED, build, save_folder
from ranks_for_tests import Ranks, experts_and_windows, float64_grams, pruned_in_float64
from rarefy.errors import OutputError
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import NM, Fixed, Pattern, PerRow
from rarefy.methods import build as build_method
from rarefy.models.sites import LinearSite
from rarefy.parallel.sharing import Piece, _cost, share_out
from rarefy.parallel.world import World
from rarefy.pruning.parts import join
from rarefy.pruning.records import geometric_mean
from rarefy.pruning.settings import PruneSettings, Uniform
from rarefy.pruning.solve import solve_piece
from rarefy.runs.journal import Journal

#: Two runs in float32 whose sums have another order: by how much the error of one layer differs, and the mean of all.
#: On four processors and two batch sizes at most 0.03 and 0.01 were seen.
LAYER_ERROR, MEAN_ERROR = 0.15, 0.03
#: Two runs in float64: of a matrix, the norm of the difference by its own.
FLOAT64_WEIGHTS = 1e-9
#: The same where AdamW has moved them, with masters in float32: its steps have the size of the learning rate, 1e-3,
#: also where a gradient is little more than rounding.
MATCHED_WEIGHTS = 1e-4
#: Of layers.jsonl, what no two runs have in common.
_MEASURED = ("seconds", "peak_bytes")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four blocks and a text."""
    folder = tmp_path_factory.mktemp("ranks")
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 160}
    save_folder(build(LlamaConfig(**{**_GROUPED, **sizes})), folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 200)
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("processes")) as runner:
        yield runner


def _arguments(shelf: Path, output: Path, *more: object) -> list[object]:
    said = ["prune", shelf / "model", "-o", output, "--method", "sparsegpt", "--batch-size", 2, "--quiet"]
    text = ["--calibration", shelf / "text.txt", "--num-samples", 7, "--sequence-length", 48]
    return [*said, *text, *more]


def _records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "layers.jsonl").read_text().splitlines()]


def _weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model" / "model.safetensors")


def _assert_alike(found: Path, expected: Path) -> None:
    """What holds on every machine: counts are exact, and errors differ by what a few other weights make of them.

    In float32 a hard threshold keeps another weight of two that are nearly equal, depending on the order of sums;
    which weights are kept is compared in float64 (test_the_same_supports_in_float64).
    """
    assert sorted(path.name for path in found.iterdir()) == ["layers.jsonl", "model", "recipe.yaml", "run.json"]
    ones, others = _records(found), _records(expected)
    for one, other in zip(ones, others, strict=True):
        for key in ("name", "block", "shape", "pattern", "pattern_spec", "kept", "status", "failed", "steps"):
            assert one[key] == other[key], key
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=LAYER_ERROR)
        assert one["peak_bytes"] > 0
    means = [geometric_mean(layer["relative_error"] for layer in layers) for layers in (ones, others)]
    assert means[0] == pytest.approx(means[1], rel=MEAN_ERROR)
    weights, expected_weights = _weights(found), _weights(expected)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert int((tensor == 0).sum()) == int((weights[name] == 0).sum()), name


def _assert_same_supports(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor == 0, found[name] == 0), name
        assert float((found[name] - tensor).norm()) <= FLOAT64_WEIGHTS * float(tensor.norm()), name


def _result(output: Path) -> dict[str, object]:
    """All files of the model but its card, and the records but what was measured."""
    files = {file.name: file.read_bytes() for file in (output / "model").iterdir() if file.name != "README.md"}
    layers = [{key: value for key, value in one.items() if key not in _MEASURED} for one in _records(output)]
    return {**files, "layers": layers}


# --- Alone, and who gets what


def test_alone_everything_is_what_it_was() -> None:
    world = World.current()
    assert world == World(0, 1)
    tensor = torch.ones(2)
    world.sum_([tensor])
    world.broadcast_(tensor, 0)
    assert tensor.tolist() == [1, 1]
    assert world.gather("a") == ["a"]
    assert world.from_first(lambda: 3) == 3
    assert world.place(torch.device("cuda")) == torch.device("cuda")
    with pytest.raises(KeyError), world.together():
        raise KeyError


@pytest.mark.parametrize(("number", "size"), [(7, 3), (3, 3), (128, 8), (5, 4)])
def test_shares_of_windows_are_nearly_equal_and_in_order(number: int, size: int) -> None:
    shares = [World(rank, size).share(number) for rank in range(size)]
    assert [each for share in shares for each in share] == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert min(map(len, shares)) > 0


_LLAMA = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def _costs(pieces: Sequence[Piece], shapes: Sequence[tuple[int, int]], size: int) -> list[list[float]]:
    """Of the pieces of each process."""
    return [
        [_cost(piece.stop - piece.start, shapes[piece.layer][1]) for piece in pieces if piece.rank == rank]
        for rank in range(size)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("can_be_cut", [True, False])
def test_all_rows_are_shared_out_fairly(size: int, can_be_cut: bool) -> None:
    pieces = share_out(_LLAMA, size, [can_be_cut] * len(_LLAMA))
    rows = [(piece.layer, row) for piece in pieces for row in range(piece.start, piece.stop)]
    assert rows == [(layer, row) for layer, (out, _) in enumerate(_LLAMA) for row in range(out)]
    assert (len(pieces) > len(_LLAMA)) == (can_be_cut and size > 2)  # for two, one and the other six are alike
    costs = _costs(pieces, _LLAMA, size)
    loads = [sum(each) for each in costs]
    # No process has more than a fair share and one more piece.
    assert max(loads) <= sum(loads) / size + max(cost for each in costs for cost in each)
    if can_be_cut:
        whole = _costs(share_out(_LLAMA, size, [False] * len(_LLAMA)), _LLAMA, size)
        assert max(loads) < max(map(sum, whole)) or size < 3


def test_a_layer_is_cut_only_where_it_is_more_than_a_fair_share() -> None:
    assert len(share_out([(8, 4)] * 4, 2, [True] * 4)) == 4
    assert [(piece.start, piece.stop, piece.rank) for piece in share_out([(9, 4)], 2, [True])] == [
        (0, 4, 1),
        (4, 9, 0),
    ]
    assert len(share_out([(3, 400)], 8, [True])) == 3


_CUT: list[tuple[str, Pattern]] = [
    ("magnitude", PerRow(0.5)), ("wanda", PerRow(0.5)), ("wanda", NM(2, 4)), ("sparsegpt", PerRow(0.5)),
    ("sparsegpt", NM(2, 4)), ("wanda+pcg", PerRow(0.6)), ("dsnot", PerRow(0.5)), ("wanda+swaps", PerRow(0.5)),
    ("admm-reselect", NM(2, 4)), ("alps", PerRow(0.7)), ("alps", NM(2, 4)), ("wanda+backsolve", NM(2, 4)),
    ("wanda+pcg", Fixed(torch.rand(24, 16, generator=torch.Generator().manual_seed(1)) > 0.6)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "pattern"), _CUT, ids=[f"{name} {pattern}" for name, pattern in _CUT])
def test_rows_that_are_solved_apart_are_those_of_the_whole(name: str, pattern: Pattern) -> None:
    method = build_method(name)
    assert method.rows_independent(pattern)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(24, 16, generator=generator)
    gram = Gram(16, means=True)
    gram.update(torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator) + 0.3)

    def solved(*pieces: Piece) -> tuple[Tensor, Any]:
        linear = torch.nn.Linear(16, 24, bias=False)
        linear.weight.data.copy_(dense)
        site = LinearSite("layer", linear)
        settings = PruneSettings(Uniform(pattern), method)
        with torch.no_grad():
            return linear.weight, join([solve_piece(site, piece, 0, gram, settings)[0] for piece in pieces])

    whole, expected = solved(Piece(0, 0, 24))
    weight, record = solved(Piece(0, 0, 7), Piece(0, 7, 8), Piece(0, 8, 24))
    assert torch.equal(weight == 0, whole == 0)
    torch.testing.assert_close(weight, whole, rtol=1e-4, atol=1e-5)
    assert (record.shape, record.kept, record.status, record.steps) == (
        *([24, 16], expected.kept),
        *(expected.status, expected.steps),
    )
    assert record.relative_error == pytest.approx(expected.relative_error, rel=1e-4)
    assert record.details == pytest.approx(expected.details, rel=1e-4)
    assert record.trace.keys() == expected.trace.keys()
    for key, numbers in expected.trace.items():
        assert record.trace[key] == pytest.approx(numbers, rel=1e-3, abs=1e-4), key


# --- Two and three processes against one


@pytest.mark.parametrize("more", [(), ("--dtype", "float32", "--calibration", "self")], ids=["on disk", "in memory"])
def test_two_processes_do_what_one_does(ranks: Ranks, shelf: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert ranks.run(2, *_arguments(shelf, tmp_path / "two", *more, "--log", tmp_path / "log")) == [0, 0], ranks.err()
    assert "weights are zero" in ranks.out()
    assert ranks.err() == ranks.out(1) == ranks.err(1) == ""
    assert sum("pruning: model.layers." in line for line in (tmp_path / "log").read_text().splitlines()) == 28
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert ranks.run(1, *_arguments(shelf, tmp_path / "one", *more)) == [0], ranks.err()
    _assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("part", [("--drift", 0.25), ("--refresh",)], ids=["drift", "refresh"])
def test_two_processes_look_beyond_the_layer_as_one_does(
    ranks: Ranks, shelf: Path, tmp_path: Path, part: tuple[str, ...]
) -> None:
    more = (*part, "--allocation", "profile", "--sparsity", 0.6)
    assert ranks.run(2, *_arguments(shelf, tmp_path / "two", *more)) == [0, 0], ranks.err()
    assert ranks.run(1, *_arguments(shelf, tmp_path / "one", *more)) == [0], ranks.err()
    _assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("allocation", ["fisher", "owl", "lsa", "alphapruning", "search"])
def test_two_processes_measure_what_one_does(ranks: Ranks, shelf: Path, tmp_path: Path, allocation: str) -> None:
    more = ("--allocation", allocation, "--sparsity", 0.6, "--method", "wanda", "--scope", "layer")
    assert ranks.run(2, *_arguments(shelf, tmp_path / "two", *more)) == [0, 0], ranks.err()
    assert ranks.run(1, *_arguments(shelf, tmp_path / "one", *more)) == [0], ranks.err()
    kept = [[record["kept"] for record in _records(tmp_path / output)] for output in ("two", "one")]
    sizes = [record["shape"][0] * record["shape"][1] for record in _records(tmp_path / "one")]
    assert len({one / size for one, size in zip(kept[0], sizes, strict=True)}) > 1
    # Facts are sums in another order, so what is rounded to whole weights may differ by some.
    assert sum(kept[0]) == sum(kept[1])
    assert kept[0] == pytest.approx(kept[1], abs=3)


def test_two_processes_reorder_and_rotate_alike(ranks: Ranks, shelf: Path, tmp_path: Path) -> None:
    """Nearly: what is chosen hangs on the last bits of the Grams, which two processes sum in another order."""
    more = ("--pattern", "2:4", "--permute", "--rotate")
    assert ranks.run(2, *_arguments(shelf, tmp_path / "two", *more)) == [0, 0], ranks.err()
    assert ranks.run(1, *_arguments(shelf, tmp_path / "one", *more)) == [0], ranks.err()
    assert ranks.run(1, *_arguments(shelf, tmp_path / "plain", *more[:2])) == [0], ranks.err()
    two, one, plain = (_records(tmp_path / name) for name in ("two", "one", "plain"))
    assert [record["details"].keys() for record in two] == [record["details"].keys() for record in one]
    errors = [math.prod(record["relative_error"] for record in each) ** (1 / len(one)) for each in (two, one, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    assert max(errors[:2]) < errors[2]


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_the_same_supports_in_float64(ranks: Ranks, tmp_path: Path, method: str) -> None:
    assert ranks.run(2, "call", "ranks_for_tests:prune_in_float64", tmp_path, method) == [0, 0], ranks.err()
    expected = pruned_in_float64(method)
    assert any(int((tensor == 0).sum()) for tensor in expected.values())
    for rank in (0, 1):
        _assert_same_supports(torch.load(tmp_path / f"{rank}.pt"), expected)


def test_two_processes_have_the_row_weights_of_one(ranks: Ranks, shelf: Path, tmp_path: Path) -> None:
    more = ("--row-weights", "fisher", "--scope", "layer", "--allocation", "profile", "--sparsity", 0.6)
    assert ranks.run(2, *_arguments(shelf, tmp_path / "two", *more)) == [0, 0], ranks.err()
    assert ranks.run(1, *_arguments(shelf, tmp_path / "one", *more)) == [0], ranks.err()
    _assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("size", [2, 3])
def test_matching_by_several_is_that_of_one(ranks: Ranks, tmp_path: Path, size: int) -> None:
    """Steps of two batches by two processes; three take steps of three, as one does that is asked to."""
    passes = 3
    assert ranks.run(size, "call", "ranks_for_tests:prune_in_float64", tmp_path, "wanda", passes) == [0] * size, (
        ranks.err() + ranks.err(1)
    )
    expected, plain = pruned_in_float64("wanda", passes, 2 * size), pruned_in_float64("wanda")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for name, tensor in expected.items():
        assert all(torch.equal(found[0][name], other[name]) for other in found), name
        assert torch.equal(tensor == 0, found[0][name] == 0), name
        assert float((found[0][name] - tensor).norm()) <= MATCHED_WEIGHTS * float(tensor.norm()), name
    moved = [float((plain[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items()]
    assert max(moved) > 100 * MATCHED_WEIGHTS


def test_three_processes_share_seven_windows_and_rows(ranks: Ranks, shelf: Path, tmp_path: Path) -> None:
    more = ("--method", "wanda", "--offload-dir", tmp_path)
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
    assert len(share_out(shapes, 3, [True] * len(shapes))) > len(shapes)  # so rows of a layer go to several of them
    assert ranks.run(3, *_arguments(shelf, tmp_path / "three", *more)) == [0, 0, 0], ranks.err()
    assert ranks.run(1, *_arguments(shelf, tmp_path / "one", *more)) == [0], ranks.err()
    _assert_alike(tmp_path / "three", tmp_path / "one")


def test_grams_that_are_shared_on_some_processes_only(ranks: Ranks) -> None:
    assert ranks.run(2, "call", "ranks_for_tests:add_up_unlike", "") == [0, 0], ranks.err() + ranks.err(1)


@pytest.mark.filterwarnings("ignore:.* weights of experts were solved with all tokens")
def test_experts_that_few_tokens_reach(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, "call", "ranks_for_tests:prune_experts", tmp_path) == [0, 0], ranks.err() + ranks.err(1)
    with float64_grams():
        model, windows = experts_and_windows()
        report = rarefy.prune(model, windows, pattern=NM(2, 4), method=rarefy.DSnoT(), batch_size=1)
    starved = [layer.name for layer in report.layers if "starved" in layer.details]
    assert 0 < len(starved) < sum("experts" in layer.name for layer in report.layers)
    for rank in (0, 1):
        weights, layers = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        _assert_same_supports(weights, model.state_dict())
        assert [layer.name for layer in layers if "starved" in layer.details] == starved
        for layer, expected in zip(layers, report.layers, strict=True):
            assert (layer.name, layer.kept) == (expected.name, expected.kept)
            assert layer.details == expected.details
    assert "24 weights" not in ranks.err(1)
    assert "weights of experts were solved with all tokens" in ranks.err()


# --- How they end


def test_an_error_on_one_is_an_error_on_all(ranks: Ranks) -> None:
    assert ranks.run(2, "call", "ranks_for_tests:fail_on_one", "") == [0, 0], ranks.err() + ranks.err(1)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--sparsity", 1.5), "--sparsity is 1.5, but must be a number in [0, 1), the fraction of zeros."),
        (("--num-samples", 1), "--num-samples is 1, but must be at least 2, a window for each process."),
        (("--shots", 3), "No such option: --shots"),
        (("--calibration", "none.txt"), "none.txt"),
    ],
)
def test_a_mistake_is_said_once(
    ranks: Ranks, shelf: Path, tmp_path: Path, more: tuple[object, ...], sentence: str
) -> None:
    (tmp_path / "out").mkdir()
    assert ranks.run(2, *_arguments(shelf, tmp_path / "out", *more)) == [2, 2]
    assert ranks.err().startswith("error: ")
    assert ranks.err().count("\n") == 1
    assert sentence in ranks.err()
    assert ranks.err(1) == ranks.out() == ranks.out(1) == ""
    assert not list((tmp_path / "out").iterdir())


def test_other_commands_and_missing_variables_are_refused(ranks: Ranks, shelf: Path) -> None:
    assert ranks.run(2, "eval", shelf / "model") == [2, 2]
    assert ranks.err() == "error: rarefy eval works in one process: start it without torchrun.\n"
    assert ranks.err(1) == ""
    assert ranks.run(2, "methods", MASTER_PORT="none") == [2, 2]
    assert ranks.err().startswith("error: The processes of this run do not find each other: ")


def test_processes_swap_the_weights_of_modules_together(ranks: Ranks, shelf: Path, tmp_path: Path) -> None:
    parts = ("--pattern", "2:4", "--barber", "published", "--barber-share", 0.3)
    for size in (1, 2):
        assert ranks.run(size, *_arguments(shelf, tmp_path / str(size), *parts)) == [0] * size, ranks.err()
    _assert_alike(tmp_path / "2", tmp_path / "1")
    revived = [[layer["details"]["revived"] for layer in _records(tmp_path / str(size))] for size in (1, 2)]
    assert sum(revived[0]) == pytest.approx(sum(revived[1]), rel=0.1)


def test_dass_is_told_the_same_norms_by_all_processes(ranks: Ranks, shelf: Path, tmp_path: Path) -> None:
    parts = ("--method", "dass", "--pattern", "2:4", "--along", "neurons")
    for size in (1, 2):
        assert ranks.run(size, *_arguments(shelf, tmp_path / str(size), *parts)) == [0] * size, ranks.err()
    _assert_alike(tmp_path / "2", tmp_path / "1")


def _wait_for(path: Path) -> None:
    limit = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < limit
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("killed", "more"),
    [
        (0, ()),
        (1, ("--dtype", "float32")),
        pytest.param(1, (), marks=pytest.mark.slow),
        pytest.param(0, ("--dtype", "float32"), marks=pytest.mark.slow),
    ],
    ids=["the first, on disk", "the other, in memory", "the other, on disk", "the first, in memory"],
)
def test_a_run_of_which_one_process_is_killed_goes_on_with_the_same_bits(
    ranks: Ranks, shelf: Path, tmp_path: Path, killed: int, more: tuple[str, ...]
) -> None:
    output, whole = tmp_path / "out", tmp_path / "undisturbed"
    processes = ranks.start(2, *_arguments(shelf, output, *more))
    _wait_for(output / "unfinished" / "block-00001.jsonl")  # so the first one is finished
    os.kill(processes[killed], signal.SIGKILL)
    began = time.monotonic()
    statuses = ranks.end()
    assert time.monotonic() - began < 20
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] == 1
    said = ranks.err(1 - killed)
    assert re.fullmatch(
        rf"error: Process {killed} of this run has ended or does not answer \(.*\); "
        r"(1 finished block is|[23] finished blocks are) kept, and the same command goes on from there\.\n",
        said,
    ), said
    assert ranks.err(killed) == ""
    assert [path.name for path in output.iterdir()] == ["unfinished"]
    assert ranks.run(2, *_arguments(shelf, output, *more)) == [0, 0], ranks.err()
    assert ranks.run(2, *_arguments(shelf, whole, *more)) == [0, 0], ranks.err()
    assert _result(output) == _result(whole)


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_processes_goes_on(ranks: Ranks, shelf: Path, tmp_path: Path, size: int) -> None:
    processes = ranks.start(2, *_arguments(shelf, tmp_path / "out"))
    _wait_for(tmp_path / "out" / "unfinished" / "block-00001.jsonl")
    for process in processes:
        os.kill(process, signal.SIGKILL)
    assert ranks.end() == [-signal.SIGKILL] * 2
    assert len(list((tmp_path / "out" / "unfinished").glob("states-*.bin"))) >= 2
    assert ranks.run(size, *_arguments(shelf, tmp_path / "out")) == [0] * size, ranks.err()
    assert ranks.run(1, *_arguments(shelf, tmp_path / "one")) == [0], ranks.err()
    _assert_alike(tmp_path / "out", tmp_path / "one")


def test_a_run_that_is_told_to_stop_says_so_and_is_kept(ranks: Ranks, shelf: Path, tmp_path: Path) -> None:
    processes = ranks.start(2, *_arguments(shelf, tmp_path / "out"))
    _wait_for(tmp_path / "out" / "unfinished" / "block-00001.jsonl")
    os.kill(processes[0], signal.SIGTERM)
    assert ranks.end() == [1, 1]
    assert "The process was told to stop (SIGTERM)" in ranks.err()
    assert "kept, and the same command goes on from there" in ranks.err()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished"]


def test_a_folder_that_is_not_shared_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.runs.journal.appears", lambda path: path.exists())
    progress = Journal(tmp_path / "out", leads=False)
    with pytest.raises(OutputError, match="not the same folder for all processes"):
        progress.follow((0, {}, []))
    (tmp_path / "out" / "unfinished").mkdir(parents=True)
    progress.follow((1, {}, []))
    assert progress.finished == 1
    progress.finish_block(1, [], [])
    progress.remove()
    assert progress.finished == 2
    assert list((tmp_path / "out").rglob("*")) == [tmp_path / "out" / "unfinished"]


@pytest.mark.slow
def test_torchrun(shelf: Path, tmp_path: Path) -> None:
    """What the other tests start by hand; and that it ends those that are left."""
    environment = {**os.environ, "PYTHONPATH": str(Path(rarefy.__file__).parents[1])}
    environment.pop("OMP_NUM_THREADS", None)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rarefy"]
    words = [str(word) for word in _arguments(shelf, tmp_path / "out")]
    running = subprocess.Popen([*start, *words], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "out" / "unfinished" / "block-00001.jsonl")
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert said.count("error: ") == 1, said
    assert "kept, and the same command goes on from there" in said
    done = subprocess.run(
        [*start, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weights are zero") == 1
    wrong = [*start, *words, "--sparsity", "2"]
    done = subprocess.run(wrong, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: --sparsity is 2") == 1
