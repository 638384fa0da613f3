"""rarefy tune: from the command line to a folder of the same masks; resumed, refused, measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import rarefy.runs.tune as tune_module
from cli_for_tests import Rarefy, is_one_sentence
from models_for_tests import build, make_model, save_folder
from rarefy.errors import CalibrationError, InputError, OutputError, RecipeError, VerificationError
from rarefy.models.source import resolve_model
from rarefy.runs.tune import tune
from rarefy.runs.tune_facts import curve
from rarefy.runs.tune_masks import stored_masks, verify_masks
from rarefy.runs.tune_plan import TunePlan, make_tune_plan
from rarefy.runs.tune_recipe import TuneRecipe
from rarefy.runs.words import sparkline
from rarefy.tuning import masks
from rarefy.tuning.train import StepRecord
from tuning_for_tests import prune_by_magnitude

TEXT = "the quick brown fox jumps over the lazy dog; she sells sea shells on the shore. "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Path:
    """A dense model, a pruned one as a run and as a plain folder, texts; tests must not write into it."""
    import rarefy.runs.run as run_module

    folder = tmp_path_factory.mktemp("tune")
    shutil.copytree(model_folder("llama"), folder / "dense")
    (folder / "text.txt").write_text("".join(f"{i} {TEXT}" for i in range(150)))
    (folder / "other.txt").write_text("".join(f"{TEXT[::-1]} {i} " for i in range(150)))
    (folder / "short.txt").write_text("the end")
    recipe = {"model": str(folder / "dense"), "method": "wanda", "pattern": "2:4", "num_samples": 8}
    recipe |= {"sequence_length": 32, "calibration": str(folder / "text.txt")}
    run_module.run(recipe, folder / "run", texts=False)
    save_folder(prune_by_magnitude(make_model("llama")), folder / "plain")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def facts_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same_masks(before: Path, after: Path) -> bool:
    old, new = load_file(before / "model.safetensors"), load_file(after / "model" / "model.safetensors")
    return all(torch.equal(old[name] != 0, new[name] != 0) for name in old if "proj" in name)


QUICK = ["--epochs", 2, "--held-out", 2, "--learning-rate", 1e-3, "-q"]


@pytest.mark.parametrize("form", ["full", "norms", "spp", "lora"])
def test_a_run_is_tuned_with_what_it_was_pruned_with(form: str, place: Path, rarefy_: Rarefy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = rarefy_("tune", place / "run", "-o", out, "--parametrisation", form, *QUICK)
    assert done.status == 0, done.err
    assert "every mask is what it was" in done.out
    assert same_masks(place / "run" / "model", out)
    assert not (out / "unfinished").exists()
    facts = facts_of(out)
    assert facts["tuning"]["parametrisation"] == form
    assert facts["tuning"]["steps"] == 16
    assert facts["calibration"]["source"] == str(place / "text.txt")
    assert facts["pattern"] == "2:4"
    assert facts["method"] == "wanda+tune"
    assert facts["tuning"]["teacher"] == "states"
    before, *_, last = facts["tuning"]["measurements"]
    assert last["kl"] < before["kl"]
    old, new = weights(place / "run"), weights(out)
    assert old.keys() == new.keys()
    assert all(old[name].dtype == new[name].dtype for name in old)
    assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    inspected = rarefy_("inspect", out)
    assert inspected.status == 0
    assert "every promise is kept" in inspected.out
    measured = rarefy_("eval", out, "--text", place / "text.txt", "--max-windows", 2, "-q")
    assert measured.status == 0
    if form == "full":
        assert rarefy_("report", out, "--no-texts", "-q").status == 0
        page = (out / "report.html").read_text()
        assert f"{facts['tuning']['trained']:,} numbers were trained in 16 steps" in page
        assert "KL divergence from the dense model over the steps" in page
    card = (out / "model" / "README.md").read_text()
    assert "was trained against" in card
    assert f"| trained | {form}, {facts['tuning']['trained']:,} numbers, 16 steps" in card


def test_a_broken_mask_ends_the_tuning(
    place: Path, rarefy_: Rarefy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks._Weight, "mask_", lambda self, tensor: None)
    done = rarefy_("tune", place / "run", "-o", tmp_path / "out", *QUICK)
    assert done.status == 1
    assert "weights that were zero and are not any more" in done.err
    assert not (tmp_path / "out").exists()
    # And where the training itself does not see it, the files do.
    monkeypatch.setattr(masks.KeptZeros, "check", lambda self: None)
    done = rarefy_("tune", place / "plain", "--against", place / "dense", "--calibration", place / "text.txt",
                   "--num-samples", 4, "--sequence-length", 16, "-o", tmp_path / "out", *QUICK)  # fmt: skip
    assert done.status == 1
    assert "The written files do not hold what was promised" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--teacher", "model", "--hidden-weight", 0.5, "--text-share", 0.2],
        ["--teacher", "top-8", "--batch-size", 4, "--micro-batch", 2, "--schedule", "cosine"],
        ["--precision", "float32", "--gradient-checkpointing", "--weight-decay", 0.1, "--clip", 0],
        ["--optimizer", "torch.optim:NAdam", "--max-steps", 3, "--held-out", 0],
        ["--calibration", "{place}/text.txt=3", "--calibration", "{place}/other.txt", "--bos"],
        ["--calibration", "self", "--num-samples", 4, "--sequence-length", 16],
    ],
    ids=lambda options: str(options[1]).rpartition("/")[2],
)
def test_options(options: list[object], place: Path, rarefy_: Rarefy, tmp_path: Path) -> None:
    words = [word.format(place=place) if isinstance(word, str) else word for word in options]
    done = rarefy_("tune", place / "run", "-o", tmp_path / "out", "--held-out", 2, "--epochs", 1, "-q", *words)
    assert done.status == 0, done.err
    assert same_masks(place / "run" / "model", tmp_path / "out")
    facts = facts_of(tmp_path / "out")
    # What was written is read again as a recipe, and says the same run.
    again = TuneRecipe.read({}, tmp_path / "out" / "recipe.yaml")
    assert again.to_yaml() == (tmp_path / "out" / "recipe.yaml").read_text()
    assert facts["tuning"]["steps"] == {"model": 8, "top-8": 2, "float32": 8, "torch.optim:NAdam": 3, "self": 4}.get(
        str(options[1]), 8
    )


def test_a_folder_that_is_no_run(place: Path, rarefy_: Rarefy, tmp_path: Path) -> None:
    done = rarefy_("tune", place / "plain", "--against", place / "dense", "--calibration", place / "text.txt",
                   "--num-samples", 8, "--sequence-length", 32, "-o", tmp_path / "out", *QUICK)  # fmt: skip
    assert done.status == 0, done.err
    assert same_masks(place / "plain", tmp_path / "out")
    assert facts_of(tmp_path / "out")["pattern"] == "50.0% zeros"
    assert rarefy_("inspect", tmp_path / "out").status == 0
    # The tuned folder is a run in its turn.
    done = rarefy_("tune", tmp_path / "out", "-o", tmp_path / "twice", *QUICK)
    assert done.status == 0, done.err
    assert same_masks(place / "plain", tmp_path / "twice")


def test_a_model_from_which_a_block_was_taken(place: Path, rarefy_: Rarefy, tmp_path: Path) -> None:
    config = make_model("llama").config
    config.num_hidden_layers = 1
    small = build(config)
    small.load_state_dict(make_model("llama").state_dict(), strict=False)
    save_folder(small, tmp_path / "small")
    done = rarefy_("tune", tmp_path / "small", "--against", place / "dense", "--calibration", place / "text.txt",
                   "--num-samples", 8, "--sequence-length", 32, "-o", tmp_path / "out", *QUICK)  # fmt: skip
    assert done.status == 0, done.err
    before, *_, last = facts_of(tmp_path / "out")["tuning"]["measurements"]
    assert last["kl"] < before["kl"]
    for more, message in ((["--hidden-weight", 1], "compares blocks one by one, but"),):
        done = rarefy_("tune", tmp_path / "small", "--against", place / "dense", "-o", tmp_path / "x", *more)
        assert done.status == 2
        assert message in done.err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_tuned_in_float32(
    dtype: torch.dtype, place: Path, rarefy_: Rarefy, tmp_path: Path
) -> None:
    sparse = prune_by_magnitude(make_model("llama"))
    with torch.no_grad():  # a kept weight that is about to vanish
        weight = sparse.get_submodule("model.layers.0.mlp.up_proj").weight
        place_of_one = int((weight[0] != 0).nonzero()[0])
        weight[0, place_of_one] = 6e-8 if dtype == torch.float16 else 1e-30
    save_folder(sparse.to(dtype), tmp_path / "half")
    done = rarefy_("tune", tmp_path / "half", "--against", place / "dense", "--calibration", place / "text.txt",
                   "--num-samples", 8, "--sequence-length", 32, "-o", tmp_path / "out", *QUICK)  # fmt: skip
    assert done.status == 0, done.err
    assert same_masks(tmp_path / "half", tmp_path / "out")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {dtype}


# --- Killed and resumed -----------------------------------------------------------------------------------


class _Killed(BaseException):
    pass


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From now on, a tuning keeps a state after every step, and is interrupted in step ``step``."""
    monkeypatch.setattr(tune_module, "_SECONDS_BETWEEN_STATES", -1.0)
    from rarefy.tuning.train import Tuner

    real = Tuner._train

    def train(self: Tuner, numbers: torch.Tensor) -> StepRecord:
        if self.step + 1 == step:
            raise _Killed
        return real(self, numbers)

    monkeypatch.setattr(Tuner, "_train", train)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_killed_tuning_goes_on_with_the_same_bits(
    form: str, place: Path, rarefy_: Rarefy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["tune", place / "run", "--parametrisation", form, "--eval-every", 3, *QUICK, "-o"]
    assert rarefy_(*words, tmp_path / "whole").status == 0
    for step in (1, 5, 12):
        with monkeypatch.context() as patch:
            interrupted(patch, step)
            with pytest.raises(_Killed):
                rarefy_(*words, tmp_path / "parts")
        assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["unfinished"]
    kept = content_of(tmp_path / "parts" / "unfinished")
    other = rarefy_("tune", place / "run", *QUICK, "--seed", 7, "-o", tmp_path / "parts")
    assert other.status == 2
    assert "holds an unfinished tuning with" in other.err
    assert is_one_sentence(other.err)
    assert content_of(tmp_path / "parts" / "unfinished") == kept  # it is not the other command's to remove
    done = rarefy_(*words, tmp_path / "parts")
    assert done.status == 0, done.err
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)
    whole, parts = (facts_of(tmp_path / name)["tuning"] for name in ("whole", "parts"))
    assert whole == parts


