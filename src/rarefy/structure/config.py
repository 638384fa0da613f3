"""Configs of smaller models: an entry is changed, and the model that transformers then builds shows what it means.

Nothing is known of architectures. A config is read again from what would be written of it, so that what it means
here is what it means to whoever loads the smaller model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rarefy.errors import ModelError
from rarefy.models.config import text_section
from rarefy.models.quiet import quiet

#: Lists in a config that have nothing to do with blocks, however long they are.
_NO_BLOCKS = ("architectures", "id2label", "label2id", "pruned_heads")


def entry(config: PreTrainedConfig, name: str) -> str:
    """The key under which a config has what transformers calls ``name`` everywhere."""
    return str(type(config).attribute_map.get(name, name))


def number_in(config: PreTrainedConfig, name: str) -> int:
    """The number that transformers calls ``name`` everywhere.

    Raises ModelError where the config describes other parts beside its language model, or has no single such number.
    """
    _refuse_sections(config)
    try:
        return int(getattr(config, name))
    except Exception as error:  # configs of other numbers in each block have errors of their own
        raise ModelError.sentence(
            f"The config of this {config.model_type} model has no single {name}, which Rarefy could lower."
        ) from error


def _refuse_sections(config: PreTrainedConfig) -> None:
    if text_section(config) is not None:
        raise ModelError.sentence(
            f"The config of this {config.model_type} model describes other parts beside its language model: Rarefy "
            "makes only plain language models smaller."
        )


def changed(config: PreTrainedConfig, entries: Mapping[str, Any]) -> PreTrainedConfig:
    """The config with other ``entries``, as it is when it is read from a file again.

    Raises ModelError where transformers refuses it.
    """
    _refuse_sections(config)
    try:
        with quiet():
            made: PreTrainedConfig = type(config).from_dict({**config.to_dict(), **entries})
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError.sentence(f"A config with {_words(entries)} is refused: {reason}.") from error
    made._attn_implementation = config._attn_implementation
    return made


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device. Raises ModelError where transformers cannot build it."""
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError.sentence(f"A smaller {config.model_type} model cannot be built: {reason}.") from error
    model.eval()
    return model


def fewer_blocks(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The entries of a config that change where only the blocks ``kept`` are left: their number, lists by block."""
    number = number_in(config, "num_hidden_layers")
    changes: dict[str, Any] = {entry(config, "num_hidden_layers"): len(kept)}
    for key, value in config.to_dict().items():
        of_blocks = isinstance(value, list) and len(value) == number
        if of_blocks and key not in _NO_BLOCKS and not key.endswith(("token_id", "token_ids")):
            changes[key] = [value[index] for index in kept]
    return changes


def _words(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in entries.items() if not isinstance(value, list))
