"""The one interface of all methods, and the one driver of iterations.

A method is a frozen dataclass of its hyperparameters: it is its own configuration. Direct methods
implement ``solve``; iterative ones implement ``init``, ``step``, ``stop`` and ``finish`` and share the
driver below, which owns the count of steps, the trace and the watch for non-finite iterates. No
method measures its own error or time: ``run`` does that, the same way for all.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from operator import ne
from typing import ClassVar, Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.errors import MethodError, NumericalError, PatternError
from rarefy.layer.passes import apply_mask, compare, count, finite
from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution, Status
from rarefy.methods.settings import cannot_come_first, check_hyperparameters, hyper

__all__ = [
    "Cost",
    "Diverged",
    "IterativeMethod",
    "Method",
    "cannot_come_first",
    "check_rows_apart",
    "fallback",
    "hyper",
    "inversions",
    "masked",
    "run",
    "wanda_scores",
]

State = TypeVar("State")


class Diverged(NumericalError):
    """The iterates of a method stopped being finite."""


@dataclass(frozen=True)
class Cost:
    """What one solve takes beside W0, H and its answer.

    ``products`` are products W0 @ H, of out * in^2 multiplications each; factorisations are counted by their
    multiplications, selections and passes not at all. ``weights`` and ``grams`` are float32 matrices (out, in) and
    (in, in) at the peak, with what the Gram caches for other layers.
    """

    products: float = 0.0
    weights: float = 8.0
    grams: float = 4.0


def inversions(num: float, shape: Shape) -> float:
    """Factorisations of A with the inverse from it, in^3 / 2 multiplications each, in products W0 @ H."""
    return num * shape[1] / (2 * shape[0])


@dataclass(frozen=True)
class Method(ABC):
    """Finds a sparse weight for one layer; instances are immutable and can be used for any layer."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    #: Which ``--scope`` the method compares weights in by default: the whole "layer" or each "row".
    default_scope: ClassVar[str] = "layer"
    #: Whether runs follow the loss of the model unless told otherwise: row weights and allocation "fisher".
    follows_loss: ClassVar[bool] = False
    #: Whether the Gram must carry the mean of the inputs.
    needs_means: ClassVar[bool] = False
    #: Whether it reads ``LayerProblem.output_norms``, which are then collected.
    needs_output_norms: ClassVar[bool] = False
    #: Whether it only improves a start (an earlier method's solution) and cannot come first.
    needs_start: ClassVar[bool] = False
    #: Whether it can go on from a start; one that cannot is only ever the first of a combination.
    takes_start: ClassVar[bool] = False
    #: Whether its answer is a dense matrix that stands for something smaller, so that no zeros are promised.
    gives_dense: ClassVar[bool] = False
    #: Whether its weights lie on a grid that nothing after it may leave.
    comes_last: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def check_pattern(self, pattern: Pattern) -> None:  # noqa: B027 (most work with every pattern)
        """Raise PatternError where the method cannot work with ``pattern``, whatever the layer."""

    @abstractmethod
    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        """A weight and mask for ``problem`` that ``pattern`` allows.

        ``start`` is what the method before it in a combination found. Grades nothing.
        Raises NumericalError where the layer cannot be solved.
        """

    def from_trivial(self, problem: LayerProblem, pattern: Pattern, only: Solution) -> Solution:
        """What it makes of the ``only`` answer that there is where everything is kept: that, unless it rounds."""
        return only

    def rows_independent(self, pattern: Pattern) -> bool:
        """Whether a row's answer never depends on other rows, so that layers may be stacked or split."""
        return False

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        """The products and the memory that a layer of ``shape`` (out, in) takes; ample where nothing is known."""
        return Cost()


class IterativeMethod(Method, Generic[State]):
    """A method that repeats a step: ``init``, then ``step`` and ``stop`` until done, then ``finish``."""

    @abstractmethod
    def init(self, problem: LayerProblem, pattern: Pattern, start: Solution | None) -> State:
        """The state before the first step."""

    @abstractmethod
    def max_steps(self, state: State) -> int:
        """How many steps are taken at most."""

    @abstractmethod
    def step(self, state: State, t: int) -> dict[str, float]:
        """Take step t = 1, 2, ... in place; what it returns is added to the trace."""

    def stop(self, state: State, t: int) -> bool:
        """Whether the method is done after step t."""
        return False

    def iterate(self, state: State) -> Float[Tensor, "out inputs"] | None:
        """The tensor that becomes non-finite first if the iteration diverges; None if it cannot."""
        return None

    @abstractmethod
    def finish(self, state: State) -> Solution:
        """The answer of the last state."""

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        state = self.init(problem, pattern, start)
        trace: dict[str, list[float]] = {}
        status, t = Status.STEP_LIMIT, 0
        for t in range(1, self.max_steps(state) + 1):
            for key, value in self.step(state, t).items():
                trace.setdefault(key, []).append(value)
            if self.stop(state, t):
                status = Status.CONVERGED
                break
        iterate = self.iterate(state)
        if iterate is not None and not bool(torch.isfinite(iterate.sum())):
            raise Diverged(f"{self} diverged within {t} steps.")
        solution = self.finish(state)
        if solution.status is Status.SOLVED:
            solution.status = status
        solution.steps += t
        solution.trace = trace | solution.trace
        return solution


