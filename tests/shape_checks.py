"""Checks the types and tensors' shapes in the annotations of the mathematics in every call, once it is imported.

conftest.py imports it where CHECK_SHAPES is set: for tests that pass no wrong types on purpose. Not for
pattern.py, which checks by itself what it is given.
"""

from __future__ import annotations

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a number

_LAYER = [f"rarefy.layer.{name}" for name in ("gram", "problem", "select", "solution", "spectrum")]
install_import_hook([*_LAYER, "rarefy.methods"], "shape_checks.check")
