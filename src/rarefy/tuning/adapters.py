"""PEFT's adapters on a pruned model: LoRA whose product is masked, and merging that fills no zero.

A merged LoRA weight is W + s B A, and B A is dense. With the mask on the product, W + M (s B A), what is trained
is what is merged, and the zeros stay. Any adapter, also one trained without masks, can be merged so; what it did
through the zeros is lost then.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from rarefy.errors import InputError, ModelError
from rarefy.models.sites import LinearSite

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraVariant
    from transformers import PreTrainedModel


def add_lora(
    model: PreTrainedModel, sites: Sequence[LinearSite], rank: int, alpha: float, seed: int
) -> dict[str, nn.Parameter]:
    """Put PEFT's LoRA with masked products on the linears of ``sites``, in place; what is to be trained, by name."""
    peft = _peft()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=[site.name for site in sites])
    if any(not isinstance(site.module, nn.Linear) for site in sites):
        config.fan_in_fan_out = True  # a Conv1D keeps (in, out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)
    mask_adapters(model)
    return {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}


def mask_adapters(model: nn.Module) -> list[str]:
    """Mask the product of every LoRA layer whose weight holds zeros; the names of these layers.

    Raises InputError for LoRA variants that change more than a sum (DoRA, for instance).
    """
    if "peft" not in sys.modules:
        return []
    from peft.tuners.lora import Linear

    masked = []
    for name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        base: Any = module.get_base_layer()
        mask = base.weight.detach() != 0
        if not 0 < int(mask.sum()) < mask.numel():
            continue
        for adapter in module.lora_A:
            variant = module.lora_variant.get(adapter)
            if variant is not None and not isinstance(variant, MaskedLora):
                raise InputError.sentence(
                    f"{name} has an adapter of the kind {type(variant).__name__}, whose product cannot be masked: "
                    "use plain LoRA."
                )
            module.lora_variant[adapter] = cast("LoraVariant", MaskedLora(mask))
        masked.append(name)
    return masked


class MaskedLora:
    """PEFT's form of a LoRA variant: x -> x (W + M (s B A))^T in training and when it is merged.

    ``mask`` is laid out like the weight. PEFT calls these functions of what ``lora_variant`` holds for an adapter.
    """

    def __init__(self, mask: Bool[Tensor, "..."]) -> None:
        self._mask = mask

    def product(self, module: Any, adapter: str, dtype: torch.dtype) -> Tensor:
        """M (s B A), laid out like the weight."""
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        product = module.scaling[adapter] * (B @ A)
        product = product.T if module.fan_in_fan_out else product
        if self._mask.device != product.device:
            self._mask = self._mask.to(product.device)
        masked: Tensor = (product * self._mask).to(dtype)
        return masked

    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The layer's output with the adapter; ``result`` is without it."""
        x = module.lora_dropout[active_adapter](x)
        product = self.product(module, active_adapter, x.dtype)
        return result + nn.functional.linear(x, product.T if module.fan_in_fan_out else product)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight."""
        merged = orig_weight.float() + self.product(module, active_adapter, torch.float32)
        return merged.to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge in place."""
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight before it was merged, up to rounding."""
        return (orig_weight.float() - self.product(module, active_adapter, torch.float32)).to(orig_weight.dtype)

    def supports_lora_conversion(self) -> bool:
        """A masked product has no low rank."""
        return False


def merge_in_place(model: nn.Module) -> None:
    """Merge every LoRA layer within ``model`` and put the plain layers back; zeros stay zero."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            assert isinstance(module, nn.Module)
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def merge(adapter: Any, model: PreTrainedModel | None = None) -> PreTrainedModel:
    """Merge an adapter of PEFT into the pruned model it belongs to, and fill no zero.

    ``adapter`` is the folder in which PEFT saved it, with ``model`` the pruned model it was trained on, in memory;
    or a ``PeftModel``. Returns the model, an ordinary one: each weight is W + M (delta), where M is False at the
    zeros of W. Adapters that were trained under ``keep_zeros`` lose nothing by it, others what they did through
    zeros. Only adapters whose changes are to weights can be merged, which is nearly all of them.

    Raises InputError where there is no adapter, ModelError where it is damaged, does not fit the model, or cannot be
    merged.
    """
    peft = _peft()
    if isinstance(adapter, (str, Path)):
        if model is None:
            raise InputError.sentence("model is missing: name the pruned model that the adapter was trained on.")
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise InputError("adapter", str(adapter), "a folder with adapter_config.json, as PEFT saves it")
        adapter = _load_adapter(model, str(adapter))
    elif not isinstance(adapter, peft.PeftModel):
        raise InputError("adapter", type(adapter).__name__, "a PeftModel, or the folder of an adapter")
    if not hasattr(adapter, "merge_and_unload"):
        kind = type(adapter.active_peft_config).__name__.removesuffix("Config")
        raise ModelError.sentence(f"An adapter of the kind {kind} changes no weights, so it cannot be merged.")
    mask_adapters(adapter)  # plain LoRA is merged in float32, and rounded once
    zeros = {
        name: (base.weight, base.weight.detach() == 0)
        for name, base in ((name, _base(module)) for name, module in adapter.named_modules())
        if base is not None
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = adapter.merge_and_unload()
    with torch.no_grad():
        for weight, zero in zeros.values():
            weight[zero] = 0.0
    return merged  # type: ignore[no-any-return]


def _load_adapter(model: PreTrainedModel, folder: str) -> Any:
    """The model with the adapter that PEFT saved in ``folder``. Raises ModelError where PEFT cannot load it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _peft().PeftModel.from_pretrained(model, folder)
    except Exception as error:  # what damage makes of PEFT's files is not foreseen
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError.sentence(
            f"The adapter {folder} is damaged, or does not fit the model: {reason[:300].rstrip('.')}."
        ) from error


def _base(module: nn.Module) -> Any:
    """The layer under an adapter; None where its weight does not hold zeros beside other values."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        return None
    base = module.get_base_layer()
    weight = getattr(base, "weight", None)
    if not isinstance(weight, nn.Parameter) or isinstance(base, nn.Embedding):
        return None
    return base if 0 < int((weight == 0).sum()) < weight.numel() else None


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError.sentence("Adapters need PEFT, which is not installed: pip install 'rarefy[tune]'.") from None
    return peft
