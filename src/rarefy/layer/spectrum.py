"""Factorisations of a Gram matrix, each computed once and shared, with honest failure.

A Cholesky factorisation that fails is tried again with ten times the damping, and the damping that
was used is reported; nothing is ever replaced by the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.errors import NumericalError
from rarefy.layer.problem import LayerProblem, Scaled

_TRIES = 8  # 0.01 of the mean diagonal times 10^7 dwarfs any matrix with a finite condition


@dataclass(frozen=True, eq=False)
class InverseFactor:
    """Upper triangular U with (H + damping * mean(diag H) * I)^-1 = U^T U, and the damping it took."""

    U: Float[Tensor, "in in"]
    damping: float


def inverse_factor(problem: LayerProblem, damping: float) -> InverseFactor:
    """The factor that SparseGPT walks along, shared by all layers with this Gram.

    ``damping`` is relative to the mean diagonal of H. Dead inputs get the mean diagonal. Raises
    NumericalError if no damping up to 10^7 times as large makes the matrix positive definite.
    """
    key = ("inverse factor", damping, problem.dtype, problem.W0.device)
    return problem.gram.cached(key, lambda: _inverse_factor(problem, damping))


def _inverse_factor(problem: LayerProblem, damping: float) -> InverseFactor:
    H = problem.H.clone()
    diagonal = H.diagonal()
    mean = float(diagonal.mean()) or 1.0  # an all-dead layer: any scale will do
    diagonal[problem.dead] = mean
    for _ in range(_TRIES):
        # With J the reversal, J (H + d I) J = L L^T gives H + d I = R R^T, R = J L J upper triangular,
        # and the inverse is R^-T R^-1: U = R^-1. One factorisation instead of three.
        reversed_ = H.flip(0, 1)
        reversed_.diagonal().add_(damping * mean)
        L, info = torch.linalg.cholesky_ex(reversed_)
        if int(info) == 0 and bool((L.diagonal() > 0).all()):
            eye = torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
            U = torch.linalg.solve_triangular(L, eye, upper=False).flip(0, 1)
            if bool(torch.isfinite(U.sum())):
                return InverseFactor(U.contiguous(), damping)
        damping = max(10 * damping, 1e-6)
    raise NumericalError("The Gram matrix is not positive definite, even with heavy damping.")


def shifted_inverse(
    A: Float[Tensor, "in in"], rho: float, out: Float[Tensor, "in in"] | None = None
) -> Float[Tensor, "in in"]:
    """(A + rho I)^-1 for a damped Gram matrix A at unit diagonal, in place in ``out`` if given.

    Raises NumericalError where A + rho I is not positive definite.
    """
    inverse = A.clone() if out is None else out.copy_(A)
    inverse.diagonal().add_(rho)
    # A symmetric matrix is its transpose, which LAPACK takes by columns as it is: one buffer for all of it.
    factor, info = inverse.mT, torch.empty((), dtype=torch.int32, device=A.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if int(info) != 0:
        raise NumericalError("The damped Gram matrix is not positive definite.")
    torch.cholesky_inverse(factor, out=factor)
    return inverse


def scaled_inverse(problem: LayerProblem, scaled: Scaled, rho: float) -> Float[Tensor, "in in"]:
    """Rho (A + rho I)^-1 for the scaled matrix A, shared by all layers with this Gram."""
    key = ("scaled inverse", id(scaled), rho)
    return problem.gram.cached(key, lambda: shifted_inverse(scaled.H, rho).mul_(rho))
