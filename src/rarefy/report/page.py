"""One HTML page about one or more runs, that opens without a network: what was done, and what it did.

    views of runs and sweeps  -->  sections (numbers, tables, pictures, texts)  -->  the template  -->  a page

The page holds no script and asks for no other file. Its colours follow the reader's light or dark setting, its
columns the width of the screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rarefy.report.plots import (
    Picture,
    Point,
    against_sparsity,
    block_curves,
    error_curves,
    error_map,
    times,
    traces,
)
from rarefy.report.records import LayerRecord, Report, three_digits
from rarefy.report.results import Facts, Summary, measurements, summarise, table


@dataclass(frozen=True)
class LayerProof:
    """What the written file holds of one layer: zeros ``promised`` and ``counted``, and what is wrong with it."""

    name: str
    pattern: str
    size: int
    promised: int
    counted: int
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class RunView:
    """One pruned model: ``facts`` is its run.json; ``proof`` is empty where no model was written.

    ``dense_texts`` and ``texts`` are what the dense and the pruned model write, as (prompt, text);
    ``no_texts`` says why there are none.
    """

    name: str
    facts: Facts
    layers: Sequence[LayerRecord]
    recipe: str = ""
    proof: Sequence[LayerProof] = ()
    dense_texts: Sequence[tuple[str, str]] = ()
    texts: Sequence[tuple[str, str]] = ()
    no_texts: str = ""

    @property
    def label(self) -> str:
        """Method and pattern, as legends have it."""
        return f"{self.facts['method']}, {self.facts['pattern']}"


@dataclass(frozen=True)
class SweepView:
    """A folder that ``compare`` wrote: compare.json, the dense model's facts, and a view for each cell."""

    name: str
    sweep: Facts
    dense: Facts | None
    cells: Sequence[RunView]
    failed: Sequence[Facts] = ()


@dataclass
class Part:
    """A piece of a section; what is empty is not shown."""

    heading: str = ""
    text: str = ""
    cards: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    folded: str = ""
    left: bool = False
    code: str = ""
    texts: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Section:
    """A titled section of the page."""

    id: str
    title: str
    parts: list[Part]


def render(runs: Sequence[RunView], sweeps: Sequence[SweepView] = ()) -> str:
    """The page about ``runs`` and ``sweeps``, at least one of them."""
    # Of a sweep's cells, one seed is shown layer by layer; all of them count in its table and curves.
    first_seeds = [cell for sweep in sweeps for cell in _first_seed(sweep.cells)]
    views = [*runs, *first_seeds]
    sections = [
        Section("summary", "Summary", [*map(_summary, runs), *map(_sweep_summary, sweeps)]),
        Section("loss", "Loss against sparsity", _loss(runs, sweeps)),
        Section("errors", "Error of each layer", _errors(runs, first_seeds)),
        Section("proof", "Sparsity and pattern", [*(_proof(view) for view in runs), *map(_sweep_proof, sweeps)]),
        Section("iterations", "Iterations", _iterations(views)),
        Section("time", "Time", _time(runs, sweeps)),
        Section("texts", "What the models write", _texts(runs, sweeps)),
        Section("recipe", "Command, recipe and versions", _recipes(runs, sweeps)),
        Section("limits", "What the zeros gain, and what they do not", [Part(text=_LIMITS)]),
    ]
    names = [view.label for view in runs] + [f"comparison on {sweep.sweep['settings']['model']}" for sweep in sweeps]
    return _TEMPLATE.render(
        title="Rarefy: " + (names[0] if len(names) == 1 else f"{len(names)} runs"),
        subtitle="; ".join(dict.fromkeys([*(view.name for view in runs), *(sweep.name for sweep in sweeps)])),
        sections=[section for section in sections if section.parts],
    )


_LIMITS = (
    "A pruned checkpoint is a dense one that holds zeros: by itself it is neither smaller nor faster. At rest, "
    "general compression shrinks runs of zeros; 2:4 has kernels on NVIDIA GPUs from Ampere on, which pay off for "
    "large batches; some engines have kernels for unstructured sparsity on CPUs. Pruning costs quality, for some "
    "tasks more than perplexity shows. Perplexities at other context lengths or on other texts cannot be compared "
    "with these."
)


# --- Sections ---------------------------------------------------------------------------------------------


