"""Everything that Rarefy raises on purpose.

RarefyError
├── InputError (also a ValueError)   a mistake of the caller's, found before any work is done
│   ├── PatternError                 sparsity, N:M, a mask that does not fit the weight
│   ├── MethodError                  unknown method, unknown or impossible hyperparameter
│   ├── ModelError                   missing, damaged or unsupported model
│   ├── CalibrationError             missing, empty or too short text
│   ├── RecipeError                  a recipe file that says something else than a recipe
│   └── OutputError                  an output folder that cannot be used
├── RankError                        another process of the same run has ended
├── NumericalError                   NaN or infinity where there must be none, a layer that cannot be solved
└── VerificationError                what was written is not what was promised
"""

from __future__ import annotations

from typing import Self

#: Characters of what was given that a sentence repeats; a file may give any number.
_LONGEST = 300


class RarefyError(Exception):
    """Base of every error that Rarefy raises on purpose."""


class InputError(RarefyError, ValueError):
    """One sentence: which argument, what was given, what is allowed.

    ``InputError("sparsity", 1.5, "a number in [0, 1)")`` reads
    "sparsity is 1.5, but must be a number in [0, 1)."
    """

    def __init__(self, argument: str, given: object, allowed: str) -> None:
        shown = repr(given)
        shown = shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."
        super().__init__(f"{argument} is {shown}, but must be {allowed}.")

    @classmethod
    def sentence(cls, text: str) -> Self:
        """An error whose message is ``text``, for mistakes that do not fit the usual form."""
        error = cls.__new__(cls)
        Exception.__init__(error, text)
        return error


class PatternError(InputError):
    """A sparsity pattern that does not exist or does not fit the weight."""


class MethodError(InputError):
    """An unknown method, or a hyperparameter that it does not have or that is out of range."""


class ModelError(InputError):
    """A model that is missing, damaged or of a kind that Rarefy cannot prune."""


class CalibrationError(InputError):
    """Calibration or evaluation text that is missing, empty, binary or too short."""


class RecipeError(InputError):
    """A recipe file that cannot be read or has keys that no recipe has."""


class OutputError(InputError):
    """An output folder that is not empty, or that cannot be written."""


class NumericalError(RarefyError):
    """NaN or infinity in a weight or Gram matrix, or a layer without a solution; names the layer."""


class RankError(RarefyError):
    """Another process of the same run has ended, or is cut off, so this one cannot go on."""


class VerificationError(RarefyError):
    """A written file that does not hold what the run promised."""
