"""The sections of the report: numbers, tables, pictures and texts of each, made from views of runs and sweeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.errors import PatternError
from rarefy.pruning.records import Report, three_digits
from rarefy.report.plots import (
    Picture,
    Point,
    against_sparsity,
    block_curves,
    error_curves,
    error_map,
    sparsity_curves,
    times,
    traces,
)
from rarefy.report.views import Part, RunView, SweepView
from rarefy.sweeps.results import Facts, Summary, measurements, perplexity_words, summarise, table


def summary(view: RunView) -> Part:
    """The numbers of one run, as cards."""
    facts = view.facts
    report = Report(list(view.layers))
    cards = [(str(facts["method"]), "method")]
    if (shrunk := facts.get("shrink")) is None:
        cards += [
            (str(facts["pattern"]), "pattern"),
            (f"{report.sparsity:.2%}", f"of {report.size:,} weights are zero"),
            (three_digits(report.relative_error), "relative error, geometric mean of the layers"),
        ]
    else:
        left = shrunk["after"]["parameters"] / max(1, shrunk["before"]["parameters"])
        cards += [(str(facts["pattern"]), "removed"), (f"{left:.1%}", "of the parameters are left")]
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
            cards.append((_percent(accuracy["value"]), f"accuracy on {task} (±\u00a0{_percent(accuracy['stderr'])})"))
    if "total" in facts.get("seconds", {}):
        cards.append((f"{facts['seconds']['total']:,.0f} s", "for the whole run"))
    if facts.get("peak_bytes"):
        cards.append((f"{facts['peak_bytes'] / 2**30:.1f} GiB", "memory at most"))
    failed = [layer for layer in view.layers if layer.failed]
    text = f"The method failed on {len(failed)} layers: {', '.join(one.name for one in failed)}." if failed else ""
    return Part(heading=view.name, cards=cards, text=text)


def sweep_summary(view: SweepView) -> list[Part]:
    """What a sweep measured: its table in pieces that fit a screen, and the cells that failed."""
    settings = view.sweep["settings"]
    everything: list[Facts] = [*(cell.facts for cell in view.cells), *view.failed]
    seeds = len({facts["seed"] for facts in everything})
    text = (
        f"{len(everything)} cells on {settings['model']}: perplexity over windows of {settings['eval_length']:,} "
        f"tokens, calibrated on {settings['num_samples']:,} windows of {settings['sequence_length']:,} tokens from "
        f"{settings['calibration']}"
        + (f", mean ± standard deviation over {seeds} seeds." if seeds > 1 else ".")
        + (f" {len(view.failed)} cell{'s' * (len(view.failed) > 1)} failed." if view.failed else "")
    )
    pieces = _narrow(table(everything, view.dense))
    parts = [Part(heading=view.name, text=text, rows=pieces.pop("loss and cost"))]
    parts += [Part(text=name, rows=rows) for name, rows in pieces.items()]
    if view.failed:
        rows = [["failed", "pattern", "seed", "reason"]]
        rows += [[*(str(one[key]) for key in ("method", "pattern", "seed", "reason"))] for one in view.failed]
        parts.append(Part(rows=rows, left=True))
    if left_out := view.sweep.get("left_out"):
        rows = [["left out", "pattern", "reason"]]
        rows += [[*(str(one[key]) for key in ("name", "asked", "reason"))] for one in left_out]
        parts.append(Part(rows=rows, left=True))
    return parts


def _narrow(rows: list[list[str]]) -> dict[str, list[list[str]]]:
    """A wide table as up to three, by what they are about; each begins with method and pattern.

    Rows that would say nothing are left out.
    """
    heading = rows[0]
    distance = [i for i, name in enumerate(heading) if name.startswith(("KL ", "same top-1 "))]
    tasks = [i for i, name in enumerate(heading) if name.endswith(" accuracy")]
    pieces = {
        "loss and cost": [i for i in range(2, len(heading)) if i not in (*distance, *tasks)],
        "Distance from the dense model: KL divergence in nats per token, share of equal top-1 tokens.": distance,
        "Zero-shot tasks.": tasks,
    }
    return {
        name: [[row[i] for i in (0, 1, *columns)] for row in rows if any(row[i] for i in columns)]
        for name, columns in pieces.items()
        if columns
    }


def loss(runs: Sequence[RunView], sweeps: Sequence[SweepView]) -> list[Part]:
    """Every measurement against sparsity: of a sweep, and of runs that were measured on the same text."""
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
                    view.facts["method"],
                    view.facts["pattern"],
                    Report(list(view.layers)).sparsity,
                    one["value"],
                    in_groups=view.facts.get("pattern_spec", {}).get("kind") == "n:m",
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
    """A summary as a point; the bar of an accuracy of one seed is its standard error over the task's items."""
    bar = summary.deviation.get(key, summary.mean.get(f"{key}_stderr", 0.0))
    return Point(summary.method, summary.pattern, summary.sparsity, summary.mean[key], bar, summary.in_groups)