def test_what_another_process_works_on_is_left_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = {"model": str(place / "run"), "epochs": 1, "held_out": 1}, tmp_path / "out"
    real, kept = tune_module.record_dense, []

    def record(*arguments: Any) -> Any:
        monkeypatch.setattr(tune_module, "record_dense", real)
        kept.append(content_of(out / "unfinished"))  # in which no state is kept yet
        with pytest.raises(OutputError, match="is being written by another process"):
            tune(recipe, out)
        assert content_of(out / "unfinished") == kept[0]
        return real(*arguments)

    monkeypatch.setattr(tune_module, "record_dense", record)
    assert tune(recipe, out) is not None
    assert kept


def test_a_tuning_that_is_interrupted_before_it_goes_on_keeps_what_is_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = {"model": str(place / "run"), "epochs": 2, "held_out": 1}, tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted(patch, 3)
        with pytest.raises(_Killed):
            tune(recipe, out)
    kept = content_of(out / "unfinished")
    with monkeypatch.context() as patch:
        patch.setattr(TunePlan, "fingerprint", raising(KeyboardInterrupt))  # which reads all files of both models
        with pytest.raises(KeyboardInterrupt):
            tune(recipe, out)
        with pytest.raises(KeyboardInterrupt):
            tune(recipe, tmp_path / "new")
    assert content_of(out / "unfinished") == kept
    assert not (tmp_path / "new").exists()
    # What was recorded of the dense model is missed, too, and not replaced by zeros.
    states = out / "unfinished" / "dense-states"
    states.write_bytes(states.read_bytes()[:-2])
    for _ in range(2):
        with pytest.raises(OutputError, match="dense-states is missing or damaged"):
            tune(recipe, out)
        states.unlink(missing_ok=True)
    assert not states.exists()


