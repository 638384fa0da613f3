"""Lets a model write token by token, with whatever it keeps of the tokens before: keys and values, states, nothing.

    way_of_writing(model)  -->  way;  way.write(model, first, length, choose): choose is asked for every next token

The ways are tried, the fastest first. Models with attention get a cache of keys and values that is allocated once.
State-space models, linear attention and all others that keep something else write through transformers' own
``generate``, which knows what each of them keeps. What neither serves is given the whole text anew for each
token. A way is taken if, on a few tokens, the model's logits with it are those of whole texts: some models accept
a cache and do not use it, and RWKV mixes up the texts of a batch, which no error shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from rarefy.calibration.documents import CalibrationWarning, first_line
from rarefy.errors import CalibrationError, NumericalError
from rarefy.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: ``choose(position, logits)`` gives the tokens (batch,) at ``position`` >= 1 for logits (batch, vocabulary).
Choose = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """A way of writing. ``write(model, first, length, choose)`` goes on after the tokens ``first`` (batch,).

    It ends when texts of ``length`` tokens are there. ``largest_batch`` is how many texts it can write at once.
    """

    write: Callable[[PreTrainedModel, Tensor, int, Choose], None]
    largest_batch: int | None = None


# The trial: this many texts of so many tokens, more than a convolution of a state-space model reaches back.
_TRIAL_TEXTS, _TRIAL_LENGTH = 2, 6

# How far a way's logits may be from those of the whole text, as a fraction of how far they are where all that was
# before is forgotten. A cache that is not used leaves all of that; positions that are not counted left .01 in a
# random model, where they hardly matter (Bamba). Rounding leaves some 1e-6 in float32 and some per cent in 16 bits.
_NEAR, _NEAR_IN_16_BITS = 0.005, 0.2

# Where what was before does not matter at all, a difference of rounding, relative to the logits.
_ROUNDING = 1e-5


@torch.inference_mode()
def way_of_writing(model: PreTrainedModel) -> Way:
    """The fastest way in which ``model`` writes what it would write if it read the whole text each time.

    Raises NumericalError where its logits are not finite, CalibrationError where it writes in no way at all;
    CalibrationWarning where only the slowest way works.
    """
    size = embeddings(model)
    count = _TRIAL_TEXTS * _TRIAL_LENGTH
    ids = (torch.arange(count) * (size // count) + size // (2 * count)).view(_TRIAL_TEXTS, _TRIAL_LENGTH)
    ids = ids.to(model.device)
    try:
        whole = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        # Each token as if it stood at the beginning.
        alone = model(input_ids=ids.view(-1, 1), use_cache=False).logits.float().view(*ids.shape, -1)[:, :-1]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CalibrationError.sentence(
            f"The model cannot write its own text ({type(error).__name__}: {first_line(error)}); name another source "
            "with --calibration."
        ) from error
    if not whole.isfinite().all():
        raise NumericalError("The model's logits are not finite: it cannot write text.")
    near = _NEAR if next(model.parameters()).dtype.itemsize >= 4 else _NEAR_IN_16_BITS
    allowed = max(near * float((alone - whole).abs().sum()), _ROUNDING * float(whole.abs().sum()))
    for way in (ALLOCATED_CACHE, OWN_STATE, OWN_STATE_ONE_BY_ONE):
        # A second batch, of which one step is enough: nothing of the first may be left in it.
        first, second = _logits_on(model, way, ids), _logits_on(model, way, ids.flip(0)[:, :2])
        if first is not None and second is not None:
            leftover = second.flip(0) - whole[:, :1]
            if float((first - whole).abs().sum() + leftover.abs().sum()) <= allowed:
                return way
    warnings.warn(
        "the model keeps nothing of what it has written that Rarefy could use, so each token takes a pass over the "
        "whole text: another --calibration is faster",
        CalibrationWarning,
        stacklevel=4,
    )
    return NO_STATE


def _logits_on(
    model: PreTrainedModel, way: Way, ids: Int64[Tensor, "batch length"]
) -> Float[Tensor, "batch length-1 vocabulary"] | None:
    """The logits with which ``way`` would choose each token of ``ids`` but the first; None where it fails."""
    found: list[Tensor] = []
    for batch in ids.split(way.largest_batch or len(ids)):
        seen: list[Tensor] = []

        def choose(position: int, logits: Tensor, batch: Tensor = batch, seen: list[Tensor] = seen) -> Tensor:
            seen.append(logits.float())
            return batch[:, position]

        try:
            way.write(model, batch[:, 0], batch.shape[1], choose)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001 (a model that does not know a cache fails in ways of its own)
            return None
        found.append(torch.stack(seen, dim=1))
    return torch.cat(found)


def embeddings(model: PreTrainedModel) -> int:
    """How many tokens the model knows: those that it has embeddings for."""
    size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) else embedding_shape(model)[0]


def embedding_shape(model: PreTrainedModel) -> tuple[int, int]:
    """(tokens, width) of the model's embeddings."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0]), int(weight.shape[1])


