"""A rotation of the dimensions inside attention heads after which a pattern prunes little.

What a KV head puts out, v = V x with V (d, in), is averaged over tokens and then multiplied by the columns O (out, d)
of each of its query heads. So for an orthogonal R (d, d)

    V <- R^T V,   O <- O R                                        (1)

changes nothing that the model computes, and costs nothing when it runs. It changes what a pattern prunes. With the
importance of a weight as OBS has it,

    S_ij = w_ij^2 / (H^-1)_jj,   (H^-1)_jj of O's inputs <- (R^T H^-1 R)_jj          (2)

R is to minimise the share of all importance that the pattern prunes, summed over both weights:

    L(R) = sum over V and O of  sum of S outside the pattern's best mask / sum of S         (3)

R is the factor Q of a QR factorisation of A with the diagonal of the triangle positive, A starts at the identity, and
Adam takes steps on A with the mask held; the best R on the way is taken.

| code     | DenoiseRotator | shape                    | meaning                              |
|----------|----------------|--------------------------|--------------------------------------|
| V, O     | W_V, W_O       | (g, d, in), (g, c, out, d) | by KV head; c query heads each     |
| R        | R_2            | (g, d, d)                | one rotation for each KV head        |
| S        | OBD/OBS score  | as V and O               | importance                           |

Source: Gu et al., DenoiseRotator, arXiv 2505.23049: R_2, QR, Adam with 0.01, gradients clipped at 1, 100 steps.
Differences: only R_2, since R_1 stays in the residual stream and the folder would be no ordinary model; (3) in place
of the entropy of normalised importance, with which more error is left (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.layer.pattern import Pattern

_STEPS, _RATE, _CLIP = 100, 0.01, 1.0


@dataclass(frozen=True, eq=False)
class Heads:
    """The weights between which heads lie, and what (2) needs to know of their inputs.

    ``V`` (groups, width, in) and ``O`` (groups, copies, out, width) by KV head; ``V_energy`` (in,) is 1 / diag(H^-1)
    of V's inputs, ``O_inverse`` (groups, copies, width, width) the blocks of H^-1 of O's inputs. Patterns are of the
    whole weights (groups * width, in) and (out, groups * copies * width); None where the weight is not pruned.
    """

    V: Float[Tensor, "groups width inputs"]
    O: Float[Tensor, "groups copies out width"]  # noqa: E741 (as the paper has it)
    V_energy: Float[Tensor, " inputs"] | None
    O_inverse: Float[Tensor, "groups copies width width"]
    V_pattern: Pattern | None
    O_pattern: Pattern | None


def choose_rotation(heads: Heads, steps: int = _STEPS) -> tuple[Float[Tensor, "groups width width"], float, float]:
    """The rotation of each KV head, and (3) before and after; the identity where nothing is better.

    The best of ``steps`` steps; the same bits for the same weights.
    """
    groups, width, _ = heads.V.shape
    A = torch.eye(width, dtype=heads.O.dtype, device=heads.O.device).repeat(groups, 1, 1).requires_grad_()
    adam = torch.optim.Adam([A], lr=_RATE)
    best = A.detach().clone()
    start = least = float(_pruned_share(heads, best))
    with torch.enable_grad():
        for _ in range(steps):
            adam.zero_grad()
            R = _orthogonal(A)
            loss = _pruned_share(heads, R)
            if (value := float(loss.detach())) < least:
                least, best = value, R.detach().clone()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([A], _CLIP)
            adam.step()
    return best, start, least


def _orthogonal(A: Float[Tensor, "groups width width"]) -> Float[Tensor, "groups width width"]:
    """Q of A = Q T with a positive diagonal of T, which makes it unique."""
    Q, T = torch.linalg.qr(A)
    R: Tensor = Q * T.detach().diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    return R


def _pruned_share(heads: Heads, R: Float[Tensor, "groups width width"]) -> Float[Tensor, ""]:
    """(3)."""
    total = R.new_zeros(())
    if heads.V_pattern is not None and heads.V_energy is not None:
        V = R.mT @ heads.V
        total = total + _outside((V.square() * heads.V_energy).flatten(0, 1), heads.V_pattern)
    if heads.O_pattern is not None:
        turned = R.mT.unsqueeze(1) @ heads.O_inverse @ R.unsqueeze(1)
        S = (heads.O @ R.unsqueeze(1)).square() / turned.diagonal(dim1=2, dim2=3).unsqueeze(2)
        total = total + _outside(S.permute(2, 0, 1, 3).flatten(1), heads.O_pattern)
    return total


def _outside(S: Float[Tensor, "out inputs"], pattern: Pattern) -> Float[Tensor, ""]:
    """The share of S outside the pattern's best mask, which is held for the gradient; 0 where S is 0."""
    mask = pattern.project(S.detach())
    whole = S.sum()
    return (S * ~mask).sum() / whole if bool(whole > 0) else whole
