"""The problem that pruning one layer is: min tr((W - W0) H (W - W0)^T) over W of a sparsity pattern.

With H = X^T X this is ||X W^T - X W0^T||_F^2, the change of the layer's output over the
calibration tokens. Sums that grade a weight are accumulated in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.errors import InputError, NumericalError
from rarefy.layer.gram import Gram
from rarefy.layer.passes import apply_mask, finite, row_dots

_STRIP = 512  # rows and columns graded at a time, to bound the memory of a grade
_CLEAR = 100.0  # what a grade must be, in units of what rounding in float32 may have added to it


@dataclass(frozen=True, eq=False)
class Scaled:
    """Coordinates in which H has unit diagonal: A[i, j] = H[i, j] / (s[i] s[j]); dead inputs have s = 1.

    In these coordinates weights are W * live, so that |W| is the Wanda score; ``live`` is s, but 0 for
    dead inputs, so that these are pruned first. Damping is a number that methods add to the diagonal of A: it is
    relative to the energy of each input, however large another one is.
    """

    A: Float[Tensor, "in in"]
    s: Float[Tensor, "in"]
    live: Float[Tensor, "in"]


class LayerProblem:
    """One layer: dense weight W0 (out, in) and the Gram matrix H (in, in) of its inputs.

    Works in float32, or in float64 if the weight or the Gram is float64. ``output_norms`` (out,) are the norms of
    what the layer's outputs become before the next linear reads them, over all tokens; None where nothing is known.
    Raises InputError for shapes that do not fit.
    """

    def __init__(
        self, W0: Float[Tensor, "out inputs"], gram: Gram, output_norms: Float[Tensor, " out"] | None = None
    ) -> None:
        if W0.ndim != 2 or W0.shape[1] != gram.size:
            raise InputError(
                "weight", f"a tensor of shape {tuple(W0.shape)}", f"(out, {gram.size}), as wide as its Gram"
            )
        if output_norms is not None and tuple(output_norms.shape) != (W0.shape[0],):
            raise InputError(
                "output_norms",
                f"a tensor of shape {tuple(output_norms.shape)}",
                f"({W0.shape[0]},), one for each output",
            )
        double = torch.float64 in (W0.dtype, gram.H.dtype)
        self.dtype = torch.float64 if double else torch.float32
        self.gram = gram
        self.W0 = W0.detach().to(self.dtype)
        self.output_norms = None if output_norms is None else output_norms.to(self.W0)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self.W0.shape[0]), int(self.W0.shape[1])

    @property
    def H(self) -> Float[Tensor, "in in"]:
        """The Gram matrix in the problem's dtype and on its device."""
        H = self.gram.H
        if H.dtype == self.dtype and H.device == self.W0.device:
            return H
        return self.gram.cached(("H", self.dtype, self.W0.device), lambda: H.to(self.W0))

    @property
    def dead(self) -> Bool[Tensor, "in"]:
        """Inputs that were zero for every token: nothing is known about their weights."""
        return self.H.diagonal() <= 0

    @cached_property
    def target(self) -> Float[Tensor, "out inputs"]:
        """W0 H, the right-hand side of every normal equation."""
        return self.W0 @ self.H

    def check(self, name: str) -> None:
        """Raise NumericalError, naming the layer, for NaN or infinity in W0 or H."""
        if not finite(self.W0):
            raise NumericalError(f"The weight of {name} has NaN or infinity.")
        self.gram.check(name)

    def objective(self, W: Float[Tensor, "out inputs"]) -> float:
        """tr((W - W0) H (W - W0)^T), summed in float64."""
        return self._energy(W, self.W0)

    def gradient(self, W: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        """2 (W - W0) H, in the problem's dtype."""
        return 2 * ((W.to(self.dtype) - self.W0) @ self.H)

    def relative_error(self, W: Float[Tensor, "out inputs"]) -> float:
        """Output energy lost: tr((W - W0) H (W - W0)^T) / tr(W0 H W0^T).

        Unitless; 0 is exact, 1 is as bad as the zero matrix, 0/0 = 0, x/0 = inf. Summed in float64.
        """
        return error_ratio(self.objective(W), self.dense_energy)

    @cached_property
    def dense_energy(self) -> float:
        """tr(W0 H W0^T), summed in float64."""
        return self._energy(self.W0, None)

    def balanced_error(self, W: Float[Tensor, "out inputs"]) -> float:
        """The relative error if all inputs had the same energy: with A = H / (s s^T) at unit diagonal in place of H.

        Where one input has a thousand times the energy of the others, it makes up the denominator of
        ``relative_error``, which is then tiny, whatever has become of the weights of all others; this one is not.
        """
        return error_ratio(self.balanced_objective(W), self.balanced_energy)

    def balanced_objective(self, W: Float[Tensor, "out inputs"]) -> float:
        """tr((W - W0) A (W - W0)^T), summed in float64; like ``objective`` a sum over rows."""
        return self._energy(W, self.W0, balanced=True)

    @cached_property
    def balanced_energy(self) -> float:
        """tr(W0 A W0^T), summed in float64."""
        return self._energy(self.W0, None, balanced=True)

    def _energy(self, W: Tensor, W0: Tensor | None, balanced: bool = False) -> float:
        """tr(D H D^T) for D = W - W0 (or W), summed in float64; its products are in float64 if they must be.

        ``balanced``: of D / s instead of D.
        """
        if tuple(W.shape) != self.shape:  # a single row would be broadcast over all
            raise InputError("weight", f"a tensor of shape {tuple(W.shape)}", f"{self.shape}, as W0")
        norms = self.H.diagonal().double().clamp_min(0).sqrt()
        factors = torch.where(norms > 0, 1 / norms, 0) if balanced else None
        if self.dtype == torch.float32:
            total, size = _quadratic(W, W0, self.H, torch.float32, factors)
            # An entry of D H is wrong by about eps |d| |H|: far less than this, unless D is close to H's kernel.
            norm = self.gram.norm if factors is None else self._balanced_norm(factors)
            if total > _CLEAR * torch.finfo(torch.float32).eps * size * norm:
                return total
        return max(_quadratic(W, W0, self.H, torch.float64, factors)[0], 0.0)

    def _balanced_norm(self, factors: Float[Tensor, "in"]) -> float:
        """The Frobenius norm of H / (s s^T), without a matrix of it; ``factors`` are 1 / s."""

        def build() -> float:
            total, f = 0.0, factors.to(self.dtype)
            for a in range(0, len(f), _STRIP):
                strip = (self.H[a : a + _STRIP] * f).mul_(f[a : a + _STRIP, None])
                total += float(torch.linalg.vector_norm(strip)) ** 2
            return math.sqrt(total)

        return self.gram.cached(("balanced norm", self.dtype, self.W0.device), build)

    @property
    def scaled(self) -> Scaled:
        """H at unit diagonal, made once for all layers with this Gram.

        A dead input has s = 1 and no coupling; its diagonal, 1 like all others, keeps A definite.
        """
        return self.gram.cached(("scaled", self.dtype, self.W0.device), lambda: scale(self.H))

    def to_scaled(self, W: Float[Tensor, "out inputs"], scaled: Scaled) -> Float[Tensor, "out inputs"]:
        """The weight in the scaled problem's coordinates."""
        return W * scaled.live

    def from_scaled(
        self, W: Float[Tensor, "out inputs"], mask: Bool[Tensor, "out inputs"], scaled: Scaled
    ) -> Float[Tensor, "out inputs"]:
        """W / s on the mask; a kept weight of a dead input stays what it was."""
        weight = W / scaled.s
        weight[:, self.dead] = self.W0[:, self.dead]
        return apply_mask(weight, mask, out=weight)


def error_ratio(lost: float, dense: float) -> float:
    """The relative error of a layer that loses ``lost`` of the output energy ``dense``."""
    if dense == 0:
        return 0.0 if lost == 0 else math.inf
    return lost / dense


def _quadratic(
    W: Tensor, W0: Tensor | None, H: Tensor, dtype: torch.dtype, factors: Tensor | None
) -> tuple[float, float]:
    """tr(D H D^T) and |D|^2 for D = W - W0 (or W), products in ``dtype``, sums in float64, strip by strip.

    Columns of D are multiplied by ``factors``, if any.
    """
    total = size = 0.0
    for a in range(0, W.shape[0], _STRIP):
        D = W[a : a + _STRIP].to(H.device, dtype, copy=True)
        if W0 is not None:
            D -= W0[a : a + _STRIP]
        if factors is not None:
            D *= factors
        size += float(row_dots(D, D).sum(dtype=torch.float64))
        for b in range(0, D.shape[1], _STRIP):
            # H is symmetric: what is left of the strip counts twice, what is right of it not at all
            strip, D_b = slice(b, b + _STRIP), D[:, b : b + _STRIP]
            DH = D_b @ H[strip, strip].to(dtype)
            if b:
                DH.addmm_(D[:, :b], H[:b, strip].to(dtype), alpha=2)
            total += float(DH.double().mul_(D_b).sum())
    return total, size


def scale(H: Float[Tensor, "in in"], shift: float = 0.0) -> Scaled:
    """H + shift * I brought to unit diagonal; for dead inputs see LayerProblem.scaled."""
    dead = H.diagonal() <= 0
    s = (H.diagonal() + shift).sqrt().masked_fill_(dead, 1)
    A = H / s.outer(s)
    A.diagonal().fill_(1.0)  # which is known exactly
    return Scaled(A, s, s.masked_fill(dead, 0))
