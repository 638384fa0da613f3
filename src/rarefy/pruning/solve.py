"""Step 2 of a block: solve its layers, or this process's pieces of them, and write each as soon as it is solved."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from rarefy.errors import NumericalError
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import Pattern
from rarefy.layer.problem import LayerProblem, error_ratio
from rarefy.layer.row_weights import row_factors, unweighted, weighted
from rarefy.layer.solution import Solution
from rarefy.methods.base import Method, run
from rarefy.models.sites import Site
from rarefy.parallel.sharing import Piece
from rarefy.pruning.drift import corrected
from rarefy.pruning.parts import Energies, Part
from rarefy.pruning.precision import full_float32
from rarefy.pruning.records import LayerRecord
from rarefy.pruning.settings import PruneSettings
from rarefy.pruning.write import write_rows


@full_float32()
def solve(
    weight: Tensor,
    gram: Tensor | Gram,
    pattern: Pattern,
    method: Method,
    *,
    name: str = "the layer",
    row_weights: Tensor | None = None,
) -> Solution:
    """Prune one layer: ``weight`` (out, in) float, ``gram`` (in, in) tensor X^T X or ``Gram``.

    Returns a Solution with ``weight`` (out, in), ``mask``, ``relative_error`` and ``status``; works in
    float64 if either input does, else in float32. ``name`` is what errors call the layer. ``row_weights`` (out,) say
    how much errors of each output count where rows compete for weights; the grades do not have them. Raises
    PatternError, MethodError, NumericalError (NaN or infinity), InputError (shapes).
    """
    gram = gram if isinstance(gram, Gram) else Gram.from_matrix(gram)
    with torch.no_grad():
        problem = LayerProblem(weight, gram)
        if row_weights is None:
            return run(method, problem, pattern, name=name)
        factors = row_factors(row_weights)
        solution = unweighted(run(method, weighted(problem, factors), pattern, name=name, graded=False), factors)
        solution.relative_error = problem.relative_error(solution.weight)
        solution.balanced_error = problem.balanced_error(solution.weight)
        return solution


def solve_piece(
    site: Site,
    piece: Piece,
    block: int,
    gram: Gram,
    settings: PruneSettings,
    D: Tensor | None = None,
    output_norms: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> tuple[Part, Bool[Tensor, "rows inputs"]]:
    """Solve a layer, or some rows of it, and write it; its record, graded from what was written, and its mask.

    ``D`` (in, in) corrects the drift of what is aimed at (drift.py), and grades are those of that target.
    ``output_norms`` (out,) are those of the whole layer (outputs.py), and so are ``row_weights``, by which the method
    chooses, but which grades do not have.
    """
    whole = pattern = settings.pattern_of(site)
    if piece.stop - piece.start < site.shape[0]:
        pattern = whole.rows(piece.start, piece.stop, site.shape)
    with torch.no_grad():
        target = site.read(piece.rows)
        if D is not None:
            gram.check(site.name)
            target = corrected(target, gram, D, settings.drift)
        problem = LayerProblem(target, gram, None if output_norms is None else output_norms[piece.rows])
        factors = None if row_weights is None else row_factors(row_weights)[piece.rows]
        posed = problem if factors is None else weighted(problem, factors)
        solution = run(settings.method, posed, pattern, name=site.name, graded=False)  # as it is written, below
        if factors is not None:
            solution = unweighted(solution, factors)
        if settings.strict and solution.status.failed:
            reason = solution.details.get("failure", solution.status.value)
            raise NumericalError(f"{site.name}: {reason} (strict)")
        write_rows(site, piece.rows, solution)
        written = site.read(piece.rows)
        lost = Energies(problem.objective(written), problem.balanced_objective(written))
        dense = Energies(problem.dense_energy, problem.balanced_energy)
    record = LayerRecord(
        name=site.name,
        block=block,
        shape=list(problem.shape),
        pattern=f"the bits of {whole}" if settings.method.gives_dense else str(whole),
        pattern_spec={} if settings.method.gives_dense else whole.spec(),
        kept=int(solution.mask.sum()),
        relative_error=error_ratio(lost.plain, dense.plain),
        balanced_error=error_ratio(lost.balanced, dense.balanced),
        status=solution.status.value,
        failed=solution.status.failed,
        details=solution.details,
        steps=solution.steps,
        seconds=solution.seconds,
        trace=solution.trace,
    )
    return Part(record, lost, dense), solution.mask
