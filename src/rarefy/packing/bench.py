"""Measures what packed weights gain: tokens per second, bytes, and products of single matrices, against dense ones.

All variants are measured in turn, again and again, and the best time of each counts: on a machine that does other
things too, that is what is left of its own speed. Torch multiplies one row by a bfloat16 matrix in several ways, of
which its default is not always the fastest, so dense models are measured with each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, StaticCache

from rarefy.packing.modules import PackedLinear, PackedModule
from rarefy.packing.operator import packed_linear
from rarefy.packing.weight import PackedWeight

#: How torch is asked to multiply by dense weights: the name of each way, and the scope in which it is taken.
Ways = Mapping[str, Callable[[], AbstractContextManager[None]]]


@contextmanager
def without_onednn() -> Iterator[None]:
    """Within the scope torch multiplies by itself, not through oneDNN, which can be faster for one row."""
    was = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was)


DENSE_WAYS: Ways = {"default": nullcontext, "without oneDNN": without_onednn}


@dataclass(frozen=True)
class Variant:
    """A model and the scope in which it is run."""

    name: str
    model: PreTrainedModel
    scope: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Speed:
    """What was measured of one variant; seconds are the best of all rounds.

    ``prefill`` and ``decode`` are tokens per second; of the seconds of one decoded token, ``products`` are those of
    all linears, the head included, and the rest goes into attention, norms and Python.
    """

    name: str
    prefill: float
    decode: float
    products: float

    @property
    def rest(self) -> float:
        """Seconds of one decoded token outside of the linears' products."""
        return max(0.0, 1 / self.decode - self.products)


def measure_speed(
    variants: Sequence[Variant], prompt_tokens: int, new_tokens: int, rounds: int, watch: Callable[[int, int], None]
) -> list[Speed]:
    """Let every variant read a prompt and write ``new_tokens`` after it, ``rounds`` times in turn."""
    for parameter in (one for variant in variants for one in variant.model.parameters()):
        # As from_pretrained leaves it: of a frozen head torch copies the whole weight to multiply one token by it.
        parameter.requires_grad_(parameter.is_floating_point())
    vocabulary = variants[0].model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.arange(prompt_tokens)[None] % vocabulary
    best = {variant.name: [float("inf")] * 3 for variant in variants}
    for round_number in range(rounds):
        for i, variant in enumerate(variants):
            with torch.no_grad(), variant.scope():
                seconds = [*_generate(variant.model, prompt, new_tokens), _products(variant.model)]
            best[variant.name] = [min(pair) for pair in zip(best[variant.name], seconds)]
            watch(round_number * len(variants) + i + 1, rounds * len(variants))
    return [
        Speed(variant.name, prompt_tokens / prefill, new_tokens / decode, products)
        for variant in variants
        for prefill, decode, products in [best[variant.name]]
    ]


def warm_up(model: PreTrainedModel) -> None:
    """Read a few tokens and write one, so that all memory that the model needs is taken."""
    with torch.no_grad():
        _generate(model, torch.arange(16)[None], 1)


def _generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for reading the prompt, and for writing greedily after it."""
    # Memory for all tokens is taken once, so that it does not grow with every token.
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)
    start = time.perf_counter()
    logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    middle = time.perf_counter()
    for _ in range(new_tokens):
        token = logits[:, -1:].argmax(dim=-1)
        logits = model(token, past_key_values=cache, use_cache=True).logits
    return middle - start, time.perf_counter() - middle


def _products(model: nn.Module) -> float:
    """Seconds for the products of one token with every linear, one after the other as the model has them."""
    linears = [
        (module, torch.ones(1, 1, module.in_features, dtype=_dtype(module)))
        for module in model.modules()
        if isinstance(module, nn.Linear | PackedLinear)
    ]
    start = time.perf_counter()
    for module, x in linears:
        module(x)
    return time.perf_counter() - start


def _dtype(module: nn.Linear | PackedLinear) -> torch.dtype:
    return module.dense_dtype if isinstance(module, PackedLinear) else module.weight.dtype


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights that the model holds, those that are shared once."""
    held = [*model.parameters(), *model.buffers()]
    storages = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in held}
    return sum(storages.values())


