"""Runs a model without its weights, on the meta device, to see which of its linears a pass calls.

A linear whose weight is used without the linear itself (a state-space mixer that multiplies it by hand), or that
only another kind of input reaches (cross-attention to an image), has no input that a hook could see. That is
found here, before anything is loaded. Not every model runs without weights; of those that do not, nothing is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from rarefy.errors import ModelError
from rarefy.models.blocks import Block, as_globs
from rarefy.models.quiet import quiet

_TOKENS = 12


def check_calls(skeleton: PreTrainedModel, blocks: Sequence[Block]) -> None:
    """Raise ModelError unless a pass of the model calls every linear among the blocks' sites once.

    ``skeleton`` is the model on the meta device, to which the blocks belong; it is left as it is.
    """
    calls = _calls(skeleton, blocks)
    if calls is None:
        return
    for times in (0, 2):
        names = [name for name, count in calls.items() if min(count, 2) == times]
        if names:
            how = "no pass of the model calls it" if times == 0 else "a pass of the model calls it several times"
            options = " ".join(f"--exclude '{glob}'" for glob in as_globs(names))
            raise ModelError.sentence(
                f"{names[0]} cannot be pruned, because {how}, so it has no input of its own; "
                f"leave it out with {options}."
            )


def _calls(skeleton: PreTrainedModel, blocks: Sequence[Block]) -> Counter[str] | None:
    """How often a pass calls each linear, None where the model cannot do without its weights.

    Linears in experts are left out: which experts are called depends on the weights.
    """
    linears = [site.name for block in blocks for site in block.sites if site.expert is None]
    calls: Counter[str] = Counter(dict.fromkeys(linears, 0))
    try:
        with quiet(), torch.no_grad(), _Assuming():
            model = deepcopy(skeleton)
            model.config._attn_implementation = "eager"  # others look at what the mask holds
            for name in linears:
                model.get_submodule(name).register_forward_pre_hook(_counting(calls, name))
            for name in {site.expert.mixture.name for block in blocks for site in block.sites if site.expert}:
                experts = model.get_submodule(name)
                experts.forward = _as_wide
            ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception:  # noqa: BLE001 (whatever a model does with its weights; the run itself will see)
        return None
    return calls


def _counting(calls: Counter[str], name: str) -> Callable[[nn.Module, Any], None]:
    def count(_: nn.Module, __: Any) -> None:
        calls[name] += 1

    return count


def _as_wide(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands in for fused experts, whose tokens depend on the router's weights."""
    return torch.empty_like(hidden)


class _Assuming(TorchFunctionMode):
    """Answers yes where a model asks what a tensor without values holds: whether no token is masked, mostly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__bool__, Tensor.item) and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))
