"""Orders and rotations that are merged into a block: the dense model stays what it was, and N:M prunes less."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rarefy
from models_for_tests import VOCABULARY, make_model
from rarefy.errors import InputError, ModelError, PatternError
from rarefy.layer.order import choose_order, kept_share
from rarefy.layer.pattern import NM, Unstructured
from rarefy.layer.rotation import Heads, choose_rotation
from rarefy.models.blocks import find_blocks
from rarefy.pruning import loop

WINDOWS = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
# float32 sums in another order, twice a block; logits are below 10
ROUNDING = 2e-4
BOTH = {"permute": True, "rotate": True}


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(WINDOWS).logits
    return logits


def _pruned(architecture: str, **options: Any) -> tuple[nn.Module, rarefy.Report]:
    model = make_model(architecture)
    options = {"pattern": NM(2, 4), "method": rarefy.Wanda(), "batch_size": 4} | options
    return model, rarefy.prune(model, WINDOWS, **options)


@pytest.fixture
def left_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs change blocks, but solve and write no layer."""
    monkeypatch.setattr(loop, "prune_layers", lambda *_: iter(()))


# --- the function of the dense model


@pytest.mark.usefixtures("left_dense")
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"permute": True}),
        ("llama", {"rotate": True}),
        *(
            (name, {"permute": True, "rotate": True})
            for name in ("qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox")
        ),
    ],
    ids=str,
)
def test_the_dense_model_computes_the_same(architecture: str, options: dict[str, bool]) -> None:
    model, _ = _pruned(architecture, **options)
    original = make_model(architecture)
    changed = {
        name.split(".", 3)[-1]
        for (name, new), old in zip(model.named_parameters(), original.parameters())
        if not torch.equal(new, old)
    }
    assert changed  # else nothing was tested
    mlp = {name for name in changed if any(word in name for word in ("mlp", "fc1", "fc2"))}
    assert bool(mlp) == ("permute" in options)
    assert changed - mlp  # of attention, which both options change
    torch.testing.assert_close(_logits(model), _logits(original), rtol=0, atol=ROUNDING)


@pytest.mark.usefixtures("left_dense")
@pytest.mark.parametrize("architecture", ["llama", "opt", "phi3"])
def test_what_is_changed_is_all_linears_of_an_inner_dimension_and_their_biases(architecture: str) -> None:
    model, _ = _pruned(architecture, permute=True, rotate=True)
    original = dict(make_model(architecture).named_parameters())
    changed = {
        name.split(".", 3)[-1] for name, new in model.named_parameters() if not torch.equal(new, original[name])
    }
    expected = {
        "llama": {"self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"}
        | {"mlp.down_proj.weight"},
        "opt": {"0.self_attn.v_proj.weight", "0.self_attn.v_proj.bias", "0.self_attn.out_proj.weight", "0.fc1.weight"}
        | {"0.fc1.bias", "0.fc2.weight"},
        "phi3": {"self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight"}
        | {"mlp.down_proj.weight"},
    }[architecture]
    assert {re.sub(r"^1\.", "0.", name) for name in changed} == expected


@pytest.mark.usefixtures("left_dense")
def test_in_half_precision_the_dense_model_is_the_same_but_for_one_rounding() -> None:
    model = make_model("llama").to(torch.bfloat16)
    rarefy.prune(model, WINDOWS, pattern=NM(2, 4), method=rarefy.Wanda(), permute=True, rotate=True)
    original = make_model("llama").to(torch.bfloat16)
    difference = (_logits(model.float()) - _logits(original.float())).norm()
    assert 0 < difference < 0.01 * _logits(original).norm()  # 2^-9 for each of a few weights


# --- what is pruned of it


@pytest.mark.parametrize("options", [{"permute": True}, {"rotate": True}, BOTH], ids=str)
@pytest.mark.parametrize("method", [rarefy.Wanda(), rarefy.ALPS()], ids=str)
def test_the_layers_that_read_inner_dimensions_lose_less(method: rarefy.Method, options: dict[str, bool]) -> None:
    plain, changed = (
        {record.name: record for record in _pruned("llama", method=method, **some)[1].layers}
        for some in ({}, options)
    )
    better = []
    if "permute" in options:
        better += ["mlp.down_proj"]
    better += ["self_attn.o_proj"] + (["self_attn.v_proj"] if "rotate" in options else [])
    for kind in better:
        name = f"model.layers.0.{kind}"  # what enters the second block is another thing in each run
        assert changed[name].relative_error < plain[name].relative_error, kind
    first = changed["model.layers.0.self_attn.o_proj"].details
    assert ("order" in first) == ("permute" in options)
    assert ("rotation" in first) == ("rotate" in options)
    # A layer that reads the residual stream, of which only the rows change places, loses the same.
    for kind in ("self_attn.q_proj", "mlp.gate_proj"):
        expected = plain[f"model.layers.0.{kind}"].relative_error
        if (method.name == "wanda" and "rotate" not in options) or kind == "self_attn.q_proj":
            assert changed[f"model.layers.0.{kind}"].relative_error == pytest.approx(expected, rel=1e-4)


