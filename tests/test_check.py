"""The check of a model's blocks without weights: what cannot be replayed is said before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from cli_for_tests import Rarefy, is_one_sentence
from models_for_tests import ARCHITECTURES, EXPERT_ARCHITECTURES, make_model, save_folder
from rarefy.calibration.check import _globs, check_blocks
from rarefy.calibration.meta_pass import MetaPass
from rarefy.calibration.record import record
from rarefy.errors import ModelError
from rarefy.models.blocks import find_blocks, select_sites
from small_architectures import make, skeleton

WINDOWS = torch.randint(3, 100, (3, 8), generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """A block with two linears; ``inner`` is what it does between them."""

    def __init__(self, inner: Callable[[Layer, Tensor, Any], Any]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.left: Tensor | None = None
        self.inner = inner

    def forward(self, hidden: Tensor, given: Any = None) -> Any:
        return self.inner(self, hidden, given)


def plain(layer: Layer, hidden: Tensor, given: Any) -> Tensor:
    return hidden + layer.down(layer.up(hidden).relu())


class Toy(nn.Module):
    """A decoder of three blocks; ``between`` is what it does with a block's output, ``given`` what they all get."""

    def __init__(
        self,
        inner: Callable[[Layer, Tensor, Any], Any] = plain,
        between: Callable[[Any], tuple[Tensor, Any]] = lambda output: (output, None),
        order: tuple[int, ...] = (0, 1, 2),
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.layers = nn.ModuleList(Layer(inner) for _ in range(3))
        self.between, self.order = between, order

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden, given = self.embed(input_ids), None
        for index in self.order:
            hidden, given = self.between(self.layers[index](hidden, given))
        return hidden


def said_of(model: nn.Module) -> str:
    with pytest.raises(ModelError) as error:
        check_blocks(model, find_blocks(model))
    assert is_one_sentence(f"error: {error.value}\n")
    return str(error.value)


def with_extra(layer: Layer, hidden: Tensor, given: Any) -> tuple[Tensor, Tensor]:
    return plain(layer, hidden, given), hidden.mean(2) if given is None else given


def test_ordinary_blocks_pass() -> None:
    for model in (
        Toy(),
        Toy(with_extra, lambda output: output),
        Toy(lambda *args: [plain(*args), None], lambda output: tuple(output)),
    ):
        check_blocks(model, find_blocks(model))
        assert model.training
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
        assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXPERT_ARCHITECTURES])
def test_models_that_are_pruned_pass(architecture: str) -> None:
    model = make_model(architecture)
    check_blocks(model, find_blocks(model))


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ((0, 2), "The model runs only 2 of its 3 blocks on text, but"),
        ((0, 1, 2, 1), "in the order [0, 1, 2, 1], but"),
    ],
)
def test_blocks_out_of_order_are_refused(order: tuple[int, ...], words: str) -> None:
    model = Toy(order=order)
    assert words in said_of(model)
    with pytest.raises(ModelError, match=re.escape(words)):
        record(model, list(model.layers), WINDOWS, 2)


def in_place(output: Tensor) -> tuple[Tensor, None]:
    output *= 0.5
    return output, None


@pytest.mark.parametrize(
    "between", [lambda output: (output / 2, None), in_place, lambda output: (output.mT.mT + 0, 1)]
)
def test_changes_between_blocks_are_refused(between: Callable[[Any], tuple[Tensor, Any]]) -> None:
    model = Toy(between=between)
    words = r"^Toy changes hidden states between block 0 and block 1, but Rarefy replays nothing but blocks\.$"
    assert re.match(words, said_of(model))
    with pytest.raises(ModelError, match=words):
        record(model, list(model.layers), WINDOWS, 2)


def test_a_view_of_everything_changes_nothing() -> None:
    model = Toy(between=lambda output: (output[:, 0:, :], None))
    check_blocks(model, find_blocks(model))
    record(model, list(model.layers), WINDOWS, 2)


@pytest.mark.parametrize(
    "between", [lambda output: (output[0], output[1] * 2), lambda output: (output[0], output[1][:2])]
)
def test_what_is_made_of_an_output_between_blocks_is_refused(between: Callable[[Any], tuple[Tensor, Any]]) -> None:
    assert "takes what Toy has made of an earlier block's output between the two" in said_of(Toy(with_extra, between))


