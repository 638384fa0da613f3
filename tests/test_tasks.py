"""Tasks: local files of the published layouts, lm-eval's own results on them, and every mistake a sentence."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from transformers import PreTrainedModel

from cli_for_tests import Rarefy
from models_for_tests import VOCABULARY, build, make_tokenizer, save_folder
from rarefy.errors import InputError
from rarefy.evaluation.tasks import KNOWN, evaluate_tasks, prepare
from task_files import ai2_rows, mmlu_rows, write_rows, write_task_files

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and its libraries' own


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_files(tmp_path_factory.mktemp("zeroshot"))


def long_model() -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return build(config)


def test_every_known_task_reads_its_layout(data: Path) -> None:
    tasks = prepare(KNOWN, data)
    seen: list[tuple[int, int]] = []
    results = evaluate_tasks(
        long_model(), make_tokenizer(), tasks, batch_size=4, progress=lambda *both: seen.append(both)
    )
    assert list(results) == list(KNOWN)
    counts = {"arc_easy": 7, "arc_challenge": 5, "piqa": 5, "lambada": 4, "hellaswag": 5, "winogrande": 6, "boolq": 5}
    counts |= {"openbookqa": 4, "mmlu": 2 * 57 + 28}
    assert {name: result.samples for name, result in results.items()} == counts
    for result in results.values():
        accuracy, error = result.accuracy
        assert 0 <= accuracy <= 1
        assert 0 <= error < 1
    assert results["lambada"].metrics["perplexity"][0] > 1
    assert seen[-1][0] == seen[-1][1]


def test_limit_and_a_second_time(data: Path) -> None:
    """The tasks of a sweep are prepared once; the tokenizer stays as it was."""
    tasks = prepare(["arc_easy", "piqa"], data)
    model, tokenizer = long_model(), make_tokenizer()
    tokenizer.pad_token = None
    first = evaluate_tasks(model, tokenizer, tasks, limit=2)
    evaluate_tasks(model, tokenizer, tasks)
    assert evaluate_tasks(model, tokenizer, tasks, limit=2) == first
    assert first["piqa"].samples == 2
    count = evaluate_tasks(model, tokenizer, tasks)["piqa"].samples
    assert evaluate_tasks(model, tokenizer, tasks, limit=0.3)["piqa"].samples == math.ceil(0.3 * count)
    assert tokenizer.pad_token is None


def test_one_item_has_no_error(data: Path) -> None:
    (result,) = evaluate_tasks(long_model(), make_tokenizer(), prepare(["piqa"], data), limit=1).values()
    assert math.isnan(result.accuracy[1])


def _as_on_the_hub(name: str, folder: Path, target: Path) -> str:
    """Writes a task file of lm-eval's own kind that reads the rows as the hub has them; returns its name."""
    split = "test" if name in ("arc_easy", "openbookqa") else "validation"
    if name in ("arc_easy", "openbookqa"):
        stem = "question" if name == "arc_easy" else "question_stem"
        lines = (folder / f"{name}_test.jsonl").read_text().splitlines()
        rows = [
            {
                stem: row["question"]["stem"],
                "choices": {key: [choice[key] for choice in row["question"]["choices"]] for key in ("text", "label")},
                "answerKey": row["answerKey"],
            }
            for row in map(json.loads, lines)
        ]
    elif name == "piqa":
        labels = (folder / "piqa_valid_labels.lst").read_text().split()
        lines = (folder / "piqa_valid.jsonl").read_text().splitlines()
        rows = [{**json.loads(line), "label": int(label)} for line, label in zip(lines, labels)]
    else:
        lines = gzip.decompress((folder / "boolq_val.jsonl.gz").read_bytes()).decode().splitlines()
        rows = [{**row, "label": int(row["label"])} for row in map(json.loads, lines)]
    write_rows(target / f"{name}.jsonl", rows)
    home = {"arc_easy": "arc/arc_easy", "boolq": "super_glue/boolq/default"}.get(name, f"{name}/{name}")
    config = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / f"{home}.yaml"),
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(target / f"{name}.jsonl")}, "cache_dir": str(target / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        f"{split}_split": split,
    }
    (target / f"local_{name}.yaml").write_text(yaml.safe_dump(config))
    return f"local_{name}"


def test_equals_lm_evals_own_evaluation(data: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    names = ["arc_easy", "openbookqa", "piqa", "boolq"]
    folder = save_folder(long_model(), tmp_path / "model")
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[_as_on_the_hub(name, data, tmp_path) for name in names],
        task_manager=TaskManager(include_defaults=False, include_path=str(tmp_path)),
        device="cpu",
        batch_size=3,
        limit=4,
    )["results"]
    ours = evaluate_tasks(long_model(), make_tokenizer(), prepare(names, data), limit=4, batch_size=3)
    for name in names:
        assert ours[name].metrics
        for metric, (value, error) in ours[name].metrics.items():
            assert value == theirs[f"local_{name}"][f"{metric},none"]
            assert error == theirs[f"local_{name}"][f"{metric}_stderr,none"]


