"""The smaller model of a plan: counts are searched for, blocks chosen, heads and neurons removed and repaired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rarefy.errors import ModelError
from rarefy.layer.passes import finite
from rarefy.runs.events import Watch
from rarefy.runs.shrink_plan import ShrinkPlan
from rarefy.structure.config import number_in
from rarefy.structure.dense_path import DensePath
from rarefy.structure.depth import BlockSets
from rarefy.structure.exits import ExitRecord
from rarefy.structure.memo import Memo
from rarefy.structure.parts import Parts, find_parts
from rarefy.structure.rules import Chosen, choose_blocks
from rarefy.structure.search import block_sets, search_counts
from rarefy.structure.shrink import Removal, with_order
from rarefy.structure.shrink import shrink as shrunk
from rarefy.structure.size import size_of
from rarefy.structure.width import Finished, remove_parts, towards_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens on which the order of fused rows is found.
_PROBE = 32


@dataclass(frozen=True)
class Smaller:
    """A smaller model, in words what was ``removed``, and what ``run.json`` says of it under ``shrink``."""

    model: PreTrainedModel
    removed: str
    facts: Mapping[str, Any]


def make_smaller(
    model: PreTrainedModel,
    windows: Tensor,
    plan: ShrinkPlan,
    watch: Watch,
    *,
    memo: Memo | None = None,
    finished: Finished | None = None,
    lap: Callable[[str], None] = lambda stage: None,
) -> Smaller:
    """Carry out a plan on calibration windows; what is left is repaired in ``model`` itself.

    What is in ``memo`` is not measured again, ``finished`` blocks are not repaired again. ``lap`` is called after
    every stage. Raises ModelError where a removal has no stock form.
    """
    return _Making(plan, windows, watch, Memo() if memo is None else memo, finished, lap).carry_out(model)


def check_weights(model: PreTrainedModel, called: str) -> None:
    """Raise ModelError where a weight is NaN or infinite; the model is ``called`` so."""
    for name, weight in model.named_parameters():
        if not finite(weight):
            raise ModelError.sentence(f"{name} of {called} has NaN or infinity.")


@dataclass
class _Making:
    """The stages; ``plan`` has the counts that a search found once that is over."""

    plan: ShrinkPlan
    windows: Tensor
    watch: Watch
    memo: Memo
    finished: Finished | None
    lap: Callable[[str], None]

    def carry_out(self, model: PreTrainedModel) -> Smaller:
        recipe = self.plan.recipe
        facts: dict[str, Any] = {"before": self.plan.before.to_dict(), "repair": recipe.repair}
        facts |= {"choose": recipe.choose, "search": None, "blocks": None, "parts": [], "dense_path": []}
        searched: tuple[int, ...] | None = None
        if self.plan.space:
            searched, facts["search"] = self._search(model)
            self.lap("search")
        dense, blocks = model, tuple(range(number_in(model.config, "num_hidden_layers")))
        if self.plan.remove_blocks:
            model, blocks, facts["blocks"] = self._without_blocks(dense, searched)
            self.lap("blocks")
        wanted, path, reason = self._wanted(model), None, ""
        if recipe.repair:
            wanted, path, reason = self._with_path(model, wanted, dense, blocks)
        if wanted:
            model, records = self._without_parts(model, wanted, path)
            facts["parts"] = [asdict(one) for one in records if one.kept < one.number]
            facts["dense_path"] = [asdict(one) for one in records if one.drift is not None]
            self.lap("parts")
        facts["no_dense_path"] = reason
        facts["after"] = size_of(model).to_dict()
        return Smaller(model, removed_words(self.plan), facts)

    def _search(self, model: PreTrainedModel) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Find the counts; the blocks to remove, and what ``run.json`` says of it."""
        recipe, candidates = self.plan.recipe, self.plan.candidates
        sets = BlockSets(model, self.windows, recipe.batch_size, self.memo, recipe.copies)
        with self.watch("choosing blocks") as watch:
            remove = block_sets(
                sets,
                [counts.blocks for counts in candidates],
                recipe.by,
                seed=recipe.seed,
                generations=recipe.generations,
                offspring=recipe.offspring,
                steps=recipe.steps,
                watch=watch,
            )
        with self.watch("searching for the counts") as watch:
            found = search_counts(
                sets,
                candidates,
                remove,
                choice=recipe.choose,
                repair=recipe.repair,
                damping=recipe.damping,
                watch=watch,
            )
        facts = {
            "size": recipe.size,
            "best": found.best.to_dict(),
            "candidates": [one.to_dict() for one in found.all],
            "rounds": [asdict(one) for one in self.plan.rounds],
            "block_tokens": found.block_tokens,
        }
        self.plan = self.plan.with_counts(found.best.counts)
        return found.best.remove, facts

    def _without_blocks(
        self, model: PreTrainedModel, searched: tuple[int, ...] | None
    ) -> tuple[PreTrainedModel, tuple[int, ...], dict[str, Any]]:
        """The model without the blocks that the rule chooses, or a search; those kept; what ``run.json`` says."""
        recipe = self.plan.recipe
        sets = BlockSets(model, self.windows, recipe.batch_size, self.memo, recipe.copies)
        if searched is not None:
            left = [index for index in range(sets.number) if index not in searched]
            chosen = Chosen(searched, sets.measure(left), block_tokens=sets.block_tokens)
        else:
            with self.watch("choosing blocks") as watch:
                chosen = choose_blocks(
                    sets,
                    self.plan.remove_blocks,
                    recipe.by,
                    seed=recipe.seed,
                    generations=recipe.generations,
                    offspring=recipe.offspring,
                    steps=recipe.steps,
                    watch=watch,
                )
        kept = tuple(index for index in range(sets.number) if index not in chosen.remove)
        smaller = shrunk(model, Removal(kept))
        sets.confirm(smaller, kept)
        return (
            smaller,
            kept,
            {
                "by": recipe.by,
                "copies": recipe.copies,
                "number": sets.number,
                "removed": list(chosen.remove),
                **asdict(chosen.distance),
                "scores": {str(index): score for index, score in chosen.scores.items()},
                "trace": chosen.trace,
                "block_tokens": chosen.block_tokens,
            },
        )

    def _wanted(self, model: PreTrainedModel) -> list[tuple[Parts, int]]:
        """The kinds of parts of which some are removed, and how many every block keeps."""
        probe = self.windows[:1, :_PROBE]
        return [
            (with_order(model, find_parts(model, kind), probe), kept) for kind, (kept, _) in self.plan.keep.items()
        ]

    def _with_path(
        self, model: PreTrainedModel, wanted: list[tuple[Parts, int]], dense: PreTrainedModel, blocks: Sequence[int]
    ) -> tuple[list[tuple[Parts, int]], DensePath | None, str]:
        """What is wanted, with exits that can aim at the dense path; that path, or why there is none."""
        try:
            return *towards_dense(dense, blocks, model, wanted, self.windows, self.plan.recipe.batch_size), ""
        except ModelError as error:
            return wanted, None, str(error)

    def _without_parts(
        self, model: PreTrainedModel, wanted: Sequence[tuple[Parts, int]], path: DensePath | None
    ) -> tuple[PreTrainedModel, list[ExitRecord]]:
        """The model without the neurons and heads that are chosen, and a record of every exit that changed."""
        recipe = self.plan.recipe
        kinds = " and ".join(parts.kind for parts, _ in wanted if parts.kind in self.plan.keep)
        with self.watch(f"removing {kinds}" if kinds else "repairing what is left") as watch:
            parts, records = remove_parts(
                model,
                self.windows,
                wanted,
                batch_size=recipe.batch_size,
                repair=recipe.repair,
                choice=recipe.choose,
                damping=recipe.damping,
                dense=path,
                finished=self.finished,
                watch=watch,
            )
        if not self.plan.keep:
            return model, records
        blocks = tuple(range(number_in(model.config, "num_hidden_layers")))
        return shrunk(model, Removal(blocks, tuple(parts))), records


def removed_words(plan: ShrinkPlan) -> str:
    """What is removed, for people."""
    words = []
    if plan.remove_blocks:
        words.append(f"{plan.remove_blocks} of {plan.before.blocks} blocks")
    for kind, (kept, number) in plan.keep.items():
        words.append(
            f"{number - kept:,} of {number:,} {'KV heads' if kind == 'heads' else 'MLP neurons'} of each block"
        )
    return ", ".join(words)
