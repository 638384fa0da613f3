"""Loads a model with its tokenizer, and saves it as an ordinary Hugging Face folder.

Whatever a model came from, what is in memory is dense floating-point weights, and what is written is
what ``from_pretrained`` of any tool loads.
"""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rarefy.errors import InputError, ModelError
from rarefy.models.gguf import quick_reading
from rarefy.models.source import ModelSource, cannot, quiet, read_json, resolve_model

__all__ = [
    "ModelSource",
    "load_model",
    "load_tokenizer",
    "resolve_device",
    "resolve_dtype",
    "resolve_model",
    "save_model",
]

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# What a model that also sees or hears needs besides its weights; pruning does not change it.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# vLLM refuses models whose config speaks of sparsity; the others name code or places of the source.
_NOT_IN_CONFIG = {"quantization_config", "compression_config", "sparsity_config", "auto_map"}
_NOT_IN_CONFIG |= {"_name_or_path", "_model_name_or_path"}
_NOT_IN_TOKENIZER_CONFIG = {"auto_map", "name_or_path", "is_local", "local_files_only"}
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
    options: dict[str, Any] = {}
    if gguf:
        folder = source.path.parent
        options = {"gguf_file": source.path.name, "config": deepcopy(source.config)}
        if hasattr(transformers, "GgufConfig"):
            # Otherwise weights may stay packed, which is slow and cannot be saved.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    auto_class: Any = AutoModelForCausalLM  # from_pretrained is typed without the loading info
    with quiet(), quick_reading() if gguf else nullcontext():
        try:
            model, loading = auto_class.from_pretrained(
                folder, dtype=wanted or "auto", trust_remote_code=False, output_loading_info=True, **options
            )
        except Exception as error:
            raise cannot("be loaded", source.name, error) from error
        tokenizer = _load_tokenizer(source, folder)
    missing, surplus = loading["missing_keys"], loading["unexpected_keys"]
    if missing:
        # transformers fills these with random numbers and says so in its log only.
        raise ModelError.sentence(
            f"{source.name} lacks {len(missing)} weights of its model, {min(missing)} for instance."
        )
    if surplus:
        warnings.warn(
            f"{source.name} has {len(surplus)} tensors that its model has no place for, "
            f"{min(surplus)} for instance; they are left out.",
            stacklevel=2,
        )
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


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, source: ModelSource
) -> None:
    """Writes model and tokenizer into ``folder``, which is made where it does not exist.

    Weights as safetensors (a tied weight once), config.json without a word of quantisation or sparsity,
    generation config, tokenizer with its chat template. Files appear one after the other: the caller
    gives a temporary folder and renames it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generation_config = model.generation_config
    with quiet():
        try:
            # transformers raises for settings of which it only warned when it loaded them, and a run must
            # not be lost over these: they are written below as they are.
            model.generation_config = GenerationConfig()
            model.save_pretrained(folder)
        finally:
            model.generation_config = generation_config
        if generation_config is not None:
            generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    forget_origin(folder)
    for name in _PROCESSORS:
        if source.kind != "gguf" and (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    for weights in folder.glob("*.safetensors"):
        # safetensors makes its files readable to their owner only, unlike all others in the folder.
        shutil.copymode(folder / "config.json", weights)


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
    options: dict[str, Any] = {}
    if source.kind == "gguf":
        options["gguf_file"] = source.path.name
    elif not any((folder / file).is_file() for file in _VOCABULARIES):
        return None  # transformers would make one without a vocabulary
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


def forget_origin(folder: Path) -> None:
    """Remove from a model's settings every word of quantisation, sparsity and the places it came from."""
    _drop_keys(folder / "config.json", _NOT_IN_CONFIG)
    _drop_keys(folder / "tokenizer_config.json", _NOT_IN_TOKENIZER_CONFIG)


def _drop_keys(file: Path, keys: set[str]) -> None:
    """Removes keys from a JSON file, if there is one, also from the sections within it."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: kept(item) for key, item in value.items() if key not in keys}

    if file.is_file():
        text = json.dumps(kept(read_json(file)), indent=2, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")
