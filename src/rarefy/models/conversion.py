"""Which tensors of a checkpoint make which parameters of its model, and how they are turned into each other.

transformers renames and converts tensors on loading: the experts of a block, one matrix each in the file,
are one three-dimensional parameter of the model, for instance. It does so with rules, and with operations
that know their reverse. Here these rules are asked once, on tensors without values, for a plan: a list of
groups of tensors that depend on each other and on nothing else, so that any part of the model can be
loaded, and written back, by itself. What cannot be turned back into exactly the tensors of the file is
refused; then the model must be loaded as a whole.

A quantised checkpoint has more rules, which dequantise. They are not turned back: what is written is the
ordinary weight, under the name that it has in a checkpoint that was never quantised.
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
from transformers.quantizers.base import HfQuantizer

from rarefy.errors import ModelError
from rarefy.models.quantized import dequantizes

Read = Callable[[str], Tensor]

# What some formats keep beside a quantised weight for activations and caches, which dequantising does not ask for.
_COMPANIONS = {"activation_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale"}
_COMPANIONS |= {"q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point", "g_idx", "weight_g_idx"}


@dataclass
class Group:
    """Tensors of the checkpoint, the ``sources``, that together make parameters of the model, the ``targets``.

    Targets are held on the meta device, for their shapes and dtypes; the first of them is ``name``.
    Sources are cast to ``dtype`` before anything else, or their targets after it where they ``dequantize``.
    Without a ``converter`` there is one source and one target, and only the names differ, if anything does.
    ``written`` is what is written back, by name, on the meta device: the sources, but for their dtypes, or the
    ordinary weights in their place. A ``placeless`` one makes a tensor that the model has no place for.
    """

    name: str
    dtype: torch.dtype
    converter: WeightConverter | None = None
    sources: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    targets: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)
    placeless: bool = False

    @property
    def dequantize(self) -> bool:
        """Whether the targets are made by dequantising."""
        return dequantizes(self.converter)

    def load(self, model: PreTrainedModel, read: Read) -> dict[str, Tensor]:
        """The targets, made from what ``read`` gives for the name of each source."""
        if self.converter is None:
            return {self.name: read(self.sources[0]).to(self.dtype)}
        converter = deepcopy(self.converter)  # it collects tensors
        for source, pattern in zip(self.sources, self.patterns):
            tensor: Any = read(source)  # a Future only where transformers itself loads
            converter.add_tensor(self.name, source, pattern, tensor if self.dequantize else tensor.to(self.dtype))
        place = None if self.placeless else model
        made = _single(converter.convert(self.name, model=place, config=model.config))
        return {name: tensor.detach().to(self.dtype) for name, tensor in made.items()} if self.dequantize else made

    def store(self, model: PreTrainedModel, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to write back, made from all targets, in the targets' dtype."""
        if self.converter is None:
            return {self.sources[0]: targets[self.name]}
        if self.placeless:
            return dict(targets)
        return _single(revert_weight_conversion(model, {name: targets[name] for name in self.targets}))


@dataclass
class Plan:
    """How a checkpoint becomes a model: the group of every target, and sources that no parameter is made of.

    Of the latter, ``surplus`` stay as they are, ``placeless`` are quantised, each with the tensors that
    dequantise it, and ``dropped`` say something of quantised weights only.
    """

    groups: dict[str, Group]
    surplus: list[str]
    placeless: list[Group] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def of(self, targets: Iterable[str]) -> list[Group]:
        """The groups that make ``targets``, each once."""
        found = {id(group): group for target in targets if (group := self.groups.get(target)) is not None}
        return list(found.values())


def plan_conversion(
    model: PreTrainedModel, stored: Mapping[str, Tensor], quantizer: HfQuantizer | None = None
) -> Plan:
    """The plan for a ``model`` on the meta device and the tensors of a checkpoint, on the meta device too.

    ``quantizer`` is what makes ordinary weights of quantised ones. Sets what ``model`` remembers of its
    conversion, as ``from_pretrained`` does. Raises ModelError where a tensor does not fit, or where the
    conversion cannot be turned back.
    """
    expected = model.state_dict()
    names = sorted(stored, key=dot_natural_key)
    rules = _rules(model, quantizer)
    groups, surplus = _grouped(model, names, rules, expected)
    if quantizer is not None:
        for group in groups:
            if _is_ordinary(group, stored):
                group.converter, group.patterns = None, []
        rules = _rules(model)
        _grouped(model, names, rules, expected, check=False)  # those of the rules that are used now know it
    model._weight_conversions = [rule for rule in rules if rule.was_used()]  # type: ignore[assignment]
    by_target: dict[str, Group] = {}
    for group in groups:
        _make_targets(group, model, stored)
        for name, tensor in group.targets.items():
            if name not in expected or name in by_target:
                raise ModelError.sentence(f"{name} cannot be loaded by itself: its tensors depend on others.")
            shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            if shape != wanted:
                raise ModelError.sentence(f"{name} is {shape} in the checkpoint, but {wanted} in its model.")
            by_target[name] = group
        shapes = {source: stored[source].shape for source in group.sources}
        if not group.dequantize and {name: tensor.shape for name, tensor in group.written.items()} != shapes:
            raise ModelError.sentence(
                f"{group.name} cannot be written by itself: transformers has no way back to its tensors in the file."
            )
    if quantizer is None:
        return Plan(by_target, surplus)
    return Plan(by_target, *_dequantized_surplus(model, quantizer, surplus, stored))


