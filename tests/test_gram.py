"""The Gram matrix: a plain sum that no split of the tokens changes, with honest statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.errors import InputError, NumericalError
from rarefy.layer.gram import Gram

# Summing n products in float32 errs by at most about n eps of the sum of their sizes, far less in
# practice; relative to the largest entry, as small entries are differences of large ones.
FLOAT32_SUM = 1e-5
FLOAT64_SUM = 1e-13


def inputs(tokens: int, size: int, seed: int = 0, *, whole: bool = False) -> Tensor:
    """Normal inputs, or small whole numbers, whose sums have no rounding at all in float32."""
    generator = torch.Generator().manual_seed(seed)
    if whole:
        return torch.randint(-4, 5, (tokens, size), generator=generator).float()
    return torch.randn(tokens, size, generator=generator)


@pytest.mark.usefixtures("checked_shapes")
@pytest.mark.parametrize("size", [1, 2, 3, 24, 515, 1030])  # from one column to several strips
def test_update_is_the_product(size: int) -> None:
    X = inputs(40, size, whole=True)
    gram = Gram(size)
    gram.update(X)
    assert gram.size == size
    assert gram.num_tokens == 40
    assert gram.H.dtype == torch.float32
    assert torch.equal(gram.H, X.T @ X)
    assert torch.equal(gram.H, gram.H.T)


def test_rounding_is_that_of_a_sum() -> None:
    X = inputs(5000, 12)  # more tokens than are converted at a time
    exact = X.double().T @ X.double()
    for dtype, tolerance in ((torch.float32, FLOAT32_SUM), (torch.float64, FLOAT64_SUM)):
        gram = Gram(12, dtype=dtype)
        gram.update(X)
        assert gram.H.dtype == dtype
        assert float((gram.H - exact).abs().max()) <= tolerance * float(exact.abs().max())


def test_any_split_and_order_of_tokens_gives_the_same_sum() -> None:
    X = inputs(90, 10, whole=True)
    whole = Gram(10, means=True)
    whole.update(X)
    read_between = Gram(10, means=True)
    for part in X.split([1, 30, 0, 59]):
        read_between.update(part)
        _ = read_between.H
    pieces = [Gram(10, means=True) for _ in range(3)]
    for gram, part in zip(pieces, X.split(30), strict=True):
        gram.update(part)
    merged = pieces[2]
    _ = pieces[0].H  # one that was read and one that was not
    merged.merge(pieces[0])
    merged.merge(pieces[1])
    for other in (read_between, merged):
        assert torch.equal(other.H, whole.H)
        assert other.num_tokens == whole.num_tokens == 90
        assert torch.equal(other.mean, whole.mean)


def test_merge_leaves_the_other_alone_and_goes_on() -> None:
    a, b, c = (inputs(20, 6, seed, whole=True) for seed in range(3))
    first, second = Gram(6), Gram(6)
    first.update(a)
    second.update(b)
    first.merge(second)
    first.update(c)
    everything = torch.cat([a, b, c])
    assert torch.equal(second.H, b.T @ b)
    assert torch.equal(first.H, everything.T @ everything)
    assert first.num_tokens == 60


def test_leading_dimensions_are_tokens() -> None:
    X = inputs(24, 6, whole=True)
    gram = Gram(6)
    gram.update(X.view(2, 3, 4, 6))
    assert gram.num_tokens == 24
    assert torch.equal(gram.H, X.T @ X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_dtype_are_summed_in_float32(dtype: torch.dtype) -> None:
    X = (inputs(300, 8) * 3).to(dtype)
    gram = Gram(8)
    gram.update(X)
    exact = X.double().T @ X.double()
    assert gram.H.dtype == torch.float32
    assert float((gram.H - exact).abs().max()) <= FLOAT32_SUM * float(exact.abs().max())


@pytest.mark.usefixtures("checked_shapes")
def test_means() -> None:
    X = inputs(50, 5)
    gram = Gram(5, means=True)
    assert gram.has_means
    gram.update(X)
    torch.testing.assert_close(gram.mean, X.double().mean(dim=0))
    assert Gram.from_matrix(torch.eye(5), num_tokens=2, sum_x=torch.full((5,), 3.0)).mean.tolist() == [1.5] * 5


@pytest.mark.usefixtures("checked_shapes")
def test_a_small_variance_beside_a_large_mean_is_not_lost() -> None:
    """In float32 sums 1,000^2 + 0.1^2 is 1,000^2."""
    X = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 0.03, 1.0, 0.0]) + 1000
    expected = X.double().var(dim=0, correction=0)
    whole, first, second = (Gram(4, means=True) for _ in range(3))
    whole.update(X)
    first.update(X[:3000])
    second.update(X[3000:])
    first.merge(second)
    for gram in (whole, first):
        torch.testing.assert_close(gram.variance, expected, rtol=1e-6, atol=1e-9)
    assert len(whole.sums_()) == 3
    assert len(Gram(4).sums_()) == 1
    # of a finished matrix only its diagonal is known, unless the sum of squares comes with it
    H, sum_x = X.double().T @ X.double(), X.double().sum(dim=0)
    torch.testing.assert_close(Gram.from_matrix(H, 5000, sum_x).variance, expected, rtol=1e-5, atol=1e-8)
    given = Gram.from_matrix(H.float(), 5000, sum_x, X.double().square().sum(dim=0))
    torch.testing.assert_close(given.variance, expected, rtol=1e-6, atol=1e-9)
    assert bool((Gram.from_matrix(H.float(), 5000, sum_x).variance >= 0).all())
    whole.merge(Gram.from_matrix(H.float(), 5000, sum_x))  # which does not know its squares
    assert len(whole.sums_()) == 2
    torch.testing.assert_close(whole.variance, (whole.H.diagonal().double() / 1e4 - whole.mean.square()).clamp_min(0))


def test_a_missing_statistic_raises() -> None:
    gram = Gram(4)
    gram.update(inputs(3, 4))
    assert not gram.has_means
    for empty in (gram, Gram(4, means=True), Gram.from_matrix(torch.eye(4))):
        with pytest.raises(InputError, match="mean of the inputs"):
            _ = empty.mean
        with pytest.raises(InputError, match="mean of the inputs"):
            _ = empty.variance


def test_what_does_not_fit_does_not_merge() -> None:
    with pytest.raises(InputError, match="Grams of 4 and 3 inputs"):
        Gram(4).merge(Gram(3))
    with pytest.raises(InputError, match="with and without means"):
        Gram(4).merge(Gram(4, means=True))


def test_from_matrix() -> None:
    assert Gram.from_matrix(torch.eye(3, dtype=torch.float64)).H.dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        assert Gram.from_matrix(torch.eye(3, dtype=dtype)).H.dtype == torch.float32
    assert Gram.from_matrix(torch.eye(3)).num_tokens == 0
    for wrong in (torch.ones(3), torch.ones(3, 4), torch.ones(2, 3, 3)):
        with pytest.raises(InputError, match=r"gram is .*, but must be a square matrix"):
            Gram.from_matrix(wrong)


@pytest.mark.parametrize("size", [4, 700])
def test_a_matrix_that_is_not_symmetric_is_refused_in_one_sentence(size: int) -> None:
    X = inputs(2 * size, size)
    H = X.T @ X
    H[-1, 1] += 0.01 * float((H[1, 1] * H[-1, -1]).sqrt())
    with pytest.raises(
        InputError, match=rf"^gram is not symmetric, as X\^T X is: its entry \(1, {size - 1}\) is [^\n]*\.$"
    ):
        Gram.from_matrix(H)
    with pytest.raises(InputError, match="gram is not symmetric"):
        Gram.from_matrix(torch.eye(size).roll(1, dims=0))
    # rounding is no asymmetry, however unlike the inputs are in size
    X = X * torch.logspace(-3, 3, size)
    H = X.T @ X
    H[0] *= 1 + 1e-6
    assert torch.equal(Gram.from_matrix(H).H, H)


def test_updating_a_gram_made_of_a_matrix_leaves_that_matrix_alone() -> None:
    H = torch.eye(4) * 3
    gram = Gram.from_matrix(H)
    gram.update(torch.ones(2, 4))
    assert torch.equal(gram.H, torch.eye(4) * 3 + 2)
    assert torch.equal(H, torch.eye(4) * 3)


def test_inputs_of_another_width_are_refused() -> None:
    gram = Gram(6)
    with pytest.raises((InputError, RuntimeError)):
        gram.update(inputs(3, 7))


def test_cached_is_built_once_and_forgotten_when_the_sum_changes() -> None:
    gram = Gram(2)
    built = []

    def build() -> int:
        built.append(1)
        return len(built)

    assert [gram.cached("a", build), gram.cached("a", build), gram.cached("b", build)] == [1, 1, 2]
    for change in (lambda: gram.update(torch.ones(1, 2)), lambda: gram.merge(Gram(2)), gram.forget):
        gram.cached("a", build)
        before = len(built)
        change()
        assert gram.cached("a", build) == len(built) == before + 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 1), (2, 2)])
def test_nan_and_infinity_name_the_layer(bad: float, place: tuple[int, int]) -> None:
    H = torch.eye(3)
    H[place] = H[place[::-1]] = bad
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.up_proj"):
        Gram.from_matrix(H).check("model.layers.0.up_proj")


def test_infinities_of_both_signs_do_not_cancel() -> None:
    H = torch.eye(3)
    H[0, 1] = H[1, 0] = torch.inf
    H[0, 2] = H[2, 0] = -torch.inf
    with pytest.raises(NumericalError):
        Gram.from_matrix(H).check("it")


def test_a_negative_diagonal_is_no_gram() -> None:
    with pytest.raises(NumericalError, match="negative diagonal"):
        Gram.from_matrix(torch.diag(torch.tensor([1.0, -1e-3]))).check("it")
    Gram.from_matrix(torch.zeros(2, 2)).check("it")
    Gram.from_matrix(torch.full((40, 40), 3e38)).check("large, but finite")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("means", [False, True])
def test_inputs_are_not_changed(dtype: torch.dtype, means: bool) -> None:
    X = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = X.clone()
    Gram(5, means=means, dtype=torch.float64).update(X)
    assert torch.equal(X, before)
