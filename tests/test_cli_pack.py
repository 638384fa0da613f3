"""``rarefy pack``, ``unpack`` and ``bench`` from outside, and the other commands on packed folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cli_for_tests import Rarefy, is_one_sentence, prune_arguments
from rarefy.models.shards import Shards
from rarefy.models.source import PACKED
from rarefy.packing.loading import packed_modules
from rarefy.packing.plugin import METHOD


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, shelf: Path) -> Path:
    """A folder with ``run``, pruned to 60 %, and ``packed``, the same packed; tests must not write into it."""
    from rarefy.cli import main

    folder = tmp_path_factory.mktemp("runs")
    run = prune_arguments(shelf, "--method", "magnitude", "--sparsity", 0.6, "-o", folder / "run", "--quiet")
    assert main([str(argument) for argument in run]) == 0
    assert main(["pack", str(folder / "run"), "-o", str(folder / "packed"), "--quiet"]) == 0
    return folder


def test_the_method_has_one_name() -> None:
    assert METHOD == PACKED


def test_packing_a_run_says_what_it_gained(rarefy_: Rarefy, runs: Path) -> None:
    done = rarefy_("pack", runs / "run", "-o", "packed")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "packed holds 14 of 14 weights packed, 60.0% of them zero"
    assert lines[1].startswith("packed weights: 0.0 MB instead of 0.1 (0.43")
    assert lines[2].startswith("all weights: ")
    facts = json.loads(rarefy_("pack", runs / "run", "-o", "again", "--json", "--values", "int8").out)
    assert (facts["values"], facts["packed_layers"], facts["output"]) == ("int8", 14, "again")
    tensors = Shards.open(Path("again")).tensors
    packed = [tensor.size for name, tensor in tensors.items() if "weight_" in name or f"{name}_mask" in tensors]
    assert facts["packed_bytes"] == sum(packed)


def test_unpacking_gives_the_same_files(rarefy_: Rarefy, runs: Path) -> None:
    done = rarefy_("unpack", runs / "packed", "-o", "dense")
    assert (done.status, done.out) == (0, "dense holds the ordinary model\n"), done.err
    before, after = runs / "run" / "model", Path("dense")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md"):
        assert (before / name).read_bytes() == (after / name).read_bytes(), name
    for name in ("layers.jsonl", "run.json", "recipe.yaml"):
        assert (runs / "run" / name).read_bytes() == (after / name).read_bytes(), name
    assert rarefy_("inspect", "dense").out.endswith("every promise is kept\n")


def test_inspect_counts_again_and_checks_the_promises_of_the_run(rarefy_: Rarefy, runs: Path) -> None:
    run, packed = (json.loads(rarefy_("inspect", runs / name, "--json").out) for name in ("run", "packed"))
    assert packed["ok"]
    assert packed["promised"]
    assert [(layer["name"], layer["zeros"], layer["pattern"]) for layer in packed["layers"]] == [
        (layer["name"], layer["zeros"], layer["pattern"]) for layer in run["layers"]
    ]


def test_a_broken_promise_is_seen_in_a_packed_folder(rarefy_: Rarefy, runs: Path) -> None:
    shutil.copytree(runs / "packed", "packed")
    lines = Path("packed/layers.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    record["kept"] -= 100
    Path("packed/layers.jsonl").write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
    done = rarefy_("inspect", "packed")
    assert done.status == 1
    assert "zeros, promised were" in done.err


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_perplexity_is_that_of_the_dense_folder(rarefy_: Rarefy, runs: Path, shelf: Path, dtype: str) -> None:
    shutil.copytree(runs / "packed", "packed")
    few = ("--text", shelf / "text.txt", "--sequence-length", 32, "--max-windows", 4, "--dtype", dtype, "--json")
    dense = json.loads(rarefy_("eval", runs / "run" / "model", *few).out)
    done = rarefy_("eval", "packed", "--against", runs / "run" / "model", *few)
    packed = json.loads(done.out)
    assert packed["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-6)
    assert packed["kl"] == pytest.approx(0, abs=1e-6)
    assert packed["agreement"] == 1
    kept = json.loads(Path("packed/run.json").read_text())
    assert kept["perplexity"][-1]["value"] == packed["perplexity"]
    card = Path("packed/README.md").read_text()
    assert "## Packed" in card
    assert "## Perplexity" in card
    assert "not smaller and not faster" not in card


def test_the_report_reads_a_packed_run(rarefy_: Rarefy, runs: Path) -> None:
    shutil.copytree(runs / "packed", "packed")
    done = rarefy_("report", "packed", "--no-texts")
    assert done.status == 0, done.err
    assert Path("packed/report.html").stat().st_size > 10_000


def test_the_packed_folder_is_what_from_pretrained_reads(runs: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs / "packed")
    assert len(packed_modules(model)) == 14


def test_a_folder_without_a_run_is_packed_too(rarefy_: Rarefy, runs: Path) -> None:
    shutil.copytree(runs / "run" / "model", "model")
    assert rarefy_("pack", "model", "-o", "packed").status == 0
    assert not Path("packed/run.json").exists()
    assert rarefy_("inspect", "packed").status == 0
    assert rarefy_("unpack", "packed", "-o", "dense").status == 0


def test_values_that_are_rounded_are_named(rarefy_: Rarefy, runs: Path) -> None:
    done = rarefy_("pack", runs / "run", "-o", "packed", "--values", "int4")
    assert "rounded to the nearest int4 code" in done.err
    card = Path("packed/README.md").read_text()
    assert "codes of 4 bits, with a scale for every 64 inputs; rounded to the nearest by packing." in card


@pytest.mark.parametrize(("bits", "group"), [(8, 128), (4, 64)])
def test_what_a_method_has_rounded_is_packed_without_loss(
    rarefy_: Rarefy, shelf: Path, bits: int, group: int
) -> None:
    settings = ("--set", f"quantize.bits={bits}", "--set", f"quantize.group={group}")
    run = prune_arguments(shelf, "--method", "wanda+quantize", *settings, "--sparsity", 0.6, "-o", "run", "--quiet")
    assert rarefy_(*run).status == 0
    done = rarefy_("pack", "run", "-o", "packed", "--values", f"int{bits}", "--json")
    facts = json.loads(done.out)
    assert facts["rounded"] == 0
    assert f"values were int{bits} codes already, so nothing is lost" in done.err
    assert "exactly those that the method had chosen" in Path("packed/README.md").read_text()
    assert rarefy_("unpack", "packed", "-o", "dense").status == 0
    before, after = Shards.open(Path("run/model")).tensors, Shards.open(Path("dense")).tensors
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.read(), after[name].read()) for name, tensor in before.items())
    other = json.loads(rarefy_("pack", "run", "-o", "other", "--values", f"int{12 - bits}", "--json").out)
    assert other["rounded"] > 0  # its scale is not that of the other grid


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("pack SHELF/model -o out", "has nothing to pack: no layer holds 30% zeros (the most is 0.0%)."),
        ("pack RUNS/packed -o out", "is packed already."),
        ("pack RUNS/run -o out --values int2", "--values is 'int2', but must be auto, bf16, int8 or int4."),
        ("pack RUNS/run -o SHELF/model", "must be a new or empty folder; this one is not empty."),
        ("pack RUNS/nowhere -o out", "There is no folder"),
        ("pack SHELF/truncated -o out", "is damaged or cut off"),
        ("unpack RUNS/run -o out", "is not packed: its config.json does not say so."),
        ("unpack RUNS/packed -o SHELF/model", "must be a new or empty folder; this one is not empty."),
        ("prune RUNS/packed -o out", "is packed: `rarefy unpack` makes the ordinary model of it again."),
        ("bench RUNS/run", "is not packed: `rarefy pack"),
        ("bench RUNS/packed --threads 99999", "--threads is 99999, but must be a whole number from 1 to"),
        ("bench RUNS/packed --prompt-tokens 99999999", "--prompt-tokens is 99999999, but must be at most"),
        ("bench RUNS/packed --against SHELF/no_model", "is no model folder"),
        ("bench RUNS/packed --against RUNS/packed", "is packed: `rarefy unpack`"),
    ],
)
def test_every_mistake_is_one_sentence(
    rarefy_: Rarefy, runs: Path, shelf: Path, arguments: str, sentence: str
) -> None:
    done = rarefy_(*arguments.replace("SHELF", str(shelf)).replace("RUNS", str(runs)).split())
    assert is_one_sentence(done.err.splitlines(keepends=True)[-1]), done.err
    assert sentence in done.err
    assert (done.status, done.out) == (2, "")
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["eval", "unpack", "inspect", "bench"])
def test_a_damaged_packed_folder_is_one_sentence(rarefy_: Rarefy, runs: Path, shelf: Path, command: str) -> None:
    shutil.copytree(runs / "packed", "packed")
    weights = Path("packed/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 255  # masks come last
    weights.write_bytes(content)
    more = {"unpack": ["-o", "out"], "eval": ["--text", shelf / "text.txt", "--sequence-length", 32]}
    done = rarefy_(command, "packed", *more.get(command, []))
    last = done.err.splitlines(keepends=True)[-1]
    assert "is no packed weight" in last
    assert last.startswith("broken: " if command == "inspect" else "error: ")
    assert done.status == (1 if command == "inspect" else 2)
    assert not Path("out").exists()


def test_bench_measures_all_variants(rarefy_: Rarefy, runs: Path) -> None:
    few = ("--prompt-tokens", 12, "--new-tokens", 2, "--rounds", 1, "--threads", 1)
    threads = torch.get_num_threads()
    try:
        done = rarefy_("bench", runs / "packed", "--against", runs / "run", *few)
        assert done.status == 0, done.err
        facts = json.loads(rarefy_("bench", runs / "packed", *few, "--json").out)
    finally:
        torch.set_num_threads(threads)
    names = ["packed", "dense, default", "dense, without oneDNN"]
    assert [line.split("  ")[0] for line in done.out.splitlines()[2:5]] == names
    assert [variant["name"] for variant in facts["variants"]] == names
    packed, dense, _ = facts["variants"]
    for variant in facts["variants"]:
        assert variant["prefill_tokens_per_second"] > 0
        assert variant["decode_tokens_per_second"] > 0
        seconds = variant["seconds_per_token"]
        assert seconds["products"] > 0
        assert seconds["products"] + seconds["rest"] >= 0.99 / variant["decode_tokens_per_second"]
    assert packed["bytes_per_token"] < dense["bytes_per_token"]
    assert packed["weight_bytes"] < dense["weight_bytes"]
    assert facts["threads"] == 1


def test_bench_measures_single_products(rarefy_: Rarefy, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.cli.bench._BEYOND", 1 << 16)
    few = ("--prompt-tokens", 4, "--new-tokens", 1, "--rounds", 1, "--shapes")
    facts = json.loads(rarefy_("bench", runs / "packed", *few, "--json").out)
    shapes = {(shape["rows"], shape["width"], shape["batch"]): shape for shape in facts["shapes"]}
    assert sorted(shapes) == sorted(
        (*shape, batch) for shape in ((16, 32), (32, 32), (32, 64), (64, 32)) for batch in (1, 8)
    )
    square = shapes[32, 32, 1]
    assert square["number"] == 4
    assert square["zeros"] == pytest.approx(0.6, abs=0.01)
    assert set(square["dense"]) == {"default", "without oneDNN", "mv"}
    assert square["gain"] == min(square["dense"].values()) / square["packed"]
    assert "64 x 32" in rarefy_("bench", runs / "packed", *few).out