def targets_of(
    model: PreTrainedModel, names: Iterable[str], quantizer: HfQuantizer | None = None
) -> dict[str, list[str]]:
    """The parameters of ``model`` that each tensor of a checkpoint helps to make, which may be none.

    Needs no way back, unlike a plan.
    """
    names = sorted(names, key=dot_natural_key)
    groups, surplus = _grouped(model, names, _rules(model, quantizer), model.state_dict(), check=False)
    targets: dict[str, list[str]] = {name: [] for name in surplus}
    for group in groups:
        first, *others = group.converter.target_patterns if group.converter else [""]
        made = [group.name, *(group.name.replace(first, other) for other in others)]
        targets |= dict.fromkeys(group.sources, made)
    return targets


def companions(quantizer: HfQuantizer) -> set[str]:
    """The last parts of the names of tensors that say something of a quantised weight, and are none."""
    rules = [rule for rule in quantizer.get_weight_conversions() if dequantizes(rule)]
    weights = {rule.target_patterns[0] for rule in rules}
    return _COMPANIONS.union(*(rule.source_patterns for rule in rules)) - weights


def _rules(model: PreTrainedModel, quantizer: HfQuantizer | None = None) -> list[Any]:
    """The rules of transformers for reading a checkpoint of the model."""
    if quantizer is None:
        return get_model_conversion_mapping(model)
    return get_model_conversion_mapping(model, hf_quantizer=quantizer)


def _is_ordinary(group: Group, stored: Mapping[str, Tensor]) -> bool:
    """Whether a group of a quantised checkpoint is a weight that was not quantised."""
    operations = getattr(group.converter, "operations", ())
    alone = group.dequantize and len(operations) == len(group.sources) == 1
    return alone and stored[group.sources[0]].is_floating_point()


def _make_targets(group: Group, model: PreTrainedModel, stored: Mapping[str, Tensor]) -> None:
    """Find what a group makes and writes, on tensors without values."""
    try:
        group.targets = group.load(model, stored.__getitem__)
        group.written = group.store(model, group.targets)
    except Exception as error:
        raise ModelError.sentence(f"{group.name} cannot be loaded by itself: {error}.") from error


def _dequantized_surplus(
    model: PreTrainedModel, quantizer: HfQuantizer, names: list[str], stored: Mapping[str, Tensor]
) -> tuple[list[str], list[Group], list[str]]:
    """The tensors that no parameter is made of: ordinary ones, quantised ones, and what belongs to quantised ones."""
    rules = [rule for rule in quantizer.get_weight_conversions() if dequantizes(rule)]
    about_weights = companions(quantizer)
    known, groups, ordinary, dropped = {*names}, [], [], []
    for name in names:
        place, _, leaf = name.rpartition(".")
        rule = next((rule for rule in rules if leaf in rule.source_patterns), None)
        parts = [part for part in rule.source_patterns if f"{place}.{part}" in known] if rule is not None else []
        if rule is not None and len(parts) > 1 and leaf == parts[0]:
            target = f"{place}.{rule.target_patterns[0]}"
            sources = [f"{place}.{part}" for part in parts]
            groups.append(Group(target, model.dtype, rule, sources, parts, placeless=True))
        elif leaf in about_weights or len(parts) > 1:
            dropped.append(name)
        else:
            ordinary.append(name)
    for group in groups:
        _make_targets(group, model, stored)
    return ordinary, groups, dropped


def _grouped(
    model: PreTrainedModel, names: list[str], rules: list[Any], expected: dict[str, Tensor], check: bool = True
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
        if check and (group.converter is not converter or (group.sources and converter is None)):
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
