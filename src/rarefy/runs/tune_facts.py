"""What run.json says of a tuning: its settings, its curve, and held-out windows before, at best and as written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rarefy.runs.tune_model import Trained
    from rarefy.runs.tune_recipe import TuneRecipe
    from rarefy.tuning.train import Measurement, StepRecord

#: Points of the curve that run.json keeps.
_POINTS = 100


def tuning_facts(
    recipe: TuneRecipe, trained: Trained, precision: torch.dtype, held_out: int, written: Measurement | None
) -> dict[str, Any]:
    """The entry ``tuning`` of run.json; ``written`` are the held-out windows as measured with what is stored."""
    tuner = trained.tuner
    best = tuner.best
    return {
        "of": recipe.model,
        "against": recipe.against,
        "parametrisation": recipe.parametrisation,
        "trained": trained.numbers,
        "teacher": trained.teacher,
        "precision": str(precision).removeprefix("torch."),
        "settings": asdict(recipe.settings()),
        "held_out": held_out,
        "steps": len(tuner.records),
        "curve": curve(tuner.records),
        "measurements": [asdict(one) for one in tuner.measurements],
        "best_step": best.step if best else None,
        "written": asdict(written) if written else None,
    }


def curve(records: Sequence[StepRecord]) -> list[dict[str, float]]:
    """The records of all steps as a curve for run.json: at most 100 points with four digits.

    Where there are more steps, a point is the mean over several neighbours.
    """
    size = max(1, -(-len(records) // _POINTS))
    groups = [records[first : first + size] for first in range(0, len(records), size)]
    return [
        {name: float(f"{fmean(getattr(one, name) for one in group):.4g}") for name in asdict(group[0])}
        for group in groups
    ]
