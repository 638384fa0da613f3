"""The names of the rules, which the command line checks before torch is loaded."""

from __future__ import annotations

UNIFORM, PROFILE, FISHER, OWL, ALPHAPRUNING, LSA = "uniform", "profile", "fisher", "owl", "alphapruning", "lsa"
SEARCH = "search"
#: Those that look at the dense model first, which takes time before the first block is pruned.
MEASURED = (FISHER, OWL, ALPHAPRUNING, LSA, SEARCH)
NAMES = (UNIFORM, PROFILE, *MEASURED)
FILES = (".json", ".csv")
ALLOWED = f"{', '.join(NAMES)}, or a .json or .csv file of globs and sparsities"


def is_allocation(text: str) -> bool:
    """Whether ``text`` names a rule, or could be the path of a file."""
    return text in NAMES or text.endswith(FILES)
