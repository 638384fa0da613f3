"""Reads and copies what is in a model's folder beside its weights: config, tokenizer, chat templates, licence.

What is copied is what is in the folder, not what the installed transformers would write in its place: the
config of a model that also sees or hears stays that of the whole model, for instance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rarefy.errors import ModelError
from rarefy.models.atomic import copy_file, refusals, replace_file

#: The files that belong to a model beside its weights, also those that only some tokenizers have.
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.tiktoken", "*.bpe", "LICENSE*", "NOTICE*")
_TEMPLATES = "additional_chat_templates/*.jinja"
_WEIGHTS_INDEX = ".index.json"
# vLLM refuses models whose config speaks of sparsity; the others name code or places of the source.
_NOT_IN_CONFIG = {"quantization_config", "compression_config", "sparsity_config", "auto_map"}
_NOT_IN_CONFIG |= {"_name_or_path", "_model_name_or_path"}
_NOT_IN_TOKENIZER_CONFIG = {"auto_map", "name_or_path", "is_local", "local_files_only"}
_MOST_LEVELS = 100
_DTYPE_KEYS = ("dtype", "torch_dtype")  # older releases of transformers know the second only


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError where there is none, or it is nested too deeply."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _refuse_deep(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".:")
        raise ModelError.sentence(f"{file} cannot be read as JSON: {reason}.") from error
    if not isinstance(content, dict):
        raise ModelError.sentence(f"{file} is JSON, but no object with keys.")
    return content


def _refuse_deep(content: Any) -> None:
    """Raise ValueError where JSON is nested more deeply than any settings are."""
    level, depth = [content], 0
    while level := [child for value in level for child in _children(value)]:
        depth += 1
        if depth > _MOST_LEVELS:
            raise ValueError(f"it is nested in more than {_MOST_LEVELS} levels")


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def settings_files(folder: Path) -> list[Path]:
    """All files of a model's folder that belong to it, but its weights and what says where they are."""
    found = [file for kind in (*SETTINGS, _TEMPLATES) for file in sorted(folder.glob(kind))]
    return [file for file in dict.fromkeys(found) if file.is_file() and not file.name.endswith(_WEIGHTS_INDEX)]


def copy_settings(source: Path, folder: Path, dtype: str | None = None, sections: Sequence[str] = ()) -> None:
    """Copy the settings of a model from ``source`` into ``folder``, replacing what is there.

    Every word of quantisation, sparsity and the places they came from is left out. Where ``dtype`` is given, the
    config says it from now on, for the model and in its ``sections``. Raises OutputError where the disk refuses.
    """
    for file in settings_files(source):
        target = folder / file.relative_to(source)
        with refusals(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(file, target)
    with refusals(folder):
        forget_origin(folder)
        if dtype is not None:
            _write_dtype(folder / "config.json", dtype, sections)


def forget_origin(folder: Path) -> None:
    """Remove from a model's settings every word of quantisation, sparsity and the places it came from."""
    _drop_keys(folder / "config.json", _NOT_IN_CONFIG)
    _drop_keys(folder / "tokenizer_config.json", _NOT_IN_TOKENIZER_CONFIG)


def torch_name(dtype: str) -> str:
    """The name of a dtype as torch has it; old tools write ``torch.float16`` for ``float16``."""
    return dtype.removeprefix("torch.")


def with_plain_dtypes(config: dict[str, Any]) -> dict[str, Any]:
    """The same config, at all depths, with dtypes by their names in torch."""

    def plain(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: plain(inner, item) for inner, item in value.items()}
        return torch_name(value) if key in _DTYPE_KEYS and isinstance(value, str) else value

    return {key: plain(key, value) for key, value in config.items()}


def _write_dtype(file: Path, dtype: str, sections: Sequence[str]) -> None:
    """Say ``dtype`` in a config and in its sections, under the key that is there."""
    config = read_json(file)
    for section in [config, *(config[key] for key in sections if isinstance(config.get(key), dict))]:
        keys = [key for key in _DTYPE_KEYS if key in section]
        for key in keys or _DTYPE_KEYS[:1]:
            section[key] = dtype
    _write_json(file, config)


def _drop_keys(file: Path, keys: set[str]) -> None:
    """Remove keys from a JSON file, if there is one, also from the sections within it."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: kept(item) for key, item in value.items() if key not in keys}

    if file.is_file():
        _write_json(file, with_plain_dtypes(kept(read_json(file))))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    replace_file(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
