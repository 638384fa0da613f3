"""Which parameters of a model can be packed, how they lie in their modules, and under which names files have them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from rarefy.errors import ModelError
from rarefy.models.experts import FusedExperts, matrix_stacks
from rarefy.packing.weight import ENDINGS


@dataclass(frozen=True)
class Place:
    """A parameter as matrices (..., rows, width): the weight of a linear, or a stack of all experts' matrices.

    ``transposed`` is whether the module keeps rows and columns the other way round.
    """

    path: str
    leaf: str
    shape: tuple[int, ...]
    transposed: bool
    experts: FusedExperts | None = None

    @property
    def name(self) -> str:
        """The full name of the parameter."""
        return f"{self.path}.{self.leaf}"

    def turned(self, tensor: Tensor) -> Tensor:
        """The tensor in (..., rows, width) where it stood in the module's orientation, or back."""
        return tensor.transpose(-1, -2) if self.transposed else tensor


def place_of(model: nn.Module, name: str) -> Place:
    """Where the parameter of that full name is. Raises ModelError where it is none that can be packed."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ModelError.sentence(f"{name} is packed, but {type(model).__name__} has no such weight.") from None
    if leaf == "weight" and isinstance(module, nn.Linear | Conv1D):
        transposed = isinstance(module, Conv1D)
        a, b = module.weight.shape
        return Place(path, leaf, (b, a) if transposed else (a, b), transposed)
    if leaf in dict(matrix_stacks(module)):
        experts = FusedExperts(path, module)
        number, a, b = getattr(module, leaf).shape
        return Place(
            path, leaf, (number, b, a) if experts.transposed else (number, a, b), experts.transposed, experts
        )
    raise ModelError.sentence(f"{name} is packed, but it is no weight of a linear or of experts.")


def model_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, list[str]]:
    """The parameters of ``model`` that transformers would make of each tensor of a checkpoint, if any.

    ``model`` must be dense, as its settings make it. The mask of a packed parameter, and its other tensors,
    come to the name of the parameter with the same ending.
    """
    expected = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    made_by = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def renamed(name: str) -> list[str]:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, expected)
        if target not in expected:
            return []
        if pattern is None:
            return [target]
        first, *others = made_by[pattern].target_patterns
        return [target, *(target.replace(first, other) for other in others)]

    names = {}
    for name in stored:
        names[name] = renamed(name)
        for end in ENDINGS[1:]:
            if not names[name] and name.endswith(end):
                names[name] = [target + end for target in renamed(name.removesuffix(end))]
    return names
