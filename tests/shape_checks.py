"""Checks the types and tensors' shapes in the annotations of the mathematics, where a test asks for it.

conftest.py imports this before anything that it checks. The fixture ``checked_shapes`` turns the checks on for a
test that passes nothing wrong on purpose; with CHECK_SHAPES set they are on in all tests. Not for pattern.py,
which checks by itself what it is given.
"""

from __future__ import annotations

import os

from beartype import BeartypeConf, beartype
from jaxtyping import config, install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a number

_LAYER = [f"rarefy.layer.{name}" for name in ("cast", "gram", "passes", "problem", "select", "solution", "spectrum")]
install_import_hook([*_LAYER, "rarefy.methods"], "shape_checks.check")


def turn(on: bool) -> None:
    """Whether calls are checked from here on."""
    config.update("jaxtyping_disable", not on)


turn(on=bool(os.environ.get("CHECK_SHAPES")))