def _summary(view: RunView) -> Part:
    facts = view.facts
    report = Report(list(view.layers))
    cards = [
        (str(facts["method"]), "method"),
        (str(facts["pattern"]), "pattern"),
        (f"{report.sparsity:.2%}", f"of {report.size:,} weights are zero"),
        (three_digits(report.relative_error), "relative error, geometric mean of the layers"),
    ]
    for one in facts.get("perplexity", []):
        words = (
            f"perplexity on {one.get('label') or one['text']}, {one['windows']} windows of {one['length']:,} tokens"
        )
        cards.append((_perplexity(one["value"]), words))
    cards += [
        (three_digits(one["kl"]), f"nats of KL divergence from the dense model on {one['label']}")
        for one in facts.get("divergence", [])
    ]
    for task, result in facts.get("tasks", {}).items():
        if accuracy := result["metrics"].get("acc"):
            cards.append((f"{accuracy['value']:.1%}", f"accuracy on {task} (± {_percent(accuracy['stderr'])})"))
    if "total" in facts.get("seconds", {}):
        cards.append((f"{facts['seconds']['total']:,.0f} s", "for the whole run"))
    if facts.get("peak_bytes"):
        cards.append((f"{facts['peak_bytes'] / 2**30:.1f} GiB", "memory at most"))
    failed = [layer for layer in view.layers if layer.failed]
    text = f"The method failed on {len(failed)} layers: {', '.join(one.name for one in failed)}." if failed else ""
    return Part(heading=view.name, cards=cards, text=text)


def _sweep_summary(view: SweepView) -> Part:
    settings = view.sweep["settings"]
    everything: list[Facts] = [*(cell.facts for cell in view.cells), *view.failed]
    seeds = len({facts["seed"] for facts in everything})
    text = (
        f"{len(everything)} cells on {settings['model']}: perplexity over windows of {settings['eval_length']:,} "
        f"tokens, calibrated on {settings['num_samples']:,} windows of {settings['sequence_length']:,} tokens from "
        f"{settings['calibration']}"
        + (f", mean ± standard deviation over {seeds} seeds." if seeds > 1 else ".")
        + (f" {len(view.failed)} cells failed." if view.failed else "")
    )
    failed = [f"{one['method']}, {one['pattern']}, seed {one['seed']}: {one['reason']}" for one in view.failed]
    return Part(heading=view.name, text=" ".join([text, *failed]), rows=table(everything, view.dense))


def _loss(runs: Sequence[RunView], sweeps: Sequence[SweepView]) -> list[Part]:
    parts = []
    for sweep in sweeps:
        summaries = summarise([cell.facts for cell in sweep.cells])
        pictures: list[Picture] = []
        dense = measurements(sweep.dense) if sweep.dense else {}
        keys = dict.fromkeys(key for one in summaries for key in one.mean)
        for start, words in _NAMES.items():
            pictures += [
                against_sparsity(
                    [_point(one, key) for one in summaries if key in one.mean],
                    f"{words} {key.removeprefix(start).removesuffix('_acc')}",
                    dense.get(key),
                    share=start != "perplexity_" and start != "kl_",
                )
                for key in keys
                if (key.startswith(start) if start != "_acc" else key.endswith(start))
            ]
        if pictures:
            heading = sweep.name if len(sweeps) > 1 else ""
            text = "Bars: one standard deviation over seeds; with one seed, the standard error of accuracies."
            parts.append(Part(heading=heading, text=text, pictures=pictures))
    groups: dict[tuple[str, int], list[Point]] = {}
    for view in runs:
        for one in view.facts.get("perplexity", []):
            if one["value"] is not None:
                key = (one.get("label") or one["text"], one["length"])
                point = Point(
                    view.facts["method"], view.facts["pattern"], Report(list(view.layers)).sparsity, one["value"]
                )
                groups.setdefault(key, []).append(point)
    pictures = [
        against_sparsity(points, f"perplexity on {label} ({length:,} tokens)")
        for (label, length), points in groups.items()
        if len(points) > 1
    ]
    return [*parts, Part(pictures=pictures)] if pictures else parts


#: How columns of results begin (``_acc``: end), and what their pictures are called.
_NAMES = {
    "perplexity_": "perplexity on",
    "kl_": "KL divergence on",
    "agreement_": "same top-1 token on",
    "_acc": "accuracy on",
}


def _point(summary: Summary, key: str) -> Point:
    """With one seed, an accuracy has the standard error of its items for a bar."""
    bar = summary.deviation.get(key, summary.mean.get(f"{key}_stderr", 0.0))
    return Point(summary.method, summary.pattern, summary.sparsity, summary.mean[key], bar)


