"""Methods made of methods: one after the other, or the best of several.

``Then(Wanda(), PCG())`` is ``--method wanda+pcg`` on the command line: each part starts from the
solution of the part before it. ``BestOf(a, b)`` solves with each and keeps the lowest loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from rarefy.errors import MethodError, NumericalError
from rarefy.layer.pattern import Pattern, Shape
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution, Status
from rarefy.methods.base import Cost, Method
from rarefy.methods.settings import check_order


@dataclass(frozen=True, init=False)
class _Combination(Method):
    """Several methods that act as one."""

    parts: tuple[Method, ...]

    def __init__(self, *parts: Method) -> None:
        if not parts or not all(isinstance(part, Method) for part in parts):
            raise MethodError.sentence(f"{type(self).__name__} takes one or more methods, such as rarefy.Wanda().")
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "default_scope", parts[0].default_scope)
        object.__setattr__(self, "paper", "; ".join(dict.fromkeys(part.paper for part in parts if part.paper)))
        object.__setattr__(self, "needs_means", any(part.needs_means for part in parts))
        object.__setattr__(self, "needs_output_norms", any(part.needs_output_norms for part in parts))
        object.__setattr__(self, "comes_last", any(part.comes_last for part in parts))

    def check_pattern(self, pattern: Pattern) -> None:
        for part in self.parts:
            part.check_pattern(pattern)

    def cost(self, shape: Shape, pattern: Pattern) -> Cost:
        costs = [part.cost(shape, pattern) for part in self.parts]
        held = 1.0 if len(costs) > 1 else 0.0  # the solution of the part before
        return Cost(
            sum(cost.products for cost in costs),
            max(cost.weights for cost in costs) + held,
            max(cost.grams for cost in costs),
        )

    def rows_independent(self, pattern: Pattern) -> bool:
        return all(part.rows_independent(pattern) for part in self.parts)


@dataclass(frozen=True, init=False)
class Then(_Combination):
    """Each method improves what the one before it found."""

    name: ClassVar[str] = "then"
    summary: ClassVar[str] = "each part starts from the solution of the part before it"

    def __init__(self, *parts: Method) -> None:
        super().__init__(*parts)
        check_order(parts)

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.parts)

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        found = start
        for part in self.parts:
            try:
                solution = part.solve(problem, pattern, found)
            except NumericalError as error:
                if found is None:
                    raise
                details = found.details | {"failure": f"{part}: {error}"}
                return replace(found, status=Status.PART_FAILED, details=details)
            if found is not None:
                solution.steps += found.steps
                solution.details = found.details | solution.details
                solution.trace = found.trace | solution.trace
                if found.status is Status.DAMPED:
                    solution.status = Status.DAMPED
            found = solution
        assert found is not None  # there is at least one part
        return found

    def from_trivial(self, problem: LayerProblem, pattern: Pattern, only: Solution) -> Solution:
        for part in self.parts:
            only = part.from_trivial(problem, pattern, only)
        return only


@dataclass(frozen=True, init=False)
class BestOf(_Combination):
    """Solves with each method and keeps the solution with the lowest loss."""

    name: ClassVar[str] = "bestof"
    summary: ClassVar[str] = "keeps the best of several methods' solutions, layer by layer"

    def __init__(self, *parts: Method) -> None:
        super().__init__(*parts)
        object.__setattr__(self, "takes_start", any(part.takes_start for part in parts))
        object.__setattr__(self, "needs_start", any(part.needs_start for part in parts))

    def __str__(self) -> str:
        return "best of " + ", ".join(str(part) for part in self.parts)

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        solutions, failures = [], []
        for part in self.parts:
            try:
                solutions.append((part, part.solve(problem, pattern, start)))
            except NumericalError as error:
                failures.append(f"{part}: {error}")
        if not solutions:
            raise NumericalError("; ".join(failures))
        part, best = min(solutions, key=lambda pair: problem.objective(pair[1].weight))
        best.details["best"] = str(part)
        if failures:
            best.details["failure"] = "; ".join(failures)
        return best

    def rows_independent(self, pattern: Pattern) -> bool:
        return False  # one winner for the whole layer
