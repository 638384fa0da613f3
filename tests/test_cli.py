"""The command line from outside: what it prints, writes and returns, above all for its users' mistakes."""

import errno
import html
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rarefy
from cli_for_tests import Rarefy, is_one_sentence, prune_arguments
from models_for_tests import ARCHITECTURES, CONTEXT, build, make_model, save_folder
from rarefy.methods import METHODS
from rarefy.models.checkpoint import load_model
from rarefy.models.source import resolve_model
from rarefy.runs.folder import RunFolder
from rarefy.runs.recipe import Recipe
from rarefy.runs.texts import PROMPTS, write_texts

# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--sparsity=-0.1", "--sparsity is -0.1, but must be a number in [0, 1)"),
        ("--sparsity 1.0", "--sparsity is 1.0, but must be"),
        ("--sparsity 1.5", "--sparsity is 1.5, but must be"),
        ("--sparsity nan", "--sparsity is nan, but must be"),
        ("--sparsity half", "--sparsity is 'half', but must be"),
        ("--pattern 4:2", "--pattern is '4:2', but must be N:M with 1 <= N < M"),
        ("--pattern 0:4", "--pattern is '0:4', but must be"),
        ("--pattern 2:0", "--pattern is '2:0', but must be"),
        ("--pattern foo", "--pattern is 'foo', but must be"),
        ("--pattern 2:5", "--pattern is 2:5, but model.layers.0.self_attn.q_proj has 32 inputs"),
        ("--pattern 2:4 --sparsity 0.5", "--sparsity does not go with --pattern"),
        ("--pattern 2:4 --scope row", "--scope does not go with --pattern"),
        ("--along neurons", "--along is 'neurons', which goes with an N:M --pattern that is the same for all layers"),
        ("--pattern 2:4 --along neurons --allocation profile", "--along is 'neurons', which goes with"),
        ("--pattern 2:4t --along neurons", "--along is 'neurons', which goes with"),
        ("--pattern 2:4t --barber signed", "barber swaps single weights of a row, which 2:4t does not allow"),
        ("--pattern 2:4 --along rows", "--along is 'rows', but must be inputs or neurons"),
        ("--method sparsegpt --set score=joint", "sparsegpt.score is 'joint', which compares all masks of a group"),
        ("--method sparsegpt --set score=all", "score is 'all', but must be one of single, joint"),
        ("--method mrp --pattern 8:16", "8:16 has groups with 12,870"),
        ("--method dass --refresh", "refresh does not go with dass"),
        ("--barber all", "--barber is 'all', but must be none, published or signed"),
        ("--barber-share 0.2", "--barber-share goes with --barber, and changes nothing without it"),
        ("--no-barber-refit", "--barber-refit goes with --barber, and changes nothing without it"),
        ("--match-lr 0.001", "--match-lr goes with --match, and changes nothing without it"),
        ("--barber signed --barber-share 0", "--barber-share is 0, but must be a number above 0, up to 1"),
        ("--barber signed --drift 0.2", "--barber does not go with --drift"),
        ("--barber signed --method wanda+quantize", "--barber does not go with --method wanda+quantize"),
        ("--drift 0.25 --refresh", "--drift does not go with --refresh"),
        ("--scope column", "--scope is 'column', but must be layer or row"),
        ("--method wnada", "did you mean wanda?"),
        ("--method wanda+nothing", "--method is 'nothing', but must be"),
        ("--method sparsegpt --set blok_size=64", "did you mean block_size?"),
        ("--set block_size", "--set is 'block_size', but must be KEY=VALUE"),
        ("--method sparsegpt --set block_size=many", "--set block_size is 'many', but must be a whole number"),
        ("--method sparsegpt --set block_size=0", "block_size is 0, but must be a whole number of at least 1"),
        ("--set damping=-1", "damping is -1.0, but must be"),
        ("--num-samples 0", "--num-samples is 0, but must be"),
        ("--sequence-length many", "--sequence-length is 'many', but must be"),
        (f"--sequence-length {CONTEXT + 1}", f"at most {CONTEXT}, the model's longest context"),
        ("--batch-size -1", "--batch-size is -1, but must be"),
        ("--seed x", "--seed is 'x', but must be"),
        ("--dtype int8", "--dtype is 'int8', but must be"),
        ("--device cuda:99", "--device is 'cuda:99', but must be"),
        ("--device abacus", "--device is 'abacus', but must be"),
        ("--include *.no_such_linear", "--include is '*.no_such_linear', but must be"),
        ("--exclude *.no_such_linear", "--exclude is '*.no_such_linear', but must be"),
        ("--exclude *", "leave at least one linear"),
        ("--calibration SHELF/missing.txt", "missing.txt' does not exist"),
        ("--calibration SHELF/empty.txt", "empty.txt' is empty"),
        ("--calibration SHELF/binary.txt", "binary.txt' is binary"),
        ("--calibration SHELF/short.txt", "one window needs 32"),
        ("--calibration nonsense", "'nonsense'"),
        ("--text-column body", "text.txt' is plain text, in which --text-column cannot name a column"),
        ("--calibration SHELF/rows.csv", "(its columns: id, body): --text-column names one of them"),
        ("--calibration SHELF/rows.csv --text-column bodi", 'has no column "bodi" (its columns: id, body)'),
        (
            "--calibration python-docs --text-column body",
            "--text-column is 'body', but must be left out with python-",
        ),
        ("--recipe SHELF/unknown_key.yaml", "unknown_key.yaml is no key of a recipe"),
        ("--recipe SHELF/wrong.yaml", "sparsity in SHELF/wrong.yaml is 1.5, but must be"),
        ("--recipe SHELF/missing.yaml", "missing.yaml cannot be read"),
        ("--output SHELF/no_model", "this one is not empty"),
        ("--output SHELF/file", "but must be a folder, not a file"),
        ("--output /proc/rarefy", "a folder that can be written"),
    ],
)
def test_every_mistake_in_a_run_is_one_sentence_before_a_model_is_loaded(
    rarefy_: Rarefy,
    shelf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    sentence: str,
) -> None:
    def loaded(*_: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("rarefy.models.checkpoint.load_model", loaded)
    written = {path: path.stat().st_mtime_ns for path in shelf.rglob("*")}
    said = arguments.replace("SHELF", str(shelf)).split()
    done = rarefy_(*prune_arguments(shelf, "-o", "out", *said))
    assert is_one_sentence(done.err), done.err
    assert sentence.replace("SHELF", str(shelf)) in done.err
    assert (done.status, done.out) == (2, "")
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in shelf.rglob("*")} == written


