"""A plain, slow float64 rewrite of every pruning algorithm, written from the papers and not from the package.

Every function is `f(W0, H, pattern, **hyper) -> (W, mask)` with W0 (out, in), H = X^T X (in, in), mask bool
and True = kept. Arguments may be NumPy arrays or CPU tensors of any float type; answers are float64 and
bool tensors. A pattern is a small tuple:

    ("layer", sparsity)   round(sparsity * out * in) weights of the whole matrix are pruned
    ("row", sparsity)     round(sparsity * in) weights of every row are pruned
    ("nm", keep, of)      `keep` of every `of` consecutive weights of a row are kept
    ("fixed", mask)       exactly this mask

Ties keep the lowest index (row-major). Loops are welcome here, speed is not a goal. Dead inputs (H_jj = 0):
methods that update weights give them the weight 0, so they are pruned first and a kept one holds 0; methods
that choose a mask only, and the refits, leave the weight of a kept dead input as it is.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Matrix = Tensor | NDArray[Any]
Pattern = tuple[Any, ...]
Answer = tuple[Tensor, Tensor]

# Eigenvalues of a unit-diagonal H_SS below this share of the largest count as zero; between the rounding of
# a singular matrix (1e-15) and the worst condition number of the test problems (1e6).
_RANK_TOLERANCE = 1e-10


def _floats(matrix: Matrix) -> Floats:
    if isinstance(matrix, Tensor):
        matrix = matrix.detach().cpu().to(torch.float64).numpy()
    return np.array(matrix, dtype=np.float64)


def _mask(mask: Matrix) -> Mask:
    if isinstance(mask, Tensor):
        mask = mask.cpu().numpy()
    return np.array(mask, dtype=bool)


def _right_solve(B: Floats, A: Floats) -> Floats:
    """B A^-1 for a symmetric A."""
    return np.asarray(np.linalg.solve(A, B.T).T, dtype=np.float64)


def _answer(W: Floats, mask: Mask) -> Answer:
    return torch.from_numpy(np.where(mask, W, 0.0)), torch.from_numpy(mask.copy())


# --- objective


def objective(W: Matrix, W0: Matrix, H: Matrix) -> float:
    """L(W) = tr((W - W0) H (W - W0)^T), the squared error of the layer's outputs summed over the tokens."""
    E = _floats(W) - _floats(W0)
    return float(np.sum((E @ _floats(H)) * E))


def relative_error(W: Matrix, W0: Matrix, H: Matrix) -> float:
    """L(W) / tr(W0 H W0^T), with 0/0 = 0 and x/0 = inf."""
    lost, energy = objective(W, W0, H), objective(np.zeros_like(_floats(W0)), W0, H)
    if energy > 0:
        return lost / energy
    return 0.0 if lost == 0 else math.inf


# --- projections


def _topk(scores: Floats, k: int) -> Mask:
    """The k largest of any array as a mask of its shape, ties to the lowest index."""
    mask = np.zeros(scores.size, dtype=bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:k]] = True
    return mask.reshape(scores.shape)


def project_topk(scores: Matrix, k: int) -> Tensor:
    """Mask of the k largest scores of the whole matrix, ties to the lowest row-major index."""
    return torch.from_numpy(_topk(_floats(scores), k))


def project_rows(scores: Matrix, k: int) -> Tensor:
    """Mask of the k largest scores of every row, ties to the lowest index."""
    return torch.from_numpy(np.stack([_topk(row, k) for row in _floats(scores)]))


def project_nm(scores: Matrix, keep: int, of: int) -> Tensor:
    """Mask of the `keep` largest scores of every `of` consecutive entries of a row, ties to the first."""
    groups = _floats(scores)
    if groups.shape[1] % of:
        raise ValueError(f"{of} does not divide {groups.shape[1]} inputs")
    masks = np.stack([_topk(group, keep) for group in groups.reshape(-1, of)])
    return torch.from_numpy(masks.reshape(groups.shape))


