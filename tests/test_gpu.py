"""What only a GPU can show: the same answers as on the CPU, and exact half-precision Gram matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_for_tests import Rarefy
from models_for_tests import make_model
from rarefy import NM, Gram, InputError, LayerProblem, PatternError, PerRow, Unstructured, prune
from rarefy.calibration import ahead
from rarefy.layer.pattern import Pattern
from rarefy.layer.select import keep_largest
from rarefy.layer.transposable import TransposableNM
from rarefy.methods import METHODS
from rarefy.methods.base import run
from rarefy.pruning.barber import Barber
from rarefy.pruning.matching import Matching
from rarefy.structure.depth import BlockSets
from rarefy.structure.rules import Rule, choose_blocks
from test_shrink import deep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PATTERNS = (Unstructured(0.6), PerRow(0.6), NM(2, 4), TransposableNM(2, 4), TransposableNM(8, 16))
STARTING = [name for name, method in METHODS.items() if not method.needs_start]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", STARTING)
def test_a_method_finds_as_good_a_weight_on_the_gpu(name: str, pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(512, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    W0 = torch.randn(64, 96, generator=generator)
    try:
        METHODS[name].check_pattern(pattern)
    except (InputError, PatternError) as refusal:
        pytest.skip(str(refusal))
    errors = []
    for device in ("cpu", "cuda"):
        gram = Gram(96, device=device, means=True)
        gram.update(X.to(device))
        errors.append(run(METHODS[name], LayerProblem(W0.to(device), gram), pattern).relative_error)
    # Hard thresholds may fall the other way after rounding, so errors are compared, not masks.
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("k", [1, 3_000_000, 9_000_000])
def test_the_same_entries_are_the_largest(k: int) -> None:
    scores = torch.randint(0, 2**20, (10_000_000,), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(keep_largest(scores.cuda(), k).cpu(), keep_largest(scores, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_in_their_gram(dtype: torch.dtype) -> None:
    X = torch.randn(5000, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = Gram(700, device="cuda")
    gram.update(X.cuda())
    exact = X.double().T @ X.double()
    # Tensor cores cut sums off: 1.0e-6 on an H100, where rounded products in bfloat16 would leave 1e-3.
    assert float((gram.H.cpu().double() - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["on the GPU", "in pinned memory"])
def test_hidden_states_arrive_as_they_are(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_SHARE", share)
    device = torch.device("cuda")
    states = ahead.empty_states((7, 64, 256), torch.bfloat16, device)
    assert states.is_cuda == (share == 1)
    states.copy_(torch.randn(7, 64, 256, generator=torch.Generator().manual_seed(0)))
    expected = states.cpu().clone()
    batches = ahead.Ahead(states, device)
    for start in (0, 2, 4, 6):
        windows = slice(start, start + 2)
        batch = batches.take(windows)
        batches.fetch(slice(start + 2, start + 4))
        assert batch.is_cuda
        assert torch.equal(batch.cpu(), expected[windows])
        states[windows] = batch + 1  # as when a block's output takes the place of its input
    assert torch.equal(states.cpu(), expected + 1)


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["on the GPU", "in pinned memory"])
def test_a_model_is_pruned_alike_wherever_its_states_are(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_SHARE", share)
    windows = torch.randint(0, 128, (6, 32), generator=torch.Generator().manual_seed(0))
    errors = []
    for device in ("cpu", "cuda"):
        model = make_model("llama").to(device)
        report = prune(model, windows, pattern=Unstructured(0.5), method=METHODS["sparsegpt"], batch_size=2)
        errors.append(report.relative_error)
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("allocation", ["fisher", "owl", "alphapruning", "lsa", "search"])
def test_what_is_measured_of_the_dense_model_is_as_on_the_cpu(allocation: str) -> None:
    windows = torch.randint(3, 160, (5, 24), generator=torch.Generator().manual_seed(0))
    kept = []
    for device in ("cpu", "cuda"):
        model = make_model("llama").to(device)
        report = prune(
            model,
            windows,
            pattern=Unstructured(0.6),
            method=METHODS["wanda"],
            allocation=allocation,
            row_weights="fisher",
        )
        kept.append([layer.kept for layer in report.layers])
    assert sum(kept[0]) == sum(kept[1])
    if allocation != "search":  # of which two profiles may be equally good but for rounding
        assert kept[0] == pytest.approx(kept[1], abs=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        (NM(2, 4), {"rotate": True, "permute": True}),
        (Unstructured(0.6), {"rotate": True, "row_weights": "fisher"}),
        (Unstructured(0.6), {"row_weights": "mlp"}),
        (NM(2, 4), {"drift": 0.25, "matching": Matching(2)}),
        (NM(2, 4), {"barber": Barber("signed")}),
    ],
    ids=str,
)
def test_a_block_is_changed_as_on_the_cpu(pattern: Pattern, options: dict[str, Any], dtype: torch.dtype) -> None:
    windows = torch.randint(3, 160, (6, 24), generator=torch.Generator().manual_seed(0))
    errors = []
    for device in ("cpu", "cuda"):
        model = make_model("llama").to(device, dtype)
        report = prune(model, windows, pattern=pattern, method=METHODS["sparsegpt"], **options)
        errors.append(report.relative_error)
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_a_model_goes_through_all_commands(rarefy_: Rarefy, shelf: Path) -> None:
    text = shelf / "text.txt"
    calibration = ["--calibration", text, "--num-samples", 6, "--sequence-length", 32, "--no-texts"]
    steps = (
        ["shrink", shelf / "model", "-o", "small", "--neurons", 0.25, "--multiple", 8, "--heads", 0.5, *calibration],
        ["prune", "small", "-o", "pruned", "--pattern", "2:4", "--rotate", "--permute", "--match", 1, *calibration],
        ["tune", "pruned", "-o", "tuned", "--epochs", 1, *calibration[:-1]],
        ["eval", "tuned", "--text", text, "--against", "small"],
        ["pack", "tuned", "-o", "packed"],
        ["eval", "packed", "--text", text],
    )
    for step in steps:
        done = rarefy_(*step)
        assert done.status == 0, (step, done.err)
    assert json.loads(Path("pruned/run.json").read_text())["device"].startswith("cuda")


@pytest.mark.parametrize("by", ["kl", "taylor", "search", "policy-gradient"])
def test_blocks_are_removed_as_on_the_cpu(by: Rule) -> None:
    windows = torch.randint(3, 160, (6, 24), generator=torch.Generator().manual_seed(0))
    chosen = []
    for device in ("cpu", "cuda"):
        sets = BlockSets(deep("llama", 5).to(device), windows, batch_size=2)
        chosen.append(choose_blocks(sets, 2, by, generations=2, steps=4).remove)
    if by != "policy-gradient":  # whose draws follow from differences that rounding changes
        assert chosen[0] == chosen[1]