@pytest.mark.slow
def test_the_command_line_equals_lm_evals_own(rarefy_: Rarefy, data: Path, tmp_path: Path) -> None:
    """lm-eval in a process of its own, which reads some 15,000 definitions first."""
    names = ("arc_easy", "openbookqa", "piqa", "boolq")
    folder = save_folder(long_model(), tmp_path / "model")
    local = [_as_on_the_hub(name, data, tmp_path) for name in names]
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32"]
    command += ["--tasks", ",".join(local), "--include_path", str(tmp_path), "--device", "cpu"]
    command += ["--batch_size", "2", "--limit", "4", "--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    (written,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(written.read_text())["results"]
    options = (
        "--task-data",
        data,
        "--limit",
        4,
        "--batch-size",
        2,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--json",
    )
    done = rarefy_("eval", folder, "--tasks", ",".join(names), *options)
    assert done.status == 0, done.err
    ours = json.loads(done.out)["tasks"]
    assert list(ours) == list(names)
    for name in names:
        assert ours[name]["metrics"].keys() >= {"acc"}
        for metric, score in ours[name]["metrics"].items():
            found = theirs[f"local_{name}"]
            assert score == {"value": found[f"{metric},none"], "stderr": found[f"{metric}_stderr,none"]}


def test_a_tag_stands_for_its_tasks(data: Path) -> None:
    results = evaluate_tasks(long_model(), make_tokenizer(), prepare(["ai2_arc", "piqa"], data), limit=1)
    assert list(results) == ["arc_challenge", "arc_easy", "piqa"]


# --- Mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["arc_eazy"], r"'arc_eazy'.*did you mean arc_easy\?"),
        (["helaswag"], r"did you mean hellaswag\?"),
        (["piqa", "piqa"], "piqa twice"),
        ([], "one or more names"),
        (["piqa", ""], "one or more names"),
    ],
)
def test_unknown_names(names: list[str], words: str, data: Path) -> None:
    with pytest.raises(InputError, match=words):
        prepare(names, data)


def test_the_hub_is_only_replaced_while_it_is_asked(data: Path, tmp_path: Path) -> None:
    import datasets

    before = datasets.load_dataset
    prepare(["winogrande"], data)
    with pytest.raises(InputError, match="no file of the name"):
        prepare(["winogrande"], tmp_path)
    assert datasets.load_dataset is before


@pytest.mark.parametrize(
    ("task", "name", "content", "words"),
    [
        ("arc_easy", "arc_easy_test.jsonl", None, r"no file of the name arc_easy\*\.jsonl"),
        ("arc_easy", "arc_easy_test.jsonl", "", "is empty"),
        ("arc_easy", "arc_easy_test.jsonl", "{\n", r"line 1 of .*arc_easy_test.jsonl is malformed: it is no JSON"),
        ("arc_easy", "arc_easy_test.jsonl", "[1]\n", "no JSON object"),
        ("arc_easy", "arc_easy_test.jsonl", '{"question": 1, "answerKey": "A"}\n', '"question" is no object'),
        ("arc_easy", "arc_easy_test.jsonl", '\n{"answerKey": "A"}\n', "line 2 of .*it has no 'question'"),
        (
            "arc_easy",
            "arc_easy_test.jsonl",
            '{"question": {"stem": "?", "choices": [{"text": "a", "label": "A"}]}, "answerKey": "B"}\n',
            "\"answerKey\" is 'B', not one of A",
        ),
        ("piqa", "piqa_valid_labels.lst", "0\n1\n", "2 labels for the 5 questions"),
        ("piqa", "piqa_valid_labels.lst", "0\n1\n2\n0\n1\n", "line 3 of .*its label is '2'"),
        ("piqa", "piqa_valid_labels.lst", None, r"no file of the name piqa\*\.lst"),
        ("lambada", "lambada_openai.jsonl", '{"text": "one"}\n', "no last word"),
        ("lambada", "lambada_openai.jsonl", '{"text": 1}\n', '"text" is no text'),
        ("winogrande", "winogrande_dev.jsonl", '{"sentence": "a", "option1": "", "option2": ""}\n', "gap"),
        ("boolq", "boolq_val.jsonl.gz", "no gzip", "no complete gzip"),
        ("mmlu_anatomy", "mmlu_dev_test.jsonl.gz", None, "no file"),
    ],
)
def test_missing_and_malformed_files(
    task: str, name: str, content: str | None, words: str, data: Path, tmp_path: Path
) -> None:
    for file in data.iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        prepare([task], tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--task-data is .*missing"):
        prepare(["piqa"], tmp_path / "none")


def test_a_subject_that_the_file_lacks(data: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "mmlu.jsonl", [row for row in mmlu_rows() if row["subject"] != "anatomy"])
    with pytest.raises(InputError, match="no test rows of the subject anatomy"):
        prepare(["mmlu"], tmp_path)


def test_two_files_of_one_name(data: Path, tmp_path: Path) -> None:
    for name in ("arc_easy.jsonl", "arc_easy_2.jsonl"):
        write_rows(tmp_path / name, ai2_rows(2))
    with pytest.raises(InputError, match=r"several files, arc_easy.jsonl and arc_easy_2.jsonl,"):
        prepare(["arc_easy"], tmp_path)


def test_the_digest_follows_the_files(data: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "arc_easy.jsonl", ai2_rows(2))
    before = prepare(["arc_easy"], tmp_path).digest
    assert prepare(["arc_easy"], tmp_path).digest == before
    write_rows(tmp_path / "arc_easy.jsonl", ai2_rows(3))
    assert prepare(["arc_easy"], tmp_path).digest != before


def test_too_long_an_answer(data: Path, tmp_path: Path) -> None:
    row = {"question": {"stem": "?", "choices": [{"text": "a" * 3000, "label": "A"}]}, "answerKey": "A"}
    write_rows(tmp_path / "arc_easy.jsonl", [row])
    with pytest.raises(InputError, match="1,024 tokens"):
        evaluate_tasks(long_model(), make_tokenizer(), prepare(["arc_easy"], tmp_path))


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'rarefy\[tasks\]'"):
        prepare(["piqa"], data)