def _errors(runs: Sequence[RunView], cells: Sequence[RunView]) -> list[Part]:
    shown = [view for view in (*runs, *cells) if view.layers]
    values = [
        layer.relative_error
        for view in shown
        for layer in view.layers
        if math.isfinite(layer.relative_error) and layer.relative_error > 0
    ]
    if not values:
        return []
    limits = (min(values), max(values) if max(values) > min(values) else 2 * min(values))
    parts = [
        Part(
            text="The output energy that a layer lost, as graded from the weights that were written: 0 is exact, 1 "
            "is as bad as a matrix of zeros. All maps share one scale of colours."
        )
    ]
    parts.append(Part(pictures=[error_map(view.layers, _titled(view, shown), limits) for view in shown]))
    if len(shown) > 1:
        patterns = dict.fromkeys(view.facts["pattern"].rpartition(" ")[2] for view in shown)
        pictures = []
        for pattern in patterns:
            same = [view for view in shown if view.facts["pattern"].rpartition(" ")[2] == pattern]
            methods = [view.facts["method"] for view in same]
            plain = len(set(methods)) == len(methods)
            group = {view.facts["method"] if plain else _titled(view, shown): view.layers for view in same}
            pictures.append(block_curves(group, f"mean of each block, {pattern}"))
        parts.append(Part(pictures=pictures))
    if runs:
        parts.append(Part(pictures=[error_curves(view.layers, _titled(view, shown)) for view in runs if view.layers]))
    for view in runs:
        rows = [["layer", "shape", "kept", "zeros", "relative error", "steps", "seconds", "status"]]
        rows += [
            [
                layer.name,
                " x ".join(map(str, layer.shape)),
                f"{layer.kept:,}",
                f"{layer.pruned:,}",
                three_digits(layer.relative_error),
                str(layer.steps),
                f"{layer.seconds:.2f}",
                layer.status,
            ]
            for layer in view.layers
        ]
        parts.append(Part(rows=rows, folded=f"All {len(view.layers)} layers, {view.label}"))
    return parts


def _proof(view: RunView) -> Part:
    report = Report(list(view.layers))
    kinds = report.by_kind()
    if not view.proof:
        rows = [["linear", "layers", "pattern", "zeros", "sparsity"]]
        rows += [
            [kind, str(len(part.layers)), part.layers[0].pattern, f"{part.pruned:,}", f"{part.sparsity:.4%}"]
            for kind, part in kinds.items()
        ]
        text = "No model was written; these are the masks' exact counts."
        return Part(heading=view.label, text=text, rows=rows)
    proofs = {one.name: one for one in view.proof}
    rows = [
        ["linear", "layers", "pattern", "zeros promised", "zeros in the files", "sparsity in the files", "promise"]
    ]
    for kind, part in kinds.items():
        mine = [proofs[layer.name] for layer in part.layers if layer.name in proofs]
        counted, size = sum(one.counted for one in mine), sum(one.size for one in mine)
        broken = any(one.problems for one in mine)
        rows.append(
            [
                kind,
                str(len(mine)),
                part.layers[0].pattern,
                f"{part.pruned:,}",
                f"{counted:,}",
                f"{counted / size:.4%}" if size else "",
                "broken" if broken else "holds",
            ]
        )
    problems = [f"{one.name}: {problem}" for one in view.proof for problem in one.problems]
    text = "The written files, read again: " + (
        "; ".join(problems) + "." if problems else "every layer holds at least the promised zeros, in its pattern."
    )
    return Part(heading=view.label, text=text, rows=rows)


def _sweep_proof(sweep: SweepView) -> Part:
    rows = [["method", "pattern", "seed", "layers", "zeros", "sparsity", "in files", "promise"]]
    for cell in sweep.cells:
        report = Report(list(cell.layers))
        counted = sum(one.counted for one in cell.proof)
        promise = "broken" if any(one.problems for one in cell.proof) else "holds"
        rows.append(
            [
                *(str(cell.facts[key]) for key in ("method", "pattern", "seed")),
                str(len(cell.layers)),
                f"{report.pruned:,}",
                f"{report.sparsity:.4%}",
                f"{counted:,}" if cell.proof else "not written",
                promise if cell.proof else "",
            ]
        )
    text = "The masks' exact counts, and the zeros in the files of those models that were written."
    return Part(text=text, rows=rows)


