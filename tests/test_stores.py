"""One loop for models in memory and on disk: the same bits whichever way, and after any interruption."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import rarefy
from models_for_tests import _EXPERTS, _GROUPED, VOCABULARY, build, make_model
from rarefy.errors import OutputError
from rarefy.layer.pattern import Pattern, pattern_from_spec
from rarefy.models.blocks import Block, find_blocks
from rarefy.models.sites import Site
from rarefy.models.source import resolve_model
from rarefy.models.streaming import StreamedModel
from rarefy.pruning.loop import prune_blocks
from rarefy.pruning.records import LayerRecord, Report
from rarefy.pruning.settings import PruneSettings, Uniform
from rarefy.pruning.steps import BlockStep, PrunedBlock
from rarefy.pruning.stores import BlockStore, JournaledStore, StreamedStore
from rarefy.runs.fingerprint import Fingerprint
from rarefy.runs.journal import Journal

_WINDOWS = torch.randint(3, VOCABULARY, (5, 20), generator=torch.Generator().manual_seed(0))
_CONFIGS = {
    "llama": lambda: LlamaConfig(**{**_GROUPED, "num_hidden_layers": 3}),
    "mixtral": lambda: MixtralConfig(**{**_EXPERTS, "num_hidden_layers": 3}, num_local_experts=4),
}


@pytest.fixture(scope="module", params=_CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks in bfloat16, in several files."""
    folder = tmp_path_factory.mktemp(request.param)
    model = build(_CONFIGS[request.param]()).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def _in_memory(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().requires_grad_(False)


def _prune(
    store: BlockStore,
    include: Sequence[str] = (),
    on_layer: Callable[[LayerRecord], None] | None = None,
    steps: Sequence[BlockStep] = (),
) -> Report:
    pattern = Uniform(rarefy.PerRow(0.5))
    settings = PruneSettings(pattern, rarefy.SparseGPT(), batch_size=2, include=include, steps=steps)
    return prune_blocks(store, _WINDOWS, settings, on_layer=on_layer)


def _open_journal(output: Path, folder: Path) -> Journal:
    return Journal(output).open(Fingerprint.of({"method": "sparsegpt"}, folder, _WINDOWS))


def _kept(folder: Path, output: Path, offload: Path | None = None, **more: Any) -> tuple[Report, dict[str, Tensor]]:
    with _open_journal(output, folder) as journal:
        store = JournaledStore(_in_memory(folder), journal, offload)
        return _prune(store, **more), store.model.state_dict()


def _streamed(
    folder: Path, output: Path, offload: Path | None = None, **more: Any
) -> tuple[Report, dict[str, Tensor]]:
    streamed = StreamedModel(resolve_model(str(folder)))
    with _open_journal(output, folder) as journal:
        store = StreamedStore(streamed, journal, torch.device("cpu"), offload)
        store.prepare(3)
        report = _prune(store, **more)
        assert all(parameter.is_meta for parameter in streamed.model.parameters())
        for file in folder.glob("config.json"):
            (journal.model / file.name).write_bytes(file.read_bytes())
        return report, _in_memory(journal.model).state_dict()


each_way = pytest.mark.parametrize("way", [_kept, _streamed])
Way = Callable[..., tuple[Report, dict[str, Tensor]]]


def _facts(records: list[LayerRecord]) -> list[tuple[object, ...]]:
    return [(one.name, one.block, one.kept, one.relative_error, one.status, one.details) for one in records]


def _assert_equal(found: tuple[Report, dict[str, Tensor]], expected: tuple[Report, dict[str, Tensor]]) -> None:
    assert _facts(found[0].layers) == _facts(expected[0].layers)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert tensor.dtype == found[1][name].dtype
        assert torch.equal(tensor, found[1][name]), name


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[Report, dict[str, Tensor]]:
    """What pruning in memory makes of the model."""
    model = _in_memory(folder)
    return _prune(BlockStore(model)), model.state_dict()


@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
@each_way
@pytest.mark.parametrize("offload", [False, True])
def test_the_same_bits_as_in_memory(
    folder: Path, tmp_path: Path, expected: tuple[Report, dict[str, Tensor]], way: Way, offload: bool
) -> None:
    found = way(folder, tmp_path / "out", tmp_path / "offload" if offload else None)
    _assert_equal(found, expected)
    dense = _in_memory(folder).state_dict()
    pruned = [name for name, tensor in expected[1].items() if not torch.equal(tensor, dense[name])]
    assert len(pruned) >= 12  # it was not the dense model
    assert not offload or not list((tmp_path / "offload").iterdir())


@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
@each_way
def test_an_interrupted_run_ends_with_the_same_bits(
    folder: Path, tmp_path: Path, expected: tuple[Report, dict[str, Tensor]], way: Way
) -> None:
    total = len(expected[0].layers)

    def interrupt_at(layer: int) -> Callable[[LayerRecord], None]:
        left = [layer]

        def on_layer(_: LayerRecord) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        return on_layer

    # in the first block; in the second; in the last; and each of them starts where the one before ended
    for layer in (1, total // 3 + 2, total // 3 + 1):
        with pytest.raises(KeyboardInterrupt):
            way(folder, tmp_path / "out", on_layer=interrupt_at(layer))
    seen: list[LayerRecord] = []
    found = way(folder, tmp_path / "out", on_layer=seen.append)
    assert {record.block for record in seen} == {2}
    _assert_equal(found, expected)
    seen.clear()
    _assert_equal(way(folder, tmp_path / "out", on_layer=seen.append), expected)  # killed before it was published
    assert not seen


@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
@each_way
@pytest.mark.parametrize("damage", ["lost", "damaged"])
def test_lost_states_are_computed_again(
    folder: Path, tmp_path: Path, expected: tuple[Report, dict[str, Tensor]], way: Way, damage: str
) -> None:
    def interrupt(record: LayerRecord) -> None:
        if record.block == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        way(folder, tmp_path / "out", on_layer=interrupt)
    (file,) = (tmp_path / "out" / "unfinished").glob("states-*")
    if damage == "lost":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1  # in the last window, when the others are loaded already
        file.write_bytes(content)
    seen: list[LayerRecord] = []
    with pytest.warns(UserWarning, match=r"states-.* They are computed again from the finished blocks\.$"):
        found = way(folder, tmp_path / "out", on_layer=seen.append)
    assert {record.block for record in seen} == {2}
    _assert_equal(found, expected)


@each_way
def test_blocks_without_a_layer_to_prune_are_finished_too(folder: Path, tmp_path: Path, way: Way) -> None:
    include = ["model.layers.1.*.o_proj"]
    model = _in_memory(folder)
    expected = _prune(BlockStore(model), include=include), model.state_dict()
    _assert_equal(way(folder, tmp_path / "out", include=include), expected)
    with _open_journal(tmp_path / "out", folder) as journal:
        assert journal.finished == 2
    _assert_equal(way(folder, tmp_path / "out", include=include), expected)


@pytest.mark.parametrize("damage", ["cut", "bit", "lost"])
def test_damaged_or_lost_weights_are_one_sentence(folder: Path, tmp_path: Path, damage: str) -> None:
    """And not a run that goes on with other weights, and finds at its end that they do not hold what was promised."""
    _kept(folder, tmp_path / "out", include=["model.layers.0.*.o_proj"])
    (file,) = (tmp_path / "out" / "unfinished").glob("weights-*")
    content = file.read_bytes()
    if damage == "lost":
        file.unlink()
    else:
        file.write_bytes(content[:-5] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    match = rf"weights-00000.safetensors is {'missing' if damage == 'lost' else 'damaged'}, .* begin anew\.$"
    with pytest.raises(OutputError, match=match):
        _kept(folder, tmp_path / "out")


class _Halve:
    """A step that changes every parameter of a block, and moves it towards the dense path's mean."""

    needs_dense_path = True
    needs_dense_weights = False

    def check_pattern(self, *_: object) -> None:
        pass

    def __init__(self) -> None:
        self.seen: list[PrunedBlock] = []
        self.leaving_dense: list[Tensor] = []

    def num_parts(self, block: Block, num_batches: int) -> int:
        return 1

    def __call__(self, pruned: PrunedBlock, on_part: Callable[[], None]) -> None:
        assert pruned.leaving_dense is not None
        self.seen.append(pruned)
        self.leaving_dense.append(pruned.leaving_dense.states.clone())
        factor = 0.5 + pruned.leaving_dense.states.abs().mean() / 1000
        with torch.no_grad():
            for parameter in pruned.block.module.parameters():
                parameter.mul_(factor.to(parameter.dtype))
        on_part()


def test_a_step_sees_the_masks_and_the_dense_path() -> None:
    model = make_model("llama")
    dense: list[list[Tensor]] = []
    blocks = find_blocks(model)
    hooks = [
        block.module.register_forward_hook(lambda _, __, output, i=block.index: dense[i].append(output))
        for block in blocks
    ]
    dense += [[] for _ in blocks]
    with torch.no_grad():
        for start in range(0, len(_WINDOWS), 2):
            model(_WINDOWS[start : start + 2], use_cache=False)
    for hook in hooks:
        hook.remove()
    step, progress = _Halve(), []
    settings = PruneSettings(Uniform(rarefy.NM(2, 4)), rarefy.Wanda(), batch_size=2, steps=[step])
    prune_blocks(BlockStore(model), _WINDOWS, settings, lambda *part: progress.append(part[:2]))
    assert progress == [(done, progress[-1][0]) for done in range(1, len(progress) + 1)]
    assert len(step.seen) == len(blocks)
    for pruned, leaving, outputs in zip(step.seen, step.leaving_dense, dense):
        outputs = [output[0] if isinstance(output, tuple) else output for output in outputs]
        torch.testing.assert_close(leaving, torch.cat(outputs), rtol=0, atol=1e-6)  # float32, values of about 1
        assert pruned.masks.keys() == {site.name for site in pruned.block.sites}
        for site in pruned.block.sites:
            rarefy.NM(2, 4).check(pruned.masks[site.name])
            assert not site.read()[~pruned.masks[site.name]].any()
            assert site.read()[pruned.masks[site.name]].all()  # no weight of a random model is zero


@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
@each_way
@pytest.mark.parametrize("offload", [False, True])
def test_all_parameters_that_a_step_changes_are_stored_and_resumed(
    folder: Path, tmp_path: Path, way: Way, offload: bool
) -> None:
    model = _in_memory(folder)
    expected = _prune(BlockStore(model), steps=[_Halve()]), model.state_dict()
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(expected[1][norm], _in_memory(folder).state_dict()[norm])

    def interrupt(record: LayerRecord) -> None:
        if record.block == 2:
            raise KeyboardInterrupt

    states = tmp_path / "offload" if offload else None
    with pytest.raises(KeyboardInterrupt):
        way(folder, tmp_path / "out", states, on_layer=interrupt, steps=[_Halve()])
    assert len(list((tmp_path / "out" / "unfinished").glob("states-*"))) == 2  # of both paths
    step = _Halve()
    _assert_equal(way(folder, tmp_path / "out", states, steps=[step]), expected)
    assert [pruned.block.index for pruned in step.seen] == [2]


@each_way
def test_a_lost_dense_path_is_one_sentence(folder: Path, tmp_path: Path, way: Way) -> None:
    def interrupt(record: LayerRecord) -> None:
        if record.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        way(folder, tmp_path / "out", on_layer=interrupt, steps=[_Halve()])
    (file,) = (tmp_path / "out" / "unfinished").glob("states-dense-*")
    file.unlink()
    with pytest.raises(OutputError, match=r"states-dense-"):
        way(folder, tmp_path / "out", steps=[_Halve()])


def test_each_site_gets_its_own_pattern() -> None:
    model = make_model("llama")

    def pattern_of(site: Site) -> Pattern:
        return rarefy.NM(1, 4) if "down_proj" in site.name else rarefy.PerRow(0.25)

    report = rarefy.prune(model, _WINDOWS, pattern=pattern_of, method=rarefy.Wanda())
    for layer in report.layers:
        expected = rarefy.NM(1, 4) if layer.kind == "down_proj" else rarefy.PerRow(0.25)
        assert layer.pattern == str(expected)
        assert pattern_from_spec(layer.pattern_spec) == expected
        expected.check(model.get_submodule(layer.name).weight != 0)
    assert report.pattern == "a pattern per layer"
