"""The kernel: every path gives what torch gives on the unpacked matrix, and no call reads out of bounds."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.packing import kernel
from rarefy.packing.weight import PackedWeight

pytestmark = pytest.mark.skipif(kernel.library() is None, reason="Rarefy was installed without the kernel")

#: Rows and widths: one row, one column, no multiple of 32, of 64 or of a group, several groups, more than a chunk.
SHAPES = ((1, 1), (1, 70), (3, 31), (5, 32), (2, 33), (7, 64), (2, 65), (9, 96), (4, 200), (33, 576))
#: A sum of n products in float32 differs from the exact one by less than this, relative to the sum of magnitudes.
_FLOAT_SUM = 2e-6
#: Codes are multiplied with x rounded to 16 bits: half a step of 1/32767 of the largest x in a group, and a little
#: for the rounding of that itself.
_ROUNDED_X = 0.51 / 32767
#: Half a unit in the last place of bfloat16.
_BFLOAT = 2**-8


def usable() -> list[str]:
    loaded = kernel.library()
    return [name for number, name in enumerate(kernel.PATHS) if loaded and loaded.rarefy_can(number)]


@pytest.fixture(params=usable())
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Forces each path that this machine can take."""
    monkeypatch.setenv(kernel.VARIABLE, request.param)
    kernel.path.cache_clear()
    yield request.param
    kernel.path.cache_clear()


