"""Quantised checkpoints: which of them transformers dequantises while it reads them.

Rarefy prunes dense floating-point weights. Some quantised formats (FP8, MXFP4, compressed-tensors) can be
dequantised on any machine, and then a checkpoint is pruned like the one that it was made from, and written in
the dtype that its config names. Of the others, one sentence says what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import transformers
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

from rarefy.errors import ModelError
from rarefy.models.quiet import quiet

_KEYS = ("quantization_config", "compression_config")
# Formats that transformers can dequantise with the help of a package that it does not need otherwise.
_PACKAGES = {"compressed-tensors": "compressed-tensors"}


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a model's config.json says of how its weights are quantised; None where they are ordinary ones."""
    text = config.get("text_config")
    for section in (config, *([text] if isinstance(text, dict) else [])):
        for key in _KEYS:
            found = section.get(key)
            if isinstance(found, dict) and found and not _is_dense(found):
                return found
    return None


def make_dequantizer(name: str, quantization: Mapping[str, Any]) -> HfQuantizer:
    """What transformers reads the format with, set to dequantise; reads no weights.

    Raises ModelError, which says what to do instead, for a format that cannot be turned into ordinary weights.
    """
    method = quantization.get("quant_method")
    what = f"{name} is quantised ({method})" if isinstance(method, str) else f"{name} is quantised"
    try:
        with quiet():
            quantizer = AutoHfQuantizer.from_config(dequantizing_config(quantization), pre_quantized=True)
            quantizer.validate_environment()
            if "dequantize" in quantizer.get_load_operations():
                return quantizer
    except ImportError as error:
        if method in _PACKAGES:
            raise ModelError.sentence(
                f"{what}, which needs a package to be turned into ordinary weights: pip install {_PACKAGES[method]}"
            ) from error
    except Exception:  # noqa: BLE001 (a method that this transformers does not know, or settings that it refuses)
        pass
    raise ModelError.sentence(
        f"{what}, and transformers {transformers.__version__} has no way to turn that into ordinary weights: "
        "give the model that it was made from, or dequantise it and save it first."
    )


def dequantizing_config(quantization: Mapping[str, Any]) -> Any:
    """The object that transformers has for these settings, set to dequantise weights while they are read."""
    return AutoQuantizationConfig.from_dict({**deepcopy(dict(quantization)), "dequantize": True})


def dequantizes(converter: Any) -> bool:
    """Whether a rule of transformers for reading tensors has a step of a quantised format."""
    return any(getattr(operation, "hf_quantizer", None) for operation in getattr(converter, "operations", ()))


def _is_dense(quantization: Mapping[str, Any]) -> bool:
    """Whether the settings speak of weights that are stored as ordinary ones, as those of a pruned model may."""
    groups = quantization.get("config_groups", quantization.get("quantization_config"))
    sparsity = quantization.get("sparsity_config")
    stored = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    return quantization.get("quant_method") == "compressed-tensors" and not groups and stored == "dense"
