"""Says what the name of a model means and whether it can be loaded, before any weight is read.

A model is a Hugging Face folder, a GGUF file, ``smollm2``, or the name of a model on the hub. Code that
comes with a model is never run.
"""

from __future__ import annotations

import json
import logging
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rarefy.errors import ModelError
from rarefy.models.gguf import check_gguf, quick_reading
from rarefy.models.locate import SMOLLM2, Kind, locate

# What transformers looks for, in this order: a single file, or the index of several.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: what the user said, and what was found there.

    ``path`` is the folder with config.json, or the GGUF file; for a model of the hub it is the folder
    of its settings in the local cache, to which ``fetch`` adds the weights.
    """

    name: str
    kind: Kind
    path: Path
    config: PreTrainedConfig = field(repr=False)

    @property
    def context(self) -> int | None:
        """The longest text, in tokens, that the model is made for; None where it does not say."""
        length = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: modules, names, shapes and ties, but no weights."""
        try:
            with quiet(), torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    deepcopy(self.config), trust_remote_code=False
                )
        except Exception as error:
            raise cannot("be built from its settings", self.name, error) from error
        return model.eval()

    def fetch(self) -> Path:
        """The folder, or the GGUF file, with the weights; downloads them where they are on the hub."""
        if self.kind != "hub":
            return self.path
        for single, index in _WEIGHTS:
            weights = f"{Path(single).stem}*{Path(single).suffix}"
            folder = _from_hub(self.name, (*_SETTINGS, weights), show_progress=True)
            if (folder / single).is_file() or (folder / index).is_file():
                break
        _check_weights(self.name, folder)
        return folder


def resolve_model(name: str) -> ModelSource:
    """What ``name`` means, checked as far as that goes without loading weights.

    Of a model on the hub only the settings are fetched. A folder that ``rarefy prune`` wrote stands for
    the model in it. Raises ModelError where there is no such model, or it is damaged, quantised, or no
    decoder-only language model.
    """
    kind, path = _locate(name)
    if kind == "gguf":
        check_gguf(path)
    else:
        _check_settings(name, path)
    if kind == "folder":
        _check_weights(name, path)
    source = ModelSource(name, kind, path, _read_config(name, kind, path))
    _refuse_unless_causal(source)
    return source


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError.sentence(f"{file} cannot be read as JSON: {_first_line(error)}.") from error
    if not isinstance(content, dict):
        raise ModelError.sentence(f"{file} is JSON, but no object with keys.")
    return content


def cannot(what: str, name: str, error: Exception) -> ModelError:
    """One sentence for whatever went wrong inside transformers."""
    return ModelError.sentence(f"{name} cannot {what}: {_first_line(error)}.")


@contextmanager
def quiet() -> Iterator[None]:
    """Within the scope, transformers and the hub's client neither log, warn nor draw progress bars."""
    loggers = [logging.getLogger(library) for library in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _locate(name: str) -> tuple[Kind, Path]:
    kind, path = locate(name)
    return kind, path or _from_hub(name, _SETTINGS)


def _from_hub(name: str, patterns: tuple[str, ...], show_progress: bool = False) -> Path:
    """The folder in the local cache with those files of a hub model that match, fetched where need be."""
    try:
        with nullcontext() if show_progress else quiet():
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*patterns], ignore_patterns="*/*"))
    except HFValidationError as error:
        reason = "and no model on the hub can have that name"
        raise ModelError.sentence(f"There is no folder {name}, {reason}.") from error
    except GatedRepoError as error:
        what_to_do = "accept its terms on the hub, then log in with `hf auth login`"
        raise ModelError.sentence(f"{name} needs its owner's permission: {what_to_do}.") from error
    except RepositoryNotFoundError as error:
        raise ModelError.sentence(
            f"There is neither a folder {name} nor a public model of that name on the hub."
        ) from error
    except LocalEntryNotFoundError as error:
        hint = f" (did you mean {SMOLLM2}?)" if get_close_matches(name.lower(), [SMOLLM2]) else ""
        raise ModelError.sentence(
            f"There is no folder {name}, no model of that name in the local cache, and the hub cannot be "
            f"reached{hint}."
        ) from error
    except Exception as error:
        reason = f"the hub cannot be asked for a model of that name ({_first_line(error)})"
        raise ModelError.sentence(f"There is no folder {name}, and {reason}.") from error