def test_masks_are_those_of_the_pattern() -> None:
    model, report = _pruned("llama", permute=True, rotate=True, method=rarefy.ALPS())
    for block in find_blocks(model):
        for site in block.sites:
            assert not list(NM(2, 4).excess(site.read() != 0))
    assert report.sparsity == 0.5


def test_the_same_run_gives_the_same_bits() -> None:
    one, two = (_pruned("llama", permute=True, rotate=True, include=["*.0.*"])[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_rotation_helps_other_patterns_too() -> None:
    plain, rotated = (
        {record.name: record for record in _pruned("llama", pattern=Unstructured(0.5), rotate=some)[1].layers}
        for some in (False, True)
    )
    for kind in ("v_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{kind}"
        assert rotated[name].relative_error < plain[name].relative_error


def test_it_goes_with_the_dense_path() -> None:
    _, report = _pruned("llama", permute=True, rotate=True, drift=0.25, matching=rarefy.Matching(1))
    assert not report.failed


# --- what cannot be changed


def test_an_order_without_groups_is_refused_before_anything_changes() -> None:
    model = make_model("llama")
    with pytest.raises(InputError, match="^permute goes with an N:M pattern only: for unstructured 50%"):
        rarefy.prune(model, WINDOWS, pattern=Unstructured(0.5), method=rarefy.Wanda(), permute=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make_model("llama").parameters()))


def test_without_a_layer_that_gains_it_is_refused() -> None:
    with pytest.raises(ModelError, match="^rotate needs dimensions inside attention heads"):
        _pruned("llama", rotate=True, include=["*.mlp.*"])
    with pytest.raises(ModelError, match="^permute needs MLP neurons or"):
        _pruned("llama", permute=True, include=["*.q_proj"])


def test_heads_that_groups_would_cross_keep_their_order() -> None:
    _, report = _pruned("llama", pattern=NM(8, 16), permute=True)  # heads are 8 wide
    details = {record.name.split(".", 3)[-1]: record.details for record in report.layers}
    assert "order" in details["mlp.down_proj"]
    assert "order" not in details["self_attn.o_proj"]


@pytest.mark.usefixtures("left_dense")
def test_what_does_not_compute_the_same_is_left_alone_and_said() -> None:
    """A norm with weights between the value projection and the output projection."""
    model = make_model("llama")
    original = make_model("llama")
    for some in (model, original):
        for block in find_blocks(some):
            block.module.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args: (args[0] * torch.linspace(0.5, 2, 32),)
            )
    with pytest.warns(UserWarning, match="it does not compute the same|in another one") as warned:
        rarefy.prune(model, WINDOWS, pattern=NM(2, 4), method=rarefy.Wanda(), permute=True, rotate=True)
    texts = [str(warning.message) for warning in warned]
    assert len(texts) == 2  # once, for all blocks alike
    assert "o_proj reads keeps its order" in texts[0]
    assert "Nothing is rotated in model.layers.0" in texts[1]
    torch.testing.assert_close(_logits(model), _logits(original), rtol=0, atol=ROUNDING)
    attention = [block.module.self_attn for block in find_blocks(original)]
    for one, other in zip(attention, (block.module.self_attn for block in find_blocks(model))):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_a_run_writes_an_ordinary_model_that_holds_what_it_promised(shelf: Path, tmp_path: Path) -> None:
    recipe = {"model": str(shelf / "model"), "method": "wanda", "pattern": "2:4", "include": ["*.0.*"], **BOTH}
    recipe |= {"calibration": str(shelf / "text.txt"), "num_samples": 4, "sequence_length": 32}
    result = rarefy.run(recipe, tmp_path / "out", texts=False)
    assert result is not None
    assert rarefy.inspect_folder(tmp_path / "out").ok
    assert any("rotation" in layer.details for layer in result.report.layers)
    written, dense = (
        transformers.AutoModelForCausalLM.from_pretrained(path) for path in (result.folder.model, shelf / "model")
    )
    names = {name for name, old in dense.named_parameters() if not torch.equal(old, written.get_parameter(name))}
    assert names
    assert all(name.startswith("model.layers.0.") for name in names)


def test_a_recipe_is_refused_where_an_order_helps_nothing(tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="^--permute goes with an N:M pattern only"):
        rarefy.Recipe.read({"model": "m", "permute": True, "sparsity": 0.5})
    assert rarefy.Recipe.read({"model": "m", "permute": True, "pattern": "2:4"}).prune_settings().permute


# --- the order


def test_the_order_is_near_the_best_one() -> None:
    best, found = 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        E = torch.rand(5, 6, generator=generator).pow(4)
        every = [torch.tensor(order) for order in itertools.permutations(range(6))]
        best += max(kept_share(E, order, 1, 3) for order in every)
        order = choose_order(E, 1, 3)
        assert sorted(order.tolist()) == list(range(6))
        found += kept_share(E, order, 1, 3)
        assert kept_share(E, order, 1, 3) >= kept_share(E, torch.arange(6), 1, 3)
    assert best * 0.98 < found <= best * (1 + 1e-6)  # seen: 0.99; the order as it is has 0.87


def test_inputs_that_need_the_same_group_are_parted() -> None:
    """In each row two inputs matter; in the first order, 2:4 would lose one of three in some rows."""
    E = torch.zeros(4, 8)
    E[:, :4] = 1.0
    order = choose_order(E, 2, 4)
    assert kept_share(E, torch.arange(8), 2, 4) == 0.5
    assert kept_share(E, order, 2, 4) == 1.0


def test_an_order_of_nothing_is_the_one_that_is_there() -> None:
    assert choose_order(torch.zeros(3, 8), 2, 4).tolist() == list(range(8))
    assert choose_order(torch.rand(3, 4), 2, 4).tolist() == list(range(4))
    assert choose_order(torch.ones(3, 8), 2, 4).tolist() == list(range(8))  # which is as good as any
    assert kept_share(torch.zeros(3, 8), torch.arange(8), 2, 4) == 1.0


def test_many_rows_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    E = torch.rand(8, 16, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("rarefy.layer.order._ROWS", 3)
    assert torch.equal(choose_order(E, 2, 4), choose_order(E[::3], 2, 4))


def test_many_groups_are_assigned_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    E = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)).pow(4)
    whole = kept_share(E, choose_order(E, 2, 4), 2, 4)
    monkeypatch.setattr("rarefy.layer.order._GROUPS", 5)
    order = choose_order(E, 2, 4)
    assert sorted(order.tolist()) == list(range(64))
    parts = kept_share(E, order, 2, 4)
    as_it_is = kept_share(E, torch.arange(64), 2, 4)
    assert parts > as_it_is + 0.7 * (whole - as_it_is)  # seen: 0.85