def _iterations(views: Sequence[RunView]) -> list[Part]:
    parts = []
    for view in views:
        stepped = [layer for layer in view.layers if layer.steps]
        if not stepped:
            continue
        keys = list(dict.fromkeys(key for layer in stepped for key in layer.trace))
        pictures = [made for key in keys if (made := traces(stepped, key, f"{key}, {view.label}"))]
        statuses: dict[str, int] = {}
        for layer in stepped:
            statuses[layer.status] = statuses.get(layer.status, 0) + 1
        steps = [layer.steps for layer in stepped]
        how = ", ".join(f"{status} ({count})" for status, count in statuses.items())
        span = f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else str(steps[0])
        parts.append(
            Part(heading=view.label, text=f"{span} steps in each of {len(stepped)} layers: {how}.", pictures=pictures)
        )
    if views and not parts:
        return [Part(text="The methods used here have no iterations.")]
    return parts


def _time(runs: Sequence[RunView], sweeps: Sequence[SweepView]) -> list[Part]:
    pictures = []
    for view in runs:
        stages = {name: value for name, value in view.facts.get("seconds", {}).items() if name != "total"}
        if stages:
            pictures.append(times(stages, f"stages, {view.label}"))
        kinds = {kind: part.seconds for kind, part in Report(list(view.layers)).by_kind().items()}
        kinds = {kind: sum(layer.seconds for layer in view.layers if layer.kind == kind) for kind in kinds}
        if any(kinds.values()):
            pictures.append(times(kinds, f"solving each kind of linear, {view.label}"))
    for sweep in sweeps:
        seconds = {
            f"{one.method}, {one.pattern}": one.mean["seconds"]
            for one in summarise([cell.facts for cell in sweep.cells])
            if "seconds" in one.mean
        }
        if seconds:
            pictures.append(times(seconds, "pruning, each method and pattern"))
    return [Part(pictures=pictures)] if pictures else []


def _texts(runs: Sequence[RunView], sweeps: Sequence[SweepView]) -> list[Part]:
    parts = []
    for view in runs:
        if not view.texts:
            parts.append(Part(heading=view.label if len(runs) > 1 else "", text=f"No texts: {view.no_texts}"))
            continue
        dense = dict(view.dense_texts)
        for prompt, text in view.texts:
            sides = [("dense", dense[prompt])] if prompt in dense else []
            parts.append(Part(heading=f"“{prompt}”", texts=[*sides, (view.label, text)]))
    for sweep in sweeps:
        cells = _first_seed(sweep.cells)
        prompts = list(dict.fromkeys(prompt for cell in cells for prompt, _ in cell.texts))
        dense = {one["prompt"]: one["text"] for one in (sweep.dense or {}).get("texts", [])}
        for prompt in prompts:
            sides = [("dense", dense[prompt])] if prompt in dense else []
            sides += [(cell.label, dict(cell.texts)[prompt]) for cell in cells if prompt in dict(cell.texts)]
            parts.append(Part(heading=f"“{prompt}”", texts=sides))
        if not prompts:
            parts.append(Part(text="No texts: the sweep kept none."))
    if any(part.texts for part in parts):
        parts.insert(0, Part(text="Always the likeliest token, 40 of them, after each prompt."))
    return parts


def _recipes(runs: Sequence[RunView], sweeps: Sequence[SweepView]) -> list[Part]:
    parts = []
    for view in runs:
        parts.append(Part(heading=view.label, code=str(view.facts.get("command", ""))))
        if view.recipe:
            parts.append(Part(code=view.recipe))
        parts.append(Part(text=_versions(view.facts)))
    for sweep in sweeps:
        parts.append(Part(heading=sweep.name, code=str(sweep.sweep.get("command", "")), text=""))
        rows = [["setting", "value"]]
        rows += [[key.replace("_", " "), _plain(value)] for key, value in sweep.sweep["settings"].items()]
        parts.append(Part(rows=rows, left=True))
        parts.append(Part(text=_versions(sweep.sweep)))
    return parts


# --- Helpers ----------------------------------------------------------------------------------------------


def _first_seed(cells: Sequence[RunView]) -> list[RunView]:
    seen: dict[str, RunView] = {}
    for cell in cells:
        seen.setdefault(cell.label, cell)
    return list(seen.values())


def _titled(view: RunView, views: Sequence[RunView]) -> str:
    """The view's label, with its folder where another has the same one."""
    same = [one for one in views if one.label == view.label]
    return view.label if len(same) == 1 else f"{view.label} ({view.name})"


def _versions(facts: Facts) -> str:
    return ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _perplexity(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.2f}"


def _percent(value: float | None) -> str:
    return f"{value:.1%}" if value is not None else "unknown"


_TEMPLATE = Environment(
    loader=PackageLoader("rarefy.report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True
).get_template("page.html.jinja")
