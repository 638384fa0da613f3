"""Packed checkpoints for transformers: ``from_pretrained`` reads them, ``save_pretrained`` writes them again.

Before weights are loaded, the headers of the files say which parameters are packed, and their modules are replaced;
transformers then fills the buffers as it fills any. What it would let pass (lengths that do not fit, tensors that are
missing) is refused here, since it would leave weights that are wrong or random. On a CPU weights stay packed; what
was loaded to another device is unpacked there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # this file is imported in the middle of transformers' own imports

METHOD = "rarefy"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What config.json says of a packed checkpoint: its format, and how many columns share a scale (0: no scales)."""

    def __init__(self, format: str = "", group_size: int = 0, **others: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # an enumeration without room for others
        self.format = format
        self.group_size = group_size


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads packed checkpoints."""

    requires_calibration = True  # a dense checkpoint is packed by `rarefy pack`, not while it is loaded

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        from rarefy.packing.loading import make_room

        config = self.quantization_config
        assert isinstance(config, PackedConfig)
        make_room(model, options.get("checkpoint_files") or [], config.format, config.group_size)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        from rarefy.packing.loading import settle

        if settle(model):
            self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from rarefy.packing.loading import unpack_modules

        unpack_modules(model, dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights cannot be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The operator is known to torch.compile."""
        return True
