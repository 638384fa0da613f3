"""One paper, one file. Names and settings are read without torch; the methods are imported when first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rarefy.methods.settings import Setting, hyperparameters
    from rarefy.methods.table import METHODS, all_settings, build

__all__ = ["METHODS", "Setting", "all_settings", "build", "hyperparameters"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'rarefy.methods' has no attribute {name!r}")
    return getattr(importlib.import_module("rarefy.methods.table"), name)