def test_what_has_no_row_for_each_window_is_refused() -> None:
    def inner(layer: Layer, hidden: Tensor, given: Any) -> Any:
        return plain(layer, hidden, given), hidden.sum((0, 1))

    assert "layers.1 takes what Toy has made" in said_of(Toy(inner, lambda output: output))


def test_what_is_left_somewhere_else_is_refused() -> None:
    model = Toy()
    first = model.layers[0]

    def leaving(layer: Layer, hidden: Tensor, given: Any) -> Tensor:
        if layer is first:
            first.left = hidden * 2
            return plain(layer, hidden, given)
        return plain(layer, hidden, given) + first.left

    for layer in model.layers:
        layer.inner = leaving
    assert said_of(model).startswith("Block 1 of Toy reads what an earlier block has left somewhere else than in its")


def test_what_all_blocks_read_and_none_has_made_is_fine() -> None:
    model = Toy()

    def caching(layer: Layer, hidden: Tensor, given: Any) -> Tensor:
        first = model.layers[0]
        if first.left is None:  # as positions are kept
            first.left = torch.arange(8, device=hidden.device, dtype=hidden.dtype)
        return plain(layer, hidden, given) + first.left

    for layer in model.layers:
        layer.inner = caching
    check_blocks(model, find_blocks(model))


def changes_its_input(layer: Layer, hidden: Tensor, given: Any) -> Tensor:
    hidden += 1
    return plain(layer, hidden, given)


def test_a_block_that_changes_what_it_is_called_with_is_refused() -> None:
    assert said_of(Toy(changes_its_input)) == "layers.0 changes what it is called with, which Rarefy cannot replay."
    log: list[int] = []

    def appends(layer: Layer, hidden: Tensor, given: Any) -> Tensor:
        if given is not None:
            given.append(1)
        return plain(layer, hidden, given)

    assert said_of(Toy(appends, lambda output: (output, log))).startswith("layers.1 changes what it is called with")


def test_a_block_that_puts_out_something_else_is_refused() -> None:
    model = Toy(lambda *args: (plain(*args),), lambda output: (output[0], None))
    model.layers[1].inner = with_extra
    assert "layers.1 puts out something else than the blocks before it" in said_of(model)


def test_blocks_that_are_not_called_with_hidden_states_are_refused() -> None:
    class Other(Toy):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            hidden = self.embed(input_ids)
            for layer in self.layers:
                hidden = layer(hidden=hidden)
            return hidden

    model = Other()
    words = "Other does not call block 0 with the hidden states of every window, which Rarefy needs."
    assert said_of(model) == words
    with pytest.raises(ModelError, match=re.escape(words)):
        record(model, list(model.layers), WINDOWS, 2)


def test_what_is_written_into_a_mapping_is_not_made_between_blocks() -> None:
    shared: dict[str, Tensor] = {}

    def writes(layer: Layer, hidden: Tensor, given: Any) -> Tensor:
        if given is not None:
            given["sum"] = given.get("sum", 0) + hidden
        return plain(layer, hidden, given)

    model = Toy(writes, lambda output: (output, shared))
    check_blocks(model, find_blocks(model))


def test_more_than_token_ids() -> None:
    words = "Gemma4UnifiedAssistantForCausalLM cannot be run on token ids alone: inputs_embeds and shared_kv_states"
    model = skeleton("gemma4_unified_assistant")
    assert said_of(model).startswith(words)

    class Needs(Toy):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            raise ValueError("image is\nmissing.")

    model = Needs()
    check_blocks(model, find_blocks(model))  # not a sentence of transformers: it may be for want of numbers
    with pytest.raises(ModelError, match=r"^Needs cannot be run on token ids alone: image is missing\.$"):
        record(model, list(model.layers), WINDOWS, 2)


def test_a_model_that_cannot_run_on_the_meta_device_passes() -> None:
    def inner(layer: Layer, hidden: Tensor, given: Any) -> Tensor:
        hidden.numpy(force=True)
        return plain(layer, hidden, given)

    model = Toy(inner, order=(0, 2))
    check_blocks(model, find_blocks(model))


# --- Sites that are never called


def uncalled(layer: Layer, hidden: Tensor, given: Any) -> Tensor:
    return hidden + layer.down((hidden @ layer.up.weight.T).relu())


