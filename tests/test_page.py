"""The report: complete, self-contained, accessible; and drawn by a real browser without a fault."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cli_for_tests import Rarefy, is_one_sentence
from rarefy.errors import InputError
from rarefy.layer.pattern import NM, PerRow, Unstructured
from rarefy.pruning.records import LayerRecord
from rarefy.report.build import write_report
from rarefy.report.page import render
from rarefy.report.sections import _budget
from rarefy.report.views import LayerProof, RunView
from rarefy.runs.folder import RunFolder
from rarefy.sweeps.folder import SweepFolder
from rarefy.sweeps.options import Options
from rarefy.sweeps.plan import plan_sweep
from rarefy.sweeps.sweep import run_sweep

Folders = Callable[[str], Path]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def records(blocks: int = 4, steps: int = 0) -> list[LayerRecord]:
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    return [
        LayerRecord(
            name=f"model.layers.{block}.{kind}",
            block=block,
            shape=[8, 16],
            pattern="unstructured 50%",
            kept=64,
            relative_error=0.01 * (1 + i) / (1 + block),
            status="all steps taken" if steps else "solved",
            steps=steps,
            seconds=0.5,
            trace={"support change": [float(steps - t) for t in range(steps)]} if steps else {},
        )
        for block in range(blocks)
        for i, kind in enumerate(kinds)
    ]


def facts(**more: Any) -> dict[str, Any]:
    return {
        "command": "rarefy prune 'a <model>' -o out",
        "versions": {"rarefy": "0.1.0", "torch": "2"},
        "method": "admm",
        "pattern": "unstructured 50%",
        "seconds": {"load": 1.5, "prune": 20.0, "total": 22.0},
        "peak_bytes": 2**30,
        "perplexity": [{"text": "words", "value": 21.5, "length": 2048, "windows": 20}],
        **more,
    }


class Page(HTMLParser):
    """Checks that tags are closed, and collects attributes."""

    VOID = {"meta", "link", "br", "img", "input"}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(text: str) -> Page:
    """What holds for every page: nothing is fetched, every picture is named, every id is there once."""
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag != "script"
        for key in ("src", "href", "xlink:href"):
            target = attributes.get(key) or "#"
            assert target.startswith(("#", "data:")), target
            if target.startswith("#") and len(target) > 1:
                assert target[1:] in ids
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"] or "") > 20
    for found in re.findall(r"url\(([^)]*)\)", text):
        assert found.startswith("#")
        assert found[1:] in ids
    assert "@import" not in text
    return page


def pictures(page: Page) -> list[str]:
    return [attributes["aria-label"] or "" for tag, attributes in page.tags if tag == "svg"]


def view(name: str = "out", **more: Any) -> RunView:
    values: dict[str, Any] = {"facts": facts(), "layers": records(), "no_texts": "the run wrote no model."}
    return RunView(name, **(values | more))


def test_one_run() -> None:
    text = render([view(recipe="model: <b>\n")])
    page = check(text)
    assert "Rarefy: admm, unstructured 50%" in text
    assert "a &lt;model&gt;" in text
    assert "model: &lt;b&gt;" in text
    assert "21.50" in text
    assert "20 windows of 2,048 tokens" in text
    assert "No texts: the run wrote no model." in text
    assert "no iterations" in text
    assert "neither smaller nor faster" in text
    alts = " ".join(pictures(page))
    assert "Heat map of the relative error of 3 linears in 4 blocks" in alts
    assert "Lowest 0.0025 in model.layers.3.self_attn.q_proj, highest 0.03 in model.layers.0.mlp.down_proj" in alts
    assert "load 1.5 seconds, prune 20.0 seconds" in alts
    assert "<table" in text


def test_iterations_are_drawn() -> None:
    page = check(render([view(layers=records(steps=6))]))
    assert any("support change over 6 steps" in alt and "from 6 to 1" in alt for alt in pictures(page))


def test_the_proof_says_what_is_broken() -> None:
    def proofs(counted: int, *problems: str) -> list[LayerProof]:
        return [LayerProof(one.name, one.pattern, one.size, one.pruned, counted, problems) for one in records()]

    good = render([view(proof=proofs(70))])
    assert "every layer holds at least the promised zeros" in good
    assert "54.6875%" in good  # 70 of 128
    bad = render([view(proof=proofs(3, "it holds 3 zeros, promised were 64"))])
    assert "model.layers.0.mlp.down_proj: it holds 3 zeros" in bad
    assert 'class="bad">broken' in bad


def test_texts_stand_side_by_side() -> None:
    text = render([view(dense_texts=[("Once", "upon <a>")], texts=[("Once", "a time")])])
    assert text.index("upon &lt;a&gt;") < text.index("a time")
    assert "“Once”" in text


def test_several_runs_are_drawn_against_sparsity() -> None:
    second = facts(method="wanda", perplexity=[{"text": "words", "value": 30.0, "length": 2048, "windows": 20}])
    page = check(render([view("a"), view("b", facts=second)]))
    assert any("perplexity on words (2,048 tokens) against sparsity" in alt for alt in pictures(page))
    other = facts(perplexity=[{"text": "words", "value": 30.0, "length": 1024, "windows": 20}])
    page = check(render([view("a"), view("b", facts=other)]))  # another context length is not comparable
    assert not any("against sparsity" in alt for alt in pictures(page))


def test_failures_and_infinite_errors_are_shown() -> None:
    layers = records()
    layers[0].relative_error = float("inf")
    layers[0].failed = True
    layers[0].status = "diverged: the last finite iterate is returned"
    text = render([view(layers=layers)])
    check(text)
    assert "failed on 1 layers: model.layers.0.self_attn.q_proj" in text
    assert "diverged" in text
    for one in layers:
        one.relative_error = 0.0
    check(render([view(layers=layers)]))


# --- From folders -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(model_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    text = root / "words.txt"
    text.write_text("The rain in the north is another thing than the rain at sea. " * 12)
    options = Options(
        model=str(model_folder("llama")),
        methods=["wanda", "alps", "test_sweeps:Failing"],
        sparsities=["0.5"],
        patterns=["2:4"],
        seeds=2,
        calibration=str(text),
        num_samples=4,
        sequence_length=16,
        texts=[str(text), f"second={text}"],
        eval_length=32,
        save=True,
    )
    folder = SweepFolder(root / "out")
    run_sweep(plan_sweep(options, folder), folder, ["rarefy", "compare"])
    return folder.path


def test_a_sweep(swept: Path, tmp_path: Path) -> None:
    file = write_report([swept], tmp_path / "page.html")
    text = file.read_text()
    alts = pictures(check(text))
    assert sum(alt.startswith("Heat map") for alt in alts) == 4
    assert any("perplexity on words against sparsity" in alt and "The dense model has" in alt for alt in alts)
    assert any("KL divergence on second against sparsity" in alt for alt in alts)
    assert any("support change over" in alt for alt in alts)
    assert "4 cells failed" in text
    assert "ZeroDivisionError" in text
    assert text.count("“The capital of France") == 1
    assert 'class="good">holds' in text
    assert "mean ± standard deviation over 2 seeds" in text


def test_a_run_lets_the_models_write(swept: Path, tmp_path: Path) -> None:
    cell = tmp_path / "run"
    shutil.copytree(swept / "cells" / "wanda_2of4_seed0", cell)
    kept = json.loads((cell / "run.json").read_text())
    texts = kept.pop("texts")
    (cell / "run.json").write_text(json.dumps(kept))
    assert write_report([cell], texts=True) == cell / "report.html"
    page = (cell / "report.html").read_text()
    assert "No texts" not in page
    assert texts[0]["text"] in html.unescape(page)
    shutil.rmtree(cell / "model")
    write_report([cell], texts=True)
    assert "No texts: the run wrote no model." in (cell / "report.html").read_text()


def test_no_model_is_loaded_unless_asked_for(
    rarefy_: Rarefy, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run folder may come from anybody, and its recipe may name any model of the hub."""
    cell = tmp_path / "run"
    shutil.copytree(swept / "cells" / "wanda_2of4_seed0", cell)
    kept = json.loads((cell / "run.json").read_text())
    (cell / "run.json").write_text(json.dumps({key: value for key, value in kept.items() if key != "texts"}))
    recipe = (cell / "recipe.yaml").read_text()
    (cell / "recipe.yaml").write_text(re.sub(r"model: .*", "model: somebody/else", recipe, count=1))
    asked: list[str] = []

    def resolve(name: str, **_: bool) -> None:
        asked.append(name)
        raise InputError.sentence("It is not there.")

    with monkeypatch.context() as patch:
        patch.setattr("rarefy.models.checkpoint.load_model", lambda *_: pytest.fail("a model was loaded"))
        patch.setattr("rarefy.models.source.resolve_model", resolve)
        assert rarefy_("report", "run").status == 0
        assert asked == []
        page = html.unescape((cell / "report.html").read_text())
        assert "No texts: the run kept none; `rarefy report --texts` loads the dense and the pruned model" in page
        done = rarefy_("report", "run", "--texts")
        assert asked == ["somebody/else"]
        assert done.err.startswith("loading somebody/else, which run/recipe.yaml names, and run/model")
        assert "No texts: It is not there." in (cell / "report.html").read_text()


