"""Calibration text that the model writes itself: temperature 1, seeded, batched, kept for the next run.

Each text begins with the model's start token (a random token of its vocabulary where it has none), and each
next token is drawn from the model's own distribution, unchanged. An end-of-text token is drawn like any other
and writing goes on after it: that is how the model saw documents follow each other in training, and forbidding
the token would bend the distribution at the place where it is most certain.

A token is drawn by inverting the cumulated distribution, which needs one random number instead of one for every
word of the vocabulary (those alone cost a third of a step of a small model). All random numbers are drawn before
the first step, so the text depends on the seed and not on the batch size, apart from rounding. ``generation.py``
knows what models of different kinds keep of the tokens before.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rarefy.calibration.documents import CalibrationWarning
from rarefy.calibration.generation import NO_STATE, Way, embedding_shape, embeddings, way_of_writing
from rarefy.errors import InputError, NumericalError, OutputError
from rarefy.models.atomic import refusals, replace_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Counted up whenever the same seed would give other text than before.
_VERSION = 2

# Short texts are written many at a time over few keys and values: windows of 1,024 tokens take half the time
# that whole texts take. On SmolLM2 the layers' error on C4 after pruning is the same to 0.3 % with either.
TEXT_LENGTH = 256

# The default batch: its keys and values take no more than a quarter of the model's weights, or than this
# where that is more. Beyond the largest batch the products get no faster.
_CACHE_BYTES = 2**30
_LARGEST_BATCH = 128

# A model up to this size is written with in float32 on the CPU; see _in_float32.
_FLOAT32_PARAMETERS = 2_000_000_000

# Words per group in drawing a token; about the square root of a vocabulary.
_GROUP = 256

_SAMPLES_PER_TENSOR = 64


def write_text(
    model: PreTrainedModel,
    num: int,
    length: int,
    seed: int,
    *,
    bos_id: int | None = None,
    text_length: int | None = TEXT_LENGTH,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache_folder: Path | None = None,
    use_cache: bool = True,
) -> Int64[Tensor, "num length"]:
    """``num`` windows of ``length`` tokens that the model wrote, int64 on the CPU.

    A window is several texts of at most ``text_length`` tokens, one after the other (None: a single text). Each
    begins with its start token, which is ``bos_id`` or, where that is None, the model's own. ``batch_size`` texts
    are written at once (None: at most 128, fewer where their keys and values would take too much memory).
    ``progress(done, total)`` counts tokens.

    The same model, seed and lengths give the same bits on the same machine. The windows are kept in
    ``cache_folder`` (None: the user's cache folder) and read from there the next time, unless ``use_cache``
    is False; a file that is damaged is written anew. InputError for numbers that make no window,
    NumericalError where the model's logits are not finite. The model is left as it was.
    """
    if num < 1:
        raise InputError("the number of windows", num, "at least 1")
    if length < 1:
        raise InputError("the window length", length, "at least 1")
    pieces = -(-length // text_length) if text_length else 1
    piece_length = -(-length // pieces)
    if bos_id is None:
        bos_id = _start_token(model)

    file = None
    if use_cache:
        if cache_folder is None:
            from platformdirs import user_cache_path

            cache_folder = user_cache_path("rarefy") / "self-text"
        key = [_VERSION, _digest(model), model.device.type, num, length, piece_length, bos_id, seed]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        file = cache_folder / f"{name}.bin"
        if (windows := _load(file, num, length)) is not None:
            return windows

    training = model.training
    model.eval()
    try:
        with _in_float32(model):
            texts = _write(model, num * pieces, piece_length, seed, bos_id, batch_size, progress)
    finally:
        model.train(training)
    windows = texts.view(num, pieces * piece_length)[:, :length].clone()
    if file is not None:
        _store(file, windows)
    return windows


@torch.inference_mode()
def _write(
    model: PreTrainedModel,
    num: int,
    length: int,
    seed: int,
    bos_id: int | None,
    batch_size: int | None,
    progress: Callable[[int, int], None] | None,
) -> Int64[Tensor, "num length"]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(num, length, generator=generator)
    texts = torch.empty(num, length, dtype=torch.int64)
    if bos_id is None:
        texts[:, 0] = torch.randint(embeddings(model), (num,), generator=generator)
    else:
        texts[:, 0] = bos_id
    if length == 1:
        return texts
    way = way_of_writing(model)
    batch_size = way.largest_batch or batch_size or _fitting_batch(model, length, way)
    batch_size = -(-num // -(-num // batch_size))  # so that no batch is nearly empty
    for first in range(0, num, batch_size):
        rows = slice(first, first + batch_size)

        def choose(position: int, logits: Tensor, first: int = first, rows: slice = rows) -> Tensor:
            tokens = draw_tokens(logits, draws[rows, position].to(logits.device))
            texts[rows, position] = tokens.cpu()
            if progress:
                progress(first * length + len(tokens) * (position + 1), num * length)
            return tokens

        way.write(model, texts[rows, 0].to(model.device), length, choose)
    return texts


def draw_tokens(logits: Float[Tensor, "batch vocabulary"], draws: Float[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
    """One token per row from the softmax of its logits: the first whose cumulated probability reaches the draw.

    ``draws`` are uniform in [0, 1). The distribution is inverted in two steps, first among groups of words,
    then within one group: that takes a single pass over the vocabulary, and float32 is enough for sums of
    256 numbers. A token of probability zero is never drawn. NumericalError where logits are not finite.
    """
    probabilities = logits.float().softmax(-1)
    padding = -probabilities.shape[1] % _GROUP
    groups = nn.functional.pad(probabilities, (0, padding)).unflatten(1, (-1, _GROUP))
    sums = groups.sum(2).cumsum(1)
    if not sums[:, -1].isfinite().all():
        raise NumericalError("The model's logits are not finite: it cannot write text.")
    # Above zero, so that a draw of exactly 0 does not choose a first token that is impossible.
    tiny = torch.finfo(torch.float32).tiny
    target = (draws * sums[:, -1]).clamp_min(tiny)[:, None]
    group = torch.searchsorted(sums, target)
    before = torch.where(group > 0, sums.gather(1, (group - 1).clamp_min(0)), 0.0)
    within = groups[torch.arange(len(groups), device=groups.device), group[:, 0]].cumsum(1)
    target = torch.minimum((target - before).clamp_min(tiny), within[:, -1:])
    return (group * _GROUP + torch.searchsorted(within, target))[:, 0]


# --- The model --------------------------------------------------------------------------------------------


def _fitting_batch(model: PreTrainedModel, length: int, way: Way) -> int:
    """How many texts are written at once: their keys and values, or their activations, fit into memory.

    What models of other kinds keep is smaller than the keys and values of attention as wide as the model.
    """
    config = model.config.get_text_config(decoder=True)
    width = _whole_number(config, "hidden_size") or embedding_shape(model)[1]
    layers = _whole_number(config, "num_hidden_layers") or 1
    item = next(model.parameters()).element_size()
    if way is NO_STATE:
        per_text = item * length * (8 * width + embeddings(model))
        return max(1, min(_LARGEST_BATCH, _CACHE_BYTES // per_text))
    queries = _whole_number(config, "num_attention_heads")
    heads = _whole_number(config, "num_key_value_heads") or queries
    if queries and heads:
        width = heads * (_whole_number(config, "head_dim") or width // queries)
    per_text = layers * 2 * width * length * item
    allowed = max(_CACHE_BYTES, item * sum(map(Tensor.numel, model.parameters())) // 4)
    return max(1, min(_LARGEST_BATCH, allowed // per_text))


def _whole_number(config: PreTrainedConfig, name: str) -> int | None:
    """A setting that is one number above 0; None where it is missing, or differs from layer to layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # noqa: BLE001 (transformers refuses to name one value where there are several)
        return None
    return value if isinstance(value, int) and value > 0 else None


def _start_token(model: PreTrainedModel) -> int | None:
    token = getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)
    if isinstance(token, int) and 0 <= token < embeddings(model):
        return token
    return None


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, a small model in 16 bits on the CPU computes in float32; after it, nothing has changed.

    The weights' values are the same, and on a CPU without matrix units for 16 bits (AMX) a step takes 1.3 times
    less. Larger models stay as they are, because this takes 4 bytes more per parameter.
    """
    tensors = [
        tensor
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.dtype in (torch.bfloat16, torch.float16)
    ]
    if model.device.type != "cpu" or sum(map(Tensor.numel, tensors)) > _FLOAT32_PARAMETERS:
        tensors = []
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


# --- The cache folder -------------------------------------------------------------------------------------


def _digest(model: PreTrainedModel) -> str:
    """A digest that changes with the model's configuration and with a change of many weights, such as pruning."""
    config = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, len(values) // _SAMPLES_PER_TENSOR)]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _load(file: Path, num: int, length: int) -> Int64[Tensor, "num length"] | None:
    """The windows in ``file``, or None where it is missing or damaged."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    checksum, body = data[:32], data[32:]
    if len(body) != 8 * num * length or hashlib.sha256(body).digest() != checksum:
        return None
    return torch.frombuffer(bytearray(body), dtype=torch.int64).view(num, length)


def _store(file: Path, windows: Int64[Tensor, "num length"]) -> None:
    """Write a checksum and the tokens; the file appears whole or not at all. Failing here fails nothing else."""
    body = windows.numpy().tobytes()
    try:
        with refusals(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, hashlib.sha256(body).digest() + body)
    except OutputError as error:
        warnings.warn(f"the text that the model wrote could not be kept: {error}", CalibrationWarning, stacklevel=3)
