"""The precision of products: float32 is float32, whatever the process is set to, and the setting stays the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import rarefy
from models_for_tests import VOCABULARY, make_model
from rarefy.methods.base import Method
from rarefy.pruning import precision
from rarefy.pruning.precision import full_float32

#: Ways in which users make products coarse; after some, torch refuses to answer the older question.
COARSE: dict[str, Callable[[], Any]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "nothing": lambda: None,
}


def _settings() -> tuple[str, str, str]:
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "refused"
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    return legacy, *(backend.fp32_precision for backend in backends)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"


@pytest.mark.parametrize("way", COARSE)
@pytest.mark.parametrize("ends", [False, True])
def test_products_are_full_within_and_the_setting_is_back_behind(way: str, ends: bool) -> None:
    COARSE[way]()
    before = _settings()
    try:
        with full_float32():
            legacy, *backends = _settings()
            assert legacy == "highest"
            assert set(backends) <= {"none", "ieee"}
            if ends:
                raise KeyError
    except KeyError:
        pass
    assert _settings() == before


class _Asks(rarefy.Wanda):
    seen: list[tuple[str, ...]] = []  # noqa: RUF012 (of the class)

    def solve(self, *arguments: Any, **more: Any) -> Any:
        self.seen.append(_settings())
        return super().solve(*arguments, **more)


def test_a_run_computes_its_grams_and_solutions_in_full_float32() -> None:
    windows = torch.randint(3, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    reports = []
    for setting in ("highest", "medium"):
        torch.set_float32_matmul_precision(setting)
        _Asks.seen.clear()
        model = make_model("llama")
        reports.append(rarefy.prune(model, windows, pattern=rarefy.PerRow(0.5), method=_Asks()))
        assert torch.get_float32_matmul_precision() == setting
        assert {legacy for legacy, *_ in _Asks.seen} == {"highest"}
    errors = [[layer.relative_error for layer in report.layers] for report in reports]
    assert errors[0] == errors[1]


def test_solving_one_layer_is_in_full_float32() -> None:
    torch.set_float32_matmul_precision("medium")
    _Asks.seen.clear()
    method: Method = _Asks()
    rarefy.solve(torch.randn(4, 8), torch.eye(8), rarefy.PerRow(0.5), method)
    assert {legacy for legacy, *_ in _Asks.seen} == {"highest"}
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize(
    ("gain", "stored", "device", "runs_in"),
    [
        (0.6, torch.bfloat16, "cpu", torch.float32),
        (1.2, torch.bfloat16, "cpu", torch.float32),
        (2.0, torch.bfloat16, "cpu", torch.bfloat16),
        (8.0, torch.float16, "cpu", torch.float32),
        (8.0, torch.float32, "cpu", torch.float32),
        (0.6, torch.bfloat16, "cuda", torch.bfloat16),
        (0.6, torch.float16, "cuda", torch.float16),
    ],
)
def test_blocks_run_in_bfloat16_where_its_products_are_faster(
    monkeypatch: pytest.MonkeyPatch, gain: float, stored: torch.dtype, device: str, runs_in: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "bfloat16_gain", lambda: gain)
    assert precision.compute_dtype(stored, torch.device(device)) == runs_in


@pytest.mark.parametrize(("slow", "least", "most"), [(torch.bfloat16, 0.0, 0.25), (torch.float32, 4.0, 1e9)])
def test_the_gain_is_that_of_the_products(
    monkeypatch: pytest.MonkeyPatch, slow: torch.dtype, least: float, most: float
) -> None:
    now = [0.0]
    calls = []

    def product(x: torch.Tensor, weight: torch.Tensor) -> None:
        calls.append(x.dtype)
        now[0] += 8.0 if x.dtype == slow else 1.0

    monkeypatch.setattr(precision.nn.functional, "linear", product)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])
    precision.bfloat16_gain.cache_clear()
    try:
        assert least <= precision.bfloat16_gain() <= most
    finally:
        precision.bfloat16_gain.cache_clear()
    assert len(calls) == (2 if slow == torch.bfloat16 else 12)  # emulated products are not asked again