@pytest.mark.parametrize("command", ["prune", "eval", "inspect"])
@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("SHELF/missing", "SHELF/missing"),
        ("SHELF/no_model", "no config.json"),
        ("SHELF/truncated", "is damaged or cut off"),
        ("SHELF/text.txt", "a .gguf file"),
        ("no/such-model", "no/such-model"),
    ],
)
def test_a_model_that_is_none_is_one_sentence(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, command: str, model: str, sentence: str
) -> None:
    done = rarefy_(command, model.replace("SHELF", str(shelf)), *(["-o", "out"] if command == "prune" else []))
    assert is_one_sentence(done.err), done.err
    assert sentence.replace("SHELF", str(shelf)) in done.err
    assert (done.status, done.out) == (2, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("prun", "No such command 'prun'"),
        ("prune", "MODEL is missing"),
        ("prune m", "--output is missing"),
        ("prune m -o out --sparcity 0.5", "No such option: --sparcity"),
        ("prune m -o", "requires an argument"),
        ("prune m -o out extra", "unexpected extra argument"),
        ("eval", "Missing argument 'MODEL'"),
        ("eval m --max-windows x", "'--max-windows'"),
        ("eval m --max-windows 0", "'--max-windows'"),
        ("eval m --device abacus", "--device is 'abacus', but must be"),
        ("eval m --dtype int8", "--dtype is 'int8', but must be"),
        ("eval m --text missing.txt", "--text: 'missing.txt' does not exist"),
        ("eval m --text self", "--text is 'self', but must be"),
        ("inspect", "Missing argument 'MODEL'"),
        ("inspect m --pattern 4:2", "--pattern is '4:2', but must be N:M"),
        ("methods --all", "No such option: --all"),
    ],
)
def test_every_mistake_in_the_usage_is_one_sentence(
    rarefy_: Rarefy, tmp_path: Path, arguments: str, sentence: str
) -> None:
    done = rarefy_(*arguments.split())
    assert is_one_sentence(done.err), done.err
    assert sentence in done.err
    assert (done.status, done.out) == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_tokenizer_says_what_needs_none(rarefy_: Rarefy, shelf: Path) -> None:
    done = rarefy_("prune", shelf / "mute", "-o", "out", "--calibration", "python-docs")
    assert is_one_sentence(done.err)
    assert "has no tokenizer" in done.err
    assert done.status == 2


