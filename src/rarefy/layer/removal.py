"""Which columns of a layer to remove, with their interactions, and the exact refit of those that are kept.

In coordinates of unit diagonal (W0 for W0 s) with A = H / (s s^T) + damping I, and B the inverse of A on the kept
columns S, the best weights on S are W = (W0 A)_S B, and for a group g of columns

    cost of removing g from S:       tr(W_g (B_gg)^-1 W_g^T)                                   (1)
    with v = B_:g L^-T, u = W_g L^-T, B_gg = L L^T:   B <- B - v v^T,  W <- W - u v^T          (2)
    gain of taking g back into S:    tr(R_g (C_g)^-1 R_g^T),  R = (W0 - W) A                   (3)
                                     C_g = A_gg - A_gS B A_Sg
    with v = (e_g - B A_:g) L^-T, u = R_g L^-T, C_g = L L^T:   B <- B + v v^T,  W <- W + u v^T (4)

Each is exact with all other kept weights at their best. ``choose_columns`` removes the group of the lowest cost (1)
until as many are left as the pattern keeps, then exchanges a removed group (of the largest gains) for the kept one
that costs least beside it, while that lowers the loss.

The refit is one factorisation for all rows, as they all have the same support:

    W_S = W0_S + W0_P A_PS (A_SS)^-1,  P the removed columns                                   (5)

| code | shape        | meaning                                                       |
|------|--------------|---------------------------------------------------------------|
| B, W | (in, in), (out, in) | as above, without the last few updates, which V and U hold |
| V, U | (in, t), (out, t)   | the v and u of these updates                            |
| D, N | (groups, group, group) | the blocks B_gg, and W_g^T W_g                       |

Source: the optimal brain surgeon for groups, as in Kurtic et al., "ZipLM", arXiv 2302.04089, which removes one
group after the other; the exchanges (3), (4) and the damping relative to each input's own energy are ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.errors import NumericalError
from rarefy.layer.columns import Columns
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution, Status

DAMPING = 0.01  # of each input's own energy, as SparseGPT's

_STALE = 64  # columns of updates after which B and W are brought up to date
_TRIES = 8  # removed groups of the largest gains for which an exchange is looked for
_ENOUGH = 1e-9  # of the loss so far, which an exchange must gain
_HEAVIEST = 1e4  # damping from which on a matrix is given up


def remove_columns(
    problem: LayerProblem, pattern: Columns, damping: float = DAMPING, max_swaps: int = 1000
) -> Solution:
    """The columns that ``choose_columns`` keeps, with the weights of the refit.

    Raises PatternError where the pattern does not fit, NumericalError where H cannot be factored.
    """
    kept = choose_columns(problem, pattern, damping, max_swaps)
    weight, used = refit_columns(problem, kept, damping)
    mask = kept.expand(problem.shape).contiguous()
    status = Status.DAMPED if used > damping else Status.SOLVED
    return Solution(weight, mask, status, details={"damping": used})


def removal_costs(problem: LayerProblem, group: int = 1, damping: float = DAMPING) -> Float[Tensor, " groups"]:
    """The loss of removing each group of columns alone, all others refitted, float64: (1) for the whole matrix.

    Damped; of the whole layer in the units of ``LayerProblem.objective``.
    """
    return _Search(problem, group, damping).costs()


def choose_columns(
    problem: LayerProblem, pattern: Columns, damping: float = DAMPING, max_swaps: int = 1000
) -> Bool[Tensor, " inputs"]:
    """The columns to keep, True = kept; of equal costs the group with the lowest index is kept.

    Raises PatternError where the pattern does not fit the layer, NumericalError where H cannot be factored.
    """
    num_kept = pattern.count(problem.shape) // (problem.shape[0] * pattern.group)
    search = _Search(problem, pattern.group, damping)
    if num_kept == 0:
        return torch.zeros_like(problem.dead)
    for _ in range(len(search.kept) - num_kept):
        costs = search.costs()
        search.remove(len(costs) - 1 - int(costs.flip(0).argmin()))
    if num_kept < len(search.kept):
        search.exchange(max_swaps)
    return search.kept.repeat_interleave(pattern.group).to(problem.W0.device)


def refit_columns(
    problem: LayerProblem, kept: Bool[Tensor, " inputs"], damping: float = DAMPING
) -> tuple[Float[Tensor, "out inputs"], float]:
    """The best weights with zeros outside the ``kept`` columns, and the damping it took: (5).

    Damping pulls kept weights towards those of the dense layer. Raises NumericalError.
    """
    scaled = problem.scaled
    W0 = problem.to_scaled(problem.W0, scaled).double()
    S, P = kept.nonzero().squeeze(1), (~kept).nonzero().squeeze(1)
    A = scaled.A.double()
    factor, used = _factor(A[S][:, S], damping)
    W = torch.zeros_like(W0)
    W[:, S] = W0[:, S] + torch.cholesky_solve((W0[:, P] @ A[P][:, S]).T, factor).T
    mask = kept.expand(problem.shape).contiguous()
    return problem.from_scaled(W.to(problem.dtype), mask, scaled), used


def _factor(A: Float[Tensor, "n n"], damping: float) -> tuple[Float[Tensor, "n n"], float]:
    """The lower Cholesky factor of A + damping I, with ten times the damping until there is one."""
    while damping <= _HEAVIEST:
        factor, info = torch.linalg.cholesky_ex(A + damping * torch.eye(len(A), dtype=A.dtype, device=A.device))
        if int(info) == 0:
            return factor, damping
        damping = max(10 * damping, 1e-6)
    raise NumericalError("The Gram matrix is not positive definite, even with heavy damping.")


class _Search:
    """The kept groups of one layer, with B and W of them; float64."""

    def __init__(self, problem: LayerProblem, group: int, damping: float) -> None:
        scaled = problem.scaled
        self.group = group
        factor, used = _factor(scaled.A.double(), damping)
        self.A = scaled.A.double().clone()
        self.A.diagonal().add_(used)
        self.W0 = problem.to_scaled(problem.W0, scaled).double()
        self.B, self.W = torch.cholesky_inverse(factor), self.W0.clone()
        self.V, self.U = self.A.new_empty(len(self.A), 0), self.A.new_empty(len(self.W0), 0)
        self.signs = self.A.new_empty(0)
        self.kept = torch.ones(len(self.A) // group, dtype=torch.bool, device=self.A.device)
        self.D, self.N = self._blocks(self.B), self._squares(self.W)

    def costs(self) -> Float[Tensor, " groups"]:
        """(1) for every kept group, infinity for the others."""
        return self._traces(self.D, self.N, self.kept, torch.inf)

    def remove(self, g: int) -> tuple[Tensor, Tensor]:
        """Remove a kept group: (2); its v and u."""
        factor = torch.linalg.cholesky(self.D[g])
        v, u = (_over(factor, columns(g)) for columns in (self._column_of_B, self._column_of_W))
        self._update(v, u, -1.0)
        self.kept[g] = False
        return v, u

    def exchange(self, most: int) -> None:
        """Exchange removed and kept groups one by one, at most ``most`` times, while that lowers the loss."""
        self._refresh()
        R = (self.W0 - self.W) @ self.A
        C = self._blocks(self.A) - self._blocks(self.A @ self.B @ self.A)
        for _ in range(most):
            gains = self._traces(C, self._squares(R), ~self.kept, -torch.inf)
            best = self._best_exchange(R, C, gains)
            if best is None:
                return
            p, q = best
            v, u = self._back(p, R, C)
            self._update(v, u, 1.0)
            self.kept[p] = True
            self._follow(R, C, v, u, 1.0)
            self._follow(R, C, *self.remove(q), -1.0)

    def _follow(self, R: Tensor, C: Tensor, v: Tensor, u: Tensor, sign: float) -> None:
        """What (3) is computed from, after B + sign v v^T and W + sign u v^T: one product with A, in place."""
        vA = v.T @ self.A
        R.addmm_(u, vA, alpha=-sign)
        parts = vA.view(-1, len(self.kept), self.group)
        C.sub_(torch.einsum("tga,tgb->gab", parts, parts), alpha=sign)

    def _best_exchange(self, R: Tensor, C: Tensor, gains: Tensor) -> tuple[int, int] | None:
        """A removed group and the kept one to exchange it for; None where no exchange that is tried gains enough."""
        num = min(_TRIES, int((~self.kept).sum()))
        for p in gains.argsort(descending=True, stable=True)[:num].tolist():
            v, u = self._back(p, R, C)
            D, N = self._changed(v, u, 1.0)
            kept = self.kept.clone()
            kept[p] = True
            costs = self._traces(D, N, kept, torch.inf)
            q = len(costs) - 1 - int(costs.flip(0).argmin())
            if q != p and float(costs[q]) < float(gains[p]) * (1 - _ENOUGH):
                return p, q
        return None

    def _back(self, p: int, R: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """The v and u of (4) for a removed group."""
        columns = self._at(p)
        A_p = self.A[:, columns].clone()
        v = -(self.B @ A_p + self.V @ (self.signs.unsqueeze(1) * (self.V.T @ A_p)))
        v.view(len(self.kept), self.group, -1)[~self.kept] = 0
        v[columns] = torch.eye(self.group, dtype=v.dtype, device=v.device)
        factor = torch.linalg.cholesky(C[p])
        return _over(factor, v), _over(factor, R[:, columns])

    def _update(self, v: Tensor, u: Tensor, sign: float) -> None:
        self.D, self.N = self._changed(v, u, sign)
        self.V, self.U = torch.cat([self.V, v], dim=1), torch.cat([self.U, u], dim=1)
        self.signs = torch.cat([self.signs, self.signs.new_full((v.shape[1],), sign)])
        if self.V.shape[1] >= _STALE:
            self._refresh()

    def _refresh(self) -> None:
        """Bring B and W up to date."""
        signed = (self.V * self.signs).T
        self.B.addmm_(self.V, signed)
        self.W.addmm_(self.U, signed)
        self.V, self.U, self.signs = self.V[:, :0], self.U[:, :0], self.signs[:0]

    def _changed(self, v: Tensor, u: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """D and N after B + sign v v^T and W + sign u v^T."""
        parts = v.view(len(self.kept), self.group, -1)
        uW = u.T @ self.W + (u.T @ self.U * self.signs) @ self.V.T
        uW_parts = uW.view(-1, len(self.kept), self.group)
        cross = torch.einsum("gat,tgb->gab", parts, uW_parts)
        square = torch.einsum("gat,ts,gbs->gab", parts, u.T @ u, parts)
        D = self.D + sign * torch.einsum("gat,gbt->gab", parts, parts)
        return D, self.N + sign * (cross + cross.mT) + square

    def _column_of_B(self, g: int) -> Tensor:
        columns = self._at(g)
        return self.B[:, columns] + self.V @ (self.V[columns] * self.signs).T

    def _column_of_W(self, g: int) -> Tensor:
        columns = self._at(g)
        return self.W[:, columns] + self.U @ (self.V[columns] * self.signs).T

    def _at(self, g: int) -> slice:
        return slice(g * self.group, (g + 1) * self.group)

    def _blocks(self, matrix: Float[Tensor, "in in"]) -> Float[Tensor, "groups group group"]:
        """The blocks on the diagonal."""
        g = self.group
        blocks: Tensor = matrix.unflatten(0, (-1, g)).unflatten(2, (-1, g)).diagonal(dim1=0, dim2=2).movedim(2, 0)
        return blocks.clone()

    def _squares(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "groups group group"]:
        """M_g^T M_g for the columns of every group."""
        if self.group == 1:
            return matrix.square().sum(dim=0).view(-1, 1, 1)
        parts = matrix.view(len(matrix), -1, self.group).movedim(1, 0)
        return parts.mT @ parts

    def _traces(self, D: Tensor, N: Tensor, of: Bool[Tensor, " groups"], otherwise: float) -> Tensor:
        """tr(D_g^-1 N_g) where ``of`` is True."""
        found = D.new_full((len(D),), otherwise)
        if self.group == 1:
            found[of] = (N[of] / D[of].clamp_min(torch.finfo(D.dtype).tiny)).view(-1)
        else:
            found[of] = torch.linalg.solve(D[of], N[of]).diagonal(dim1=1, dim2=2).sum(dim=1)
        return found


def _over(factor: Float[Tensor, "group group"], columns: Float[Tensor, "n group"]) -> Float[Tensor, "n group"]:
    """Columns L^-T."""
    solved: Tensor = torch.linalg.solve_triangular(factor, columns.T, upper=False)
    return solved.T
