"""Says what the name of a model means and whether it can be loaded, before any weight is read.

A model is a Hugging Face folder, a GGUF file, ``smollm2``, or the name of a model on the hub. Code that
comes with a model is never run.
"""

from __future__ import annotations

from contextlib import nullcontext
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
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from rarefy.errors import ModelError
from rarefy.models.config import read_config, read_gguf_config
from rarefy.models.gguf import check_gguf
from rarefy.models.links import refuse_outside
from rarefy.models.locate import SMOLLM2, Kind, locate
from rarefy.models.quantized import make_dequantizer, quantization_of
from rarefy.models.quiet import cannot, first_line, quiet
from rarefy.models.settings import SETTINGS, read_json, settings_files
from rarefy.models.weight_files import SAFETENSORS, find_weight_files, possible_files

#: What config.json of a packed model calls the method.
PACKED = "rarefy"


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: what the user said, and what was found there.

    ``path`` is the folder with config.json, or the GGUF file; for a model of the hub it is the folder
    of its settings in the local cache, to which ``fetch`` adds the weights. ``quantization`` is what
    config.json says of quantised weights, which are dequantised while they are read, and ``packing`` what it
    says of weights that Rarefy packed; ``config`` says neither.
    """

    name: str
    kind: Kind
    path: Path
    config: PreTrainedConfig = field(repr=False)
    quantization: dict[str, Any] | None = field(default=None, repr=False)
    packing: dict[str, Any] | None = field(default=None, repr=False)

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
        _put_on_meta(model)
        return model.eval()

    def dequantizer(self) -> HfQuantizer | None:
        """What makes ordinary weights of the model's quantised ones; None where they are ordinary."""
        return None if self.quantization is None else make_dequantizer(self.name, self.quantization)

    def fetch(self) -> Path:
        """The folder, or the GGUF file, with the weights; downloads them where they are on the hub."""
        if self.kind != "hub":
            return self.path
        folder = self.path
        for files in possible_files(self.path):  # an index is among the settings, which are there
            names = [file.name for file in files.files]
            folder = _from_hub(self.name, (*SETTINGS, *names), show_progress=True)
            if all((folder / name).is_file() for name in names):
                break
        _check_weights(self.name, folder)
        return folder


def resolve_model(name: str, packed: bool = False) -> ModelSource:
    """What ``name`` means, checked as far as that goes without loading weights.

    Of a model on the hub only the settings are fetched. A folder that ``rarefy prune`` wrote stands for
    the model in it. Raises ModelError where there is no such model, or it is damaged, an adapter, quantised
    in a way that cannot be undone, or no decoder-only language model; and, unless ``packed``, where it is packed.
    """
    kind, path = _locate(name)
    if kind == "gguf":
        check_gguf(path)
        source = ModelSource(name, kind, path, read_gguf_config(name, path))
    else:
        quantization, packing = _check_settings(name, path)
        if packing is not None and not packed:
            raise ModelError.sentence(f"{name} is packed: `rarefy unpack` makes the ordinary model of it again.")
        if kind == "folder":
            _check_weights(name, path)
        config = read_config(name, path, quantization is not None)
        source = ModelSource(name, kind, path, config, quantization, packing)
    _refuse_unless_causal(source)
    return source


def _locate(name: str) -> tuple[Kind, Path]:
    kind, path = locate(name)
    return kind, path or _from_hub(name, SETTINGS)


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
        reason = f"the hub cannot be asked for a model of that name ({first_line(error)})"
        raise ModelError.sentence(f"There is no folder {name}, and {reason}.") from error


def _check_settings(name: str, folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What the folder's config.json says of quantisation, and what of packing.

    Raises ModelError unless it is that of a model alone.
    """
    adapter = folder / "adapter_config.json"
    if not (folder / "config.json").is_file():
        if adapter.is_file():
            raise ModelError.sentence(f"{name} is an adapter, no model: merge it into its model first.")
        if (folder / "unfinished").is_dir():
            raise ModelError.sentence(f"{name} holds an unfinished run: the command that began it finishes it.")
        gguf = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
        hint = f", but {gguf[0].name}, which can be given instead" if gguf else ""
        raise ModelError.sentence(f"{name} is no model folder: it has no config.json{hint}.")
    if adapter.is_file():
        raise ModelError.sentence(
            f"{name} is a model with an adapter beside it ({adapter.name}): merge the adapter into the model first, "
            "or move its files out of the folder."
        )
    for file in settings_files(folder):
        refuse_outside(folder, file)
    quantization = quantization_of(read_json(folder / "config.json"))
    if quantization is not None and quantization.get("quant_method") == PACKED:
        return None, quantization
    if quantization is not None:
        make_dequantizer(name, quantization)
    return quantization, None


def _check_weights(name: str, folder: Path) -> None:
    """Raises ModelError unless all files of weights are there and whole; reads their headers only."""
    files = find_weight_files(folder)
    if files is None:
        raise ModelError.sentence(f"{name} has no weights: neither {SAFETENSORS} nor any other file of them.")
    files.check()


def _put_on_meta(model: nn.Module) -> None:
    """Put those weights on the meta device that a model makes on the CPU all the same, as some do by drawing them."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                new = made.setdefault(id(parameter), nn.Parameter(parameter.to("meta"), parameter.requires_grad))
                module._parameters[name] = new  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and name not in module._non_persistent_buffers_set:
                module._buffers[name] = made.setdefault(id(buffer), buffer.to("meta"))


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
