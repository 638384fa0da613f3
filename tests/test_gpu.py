"""What only a GPU can show: the same answers as on the CPU, and exact half-precision Gram matrices."""

from __future__ import annotations

import pytest
import torch

from rarefy import NM, Gram, LayerProblem, PerRow, Unstructured
from rarefy.layer.pattern import Pattern
from rarefy.methods import METHODS
from rarefy.methods.base import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PATTERNS = (Unstructured(0.6), PerRow(0.6), NM(2, 4))
STARTING = [name for name, method in METHODS.items() if not method.needs_start]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", STARTING)
def test_a_method_finds_as_good_a_weight_on_the_gpu(name: str, pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(512, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    W0 = torch.randn(64, 96, generator=generator)
    errors = []
    for device in ("cpu", "cuda"):
        gram = Gram(96, device=device, means=True)
        gram.update(X.to(device))
        errors.append(run(METHODS[name], LayerProblem(W0.to(device), gram), pattern).relative_error)
    # Hard thresholds may fall the other way after rounding, so errors are compared, not masks.
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_in_their_gram(dtype: torch.dtype) -> None:
    X = torch.randn(5000, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = Gram(700, device="cuda")
    gram.update(X.cuda())
    exact = X.double().T @ X.double()
    assert float((gram.H.cpu().double() - exact).norm() / exact.norm()) < 1e-6
