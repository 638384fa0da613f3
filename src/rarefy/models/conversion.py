"""Which tensors of a checkpoint make which parameters of its model, and how they are turned into each other.

transformers renames and converts tensors on loading: the experts of a block, one matrix each in the file,
are one three-dimensional parameter of the model, for instance. It does so with rules, and with operations
that know their reverse. Here these rules are asked once, on tensors without values, for a plan: a list of
groups of tensors that depend on each other and on nothing else, so that any part of the model can be
loaded, and written back, by itself. What cannot be turned back into exactly the tensors of the file is
refused; then the model must be loaded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from rarefy.errors import ModelError

Read = Callable[[str], Tensor]


@dataclass
class Group:
    """Tensors of the checkpoint, the ``sources``, that together make parameters of the model, the ``targets``.

    Targets are held on the meta device, for their shapes and dtypes; the first of them is ``name``.
    Sources are cast to ``dtype`` before anything else. Without a ``converter`` there is one source and one
    target, and only the names differ, if anything does.
    """

    name: str
    dtype: torch.dtype
    converter: WeightConverter | None = None
    sources: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    targets: dict[str, Tensor] = field(default_factory=dict)

    def load(self, model: PreTrainedModel, read: Read) -> dict[str, Tensor]:
        """The targets, made from what ``read`` gives for the name of each source."""
        if self.converter is None:
            return {self.name: read(self.sources[0]).to(self.dtype)}
        converter = deepcopy(self.converter)  # it collects tensors
        for source, pattern in zip(self.sources, self.patterns):
            tensor: Any = read(source).to(self.dtype)  # a Future only where transformers itself loads
            converter.add_tensor(self.name, source, pattern, tensor)
        return _single(converter.convert(self.name, model=model, config=model.config))

    def store(self, model: PreTrainedModel, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sources, made from all targets, in the targets' dtype."""
        if self.converter is None:
            return {self.sources[0]: targets[self.name]}
        return _single(revert_weight_conversion(model, {name: targets[name] for name in self.targets}))


@dataclass
class Plan:
    """How a checkpoint becomes a model: the group of every target, and sources that no parameter is made of."""

    groups: dict[str, Group]
    surplus: list[str]

    def of(self, targets: Iterable[str]) -> list[Group]:
        """The groups that make ``targets``, each once."""
        found = {id(group): group for target in targets if (group := self.groups.get(target)) is not None}
        return list(found.values())


def plan_conversion(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> Plan:
    """The plan for a ``model`` on the meta device and the tensors of a checkpoint, on the meta device too.

    Sets what ``model`` remembers of its conversion, as ``from_pretrained`` does. Raises ModelError where
    a tensor does not fit, or where the conversion cannot be turned back.
    """
    rules = get_model_conversion_mapping(model)
    expected = model.state_dict()
    groups, surplus = _grouped(model, sorted(stored, key=dot_natural_key), rules, expected)
    model._weight_conversions = [rule for rule in rules if rule.was_used()]  # type: ignore[assignment]
    by_target: dict[str, Group] = {}
    for group in groups:
        try:
            group.targets = group.load(model, stored.__getitem__)
            sources = group.store(model, group.targets)
        except Exception as error:
            raise ModelError.sentence(f"{group.name} cannot be loaded by itself: {error}.") from error
        for name, tensor in group.targets.items():
            if name not in expected or name in by_target:
                raise ModelError.sentence(f"{name} cannot be loaded by itself: its tensors depend on others.")
            shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            if shape != wanted:
                raise ModelError.sentence(f"{name} is {shape} in the checkpoint, but {wanted} in its model.")
            by_target[name] = group
        shapes = {source: stored[source].shape for source in group.sources}
        if {source: tensor.shape for source, tensor in sources.items()} != shapes:
            raise ModelError.sentence(
                f"{group.name} cannot be written by itself: transformers has no way back to its tensors in the file."
            )
    return Plan(by_target, surplus)


def _grouped(
    model: PreTrainedModel, names: list[str], rules: list[Any], expected: dict[str, Tensor]
) -> tuple[list[Group], list[str]]:
    """The tensors of a checkpoint by what they are for, as transformers decides it, and those for nothing."""
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    dtype_of = _dtypes(model, expected)
    groups: dict[str, Group] = {}
    surplus = []
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target not in expected:
            surplus.append(name)
            continue
        converter = None if pattern is None else converter_of[pattern]
        group = groups.setdefault(target, Group(target, dtype_of(target), converter))
        if group.converter is not converter or (group.sources and converter is None):
            raise ModelError.sentence(f"{group.sources[0]} and {name} are both for {target}, and only one can be.")
        group.sources.append(name)
        if pattern is not None:
            group.patterns.append(pattern)
    return list(groups.values()), surplus


def _dtypes(model: PreTrainedModel, expected: Mapping[str, Tensor]) -> Callable[[str], torch.dtype]:
    """The dtype in which transformers loads a parameter: some stay in float32 whatever the model is in."""
    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return lambda name: expected[name].dtype
    policy, pattern_of, _ = build_glob_alternation(list(plan))

    def dtype_of(name: str) -> torch.dtype:
        found = policy.search(name)
        return expected[name].dtype if found is None else plan[pattern_of[str(found.lastgroup)]]

    return dtype_of


def _single(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Some operations give a list of one tensor."""
    return {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}
