"""What crosses from block to block besides hidden states: carried through a run, and through its interruption."""

from __future__ import annotations

import os
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models_for_tests import VOCABULARY, build, save_folder
from rarefy.calibration import carried
from rarefy.calibration.carried import Carried, FromBlock, SharedMapping
from rarefy.calibration.record import record
from rarefy.calibration.saved import load_stream, save_stream
from rarefy.calibration.spill import MappedStates
from rarefy.calibration.storage import WindowRows
from rarefy.calibration.stream import BlockCall, HiddenStates, convert_calls
from rarefy.calibration.trees import at, mapped, tensors_in
from rarefy.errors import ModelError, OutputError
from rarefy.pruning.records import LayerRecord
from rarefy.pruning.stores import BlockStore
from small_architectures import small_config
from test_stores import Way, _assert_equal, _Halve, _in_memory, _kept, _prune, _streamed

_WINDOWS = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def _gemma4() -> PreTrainedConfig:
    """Three blocks, of which the last reads the keys and values of the one before it."""
    types = ["full_attention"] * 3
    config = CONFIG_MAPPING["gemma4_text"]
    return small_config(config, num_hidden_layers=3, layer_types=types, num_kv_shared_layers=1)


def _glm() -> PreTrainedConfig:
    """Three blocks, of which the last two read the indices that the first has chosen."""
    kinds = ["full", "shared", "shared"]
    config = CONFIG_MAPPING["glm_moe_dsa"]
    layers = {"num_hidden_layers": 3, "layer_types": ["indexed_attention"] * 3, "mlp_layer_types": ["dense"] * 3}
    return small_config(config, **layers, indexer_types=kinds)


