"""Recipes: every setting checked, every mistake one sentence that names it as its user wrote it."""

import sys
from pathlib import Path

import pytest

import rarefy
from rarefy.errors import InputError, MethodError, PatternError, RecipeError
from rarefy.layer.pattern import NM, PerRow, Unstructured
from rarefy.runs.recipe import DEFAULT_CALIBRATION, FULL_WINDOWS, QUICK_WINDOWS, Recipe, parse_settings


def read(**options: object) -> Recipe:
    return Recipe.read({"model": "m", **options})


def in_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("sparsity", ["-0.1", "1.0", "1.5", "nan", "inf", "half", ""])
def test_a_sparsity_outside_0_1_is_refused_by_name(sparsity: str) -> None:
    with pytest.raises(PatternError, match=r"^--sparsity is .*, but must be a number in \[0, 1\)"):
        read(sparsity=sparsity)


@pytest.mark.parametrize("sparsity", ["0", "0.5", "0.999", "1e-3"])
def test_a_sparsity_in_0_1_is_taken(sparsity: str) -> None:
    assert read(sparsity=sparsity).sparsity == float(sparsity)


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "2:0", "foo", "4:4", "2:", "2:4:8", "-2:4", "2.0:4", "0:0"])
def test_an_impossible_pattern_is_refused_and_says_that_n_weights_are_kept(pattern: str) -> None:
    with pytest.raises(PatternError, match=rf"^--pattern is '{pattern}', but must be N:M .* keeps N of every M"):
        read(pattern=pattern)


def test_n_m_keeps_n_of_m() -> None:
    assert read(pattern="1:4").build_pattern() == NM(keep=1, of=4)


@pytest.mark.parametrize("other", [{"sparsity": "0.5"}, {"scope": "row"}])
def test_a_pattern_stands_alone(other: dict[str, str]) -> None:
    with pytest.raises(PatternError, match=f"^--{next(iter(other))} does not go with --pattern"):
        read(pattern="2:4", **other)


def test_scope_is_the_methods_unless_given() -> None:
    assert read(method="wanda").build_pattern() == PerRow(0.5)
    assert read(method="sparsegpt").build_pattern() == Unstructured(0.5)
    assert read(method="wanda", scope="layer").build_pattern() == Unstructured(0.5)
    assert read(method="sparsegpt", scope="row", sparsity="0.7").build_pattern() == PerRow(0.7)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "wnada"}, r"^--method is 'wnada'.*did you mean wanda\?"),
        (
            {"method": "sparsegpt", "settings": {"blok_size": "64"}},
            r"^--set is 'blok_size'.*did you mean block_size\?",
        ),
        (
            {"method": "sparsegpt", "settings": {"block_size": "many"}},
            r"^--set block_size is 'many', but must be a whole number",
        ),
        (
            {"method": "sparsegpt", "settings": {"block_size": "0"}},
            r"block_size is 0, but must be a whole number of at least 1",
        ),
        ({"settings": {"damping": "-1"}}, r"damping is -1.0, but must be"),
        (
            {"method": "no.such.module:Class"},
            r"^--method is 'no.such.module:Class', but it cannot be imported",
        ),
    ],
)
def test_methods_and_their_settings_are_checked(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(MethodError, match=sentence):
        read(**options)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_samples", "0"),
        ("num_samples", "many"),
        ("num_samples", "1.5"),
        ("sequence_length", "1"),
        ("batch_size", "-3"),
        ("seed", "-1"),
        ("seed", str(2**64)),
        ("dtype", "int8"),
        ("scope", "column"),
        ("calibration", ""),
    ],
)
def test_every_other_setting_is_checked(key: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"^--{key.replace('_', '-')} is .*, but must be "):
        read(**{key: value})