def run(
    method: Method,
    problem: LayerProblem,
    pattern: Pattern,
    *,
    name: str = "the layer",
    start: Solution | None = None,
    graded: bool = True,
) -> Solution:
    """Check, solve, time and, if ``graded``, grade one layer; what every caller uses instead of ``method.solve``.

    Trivial patterns (nothing or everything kept) are answered here. A method that fails on a layer
    is reported by the status of the solution, whose weight is then W0 on the pattern's mask of the
    largest Wanda scores: never dense, never silent.
    Raises NumericalError for NaN or infinity in W0 or H, PatternError where the pattern does not fit,
    MethodError where a method breaks its contract; each names the layer.
    """
    if method.needs_start and start is None:
        raise cannot_come_first(method)
    method.check_pattern(pattern)
    pattern.validate(problem.shape, name)
    problem.check(name)
    started = time.perf_counter()
    kept = pattern.count(problem.shape)
    if kept == 0:
        solution = _trivial(problem, kept=False)
    else:
        try:
            if kept == problem.W0.numel():
                solution = method.from_trivial(problem, pattern, _trivial(problem, kept=True))
            else:
                solution = method.solve(problem, pattern, start)
            _check_contract(method, solution, pattern, problem, name)
        except NumericalError as error:
            solution = fallback(problem, pattern)
            if isinstance(error, Diverged):
                solution.status = Status.NOT_FINITE
            solution.details["failure"] = str(error)
    solution.seconds = time.perf_counter() - started
    if graded:
        solution.relative_error = problem.relative_error(solution.weight)
        solution.balanced_error = problem.balanced_error(solution.weight)
    return solution


def check_rows_apart(method: Method, pattern: Pattern) -> None:
    """Raise PatternError for a method that moves weights within each row, where all rows must be alike."""
    if pattern.rows_alike:
        raise PatternError.sentence(
            f"{method} changes the mask of each row by itself, but {pattern} has one mask for all rows."
        )
    if pattern.row_group > 1:
        raise PatternError.sentence(
            f"{method} moves weights within a row, but {pattern} counts them in columns, too: choose another method."
        )


def _trivial(problem: LayerProblem, kept: bool) -> Solution:
    """W0, or zeros."""
    mask = torch.full_like(problem.W0, kept, dtype=torch.bool)
    return Solution(apply_mask(problem.W0, mask), mask, Status.TRIVIAL)


def fallback(problem: LayerProblem, pattern: Pattern) -> Solution:
    """W0 on the mask of the largest Wanda scores, with a status that says that the method failed."""
    mask = pattern.project(wanda_scores(problem))
    return Solution(apply_mask(problem.W0, mask), mask, Status.NOT_FACTORED)


def wanda_scores(problem: LayerProblem) -> Float[Tensor, "out inputs"]:
    """|W0_ij| ||X_j||, with ||X_j|| = sqrt(H_jj) (arXiv 2306.11695)."""
    return problem.W0.abs() * problem.H.diagonal().clamp_min(0).sqrt()


def masked(weight: Float[Tensor, "out inputs"], mask: Bool[Tensor, "out inputs"]) -> Solution:
    """The weight with zeros where ``mask`` is False."""
    return Solution(apply_mask(weight, mask), mask)


def _check_contract(method: Method, solution: Solution, pattern: Pattern, problem: LayerProblem, name: str) -> None:
    if solution.weight.shape != problem.W0.shape or solution.mask.shape != problem.W0.shape:
        raise MethodError.sentence(f"{method.name} returned another shape than that of {name}.")
    if not finite(solution.weight):
        raise Diverged(f"{method} returned NaN or infinity.")
    if method.gives_dense and bool(solution.mask.all()):
        return
    try:
        pattern.check(solution.mask)
    except PatternError as error:
        raise MethodError.sentence(f"{method} returned a mask for {name} that {pattern} forbids: {error}") from None
    if count(compare(ne, solution.weight, 0.0) & ~solution.mask):
        raise MethodError.sentence(f"{method.name} returned a weight that is not zero outside its mask.")
