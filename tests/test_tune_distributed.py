"""Two processes that tune one model: like one process, but for rounding; keep_zeros under DDP and FSDP2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models_for_tests import make_model, save_folder
from ranks_for_tests import Ranks
from tuning_for_tests import prune_by_magnitude

#: Of a weight in float32, after a few steps of AdamW, whose first steps have the sign of the gradient: where that
#: is rounding, a weight moves by the learning rate the one way or the other.
RATE = 1e-3
#: Of losses.
CLOSE = 1e-3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    save_folder(make_model("llama"), folder / "dense")
    save_folder(prune_by_magnitude(make_model("llama")), folder / "sparse")
    (folder / "text.txt").write_text("".join(f"{i} the quick brown fox jumps over the lazy dog; " for i in range(99)))
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("processes")) as runner:
        yield runner


def arguments(place: Path, output: Path, *more: object) -> list[object]:
    said = ["tune", place / "sparse", "--against", place / "dense", "-o", output, "--calibration", place / "text.txt"]
    sizes = ["--num-samples", 8, "--sequence-length", 32, "--batch-size", 4, "--held-out", 2, "--epochs", 3]
    return [*said, *sizes, "--learning-rate", RATE, "--warmup-steps", 1, "--precision", "float32", "-q", *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def tuning_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())["tuning"]
    return found


def same_masks(place: Path, output: Path) -> bool:
    old, new = load_file(place / "sparse" / "model.safetensors"), weights(output)
    return all(torch.equal(old[name] != 0, new[name] != 0) for name in old if "proj" in name)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_two_processes_are_like_one(form: str, place: Path, ranks: Ranks, tmp_path: Path) -> None:
    for size in (1, 2):
        words = arguments(place, tmp_path / str(size), "--parametrisation", form)
        assert ranks.run(size, *words) == [0] * size, ranks.err()
    assert same_masks(place, tmp_path / "2")
    one, two = tuning_of(tmp_path / "1"), tuning_of(tmp_path / "2")
    assert one["steps"] == two["steps"] == 6
    for mine, theirs in zip(one["curve"], two["curve"], strict=True):
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=CLOSE)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=CLOSE)
    assert one["written"]["kl"] == pytest.approx(two["written"]["kl"], rel=CLOSE)
    assert one["trained"] == two["trained"]
    new, other = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name in new:
        difference = (new[name] - other[name]).abs()
        assert float(difference.max()) <= 2 * RATE, name
        assert float(difference.mean()) <= CLOSE * RATE, name
    assert json.loads((tmp_path / "2" / "run.json").read_text())["processes"] == 2


def test_a_batch_is_shared_equally(place: Path, ranks: Ranks, tmp_path: Path) -> None:
    words = arguments(place, tmp_path / "out", "--batch-size", 3)
    assert ranks.run(2, *words) == [2, 2]
    assert ranks.err() == (
        "error: --batch-size is 3, but must be a multiple of 2, a window of each batch or more for each process.\n"
    )


def test_two_processes_go_on_with_the_same_bits(place: Path, ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, *arguments(place, tmp_path / "whole")) == [0, 0], ranks.err()
    statuses = ranks.run(2, "call", "test_tune_distributed:killed", *arguments(place, tmp_path / "parts"))
    assert statuses == [9, 9], ranks.err()
    assert (tmp_path / "parts" / "unfinished" / "process-1").is_dir()
    assert ranks.run(2, *arguments(place, tmp_path / "parts")) == [0, 0], ranks.err()
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert tuning_of(tmp_path / "whole") == tuning_of(tmp_path / "parts")


def killed(*words: str) -> None:
    """The command, whose processes all die in the fourth step, after a state was kept of the third."""
    import os

    import rarefy.runs.tune as tune_module
    from rarefy.cli import main
    from rarefy.tuning.train import StepRecord, Tuner

    tune_module._SECONDS_BETWEEN_STATES = -1.0
    real = Tuner._train

    def train(self: Tuner, numbers: torch.Tensor) -> StepRecord:
        if self.step == 3:
            os._exit(9)
        return real(self, numbers)

    Tuner._train = train  # type: ignore[method-assign]
    main(list(words))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_zeros_are_kept_in_several_processes(how: str, ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, "call", f"test_tune_distributed:train_{how}", tmp_path) == [0, 0], ranks.err()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, mask in found[0]["before"].items():
        assert torch.equal(mask, found[0]["after"][name] != 0), name
        assert torch.equal(found[0]["after"][name], found[1]["after"][name]), name
    assert found[0]["changed"]


def train_ddp(folder: str) -> None:
    """Keep zeros under DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    from tuning_for_tests import site_masks

    def prepare(model: Any) -> tuple[Any, Any]:
        return DistributedDataParallel(model), lambda: site_weights(model)

    _train_together(folder, prepare, site_masks)


def train_fsdp(folder: str) -> None:
    """Keep zeros under FSDP2, with an optimiser that mixes nothing and one with momentum and weight decay."""
    from torch.distributed.fsdp import fully_shard

    from rarefy.tuning.shard import whole
    from tuning_for_tests import site_masks

    def prepare(model: Any) -> tuple[Any, Any]:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        names = set(site_masks_names(model))
        return model, lambda: {
            name.removesuffix(".weight"): whole(parameter.detach())
            for name, parameter in model.named_parameters()
            if name.removesuffix(".weight") in names
        }

    _train_together(folder, prepare, site_masks)


def site_weights(model: Any) -> dict[str, torch.Tensor]:
    from rarefy.models.blocks import find_blocks

    return {site.name: site.read() for block in find_blocks(model) for site in block.sites}


def site_masks_names(model: Any) -> list[str]:
    return [name.removesuffix(".weight") for name, _ in model.named_parameters() if "proj" in name]


def _train_together(folder: str, prepare: Any, masks_of: Any) -> None:
    import rarefy
    from rarefy.parallel.world import World, joined
    from tuning_for_tests import some_windows

    with joined() as _:
        world = World.current()
        model = prune_by_magnitude(make_model("llama")).requires_grad_(True)
        before, old = masks_of(model), site_weights(model)
        wrapped, weights_now = prepare(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        with rarefy.keep_zeros(wrapped):
            for step in range(3):
                ids = some_windows(2, 12, 10 * step + world.rank)
                wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        after = weights_now()
        changed = any(not torch.equal(old[name], value) for name, value in after.items())
        torch.save({"before": before, "after": after, "changed": changed}, f"{folder}/{world.rank}.pt")
        world.leave()