def test_settings_are_pairs() -> None:
    assert parse_settings(["block_size=64", " damping = 0.1"]) == {"block_size": "64", "damping": "0.1"}
    for wrong in ("block_size", "=64", "block_size="):
        with pytest.raises(MethodError, match=f"^--set is '{wrong}', but must be KEY=VALUE"):
            parse_settings([wrong])


def test_a_file_may_say_everything(tmp_path: Path) -> None:
    file = in_file(
        tmp_path,
        "model: m\nmethod: sparsegpt\nsettings: {damping: 1e-3, block_size: 32}\npattern: 2:4\n"
        "num_samples: 8\nbos: true\ninclude: ['*.mlp.*']\n",
    )
    recipe = Recipe.from_yaml(file)
    assert recipe.build_pattern() == NM(2, 4)  # YAML 1.1 would have read 124
    assert recipe.settings == {"damping": 0.001, "block_size": 32}
    assert (recipe.num_samples, recipe.bos, recipe.include) == (8, True, ["*.mlp.*"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "model: m\nsparsty: 0.5\n",
            r"^sparsty in .*run.yaml is no key of a recipe; did you mean sparsity\?",
        ),
        ("model: m\nsparsity: 1.5\n", r"^sparsity in .*run.yaml is 1.5, but must be"),
        ("model: m\nsparsity: true\n", r"^sparsity in .*run.yaml is True, but must be"),
        ("model: m\nnum_samples: false\n", r"^num_samples in .*run.yaml is False, but must be"),
        ("model: m\nmethod: wandaa\n", r"^method in .*run.yaml is 'wandaa'"),
        ("model: m\npattern: 4:2\n", r"^pattern in .*run.yaml is '4:2', but must be"),
        (
            "model: m\npattern: 2:4\nscope: row\n",
            r"^scope in .*run.yaml does not go with pattern in .*run.yaml",
        ),
        ("- a\n- b\n", r"run.yaml must hold lines of KEY: VALUE"),
        ("", r"run.yaml must hold lines of KEY: VALUE"),
        ("a: b: c\n", r"run.yaml is no YAML file \(line 1\)"),
        ("method: wanda\n", r"^MODEL is missing"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        Recipe.from_yaml(in_file(tmp_path, text))
    assert "\n" not in str(caught.value)


_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: " + "[" * 100_000, r"is nested too deeply for a recipe \(line 1\)"),
        ("- " * 5_000, r"is nested too deeply"),
        ("settings: " + "{a: " * 12 + "1" + "}" * 12, r"is nested too deeply"),
        (_BOMB, r"has an alias, which no recipe needs \(line 2\)"),
        ("model: &m [*m]", r"has an alias"),
        ("model: !!python/object/apply:os.system [ls]", r"has a tag, which no recipe needs \(line 1\)"),
        ("bos: !!bool maybe", r"has a tag"),
        ("seed: !!int ''", r"has a tag"),
        ("model: m\nmodel: n", r"has the key model twice \(line 2\)"),
        ("settings: {steps: 1, steps: 2}", r"has the key steps twice"),
        ("? [a]\n: 1", r"has a key that is no word"),
        ("seed: " + "1" * 6_000, r"is no YAML file"),
        ("model: m\0", r"is no YAML file"),
        ("model: '" + "m" * 300_000 + "'", r"has more than 262,144 bytes"),
    ],
)
def test_yaml_that_no_recipe_needs_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    """A recipe may come from anybody: none takes long, or much memory, or ends in a traceback."""
    with pytest.raises(RecipeError, match=sentence) as caught:
        Recipe.from_yaml(in_file(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["[1]", "{a: 1}", "true", "null", "1.5", "-1", "1e999", ".nan", "9" * 400, "a: b"])
@pytest.mark.parametrize("key", list(Recipe.model_fields))
def test_whatever_a_key_holds_the_answer_is_a_recipe_or_one_sentence(tmp_path: Path, key: str, value: str) -> None:
    text = f"{key}: '{value}'" if value == "a: b" else f"{key}: {value}"
    said = ""
    try:
        Recipe.read({} if key == "model" else {"model": "m"}, in_file(tmp_path, text))
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1_000


def test_words_stay_words(tmp_path: Path) -> None:
    file = in_file(tmp_path, "model: 2024-01-01\ncalibration: no\nmethod: wanda\npattern: 2:4\n")
    recipe = Recipe.from_yaml(file)
    assert (recipe.model, recipe.calibration, recipe.pattern) == ("2024-01-01", "no", "2:4")


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with a method in a module that leaves a mark when it is imported."""
    (tmp_path / "foreign.py").write_text(
        "from pathlib import Path\nimport rarefy\n"
        f"Path({str(tmp_path / 'mark')!r}).touch()\n"
        "class Method(rarefy.Wanda): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign", raising=False)
    return in_file(tmp_path, "model: m\nmethod: foreign:Method\n")


@pytest.mark.parametrize("method", ["foreign:Method", "wanda+foreign:Method", "foreign:Method+pcg"])
def test_a_file_runs_no_code_unless_allowed(code: Path, tmp_path: Path, method: str) -> None:
    code.write_text(f"model: m\nmethod: {method}\n")
    with pytest.raises(
        RecipeError, match=f"^method in {code} is .*, which is code from outside Rarefy: --allow-code lets a recipe"
    ):
        Recipe.from_yaml(code)
    with pytest.raises(RecipeError, match="is code from outside Rarefy"):
        Recipe.read({"sparsity": "0.3"}, code)
    with pytest.raises(RecipeError, match="is code from outside Rarefy"):
        rarefy.run(code, tmp_path / "out")
    assert not (tmp_path / "mark").exists()


def test_code_that_is_allowed_or_that_an_option_names_is_run(code: Path, tmp_path: Path) -> None:
    assert Recipe.read({}, code, allow_code=True).build_method().name == "wanda"
    assert (tmp_path / "mark").exists()
    assert Recipe.read({"model": "m", "method": "foreign:Method"}).build_method().name == "wanda"
    assert Recipe.read({"method": "foreign:Method"}, code).build_method().name == "wanda"
    assert Recipe.read({"method": "ria"}, code).build_method().name == "ria"


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for file in (tmp_path / "missing.yaml", tmp_path, tmp_path / "binary"):
        with pytest.raises(RecipeError, match=f"^The recipe {file} "):
            Recipe.from_yaml(file)


def test_an_option_replaces_the_files_key(tmp_path: Path) -> None:
    file = in_file(
        tmp_path, "model: m\nmethod: sparsegpt\npattern: 2:4\nsettings: {damping: 0.1, block_size: 32}\nseed: 3\n"
    )
    assert Recipe.read({"sparsity": "0.3"}, file).build_pattern() == Unstructured(0.3)
    assert Recipe.read({"pattern": "4:8"}, file).build_pattern() == NM(4, 8)
    assert Recipe.read({"seed": "4"}, file).seed == 4
    assert Recipe.read({"settings": {"damping": "0.2"}}, file).resolved(None).settings == {
        "damping": 0.2,
        "block_size": 32,
        "score": "single",
    }
    assert Recipe.read({"method": "wanda"}, file).settings == {}
    by_row = in_file(tmp_path, "model: m\nsparsity: 0.7\nscope: row\n")
    assert Recipe.read({"pattern": "4:8"}, by_row).build_pattern() == NM(4, 8)


def test_a_mistake_in_an_option_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    file = in_file(tmp_path, "model: m\nseed: 3\n")
    with pytest.raises(InputError, match="^--seed is -1"):
        Recipe.read({"seed": "-1"}, file)
    with pytest.raises(RecipeError, match="^seed in "):
        Recipe.read({"batch_size": "2"}, in_file(tmp_path, "model: m\nseed: x\n"))


def test_windows_are_few_without_a_calibration_and_many_with_one() -> None:
    quick, full = read().resolved(None), read(calibration="c4").resolved(None)
    assert (quick.num_samples, quick.sequence_length, quick.calibration) == (
        *QUICK_WINDOWS,
        DEFAULT_CALIBRATION,
    )
    assert (full.num_samples, full.sequence_length, full.calibration) == (*FULL_WINDOWS, "c4")
    own = read(num_samples="3", sequence_length="5").resolved(None)
    assert (own.num_samples, own.sequence_length) == (3, 5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("fisher", "fisher")),
        ({"sparsity": 0.7}, ("fisher", "fisher")),
        ({"row_weights": "none"}, ("none", "fisher")),
        ({"allocation": "uniform"}, ("fisher", "uniform")),
        ({"sparsity": 0.995}, ("fisher", "uniform")),  # no layer is pruned beyond 99 %
        ({"scope": "row"}, ("none", "uniform")),
        ({"pattern": "4:8"}, ("none", "uniform")),
        ({"method": "sparsegpt"}, ("none", "uniform")),
        ({"method": "alps-paper"}, ("none", "uniform")),
        ({"method": "alps+quantize"}, ("none", "uniform")),
        ({"method": "sparsegpt", "scope": "layer", "allocation": "fisher"}, ("none", "fisher")),
    ],
)
def test_alps_follows_the_loss_where_there_is_a_choice(options: dict[str, object], expected: tuple[str, str]) -> None:
    resolved = read(**options).resolved(None)
    assert (resolved.row_weights, resolved.allocation) == expected
    plain = read(**options).resolved(None, follow_loss=False)
    assert (plain.row_weights, plain.allocation) == (
        options.get("row_weights", "none"),
        options.get("allocation", "uniform"),
    )


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"scope": "row"}])
def test_what_follows_the_loss_in_a_written_recipe_gives_way_to_another_pattern(
    tmp_path: Path, options: dict[str, str]
) -> None:
    file = in_file(tmp_path, read().resolved(None).to_yaml())
    changed = Recipe.read(options, file)
    assert (changed.row_weights, changed.allocation) == (None, None)
    assert Recipe.read({"sparsity": "0.7"}, file).allocation == "fisher"
    assert Recipe.read({**options, "allocation": "fisher"}, file).allocation == "fisher"
    own = in_file(tmp_path, "model: m\nallocation: profile\n")
    assert Recipe.read(options, own).allocation == "profile"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 4),
        ({"match": 2}, 1),
        ({"match": 2, "match_batch": 3}, 3),
        ({"match": 2, "batch_size": 5}, 5),
    ],
)
def test_with_matching_so_many_windows_run_at_once_as_a_step_has(options: dict[str, int], expected: int) -> None:
    recipe = read(**options)
    assert recipe.resolved(None).batch_size == expected
    assert recipe.prune_settings().batch_size == expected


def test_windows_fit_the_models_context() -> None:
    assert read(calibration="c4").resolved(512).sequence_length == 512
    with pytest.raises(InputError, match="^--sequence-length is 1024, but must be at most 512"):
        read(sequence_length="1024").resolved(512)


def test_more_tokens_than_memory_holds_are_refused() -> None:
    assert read(num_samples=2**17, sequence_length=2**11).resolved(None).window_shape == (2**17, 2**11)
    with pytest.raises(InputError, match=r"make 268,437,504 tokens, but at most 268,435,456 can be calibrated on\."):
        read(num_samples=2**17 + 1, sequence_length=2**11).resolved(None)


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"sparsity": "0.7", "method": "wanda"}, {}])
def test_a_resolved_recipe_says_everything_and_reads_back_the_same(tmp_path: Path, options: dict[str, str]) -> None:
    resolved = read(**options).resolved(4096)
    assert resolved.resolved(4096) == resolved
    assert Recipe.from_yaml(in_file(tmp_path, resolved.to_yaml())) == resolved
