"""Cells of a sweep that make the model smaller, not sparse: what their names mean, their recipes and plans.

``shrink:blocks``, ``shrink:heads`` and ``shrink:neurons`` remove one kind alone, as few of it as a size needs;
``shrink:search`` searches how much of each kind. A rule can follow: ``shrink:blocks:kl``, ``shrink:neurons:wanda``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rarefy.errors import InputError
from rarefy.runs.shrink_plan import ShrinkPlan
from rarefy.runs.shrink_recipe import ShrinkRecipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rarefy.models.source import ModelSource

#: How the names of such methods begin, and those of their settings (``--set shrink.multiple=128``).
PREFIX = "shrink"

_KINDS = ("blocks", "heads", "neurons", "search")


def is_shrinking(method: str) -> bool:
    """Whether a method of a sweep makes the model smaller."""
    return method == PREFIX or method.startswith(f"{PREFIX}:")


def shrink_recipe(method: str, said: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> ShrinkRecipe:
    """The recipe of a method, which searches for its size, be it among one kind.

    ``said`` are its other keys, and ``settings`` those that the user gave with the method's name before them. Raises
    InputError where the method is none, or a key is wrong.
    """
    settings = settings or {}
    _, _, rest = method.partition(":")
    kind, _, rule = rest.partition(":")
    if kind not in _KINDS or method.endswith(":"):
        allowed = ", ".join(f"{PREFIX}:{one}" for one in _KINDS)
        raise InputError("--methods", method, f"{allowed}, or with a rule, such as {PREFIX}:blocks:kl")
    keys: dict[str, Any] = {"search": True, **said, **settings}
    if kind != "search":
        keys["among"] = [kind]
    if rule:
        keys["by" if kind in ("blocks", "search") else "choose"] = rule
    try:
        return ShrinkRecipe.read(keys)
    except InputError as error:
        for option in ("--by", "--choose"):
            if str(error).startswith(f"{option} ") and rule:
                words = str(error).partition(", but must be ")[2]
                raise InputError.sentence(f"--methods names {method}, of which the rule must be {words}") from None
        for key in settings:
            if str(error).startswith(f"--{key} "):
                words = str(error).removeprefix(f"--{key} ")
                raise InputError.sentence(f"--set {PREFIX}.{key} {words}") from None
        raise


@dataclass(frozen=True)
class ShrinkCell:
    """One method with one size and one seed; ``plan`` is what it will do."""

    method: str
    recipe: ShrinkRecipe
    size: float
    plan: ShrinkPlan

    @property
    def seed(self) -> int:
        """Draws the windows."""
        return self.recipe.seed

    @property
    def asked(self) -> str:
        """What the column of its tables says."""
        return self.pattern

    @property
    def pattern(self) -> str:
        """The size in words."""
        return f"{100 * self.size:g}% of the parameters"

    @property
    def name(self) -> str:
        """The name of the cell's folder; two cells never share one."""
        return f"{self.method.replace(':', '-')}_{self.size!r}_seed{self.seed}"

    def facts(self) -> dict[str, Any]:
        """What is known of the cell before it runs; its sparsity is the share of the parameters that goes."""
        recipe = self.recipe
        return {
            "method": self.method,
            "paper": "",
            "pattern": self.pattern,
            "pattern_spec": {},
            "pattern_words": self.pattern,
            "asked_sparsity": round(1 - self.size, 12),
            "seed": recipe.seed,
            "calibration": {
                "source": recipe.calibration,
                "num_samples": recipe.num_samples,
                "sequence_length": recipe.sequence_length,
                "bos": recipe.bos,
            },
        }


def shrink_cell(
    method: str, recipe: ShrinkRecipe, source: ModelSource, device: torch.device, skeleton: PreTrainedModel
) -> ShrinkCell:
    """The cell of a resolved recipe of ``shrink_recipe``. Of one kind alone there is one count, and no search.

    Raises InputError where the model cannot be made so small, ModelError where it cannot lose what is named.
    """
    from rarefy.runs.shrink_plan import plan_removal

    size = recipe.size
    assert size is not None
    plan = plan_removal(recipe, source, device, skeleton)
    assert plan.space is not None
    if recipe.among and len(plan.space.candidates) == 1 and len(recipe.among) == 1:
        numbers, (counts,) = plan.space.numbers, plan.space.candidates
        (kind,) = recipe.among
        amount = counts.of(kind) if kind == "blocks" else counts.of(kind) / numbers[kind]
        recipe = recipe.model_copy(update={"search": False, "size": None, "among": (), kind: amount})
        plan = replace(plan.with_counts(counts), recipe=recipe, space=None)
    return ShrinkCell(method, recipe, size, plan)
