"""Packed matrices: the same weights come back, codes are the nearest ones, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.errors import ModelError
from rarefy.packing import kernel
from rarefy.packing.codes import GROUPS, decode, encode, integers, pair, unpair
from rarefy.packing.operator import _shared, packed_linear
from rarefy.packing.weight import CHECK, PackedWeight, mask_bytes

#: Widths around whole bytes, words of 32 and chunks of 64 columns.
WIDTHS = (1, 7, 8, 31, 32, 33, 63, 64, 65, 96, 100, 192, 300)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def with_and_without_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here is done by the kernel, where there is one, and by torch."""
    if request.param == "torch":
        monkeypatch.setattr(kernel, "library", lambda: None)
        monkeypatch.setattr(kernel, "path", lambda: None)
    elif kernel.path() is None:
        pytest.skip("Rarefy was installed without the kernel")


def sparse(rows: int, width: int, share: float = 0.6, seed: int = 0) -> Tensor:
    """Normal weights, of which about ``share`` are zero; one row is empty and one is full."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    weight[torch.rand(rows, width, generator=generator) < share] = 0
    if rows > 2:
        weight[1] = 0
        weight[2] = torch.randn(width, generator=generator)
    return weight


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_weights_come_back(width: int, dtype: torch.dtype) -> None:
    for rows in (1, 5):
        weight = sparse(rows, width).to(dtype)
        packed = PackedWeight.pack(weight)
        assert torch.equal(packed.unpack(), weight)
        assert packed.values.dtype == dtype
        assert packed.mask.shape == (rows, mask_bytes(width))
        assert torch.equal(packed.values, weight[weight != 0])


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 4), width=st.integers(1, 140), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_shape_and_sparsity(rows: int, width: int, share: float, seed: int) -> None:
    weight = sparse(rows, width, share, seed)
    packed = PackedWeight.pack(weight)
    assert torch.equal(packed.unpack(), weight)
    expected = [0, *(weight != 0).sum(dim=1).cumsum(0).tolist()]
    assert packed.offsets.tolist() == expected


def test_the_mask_is_in_little_bit_order_and_whole_words() -> None:
    weight = torch.zeros(2, 33)
    weight[0, [0, 9, 32]] = 1.0
    weight[1, 31] = 1.0
    assert PackedWeight.pack(weight).mask.tolist() == [[1, 2, 0, 0, 1, 0, 0, 0], [0, 0, 0, 128, 0, 0, 0, 0]]


def test_a_negative_zero_becomes_a_zero() -> None:
    packed = PackedWeight.pack(torch.tensor([[-0.0, 1.0, -2.0]]))
    assert packed.values.tolist() == [1.0, -2.0]
    assert not torch.signbit(packed.unpack()[0, 0])


def test_a_half_empty_bfloat16_matrix_takes_nine_bits_a_weight() -> None:
    weight = torch.zeros(64, 256, dtype=torch.bfloat16)
    weight[:, ::2] = 1
    assert PackedWeight.pack(weight).nbytes * 8 == 9 * weight.numel()


# --- Codes --------------------------------------------------------------------------------------------------


def nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Each weight at the nearest level of its group, found by trying all levels."""
    rows, width = weight.shape
    result = torch.zeros(rows, width)
    levels = torch.arange(-127, 128) if bits == 8 else torch.arange(-15, 16, 2)
    for row in range(rows):
        for start in range(0, width, group):
            part = weight[row, start : start + group]
            scale = (part.abs().max() / levels.max()).half().float()
            choices = levels * scale
            result[row, start : start + group] = choices[(part[:, None] - choices).abs().argmin(dim=1)]
    return torch.where(weight != 0, result, 0.0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [5, 64, 100, 192])
def test_codes_are_the_nearest(bits: int, width: int) -> None:
    weight = sparse(4, width)
    dense = PackedWeight.pack(weight, bits, 64).unpack()
    # Where two levels are equally near, either may be taken.
    assert torch.allclose((dense - weight).abs(), (nearest(weight, bits, 64) - weight).abs(), atol=1e-6)
    assert bool((dense[weight == 0] == 0).all())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", WIDTHS)
def test_codes_survive_packing(bits: int, width: int) -> None:
    """What comes out is codes times scales, whichever way they were packed; bfloat16 is that, rounded."""
    weight = sparse(5, width)
    packed = PackedWeight.pack(weight, bits, 64)
    codes, scale = encode(weight, bits, 64)
    expected = torch.where(weight != 0, decode(integers(codes), scale, 64), 0.0)
    assert torch.equal(packed.unpack(), expected)
    assert torch.equal(packed.unpack(torch.bfloat16), expected.bfloat16())