def test_a_dense_model_that_is_gone_is_said(swept: Path, tmp_path: Path) -> None:
    cell = tmp_path / "run"
    shutil.copytree(swept / "cells" / "wanda_2of4_seed0", cell)
    kept = json.loads((cell / "run.json").read_text())
    del kept["texts"]
    (cell / "run.json").write_text(json.dumps(kept))
    recipe = (cell / "recipe.yaml").read_text()
    (cell / "recipe.yaml").write_text(re.sub(r"model: .*", "model: ./gone", recipe, count=1))
    write_report([cell], texts=True)
    assert "No texts: There is no folder ./gone" in (cell / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "no such folder"),
        ("empty", "no run.json"),
        ("unfinished", "no run.json"),
        ("damaged", "cannot be read"),
    ],
)
def test_folders_that_are_no_run(name: str, words: str, tmp_path: Path) -> None:
    for folder in ("empty", "unfinished", "damaged"):
        (tmp_path / folder).mkdir()
    RunFolder(tmp_path / "unfinished").write_layers(records())
    RunFolder(tmp_path / "damaged").write_layers(records())
    (tmp_path / "damaged" / "run.json").write_text("{")
    with pytest.raises(InputError, match=words):
        write_report([tmp_path / name])
    assert not list(tmp_path.rglob("report.html"))


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_layers(records())
    folder.write_run(facts())
    with pytest.raises(InputError, match="--output"):
        write_report([tmp_path], tmp_path / "none" / "page.html")
    with pytest.raises(InputError, match="RUN is missing"):
        write_report([])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "Missing argument 'RUN...'"),
        ("SHELF/missing", "there is no such folder"),
        ("SHELF/no_model", "it has no run.json"),
        ("SHELF/model", "must be a folder that `rarefy prune` or `rarefy compare` wrote"),
        ("SHELF/text.txt", "must be a folder that `rarefy prune` or `rarefy compare` wrote"),
        ("SWEPT SHELF/missing", "there is no such folder"),
        ("SWEPT -o none/page.html", "--output is 'none/page.html', but must be a file in a folder that exists"),
    ],
)
def test_every_mistake_in_the_command_is_one_sentence(
    rarefy_: Rarefy, shelf: Path, swept: Path, tmp_path: Path, arguments: str, sentence: str
) -> None:
    done = rarefy_("report", *arguments.replace("SHELF", str(shelf)).replace("SWEPT", str(swept)).split())
    assert is_one_sentence(done.err), done.err
    assert sentence in done.err
    assert (done.status, done.out) == (2, "")
    assert list(tmp_path.iterdir()) == []
    assert not (swept / "report.html").exists()


