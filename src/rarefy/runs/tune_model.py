"""The two models of a tuning: the dense one, recorded once or beside, and the one that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rarefy.errors import ModelError
from rarefy.models.memory import give_back
from rarefy.parallel.world import World
from rarefy.runs.events import Events
from rarefy.runs.tune_journal import TuneJournal
from rarefy.runs.tune_plan import TunePlan
from rarefy.runs.tune_recipe import TuneRecipe

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rarefy.tuning.logits import Logits
    from rarefy.tuning.teacher import Teacher
    from rarefy.tuning.train import Tuner


@dataclass
class Trained:
    """The model that is trained, within its loop.

    ``dtypes`` are those in which its parameters are stored, by name; ``numbers`` how many are trained;
    ``teacher`` is the teacher's kind.
    """

    tuner: Tuner
    tokenizer: PreTrainedTokenizerBase | None
    dtypes: dict[str, torch.dtype]
    numbers: int
    teacher: str = ""


# --- The dense model ----------------------------------------------------------------------------------------


def record_dense(
    plan: TunePlan, journal: TuneJournal, windows: Tensor, events: Events, world: World
) -> dict[str, Any]:
    """Record the dense model once, unless it is to be beside the trained one; returns what the journal says of it.

    Raises ModelError where --teacher states is asked for and the trained model has another head.
    """
    if journal.recorded is not None:
        return journal.recorded
    kind = plan.recipe.teacher
    if kind == "model" or (kind == "auto" and plan.recipe.hidden_weight):
        return {"kind": "model"}
    found: dict[str, Any] = {}
    with world.together():
        if world.leads:
            found = _record(plan, journal, windows, events)
    give_back()
    found = world.from_first(lambda: found)
    journal.note_recorded(found)
    return found


def _record(plan: TunePlan, journal: TuneJournal, windows: Tensor, events: Events) -> dict[str, Any]:
    from rarefy.tuning.logits import Logits
    from rarefy.tuning.teacher import record_states, record_top

    logits = Logits(_load_dense(plan), plan.precision)
    k = plan.recipe.top_k()
    if k is not None:
        files = (journal.folder / "dense-tokens", journal.folder / "dense-log-p")
        with events.watch("recording the dense model") as watch:
            tokens, _ = record_top(logits, windows, k, files, watch)
        return {"kind": f"top-{k}", "shape": list(tokens.shape)}
    if not (logits.alone and _has_head(plan, logits.head)):
        if plan.recipe.teacher == "states":
            raise ModelError.sentence(
                f"--teacher states needs the head of {plan.recipe.against} in {plan.recipe.model}, with nothing "
                "behind it: model or top-K do not."
            )
        return {"kind": "model"}
    with events.watch("recording the dense model") as watch:
        states = record_states(logits, windows, journal.folder / "dense-states", watch)
    return {"kind": "states", "shape": list(states.shape), "dtype": str(states.dtype)}


def _load_dense(plan: TunePlan) -> PreTrainedModel:
    from rarefy.models.checkpoint import load_model

    model, _ = load_model(plan.dense, plan.device)
    return model.float() if plan.precision == torch.float32 else model


def _has_head(plan: TunePlan, head: nn.Module) -> bool:
    """Whether the pruned model's head has the weight of ``head``; of the pruned model, only that is read."""
    from rarefy.models.streaming import StreamedModel

    own = plan.skeleton.get_output_embeddings()
    name = next((name for name, module in plan.skeleton.named_modules() if module is own), None)
    if name is None:
        return False
    try:
        streamed = StreamedModel(plan.source)
    except ModelError:
        return False
    try:
        with streamed.loaded(name) as mine:
            pairs = list(zip(mine.parameters(), head.parameters(), strict=True))
            return all(
                one.shape == two.shape and torch.equal(one.to(two.dtype), two.detach().cpu()) for one, two in pairs
            )
    except ValueError:  # one has a bias, the other has none
        return False
    finally:
        streamed.close()


