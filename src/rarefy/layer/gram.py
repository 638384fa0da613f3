"""The Gram matrix H = X^T X of a layer's inputs, as a plain sum that merges exactly.

H is all that calibration leaves behind: a layer's loss, every method's update and every grade are
functions of W0 and H. Layers that see the same input share one Gram and its factorisations.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.errors import InputError, NumericalError
from rarefy.layer.passes import finite

T = TypeVar("T")

_ASYMMETRY = 1e-3  # of the size of an entry and of |X_i| |X_j|: a thousand times what rounding leaves in float32

_STRIP = 512  # width of a strip of the upper triangle: wide enough for full product speed
# Tokens added at a time. On the CPU their buffer in float32 stays below glibc's mmap threshold. A GPU's tensor cores
# cut sums off instead of rounding them, so the diagonal falls short, by more the longer the sums are.
_CHUNK = 2048


class Gram:
    """Sum of x x^T over tokens x (in,), float32, with the number of tokens and, if asked, the sums of x and x^2.

    ``update`` adds activations, ``merge`` adds another Gram (of other windows, of another rank);
    both are sums, so any split of the tokens gives the same matrix up to rounding.
    """

    def __init__(
        self,
        size: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        means: bool = False,
    ) -> None:
        self._sum = torch.zeros(size, size, device=device, dtype=dtype)  # upper strips until mirrored
        self._mirrored = True
        self._borrowed = False  # whether the caller still holds the matrix
        self.num_tokens = 0
        self._sum_x = torch.zeros(size, device=device, dtype=torch.float64) if means else None
        self._sum_squares = torch.zeros_like(self._sum_x) if self._sum_x is not None else None
        self._cache: dict[Hashable, object] = {}

    @classmethod
    def from_matrix(
        cls,
        H: Float[Tensor, "in in"],
        num_tokens: int = 0,
        sum_x: Float[Tensor, "in"] | None = None,
        sum_squares: Float[Tensor, "in"] | None = None,
    ) -> Gram:
        """A Gram from a finished matrix; its dtype (float32 or float64) is kept.

        Raises InputError where the matrix is not square, or, beyond rounding, not symmetric.
        """
        if H.ndim != 2 or H.shape[0] != H.shape[1]:
            raise InputError("gram", f"a tensor of shape {tuple(H.shape)}", "a square matrix (in, in)")
        gram = cls(0)
        gram._sum, gram._borrowed = H if H.dtype == torch.float64 else H.float(), True
        _check_symmetric(gram._sum)
        gram.num_tokens = num_tokens
        gram._sum_x = None if sum_x is None else sum_x.double()
        gram._sum_squares = None if sum_squares is None else sum_squares.double()
        return gram

    @property
    def size(self) -> int:
        """Number of inputs."""
        return self._sum.shape[0]  # no mutant: it is square

    @property
    def H(self) -> Float[Tensor, "in in"]:
        """X^T X, symmetric; not to be written to."""
        if not self._mirrored:
            upper = self._sum.triu_()
            upper += upper.triu(1).T
            self._mirrored = True
        return self._sum

    @property
    def norm(self) -> float:
        """The Frobenius norm of H."""
        return self.cached("norm", lambda: float(torch.linalg.vector_norm(self.H)))

    @property
    def mean(self) -> Float[Tensor, "in"]:
        """Mean input over tokens, float64; raises where means were not collected."""
        if self._sum_x is None or not self.num_tokens:
            raise InputError.sentence("This method needs the mean of the inputs, but the Gram has no sum_x.")
        return self._sum_x / self.num_tokens

    @property
    def variance(self) -> Float[Tensor, "in"]:
        """Variance of every input over tokens, float64, not below 0; raises where means were not collected.

        From the sum of squares in float64, where it was collected: in the diagonal of a float32 H a small variance
        beside a large mean is lost.
        """
        squares = self.H.diagonal() if self._sum_squares is None else self._sum_squares
        return (squares.double() / max(1, self.num_tokens) - self.mean.square()).clamp_min(0)

    @property
    def has_means(self) -> bool:
        """Whether the sum of the inputs was collected beside H."""
        return self._sum_x is not None

    def update(self, X: Float[Tensor, "*tokens in"]) -> None:
        """Add the rows of X (..., in); products and sums in float32, whatever the dtype of X."""
        if X.shape[-1] != self.size:
            raise InputError("X", f"a tensor of shape {tuple(X.shape)}", f"(..., {self.size})")
        X = X.reshape(-1, self.size)
        self._writable()
        self.num_tokens += X.shape[0]
        if self._sum_x is not None:
            self._sum_x += X.sum(dim=0, dtype=torch.float64)
        for some in X.split(_CHUNK):
            self._add(some)
            if self._sum_squares is not None:
                self._sum_squares += some.double().square().sum(dim=0)

    def _add(self, X: Float[Tensor, "tokens in"]) -> None:
        # H is symmetric: strips of the upper triangle need little more than half of the products.
        if X.is_cuda and X.dtype in (torch.bfloat16, torch.float16):
            for a in range(0, self.size, _STRIP):  # no mutant: on a GPU
                b = min(a + _STRIP, self.size)  # no mutant: on a GPU
                # half-precision products are exact in float32, so only the summation rounds
                self._sum[a:b, a:] += torch.mm(
                    X[:, a:b].T, X[:, a:], out_dtype=torch.float32
                )  # no mutant: needs a GPU
            return
        X = X.to(self._sum.dtype)
        strip = _STRIP if self.size > _STRIP else max(1, self.size // 2)
        for a in range(0, self.size, strip):
            b = min(a + strip, self.size)
            self._sum[a:b, a:].addmm_(X[:, a:b].T, X[:, a:])

    def merge(self, other: Gram) -> None:
        """Add another Gram of the same size."""
        if other.size != self.size or other.has_means != self.has_means:
            raise InputError.sentence(
                f"Grams of {self.size} and {other.size} inputs, or with and without means, do not merge."
            )
        addend = other.H.to(self._sum)
        self._writable()
        self._sum += addend
        self.num_tokens += other.num_tokens
        if self._sum_x is not None and other._sum_x is not None:  # no mutant: both have means, or none has
            self._sum_x += other._sum_x.to(self._sum_x)
        if self._sum_squares is not None and other._sum_squares is not None:
            self._sum_squares += other._sum_squares.to(self._sum_squares)
        else:
            self._sum_squares = None

    def sums_(self) -> list[Tensor]:
        """The sums themselves, to be added to in place: X^T X, of which the upper triangle counts, then the others.

        ``num_tokens`` goes with them. This is how Grams of several processes are added up.
        """
        self._writable()
        return [sum_ for sum_ in (self._sum, self._sum_x, self._sum_squares) if sum_ is not None]

    def cached(self, key: Hashable, build: Callable[[], T]) -> T:
        """``build()``, computed once per Gram; layers that share H share its factorisations."""
        if key not in self._cache:
            self._cache[key] = build()
        return cast(T, self._cache[key])

    def forget(self) -> None:
        """Drop cached factorisations."""
        self._cache.clear()

    def check(self, name: str) -> None:
        """Raise NumericalError, naming the layer, where H has NaN or infinity or a negative diagonal."""
        diagonal = self.H.diagonal()
        if not finite(self.H) or not bool((diagonal >= 0).all()):
            raise NumericalError(f"The Gram matrix of {name} has NaN, infinity or a negative diagonal.")

    def _writable(self) -> None:
        self._cache.clear()
        self._mirrored = False  # the lower triangle is stale from here on
        if self._borrowed:
            self._sum, self._borrowed = self._sum.clone(), False


def _check_symmetric(H: Float[Tensor, "in in"]) -> None:
    """Raise InputError where H[i, j] and H[j, i] differ by more than rounding; NaN is left to ``Gram.check``."""
    s = H.diagonal().clamp_min(0).sqrt()
    for a in range(0, len(H), _STRIP):
        strip = slice(a, a + _STRIP)
        differ = (H[strip] - H[:, strip].T).abs_() > _ASYMMETRY * (s[strip, None] * s + H[strip].abs())
        if bool(differ.any()):
            i, j = (int(index) for index in differ.nonzero()[0])
            raise InputError.sentence(
                f"gram is not symmetric, as X^T X is: its entry ({a + i}, {j}) is {float(H[a + i, j]):.4g}, but "
                f"({j}, {a + i}) is {float(H[j, a + i]):.4g}."
            )