def test_the_command(rarefy_: Rarefy, swept: Path) -> None:
    done = rarefy_("report", swept, swept / "cells" / "wanda_2of4_seed0", "-o", "page.html", "--no-texts")
    assert (done.status, done.out) == (0, "page.html holds the report\n")
    check(Path("page.html").read_text())


# --- In a browser -----------------------------------------------------------------------------------------

_PROBE = """
<script>
const errors = [];
window.addEventListener("error", event => errors.push(String(event.message || event.target.outerHTML)), true);
window.addEventListener("load", () => {
  const root = document.documentElement;
  const svgs = [...document.querySelectorAll("figure > svg")];
  const sizes = svgs.map(svg => svg.getBoundingClientRect());
  const drawn = svgs.filter(svg => [...svg.querySelectorAll("path, text, image")].some(part => {
    const box = part.getBoundingClientRect(); return box.width > 0 && box.height > 0; }));
  const sticking = [...document.querySelectorAll("body *")].filter(one => !one.closest(".scroll")
    && !one.closest("svg") && one.getBoundingClientRect().right > root.clientWidth + 1);
  const labels = [...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height);
  parent.postMessage({
    errors, width: root.clientWidth, content: root.scrollWidth, figures: svgs.length, drawn: drawn.length,
    empty: sizes.filter(size => size.width < 200 || size.height < 60).length,
    sticking: sticking.map(one => one.outerHTML.slice(0, 100)),
    smallest: Math.min(...labels.filter(height => height > 0)),
    ink: getComputedStyle(document.body).color, page: getComputedStyle(document.body).backgroundColor,
    images: [...document.images].filter(image => !image.complete || !image.naturalWidth).length,
  }, "*");
});
</script>
"""