@pytest.fixture(scope="module", params=[_gemma4, _glm], ids=["gemma4", "glm"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("carried")
    return save_folder(build(request.param()).to(torch.bfloat16), folder)


each_way = pytest.mark.parametrize("way", [_kept, _streamed])


def _interrupt_in(block: int) -> Callable[[LayerRecord], None]:
    def on_layer(record: LayerRecord) -> None:
        if record.block == block:
            raise KeyboardInterrupt

    return on_layer


# --- Runs


@pytest.mark.parametrize(("way", "offload"), [(_kept, False), (_streamed, True)])
def test_an_interrupted_run_has_what_earlier_blocks_handed_on(
    folder: Path, tmp_path: Path, way: Way, offload: bool
) -> None:
    model = _in_memory(folder)
    expected = _prune(BlockStore(model)), model.state_dict()
    states = tmp_path / "offload" if offload else None
    for block in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            way(folder, tmp_path / "out", states, on_layer=_interrupt_in(block))
    saved = sorted((tmp_path / "out" / "unfinished").glob("states-*"))
    assert len(saved) > 1  # hidden states, and what is carried beside them
    seen: list[LayerRecord] = []
    _assert_equal(way(folder, tmp_path / "out", states, on_layer=seen.append), expected)
    assert {record.block for record in seen} == {2}
    assert not offload or not list((tmp_path / "offload").iterdir())


@each_way
def test_both_paths_carry_their_own(folder: Path, tmp_path: Path, way: Way) -> None:
    model = _in_memory(folder)
    whole = _Halve()
    expected = _prune(BlockStore(model), steps=[whole]), model.state_dict()
    with pytest.raises(KeyboardInterrupt):
        way(folder, tmp_path / "out", on_layer=_interrupt_in(2), steps=[_Halve()])
    step = _Halve()
    _assert_equal(way(folder, tmp_path / "out", steps=[step]), expected)
    assert torch.equal(step.leaving_dense[-1], whole.leaving_dense[-1])
    outputs = []
    dense = _in_memory(folder)
    dense.model.layers[2].register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        for start in range(0, 5, 2):
            dense(_windows_of_stores()[start : start + 2], use_cache=False)
    dense_path = torch.cat([output[0] if isinstance(output, tuple) else output for output in outputs])
    # bfloat16 has three digits, of values of about 1; in float32 they would be equal to six
    torch.testing.assert_close(whole.leaving_dense[-1].float(), dense_path.float(), rtol=0.05, atol=0.05)


def _windows_of_stores() -> Tensor:
    import test_stores

    return test_stores._WINDOWS


def test_what_was_carried_and_is_lost_is_computed_again(folder: Path, tmp_path: Path) -> None:
    model = _in_memory(folder)
    expected = _prune(BlockStore(model)), model.state_dict()
    with pytest.raises(KeyboardInterrupt):
        _streamed(folder, tmp_path / "out", on_layer=_interrupt_in(2))
    for file in (tmp_path / "out" / "unfinished").glob("states-*-*-*.bin"):
        file.unlink()
    with pytest.warns(UserWarning, match=r"They are computed again from the finished blocks\.$"):
        _assert_equal(_streamed(folder, tmp_path / "out"), expected)


# --- Parts


def test_what_crosses_is_found_in_the_calls() -> None:
    model = build(_glm())
    stream = record(model, list(model.model.layers), _WINDOWS, 2)
    assert stream.carried.last_reader == {FromBlock(0, (1,)): 1, FromBlock(1, (1,)): 2}
    model = build(_gemma4())
    stream = record(model, list(model.model.layers), _WINDOWS, 2)
    shared = [stream.calls[block][batch].kwargs["shared_kv_states"] for block in range(3) for batch in range(3)]
    assert all(isinstance(mapping, SharedMapping) and mapping.content == {} for mapping in shared)
    assert len({mapping.number for mapping in shared}) == 1


@pytest.mark.parametrize("offload", [False, True])
def test_large_arguments_of_one_batch_are_put_away_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    model = build(_gemma4())
    layers = list(model.model.layers)
    expected = record(model, layers, _WINDOWS, 2)
    monkeypatch.setattr("rarefy.calibration.record._LARGE", 1)
    released: list[int] = []
    release = MappedStates.release
    monkeypatch.setattr(MappedStates, "release", lambda self: (released.append(id(self)), release(self))[1])
    stream = record(model, layers, _WINDOWS, 2, tmp_path if offload else None)
    kinds = [[type(call.args[0]) for call in calls] for calls in stream.calls]
    assert kinds == [[Tensor, *[WindowRows if offload else Tensor] * 2]] * 3  # the first batch shows what is shared
    assert not list(tmp_path.iterdir())
    for block in range(3):
        for batch, windows in stream.slices():
            opened, plain = (
                each.carried.open(each.calls[block][batch].args, each.calls[block][batch].kwargs, windows)
                for each in (stream, expected)
            )
            assert torch.equal(opened.args[0], plain.args[0])
            assert opened.kwargs.keys() == plain.kwargs.keys()
            assert (len(opened.files) == 1) == (offload and batch > 0)
    for each in (stream, expected):
        released.clear()
        for block, layer in enumerate(layers):
            each.advance(layer, block)
        assert (len(set(released)) > 2) == (offload and each is stream)
    assert torch.equal(stream.states, expected.states)


def test_half_precision_arguments_follow_the_weights_and_others_do_not(tmp_path: Path) -> None:
    half, full, whole = (torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.int64))
    call = BlockCall((half, full, whole, WindowRows(half)), {"again": half})
    stream = HiddenStates(torch.zeros(2, 1, 1), 2, torch.device("cpu"), [[call]])
    for dtype in (torch.float32, torch.bfloat16):
        convert_calls(stream, dtype)
        opened = stream.carried.open(call.args, call.kwargs, slice(0, 2), dtype)
        assert [tensor.dtype for tensor in opened.args] == [torch.float32, torch.float32, torch.int64, dtype]
        assert opened.kwargs["again"] is opened.args[0]


class _Grows(nn.Module):
    """A block that writes into a container within the mapping."""

    def forward(self, hidden: Tensor, _: Any, shared: Any) -> tuple[Tensor, Tensor]:
        if "deep" not in shared:
            shared["deep"] = {}
        shared["deep"][len(shared["deep"])] = hidden[:, 0]
        return hidden + 1, hidden[:, 0]


def test_what_grows_within_a_mapping_is_carried() -> None:
    stream = _stream()
    before = stream.states.clone()
    for block in (0, 1):
        stream.advance(_Grows(), block)
    deep = stream.carried.open(stream.calls[2][0].args, {}, slice(0, 2)).args[1]["deep"]
    assert list(deep) == [0, 1]
    assert torch.equal(deep[1], before[:2, 0] + 1)


class _Two(nn.Module):
    """A block that puts out what it was given last time as well."""

    def forward(self, hidden: Tensor, before: Tensor | None, shared: Any) -> tuple[Tensor, Tensor]:
        shared["pair"] = (hidden + 1, [hidden.long()])
        return hidden * 2, hidden[:, 0] if before is None else before + hidden[:, 0]


def _stream(num: int = 5, offload: Path | None = None) -> HiddenStates:
    shared = SharedMapping(0, UserDict(), {"constant": torch.ones(2)})
    calls = [
        [BlockCall((None if block == 0 else FromBlock(block - 1, (1,)), shared), {}) for _ in range(3)]
        for block in range(3)
    ]
    held = Carried(offload=offload, last_reader={FromBlock(0, (1,)): 1, FromBlock(1, (1,)): 2})
    states = torch.arange(float(num * 6)).view(num, 3, 2)
    return HiddenStates(states, 2, torch.device("cpu"), calls, carried=held)


@pytest.mark.parametrize("offload", [False, True])
def test_outputs_and_mappings_are_carried_by_window_and_dropped_when_read(tmp_path: Path, offload: bool) -> None:
    stream = _stream(offload=tmp_path if offload else None)
    before = stream.states.clone()
    stream.advance(_Two(), 0)
    other = stream.fork(tmp_path if offload else None)
    assert sorted(stream.carried.values) == [
        '["mapping", 0, ["dict", "pair"], ["tuple", 0]]',
        '["mapping", 0, ["dict", "pair"], ["tuple", 1], ["list", 0]]',
        '["output", 0, 1]',
    ]
    for path in (stream, other):
        opened = path.carried.open(path.calls[1][2].args, {}, slice(4, 6))
        assert torch.equal(opened.args[0], before[4:, 0])
        assert isinstance(opened.args[1], UserDict)
        assert torch.equal(opened.args[1]["constant"], torch.ones(2))
        first, (second,) = opened.args[1]["pair"]
        assert torch.equal(first, before[4:] + 1)
        assert torch.equal(second, before[4:].long())
    stream.advance(_Two(), 1)
    assert '["output", 0, 1]' not in stream.carried.values
    assert torch.equal(stream.carried.values['["output", 1, 1]'].tensor, 3 * before[:, 0])
    assert torch.equal(other.carried.values['["output", 0, 1]'].tensor, before[:, 0])  # goes on by itself
    stream.advance(_Two(), 2)
    assert not any("output" in name for name in stream.carried.values)
    assert not list(tmp_path.iterdir())


def test_a_pass_without_advancing_leaves_what_is_carried() -> None:
    stream = _stream()
    stream.advance(_Two(), 0)
    before = {name: rows.tensor.clone() for name, rows in stream.carried.values.items()}
    for batch, windows in stream.slices():
        stream.run(_Two(), 1, batch, windows)
    assert before.keys() == stream.carried.values.keys()
    assert all(torch.equal(rows.tensor, before[name]) for name, rows in stream.carried.values.items())


@pytest.mark.parametrize("loaded", [(5,), (2, 3), (1, 1, 3)])
def test_what_is_carried_is_loaded_by_another_number_of_processes(tmp_path: Path, loaded: tuple[int, ...]) -> None:
    whole = _stream(6)
    whole.advance(_Two(), 0)
    parts, start = [], 0
    for count in (4, 2):
        stream = _stream(6)
        stream.states = stream.states[start : start + count].clone()
        stream.__post_init__()
        stream.advance(_Two(), 0)
        parts += save_stream(tmp_path, 1, stream, start)
        parts += save_stream(tmp_path, 1, stream, start, path="dense")
        start += count
    assert len({part.file for part in parts}) == len(parts) == 16
    start = 0
    for count in loaded:
        for path in ("pruned", "dense"):
            stream = _stream(count)
            load_stream(tmp_path, parts, stream, start, path=path)
            assert torch.equal(stream.states, whole.states[start : start + count])
            assert stream.carried.values.keys() == whole.carried.values.keys()
            for name, rows in stream.carried.values.items():
                assert torch.equal(rows.tensor, whole.carried.values[name].tensor[start : start + count])
                assert rows.tensor.dtype == whole.carried.values[name].tensor.dtype
        start += count
    (tmp_path / parts[1].file).write_bytes(b"")
    with pytest.raises(OutputError, match="is damaged"):
        load_stream(tmp_path, parts, _stream(5))


class _Puts(nn.Module):
    def __init__(self, value: Any, key: Any = "key") -> None:
        super().__init__()
        self.value, self.key = value, key

    def forward(self, hidden: Tensor, _: Any, shared: Any) -> tuple[Tensor, Any]:
        shared[self.key] = self.value
        return hidden, hidden[:, 0]


@pytest.mark.parametrize(
    ("value", "key", "words"),
    [
        (torch.ones(3), "key", r"shape \(3,\) on to later blocks beside the hidden states of 2 windows"),
        (torch.ones(()), "key", r"shape \(\) on to later blocks"),
        (None, "key", r"NoneType on to later blocks"),
        (torch.ones(2), ("a", "b"), r"writes to \('a', 'b'\) in a mapping"),
    ],
)
def test_what_cannot_be_carried_is_one_sentence(value: Any, key: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        _stream().advance(_Puts(value, key), 0)


def test_an_output_that_is_not_there_is_one_sentence() -> None:
    class Nothing(nn.Module):
        def forward(self, hidden: Tensor, *_: Any) -> tuple[Tensor]:
            return (hidden,)

    with pytest.raises(ModelError, match=r"^Block 0 hands NoneType on to later blocks"):
        _stream().advance(Nothing(), 0)


_trees = st.recursive(
    st.integers(0, 99).map(lambda number: torch.tensor([number])),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "b", 3]), inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


@given(_trees)
def test_nested_containers_are_built_again_from_their_names(tree: Any) -> None:
    named = {carried._name_of_entry(7, steps): leaf for steps, leaf in carried._leaves(tree, (("dict", "x"),))}
    entries = [(steps, named[name]) for name, number, steps in carried._entries(named) if number == 7]
    built = carried._built(entries)["x"]
    assert _plain(built) == _plain(tree)


@given(_trees)
def test_trees_are_copied_with_every_tensor_changed(tree: Any) -> None:
    copied = mapped(tree, lambda _, leaf: leaf + 1)
    places = dict(tensors_in(tree))
    assert places.keys() == dict(tensors_in(copied)).keys()
    for place, tensor in places.items():
        assert torch.equal(at(copied, place), tensor + 1)
        assert at(tree, place) is tensor


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return type(value)(_plain(child) for child in value)
