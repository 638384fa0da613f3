"""Sparsity of each layer: rules have their known answers, totals are exact, and files keep what is promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import rarefy
from cli_for_tests import Rarefy, is_one_sentence, prune_arguments
from models_for_tests import VOCABULARY, make_model
from rarefy.allocation.budget import MOST, Layer, patterns, shifted
from rarefy.allocation.listed import read_listed
from rarefy.allocation.profile import profile
from rarefy.errors import InputError, PatternError
from rarefy.layer.pattern import NM, Pattern, PerRow, Unstructured

WINDOWS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
#: The shapes of a LLaMA block with grouped queries, not all even.
SHAPES = {"q_proj": (48, 48), "k_proj": (16, 48), "v_proj": (16, 48), "o_proj": (48, 48), "up_proj": (97, 48)}


def _layers(blocks: int) -> list[Layer]:
    return [
        Layer(f"model.layers.{block}.{kind}", block, shape)
        for block in range(blocks)
        for kind, shape in SHAPES.items()
    ]


def test_the_profile_is_what_the_search_of_its_source_found() -> None:
    # In units of a percent, of LLaMA-2-7B at 70 % and 50 %: q, k above, v, o below, early blocks below late ones.
    for sparsity, offset, slope in ((0.7, 0.025, 0.04), (0.5, 0.045, 0.02)):
        found = profile(_layers(33), sparsity)
        middle = {kind: found[f"model.layers.16.{kind}"] - sparsity for kind in SHAPES}
        expected = {"q_proj": offset, "k_proj": offset, "v_proj": -offset, "o_proj": -offset, "up_proj": 0}
        assert middle == pytest.approx(expected)
        depth = [found[f"model.layers.{block}.up_proj"] - sparsity for block in (0, 1, 8, 16, 24, 31, 32)]
        expected_depth = [-slope / 2, -slope * 15 / 16, -slope / 2, 0, slope / 2, slope * 15 / 16, 0]
        assert depth == pytest.approx(expected_depth)


def test_a_profile_of_few_blocks_has_no_slope() -> None:
    found = profile(_layers(3), 0.7)
    assert {found[f"model.layers.{block}.up_proj"] for block in range(3)} == {0.7}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.61, 0.95, 0.985])
def test_what_clamped_layers_cannot_take_the_others_do(sparsity: float) -> None:
    wanted, sizes = {"a": 0.1, "b": 0.5, "c": 0.9, "d": 1.4}, {"a": 100, "b": 10, "c": 50, "d": 7}
    found = shifted(wanted, sizes, sparsity)
    assert sum(found[name] * size for name, size in sizes.items()) / 167 == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= value <= MOST for value in found.values())
    assert sorted(found.values()) == list(found.values())
    inner = [found[name] - wanted[name] for name in wanted if 0 < found[name] < MOST]
    assert inner == pytest.approx(inner[:1] * len(inner))


@pytest.mark.parametrize("pattern", [Unstructured(0.613), PerRow(0.613), NM(5, 16), NM(6, 8)])
def test_totals_are_exact_as_far_as_the_pattern_can(pattern: Pattern) -> None:
    layers = {layer.name: layer for layer in _layers(8)}
    found = patterns(pattern, profile(list(layers.values()), pattern.nominal_sparsity()), layers)
    kept = {name: found[name].count(layer.shape) for name, layer in layers.items()}
    missing = sum(pattern.count(layer.shape) for layer in layers.values()) - sum(kept.values())
    if isinstance(pattern, Unstructured):
        assert missing == 0
    else:  # not one more whole step of the smallest fits
        smallest = min(shape[0] * (shape[1] // 16 if isinstance(pattern, NM) else 1) for shape in SHAPES.values())
        assert 0 <= missing < 3 * smallest
    assert len({each.spec()["keep" if isinstance(pattern, NM) else "sparsity"] for each in found.values()}) > 1
    for name, layer in layers.items():
        assert isinstance(found[name], type(pattern))
        found[name].validate(layer.shape)
        assert found[name].sparsity_of(layer.shape) == pytest.approx(1 - kept[name] / layer.size)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2)])
def test_a_pattern_with_few_steps_is_refused(pattern: Pattern) -> None:
    with pytest.raises(rarefy.PatternError, match=rf"^pattern is {pattern}, which has too few steps"):
        rarefy.prune(make_model("llama"), WINDOWS, pattern=pattern, method=rarefy.Wanda(), allocation="profile")


def test_prune_spreads_the_zeros_at_the_same_total() -> None:
    def report(allocation: str, **options: object) -> rarefy.Report:
        model = make_model("llama")
        found = rarefy.prune(
            model, WINDOWS, pattern=rarefy.Unstructured(0.7), method=rarefy.Wanda(), allocation=allocation, **options
        )
        for layer in found.layers:
            assert int((model.get_parameter(f"{layer.name}.weight") != 0).sum()) == layer.kept
        return found

    uniform, spread = report("uniform"), report("profile")
    assert uniform.pruned == spread.pruned
    assert str(spread).startswith("wanda, profile unstructured 70%: ")
    q, v = (spread.layers[i].sparsity for i in (0, 2))
    assert (q, v) == pytest.approx((0.725, 0.675), abs=2e-3)
    part = report("profile", exclude=["*.v_proj"])  # the total is that of what is pruned
    assert part.pruned == sum(layer.pruned for layer in report("uniform", exclude=["*.v_proj"]).layers)
    with pytest.raises(rarefy.InputError, match=r"^allocation is 'profil', but must be uniform, profile"):
        report("profil")


def test_a_function_of_the_user_is_an_allocation_by_itself() -> None:
    with pytest.raises(
        rarefy.InputError, match=r"^allocation is 'profile', but must be \"uniform\" beside a function"
    ):
        rarefy.prune(
            make_model("llama"), WINDOWS, pattern=lambda _: NM(4, 8), method=rarefy.Wanda(), allocation="profile"
        )


@pytest.mark.parametrize("name", ["own.json", "own.csv"])
def test_a_run_takes_a_file_at_its_word(shelf: Path, tmp_path: Path, rarefy_: Rarefy, name: str) -> None:
    file = tmp_path / name
    listed = {"*.self_attn.*": 0.25, "*.0.self_attn.q_proj": 0.75}
    file.write_text(
        json.dumps(listed)
        if name.endswith("json")
        else "layer,sparsity\n*.self_attn.*,0.25\n*.0.self_attn.q_proj,.75"
    )
    assert read_listed(file) == listed
    out = tmp_path / "out"
    options = (
        "--method",
        "wanda",
        "--sparsity",
        0.5,
        "--scope",
        "layer",
        "--allocation",
        file,
        "--no-texts",
        "--quiet",
    )
    dry = rarefy_(*prune_arguments(shelf, *options, "--dry-run"))
    assert dry.status == 0, dry.err
    done = rarefy_(*prune_arguments(shelf, "-o", out, *options))
    assert done.status == 0, done.err
    records = [json.loads(line) for line in (out / "layers.jsonl").read_text().splitlines()]
    for one in records:
        expected = 0.75 if "0.self_attn.q_proj" in one["name"] else 0.25 if "self_attn" in one["name"] else 0.5
        assert 1 - one["kept"] / (one["shape"][0] * one["shape"][1]) == pytest.approx(expected, abs=1e-3)
        assert one["pattern_spec"]["sparsity"] == pytest.approx(expected, abs=1e-3)
    facts = json.loads((out / "run.json").read_text())
    assert facts["allocation"] == str(file)
    assert f"{facts['pruned']:,} of {facts['size']:,} weights would be pruned" in dry.out
    assert yaml.safe_load((out / "recipe.yaml").read_text())["allocation"] == str(file)
    assert rarefy_("inspect", out).status == 0


def test_a_run_goes_on_only_with_the_same_content_of_the_file(shelf: Path, tmp_path: Path) -> None:
    file, found = tmp_path / "own.json", []
    recipe = {"model": str(shelf / "model"), "calibration": str(shelf / "text.txt"), "allocation": str(file)}
    for sparsity in (0.25, 0.25, 0.75):
        file.write_text(json.dumps({"*": sparsity}))
        plan = rarefy.forecast(recipe | {"num_samples": 8, "sequence_length": 32}).plan
        found.append(plan.fingerprint(WINDOWS))
    assert found[0].difference(found[1]) is None
    assert "sparsity of layers" in str(found[0].difference(found[2]))


def test_inspect_finds_a_zero_that_is_gone_though_the_total_holds(
    shelf: Path, tmp_path: Path, rarefy_: Rarefy
) -> None:
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    options = ("--method", "wanda", "--sparsity", 0.7, "--allocation", "profile", "--no-texts", "--quiet")
    assert rarefy_(*prune_arguments(shelf, "-o", out, *options)).status == 0
    file = out / "model" / "model.safetensors"
    tensors = load_file(file)
    q, v = (tensors[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qv")
    q[tuple((q == 0).nonzero()[0])] = 1.0  # one zero less here, one more there
    v[tuple(v.nonzero()[0])] = 0.0
    save_file(tensors, file, metadata={"format": "pt"})
    done = rarefy_("inspect", out)
    assert done.status != 0
    assert "q_proj" in done.out + done.err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is no list of sparsities"),
        ("[1, 2]", "is no list of sparsities"),
        ('{"*": "much"}', "is no list of sparsities"),
        ("{}", "names no layer"),
        ('{"*": 1.0}', "the sparsity of * in"),
        ('{"*.head": 0.5}', "'*.head' in"),
        (None, "cannot be read"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(
    shelf: Path, tmp_path: Path, rarefy_: Rarefy, content: str | None, sentence: str
) -> None:
    file = tmp_path / "own.json"
    if content is not None:
        file.write_text(content)
    done = rarefy_(*prune_arguments(shelf, "-o", tmp_path / "out", "--allocation", file))
    assert is_one_sentence(done.err), done.err
    assert done.status == 2
    assert sentence in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--allocation", "flat"), "--allocation is 'flat', but must be uniform, profile"),
        (("--drift", "2"), "--drift is 2, but must be a number from 0 to 1"),
        (("--pattern", "2:4", "--allocation", "profile"), "pattern is 2:4, which has too few steps"),
    ],
)
def test_mistakes_of_options_are_one_sentence(
    shelf: Path, tmp_path: Path, rarefy_: Rarefy, options: tuple[str, ...], sentence: str
) -> None:
    done = rarefy_(*prune_arguments(shelf, "-o", tmp_path / "out", *options))
    assert is_one_sentence(done.err), done.err
    assert done.status == 2
    assert sentence in done.err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bad.csv", "glob,sparsity\n" + "x" * 200_000 + ",0.5\n"),
        ("bad.csv", "{"),
        ("bad.csv", "a,b,c\n"),
        ("bad.json", '{"*": 1' + "0" * 400 + "}"),
    ],
    ids=["long", "json", "three", "huge"],
)
def test_a_file_that_is_no_list_is_one_sentence(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"bad\.\w+ is no list of sparsities"):
        read_listed(tmp_path / name)


def test_a_name_that_no_file_can_have_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"^--allocation is 'a\\x00\.json', but must be the path of a file\.$"):
        read_listed(Path("a\0.json"))


def test_a_byte_order_mark_is_no_part_of_json(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"*": 0.5}', "utf-8-sig")
    assert read_listed(tmp_path / "own.json") == {"*": 0.5}


def test_more_than_any_layer_may_lose_is_refused() -> None:
    layers = {layer.name: layer for layer in _layers(2)}
    with pytest.raises(PatternError, match="prunes no layer beyond 99%"):
        patterns(Unstructured(0.995), dict.fromkeys(layers, 0.995), layers)