def test_a_mistake_leaves_no_traceback_and_the_status_reaches_the_shell(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(rarefy.__file__).parents[1]))
    command = [sys.executable, "-m", "rarefy", "prune", str(shelf / "model"), "-o", "out", "--sparsity", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --sparsity is 2, but must be a number in [0, 1), the fraction of zeros.\n"
    assert list(tmp_path.iterdir()) == []


# --- prune ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_leaves_a_model_that_transformers_loads(
    rarefy_: Rarefy, shelf: Path, model_folder: Callable[[str], Path], architecture: str
) -> None:
    dense_folder = model_folder(architecture)
    arguments = prune_arguments(shelf, "-o", "out", "--pattern", "2:4")
    arguments[1] = dense_folder
    done = rarefy_(*arguments)
    assert done.status == 0, done.err
    out = RunFolder("out")
    sparse = AutoModelForCausalLM.from_pretrained(out.model)
    dense = AutoModelForCausalLM.from_pretrained(dense_folder)
    before, after = dense.state_dict(), sparse.state_dict()
    pruned = {f"{record.name}.weight": record for record in out.read_layers()}
    assert pruned
    for name, weight in after.items():
        if name in pruned:
            assert int((weight == 0).sum()) == pruned[name].pruned == weight.numel() // 2
        else:  # embeddings, head, norms and biases
            assert torch.equal(weight, before[name]), name
    assert (sparse.get_output_embeddings().weight is sparse.get_input_embeddings().weight) == (
        dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    )
    config = json.loads((out.model / "config.json").read_text())
    assert not [key for key in config if "sparsity" in key or "quantization" in key]
    tokenizer = AutoTokenizer.from_pretrained(out.model)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(dense_folder).chat_template
    assert (out.model / "generation_config.json").is_file()


def test_a_run_folder_tells_the_whole_run(rarefy_: Rarefy, shelf: Path, tmp_path: Path) -> None:
    arguments = prune_arguments(shelf, "-o", "out", "--method", "wanda", "--sparsity", 0.6, "--seed", 3)
    done = rarefy_(*arguments)
    assert done.status == 0, done.err
    assert "wanda, row 60%" in done.out
    assert "down_proj" in done.out
    out = RunFolder(tmp_path / "out")
    assert sorted(path.name for path in out.path.iterdir()) == ["layers.jsonl", "model", "recipe.yaml", "run.json"]

    recipe = Recipe.from_yaml(out.recipe)
    assert (recipe.method, recipe.sparsity, recipe.scope, recipe.seed) == ("wanda", 0.6, "row", 3)
    assert recipe.window_shape == (8, 32)
    records = out.read_layers()
    assert len(records) == 14
    assert {record.pattern for record in records} == {"row 60%"}
    assert all(0 < record.relative_error < 1 for record in records)

    facts = out.read_run()
    assert facts["command"] == " ".join(["rarefy", *map(str, arguments)])
    assert facts["versions"]["rarefy"] == rarefy.__version__
    assert {"python", "torch", "transformers"} <= facts["versions"].keys()
    assert facts["seed"] == 3
    assert {"load", "calibrate", "prune", "write", "verify", "total"} <= facts["seconds"].keys()
    assert facts["pruned"] == sum(record.pruned for record in records)

    card = (out.model / "README.md").read_text()
    assert card.startswith("---\n")
    for fact in ("wanda", "arXiv 2306.11695", facts["command"], f"{facts['pruned']:,} of {facts['size']:,}"):
        assert fact in card
    assert "**not smaller and not faster**" in card


