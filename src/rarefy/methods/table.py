"""The table of methods: command-line names, and how a name and its settings become a method."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rarefy.methods.admm import ADMM
from rarefy.methods.alps import ALPS, ALPSPaper
from rarefy.methods.base import Method
from rarefy.methods.compose import Then
from rarefy.methods.dass import DaSS
from rarefy.methods.dsnot import DSnoT
from rarefy.methods.magnitude import Magnitude
from rarefy.methods.mrp import MRP
from rarefy.methods.quantize import Quantize
from rarefy.methods.refit import PCG, Backsolve
from rarefy.methods.ria import RIA
from rarefy.methods.settings import Setting, assemble, hyperparameters, part_names, unknown_method
from rarefy.methods.sparsefw import SparseFW
from rarefy.methods.sparsegpt import SparseGPT
from rarefy.methods.swaps import Swaps
from rarefy.methods.wanda import Wanda

#: Every name of ``--method`` with the method it stands for; adding a method is one line here, and `make methods`.
METHODS: dict[str, Method] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "ria": RIA(),
    "sparsegpt": SparseGPT(),
    "mrp": MRP(),
    "admm": ADMM(),
    "admm-reselect": ADMM(schedule="reselect"),
    "admm1": ADMM(schedule="fixed"),
    "alps": ALPS(),
    "alps-paper": ALPSPaper(),
    "sparsefw": SparseFW(),
    "swaps": Swaps(),
    "dsnot": DSnoT(),
    "dass": DaSS(),
    "pcg": PCG(),
    "backsolve": Backsolve(),
    "quantize": Quantize(),
}


def build(name: str, settings: Mapping[str, Setting] | None = None) -> Method:
    """The method called ``name`` with its hyperparameters changed by ``settings``.

    ``name`` is one of METHODS, several joined by ``+``, or ``package.module:Class`` for a method of
    the user's own. A setting's key is a hyperparameter, or ``part.hyperparameter`` where methods are
    combined; text values are read as the type of the default. Raises MethodError.
    """
    parts = assemble(name, settings, _lookup)
    return parts[0] if len(parts) == 1 else Then(*parts)


def all_settings(name: str, method: Method) -> dict[str, Setting]:
    """Every hyperparameter of ``build(name)`` by the key that its settings know it by, with its value."""
    parts = method.parts if isinstance(method, Then) else (method,)
    return {
        key if len(parts) == 1 else f"{part_name}.{key}": value
        for part_name, part in zip(part_names(name), parts, strict=True)  # no mutant: both have the same length
        for key, value in hyperparameters(part).items()
        if isinstance(value, (str, int, float, bool))
    }


def _lookup(name: str) -> Method:
    if name not in METHODS:
        raise unknown_method(name, METHODS)
    return METHODS[name]


def described() -> dict[str, dict[str, Any]]:
    """What ``described.json`` holds: of each method what ``settings.check`` looks at, which does not import it."""
    return {
        name: {
            **{key: getattr(method, key) for key in ("name", "needs_start", "takes_start", "comes_last")},
            "hyperparameters": {
                item.name: {
                    "default": getattr(method, item.name),
                    **{
                        key: item.metadata[key]
                        for key in ("low", "high", "choices")
                        if item.metadata[key] not in _UNSET
                    },
                }
                for item in fields(method)
                if "help" in item.metadata
            },
        }
        for name, method in METHODS.items()
    }


_UNSET = (None, ())


if __name__ == "__main__":
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in described().items()]
    print("{\n" + ",\n".join(lines) + "\n}")
