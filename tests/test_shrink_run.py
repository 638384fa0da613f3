"""``rarefy shrink``: a folder that transformers loads, what it says, what goes on from there, and mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load, save

import rarefy
from cli_for_tests import Rarefy, is_one_sentence
from models_for_tests import make_tokenizer, save_folder
from rarefy.runs.fingerprint import Fingerprint
from rarefy.runs.shrink_journal import ShrinkJournal
from rarefy.structure import exits, search
from rarefy.structure.depth import BlockSets
from test_shrink import deep


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with five blocks."""
    model = deep("llama", 5)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    return save_folder(model, tmp_path_factory.mktemp("llama"))


def arguments(shelf: Path, model: Path, *more: object) -> list[object]:
    text = shelf / "text.txt"
    return ["shrink", model, "--calibration", text, "--num-samples", 4, "--sequence-length", 32, *more]


def test_a_smaller_stock_model(rarefy_: Rarefy, shelf: Path, llama: Path) -> None:
    more = ["--blocks", 2, "--neurons", 0.25, "--multiple", 8, "--heads", 0.5, "-o", "out", "--no-texts"]
    done = rarefy_(*arguments(shelf, llama, *more))
    assert done.status == 0, done.err
    assert "removed blocks: " in done.out
    assert "out/model holds the model; it was loaded again and computes the same" in done.out
    words = r"neurons: mean relative error \S+, \S+ without repair; damping [0-9.]+( to [0-9.]+)?\n"
    assert re.search(words, done.out)
    folder = Path("out/model")
    small = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = small.config
    assert (config.num_hidden_layers, config.intermediate_size, config.num_key_value_heads) == (3, 48, 1)
    assert (config.num_attention_heads, config.head_dim) == (2, 8)
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2]
    assert small.generation_config.temperature == 0.5
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    small.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)

    facts = json.loads(Path("out/run.json").read_text())["shrink"]
    assert facts["after"]["parameters"] == small.num_parameters()
    assert (facts["before"]["blocks"], facts["after"]["blocks"]) == (5, 3)
    assert len(facts["blocks"]["removed"]) == 2
    assert len(facts["parts"]) == 6
    assert [one["kind"] for one in facts["dense_path"]] == ["neurons"] * 3
    assert all(one["drift_left"] < one["drift"] for one in facts["dense_path"])
    assert "hidden states apart from the dense model's: " in done.out
    card = (folder / "README.md").read_text()
    assert "2 of 5 blocks, 1 of 2 KV heads of each block, 16 of 64 MLP neurons of each block were removed" in card
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert (recipe["blocks"], recipe["by"]) == (2, "kl")
    again = rarefy_("shrink", "--recipe", "out/recipe.yaml", "-o", "again", "--no-texts", "--quiet")
    assert again.status == 0, again.err
    assert (folder / "model.safetensors").read_bytes() == Path("again/model/model.safetensors").read_bytes()


def test_blocks_whose_exits_cannot_aim_at_the_dense_model_are_removed_all_the_same(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path
) -> None:
    model = save_folder(deep("gemma3", 4), tmp_path / "gemma3")
    done = rarefy_(*arguments(shelf, model, "--blocks", 2, "--by", "kl", "-o", "out", "--no-texts"))
    assert done.status == 0, done.err
    assert "the repair does not aim at the dense model's hidden states: model.layers.0 does not add" in done.err
    facts = json.loads(Path("out/run.json").read_text())["shrink"]
    assert (facts["dense_path"], facts["repair"]) == ([], True)
    assert facts["no_dense_path"]
    whole = rarefy_(*arguments(shelf, model, "--blocks", 2, "--by", "kl", "-o", "plain", "--no-texts", "--no-repair"))
    assert whole.status == 0, whole.err
    models = [Path(name, "model/model.safetensors").read_bytes() for name in ("out", "plain")]
    assert models[0] == models[1]