def _make_teacher(plan: TunePlan, journal: TuneJournal, recorded: Mapping[str, Any], logits: Logits) -> Teacher:
    from rarefy.models.blocks import find_blocks
    from rarefy.tuning.logits import Logits
    from rarefy.tuning.teacher import ModelTeacher, StatesTeacher, TopTeacher

    kind = recorded["kind"]
    if kind == "model":
        dense = _load_dense(plan)
        wanted = find_blocks(dense) if plan.recipe.hidden_weight else []
        return ModelTeacher(Logits(dense, plan.precision), [block.module for block in wanted])
    shape = tuple(recorded["shape"])
    if kind == "states":
        dtype = getattr(torch, str(recorded["dtype"]).removeprefix("torch."))
        return StatesTeacher(_recorded_tensor(journal, "dense-states", shape, dtype), logits, plan.device)
    tokens = _recorded_tensor(journal, "dense-tokens", shape, torch.int32)
    return TopTeacher(tokens, _recorded_tensor(journal, "dense-log-p", shape, torch.float16), plan.device)


def _recorded_tensor(journal: TuneJournal, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What was recorded of the dense model in a file beside the journal. Raises OutputError where it is damaged."""
    from rarefy.tuning.teacher import mapped

    file = journal.folder / name
    try:
        return mapped(file, shape, dtype)
    except (OSError, ValueError) as error:
        raise journal.damaged(file) from error


# --- The model that is trained ------------------------------------------------------------------------------


def load_trained(
    plan: TunePlan, journal: TuneJournal, windows: Tensor, held_out: int, recorded: Mapping[str, Any], world: World
) -> Trained:
    """The model in float32, in the form in which it is trained, from the state that was kept where there is one."""
    from rarefy.models.checkpoint import load_model

    with world.together():
        model, tokenizer = load_model(plan.source, plan.device)
    trained = made_trainable(
        model, tokenizer, plan.recipe, plan.precision, partial(_make_teacher, plan, journal, recorded), windows,
        held_out, world,
    )  # fmt: skip
    trained.teacher = str(recorded["kind"])
    if (state := journal.state()) is not None:
        trained.tuner.restore(state)
    return trained


def made_trainable(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: TuneRecipe,
    precision: torch.dtype,
    make_teacher: Callable[[Logits], Teacher],
    windows: Tensor,
    held_out: int,
    world: World,
) -> Trained:
    """The loop for a model in memory, whose weights become float32, in the form in which it is trained.

    ``make_teacher`` is given the model's logits. All processes call this alike.
    """
    from rarefy.models.blocks import find_blocks
    from rarefy.tuning.logits import Logits
    from rarefy.tuning.parametrise import parametrise
    from rarefy.tuning.shard import shard
    from rarefy.tuning.train import Tuner

    with world.together():
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        logits = Logits(model, precision)
        blocks = find_blocks(model)
        modules = [block.module for block in blocks]
        teacher = make_teacher(logits)
    if is_sharded(recipe, world):
        shard(model, modules)
    form, seed = recipe.parametrisation, recipe.seed or 0
    parameters = parametrise(form, model, blocks, rank=recipe.rank, alpha=recipe.alpha, seed=seed)
    numbers = sum(parameter.numel() for parameter in parameters.values())
    tuner = Tuner(model, logits, parameters, modules, teacher, windows, held_out, recipe.settings(), world)
    return Trained(tuner, tokenizer, dtypes, numbers)


def is_sharded(recipe: TuneRecipe, world: World) -> bool:
    """Whether what is trained is spread over the processes; adapters are small, and whole on each."""
    return world.size > 1 and recipe.parametrisation in ("full", "norms")


def gather(plan: TunePlan, trained: Trained, world: World) -> None:
    """Put a whole model in place of the sharded one, on the first process; all call this."""
    from rarefy.models.checkpoint import load_model
    from rarefy.tuning.logits import Logits
    from rarefy.tuning.shard import whole

    values = {}
    for name, parameter in trained.tuner.parameters.items():
        full = whole(parameter.detach())
        if world.leads:
            values[name] = full.cpu()
    with world.together():
        if world.leads:
            model, _ = load_model(plan.source, plan.device)
            for name, parameter in model.named_parameters():
                parameter.data = values[name].to(parameter.device) if name in values else parameter.data.float()
            trained.tuner.adopt(model, Logits(model, plan.precision))