def weights(rows: int, width: int, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(rows * width)
    weight = 0.02 * torch.randn(rows, width, generator=generator)
    weight[torch.rand(rows, width, generator=generator) < share] = 0
    if rows > 2:
        weight[0] = 0
        weight[1] = 0.01
    return weight


def packed(weight: Tensor, kind: torch.dtype | int) -> PackedWeight:
    return PackedWeight.pack(weight, kind, 64) if isinstance(kind, int) else PackedWeight.pack(weight.to(kind))


KINDS = (torch.bfloat16, torch.float16, torch.float32, 8, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_matrix(path: str, kind: torch.dtype | int) -> None:
    for rows, width in SHAPES:
        for share in (0.0, 0.5, 0.9, 1.0):
            matrix = packed(weights(rows, width, share), kind)
            dense = matrix.unpack(torch.float32).double()
            for count in range(1, 9):
                for dtype in (torch.bfloat16, torch.float32):
                    generator = torch.Generator().manual_seed(count)
                    x = torch.randn(count, width, generator=generator).to(dtype)
                    bias = torch.randn(rows, generator=generator).to(dtype) if count % 2 else None
                    y = kernel.product(
                        x, matrix.values, matrix.mask, matrix.offsets, matrix.scale, bias, width, matrix.group
                    )
                    exact = x.double() @ dense.T
                    size = x.double().abs() @ dense.abs().T
                    if bias is not None:
                        exact, size = exact + bias.double(), size + bias.double().abs()
                    allowed = size * _FLOAT_SUM
                    if isinstance(kind, int):
                        allowed = allowed + _ROUNDED_X * x.double().abs().amax(1, True) @ dense.abs().sum(1)[None]
                    if dtype == torch.bfloat16:
                        allowed = allowed + exact.abs() * _BFLOAT
                    assert y.dtype == dtype
                    assert bool(((y.double() - exact).abs() <= allowed + 1e-30).all()), (rows, width, share, count)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_unpack_to_the_same_bits(
    path: str, kind: torch.dtype | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows, width in SHAPES:
        matrix = packed(weights(rows, width, 0.5), kind)
        outputs = [torch.float32, torch.bfloat16] if isinstance(kind, int) else [kind]
        for dtype in outputs:
            by_kernel = matrix.unpack(dtype)
            with monkeypatch.context() as without:
                without.setattr(kernel, "path", lambda: None)
                assert torch.equal(by_kernel, matrix.unpack(dtype))


def test_several_threads_give_the_same_bits(path: str) -> None:
    matrix = packed(weights(70, 300, 0.6), torch.bfloat16)
    x = torch.randn(3, 300).bfloat16()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(kernel.product(x, matrix.values, matrix.mask, matrix.offsets, None, None, 300, 0))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(path: str, kind: torch.dtype | int, value: float) -> None:
    matrix = packed(torch.full((2, 70), 0.5), kind)
    x = torch.ones(2, 70)
    x[1, 3] = value
    y = kernel.product(x, matrix.values, matrix.mask, matrix.offsets, matrix.scale, None, 70, matrix.group)
    assert bool(torch.isfinite(y[0]).all())
    assert not bool(torch.isfinite(y[1]).any())


def test_x_of_tiny_numbers_loses_nothing(path: str) -> None:
    matrix = packed(torch.full((2, 64), 0.5), 8)
    for size in (1e-12, 1e-20, 1e-38):
        y = kernel.product(
            torch.full((1, 64), size), matrix.values, matrix.mask, matrix.offsets, matrix.scale, None, 64, 64
        )
        assert bool(torch.isfinite(y).all())
        assert y[0, 0] == pytest.approx(32 * size, rel=1e-3) or size < 1e-30


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_or_offset_makes_it_read_beyond_the_values(path: str, kind: torch.dtype | int) -> None:
    """Values in a block of memory of their own: what is read beyond it crashes, now and then, or is reported."""
    rand = random.Random(0)
    for _ in range(60):
        rows, width = rand.randint(1, 6), rand.randint(1, 200)
        matrix = packed(weights(rows, width, 0.5), kind)
        mask, offsets = matrix.mask.clone(), matrix.offsets.clone()
        damage = rand.choice(["mask", "offsets", "both", "huge"])
        if damage in ("mask", "both"):
            mask.view(-1)[rand.randrange(mask.numel())] = rand.choice([0, 1, 127, 255])
        if damage in ("offsets", "both"):
            offsets[rand.randrange(rows + 1)] += rand.choice([-1000, -1, 1, 7, 10**6])
        if damage == "huge":
            mask.fill_(255)
            offsets[-1] = 2**62
        total = matrix.values.numel() * (2 if kind == 4 else 1)
        bits = [sum(int(byte).bit_count() for byte in row) for row in mask.tolist()]
        fits = all(
            0 <= start <= end <= total and count <= end - start
            for start, end, count in zip(offsets.tolist(), offsets[1:].tolist(), bits)
        )
        product, unpack = (partial(_call, name, matrix, mask, offsets) for name in ("product", "unpack"))
        for call in (product, unpack) if not fits else ():
            with pytest.raises(ValueError, match="claims other values"):
                call()
        if fits:
            product()


def _call(name: str, matrix: PackedWeight, mask: Tensor, offsets: Tensor) -> None:
    rest = (matrix.values, mask, offsets, matrix.scale)
    if name == "product":
        kernel.product(torch.randn(2, matrix.shape[1]), *rest, None, matrix.shape[1], matrix.group)
    else:
        dtype = torch.float32 if matrix.scale is not None else matrix.values.dtype
        kernel.unpack(
            torch.empty(matrix.shape[0], matrix.shape[1], dtype=dtype), *rest, matrix.shape[1], matrix.group
        )


def test_tensors_that_do_not_fit_are_refused_before_the_library_is_called() -> None:
    matrix = packed(weights(4, 100, 0.5), 8)
    assert matrix.scale is not None
    good = {
        "x": torch.randn(2, 100), "values": matrix.values, "mask": matrix.mask, "offsets": matrix.offsets,
        "scale": matrix.scale, "bias": None, "width": 100, "group": 64,
    }  # fmt: skip
    kernel.product(**good)
    for change in (
        {"x": torch.randn(2, 99)},
        {"x": torch.randn(2, 100).double()},
        {"x": torch.randn(9, 100)},
        {"x": torch.randn(0, 100)},
        {"bias": torch.randn(3)},
        {"bias": torch.randn(4).bfloat16()},
        {"values": matrix.values.float()},
        {"values": matrix.values.to(torch.int16)},
        {"values": matrix.values.repeat(2)[::2]},
        {"mask": matrix.mask[:, :-4]},
        {"mask": matrix.mask[:-1]},
        {"mask": matrix.mask.repeat(1, 2)[:, ::2]},
        {"offsets": matrix.offsets[:-1]},
        {"offsets": matrix.offsets.int()},
        {"scale": None},
        {"scale": matrix.scale[:, :1]},
        {"group": 0},
        {"group": 32},
        {"group": 2**40},
        {"width": 0},
        {"width": 2**40},
    ):
        with pytest.raises(ValueError, match="packed matrix|^x is"):
            kernel.product(**{**good, **change})


def test_a_path_is_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        monkeypatch.setenv(kernel.VARIABLE, "plain")
        kernel.path.cache_clear()
        assert kernel.path() == "plain"
        assert kernel.describe() == "kernel plain"
        monkeypatch.setenv(kernel.VARIABLE, "off")
        kernel.path.cache_clear()
        assert kernel.path() is None
        monkeypatch.setenv(kernel.VARIABLE, "sse")
        kernel.path.cache_clear()
        with pytest.raises(InputError, match=r"RAREFY_KERNEL is 'sse', but must be one of .*: off, plain"):
            kernel.path()
    finally:
        kernel.path.cache_clear()


def _check(compiler: list[str], run: list[str], program: Path) -> None:
    source = Path(__file__).with_name("kernel_check.c")
    for tool in (compiler[0], *run[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    subprocess.run([*compiler, "-Wno-unknown-pragmas", str(source), "-o", str(program), "-lm"], check=True)
    done = subprocess.run([*run, str(program)], capture_output=True, text=True, check=False)
    assert re.fullmatch(r"\d{4} checked, 0 failed\n", done.stdout), done.stdout + done.stderr


@pytest.mark.slow
def test_a_checker_of_memory_finds_nothing(tmp_path: Path) -> None:
    _check(["gcc", "-O2", "-Wall", "-Werror", "-fsanitize=address,undefined"], [], tmp_path / "check")


@pytest.mark.slow
def test_the_path_for_arm_in_an_emulator(tmp_path: Path) -> None:
    _check(["aarch64-linux-gnu-gcc", "-O3", "-Wall", "-Werror", "-static"], ["qemu-aarch64"], tmp_path / "check")