def test_a_chain_of_commands(rarefy_: Rarefy, shelf: Path, llama: Path) -> None:
    text = shelf / "text.txt"
    assert rarefy_(*arguments(shelf, llama, "--blocks", 0.4, "--by", "kl", "-o", "small")).status == 0
    inspected = rarefy_("inspect", "small")
    assert inspected.status == 0, inspected.err
    evaluated = rarefy_("eval", "small", "--text", text, "--against", llama, "--sequence-length", 32)
    assert evaluated.status == 0, evaluated.err
    assert "## Distance from the dense model" in Path("small/model/README.md").read_text()
    windows = ["--calibration", text, "--num-samples", 4, "--sequence-length", 32]
    pruned = rarefy_("prune", "small", *windows, "--method", "wanda", "--sparsity", 0.6, "-o", "pruned", "--no-texts")
    assert pruned.status == 0, pruned.err
    packed = rarefy_("pack", "pruned", "-o", "packed")
    assert packed.status == 0, packed.err
    assert packed.out.startswith("packed holds 21 of 21 weights packed, 59.4% of them zero")
    ids = torch.randint(3, 160, (1, 16), generator=torch.Generator().manual_seed(0))
    found, expected = (
        transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in ("packed", "pruned/model")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # sums in another order
    reported = rarefy_("report", "small", "pruned", "packed")
    assert reported.status == 0, reported.err
    page = Path("small/report.html").read_text()
    assert "What was removed" in page
    assert "KL without it, nats of each block" in page
    assert "distance from the dense model of shrink" in page
    assert "small" in page
    assert "packed" in page


def test_a_dry_run_reads_no_weight(
    rarefy_: Rarefy, shelf: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rarefy.models.checkpoint.load_model", None)
    done = rarefy_(*arguments(shelf, llama, "--blocks", 2, "--dry-run"))
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "2 of 5 blocks would be removed"
    whole, small = deep("llama", 5).num_parameters(), deep("llama", 3).num_parameters()
    assert any(f"{whole:,}" in line and f"{small:,}" in line for line in lines)
    assert not Path("out").exists()


def search_arguments(shelf: Path, model: Path, *more: object) -> list[object]:
    return arguments(shelf, model, "--search", "--size", 0.8, "--multiple", 16, *more)


def test_a_search_for_a_size(rarefy_: Rarefy, shelf: Path, llama: Path) -> None:
    done = rarefy_(*search_arguments(shelf, llama, "-o", "out", "--no-texts"))
    assert done.status == 0, done.err
    assert "models were made; KL of this one to the dense model" in done.out
    facts = json.loads(Path("out/run.json").read_text())["shrink"]
    assert facts["after"]["parameters"] <= 0.8 * facts["before"]["parameters"]
    best = facts["search"]["best"]
    small = transformers.AutoModelForCausalLM.from_pretrained("out/model").config
    assert (small.num_hidden_layers, small.num_key_value_heads, small.intermediate_size) == (
        5 - best["blocks"],
        2 - best["heads"],
        64 - best["neurons"],
    )
    assert (facts["blocks"] or {"removed": []})["removed"] == best["remove"]
    assert not Path("out/unfinished").exists()
    assert "is what a search over" in Path("out/model/README.md").read_text()
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert (recipe["search"], recipe["size"]) == (True, 0.8)
    assert not {"among", "generations", "steps"} & set(recipe)  # which nothing reads here
    assert rarefy_("report", "out").status == 0
    assert "MLP neurons of each block" in Path("out/report.html").read_text()


def test_a_dry_run_of_a_search(rarefy_: Rarefy, shelf: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.models.checkpoint.load_model", None)
    done = rarefy_(*search_arguments(shelf, llama, "--among", "blocks,neurons", "--dry-run"))
    assert done.status == 0, done.err
    whole = deep("llama", 5).num_parameters()
    assert done.out.startswith(f"at most {int(0.8 * whole):,} of {whole:,} parameters would be left\n")
    lines = [line.split() for line in done.out.splitlines()]
    most = next(line[6:] for line in lines if line[:2] == ["MLP", "neurons"])
    assert most[0] == "0"
    assert int(most[1]) in (16, 32, 48)
    assert not any(line[:1] == ["KV"] for line in lines)
    assert "passes of one block over all windows, beside those of --by kl" in done.out
    done = rarefy_(*search_arguments(shelf, save_folder(deep("opt", 3), Path("opt")), "--dry-run"))
    assert done.status == 0, done.err
    assert "no heads are removed: OPTForCausalLM has no place in its config" in done.out


@pytest.mark.parametrize("stage", ["blocks", "candidates", "parts", "exits"])
def test_a_killed_run_goes_on(
    rarefy_: Rarefy, shelf: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    if stage == "candidates":
        asked = search_arguments(shelf, llama)
    elif stage == "exits":
        asked = arguments(shelf, llama, "--heads", 0.5)  # and MLPs that make up for them
    else:
        asked = arguments(shelf, llama, "--blocks", 2, "--by", "greedy", "--neurons", 0.5, "--multiple", 8)
    asked += ["--no-texts", "--quiet"]
    counted = {
        "blocks": (BlockSets, "_without_each"),
        "candidates": (search._Maker, "_made_and_measured"),
        "parts": (exits.ExitSolver, "exit"),
        "exits": (exits.ExitSolver, "exit"),
    }[stage]
    original, calls, last = getattr(*counted), [0], [0]

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == last[0]:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(*counted, killed)
    assert rarefy_(*asked, "-o", "whole").status == 0
    done = 2 if stage == "exits" else 1  # before it is killed: a whole block
    needed, last[0] = calls[0], calls[0] + done + 1
    assert needed > 1
    assert rarefy_(*asked, "-o", "out").status == 130
    assert {path.name for path in Path("out").iterdir()} == {"unfinished"}
    other = rarefy_(*arguments(shelf, llama, "--blocks", 1), "-o", "out")
    assert (other.status, is_one_sentence(other.err)) == (2, True), other.err
    assert "holds an unfinished run with blocks" in other.err
    calls[0] = last[0] = 0
    assert rarefy_(*asked, "-o", "out").status == 0
    assert calls[0] == needed - done  # what was finished is not done again
    for name in ("model/model.safetensors", "recipe.yaml"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()
    facts = [json.loads(Path(name, "run.json").read_text())["shrink"] for name in ("out", "whole")]
    assert facts[0] == facts[1]
    assert not Path("out/unfinished").exists()


def test_a_run_that_had_been_finished(rarefy_: Rarefy, shelf: Path, llama: Path) -> None:
    asked = arguments(shelf, llama, "--blocks", 1, "--by", "kl", "-o", "out", "--no-texts")
    assert rarefy_(*asked).status == 0
    journal = ShrinkJournal(Path("out"))
    journal.open(Fingerprint({}, {}, "")).close()  # as if it had been killed before it removed its journal
    again = rarefy_(*asked)
    assert again.status == 0, again.err
    assert "had been finished before" in again.err
    assert not Path("out/unfinished").exists()


@pytest.mark.parametrize("content", [b"no tensors", save({"neurons.weight": torch.zeros(2, 2)})], ids=["", "foreign"])
def test_a_damaged_block(
    rarefy_: Rarefy, shelf: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    asked = arguments(shelf, llama, "--neurons", 0.5, "--multiple", 8, "-o", "out", "--quiet")
    with monkeypatch.context() as patched:
        patched.setattr(ShrinkJournal, "recall", raise_after(2, ShrinkJournal.recall))
        assert rarefy_(*asked).status == 130
    Path("out/unfinished/block-00000.safetensors").write_bytes(content)
    done = rarefy_(*asked)
    assert (done.status, is_one_sentence(done.err)) == (2, True), done.err
    assert "block-00000.safetensors is missing or damaged" in done.err


def test_windows_that_are_not_its_own_are_written_anew(
    rarefy_: Rarefy, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["shrink", llama, "--blocks", 1, "--by", "kl", "--neurons", 0.5, "--multiple", 8, "--no-texts"]
    asked += ["--num-samples", 2, "--sequence-length", 16]
    assert rarefy_(*asked, "-o", "whole").status == 0
    with monkeypatch.context() as patched:
        patched.setattr(ShrinkJournal, "recall", raise_after(2, ShrinkJournal.recall))
        assert rarefy_(*asked, "-o", "out").status == 130
    file = Path("out/unfinished/windows.safetensors")
    file.write_bytes(save({"windows": torch.full_like(load(file.read_bytes())["windows"], 7)}))
    assert rarefy_(*asked, "-o", "out").status == 0
    models = [Path(name, "model/model.safetensors").read_bytes() for name in ("whole", "out")]
    assert models[0] == models[1]


def test_an_unfinished_run_of_another_command_is_not_called_damaged(
    rarefy_: Rarefy, shelf: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = arguments(shelf, llama, "--neurons", 0.5, "--multiple", 8, "-o", "out", "--quiet")
    with monkeypatch.context() as patched:
        patched.setattr(ShrinkJournal, "recall", raise_after(2, ShrinkJournal.recall))
        assert rarefy_(*asked).status == 130

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("rarefy.models.checkpoint.load_model", never)
    for more in ([], ["--calibration", "self"]):
        done = rarefy_("prune", *arguments(shelf, llama, "-o", "out")[1:], *more)
        assert (done.status, is_one_sentence(done.err)) == (2, True), done.err
        assert "out holds an unfinished run of another command or release of Rarefy" in done.err


def raise_after(times: int, original: Any) -> Any:
    """The function, which is interrupted at its last call."""
    calls = [0]

    def called(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == times:
            raise KeyboardInterrupt
        return original(*args)

    return called


MISTAKES: dict[str, tuple[list[object], str]] = {
    "nothing": ([], "--blocks, --heads or --neurons says what"),
    "search alone": (["--search"], "--search goes with --size, the share of the parameters that is left"),
    "size alone": (["--size", 0.8], "--size goes with --search"),
    "among alone": (["--among", "blocks", "--blocks", 1], "--among goes with --search"),
    "search and blocks": (["--search", "--size", 0.8, "--blocks", 1], "so --blocks cannot be said, too"),
    "size of all": (["--search", "--size", 1], "--size is 1, but must be a share between 0 and 1"),
    "huge": (
        ["--blocks", 1, "--by", "policy-gradient", "--steps", 2**31],
        "--steps is 2147483648, but must be a whole number of at least 1, below",
    ),
    "size of nothing": (["--search", "--size", 0.01], "--size is 0.01, but must be a share of at least 0."),
    "among others": (["--search", "--size", 0.8, "--among", "rows"], "must be some of blocks, heads and neurons"),
    "among nothing": (["--search", "--size", 0.8, "--among", ""], "--among is '', but must be some of blocks"),
    "among no neurons": (
        ["--search", "--size", 0.8, "--among", "blocks", "--multiple", 8],
        "--multiple goes with --neurons or --among",
    ),
    "damping of nothing": (
        ["--neurons", 0.5, "--choose", "wanda", "--no-repair", "--damping", 0.5],
        "--damping goes with a repair or another --choose",
    ),
    "nothing can go": (
        ["--search", "--size", 0.9, "--among", "neurons"],
        "none of the model's neurons can go, which are kept in multiples of 64",
    ),
    "no candidates": (["--search", "--size", 0.8, "--candidates", 0], "--candidates is 0"),
    "too many": (["--blocks", 5], "--blocks is 5, but must be a number from 1 to 4"),
    "no whole number": (["--blocks", 1.5], "--blocks is 1.5, but must be a whole number"),
    "negative": (["--blocks", -1], "--blocks is -1, but must be"),
    "all blocks": (["--blocks", 0.95], "--blocks is 0.95, but must be a number from 1 to 4"),
    "no block": (["--blocks", 0.01], "--blocks is 0.01, but must be a number from 1 to 4"),
    "share": (["--neurons", 1.0], "--neurons is 1.0, but must be a share between 0 and 1"),
    "no neurons": (["--neurons", 0.1], "in multiples of 64"),
    "negative share": (["--heads", -0.5], "--heads is -0.5, but must be a share between 0 and 1"),
    "no share": (["--neurons", 0], "--neurons is 0, but must be a share between 0 and 1"),
    "damping": (["--neurons", 0.5, "--damping", 1e30], "--damping is 1e+30, but must be a number from 0 to 10,000"),
    "steps": (["--blocks", 1, "--by", "policy-gradient", "--steps", 0], "--steps is 0"),
    "heads": (["--heads", 0.9], "some of the 2 KV heads of a block, and not all"),
    "rule": (["--blocks", 1, "--by", "luck"], "--by is 'luck', but must be kl"),
    "text": (["--blocks", 1, "--heads", "half"], "--heads is 'half'"),
    "generations alone": (["--blocks", 1, "--generations", 4], "--generations goes with --by search"),
    "steps of another rule": (["--search", "--size", 0.8, "--steps", 9], "--steps goes with --by policy-gradient"),
    "candidates alone": (["--neurons", 0.5, "--candidates", 4], "--candidates goes with --search"),
    "rule without blocks": (["--neurons", 0.5, "--by", "greedy"], "--by goes with --blocks or --search"),
    "choice of blocks": (["--blocks", 1, "--choose", "wanda"], "--choose goes with --heads, --neurons or --search"),
    "copies without blocks": (["--neurons", 0.5, "--no-copies"], "--no-copies goes with --blocks or --search"),
    "multiple of heads": (["--heads", 0.5, "--multiple", 8], "--multiple goes with --neurons or --search"),
    "context": (["--blocks", 1, "--sequence-length", 999], "at most 128"),
    "tokens": (["--blocks", 1, "--num-samples", 10**9], "make 32,000,000,000 tokens, but at most 268,435,456"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence_and_leave_nothing(rarefy_: Rarefy, shelf: Path, llama: Path, mistake: str) -> None:
    more, expected = MISTAKES[mistake]
    done = rarefy_(*arguments(shelf, llama, *more, "-o", "out"))
    assert done.status == 2, done.err
    assert is_one_sentence(done.err), done.err
    assert expected in done.err
    assert not Path("out").exists()


def test_a_weight_that_is_no_number_is_named_and_leaves_nothing(rarefy_: Rarefy, shelf: Path) -> None:
    model = deep("llama", 3)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    folder = save_folder(model, Path("nan"))
    done = rarefy_(*arguments(shelf, folder, "--blocks", 1, "-o", "out", "--no-texts"))
    assert (done.status, is_one_sentence(done.err)) == (2, True), done.err
    assert "model.layers.1.mlp.down_proj.weight of nan has NaN or infinity" in done.err
    assert not Path("out").exists()


def test_a_refusal_behind_measurements_leaves_nothing(
    rarefy_: Rarefy, shelf: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise rarefy.ModelError.sentence("No.")

    monkeypatch.setattr(BlockSets, "confirm", refuse)
    done = rarefy_(*arguments(shelf, llama, "--blocks", 1, "-o", "out"))
    assert done.status == 2
    assert done.err.endswith("error: No.\n")
    assert "goes on from there" not in done.err
    assert not Path("out").exists()


def test_what_has_no_stock_form_is_refused(rarefy_: Rarefy, shelf: Path, tmp_path: Path) -> None:
    opt = save_folder(deep("opt", 1), tmp_path / "opt")
    done = rarefy_(*arguments(shelf, opt, "--heads", 0.5, "-o", "out"))
    assert (done.status, is_one_sentence(done.err)) == (2, True), done.err
    assert "KV heads" in done.err
    done = rarefy_(*arguments(shelf, opt, "--blocks", 1, "-o", "out"))
    assert (done.status, is_one_sentence(done.err)) == (2, True), done.err
    assert "a single block" in done.err


def test_a_file_that_is_no_recipe(rarefy_: Rarefy, llama: Path) -> None:
    Path("wrong.yaml").write_text("blocks: many\n")
    done = rarefy_("shrink", llama, "--recipe", "wrong.yaml", "-o", "out")
    assert (done.status, is_one_sentence(done.err)) == (2, True), done.err
    Path("wrong.yaml").write_text("blokcs: 2\n")
    done = rarefy_("shrink", llama, "--recipe", "wrong.yaml", "-o", "out")
    assert "did you mean blocks?" in done.err


def test_from_python(shelf: Path, llama: Path, tmp_path: Path) -> None:
    recipe = rarefy.ShrinkRecipe.read(
        {"model": str(llama), "neurons": 0.5, "multiple": 8, "calibration": str(shelf / "text.txt")}
        | {"num_samples": 4, "sequence_length": 32}
    )
    result = rarefy.shrink(recipe, tmp_path / "out")
    assert result.facts["shrink"]["after"]["blocks"] == 5
    records = result.facts["shrink"]["parts"]
    assert all(record["error"] < record["masked_error"] for record in records)
    assert rarefy.inspect_folder(tmp_path / "out").ok