def _check_settings(name: str, folder: Path) -> None:
    """Raises ModelError unless the folder has the config.json of a model that is not quantised."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError.sentence(f"{name} is an adapter, no model: merge it into its model first.")
        gguf = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
        hint = f", but {gguf[0].name}, which can be given instead" if gguf else ""
        raise ModelError.sentence(f"{name} is no model folder: it has no config.json{hint}.")
    config = read_json(folder / "config.json")
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise ModelError.sentence(
                f"{name} has a {key} in its config.json, but Rarefy prunes ordinary floating-point weights."
            )


def _check_weights(name: str, folder: Path) -> None:
    """Raises ModelError unless all files of weights are there and whole; reads their headers only."""
    for single, index in _WEIGHTS:
        if (folder / single).is_file():
            _check_file(folder / single, set())
            return
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelError.sentence(f"{folder / index} names no files of weights.")
            for file in sorted(set(weight_map.values())):
                _check_file(folder / file, {key for key, where in weight_map.items() if where == file})
            return
    raise ModelError.sentence(f"{name} has no weights: neither {_WEIGHTS[0][0]} nor any other file of them.")


def _check_file(path: Path, expected: set[str]) -> None:
    """Raises ModelError unless ``path`` is a whole file of weights, with all tensors of ``expected``."""
    missing: set[str] = set()
    try:
        with path.open("rb") as file:
            start = file.read(24)
        if start == b"version https://git-lfs.":
            raise ModelError.sentence(f"{path} is a pointer of Git LFS: `git lfs pull` fetches the weights.")
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:  # compares its header with the file's size
                missing = expected - set(tensors.keys())
        elif not start or (start[:2] == b"PK" and not zipfile.is_zipfile(path)):
            raise ModelError.sentence(f"{path} is damaged or cut off.")
    except FileNotFoundError as error:
        raise ModelError.sentence(f"{path} is missing, although the index of weights names it.") from error
    except (SafetensorError, OSError) as error:
        raise ModelError.sentence(f"{path} is damaged or cut off: {_first_line(error)}.") from error
    if missing:
        raise ModelError.sentence(f"{path} lacks {min(missing)}, although the index of weights names it.")


def _read_config(name: str, kind: Kind, path: Path) -> PreTrainedConfig:
    gguf = kind == "gguf"
    options = {"gguf_file": path.name} if gguf else {}
    try:
        with quiet(), quick_reading() if gguf else nullcontext():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                path.parent if gguf else path, trust_remote_code=False, **options
            )
    except Exception as error:
        model_type = None if gguf else read_json(path / "config.json").get("model_type")
        if model_type is not None and model_type not in transformers.CONFIG_MAPPING:
            known = f"transformers {transformers.__version__} does not know"
            raise ModelError.sentence(f"{name} is of type {model_type}, which {known}.") from error
        raise cannot("be understood", name, error) from error
    if gguf:
        config.dtype = torch.bfloat16  # packed weights have no dtype that a model could have
    return config


def _refuse_unless_causal(source: ModelSource) -> None:
    """Raises ModelError where a token may see later ones, or another model's states."""
    config = source.config
    what = f"{source.name} is a {config.model_type} model, no decoder-only language model"
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError.sentence(f"{what}.")
    modules = source.skeleton().get_decoder().modules()
    causal = {module.is_causal for module in modules if isinstance(getattr(module, "is_causal", None), bool)}
    # Where attention does not say, the config of a model that can be both says which of them this is.
    if False in causal or (not causal and getattr(config, "is_decoder", True) is False):
        raise ModelError.sentence(f"{what}: its attention looks ahead, or at another model's states.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:")
