"""What a run of ``rarefy shrink`` will do: all mistakes that need no weights are found here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rarefy.calibration.sources import SELF, parse_source
from rarefy.errors import InputError
from rarefy.models.locate import locate
from rarefy.runs.make_plan import read_tokens
from rarefy.runs.recipe import DEFAULT_CALIBRATION
from rarefy.runs.shrink_recipe import ShrinkRecipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rarefy.models.source import ModelSource
    from rarefy.runs.fingerprint import Fingerprint
    from rarefy.structure.counts import Counts, Space
    from rarefy.structure.parts import Kind
    from rarefy.structure.search import Round
    from rarefy.structure.size import Size


@dataclass(frozen=True)
class ShrinkPlan:
    """A checked recipe with what follows from it. ``windows`` are None where the model writes them itself.

    ``remove_blocks`` is how many, ``keep`` of each kind of parts how many every block keeps, of how many. Where a
    search finds them, both are empty, ``space`` is what it searches, and ``after`` is None.
    """

    recipe: ShrinkRecipe
    source: ModelSource
    device: torch.device
    windows: torch.Tensor | None = field(repr=False)
    remove_blocks: int
    keep: dict[Kind, tuple[int, int]]
    before: Size
    after: Size | None
    space: Space | None = None

    def fingerprint(self) -> Fingerprint:
        """All that the result depends on; text that the model writes itself follows from it."""
        import torch

        from rarefy.runs.fingerprint import Fingerprint, versions

        made_by = {name: versions()[name] for name in ("rarefy", "torch", "transformers")}
        settings = self.recipe.model_dump() | {"device": self.device.type, **made_by}
        windows = torch.empty(0, 0, dtype=torch.int64) if self.windows is None else self.windows
        return Fingerprint.of(settings, self.source.path, windows)

    @property
    def candidates(self) -> list[Counts]:
        """The counts that a search tries; empty where there is none."""
        return self.space.drawn(self.recipe.candidates, self.recipe.seed) if self.space else []

    @property
    def rounds(self) -> list[Round]:
        """The rounds of a search; empty where there is none."""
        from rarefy.structure.search import plan_rounds

        recipe = self.recipe
        assert recipe.num_samples is not None
        return plan_rounds(self.candidates, recipe.num_samples, recipe.batch_size) if self.space else []

    def with_counts(self, counts: Counts) -> ShrinkPlan:
        """The plan of a search that is over: these are removed."""
        assert self.space is not None
        kinds: tuple[Kind, ...] = ("heads", "neurons")
        numbers = self.space.numbers
        keep = {kind: (numbers[kind] - counts.of(kind), numbers[kind]) for kind in kinds if counts.of(kind)}
        return replace(self, remove_blocks=counts.blocks, keep=keep)


def make_shrink_plan(recipe: ShrinkRecipe) -> ShrinkPlan:
    """Find every mistake that can be found before the weights are loaded, the cheapest first.

    Raises InputError, and ModelError where a removal has no stock form.
    """
    locate(recipe.model)
    text = parse_source(recipe.calibration or DEFAULT_CALIBRATION, text_column=recipe.text_column)

    # What follows imports torch, which takes seconds.
    from rarefy.calibration.check import check_blocks
    from rarefy.calibration.windows import DRAW_FROM, draw_windows
    from rarefy.models.blocks import find_blocks
    from rarefy.models.checkpoint import resolve_device
    from rarefy.models.source import resolve_model

    device = resolve_device(recipe.device)
    source = resolve_model(recipe.model)
    recipe = recipe.resolved(source.context)
    model = source.skeleton()
    plan = plan_removal(recipe, source, device, model)
    check_blocks(model, find_blocks(model))
    windows = None
    if text is not SELF:
        assert recipe.num_samples is not None
        assert recipe.sequence_length is not None
        num, length = recipe.num_samples, recipe.sequence_length
        tokens, bos_id = read_tokens(source, text, recipe.bos, enough=DRAW_FROM * num * length)
        windows = draw_windows(tokens, num, length, recipe.seed, bos_id, name=f"the text of {text.name}")
    else:
        recipe = recipe.model_copy(update={"bos": False})  # what the model writes begins with it anyway
    return replace(plan, recipe=recipe, windows=windows)


def plan_removal(
    recipe: ShrinkRecipe, source: ModelSource, device: torch.device, model: PreTrainedModel
) -> ShrinkPlan:
    """The plan of a resolved recipe without its windows; ``model`` is on the meta device.

    Raises InputError for numbers that the model does not allow, ModelError where a removal has no stock form.
    """
    from rarefy.models.blocks import find_blocks
    from rarefy.structure.size import size_of

    space: Space | None = None
    after: Size | None = None
    keep: dict[Kind, tuple[int, int]] = {}
    remove = 0
    if recipe.search:
        from rarefy.structure.counts import find_space

        assert recipe.size is not None
        space = find_space(model, recipe.size, recipe.among, recipe.multiple)
    else:
        remove = _number_of_blocks(recipe.blocks, len(find_blocks(model)))
        smaller, keep = _smaller(model, recipe, remove)
        after = size_of(smaller)
    return ShrinkPlan(recipe, source, device, None, remove, keep, size_of(model), after, space)


def _number_of_blocks(said: float | None, blocks: int) -> int:
    """How many blocks are removed. Raises InputError unless at least one is, and one is left."""
    if said is None:
        return 0
    if blocks < 2:
        raise InputError.sentence("--blocks has nothing to remove: the model has a single block.")
    number = int(said) if said >= 1 else round(said * blocks)
    if not 1 <= number < blocks:
        allowed = f"a number from 1 to {blocks - 1}, or a share that is as many of the model's {blocks} blocks"
        raise InputError("--blocks", int(said) if said >= 1 else said, allowed)
    return number


def _smaller(
    model: PreTrainedModel, recipe: ShrinkRecipe, remove: int
) -> tuple[PreTrainedModel, dict[Kind, tuple[int, int]]]:
    """The smaller model on the meta device, as if the last blocks and parts went; and what is kept of the parts."""
    import torch

    from rarefy.structure.config import number_in
    from rarefy.structure.parts import find_parts
    from rarefy.structure.shrink import Removal, shrunk_skeleton

    keep: dict[Kind, tuple[int, int]] = {}
    removed = []
    kinds: tuple[tuple[Kind, float | None], ...] = (("heads", recipe.heads), ("neurons", recipe.neurons))
    for kind, share in kinds:
        if share is None:
            continue
        parts = find_parts(model, kind)
        kept = number_kept(kind, share, parts.number, recipe.multiple)
        keep[kind] = kept, parts.number
        mask = torch.arange(parts.number) < kept
        removed.append((parts, dict.fromkeys(parts.exits, mask)))
    blocks = range(number_in(model.config, "num_hidden_layers") - remove)
    return shrunk_skeleton(model, Removal(tuple(blocks), tuple(removed))), keep


def number_kept(kind: Kind, share: float, number: int, multiple: int) -> int:
    """How many of ``number`` parts every block keeps where ``share`` of them are removed.

    Neurons are kept in multiples of ``multiple``. Raises InputError where none or all would be kept.
    """
    unit = multiple if kind == "neurons" else 1
    kept = round((1 - share) * number / unit) * unit
    if not 0 < kept < number:
        what = "neurons" if kind == "neurons" else "KV heads"
        units = f" in multiples of {unit}" if unit > 1 else ""
        raise InputError(
            f"--{kind}", share, f"a share that removes some of the {number} {what} of a block{units}, and not all"
        )
    return kept
