"""Rarefy makes large language models sparse in one shot: layer by layer, solved as the problem it is."""

import importlib
from typing import TYPE_CHECKING

from rarefy.packing.registration import register

if TYPE_CHECKING:
    from rarefy.errors import (
        CalibrationError,
        InputError,
        MethodError,
        ModelError,
        NumericalError,
        OutputError,
        PatternError,
        RankError,
        RarefyError,
        RecipeError,
        VerificationError,
    )
    from rarefy.layer.columns import Columns
    from rarefy.layer.gram import Gram
    from rarefy.layer.pattern import NM, Fixed, PerRow, Unstructured
    from rarefy.layer.problem import LayerProblem
    from rarefy.layer.solution import Solution, Status
    from rarefy.methods.admm import ADMM
    from rarefy.methods.alps import ALPS, ALPSPaper
    from rarefy.methods.base import IterativeMethod, Method
    from rarefy.methods.compose import BestOf, Then
    from rarefy.methods.dass import DaSS
    from rarefy.methods.dsnot import DSnoT
    from rarefy.methods.magnitude import Magnitude
    from rarefy.methods.mrp import MRP
    from rarefy.methods.quantize import Quantize
    from rarefy.methods.refit import PCG, Backsolve
    from rarefy.methods.ria import RIA
    from rarefy.methods.sparsefw import SparseFW
    from rarefy.methods.sparsegpt import SparseGPT
    from rarefy.methods.swaps import Swaps
    from rarefy.methods.wanda import Wanda
    from rarefy.pruning.barber import Barber
    from rarefy.pruning.loop import prune
    from rarefy.pruning.matching import Matching
    from rarefy.pruning.records import Report
    from rarefy.pruning.solve import solve
    from rarefy.runs.recipe import Recipe
    from rarefy.runs.run import RunResult, forecast, run
    from rarefy.runs.shrink import ShrinkResult, shrink
    from rarefy.runs.shrink_recipe import ShrinkRecipe
    from rarefy.runs.tune import TuneResult, tune
    from rarefy.runs.tune_recipe import TuneRecipe
    from rarefy.runs.verify import inspect_folder
    from rarefy.tuning.adapters import merge
    from rarefy.tuning.masks import keep_zeros

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "ALPS",
    "MRP",
    "NM",
    "PCG",
    "RIA",
    "ALPSPaper",
    "Backsolve",
    "Barber",
    "BestOf",
    "CalibrationError",
    "Columns",
    "DSnoT",
    "DaSS",
    "Fixed",
    "Gram",
    "InputError",
    "IterativeMethod",
    "LayerProblem",
    "Magnitude",
    "Matching",
    "Method",
    "MethodError",
    "ModelError",
    "NumericalError",
    "OutputError",
    "PatternError",
    "PerRow",
    "Quantize",
    "RankError",
    "RarefyError",
    "Recipe",
    "RecipeError",
    "Report",
    "RunResult",
    "ShrinkRecipe",
    "ShrinkResult",
    "Solution",
    "SparseFW",
    "SparseGPT",
    "Status",
    "Swaps",
    "Then",
    "TuneRecipe",
    "TuneResult",
    "Unstructured",
    "VerificationError",
    "Wanda",
    "forecast",
    "inspect_folder",
    "keep_zeros",
    "merge",
    "prune",
    "run",
    "shrink",
    "solve",
    "tune",
]

# Names are imported when first used, so that the command line answers before torch is loaded.
_HOME = {
    "rarefy.errors": (
        "CalibrationError",
        "InputError",
        "MethodError",
        "ModelError",
        "NumericalError",
        "OutputError",
        "PatternError",
        "RankError",
        "RarefyError",
        "RecipeError",
        "VerificationError",
    ),
    "rarefy.layer.columns": ("Columns",),
    "rarefy.layer.gram": ("Gram",),
    "rarefy.layer.pattern": ("NM", "Fixed", "PerRow", "Unstructured"),
    "rarefy.layer.problem": ("LayerProblem",),
    "rarefy.layer.solution": ("Solution", "Status"),
    "rarefy.methods.admm": ("ADMM",),
    "rarefy.methods.alps": ("ALPS", "ALPSPaper"),
    "rarefy.methods.base": ("IterativeMethod", "Method"),
    "rarefy.methods.compose": ("BestOf", "Then"),
    "rarefy.methods.dass": ("DaSS",),
    "rarefy.methods.dsnot": ("DSnoT",),
    "rarefy.methods.magnitude": ("Magnitude",),
    "rarefy.methods.mrp": ("MRP",),
    "rarefy.methods.quantize": ("Quantize",),
    "rarefy.methods.refit": ("PCG", "Backsolve"),
    "rarefy.methods.ria": ("RIA",),
    "rarefy.methods.sparsefw": ("SparseFW",),
    "rarefy.methods.sparsegpt": ("SparseGPT",),
    "rarefy.methods.swaps": ("Swaps",),
    "rarefy.methods.wanda": ("Wanda",),
    "rarefy.pruning.barber": ("Barber",),
    "rarefy.pruning.loop": ("prune",),
    "rarefy.pruning.matching": ("Matching",),
    "rarefy.pruning.records": ("Report",),
    "rarefy.pruning.solve": ("solve",),
    "rarefy.runs.recipe": ("Recipe",),
    "rarefy.runs.run": ("RunResult", "forecast", "run"),
    "rarefy.runs.shrink": ("ShrinkResult", "shrink"),
    "rarefy.runs.shrink_recipe": ("ShrinkRecipe",),
    "rarefy.runs.tune": ("TuneResult", "tune"),
    "rarefy.runs.tune_recipe": ("TuneRecipe",),
    "rarefy.runs.verify": ("inspect_folder",),
    "rarefy.tuning.adapters": ("merge",),
    "rarefy.tuning.masks": ("keep_zeros",),
}


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'rarefy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# The one thing that importing does: from then on transformers' from_pretrained reads packed checkpoints.
register()