def in_browser(page: str, width: int, folder: Path, *flags: str) -> dict[str, Any]:
    """What the page looks like in a window of that width: its own errors, sizes and colours."""
    inner = html.escape(page.replace("<head>", "<head>" + _PROBE), quote=True)
    wrapper = (
        f'<body style="margin:0"><iframe style="border:0;width:{width}px;height:900px" srcdoc="{inner}"></iframe>'
        '<pre id="found"></pre><script>addEventListener("message", event => '
        'document.getElementById("found").textContent = JSON.stringify(event.data));</script>'
    )
    file = folder / f"wrapper-{width}.html"
    file.write_text(wrapper, encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
    ]
    command += [
        f"--user-data-dir={folder / f'profile-{width}'}",
        "--window-size=1400,1000",
        "--virtual-time-budget=10000",
    ]
    command += [*flags, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(swept: Path, tmp_path: Path) -> None:
    text = write_report([swept, swept / "cells" / "alps_2of4_seed0"], tmp_path / "page.html").read_text()
    figures = len(pictures(check(text)))
    colours = set()
    for width, flags in ((1280, []), (390, []), (1280, ["--blink-settings=preferredColorScheme=0"])):
        folder = tmp_path / f"{width}-{len(flags)}"
        folder.mkdir()
        found = in_browser(text, width, folder, *flags)
        assert found["errors"] == []
        assert found["width"] == width
        assert found["content"] <= width
        assert found["sticking"] == []
        assert found["figures"] == found["drawn"] == figures
        assert found["empty"] == found["images"] == 0
        assert found["smallest"] >= 9  # pixels of a line of text in a picture
        colours.add((found["ink"], found["page"]))
    assert len(colours) == 2  # light, and dark


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_browser_test_sees_faults(tmp_path: Path) -> None:
    bad = '<!doctype html><html><head></head><body><script>fail()</script><img src="gone.png">'
    bad += '<div style="width:3000px">wide</div><figure><svg viewBox="0 0 1 1"></svg></figure></body></html>'
    found = in_browser(bad, 390, tmp_path)
    assert found["errors"]
    assert found["content"] > 390
    assert found["sticking"]
    assert found["images"] == 1
    assert (found["figures"], found["drawn"]) == (1, 0)


def test_cells_that_say_as_little_as_they_may(tmp_path: Path) -> None:
    settings = {"model": "m", "calibration": "self", "num_samples": 1, "sequence_length": 2, "eval_length": 3}
    (tmp_path / "compare.json").write_text(json.dumps({"settings": settings}))
    facts: dict[str, object] = {"method": "wanda", "pattern": "2:4", "asked_sparsity": 0.5}
    record = {"name": "up", "block": 0, "shape": [2, 4], "pattern": "2:4", "kept": 4, "relative_error": 0.5}
    for status in ("done", "failed"):
        cell = tmp_path / "cells" / status
        cell.mkdir(parents=True)
        (cell / "run.json").write_text(json.dumps(facts | {"status": status}))
        (cell / "layers.jsonl").write_text(json.dumps(record | {"status": "solved"}))
    page = write_report([tmp_path]).read_text()
    assert "1 cell failed" in page
    (cell / "run.json").write_text(json.dumps(facts | {"status": "done", "pattern_spec": 3}))
    with pytest.raises(InputError, match=r"run\.json is damaged: pattern_spec: "):
        write_report([tmp_path])


def test_runs_are_compared_by_the_zeros_that_they_were_asked_for() -> None:
    specs = [pattern.spec() for pattern in (Unstructured(0.5), PerRow(0.5), NM(2, 4))]
    assert [_budget({"pattern": "p", "pattern_spec": spec}) for spec in specs] == ["50%", "50%", "2:4"]
    assert _budget({"pattern": "2:4"}) == _budget({"pattern": "2:4", "pattern_spec": {"kind": 3}}) == "2:4"


@pytest.mark.parametrize("command", ["report", "inspect", "eval"])
def test_an_unfinished_run_is_named(rarefy_: Rarefy, tmp_path: Path, command: str) -> None:
    (tmp_path / "out" / "unfinished").mkdir(parents=True)
    done = rarefy_(command, "out")
    assert (done.status, done.out) == (2, "")
    assert "holds an unfinished run" in done.err