def test_a_group_too_small_for_its_scale_becomes_zero() -> None:
    for bits in (8, 4):
        dense = PackedWeight.pack(torch.full((1, 64), 1e-9), bits, 64).unpack()
        assert bool((dense.abs() <= 1e-9).all())
        assert bool(torch.isfinite(dense).all())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_pairs_of_codes_begin_each_row_with_a_whole_byte(counts: list[int]) -> None:
    codes = torch.arange(sum(counts), dtype=torch.uint8) % 16
    rows = torch.tensor(counts)
    values = pair(codes, rows)
    assert len(values) == sum((count + 1) // 2 for count in counts)
    assert torch.equal(unpair(values, rows), codes)


def test_the_sizes_that_the_documentation_names() -> None:
    weight = sparse(64, 1024, 0.5)
    weight[1], weight[2] = weight[3], weight[4]
    kept = float((weight != 0).float().mean())
    for bits, group in GROUPS.items():
        size = PackedWeight.pack(weight, bits, group).nbytes * 8 / weight.numel()
        assert size == pytest.approx(bits * kept + 1 + 16 / group, rel=0.01)


# --- What is refused ------------------------------------------------------------------------------------------


WORDS = {
    "a value too few": "claims",
    "a value too many": "claims",
    "another bit in the mask": "claims",
    "a bit beyond the width": "columns that it does not have",
    "a row of mask too few": "its mask is",
    "a byte of mask too few": "its mask is",
    "a wider matrix": "its mask is",
    "values in two dimensions": "its values are",
    "values of a dtype that no weight has": "its values are",
    "a mask of signed bytes": "its mask is",
    "codes without scales": "no scales",
    "weights with scales": "no codes",
    "scales of float32": "its scales are",
    "scales for too few rows": "its scales are",
    "scales without a group": "its scales are",
    "codes of 4 bits of which there are 8": "claims",
    "a bit at another place": "bytes have changed",
    "another value": "bytes have changed",
    "another scale": "bytes have changed",
    "another checksum": "bytes have changed",
    "a checksum of another form": "its checksum is",
}


def damaged(name: str) -> tuple[dict[str, Tensor], tuple[int, int], int]:
    """The tensors of a weight that is damaged in that way, its shape and its group."""
    weight, coded = PackedWeight.pack(sparse(4, 40)), PackedWeight.pack(sparse(4, 40), 8, 64)
    assert coded.scale is not None
    shape, group = (4, 40), 64
    tensors = weight.tensors()
    if "scale" in name or "code" in name:
        tensors = coded.tensors()
    tensors["_mask"] = tensors["_mask"].clone()
    values, mask = tensors[""], tensors["_mask"]
    if name == "a value too few":
        tensors[""] = values[:-1]
    elif name == "a value too many":
        tensors[""] = torch.cat([values, values[:1]])
    elif name == "another bit in the mask":
        mask[0, 0] ^= 1
    elif name == "a bit beyond the width":
        mask[3, 7] = 128
    elif name == "a row of mask too few":
        tensors["_mask"] = mask[:-1]
    elif name == "a byte of mask too few":
        tensors["_mask"] = mask[:, :-1]
    elif name == "a wider matrix":
        shape = (4, 70)
    elif name == "values in two dimensions":
        tensors[""] = values[None]
    elif name == "values of a dtype that no weight has":
        tensors[""] = values.long()
    elif name == "a mask of signed bytes":
        tensors["_mask"] = mask.view(torch.int8)
    elif name == "codes without scales":
        del tensors["_scale"]
    elif name == "weights with scales":
        tensors[""] = weight.values
    elif name == "scales of float32":
        tensors["_scale"] = coded.scale.float()
    elif name == "scales for too few rows":
        tensors["_scale"] = coded.scale[:-1]
    elif name == "scales without a group":
        group = 0
    elif name == "codes of 4 bits of which there are 8":
        tensors[""] = values.view(torch.uint8)
    elif name == "a bit at another place":
        columns = (sparse(4, 40)[0] != 0).tolist()
        kept, free = columns.index(True), columns.index(False)
        mask[0, kept // 8] ^= 1 << kept % 8
        mask[0, free // 8] ^= 1 << free % 8
    elif name == "another value":
        tensors[""] = values + 1
    elif name == "another scale":
        tensors["_scale"] = coded.scale * 2
    elif name == "another checksum":
        tensors[CHECK] = tensors[CHECK] + 1
    elif name == "a checksum of another form":
        tensors[CHECK] = tensors[CHECK].int()
    return tensors, shape, group


@pytest.mark.parametrize("name", WORDS)
def test_what_is_no_packed_weight_is_refused_in_a_sentence(name: str) -> None:
    tensors, shape, group = damaged(name)
    with pytest.raises(ModelError, match=rf"^layer 3 is no packed weight: .*{WORDS[name]}.*\.$"):
        weight = PackedWeight.of("layer 3", tensors, shape, group)
        weight.counted("layer 3")
        weight.verify("layer 3", tensors[CHECK])


@pytest.mark.parametrize("ending", ["", "_mask", "_check"])
def test_a_missing_tensor_is_named(ending: str) -> None:
    tensors = PackedWeight.pack(sparse(4, 40)).tensors()
    del tensors[ending]
    with pytest.raises(ModelError, match=rf"^layer 3 is damaged: there is no layer 3{ending}\.$"):
        PackedWeight.of("layer 3", tensors, (4, 40), 0)


def test_a_stack_is_its_matrices_one_after_the_other() -> None:
    stack = torch.stack([sparse(3, 50, seed=seed) for seed in range(4)])
    packed = PackedWeight.pack(stack)
    assert packed.mask.shape == (4, 3, 8)
    assert torch.equal(packed.unpack(), stack)
    assert torch.equal(packed.values, torch.cat([PackedWeight.pack(matrix).values for matrix in stack]))


def test_numpy_counts_bits_as_the_documentation_of_the_format_says() -> None:
    mask = PackedWeight.pack(sparse(6, 77)).mask
    by_hand = [sum(int(byte).bit_count() for byte in row) for row in mask.tolist()]
    assert np.bitwise_count(mask.numpy()).sum(axis=1).tolist() == by_hand


def test_memory_that_inference_mode_made_is_used_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.packing.kernel.path", lambda: None)
    weight = sparse(37, 211)  # larger than what other tests of this thread have left there
    packed, x = PackedWeight.pack(weight), torch.randn(40, 211).to(weight.dtype)

    def product() -> Tensor:
        return packed_linear(x, packed.values, packed.mask, packed.offsets, None, None, 211, 0)

    vars(_shared).clear()
    with torch.inference_mode():
        found = product()
    with torch.no_grad():
        assert torch.equal(product(), found)
    assert torch.equal(found, torch.nn.functional.linear(x, weight))