def test_linears_that_are_used_without_their_module_are_refused_with_a_glob() -> None:
    model = Toy(uncalled)
    assert said_of(model) == (
        "Toy never calls 3 of its linears, layers.0.up for instance, so that Rarefy does not see what they read: "
        "leave them out with --exclude '*.up'."
    )
    check_blocks(model, select_sites(find_blocks(model), exclude=["*.up"]))


def test_where_calls_depend_on_numbers_it_is_not_known() -> None:
    def sometimes(layer: Layer, hidden: Tensor, given: Any) -> Tensor:
        return hidden if hidden.sum() > 0 else plain(layer, hidden, given)

    model = Toy(sometimes)
    check_blocks(model, find_blocks(model))


def test_of_blocks_with_experts_it_is_known_from_the_others() -> None:
    words = re.escape("never calls 4 of its linears, model.layers.0.mamba.dt_proj for instance, so that")
    with pytest.raises(ModelError, match=words):
        check_blocks(model := skeleton("jamba"), find_blocks(model))


@pytest.mark.parametrize(
    ("uncalled", "others", "globs"),
    [
        (["cross.q", "cross.k"], ["self.q", "self.k"], ["*.cross.*"]),
        (["attn.q"], ["attn.k", "mlp.up"], ["*.q"]),
        (["attn.q", "mlp.up"], ["attn.k", "mlp.q"], ["*.attn.q", "*.up"]),
    ],
)
def test_globs_are_short_and_match_nothing_else(uncalled: list[str], others: list[str], globs: list[str]) -> None:
    names = [f"model.layers.{block}.{place}" for block in range(2) for place in uncalled]
    everything = names + [f"model.layers.{block}.{place}" for block in range(2) for place in others]
    assert _globs(uncalled * 2, names, everything) == globs


def test_where_only_some_blocks_do_not_call_it_their_names_are_given() -> None:
    names = ["layers.0.q", "layers.1.q"]
    assert _globs(["q"], names[:1], names) == ["layers.0.q"]


def test_the_plan_refuses_before_text_is_written_and_pruning_before_anything_changes(
    rarefy_: Rarefy, tmp_path: Path
) -> None:
    model = make("mamba")
    save_folder(model, tmp_path / "model")
    done = rarefy_("prune", tmp_path / "model", "-o", tmp_path / "out", "--calibration", "self")
    assert done.status == 2
    assert is_one_sentence(done.err)
    assert done.err.endswith("leave them out with --exclude '*.dt_proj'.\n")
    assert not (tmp_path / "out").exists()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"--exclude '\*\.dt_proj'"):
        rarefy.prune(model, WINDOWS, pattern=rarefy.PerRow(0.5), method=rarefy.Wanda())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- The pass itself


def test_numbers_are_guessed_and_shapes_are_not() -> None:
    heard: list[Tensor] = []
    x = torch.empty(3, 4, device="meta")
    with MetaPass(heard.append) as meta:
        assert bool((x > 0).all()) is True
        assert float(x.sum()) == 1.0
        assert int(x.long().sum()) == 1
        assert (x > 0).nonzero().shape == (12, 2)
        assert x[x > 0].shape == (12,)
        assert x[torch.ones(3, device="meta", dtype=torch.bool)].shape == (3, 4)
        assert torch.bincount(x.long().flatten(), minlength=5).shape == (5,)
        assert meta.guesses == 7
        assert x[torch.zeros(2, device="meta", dtype=torch.long)].shape == (2, 4)
        assert meta.guesses == 7
        assert (x @ x.T).shape == (3, 3)
    assert not heard


def test_it_is_known_in_which_block_a_tensor_was_made() -> None:
    heard: list[Tensor] = []
    meta = MetaPass(heard.append)
    x = torch.empty(3, device="meta")
    with meta:
        meta.note([x])
        before = x + 1
        meta.block = 0
        first, constant = before * 2, torch.ones(3, device="meta") + 1
        meta.block = None
        between = first - 1
        meta.block = 1
        both, own = first + constant, before + constant
    made = [meta.made_in(tensor) for tensor in (x, before, constant, first, between, both, own)]
    assert made == [None, None, None, 0, 0, 1, 1]
    assert [id(tensor) for tensor in heard] == [id(first)]