# --- the rotation


def _some_heads(seed: int = 0) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    V, O = torch.randn(2, 4, 12, generator=generator), torch.randn(2, 2, 8, 4, generator=generator)  # noqa: E741
    X = torch.randn(2, 2, 40, 4, generator=generator) * torch.tensor([3.0, 1.0, 1.0, 0.5])
    return Heads(V, O, torch.rand(12, generator=generator) + 0.1, (X.mT @ X).inverse(), NM(2, 4), NM(2, 4))


def test_the_rotation_is_orthogonal_and_prunes_less() -> None:
    R, before, after = choose_rotation(_some_heads())
    torch.testing.assert_close(R @ R.mT, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-5)  # float32
    assert after < 0.95 * before


def test_the_pruned_share_is_that_of_the_rotated_weights() -> None:
    heads = _some_heads()
    R, before, after = choose_rotation(heads)
    for rotation, share in ((torch.eye(4).expand(2, 4, 4), before), (R, after)):
        total = 0.0
        V = torch.cat([rotation[g].T @ heads.V[g] for g in range(2)])
        energy = heads.V_energy
        assert energy is not None
        S = V.square() * energy
        total += float(S[~NM(2, 4).project(S)].sum() / S.sum())
        parts = []
        for g, c in itertools.product(range(2), range(2)):
            diagonal = (rotation[g].T @ heads.O_inverse[g, c] @ rotation[g]).diagonal()
            parts.append((heads.O[g, c] @ rotation[g]).square() / diagonal)
        S = torch.cat(parts, dim=1)
        total += float(S[~NM(2, 4).project(S)].sum() / S.sum())
        assert share == pytest.approx(total, rel=1e-4)


def test_a_known_rotation_is_undone() -> None:
    """Weights that 2:4 loses nothing of, rotated: most of what is then lost is won back."""
    heads = _some_heads()
    sparse = torch.where(NM(2, 4).project(heads.O.abs().flatten(0, 2)).view_as(heads.O), heads.O, 0.0)
    Q = torch.linalg.qr(torch.eye(4) + 0.4 * torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3))).Q
    turned = replace(heads, O=sparse @ Q.unsqueeze(1).mT, V_pattern=None, O_inverse=torch.eye(4).expand(2, 2, 4, 4))
    _, before, after = choose_rotation(turned)
    assert after < 0.5 * before


def test_where_nothing_is_better_nothing_is_rotated() -> None:
    heads = replace(_some_heads(), V_pattern=Unstructured(0.0), O_pattern=None)
    R, before, after = choose_rotation(heads)
    assert before == after == 0
    assert torch.equal(R, torch.eye(4).expand(2, 4, 4))
