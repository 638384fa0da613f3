"""Refit the kept weights of any support: row-wise conjugate gradients (PCG) or exactly (Backsolve).

With the mask M fixed, rows are independent least-squares problems. In coordinates of unit diagonal, with
A = H / (s s^T) + damping I and W s for W, Jacobi's preconditioner is a multiple of the identity:

    R_0 = M ((W0 - W) A),  P_0 = R_0,  and per row r of the matrices, for t = 0, 1, ...
    Q = P A                                  (1)  the one product of a step
    a_r = |R_r|^2 / <P_r, Q_r>               (2)
    W <- W + a P,  R <- R - a (M Q)          (3)
    b_r = |R_r,new|^2 / |R_r|^2              (4)
    P <- R + b P                             (5)

| code  | ALPS's paper | shape     | meaning                                        |
|-------|--------------|-----------|------------------------------------------------|
| R     | R            | (out, in) | residual (half the negative gradient) on the support |
| P     | P            | (out, in) | search direction, zero outside the support      |
| a, b  | alpha, beta  | (out, 1)  | steps, one per row                              |

Source: Meng et al., ALPS, arXiv 2406.07831, algorithm 2 (10 steps, rtol 1e-4). Differences: a step
length per row, which is the true conjugate gradient of each row's problem (the paper prints one for
all); the stop test looks at the masked residual, so it can fire; rows that are done stand still.
Each step lowers the loss of every row. Rows are treated a strip at a time, to bound the memory of large
layers.

Backsolve solves H_SS w_S = (W0 H)_S for each row's support S by Cholesky in float64 (the reference
that PCG is compared with); with damping, A_SS w_S = (W0 A)_S for the damped A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.errors import NumericalError
from rarefy.layer.passes import row_dots, write_mask_
from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem, Scaled
from rarefy.layer.solution import Solution, Status
from rarefy.methods.base import Cost, Method, cannot_come_first, hyper

_STRIP = 2**21  # weights treated at a time, in whole rows
_BATCH_BYTES = 256 * 2**20  # of float64 systems solved at a time


@dataclass(frozen=True)
class PCG(Method):
    """Row-wise preconditioned conjugate gradients on a start's support."""

    name: ClassVar[str] = "pcg"
    summary: ClassVar[str] = "refits the kept weights by row-wise conjugate gradients"
    paper: ClassVar[str] = "arXiv 2406.07831, algorithm 2"
    needs_start: ClassVar[bool] = True
    takes_start: ClassVar[bool] = True

    steps: int = hyper(10, "conjugate-gradient steps at most", low=0)
    rtol: float = hyper(1e-4, "stops where every row's residual has fallen by this factor", low=0)
    damping: float = hyper(0.0, "pulls towards the dense weight, as a share of each input's own energy", low=0)

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        if start is None:
            raise cannot_come_first(self)
        scaled = problem.scaled
        W = problem.to_scaled(start.weight.to(problem.dtype), scaled)
        steps, residuals = conjugate_gradients_(
            W, problem.W0, start.mask, scaled, self.damping, self.steps, self.rtol
        )
        weight = problem.from_scaled(W, start.mask, scaled)
        status = Status.CONVERGED if steps < self.steps else Status.STEP_LIMIT
        return Solution(weight, start.mask, status, steps=steps, trace={"residual": residuals})

    def rows_independent(self, pattern: Pattern) -> bool:
        return True

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        return Cost(self.steps + 1, weights=1 + 4 * min(1, _STRIP / (shape[0] * shape[1])), grams=1)