def test_no_texts_are_written_where_none_are_wanted(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rarefy.runs.texts.write_texts", lambda *_: pytest.fail("a text was written"))
    assert rarefy_(*prune_arguments(shelf, "-o", "out", "--no-texts")).status == 0
    facts = RunFolder("out").read_run()
    assert facts["dense_texts"] == facts["texts"] == []


def test_a_run_keeps_what_dense_and_pruned_model_write(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rarefy_(*prune_arguments(shelf, "-o", "out", "--sparsity", 0.8)).status == 0
    facts = RunFolder("out").read_run()
    for key, folder in (("dense_texts", shelf / "model"), ("texts", "out")):
        model, tokenizer = load_model(resolve_model(str(folder)), "cpu")
        assert [one["prompt"] for one in facts[key]] == list(PROMPTS)
        assert [one["text"] for one in facts[key]] == write_texts(model, tokenizer)
    assert facts["dense_texts"] != facts["texts"]
    monkeypatch.setattr("rarefy.models.checkpoint.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert rarefy_("report", "out").status == 0
    page = html.unescape(Path("out/report.html").read_bytes().decode())  # text may hold a carriage return
    assert all(one["text"] in page for key in ("dense_texts", "texts") for one in facts[key])


def test_a_model_that_cannot_write_is_pruned_all_the_same(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no\ncache")

    monkeypatch.setattr("rarefy.runs.texts.write_texts", broken)
    done = rarefy_(*prune_arguments(shelf, "-o", "out"))
    assert done.status == 0
    assert "warning: the model writes no texts for the report: no cache\n" in done.err
    assert RunFolder("out").read_run()["texts"] == []


def test_fewer_tokens_than_inputs_are_a_warning(rarefy_: Rarefy, shelf: Path) -> None:
    few = (*prune_arguments(shelf, "--num-samples", 3, "--sequence-length", 16), "--dry-run")
    done = rarefy_(*few)
    assert done.status == 0
    assert (
        "warning: the calibration has 48 tokens, fewer than the 64 inputs of model.layers.0.mlp.down_proj" in done.err
    )
    assert "warning" not in rarefy_(*few, "--exclude", "*.down_proj").err  # the others have 32
    assert "warning" not in rarefy_(*few, "--num-samples", 4).err


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(rarefy_: Rarefy, shelf: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert rarefy_(*prune_arguments(shelf, "-o", name, "--seed", seed)).status == 0
    first, second, other = (Path(name, "model", "model.safetensors").read_bytes() for name in "abc")
    assert first == second
    assert first != other


def test_the_files_are_there_for_another_process(rarefy_: Rarefy, shelf: Path) -> None:
    assert rarefy_(*prune_arguments(shelf, "-o", "out")).status == 0
    code = (
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('out/model')\n"
        "weights = [m.weight for n, m in model.model.layers.named_modules() if n.endswith('_proj')]\n"
        "print(sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    zeros, size = map(int, done.stdout.split())
    assert zeros * 2 == size


def test_a_recipe_of_a_run_repeats_it(rarefy_: Rarefy, shelf: Path) -> None:
    assert rarefy_(*prune_arguments(shelf, "-o", "a", "--method", "sparsegpt", "--set", "block_size=16")).status == 0
    assert "block_size: 16" in Path("a/recipe.yaml").read_text()
    assert rarefy_("prune", "--recipe", "a/recipe.yaml", "-o", "b").status == 0
    assert Path("a/recipe.yaml").read_text() == Path("b/recipe.yaml").read_text()
    assert load_equal(Path("a/model/model.safetensors"), Path("b/model/model.safetensors"))


def load_equal(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_only_chosen_linears_are_pruned(rarefy_: Rarefy, shelf: Path) -> None:
    more = ("-o", "out", "--include", "*.mlp.*", "--exclude", "*.1.*", "--exclude", "*down_proj")
    assert rarefy_(*prune_arguments(shelf, *more)).status == 0
    names = [record.name for record in RunFolder("out").read_layers()]
    assert names == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]


def test_rows_and_conversations_calibrate(rarefy_: Rarefy, shelf: Path) -> None:
    assert rarefy_(*prune_arguments(shelf, "-o", "text")).status == 0
    rows = shelf / "rows.csv"
    assert rarefy_(*prune_arguments(shelf, "-o", "rows", "--calibration", rows, "--text-column", "body")).status == 0
    assert "text_column: body" in Path("rows/recipe.yaml").read_text()
    chat = {"messages": [{"role": "user", "content": "the quick brown fox; " * 20}]}
    Path("chat.jsonl").write_text(json.dumps(chat) * 1)
    assert rarefy_(*prune_arguments(shelf, "-o", "chat", "--calibration", "chat.jsonl")).status == 0
    weights = [Path(run, "model/model.safetensors").read_bytes() for run in ("text", "rows", "chat")]
    assert weights[0] == weights[1]  # the same text in one document
    assert weights[0] != weights[2]


def test_a_tokenizer_larger_than_the_model_is_one_sentence(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_model("llama").config
    config.vocab_size = 30
    save_folder(build(config), Path("small"))
    monkeypatch.setattr("rarefy.models.checkpoint.load_model", lambda *_: pytest.fail("a model was loaded"))
    text = ("--num-samples", 4, "--sequence-length", 16)
    for command in (
        ("prune", "small", "-o", "out", "--calibration", shelf / "text.txt", *text),
        ("eval", "small", "--text", shelf / "text.txt"),
        ("compare", "small", "-o", "out", "--methods", "wanda", "--text", shelf / "text.txt"),
        ("compare", "small", "-o", "out", "--methods", "wanda", "--calibration", shelf / "text.txt", *text),
    ):
        done = rarefy_(*command)
        assert is_one_sentence(done.err), done.err
        assert "The tokenizer of small gives token " in done.err
        assert "its model has embeddings for 30 tokens only" in done.err
        assert (done.status, done.out) == (2, "")
        assert not Path("out").exists()


def test_without_a_calibration_the_model_writes_its_own_text(rarefy_: Rarefy, shelf: Path) -> None:
    done = rarefy_("prune", shelf / "mute", "-o", "out", "--num-samples", 4, "--sequence-length", 16)
    assert done.status == 0, done.err
    assert "4 windows of 16 tokens" in done.err
    assert "(the default)" in done.err


def test_a_method_of_ones_own(rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path.parent / "library"
    library.mkdir(exist_ok=True)
    (library / "own_method.py").write_text(
        "from dataclasses import dataclass\n"
        "from rarefy import Magnitude\n"
        "@dataclass(frozen=True)\n"
        "class Own(Magnitude):\n"
        "    name = 'own'\n"
    )
    monkeypatch.syspath_prepend(library)
    assert rarefy_(*prune_arguments(shelf, "-o", "out", "--method", "own_method:Own")).status == 0
    assert RunFolder("out").read_run()["method"] == "own"
    refused = rarefy_("prune", "--recipe", "out/recipe.yaml", "-o", "again")
    assert is_one_sentence(refused.err)
    assert refused.status == 2
    assert "is 'own_method:Own', which is code from outside Rarefy: --allow-code" in refused.err
    assert rarefy_("prune", "--recipe", "out/recipe.yaml", "-o", "again", "--allow-code").status == 0
    assert load_equal(Path("out/model/model.safetensors"), Path("again/model/model.safetensors"))
    rarefy.run(Path("out/recipe.yaml"), "once more", allow_code=True)
    assert RunFolder("once more").read_run()["command"].endswith("--allow-code")


def test_a_start_token_comes_before_every_window(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stop(model: object, windows: torch.Tensor, *_: object) -> None:
        seen.append(windows)
        raise rarefy.NumericalError("enough seen.")

    monkeypatch.setattr("rarefy.runs.run.prune_blocks", stop)
    for more in ((), ("--bos",)):
        assert rarefy_(*prune_arguments(shelf, "-o", "out", *more)).status == 1
    without, with_start = seen
    assert without.shape == with_start.shape == (8, 32)
    assert (with_start[:, 0] == 1).all()
    assert not (without[:, 0] == 1).any()


def test_a_dry_run_counts_the_whole_model_only_where_it_writes_texts(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rarefy.runs.memory.weights_bytes", lambda plan: 2**40)
    monkeypatch.setattr("rarefy.runs.memory.writes_texts", lambda plan: True)
    assert "estimated: 1024" in rarefy_(*prune_arguments(shelf, "--dry-run")).out
    streamed = ("--no-texts", "--row-weights", "none", "--allocation", "uniform")  # else the head is in memory, too
    assert "estimated: 1024" not in rarefy_(*prune_arguments(shelf, "--dry-run", *streamed)).out


def test_a_dry_run_prints_counts_and_writes_nothing(rarefy_: Rarefy, shelf: Path, tmp_path: Path) -> None:
    done = rarefy_(*prune_arguments(shelf, "-o", "out", "--dry-run", "--sparsity", "0.25"))
    assert done.status == 0, done.err
    assert ["down_proj", "2"] in [line.split()[:2] for line in done.out.splitlines()]
    assert "8 windows of 32 tokens" in done.out
    assert "peak memory, estimated" in done.out
    line = next(line for line in done.out.splitlines() if "would be pruned" in line)
    pruned, size = (int(word.replace(",", "")) for word in line.split() if word[0].isdigit() and "%" not in word)
    assert pruned * 4 == size
    assert list(tmp_path.iterdir()) == []


def test_a_failing_run_leaves_nothing(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise rarefy.NumericalError("model.layers.0.mlp.up_proj: its weight holds NaN.")

    monkeypatch.setattr("rarefy.runs.run.prune_blocks", broken)
    done = rarefy_(*prune_arguments(shelf, "-o", "deep/out"))
    assert done.status == 1
    assert done.err.endswith("error: model.layers.0.mlp.up_proj: its weight holds NaN.\n")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing_and_says_so_in_a_line(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rarefy.runs.run.prune_blocks", interrupted)
    done = rarefy_(*prune_arguments(shelf, "-o", "out"))
    assert done.status == 130
    assert done.err.endswith("\nerror: interrupted.\n")
    assert list(tmp_path.iterdir()) == []


def test_files_that_break_the_promise_are_not_left(
    rarefy_: Rarefy, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rarefy.models.streaming.StreamedModel.store", lambda *_: None)
    done = rarefy_(*prune_arguments(shelf, "-o", "out"))
    assert done.status == 1
    assert "do not hold what was promised" in done.err
    assert list(tmp_path.iterdir()) == []


def _allocate() -> None:
    torch.empty(2**62, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error",
    [
        _allocate,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),  # on Windows
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_running_out_of_memory_is_one_sentence(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | Callable[[], None]
) -> None:
    def greedy(*_: object, **__: object) -> None:
        if isinstance(error, Exception):
            raise error
        error()

    monkeypatch.setattr("rarefy.runs.run.open_model", greedy)
    done = rarefy_(*prune_arguments(shelf, "-o", "out"))
    assert done.status == 1
    assert is_one_sentence(done.err)
    assert "error: Out of memory" in done.err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("pin memory thread exited unexpectedly"),
        RuntimeError("view size is not compatible: memory format"),
        ValueError("out of memory"),
    ],
)
def test_an_error_that_speaks_of_memory_is_not_taken_for_a_lack_of_it(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("rarefy.runs.run.open_model", broken)
    with pytest.raises(type(error), match=str(error)):
        rarefy_(*prune_arguments(shelf, "-o", "out"))


def test_a_file_that_the_system_refuses_is_one_sentence(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/some/file")

    monkeypatch.setattr("rarefy.runs.run.open_model", refused)
    done = rarefy_(*prune_arguments(shelf, "-o", "out"))
    assert (done.status, done.err) == (1, "error: /some/file cannot be read or written: Permission denied.\n")


# --- inspect, methods, help -------------------------------------------------------------------------------


def test_inspect_says_what_the_files_hold(rarefy_: Rarefy, shelf: Path) -> None:
    assert rarefy_(*prune_arguments(shelf, "-o", "out", "--pattern", "2:4")).status == 0
    for name in ("out", "out/model"):
        done = rarefy_("inspect", name)
        assert (done.status, done.err) == (0, "")
        assert "50.00%" in done.out
        assert "every promise is kept" in done.out
    facts = json.loads(rarefy_("inspect", "out", "--json").out)
    assert facts["ok"] is True
    assert len(facts["layers"]) == 14
    assert rarefy_("inspect", "out", "--pattern", "4:8").status == 0


def test_inspect_ends_with_1_where_a_promise_is_broken(rarefy_: Rarefy, shelf: Path) -> None:
    assert rarefy_(*prune_arguments(shelf, "-o", "out")).status == 0
    shutil.copy(shelf / "model" / "model.safetensors", "out/model/model.safetensors")
    done = rarefy_("inspect", "out")
    assert done.status == 1
    assert "broken: model.layers.0.self_attn.q_proj: it holds" in done.err
    assert "kept" not in done.out
    done = rarefy_("inspect", "out", "--json")
    assert done.status == 1
    assert json.loads(done.out)["ok"] is False
    assert rarefy_("inspect", shelf / "model").status == 0
    assert rarefy_("inspect", shelf / "model", "--pattern", "2:4").status == 1


def test_methods_are_listed_with_hyperparameters_defaults_and_papers(rarefy_: Rarefy) -> None:
    done = rarefy_("methods")
    assert done.status == 0
    for name in ("magnitude", "wanda", "ria", "sparsegpt"):
        assert f"\n{name}: " in "\n" + done.out
    assert "block_size=128" in done.out
    assert "arXiv 2301.00774" in done.out


def test_variants_of_a_method_are_told_apart_and_places_are_said(rarefy_: Rarefy) -> None:
    lines = rarefy_("methods").out.splitlines()
    shown = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines if line[:1].isalpha()}
    assert shown.keys() >= METHODS.keys()
    assert len(set(shown.values())) == len(shown)
    assert shown["admm-reselect"].startswith("admm with schedule=reselect;")
    assert shown["admm1"].startswith("admm with schedule=fixed;")
    assert shown["alps-paper"].startswith("ALPS as published")
    assert lines.count("    --set block_size=128    columns whose masks are chosen together") == 2  # two have it
    for name, method in METHODS.items():
        assert (f"needs a start: wanda+{name}" in shown[name]) is method.needs_start


def test_help_and_version(rarefy_: Rarefy) -> None:
    assert rarefy_("--version").out == f"rarefy {rarefy.__version__}\n"
    for arguments in ((), ("--help",), ("-h",)):
        done = rarefy_(*arguments)
        assert done.status == 0
        assert all(command in done.out for command in ("prune", "eval", "inspect", "methods"))
    options = set(Recipe.model_fields) - {"model", "settings"}
    text = rarefy_("prune", "--help").out
    for option in (*(name.replace("_", "-") for name in options), "set", "recipe", "dry-run", "output"):
        assert f"--{option}" in text


def test_help_shows_what_a_run_needs_as_required(rarefy_: Rarefy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    for command, needed in (("prune", ("MODEL", "--output")), ("compare", ("MODEL", "--output"))):
        text = rarefy_(command, "--help").out
        assert "[MODEL]" not in text
        starred = [line for line in text.splitlines() if line[1:4].strip() == "*"]
        assert text.count("[required]") == len(starred) == len(needed)
        assert all(any(name in line for line in starred) for name in needed)
    assert "A --recipe may name it instead" in rarefy_("prune", "--help").out