def num_kept(pattern: Pattern, out: int, inputs: int) -> int:
    """Weights kept in an (out, inputs) matrix; pruned = round(sparsity * numel), Python's round."""
    if pattern[0] in ("layer", "row"):
        sparsity, rows = float(pattern[1]), 1 if pattern[0] == "layer" else out
        numel = out * inputs // rows  # that the sparsity is a share of
        return rows * (numel - round(sparsity * numel))
    if pattern[0] == "nm":
        return int(out * inputs * pattern[1] // pattern[2])
    return int(_mask(pattern[1]).sum())


def project(scores: Matrix, pattern: Pattern) -> Tensor:
    """Mask of the pattern with the largest sum of scores."""
    array = _floats(scores)
    if pattern[0] == "layer":
        return project_topk(array, num_kept(pattern, *array.shape))
    if pattern[0] == "row":
        return project_rows(array, num_kept(pattern, 1, array.shape[1]))
    if pattern[0] == "nm":
        return project_nm(array, pattern[1], pattern[2])
    if pattern[0] == "fixed":
        return torch.from_numpy(_mask(pattern[1]))
    raise ValueError(f"unknown pattern {pattern!r}")


def _project(scores: Floats, pattern: Pattern) -> Mask:
    return _mask(project(scores, pattern))


def project_gradual(scores: Matrix, pattern: Pattern, progress: float) -> Tensor:
    """Mask on the way to the pattern: at progress p its sparsity is s_t = s - s (1 - p)^3.

    N:M: the `keep` largest of every group are kept; of the others, divided by the smallest of those of their
    group, the smallest of every row are pruned, round(s_t * inputs) in a row. A fixed mask is itself from the
    start. Choices: s_t is computed by this expression and rounded with Python's round, per row for a row pattern;
    0 / 0 is 0.
    """
    array = _floats(scores)
    if pattern[0] == "fixed":
        return project(array, pattern)
    sparsity = 1 - pattern[1] / pattern[2] if pattern[0] == "nm" else pattern[1]
    now = sparsity - sparsity * (1 - progress) ** 3
    if pattern[0] != "nm":
        return project(array, (pattern[0], now))
    relative = np.zeros_like(array)
    for i, row in enumerate(array):
        for j in range(0, len(row), pattern[2]):
            group = row[j : j + pattern[2]]
            protected = _topk(group, pattern[1])
            smallest = group[protected].min()
            ratios = group / smallest if smallest > 0 else np.zeros_like(group)
            relative[i, j : j + pattern[2]] = np.where(protected, np.inf, ratios)
    return project_rows(relative, array.shape[1] - round(now * array.shape[1]))


# --- scores and the methods that only choose a mask


def _norms(H: Floats) -> Floats:
    return np.sqrt(np.clip(np.diag(H), 0, None))


def saliency(W0: Matrix, H: Matrix, kind: str, exponent: float = 0.5) -> Tensor:
    """Scores by which weights are kept, of the kind "magnitude", "wanda" or "ria".

    |W|, |W_ij| ||X_j|| and |W_ij| (1/row sum + 1/column sum) ||X_j||^exponent, sums over |W|.
    Choice: 1/0 of an all-zero row or column counts as 0 (its weights are 0 anyway).
    """
    W, norms = np.abs(_floats(W0)), _norms(_floats(H))
    if kind == "magnitude":
        return torch.from_numpy(W)
    if kind == "wanda":
        return torch.from_numpy(W * norms)
    if kind == "ria":
        rows, columns = W.sum(1, keepdims=True), W.sum(0, keepdims=True)
        relative = np.divide(1, rows, where=rows > 0, out=np.zeros_like(rows)) + np.divide(
            1, columns, where=columns > 0, out=np.zeros_like(columns)
        )
        return torch.from_numpy(W * relative * norms**exponent)
    raise ValueError(f"unknown saliency {kind!r}")


def magnitude(W0: Matrix, H: Matrix, pattern: Pattern) -> Answer:
    """Keep the largest |W0|. Choice: H is not looked at, so dead inputs are not pruned first."""
    return _answer(_floats(W0), _project(_floats(saliency(W0, H, "magnitude")), pattern))


def wanda(W0: Matrix, H: Matrix, pattern: Pattern) -> Answer:
    """Wanda (Sun et al., arXiv 2306.11695): keep the largest |W_ij| ||X_j||; the paper's pattern is per
    row."""
    return _answer(_floats(W0), _project(_floats(saliency(W0, H, "wanda")), pattern))


def ria(W0: Matrix, H: Matrix, pattern: Pattern, exponent: float = 0.5) -> Answer:
    """RIA (Zhang et al., ICLR 2024): relative importance times the input norm to the power `exponent`."""
    return _answer(_floats(W0), _project(_floats(saliency(W0, H, "ria", exponent)), pattern))


def dass(W0: Matrix, H: Matrix, pattern: Pattern, norms: Matrix | None = None, exponent: float = 0.5) -> Answer:
    """DaSS (Guo et al., arXiv 2405.01943): |W_ij| norms_i^exponent within each column, else Wanda's within each row.

    `norms` are those of the neurons that the rows make. Choices: with K kept of the whole matrix, the
    columns up to the j-th have kept floor(K j / in) of them, likewise rows with Wanda's scores; other patterns as
    they are.
    """
    W = _floats(W0)
    scores = _floats(saliency(W, H, "wanda")) if norms is None else np.abs(W) * _floats(norms)[:, None] ** exponent
    if pattern[0] != "layer":
        return _answer(W, _project(scores, pattern))
    K, lines = num_kept(pattern, *W.shape), scores if norms is None else scores.T
    masks = [_topk(line, K * (i + 1) // len(lines) - K * i // len(lines)) for i, line in enumerate(lines)]
    return _answer(W, np.stack(masks) if norms is None else np.stack(masks).T)


# --- LLM-Barber


def barber_swap(mask: Matrix, scores: Matrix, pattern: Pattern, share: float) -> Tensor:
    """Swap pruned weights of high scores with kept ones of low scores (LLM-Barber, arXiv 2408.10631).

    In each set of the pattern the pruned weights, downwards, and the kept ones, upwards, form pairs while the former
    are above the latter. Of the pairs of a row ("layer": of the matrix), floor(share * number) are swapped: those of
    the highest pruned scores; which kept ones go is decided in each set. Choice: equals are not swapped.
    """
    S, M = _floats(scores), _mask(mask)
    out, inputs = S.shape
    lines = (
        [list(range(out * inputs))] if pattern[0] == "layer" else np.arange(out * inputs).reshape(out, -1).tolist()
    )
    size = pattern[2] if pattern[0] == "nm" else len(lines[0])
    flat, new = S.ravel(), M.ravel().copy()
    for line in lines:
        sets = [line[i : i + size] for i in range(0, len(line), size)]
        crossing = []
        for number, members in enumerate(sets):
            pruned = sorted((j for j in members if not new[j]), key=lambda j: -flat[j])
            kept = sorted((j for j in members if new[j]), key=lambda j: flat[j])
            crossing += [(number, p) for p, u in zip(pruned, kept) if flat[p] > flat[u]]
        crossing.sort(key=lambda pair: -flat[pair[1]])
        revived = crossing[: math.floor(share * len(crossing) + 1e-9)]
        for number, members in enumerate(sets):
            mine = [p for which, p in revived if which == number]
            gone = sorted((j for j in members if new[j]), key=lambda j: flat[j])[: len(mine)]
            new[mine], new[gone] = True, False
    return torch.from_numpy(new.reshape(out, inputs))


# --- SparseGPT


def sparsegpt(
    W0: Matrix, H: Matrix, pattern: Pattern, block_size: int = 128, damping: float = 0.01, score: str = "single"
) -> Answer:
    """SparseGPT (Frantar and Alistarh, arXiv 2301.00774) as textbook OBS, one column after the other.

    H^-1 is that of the columns not yet passed; column j is passed by Gaussian elimination of its row and
    column. The pivot [H^-1]_jj at that moment is diag(U)_j^2 of the paper's Cholesky factor, known before
    the sweep. Damping is added to diag H as a share of each entry. Masks are chosen per block of columns by
    W^2 / pivot on entering the block: with K kept of
    `in` columns, the blocks up to column b have kept floor(K b / in), over all rows ("layer") or in every
    row ("row"); N:M masks on entering each group.
    Choices: a dead input's diagonal becomes 1 and its weight 0; N:M groups do not care where blocks end. With the
    score "joint" (arXiv 2410.15567) each group of each row loses the set P of the lowest w_P (G_PP)^-1 w_P, G the
    inverse of the columns from the group on, all of which make up for P together; of equals the set that keeps the
    first columns.
    """
    W, H = _floats(W0), _floats(H)
    out, inputs = W.shape
    dead = np.diag(H) == 0
    H = H + damping * np.diag(np.diag(H))
    H[dead, dead] = 1
    W[:, dead] = 0

    inverses = [np.linalg.inv(H)]  # inverses[j]: of the columns j, j+1, ..., zero elsewhere
    for j in range(inputs - 1):
        A = inverses[-1]
        A = A - np.outer(A[:, j], A[j, :]) / A[j, j]
        A[j, :] = A[:, j] = 0
        inverses.append(A)
    pivots = np.array([inverses[j][j, j] for j in range(inputs)])

    mask = np.zeros((out, inputs), dtype=bool)
    if score == "joint" and pattern[0] == "nm":
        for j in range(0, inputs, pattern[2]):
            for i in range(out):
                least = np.inf
                for kept in itertools.combinations(range(j, j + pattern[2]), pattern[1]):
                    P = [c for c in range(j, j + pattern[2]) if c not in kept]
                    weights = np.linalg.solve(inverses[j][np.ix_(P, P)], W[i, P])
                    if W[i, P] @ weights < least:
                        least, update = W[i, P] @ weights, weights @ inverses[j][P]
                        mask[i, j : j + pattern[2]] = [c in kept for c in range(j, j + pattern[2])]
                W[i] -= update
        return _answer(W, mask)
    for j in range(inputs):
        if pattern[0] == "fixed":
            mask[:, j] = _mask(pattern[1])[:, j]
        elif pattern[0] == "nm":
            if j % pattern[2] == 0:
                group = slice(j, j + pattern[2])
                mask[:, group] = _mask(project_nm(W[:, group] ** 2 / pivots[group], pattern[1], pattern[2]))
        elif j % block_size == 0:
            end = min(j + block_size, inputs)
            scores = W[:, j:end] ** 2 / pivots[j:end]
            if pattern[0] == "layer":
                K = num_kept(pattern, out, inputs)
                mask[:, j:end] = _mask(project_topk(scores, K * end // inputs - K * j // inputs))
            else:
                K = num_kept(pattern, 1, inputs)
                mask[:, j:end] = _mask(project_rows(scores, K * end // inputs - K * j // inputs))
        removed = np.where(mask[:, j], 0, W[:, j])
        W -= np.outer(removed / pivots[j], inverses[j][j, :])
    return _answer(W, mask)


def mrp(W0: Matrix, H: Matrix, pattern: Pattern, damping: float = 0.01) -> Answer:
    """MRP (arXiv 2410.15567): the joint score where there are groups; then each row's set P is removed at once.

    dw = -w_P (G_PP)^-1 G_P,: with G the inverse of the whole damped H. Choices: a fixed mask is taken as it is, and
    a dead input as in `sparsegpt`.
    """
    _, chosen = sparsegpt(W0, H, pattern, damping=damping, score="joint")
    W, H, mask = _floats(W0), _floats(H), _mask(chosen)
    dead = np.diag(H) == 0
    H = H + damping * np.diag(np.diag(H))
    H[dead, dead] = 1
    W[:, dead] = 0
    G = np.linalg.inv(H)
    for i in range(len(W)):
        P = ~mask[i]
        W[i] -= np.linalg.solve(G[np.ix_(P, P)], W[i, P]) @ G[P]
    return _answer(W, mask)


# --- rounding to a grid


def grid_of(bits: int, scale: float) -> Floats:
    """All numbers that a kept weight may become, ascending."""
    whole = range(-127, 128) if bits == 8 else range(-15, 16, 2)
    return np.array([n * scale for n in whole])


def grid_scale(row: Matrix, importance: Matrix, bits: int) -> float:
    """The scale of the weights of one group of one row: 2^e for 8 bits, m 2^e with m = 8..15 for 4.

    The least that reaches the largest weight; for 4 bits, of that one and the next three smaller ones, the one with
    the least sum of importance times squared error. Choices: ties go to the greater scale; zeros have scale 0.
    """
    weights, importance = _floats(row), _floats(importance)
    largest = np.abs(weights).max()
    if largest == 0:
        return 0.0
    mantissas = [1.0] if bits == 8 else [m / 8 for m in range(8, 16)]
    every = sorted(m * 2.0**e for e in range(-140, 140) for m in mantissas)
    first = next(i for i, scale in enumerate(every) if scale * (127 if bits == 8 else 15) >= largest)
    best, least = 0.0, np.inf
    for scale in every[first : first - (1 if bits == 8 else 4) : -1]:
        error = sum(i * np.abs(grid_of(bits, scale) - w).min() ** 2 for w, i in zip(weights, importance))
        if error < least:
            best, least = scale, error
    return best


def quantize(
    W0: Matrix,
    H: Matrix,
    start: Matrix,
    mask: Matrix,
    bits: int = 8,
    group: int = 128,
    damping: float = 0.01,
    sweeps: int = 3,
) -> Answer:
    """Rounding of kept weights: GPTQ (arXiv 2210.17323) as textbook OBS, then coordinate descent (arXiv 2309.01885).

    The first part is `sparsegpt` above with a given mask, from `start`, where a kept weight becomes the nearest
    number of its grid instead of staying; scales are chosen per row when a group of columns is entered, errors
    weighed by diag H. A row whose damped loss is not below that of plain rounding is rounded plainly. The second
    part sets one weight after the other, column by column, to the number of its grid
    that is nearest to where the damped loss of the row is least with all others fixed.
    Choices: a dead input's diagonal becomes 1; of two nearest numbers any, so no test may have such a tie.
    """
    W0, W, H, M = _floats(W0), _floats(start), _floats(H), _mask(mask)
    out, inputs = W.shape
    energies = np.where(np.diag(H) == 0, 1, np.diag(H))
    H = H + damping * np.diag(np.diag(H))
    H[np.diag(H) == 0, np.diag(H) == 0] = 1 + damping
    inverse, Q, scales = np.linalg.inv(H), np.zeros_like(W), np.zeros_like(W)

    def nearest(w: float, row: int, column: int) -> float:
        if not M[row, column] or scales[row, column] == 0:
            return 0.0
        numbers = grid_of(bits, scales[row, column])
        return float(numbers[np.abs(numbers - w).argmin()])

    for j in range(inputs):
        if j % group == 0:
            columns = slice(j, j + group)
            for i in range(out):
                scales[i, columns] = grid_scale(W[i, columns] * M[i, columns], energies[columns], bits)
        Q[:, j] = [nearest(W[i, j], i, j) for i in range(out)]
        W -= np.outer((W[:, j] - Q[:, j]) / inverse[j, j], inverse[j, :])
        inverse = inverse - np.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0
    by_columns, their_scales, begun = Q.copy(), scales.copy(), _floats(start)
    for j in range(0, inputs, group):
        columns = slice(j, j + group)
        for i in range(out):
            scales[i, columns] = grid_scale(begun[i, columns] * M[i, columns], energies[columns], bits)
    Q = np.array([[nearest(begun[i, j], i, j) for j in range(inputs)] for i in range(out)])
    for i in range(out):
        if (W0[i] - by_columns[i]) @ H @ (W0[i] - by_columns[i]) < (W0[i] - Q[i]) @ H @ (W0[i] - Q[i]):
            Q[i], scales[i] = by_columns[i], their_scales[i]
    for _ in range(sweeps):
        for j in range(inputs):
            for i in range(out):
                Q[i, j] = nearest(Q[i, j] + (W0[i] - Q[i]) @ H[:, j] / H[j, j], i, j)
    return _answer(Q, M)


# --- DSnoT


def dsnot(
    W0: Matrix,
    H: Matrix,
    pattern: Pattern,
    *,
    mean: Matrix,
    num_tokens: int,
    start: Matrix | None = None,
    steps: int = 50,
    threshold: float | Matrix = 0.1,
) -> Answer:
    """DSnoT (Zhang et al., arXiv 2310.08915): grow and prune within rows until the expected residual is
    small.

    `mean` (in,) are the inputs' means, the variance is diag(H) / num_tokens - mean^2. `start` is a mask, by
    default Wanda's under the pattern. Per row e = sum over pruned W_j mean_j; grow the pruned index with
    the largest sign(e) W_j mean_j / Var_j, prune the kept index of lowest Wanda score with sign(e) W_j
    mean_j < 0.
    Choices: the threshold is absolute, on e per token, a number or one per row; the swap that flips the
    sign of e is kept, then the row stops; a row stops too where nothing would lower |e|; N:M swaps stay in
    a group, and only groups with an index to prune may grow; variances are at least 1e-12 of the mean
    square; "layer" keeps row counts.
    """
    W, G, mu = _floats(W0), _floats(H), _floats(mean).ravel()
    scores = _floats(saliency(W, G, "wanda"))
    mask = _project(scores, pattern) if start is None else _mask(start)
    if pattern[0] == "fixed":
        return _answer(W, _mask(pattern[1]))
    square = np.diag(G) / num_tokens
    variance = np.maximum(square - mu**2, 1e-12 * max(float(np.mean(square)), 1e-300))
    thresholds = np.broadcast_to(np.asarray(threshold, dtype=np.float64), (len(W),))
    width = pattern[2] if pattern[0] == "nm" else W.shape[1]
    group = np.arange(W.shape[1]) // width
    for i, (w, m) in enumerate(zip(W, mask, strict=True)):
        contribution = w * mu
        e = float(contribution[~m].sum())
        for _ in range(steps):
            if e == 0 or abs(e) < thresholds[i]:
                break
            sign = np.sign(e)
            prunable = m & (sign * contribution < 0)
            growable = ~m & (sign * contribution > 0) & np.isin(group, group[prunable])
            if not growable.any():
                break
            grow = int(np.argmax(np.where(growable, sign * contribution / variance, -np.inf)))
            prune = int(np.argmin(np.where(prunable & (group == group[grow]), scores[i], np.inf)))
            m[grow], m[prune] = True, False
            e += float(contribution[prune] - contribution[grow])
            if np.sign(e) != sign:
                break
    return _answer(W, mask)


# --- unit-diagonal scaling


def _scale(W0: Floats, H: Floats) -> tuple[Floats, Floats, Floats]:
    """(W0 * s, H / (s s^T), s) with s = sqrt(diag H); dead inputs get s = 1, diagonal 1 and weight 0."""
    dead = np.diag(H) <= 0
    s = np.where(dead, 1, _norms(H))
    H = H / np.outer(s, s)
    H[dead, dead] = 1
    return np.where(dead, 0, W0 * s), H, s


# --- ADMM


def admm(
    W0: Matrix,
    H: Matrix,
    pattern: Pattern,
    steps: int = 20,
    mask_steps: int = 15,
    damping: float = 0.1,
    rho: float = 1.0,
    schedule: str = "cubic",
    start: Matrix | None = None,
) -> Answer:
    """ADMM weight update with gradual pruning (Boža, arXiv 2401.02938).

    On unit-diagonal H, damped by `damping` I, with target W0 H of the damped H. schedule "cubic" is
    ADMM-Grad, "reselect" chooses the mask at the final sparsity in the first `mask_steps` iterations (the
    released code), "fixed" keeps the Wanda-score mask of the start (ADMM1).
    Choices: the comparison group is the pattern's; a "fixed" pattern overrides the schedule; the mask of
    iteration mask_steps is frozen; where the iterations end before that, the last projection is at the full
    sparsity; W begins at `start` (out, in), by default W0.
    """
    first = None if start is None else np.where(np.diag(_floats(H)) <= 0, 0, _floats(start))
    W0, H, s = _scale(_floats(W0), _floats(H))
    eye = np.eye(len(H))
    H = H + damping * eye
    target = W0 @ H
    W, U = W0.copy() if first is None else first * s, np.zeros_like(W0)
    mask = _project(np.abs(W0), pattern)
    for t in range(1, steps + 1):
        if schedule == "cubic" and t <= mask_steps:
            mask = _mask(project_gradual(np.abs(W + U), pattern, t / mask_steps))
        elif schedule == "reselect" and t <= mask_steps:
            mask = _project(np.abs(W + U), pattern)
        elif schedule not in ("cubic", "reselect", "fixed"):
            raise ValueError(f"unknown schedule {schedule!r}")
        Z = np.where(mask, W + U, 0)
        U = U + W - Z
        W = _right_solve(target + rho * (Z - U), H + rho * eye)
    if schedule != "fixed" and steps < mask_steps:
        mask = _project(np.abs(W + U), pattern)
    return _answer((W + U) / s, mask)


# --- ALPS


def _alps_problem(W0: Matrix, H: Matrix, damping: float) -> tuple[Floats, Floats, Floats]:
    """Damp by a share of mean diag H, then scale to unit diagonal; dead inputs have weight 0 throughout."""
    weight, gram = _floats(W0), _floats(H)
    weight = np.where(np.diag(gram) <= 0, 0, weight)
    return _scale(weight, gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram)))


def alps(
    W0: Matrix,
    H: Matrix,
    pattern: Pattern,
    damping: float = 0.01,
    rho: float = 0.1,
    steps: int = 300,
    pcg_steps: int = 10,
    rtol: float = 1e-4,
    trace: list[dict[str, float]] | None = None,
) -> Answer:
    """ALPS (Meng et al., arXiv 2406.07831) with the paper's penalty schedule by support change, then PCG.

    Every 3 iterations s = positions of the mask of D that changed since the last check (since the start, at
    the first one): s >= 0.1 k: rho * 1.3; >= 0.005 k: * 1.2; >= 1: * 1.1; 0: stop; at most 1e6. Stop where
    s < 3e-4 k at a check from iteration 30 on. `trace` receives one dict per check: step, change (s), rho
    (used in these 3), gap ||W - D||.
    Choices: s counts both sides of a swap; "does not move at first" is s = 0 while no check since the
    (re)start saw s > 0: then rho / 5, D the projected dense weight, V = 0; iterations count on over
    restarts and the early stop comes before this rule, so there are at most 9 restarts; all of W kept or
    none: no iteration; PCG starts at the projected primal W, on the damped and scaled H.
    """
    W0, H, s = _alps_problem(W0, H, damping)
    eye, target, k = np.eye(len(H)), W0 @ H, num_kept(pattern, *W0.shape)
    mask = before = _project(np.abs(W0), pattern)
    W, D, V = W0.copy(), np.where(mask, W0, 0), np.zeros_like(W0)
    moved = False
    for t in range(1, steps + 1 if 0 < k < W0.size else 1):
        W = _right_solve(target - V + rho * D, H + rho * eye)
        mask = _project(np.abs(W + V / rho), pattern)
        D = np.where(mask, W + V / rho, 0)
        V = V + rho * (W - D)
        if t % 3:
            continue
        change = int(np.sum(mask != before))
        if trace is not None:
            trace.append({"step": t, "change": change, "rho": rho, "gap": float(np.linalg.norm(W - D))})
        before = mask
        if (t >= 30 and change < 3e-4 * k) or (change == 0 and moved):
            break
        if change == 0:
            rho = rho / 5
            before = _project(np.abs(W0), pattern)
            D, V = np.where(before, W0, 0), np.zeros_like(W0)
            continue
        moved = True
        rho = min(rho * (1.3 if change >= 0.1 * k else 1.2 if change >= 0.005 * k else 1.1), 1e6)
    mask = _project(np.abs(W), pattern)
    return _answer(_cg(W0, H, np.where(mask, W, 0), mask, pcg_steps, rtol) / s, mask)


def alps_geometric(
    W0: Matrix,
    H: Matrix,
    pattern: Pattern,
    damping: float = 0.01,
    refit_damping: float | None = None,
    rho_first: float = 0.03,
    rho_last: float = 3.0,
    steps: int = 40,
    levels: int | None = None,
    pcg_steps: int = 10,
    rtol: float = 1e-4,
) -> Answer:
    """The iteration of ALPS (arXiv 2406.07831) with rho from rho_first to rho_last in equal ratios, then PCG.

    `levels` penalties, by default as many as steps, are each held for steps / levels iterations. Damping is added
    to the diagonal after it has been scaled to 1, `refit_damping`, by default the same, in the PCG.
    Choices: where levels do not divide steps, iteration t (from 0) has level floor(t levels / steps); a penalty
    serves the W, D and V updates of its iteration; V, not U, is carried over; D starts at the projected dense
    weight; the final support is the projection of the primal W, and PCG starts there, on the damped and scaled H.
    """
    W0, unit, s = _scale(_floats(W0), _floats(H))
    eye = np.eye(len(unit))
    H, levels = unit + damping * eye, levels or steps
    target = W0 @ H
    W, D, V = W0.copy(), np.where(_project(np.abs(W0), pattern), W0, 0), np.zeros_like(W0)
    penalties = np.geomspace(rho_first, rho_last, levels) if levels > 1 else np.array([rho_first])
    for t in range(steps):
        rho = float(penalties[t * levels // steps])
        W = _right_solve(target - V + rho * D, H + rho * eye)
        D = np.where(_project(np.abs(W + V / rho), pattern), W + V / rho, 0)
        V = V + rho * (W - D)
    mask = _project(np.abs(W), pattern)
    H = unit + (damping if refit_damping is None else refit_damping) * eye
    return _answer(_cg(W0, H, np.where(mask, W, 0), mask, pcg_steps, rtol) / s, mask)


# --- refits


def _cg(W0: Floats, H: Floats, W: Floats, mask: Mask, steps: int, rtol: float) -> Floats:
    """Conjugate gradients of every row on its support, for H with an even diagonal (Jacobi is then a number)."""
    W = W.copy()
    R = np.where(mask, (W0 - W) @ H, 0)
    P = R.copy()
    limit = rtol * np.linalg.norm(np.where(mask, W0 @ H, 0), axis=1)
    for _ in range(steps):
        if np.all(np.linalg.norm(R, axis=1) <= limit):
            break
        Q = np.where(mask, P @ H, 0)
        for i in range(len(W)):
            squared, curvature = float(R[i] @ R[i]), float(P[i] @ Q[i])
            if squared == 0 or curvature <= 0:
                continue
            W[i] += squared / curvature * P[i]
            R[i] -= squared / curvature * Q[i]
            P[i] = R[i] + float(R[i] @ R[i]) / squared * P[i]
    return W


def _refit_start(W0: Matrix, pattern: Pattern, start: Matrix | None) -> tuple[Floats, Mask]:
    W = _floats(W0 if start is None else start)
    mask = _project(np.abs(W), pattern)
    return np.where(mask, W, 0), mask


def pcg(
    W0: Matrix,
    H: Matrix,
    pattern: Pattern,
    start: Matrix | None = None,
    steps: int = 10,
    rtol: float = 1e-4,
    damping: float = 0.0,
) -> Answer:
    """Row-wise preconditioned conjugate gradients on a fixed support (ALPS, arXiv 2406.07831, Algorithm 2).

    `start` (out, in) is the weight to begin with, by default W0; it is masked by the pattern, which is
    usually
    ("fixed", mask), else the largest |start|. Jacobi preconditioner; residual ((W0 - W) H) on the support;
    one
    product with H per step; damping is a share of each diag H.
    Choices: all rows go on until every row's residual, divided by sqrt(diag H), has at most rtol times the
    norm of the same row of W0 H on the support (no row is frozen earlier); rows without residual or
    curvature stand still.
    """
    W, mask = _refit_start(W0, pattern, start)
    gram = _floats(H)
    s = np.where(np.diag(gram) <= 0, 1, _norms(gram))
    unit = (gram + damping * np.diag(np.diag(gram))) / np.outer(s, s)
    return _answer(_cg(_floats(W0) * s, unit, W * s, mask, steps, rtol) / s, mask)


def _best_rows(W: Floats, H: Floats, support: Mask) -> Floats:
    """The rows that minimise the loss on one support; where many do, those changed least from W (scaled)."""
    s = np.where(np.diag(H) <= 0, 1, _norms(H))
    H, target = H / np.outer(s, s), W * s
    rows = np.zeros_like(W)
    kept, pruned = np.flatnonzero(support), np.flatnonzero(~support)
    if kept.size:
        inverse = np.linalg.pinv(H[np.ix_(kept, kept)], rcond=_RANK_TOLERANCE, hermitian=True)
        rows[:, kept] = target[:, kept] + target[:, pruned] @ H[np.ix_(pruned, kept)] @ inverse
    return rows / s


def backsolve(W0: Matrix, H: Matrix, pattern: Pattern, start: Matrix | None = None) -> Answer:
    """Exact refit: per row, H_SS w_S = (W0 H)_S on its support S, undamped.

    The support is that of `pcg`. Choice: where H_SS is singular, the solution that changes least from W0_S in
    unit-diagonal coordinates, which is the limit of `pcg` from W0.
    """
    _, mask = _refit_start(W0, pattern, start)
    gram = _floats(H)
    rows = [_best_rows(w[None], gram, m)[0] for w, m in zip(_floats(W0), mask, strict=True)]
    return _answer(np.stack(rows), mask)


# --- SparseFW


def sparsefw_gradient(W0: Matrix, H: Matrix, M: Matrix) -> Tensor:
    """Gradient of f(M) = tr(R H R^T), R = W0 * (1 - M), for any real M (out, in)."""
    W, M = _floats(W0), _floats(M)
    return torch.from_numpy(-2 * W * ((W - W * M) @ _floats(H)))


def _free_topk(scores: Floats, pattern: Pattern, locked: Mask, positive_only: bool) -> Mask:
    """The largest scores off `locked` that fill the pattern up; where asked, only positive ones."""
    out, inputs = scores.shape
    if pattern[0] == "layer":
        groups = [(np.arange(out * inputs), num_kept(pattern, out, inputs))]
    elif pattern[0] == "row":
        groups = [(row, num_kept(pattern, 1, inputs)) for row in np.arange(out * inputs).reshape(out, inputs)]
    else:
        groups = [(group, pattern[1]) for group in np.arange(out * inputs).reshape(-1, pattern[2])]
    mask = np.zeros(out * inputs, dtype=bool)
    for index, kept in groups:
        free = index[~locked.ravel()[index]]
        mask[free] = _topk(scores.ravel()[free], kept - int(locked.ravel()[index].sum()))
    if positive_only:
        mask &= scores.ravel() > 0
    return mask.reshape(out, inputs)


def sparsefw_fixed_part(scores: Matrix, pattern: Pattern, alpha: float) -> Tensor:
    """M_bar: the floor(alpha k) most salient entries of the start mask, per row for a row pattern, else
    over all.

    Choices: "per row" floors alpha times the row's count; N:M takes them over the whole matrix, but at most
    N - 1 of a group, the whole group where N is 1.
    """
    array = _floats(scores)
    start = _project(array, pattern)
    if pattern[0] == "row":
        inside = np.where(start, array, -np.inf)
        return project_rows(inside, math.floor(alpha * num_kept(pattern, 1, array.shape[1])))
    num = math.floor(alpha * num_kept(pattern, *array.shape))
    if pattern[0] == "nm":
        start &= _mask(project_nm(array, max(1, pattern[1] - 1), pattern[2]))
    return project_topk(np.where(start, array, -np.inf), min(num, int(start.sum())))


def sparsefw(
    W0: Matrix,
    H: Matrix,
    pattern: Pattern,
    steps: int = 200,
    alpha: float = 0.25,
    start: str = "wanda",
    step: str = "open",
    offset: float = 0.0,
    grade_every: int = 20,
    exponent: float = 0.5,
) -> Answer:
    """SparseFW (Roux et al., arXiv 2510.13713): Frank-Wolfe on the relaxed mask; kept weights are not
    updated.

    `start` names the saliency of the warm start, `exponent` is RIA's. step "open": eta = 2 / (t + 2 +
    offset), t = 0, 1, ...; "line": exact line search. The gradient is taken at M + M_bar; the vertex has
    ones on the most negative gradients off M_bar, only where negative; M + M_bar is rounded and graded
    after every `grade_every` steps and at the end, and the best of these and the start is returned, an
    earlier one where equal.
    Choices: one line search for the whole matrix, eta = 1 where the curvature is 0 and the slope negative;
    the steps do not end early; a fixed pattern returns its mask; alpha = 0.25 and offset = 0 by default.
    """
    W, G = _floats(W0), _floats(H)
    if pattern[0] == "fixed":
        return _answer(W, _mask(pattern[1]))
    scores = _floats(saliency(W, G, start, exponent))
    best = _project(scores, pattern)
    fixed = _mask(sparsefw_fixed_part(scores, pattern, alpha))
    lowest = objective(W * best, W, G)
    M = (best & ~fixed).astype(np.float64)
    for t in range(steps):
        gradient = _floats(sparsefw_gradient(W, G, M + fixed))
        V = _free_topk(-gradient, pattern, fixed, positive_only=True)
        if step == "open":
            eta = 2 / (t + 2 + offset)
        elif step == "line":
            D = V - M
            slope, curvature = float(np.sum(gradient * D)), float(np.sum(((W * D) @ G) * (W * D)))
            eta = float(np.clip(-slope / (2 * curvature), 0, 1)) if curvature > 0 else float(slope < 0)
        else:
            raise ValueError(f"unknown step {step!r}")
        M = M + eta * (V - M)
        if (t + 1) % grade_every == 0 or t + 1 == steps:
            rounded = _free_topk(M, pattern, fixed, positive_only=False) | fixed
            loss = objective(W * rounded, W, G)
            if loss < lowest:
                best, lowest = rounded, loss
    return _answer(W, best)


def frank_wolfe_groups(W0: Matrix, H: Matrix, keep: int, of: int, steps: int = 200, locked: int = 1) -> Answer:
    """Plain open-loop Frank-Wolfe for N:M: eta = 2 / (t + 2), the `locked` best of each group kept for ever.

    It begins at Wanda's mask, without line search, and its last M is rounded: what any SparseFW must not lose to.
    """
    W, G = _floats(W0), _floats(H)
    pattern = ("nm", keep, of)
    scores = _floats(saliency(W, G, "wanda"))
    fixed = _mask(project_nm(scores, locked, of))
    M = (_project(scores, pattern) & ~fixed).astype(np.float64)
    for t in range(steps):
        gradient = _floats(sparsefw_gradient(W, G, M + fixed))
        V = _free_topk(-gradient, pattern, fixed, positive_only=True)
        M = M + 2 / (t + 2) * (V - M)
    return _answer(W, _free_topk(M, pattern, fixed, positive_only=False) | fixed)


# --- SparseSwaps


def swap_changes(w: Matrix, H: Matrix, m: Matrix) -> Tensor:
    """Change of one row's loss for every swap: entry (u, p) prunes the kept u and revives the pruned p,
    else inf."""
    row, G, kept = _floats(w), _floats(H), _mask(m)
    c = G @ np.where(kept, 0, row)
    changes = np.full((row.size, row.size), np.inf)
    for u in np.flatnonzero(kept):
        for p in np.flatnonzero(~kept):
            changes[u, p] = (
                2 * row[u] * c[u]
                + row[u] ** 2 * G[u, u]
                - 2 * row[p] * c[p]
                + row[p] ** 2 * G[p, p]
                - 2 * row[u] * row[p] * G[u, p]
            )
    return torch.from_numpy(changes)


def swaps(
    W0: Matrix,
    H: Matrix,
    pattern: Pattern,
    start: Matrix | None = None,
    max_swaps: int = 10_000,
    tolerance: float = 1e-12,
) -> Answer:
    """SparseSwaps (Zimmer et al., arXiv 2512.10922): per row the best 1-swap while one lowers the loss.

    `start` is a mask, by default Wanda's under the pattern. N:M swaps stay within a group; "layer" keeps
    the row counts of the start; a fixed pattern returns its mask. Weights are those of W0.
    Choices: "lowers" means by more than `tolerance` times the sum of w_j^2 H_jj over what the row's mask prunes
    (rounding could cycle); ties go to the lowest pruned index u, then the lowest revived p; c is computed anew
    for every swap.
    """
    W, G = _floats(W0), _floats(H)
    if pattern[0] == "fixed":
        return _answer(W, _mask(pattern[1]))
    mask = _project(_floats(saliency(W, G, "wanda")), pattern) if start is None else _mask(start)
    width = pattern[2] if pattern[0] == "nm" else W.shape[1]
    group = np.arange(W.shape[1]) // width
    allowed = group[:, None] == group[None, :]
    for w, m in zip(W, mask, strict=True):
        for _ in range(max_swaps):
            changes = np.where(allowed, _floats(swap_changes(w, G, m)), np.inf)
            u, p = np.unravel_index(int(np.argmin(changes)), changes.shape)
            if not changes[u, p] < -tolerance * float(np.sum(np.where(m, 0, w**2 * np.diag(G)))):
                break
            m[u], m[p] = False, True
    return _answer(W, mask)


# --- brute force


def _search(W: Floats, H: Floats, pattern: Pattern, refit: bool) -> Answer:
    """Every support of every row; for a count of the whole matrix, the best split of it over the rows by
    dynamic programming, which is as exact as enumerating all masks because the loss is a sum over rows."""
    out, inputs = W.shape
    if inputs > 10:
        raise ValueError(f"brute force is for at most 10 inputs, not {inputs}")
    if pattern[0] == "fixed":
        return backsolve(W, H, pattern) if refit else _answer(W, _mask(pattern[1]))
    supports = [np.array(bits, dtype=bool) for bits in itertools.product((True, False), repeat=inputs)]
    if pattern[0] == "row":
        supports = [m for m in supports if m.sum() == num_kept(pattern, 1, inputs)]
    elif pattern[0] == "nm":
        supports = [m for m in supports if np.all(m.reshape(-1, pattern[2]).sum(1) == pattern[1])]

    # by_count[i][n]: the lowest loss of row i alone with n weights kept, and its support
    by_count: list[dict[int, tuple[float, Mask]]] = [{} for _ in W]
    for m in supports:
        E = (_best_rows(W, H, m) if refit else np.where(m, W, 0)) - W
        for i, loss in enumerate(np.sum((E @ H) * E, axis=1)):
            count = int(m.sum())
            if count not in by_count[i] or loss < by_count[i][count][0]:
                by_count[i][count] = (float(loss), m)

    # best[n]: the lowest loss of the rows so far with n weights kept in all, and their supports
    best: dict[int, tuple[float, list[Mask]]] = {0: (0.0, [])}
    for choices in by_count:
        longer: dict[int, tuple[float, list[Mask]]] = {}
        for (n, (lost, masks)), (count, (loss, m)) in itertools.product(best.items(), choices.items()):
            if n + count not in longer or lost + loss < longer[n + count][0]:
                longer[n + count] = (lost + loss, [*masks, m])
        best = longer
    mask = np.stack(best[num_kept(pattern, out, inputs)][1])
    return backsolve(W, H, ("fixed", mask)) if refit else _answer(W, mask)


def brute_force(W0: Matrix, H: Matrix, pattern: Pattern) -> Answer:
    """The best of all supports of the pattern, each with its optimal weights; at most 10 inputs."""
    return _search(_floats(W0), _floats(H), pattern, refit=True)


def brute_force_mask(W0: Matrix, H: Matrix, pattern: Pattern) -> Answer:
    """The best of all masks of the pattern, the kept weights being those of W0; at most 10 inputs."""
    return _search(_floats(W0), _floats(H), pattern, refit=False)