def errors(runs: Sequence[RunView], cells: Sequence[RunView]) -> list[Part]:
    """The relative error of every layer as maps, curves and, for runs, a table."""
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
            "is as bad as a matrix of zeros." + (" All maps share one scale of colours." if len(shown) > 1 else "")
        )
    ]
    maps = [error_map(view.layers, _titled(view, shown), limits) for view in shown]
    # Of a single run, map and curves stand side by side.
    curves = [error_curves(view.layers, f"by block, {_titled(view, shown)}") for view in runs if view.layers]
    parts.append(Part(pictures=[*maps, *curves] if len(shown) == 1 else maps))
    if len(shown) > 1:
        patterns = dict.fromkeys(_budget(view.facts) for view in shown)
        pictures = []
        for pattern in patterns:
            same = [view for view in shown if _budget(view.facts) == pattern]
            methods = [view.facts["method"] for view in same]
            plain = len(set(methods)) == len(methods)
            group = {view.facts["method"] if plain else _titled(view, shown): view.layers for view in same}
            pictures.append(block_curves(group, f"mean of each block, {pattern}"))
        parts.append(Part(pictures=pictures))
        parts.append(Part(pictures=curves))
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


def proof(view: RunView) -> Part:
    """The zeros that a run promised and those in its files."""
    report = Report(list(view.layers))
    kinds = report.by_kind()
    spread = len({layer.pattern for layer in view.layers}) > 1
    pictures = [sparsity_curves(view.layers, f"allocation, {view.label}")] if spread else []
    if not view.proof:
        rows = [["linear", "layers", "pattern", "zeros", "sparsity"]]
        rows += [
            [kind, str(len(part.layers)), _pattern_words(part), f"{part.pruned:,}", f"{part.sparsity:.4%}"]
            for kind, part in kinds.items()
        ]
        text = "No model was written; these are the masks' exact counts."
        return Part(heading=view.label, text=text, rows=rows, pictures=pictures)
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
                _pattern_words(part),
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
    return Part(heading=view.label, text=text, rows=rows, pictures=pictures)


def _pattern_words(part: Report) -> str:
    """The pattern of layers of one kind; the first and the last by sparsity where an allocation gave each its own."""
    least, most = (limit(part.layers, key=lambda layer: layer.sparsity).pattern for limit in (min, max))
    return least if least == most else f"{least} to {most}"


def sweep_proof(sweep: SweepView) -> Part:
    """The zeros that the cells of a sweep promised, and those in the files of the models that it wrote."""
    rows = [["method", "pattern", "seed", "layers", "zeros", "sparsity", "in files", "promise"]]
    for cell in sweep.cells:
        if not cell.layers:  # made smaller, which promises no zeros
            continue
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


def iterations(views: Sequence[RunView]) -> list[Part]:
    """What iterative methods noted at their steps."""
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


def time(runs: Sequence[RunView], sweeps: Sequence[SweepView]) -> list[Part]:
    """Seconds of stages, of kinds of layers, and of methods."""
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


def texts(runs: Sequence[RunView], sweeps: Sequence[SweepView]) -> list[Part]:
    """What dense and pruned models write, side by side."""
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
        cells = first_seed(sweep.cells)
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


def recipes(runs: Sequence[RunView], sweeps: Sequence[SweepView]) -> list[Part]:
    """Commands, settings and versions."""
    parts = []
    for view in runs:
        parts.append(Part(heading=view.label, code=str(view.facts.get("command", ""))))
        if view.recipe:
            parts.append(Part(code=view.recipe))
        parts.append(Part(text=_versions(view.facts)))
    for sweep in sweeps:
        parts.append(Part(heading=sweep.name, code="\n".join(sweep.sweep.get("commands", [])), text=""))
        rows = [["setting", "value"]]
        rows += [[key.replace("_", " "), _plain(value)] for key, value in sweep.sweep["settings"].items()]
        parts.append(Part(rows=rows, left=True))
        parts.append(Part(text=_versions(sweep.sweep)))
    return parts


# --- Helpers ----------------------------------------------------------------------------------------------


def first_seed(cells: Sequence[RunView]) -> list[RunView]:
    """One cell for each method and pattern."""
    seen: dict[str, RunView] = {}
    for cell in cells:
        seen.setdefault(cell.label, cell)
    return list(seen.values())


def _titled(view: RunView, views: Sequence[RunView]) -> str:
    """The view's label, with its folder where another has the same one."""
    same = [one for one in views if one.label == view.label]
    return view.label if len(same) == 1 else f"{view.label} ({view.name})"


def _budget(facts: Facts) -> str:
    """The zeros that a run was asked for, by which runs are compared: N:M, or a sparsity, whatever its scope.

    The pattern's name where the run does not say its spec.
    """
    from rarefy.layer.pattern import pattern_from_spec

    try:
        pattern = pattern_from_spec(facts.get("pattern_spec", {}))
    except PatternError:
        return str(facts["pattern"])
    return str(pattern) if pattern.group > 1 else f"{100 * pattern.nominal_sparsity():.4g}%"


def _versions(facts: Facts) -> str:
    return ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _perplexity(value: float | None) -> str:
    return "not finite" if value is None else perplexity_words(value)


def _percent(value: float | None) -> str:
    return f"{value:.1%}" if value is not None else "unknown"
