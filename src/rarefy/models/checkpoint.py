"""Loads a model with its tokenizer: whatever it came from, what is in memory is dense floating-point weights."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rarefy.errors import InputError, ModelError
from rarefy.models.gguf import quick_reading, tensors_beyond
from rarefy.models.quantized import dequantizing_config
from rarefy.models.quiet import cannot, quiet
from rarefy.models.source import ModelSource, resolve_model

__all__ = ["ModelSource", "load_model", "load_tokenizer", "resolve_device", "resolve_dtype", "resolve_model"]

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    source: ModelSource, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model, for inference only, and its tokenizer, or None where the checkpoint has none.

    ``dtype="auto"`` is what the checkpoint says, and bfloat16 for a GGUF file, whose weights become
    ordinary dense ones. Raises ModelError where weights are missing or do not fit, and InputError for
    a device or dtype that cannot be used. Warns of tensors that the model has no place for.
    """
    target = resolve_device(device)
    wanted = resolve_dtype(dtype)
    folder = source.fetch()
    gguf = source.kind == "gguf"
    config = deepcopy(source.config)
    options: dict[str, Any] = {}
    if gguf:
        folder = source.path.parent
        options["gguf_file"] = source.path.name
        if hasattr(transformers, "GgufConfig"):
            # Otherwise weights may stay packed, which is slow and cannot be saved.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif source.quantization is not None:
        config.quantization_config = source.quantization
        options["quantization_config"] = dequantizing_config(source.quantization)
    elif source.packing is not None:
        config.quantization_config = deepcopy(source.packing)
        if target.type != "cpu":
            options["device_map"] = {"": target}  # it is unpacked where it is loaded to
    auto_class: Any = AutoModelForCausalLM  # from_pretrained is typed without the loading info
    with quiet(), quick_reading() if gguf else nullcontext():
        try:
            model, loading = auto_class.from_pretrained(
                folder,
                dtype=wanted or "auto",
                trust_remote_code=False,
                output_loading_info=True,
                config=config,
                **options,
            )
        except Exception as error:
            raise cannot("be loaded", source.name, error) from error
        tokenizer = _load_tokenizer(source, folder)
    missing, surplus = loading["missing_keys"], [*loading["unexpected_keys"]]
    if missing:
        # transformers fills these with random numbers and says so in its log only.
        raise ModelError.sentence(
            f"{source.name} lacks {len(missing)} weights of its model, {min(missing)} for instance."
        )
    if gguf:
        surplus += tensors_beyond(source.path, model.config.get_text_config().num_hidden_layers)
    if surplus:
        warnings.warn(
            f"{source.name} has {len(surplus)} tensors that its model has no place for, "
            f"{min(surplus)} for instance; they are {'left out' if gguf else 'not used'}.",
            stacklevel=2,
        )
    if source.packing is None:
        _make_ordinary(model)
    model.to(target).eval().requires_grad_(False)
    return model, tokenizer


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer alone, for which no weights are read; None where the checkpoint has none.

    Raises ModelError where it is damaged.
    """
    gguf = source.kind == "gguf"
    with quiet(), quick_reading() if gguf else nullcontext():
        return _load_tokenizer(source, source.path.parent if gguf else source.path)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to compute on; ``auto`` is CUDA where there is one, else the CPU. Raises InputError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        usable.append("mps")
    try:
        resolved = torch.device(device)
        name = f"cuda:{resolved.index or 0}" if resolved.type == "cuda" else resolved.type
    except RuntimeError:
        name = ""
    if name not in usable:
        raise InputError("device", str(device), f"auto or one that this machine has: {', '.join(usable)}")
    return resolved


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype of the weights; None for ``auto``, which leaves it to the checkpoint. Raises InputError."""
    if dtype == "auto":
        return None
    resolved = _DTYPES.get(str(dtype).removeprefix("torch."))
    if resolved is None:
        raise InputError("dtype", str(dtype), f"auto, {', '.join(_DTYPES)}")
    return resolved


def _load_tokenizer(source: ModelSource, folder: Path) -> PreTrainedTokenizerBase | None:
    options: dict[str, Any]
    if source.kind == "gguf":
        options = {"gguf_file": source.path.name}
    elif not any((folder / file).is_file() for file in _VOCABULARIES):
        return None  # transformers would make one without a vocabulary
    else:  # without the config, transformers would read the file, with dtypes as old tools spell them
        options = {"config": deepcopy(source.config)}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:
        raise cannot("be used, because its tokenizer cannot be loaded", source.name, error) from error
    return tokenizer


def _make_ordinary(model: Any) -> None:
    """Removes what a quantised origin leaves behind, for which transformers would refuse to save."""
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
