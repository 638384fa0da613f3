"""Factorisations of a Gram matrix, each computed once and shared, with honest failure.

A Cholesky factorisation that fails, or whose inverse is noise, is tried again with ten times the damping, and
the damping that was used is reported; nothing is ever replaced by the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.errors import NumericalError
from rarefy.layer.problem import LayerProblem, Scaled

_TRIES = 8  # 0.01 of the diagonal times 10^7 dwarfs any matrix with a finite condition
_NOISE = 0.1  # by this share of a vector its product with matrix and inverse may miss it


@dataclass(frozen=True, eq=False)
class InverseFactor:
    """Upper triangular U with (A + damping * I)^-1 = U^T U, and the damping it took."""

    U: Float[Tensor, "in in"]
    damping: float


def inverse_factor(problem: LayerProblem, damping: float) -> InverseFactor:
    """The factor that SparseGPT walks along, of A = H / (s s^T) at unit diagonal (``LayerProblem.scaled``).

    It is shared by all layers with this Gram. ``damping`` is relative to the energy of each input. Raises
    NumericalError if no damping up to 10^7 times as large makes the matrix positive definite.
    """
    key = ("inverse factor", damping, problem.dtype, problem.W0.device)
    return problem.gram.cached(key, lambda: _inverse_factor(problem.scaled.A, damping))


def _inverse_factor(A: Float[Tensor, "in in"], damping: float) -> InverseFactor:
    for _ in range(_TRIES):
        # With J the reversal, J (A + d I) J = L L^T gives A + d I = R R^T, R = J L J upper triangular,
        # and the inverse is R^-T R^-1: U = R^-1. One factorisation instead of three.
        reversed_ = A.flip(0, 1)
        reversed_.diagonal().add_(damping)
        L = _cholesky_(reversed_)
        if L is not None:
            eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
            U = torch.linalg.solve_triangular(L, eye, upper=False, out=eye).flip(0, 1)
            if _inverts(U, A, damping):
                return InverseFactor(U, damping)
        damping = max(10 * damping, 1e-6)
    raise NumericalError("The Gram matrix is not positive definite, even with heavy damping.")


def _cholesky_(A: Float[Tensor, "in in"]) -> Float[Tensor, "in in"] | None:
    """The lower Cholesky factor of A in its own memory; None where A is not positive definite."""
    # A symmetric matrix is its transpose, which LAPACK takes by columns as it is: one buffer for all of it.
    factor, info = A.mT, torch.empty((), dtype=torch.int32, device=A.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor if int(info) == 0 else None


def _inverts(U: Float[Tensor, "in in"], A: Float[Tensor, "in in"], damping: float) -> bool:
    """Whether (A + damping I) U^T U x is x up to a share of it, for an x along the smallest eigenvalues.

    All pivots of a matrix can be positive by rounding only, and what its factor then inverts is rounding.
    """
    x = torch.randn(len(A), generator=torch.Generator().manual_seed(0)).to(A)
    for _ in range(2):  # the first product turns any x towards these eigenvalues
        x = x / torch.linalg.vector_norm(x)
        y = U.T @ (U @ x)
        missed = torch.linalg.vector_norm(A @ y + damping * y - x)
        x = y
    return bool(missed <= _NOISE)  # False for NaN (no mutant: never equal)


def shifted_inverse(
    A: Float[Tensor, "in in"], shift: float, out: Float[Tensor, "in in"] | None = None
) -> Float[Tensor, "in in"]:
    """(A + shift I)^-1 for a Gram matrix A at unit diagonal, in place in ``out`` if given.

    Raises NumericalError where A + shift I is not positive definite.
    """
    inverse = A.clone() if out is None else out.copy_(A)
    factor = _shifted_cholesky_(inverse, shift)
    torch.cholesky_inverse(factor, out=factor)
    return inverse


def _shifted_cholesky_(A: Float[Tensor, "in in"], shift: float) -> Float[Tensor, "in in"]:
    """The lower Cholesky factor of A + shift I in the memory of A. Raises NumericalError where there is none."""
    A.diagonal().add_(shift)
    factor = _cholesky_(A)
    if factor is None:
        raise NumericalError("The damped Gram matrix is not positive definite.")
    return factor


def times_damped_inverse(B: Float[Tensor, "rows in"], scaled: Scaled, damping: float) -> Float[Tensor, "rows in"]:
    """B (H + damping diag H)^-1, of the H whose ``scaled`` form is given: s^-1 (A + damping I)^-1 s^-1.

    Raises NumericalError where that has no Cholesky factor.
    """
    factor = _shifted_cholesky_(scaled.A.clone(), damping)
    step: Tensor = torch.cholesky_solve((B.to(factor) / scaled.s).T, factor).T / scaled.s
    return step


def penalised_inverse(problem: LayerProblem, damping: float, rho: float) -> Float[Tensor, "in in"]:
    """Rho (A + damping I + rho I)^-1 at unit diagonal, shared by all layers with this Gram."""
    key = ("penalised inverse", damping, rho, problem.dtype, problem.W0.device)
    return problem.gram.cached(key, lambda: shifted_inverse(problem.scaled.A, damping + rho).mul_(rho))