def bytes_per_token(model: nn.Module) -> int:
    """Bytes of weights that are read to decode one token: all but the embedding, of which that is a row.

    A head that shares its weight with the embedding is read as a whole. Of experts, the share that a router chooses,
    where the model's settings say how many those are.
    """
    total = 0
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            total += int(_chosen(model, module) * sum(tensor.numel() * tensor.element_size() for tensor in own))
    return total


def _chosen(model: nn.Module, module: nn.Module) -> float:
    """The share of a module's weights that one token meets."""
    size = next((getattr(module, name) for name in ("num_experts", "num_local_experts") if hasattr(module, name)), 0)
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    is_experts = isinstance(module, PackedModule) or any(p.ndim == 3 for p in module.parameters(recurse=False))
    return min(1.0, chosen / size) if size and chosen and is_experts else 1.0


# --- Single matrices --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapeSpeed:
    """One shape (rows, width) of a model's matrices: how many there are, their zeros, and seconds for one product.

    ``batch`` is how many rows x has; ``dense`` has the seconds of every dense way.
    """

    rows: int
    width: int
    number: int
    zeros: float
    batch: int
    dense: dict[str, float]
    packed: float

    def to_dict(self) -> dict[str, Any]:
        """All of it, with the gain against the best dense way and against torch's default."""
        best, default = min(self.dense.values()), self.dense["default"]
        return {**asdict(self), "gain": best / self.packed, "gain_over_default": default / self.packed}


def measure_shapes(
    model: nn.Module, beyond: int, rounds: int, batches: Sequence[int], watch: Callable[[int, int], None]
) -> list[ShapeSpeed]:
    """The products of every shape among the packed linears, batch by batch.

    Matrices are taken in turn from copies of more than ``beyond`` bytes together, packed and dense alike, so that no
    cache holds what is read.
    """
    groups: dict[tuple[int, int], list[PackedLinear]] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            groups.setdefault((module.out_features, module.in_features), []).append(module)
    found = []
    for done, (shape, modules) in enumerate(sorted(groups.items())):
        found += _measure_shape(shape, modules, beyond, rounds, batches)
        watch(done + 1, len(groups))
    return found


def _measure_shape(
    shape: tuple[int, int], modules: list[PackedLinear], beyond: int, rounds: int, batches: Sequence[int]
) -> list[ShapeSpeed]:
    weight, dtype = modules[0].packed("weight"), modules[0].dense_dtype
    dense = weight.unpack(dtype)
    packed = [_copied(weight) for _ in range(beyond // weight.nbytes + 2)]
    copies = [dense.clone() for _ in range(beyond // (dense.numel() * dense.element_size()) + 2)]
    zeros = sum(1 - float((module.dense("weight", dtype) != 0).float().mean()) for module in modules) / len(modules)
    found = []
    for batch in batches:
        x = torch.randn(batch, shape[1]).to(dtype)
        ways: dict[str, Callable[[int], object]] = {
            "packed": partial(_multiply, _packed_product, x, packed),
            "default": partial(_multiply, functional.linear, x, copies),
            "without oneDNN": partial(_multiply, _without, x, copies),
        }
        if batch == 1:
            ways["mv"] = partial(_multiply, _vector_product, x, copies)
        best = _best(ways, rounds * max(1, min(50, len(copies) // 4)))
        found.append(ShapeSpeed(*shape, len(modules), zeros, batch, best, best.pop("packed")))
    return found


def _best(ways: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """The shortest time of each way, all of them in turn."""
    best = dict.fromkeys(ways, float("inf"))
    with torch.no_grad():
        for i in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way(i)
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def _multiply(product: Callable[[Tensor, Any], Tensor], x: Tensor, weights: Sequence[Any], turn: int) -> None:
    product(x, weights[turn % len(weights)])


def _vector_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mv(weight, x[0])


def _without(x: Tensor, weight: Tensor) -> Tensor:
    with without_onednn():
        return functional.linear(x, weight)


def _copied(weight: PackedWeight) -> PackedWeight:
    scale = None if weight.scale is None else weight.scale.clone()
    copy = PackedWeight(weight.values.clone(), weight.mask.clone(), weight.shape, scale, weight.group)
    assert copy.offsets is not None  # counted now, not when it is measured
    return copy


def _packed_product(x: Tensor, weight: PackedWeight) -> Tensor:
    return packed_linear(
        x, weight.values, weight.mask, weight.offsets, weight.scale, None, weight.shape[-1], weight.group
    )
