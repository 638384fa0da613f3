"""Saves a model in memory as an ordinary Hugging Face folder, which any tool loads.

Of a model that came from files, its parameters go into a copy of these files, so that all that is no part of the
model (the tower that sees, layers for speculation) comes along, under the names that it had. Where that cannot be,
transformers writes the model, and what it has no place for is put beside it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rarefy.errors import ModelError
from rarefy.models.atomic import copy_file, refusals, replace_file
from rarefy.models.config import text_section
from rarefy.models.conversion import targets_of
from rarefy.models.copies import ShardCopies, as_it_is
from rarefy.models.quiet import quiet
from rarefy.models.settings import copy_settings, forget_origin, settings_files
from rarefy.models.shards import Shards
from rarefy.models.source import ModelSource
from rarefy.models.streaming import StreamedModel
from rarefy.models.weight_files import INDEX, SAFETENSORS


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, source: ModelSource
) -> None:
    """Write a model, which was loaded from ``source`` and may have been changed, into ``folder``.

    The folder is made where it does not exist. It gets weights as safetensors, config.json without a word of
    quantisation or sparsity, generation config, and the tokenizer with its chat template. Files appear one after
    the other: the caller gives a temporary folder and renames it. Raises OutputError where the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source.kind == "gguf":
        _save_as_transformers_does(model, folder)
        if tokenizer is not None:
            with quiet():
                tokenizer.save_pretrained(folder)
        forget_origin(folder)
        return
    try:
        streamed = StreamedModel(source, model.dtype)
    except ModelError:
        _save_as_transformers_does(model, folder, quantized=source.quantization is not None)
        _add_what_has_no_place(model, folder, source)
        write_settings(source, folder, None if model.dtype == source.config.dtype else model.dtype)
        return
    changed = streamed.changed_in(model)
    copies = streamed.copies(folder, changed)
    copies.make()
    streamed.store_from(model, changed, copies)
    streamed.close()
    write_settings(source, folder, model.dtype if streamed.casts else None)


def save_other_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, source: ModelSource
) -> None:
    """Write a model that was made from ``source``, but has other shapes or fewer blocks, into ``folder``.

    Its config and generation config are its own; tokenizer, chat templates and licence are those of the source.
    Tensors of the source that its model has no place for are left out. Raises OutputError where the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save_as_transformers_does(model, folder, quantized=source.quantization is not None)
    own = {file.name for file in folder.iterdir()}
    if source.kind != "gguf":
        for file in settings_files(source.path):
            if file.name not in own:
                target = folder / file.relative_to(source.path)
                with refusals(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                copy_file(file, target)
    elif tokenizer is not None:
        with quiet():
            tokenizer.save_pretrained(folder)
    forget_origin(folder)


def write_settings(source: ModelSource, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Copy all of a model's folder but its weights; the config says ``dtype`` from now on, if that is given.

    Raises OutputError where the disk refuses.
    """
    section = text_section(source.config)
    said = None if dtype is None else str(dtype).removeprefix("torch.")
    copy_settings(source.path, folder, said, [section] if section else [])


def _save_as_transformers_does(model: PreTrainedModel, folder: Path, quantized: bool = False) -> None:
    """Let transformers write weights (a tied weight once), config and generation config."""
    generation_config = model.generation_config
    if quantized:
        # Else it would quantise again what it has dequantised.
        model._weight_conversions = None  # type: ignore[assignment]
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
    for weights in folder.glob("*.safetensors"):
        # safetensors makes its files readable to their owner only, unlike all others in the folder.
        shutil.copymode(folder / "config.json", weights)


def _add_what_has_no_place(model: PreTrainedModel, folder: Path, source: ModelSource) -> None:
    """Put the tensors of a checkpoint that ``model`` has no place for into one more file beside its own."""
    shards = Shards.open(source.fetch())
    targets = targets_of(model, shards.tensors, source.dequantizer())
    names = [name for name in targets if not targets[name]]
    if not names:
        return
    written = Shards.open(folder)
    total = len(written.files) + 1
    numbered = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    place = {file.name: number for file, number in zip(written.files, numbered)}
    for file in written.files:
        file.rename(folder / place[file.name])
    (folder / (SAFETENSORS + INDEX)).unlink(missing_ok=True)
    added = folder / numbered[-1]
    content = {name: replace(tensor, file=added) for name, tensor in as_it_is(shards).items() if name in {*names}}
    ShardCopies(Shards(folder, [added], None, {}), folder, content).make()
    weight_map = {name: place[tensor.file.name] for name, tensor in written.tensors.items()}
    weight_map |= dict.fromkeys(names, added.name)
    size = sum(tensor.size for tensor in written.tensors.values()) + sum(each.size for each in content.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    replace_file(folder / (SAFETENSORS + INDEX), (json.dumps(index, indent=2) + "\n").encode())