def conjugate_gradients_(
    W: Float[Tensor, "out inputs"],
    W0: Float[Tensor, "out inputs"],
    mask: Bool[Tensor, "out inputs"],
    scaled: Scaled,
    damping: float,
    steps: int,
    rtol: float,
) -> tuple[int, list[float]]:
    """Lower the loss on the support of ``mask``, in place in W, which is in the scaled coordinates; W0 is not.

    ``damping`` is added to the diagonal of the scaled matrix. Returns the steps taken and |R|_F before each and
    after the last.
    """
    height = max(1, _STRIP // W.shape[1])
    squares: list[list[float]] = []
    for a in range(0, W.shape[0], height):
        rows = slice(a, a + height)
        squares.append(_strip_(W[rows], W0[rows] * scaled.live, mask[rows], scaled.A, damping, steps, rtol))
    taken = max(map(len, squares))
    for strip in squares:  # one that was done earlier stands still
        strip.extend(strip[-1:] * (taken - len(strip)))
    return taken - 1, [math.sqrt(sum(each)) for each in zip(*squares)]


def _strip_(W: Tensor, W0: Tensor, mask: Tensor, A: Tensor, damping: float, steps: int, rtol: float) -> list[float]:
    """Some rows of ``conjugate_gradients_``; |R|_F^2 before each step and after the last."""
    M = write_mask_(torch.empty_like(W), mask)
    D = W0.sub_(W)
    R = torch.addmm(D, D, A, beta=damping).mul_(M)
    P = D.copy_(R)
    Q = torch.empty_like(P)
    squares = row_dots(R, R).unsqueeze(1)
    enough = squares * rtol**2
    sums = [float(squares.sum())]
    for _ in range(steps):
        if bool((squares <= enough).all()):
            break
        torch.addmm(P, P, A, beta=damping, out=Q)  # (1)
        curvature = row_dots(P, Q).unsqueeze(1)
        a = torch.where((squares > enough) & (curvature > 0), squares / curvature, 0)  # (2)
        W.addcmul_(P, a)
        R.addcmul_(Q.mul_(M), a, value=-1)  # (3)
        before, squares = squares, row_dots(R, R).unsqueeze(1)
        b = torch.where(a > 0, squares / before, 0)  # (4)
        torch.addcmul(R, P, b, out=P)  # (5)
        sums.append(float(squares.sum()))
    return sums


@dataclass(frozen=True)
class Backsolve(Method):
    """The best weights there are on a start's support, row by row, in float64."""

    name: ClassVar[str] = "backsolve"
    summary: ClassVar[str] = "refits the kept weights exactly, row by row"
    paper: ClassVar[str] = "arXiv 2406.07831, section 3.2"
    needs_start: ClassVar[bool] = True
    takes_start: ClassVar[bool] = True

    damping: float = hyper(0.0, "pulls towards the dense weight, as a share of each input's own energy", low=0)

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        if start is None:
            raise cannot_come_first(self)
        scaled = problem.scaled
        A = scaled.A.to(torch.float64, copy=True)  # the Gram's own stays as it is
        A.diagonal().add_(self.damping)
        W0 = problem.to_scaled(problem.W0, scaled).double()
        W = problem.to_scaled(start.weight.to(problem.dtype), scaled).double().mul_(start.mask)
        shift = 0.0
        counts = start.mask.sum(dim=1)
        order = counts.argsort(stable=True)  # rows of like counts are solved together
        for rows in _batches(order, counts):
            shift = max(shift, _solve_rows_(W, W0, start.mask, A, rows))
        weight = problem.from_scaled(W.to(problem.dtype), start.mask, scaled)
        status = Status.DAMPED if shift > 0 else Status.SOLVED
        return Solution(weight, start.mask, status, details={"damping": self.damping + shift})

    def rows_independent(self, pattern: Pattern) -> bool:
        return True

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        out, inputs = shape
        kept = pattern.count(shape) / out  # of a row
        batch = min(_BATCH_BYTES, 8 * out * kept**2) / (4 * out * inputs)  # in (out, in) matrices of float32
        return Cost(kept**3 / (6 * inputs**2), weights=7 + batch, grams=3)


def _batches(order: Tensor, counts: Tensor) -> list[Tensor]:
    """Rows in ``order`` cut so that a batch of systems, each as large as the batch's largest, fits."""
    batches, start = [], 0
    for stop in range(1, len(order) + 1):
        size = int(counts[order[stop - 1]])  # the largest so far: counts ascend
        if (stop - start) * 8 * size * size > _BATCH_BYTES and stop - start > 1:
            batches.append(order[start : stop - 1])
            start = stop - 1
    batches.append(order[start:])
    return batches


def _solve_rows_(W: Tensor, W0: Tensor, mask: Tensor, A: Tensor, rows: Tensor) -> float:
    """Solve A_SS d = ((W0 - W) A)_S and add d to W on S for some rows; the damping it took.

    Solving for the correction keeps weights that a singular A says nothing about near the start.
    """
    support = mask[rows]
    counts = support.sum(dim=1)
    size = int(counts.max())
    if size == 0:
        return 0.0
    # Kept inputs first, in order; rows with fewer are padded with unit equations d = 0.
    index = (~support).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
    padding = torch.arange(size, device=A.device) >= counts.unsqueeze(1)
    systems = A[index.unsqueeze(2), index.unsqueeze(1)]
    systems.masked_fill_(padding.unsqueeze(1) | padding.unsqueeze(2), 0)
    diagonal = systems.diagonal(dim1=1, dim2=2)
    diagonal.masked_fill_(padding, 1)
    right = ((W0[rows] - W[rows]) @ A).gather(1, index).masked_fill_(padding, 0)
    shift = 0.0
    for _ in range(8):
        L, info = torch.linalg.cholesky_ex(systems)
        if not bool(info.any()):
            d = torch.cholesky_solve(right.unsqueeze(2), L).squeeze(2).masked_fill_(padding, 0)
            W[rows] = W[rows].scatter_add_(1, index, d)
            return shift
        more = 1e-10 if shift == 0 else 9 * shift
        diagonal += more
        shift += more
    raise NumericalError("The Gram matrix of a support could not be factored.")