def _forget(model: PreTrainedModel) -> None:
    """Let a model that keeps states in its own modules begin anew, as a pass that keeps nothing makes it."""
    if getattr(model, "_is_stateful", False):
        ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        model(input_ids=ids, use_cache=False)


# --- Keys and values in memory that is allocated once -------------------------------------------------------


def _with_allocated_cache(
    model: PreTrainedModel, first: Int64[Tensor, " batch"], length: int, choose: Choose
) -> None:
    """Generation with a static cache, for models with attention: no step copies keys and values."""
    _forget(model)
    cache = _allocated_cache(model, length)
    tokens = first[:, None]
    for position in range(1, length):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        tokens = choose(position, logits)[:, None]


class _AllocatedLayer(DynamicLayer):
    """Keys and values of one layer in memory that is allocated once; the usual layer copies all at each step."""

    _layer_type = None  # not to be registered with transformers

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.dtype, self.device = key_states.dtype, key_states.device
            batch_and_heads = key_states.shape[:2]
            self.keys = key_states.new_empty(*batch_and_heads, self._length, key_states.shape[3])
            self.values = value_states.new_empty(*batch_and_heads, self._length, value_states.shape[3])
            self.is_initialized = True
        old, self._filled = self._filled, self._filled + key_states.shape[2]
        self.keys[:, :, old : self._filled] = key_states
        self.values[:, :, old : self._filled] = value_states
        return self.keys[:, :, : self._filled], self.values[:, :, : self._filled]

    def get_seq_length(self) -> int:
        return self._filled


def _allocated_cache(model: PreTrainedModel, length: int) -> Cache:
    """An empty cache for ``length`` tokens; layers of a special kind (a sliding window) keep their own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_AllocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


# --- What the model itself keeps ----------------------------------------------------------------------------


class _Chosen(LogitsProcessor):
    """Leaves ``generate`` only the token that was chosen."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self._choose(input_ids.shape[1], scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def _with_own_state(model: PreTrainedModel, first: Int64[Tensor, " batch"], length: int, choose: Choose) -> None:
    """Generation by transformers itself, which makes the states that each kind of model keeps."""
    _forget(model)
    settings = GenerationConfig(max_new_tokens=length - 1, do_sample=False, num_beams=1, pad_token_id=0)
    own, model.generation_config = model.generation_config, settings
    generate: Any = model.generate
    try:
        with quiet():
            generate(
                first[:, None],
                attention_mask=torch.ones_like(first[:, None]),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_Chosen(choose)]),
            )
    finally:
        model.generation_config = own


# --- Nothing ------------------------------------------------------------------------------------------------


def _without_state(model: PreTrainedModel, first: Int64[Tensor, " batch"], length: int, choose: Choose) -> None:
    """Generation without a cache, for every model: each token costs a pass over the whole text."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    texts = first[:, None]
    for position in range(1, length):
        logits = model(input_ids=texts, use_cache=False, **last_only).logits[:, -1]
        texts = torch.cat([texts, choose(position, logits)[:, None]], dim=1)


ALLOCATED_CACHE = Way(_with_allocated_cache)
OWN_STATE = Way(_with_own_state)
OWN_STATE_ONE_BY_ONE = Way(_with_own_state, largest_batch=1)
NO_STATE = Way(_without_state)
