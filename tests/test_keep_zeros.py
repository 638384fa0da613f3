"""keep_zeros: no zero is filled, whatever trains the model; and what is broken is seen."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import rarefy
from models_for_tests import make_model
from rarefy.errors import InputError, VerificationError
from rarefy.tuning import masks
from tuning_for_tests import prune_by_magnitude, site_masks, some_windows


def sparse_model(architecture: str = "llama") -> nn.Module:
    return prune_by_magnitude(make_model(architecture)).requires_grad_(True)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    ids = some_windows(2, 12, seed)
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


OPTIMISERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.5),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.5, fused=True),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.5),
    "muon": lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2], lr=0.02),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_keeps_every_zero(name: str) -> None:
    model = sparse_model()
    before = site_masks(model)
    optimizer = OPTIMISERS[name](list(model.parameters()))
    old = copy.deepcopy(model.state_dict())
    with rarefy.keep_zeros(model):
        for step in range(3):
            for part in range(2):  # gradients of two batches are accumulated
                loss_of(model, 2 * step + part).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    after = site_masks(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(not torch.equal(old[key], value) for key, value in model.state_dict().items())


def test_an_optimiser_that_mixes_entries_would_fill_zeros() -> None:
    """The step hook is needed: with masked gradients alone, Muon fills."""
    model = sparse_model()
    optimizer = OPTIMISERS["muon"](list(model.parameters()))
    zeros = rarefy.keep_zeros(model)
    zeros._hooks.pop().remove()  # the step hook
    loss_of(model).backward()
    optimizer.step()
    with pytest.raises(VerificationError, match="weights that were zero and are not any more"):
        zeros.check()
    zeros.apply_()
    zeros.check()
    zeros.remove()


def test_momentum_from_before_fills_nothing() -> None:
    model = sparse_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    loss_of(model).backward()
    optimizer.step()  # fills the momentum of zeros, too
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.5
    with rarefy.keep_zeros(model):
        loss_of(model).backward()
        optimizer.step()


def test_gradients_of_zeros_count_in_no_norm() -> None:
    model = sparse_model()
    with rarefy.keep_zeros(model) as zeros:
        loss_of(model).backward()
        for name, parameter in model.named_parameters():
            if name in zeros.masks:
                assert parameter.grad is not None
                assert not bool(parameter.grad[~zeros.masks[name]].any())
                assert bool(parameter.grad[zeros.masks[name]].any())


def test_a_mask_that_does_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks._Weight, "mask_", lambda self, tensor: None)
    model = sparse_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    message = r"q_proj.weight has [0-9,]+ weights that were zero"
    with pytest.raises(VerificationError, match=message), rarefy.keep_zeros(model):
        loss_of(model).backward()
        optimizer.step()


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "qwen3"])
def test_other_weights_than_linears(architecture: str) -> None:
    """Matrices that stand as (in, out), experts in stacks, embeddings that are tied to the head."""
    model = sparse_model(architecture)
    before = site_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with rarefy.keep_zeros(model) as zeros:
        assert not any("embed" in name or "wte" in name for name in zeros.masks)
        loss_of(model).backward()
        optimizer.step()
    after = site_masks(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_compiled_models() -> None:
    model = sparse_model()
    before = site_masks(model)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    with rarefy.keep_zeros(compiled):
        for step in range(2):
            loss_of(compiled, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(before[key], after) for key, after in site_masks(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    model = sparse_model()
    before = site_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    with rarefy.keep_zeros(model):
        for step in range(2):
            with torch.autocast("cpu", dtype=dtype):
                loss = loss_of(model, step)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert all(torch.equal(before[key], after) for key, after in site_masks(model).items())


def test_a_model_in_half_precision() -> None:
    model = sparse_model().to(torch.bfloat16)
    before = site_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with rarefy.keep_zeros(model):
        loss_of(model).backward()
        optimizer.step()
    assert all(torch.equal(before[key], after) for key, after in site_masks(model).items())


def test_what_there_is_to_keep() -> None:
    with pytest.raises(InputError, match="no zeros to keep"):
        rarefy.keep_zeros(make_model("llama"))
    only_zeros = nn.Linear(3, 4)
    nn.init.zeros_(only_zeros.weight)  # as LoRA's B begins
    with pytest.raises(InputError, match="no zeros to keep"):
        rarefy.keep_zeros(only_zeros)


def test_replaced_parameters_are_seen() -> None:
    model = sparse_model()
    zeros = rarefy.keep_zeros(model)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.weight = nn.Parameter(layer.weight.detach().clone())  # as sharding does
    with pytest.raises(VerificationError, match="call keep_zeros after the model is sharded"):
        zeros.check()
    zeros.remove()


def test_nothing_is_watched_after_it() -> None:
    model = sparse_model()
    zeros = rarefy.keep_zeros(model)
    zeros.remove()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    with pytest.raises(VerificationError):
        zeros.check()


def test_it_holds_no_model_alive() -> None:
    from torch.optim import optimizer as module

    count = len(module._global_optimizer_post_hooks)
    model = sparse_model()
    rarefy.keep_zeros(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(module._global_optimizer_post_hooks) == count


def test_an_error_within_is_not_hidden() -> None:
    model = sparse_model()
    with pytest.raises(KeyError), rarefy.keep_zeros(model):
        with torch.no_grad():
            next(iter(model.parameters()))
            model.get_submodule("model.layers.0.self_attn.q_proj").weight.add_(1.0)
        raise KeyError
