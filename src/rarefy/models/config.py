"""Reads a model's config.json as transformers understands it, however older or other tools have written it.

Dtypes may be spelt as older tools spelt them, and a model within a model (the language model of one that also
sees, say) may leave its dtype to the outer one.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from rarefy.errors import ModelError
from rarefy.models.gguf import quick_reading
from rarefy.models.quiet import cannot, quiet
from rarefy.models.settings import read_json, with_plain_dtypes

_DTYPES = "float32, bfloat16 or float16"


def read_config(name: str, folder: Path, quantized: bool = False) -> PreTrainedConfig:
    """The config of a model folder, without a word of quantisation. ``name`` is what errors call the model.

    Weights that are ``quantized`` become bfloat16 where the config names no dtype. Raises ModelError where the
    config is damaged, or of a kind that transformers does not know.
    """
    file = folder / "config.json"
    content = read_json(file)
    plain = with_plain_dtypes(content)
    _check_dtypes(file, plain)
    try:
        with quiet():
            if plain == content:
                config = _auto_config(folder)
            else:
                with tempfile.TemporaryDirectory() as copy:
                    (Path(copy) / file.name).write_text(json.dumps(plain), encoding="utf-8")
                    config = _auto_config(Path(copy))
                    config.name_or_path = str(folder)
            text = config.get_text_config()
    except Exception as error:
        model_type = content.get("model_type")
        if model_type is not None and model_type not in transformers.CONFIG_MAPPING:
            known = f"transformers {transformers.__version__} does not know"
            raise ModelError.sentence(f"{name} is of type {model_type}, which {known}.") from error
        raise cannot("be understood", name, error) from error
    for each in (config, text):
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    # Where neither says its dtype, from_pretrained looks into the files, and so does a streamed model.
    config.dtype = config.dtype or text.dtype or (torch.bfloat16 if quantized else None)
    text.dtype = text.dtype or config.dtype
    return config


def read_gguf_config(name: str, path: Path) -> PreTrainedConfig:
    """The config that a GGUF file says. Raises ModelError where transformers does not understand it."""
    try:
        with quiet(), quick_reading():
            config = _auto_config(path.parent, gguf_file=path.name)
    except Exception as error:
        raise cannot("be understood", name, error) from error
    config.dtype = torch.bfloat16  # packed weights have no dtype that a model could have
    return config


def text_section(config: PreTrainedConfig) -> str | None:
    """The key of the section that is the language model's config; None where the whole config is."""
    text = config.get_text_config()
    return next((key for key in config.sub_configs if getattr(config, key, None) is text), None)


def _auto_config(folder: Path, **options: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    return config


def _check_dtypes(file: Path, content: dict[str, Any]) -> None:
    """Raise ModelError where a config or its language model's section says a dtype that torch does not have."""
    text = content.get("text_config")
    for section in (content, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            said = section.get(key)
            if said is not None and not isinstance(getattr(torch, str(said), None), torch.dtype):
                raise ModelError.sentence(f"{file} says {key} {said!r}, but must say {_DTYPES}.")