def raising(kind: type[BaseException]) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise kind

    return function


def test_text_that_the_model_wrote_is_kept(
    place: Path, rarefy_: Rarefy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["tune", place / "run", "--calibration", "self", "--num-samples", 4, "--sequence-length", 16]
    with monkeypatch.context() as patch:
        interrupted(patch, 2)
        with pytest.raises(_Killed):
            rarefy_(*words, *QUICK, "-o", tmp_path / "out")
    import rarefy.calibration.self_text as self_text

    monkeypatch.setattr(self_text, "write_text", None)  # not asked again
    done = rarefy_(*words, *QUICK, "-o", tmp_path / "out")
    assert done.status == 0, done.err


def test_a_finished_tuning_whose_journal_is_left(place: Path, rarefy_: Rarefy, tmp_path: Path) -> None:
    words = ["tune", place / "run", *QUICK, "-o", tmp_path / "out"]
    assert rarefy_(*words).status == 0
    (tmp_path / "out" / "unfinished").mkdir()
    (tmp_path / "out" / "unfinished" / "journal.json").write_text("{}")
    done = rarefy_(*words)
    assert done.status == 0
    assert "had been finished" in done.out
    assert not (tmp_path / "out" / "unfinished").exists()


def test_damaged_states_are_refused(
    place: Path, rarefy_: Rarefy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["tune", place / "run", *QUICK, "-o", tmp_path / "out"]
    with monkeypatch.context() as patch:
        interrupted(patch, 5)
        with pytest.raises(_Killed):
            rarefy_(*words)
    (state,) = (tmp_path / "out" / "unfinished").glob("state-*.pt")
    state.write_bytes(state.read_bytes()[:100])
    done = rarefy_(*words)
    assert done.status == 2
    assert is_one_sentence(done.err)
    assert "is missing or damaged" in done.err
    journal = tmp_path / "out" / "unfinished" / "journal.json"
    for damaged in ("{", journal.read_text().replace('"state": ', '"state": 1')):
        journal.write_text(damaged)
        done = rarefy_(*words)
        assert done.status == 2
        assert "journal.json is missing or damaged" in done.err
        assert journal.read_text() == damaged


# --- Mistakes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that cannot be tuned, or not against the dense model of ``place``."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(place / "plain", folder / "quantised")
    config = json.loads((folder / "quantised" / "config.json").read_text())
    (folder / "quantised" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    wide = make_model("llama").config
    wide.vocab_size = 200
    save_folder(build(wide), folder / "wide")
    shutil.copytree(place / "dense", folder / "spoken")
    tokenizer = json.loads((folder / "spoken" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "spoken" / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copytree(place / "run", folder / "broken")
    file = folder / "broken" / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] += 1.0
    save_file(tensors, file, {"format": "pt"})
    (folder / "full").mkdir()
    (folder / "full" / "letter").touch()
    save_folder(prune_by_magnitude(make_model("mixtral")), folder / "experts")
    save_folder(make_model("mixtral"), folder / "experts_dense")
    (folder / "wrong.yaml").write_text("model: run\nepochs: none\n")
    (folder / "unknown.yaml").write_text("model: run\nepoch: 3\n")
    (folder / "code.yaml").write_text("model: run\noptimizer: adamwish.module:Class\n")
    return folder


MISTAKES: dict[str, tuple[str, str]] = {
    "no model": ("-o {out}", "MODEL is missing"),
    "no output": ("{place}/run", "--output is missing"),
    "no such model": ("{place}/nothing/at/all -o {out}", "There is no folder"),
    "no dense model": ("{place}/plain -o {out}", "--against is missing: name the dense model"),
    "dense model that is none": ("{place}/plain --against {place}/text.txt -o {out}", "--against: "),
    "the same model": ("{place}/run --against {place}/run -o {out}", "the dense model, not the pruned one"),
    "other vocabulary": ("{place}/run --against {wrong}/wide -o {out}", "with 160 tokens in its vocabulary; it has"),
    "other tokenizer": ("{place}/run --against {wrong}/spoken -o {out}", "a model with the tokenizer of"),
    "without zeros": ("{wrong}/spoken --against {place}/dense -o {out}", "a model with the tokenizer of"),
    "nothing pruned": ("{dense2} --against {place}/dense -o {out}", "so nothing was pruned that could be recovered"),
    "quantised": ("{wrong}/quantised --against {place}/dense -o {out}", "is quantised, and transformers"),
    "promises broken": ("{wrong}/broken -o {out}", "does not hold what it promises"),
    "too little text": ("{place}/run --calibration {place}/short.txt -o {out}", "tokens, but one window needs 32"),
    "nothing to hold out": ("{place}/run --num-samples 1200 -o {out}", "leave room for"),
    "missing text": ("{place}/run --calibration {place}/nothing.txt -o {out}", "does not exist"),
    "share of nothing": ("{place}/run --calibration {place}/text.txt=0 -o {out}", "SOURCE or SOURCE=SHARE"),
    "share too small": (
        "{place}/run --calibration {place}/text.txt=99 --calibration {place}/other.txt=1 -o {out}",
        "of 8 windows is less than one",
    ),
    "full folder": ("{place}/run -o {wrong}/full", "a new or empty folder; this one is not empty"),
    "window too long": ("{place}/run --sequence-length 4096 -o {out}", "--sequence-length is 4096, but must be"),
    "batch": ("{place}/run --batch-size 4 --micro-batch 3 -o {out}", "--micro-batch is 3, but must be a divisor of"),
    "rank": ("{place}/run --rank 8 -o {out}", "--rank is 8, but --parametrisation full has none"),
    "alpha": ("{place}/run --alpha 8 --parametrisation norms -o {out}", "--alpha is 8, but --parametrisation norms"),
    "form": ("{place}/run --parametrisation dora -o {out}", "--parametrisation is 'dora', but must be full, norms"),
    "experts": (
        "{wrong}/experts --against {wrong}/experts_dense --parametrisation spp -o {out}",
        "does not go with experts that are kept in one stack",
    ),
    "rate": ("{place}/run --learning-rate 0 -o {out}", "--learning-rate is 0, but must be a number above 0"),
    "share of the text": ("{place}/run --text-share 1.5 -o {out}", "--text-share is 1.5, but must be a number in"),
    "teacher": ("{place}/run --teacher top-0 -o {out}", "--teacher is 'top-0', but must be auto, model"),
    "too many tokens": ("{place}/run --teacher top-160 -o {out}", "top-K with K below 160, the vocabulary"),
    "hidden states": ("{place}/run --teacher states --hidden-weight 1 -o {out}", "--hidden-weight needs the"),
    "optimizer": ("{place}/run --optimizer adam -o {out}", "--optimizer adam cannot be used"),
    "optimizer that makes none": (
        "{place}/run --optimizer unittest.mock:MagicMock -o {out}",
        "--optimizer unittest.mock:MagicMock cannot be used (it makes a MagicMock, not one of torch's optimisers)",
    ),
    "code": ("--recipe {wrong}/code.yaml -o {out}", "'adamwish.module:Class', which is code from outside torch"),
    "column that none has": ("{place}/run --text-column body -o {out}", "--text-column is 'body', but must be left"),
    "device": ("{place}/run --device cuda:9 -o {out}", "--device is 'cuda:9'"),
    "recipe": ("--recipe {wrong}/wrong.yaml -o {out}", "epochs in "),
    "unknown key": ("--recipe {wrong}/unknown.yaml -o {out}", "epoch in {wrong}/unknown.yaml is no key"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_before_a_model_is_loaded(
    name: str, place: Path, wrong: Path, rarefy_: Rarefy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rarefy.models.checkpoint as checkpoint

    monkeypatch.setattr(checkpoint, "load_model", None)
    dense2 = tmp_path / "dense2"
    shutil.copytree(place / "dense", dense2)
    command, message = MISTAKES[name]
    names = {"place": place, "wrong": wrong, "out": tmp_path / "out", "dense2": dense2}
    done = rarefy_("tune", *command.format(**names).split())
    assert done.status == 2, done.err
    assert is_one_sentence(done.err), done.err
    assert message.format(**names) in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is no YAML file"),
        (b"\xff\xfe\x00", "is no YAML file"),
        ("[" * 5000, "is nested too deeply"),
        ("calibration: 3", "calibration in .*recipe.yaml is "),
        ("num_samples: -5", r"num_samples in .*recipe.yaml is -5, but must be a whole number of at least 1"),
        ("seed: true", "seed in .*recipe.yaml is True"),
        ("bos: perhaps", "bos in .*recipe.yaml is 'perhaps'"),
    ],
)
def test_a_damaged_recipe_of_the_run_is_one_sentence(
    content: str | bytes, message: str, place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("layers.jsonl", "run.json", "model"):
        (run / name).symlink_to(place / "run" / name)
    (run / "recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=message) as caught:
        make_tune_plan(TuneRecipe(model=str(run), against=str(place / "dense")))
    assert is_one_sentence(f"error: {caught.value}\n")


def test_a_run_is_tuned_with_the_column_that_it_was_pruned_with(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    rows = "".join(json.dumps({"id": i, "body": TEXT * 3}) + "\n" for i in range(50))
    (tmp_path / "rows.jsonl").write_text(rows)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe |= {"calibration": str(tmp_path / "rows.jsonl"), "text_column": "body"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    plan = make_tune_plan(TuneRecipe(model=str(run)))
    assert plan.recipe.text_column == "body"
    assert plan.recipe.seed == recipe["seed"]
    (text,) = plan.texts
    assert text.windows is not None
    fingerprint = plan.fingerprint(text.windows)
    assert fingerprint.recipe["processes"] == 1
    named = make_tune_plan(TuneRecipe(model=str(run), text_column="body", calibration=[str(tmp_path / "rows.jsonl")]))
    assert named.fingerprint(text.windows) == fingerprint


def test_a_recipe_made_in_python_is_checked_as_well(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--micro-batch is 2, but must be a divisor of --batch-size, which is 3"):
        tune(TuneRecipe(model=str(place / "run"), batch_size=3, micro_batch=2), tmp_path / "out")
    with pytest.raises(RecipeError, match="^ranks is no key of a recipe; did you mean rank"):
        tune({"model": str(place / "run"), "ranks": 3}, tmp_path / "out")
    code = {
        name: TuneRecipe(model="m", optimizer=name).needs_code for name in ("adamw", "torch.optim:SGD", "adamw:A")
    }
    assert code == {"adamw": False, "torch.optim:SGD": False, "adamw:A": True}


# --- What it is made of -----------------------------------------------------------------------------------


def test_windows_to_hold_out_share_no_token_with_the_others(place: Path) -> None:
    from rarefy.calibration.sources import parse_source
    from rarefy.calibration.windows import draw_windows
    from rarefy.runs.tune_windows import Text, draw

    source = parse_source(str(place / "text.txt"))
    tokens = torch.arange(1000)
    windows = draw(tokens, Text(source, 8, 5, 3), 20, None)
    assert torch.equal(windows[:8], draw_windows(tokens, 8, 20, 3))
    trained = set(windows[:8].flatten().tolist())
    held = windows[8:].flatten().tolist()
    assert not trained & set(held)
    assert len(set(held)) == 100
    with_start = draw(tokens, Text(source, 8, 5, 3), 20, 7)
    assert with_start.shape == (13, 20)
    assert bool((with_start[:, 0] == 7).all())
    with pytest.raises(CalibrationError, match="leave room for 0 windows of 20 to hold out"):
        draw(tokens[:60], Text(source, 3, 1, 0), 20, None)


def test_masks_of_files_are_compared_both_ways(place: Path, tmp_path: Path) -> None:
    before = resolve_model(str(place / "plain"))
    assert verify_masks(before, before) == sum(int((~mask).sum()) for _, mask in stored_masks(before))
    for value, message in ((1.0, "were zero and are not any more"), (0.0, "are zero and were not before")):
        folder = tmp_path / str(value)
        shutil.copytree(place / "plain", folder)
        tensors = load_file(folder / "model.safetensors")
        weight = tensors["model.layers.1.self_attn.k_proj.weight"]
        first = (weight == 0).nonzero()[0] if value else (weight != 0).nonzero()[0]
        weight[tuple(first)] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(VerificationError, match=f"model.layers.1.self_attn.k_proj has 1 weights that {message}"):
            verify_masks(before, resolve_model(str(folder)))


def test_a_curve_has_at_most_a_hundred_points() -> None:
    records = [StepRecord(step, float(step), 0.0, 0.0, 1.0, 0.1) for step in range(1, 251)]
    points = curve(records)
    assert len(points) == 84
    assert points[0] == {"step": 2.0, "kl": 2.0, "text_loss": 0.0, "hidden": 0.0, "gradient_norm": 1.0,
                         "learning_rate": 0.1}  # fmt: skip
    assert points[-1]["step"] == 250.0
    assert curve([]) == []


def test_a_line_of_bars() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▄▄"
    assert sparkline([float(i) for i in range(8)]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0] * 50 + [1.0] * 50, 4) == "██▁▁"


def test_from_python(place: Path, tmp_path: Path) -> None:
    recipe = {"model": str(place / "run"), "epochs": 1, "held_out": 1, "teacher": "top-4"}
    result = tune(recipe, tmp_path / "out")
    assert result is not None
    assert same_masks(place / "run" / "model", tmp_path / "out")
    assert result.facts["tuning"]["teacher"] == "top-4"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    again = tune(tmp_path / "recipe.yaml", tmp_path / "again")
    assert again is not None
    assert torch.equal(*(weights(tmp_path / name)["model.norm.weight"] for name in ("out", "again")))
    with pytest.raises(OutputError):
        tune(TuneRecipe.read(recipe), tmp_path / "out")


def test_dry_run_says_what_would_be_trained(place: Path, rarefy_: Rarefy) -> None:
    done = rarefy_("tune", place / "run", "--dry-run", "--parametrisation", "spp", "--rank", 2)
    assert done.status == 0, done.err
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]
    numbers = 2 * sum(2 * inputs + rows for rows, inputs in shapes)
    assert f"spp: {numbers:,} numbers would be trained in 24 steps" in done.out
    assert "8 windows of 32 tokens" in done.out
    assert "peak memory, estimated: " in done.out
