"""The answer of a method: the sparse weight, its mask, and an honest account of how it went."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from jaxtyping import Bool, Float
from torch import Tensor


class Status(Enum):
    """How a solve ended, as a fixed sentence; numbers go into ``Solution.details``."""

    SOLVED = "solved"
    CONVERGED = "converged"
    STEP_LIMIT = "all steps taken"
    TRIVIAL = "nothing to choose"
    DAMPED = "solved with more damping than asked for"
    NOT_FINITE = "diverged: the dense weight is only masked"
    PART_FAILED = "a part of the combination failed: what the part before it found is returned"
    NOT_FACTORED = "the Gram matrix could not be factored: the dense weight is only masked"

    @property
    def failed(self) -> bool:
        """Whether the method did not do what it is for; ``--strict`` makes this an error."""
        return self in (Status.NOT_FINITE, Status.PART_FAILED, Status.NOT_FACTORED)


@dataclass
class Solution:
    """A sparse weight and its mask, both (out, in); True = kept.

    ``relative_error`` and ``balanced_error``, which no single input can dominate, are set by the driver, never by
    a method (see the LayerProblem's of the same names);
    ``trace`` holds one number per step under each name; ``seconds`` is the time of the solve.
    """

    weight: Float[Tensor, "out inputs"]
    mask: Bool[Tensor, "out inputs"]
    status: Status = Status.SOLVED
    relative_error: float = float("nan")
    balanced_error: float = float("nan")
    steps: int = 0
    seconds: float = 0.0
    details: dict[str, float | str] = field(default_factory=dict)
    trace: dict[str, list[float]] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that the mask prunes."""
        return 1 - int(self.mask.sum()) / self.mask.numel()
