"""The pictures of the report, as SVG that stands inside the page: text is text, and takes the page's colour.

Each is drawn 324 units wide, so that at the width of a phone a unit is at least a pixel and 9-point labels stay
readable; wider screens show several beside each other. Every picture comes with the sentence that replaces it
for those who cannot see it.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rarefy.pruning.records import LayerRecord, geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Stands for the page's text colour until the SVG is part of the page.
_INK = "#010203"
#: Colours of Okabe and Ito that differ for all kinds of sight, and stand out on white and on near-black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
_MARKERS = "osD^vP*X"
_WIDTH = 4.5  # inches of 72 units
_STYLE: Any = {  # matplotlib's type lists every key
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.grid": True,
    "grid.alpha": 0.2,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}


@dataclass(frozen=True)
class Picture:
    """An SVG element, what it shows in a few words, and what it says in a sentence."""

    svg: str
    title: str
    alt: str


@dataclass(frozen=True)
class Point:
    """One method at one sparsity: mean and standard deviation of a measurement; ``pattern`` names the place.

    ``in_groups`` says that the pattern is N:M.
    """

    method: str
    pattern: str
    sparsity: float
    mean: float
    deviation: float = 0.0
    in_groups: bool = False


def error_map(layers: Sequence[LayerRecord], title: str, limits: tuple[float, float]) -> Picture:
    """Relative error as a heat map: blocks along, linears down, on a logarithmic scale within ``limits``."""
    from matplotlib.colors import LogNorm

    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    blocks = sorted({layer.block for layer in layers})
    values = [[math.nan] * len(blocks) for _ in kinds]
    for layer in layers:
        if math.isfinite(layer.relative_error):
            values[kinds.index(layer.kind)][blocks.index(layer.block)] = max(layer.relative_error, limits[0])
    best, worst = _extremes(layers)
    alt = (
        f"Heat map of the relative error of {len(kinds)} linears in {len(blocks)} blocks, {title}. Lowest "
        f"{best.relative_error:.3g} in {best.name}, highest {worst.relative_error:.3g} in {worst.name}."
    )
    with _drawing(0.9 + 0.19 * len(kinds), alt) as (figure, axes, made):
        axes.grid(False)
        mesh = axes.pcolormesh(values, norm=LogNorm(*limits), cmap="viridis", edgecolors="none")
        axes.set_yticks([i + 0.5 for i in range(len(kinds))], kinds)
        every = max(1, len(blocks) // 10)
        axes.set_xticks([i + 0.5 for i in range(0, len(blocks), every)], [str(block) for block in blocks[::every]])
        axes.invert_yaxis()
        axes.set_xlabel("block")
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=12)
        _plain_numbers(bar.ax.yaxis, *limits)
        if bar.solids is not None:
            bar.solids.set_rasterized(True)  # 256 steps of colour are one small image
        bar.outline.set_visible(False)
    return Picture(made[0], title, alt)


def error_curves(layers: Sequence[LayerRecord], title: str) -> Picture:
    """Relative error over the blocks, a line for each kind of linear."""
    kinds: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    lines = {kind: _curve((one.block, one.relative_error) for one in group) for kind, group in kinds.items()}
    best, worst = _extremes(layers)
    alt = (
        f"Relative error over the blocks, one line for each of {', '.join(kinds)}, {title}: from "
        f"{best.relative_error:.3g} to {worst.relative_error:.3g}."
    )
    return _lines(lines, title, alt, "block", "relative error")


def sparsity_curves(layers: Sequence[LayerRecord], title: str) -> Picture:
    """Sparsity over the blocks, a line for each kind of linear."""
    kinds: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    lines = {kind: _curve((one.block, one.sparsity) for one in group) for kind, group in kinds.items()}
    least, most = (limit(one.sparsity for one in layers) for limit in (min, max))
    alt = (
        f"Sparsity over the blocks, one line for each of {', '.join(kinds)}, {title}: from {least:.1%} to {most:.1%}."
    )
    return _lines(lines, title, alt, "block", "sparsity")


def learning_curve(
    steps: Sequence[Mapping[str, float]], held_out: Sequence[Mapping[str, float]], title: str
) -> Picture:
    """The KL divergence of a tuning over its steps: of the batches, and of the held-out windows."""
    lines = {"batches": _curve((one["step"], one["kl"]) for one in steps)}
    if held_out:
        lines["held out"] = _curve((one["step"], one["kl"]) for one in held_out)
    words = "; ".join(f"{name} from {y[0]:.3g} to {y[-1]:.3g}" for name, (_, y) in lines.items() if y)
    return _lines(
        lines, title, f"KL divergence from the dense model over the steps, {title}: {words}.", "step", "KL, nats"
    )


def removed_blocks(scores: Mapping[int, float], removed: Collection[int], title: str, measure: str) -> Picture:
    """A bar for every block, its score by the rule that chose; those of removed blocks in another colour."""
    from matplotlib.ticker import MaxNLocator

    gone = ", ".join(map(str, sorted(removed)))
    with _drawing(2.4, f"{measure} of each block, {title}. Removed blocks: {gone}.") as (figure, axes, made):
        for name, colour, chosen in (("kept", _COLOURS[7], False), ("removed", _COLOURS[1], True)):
            blocks = [block for block in scores if (block in removed) is chosen]
            axes.bar(blocks, [scores[block] for block in blocks], color=colour, label=name)
        _scale(axes, [value for value in scores.values() if value > 0], share=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel(measure)
        _legend_below(figure)
    return Picture(made[0], title, f"{measure} of each block, {title}. Removed blocks: {gone}.")


def repair_curves(records: Sequence[Mapping[str, Any]], title: str) -> Picture:
    """The relative error of every block's exits before and after the repair, two lines for each kind of parts."""
    lines = {}
    for kind in dict.fromkeys(str(one["kind"]) for one in records):
        own = [one for one in records if one["kind"] == kind]
        for key, name in (("masked_error", "only removed"), ("error", "repaired")):
            lines[f"{kind}, {name}"] = _curve((one["block"], one[key]) for one in own)
    return _lines(lines, title, f"Relative error of the exits over the blocks, {title}.", "block", "relative error")


def drift_curves(records: Sequence[Mapping[str, Any]], title: str) -> Picture:
    """How far the hidden states behind every block are from the dense model's before and after the repair."""
    names = {"drift": "before the repair of the block", "drift_left": "behind it"}
    lines = {name: _curve((one["block"], one[key]) for one in records) for key, name in names.items()}
    text = f"Energy of the difference from the dense model's hidden states over the blocks, {title}."
    return _lines(lines, title, text, "block of the smaller model", "share of the energy")


def block_curves(runs: Mapping[str, Sequence[LayerRecord]], title: str) -> Picture:
    """The geometric mean of the linears' relative errors over the blocks, a line for each run."""
    lines = {}
    for name, layers in runs.items():
        blocks = sorted({layer.block for layer in layers})
        lines[name] = _curve(
            (block, geometric_mean(one.relative_error for one in layers if one.block == block)) for block in blocks
        )
    means = {name: geometric_mean(one.relative_error for one in layers) for name, layers in runs.items()}
    words = ", ".join(f"{name} {mean:.3g}" for name, mean in means.items())
    return _lines(
        lines, title, f"Relative error over the blocks, {title}. Means: {words}.", "block", "relative error"
    )


def traces(layers: Sequence[LayerRecord], key: str, title: str) -> Picture | None:
    """What a method noted at each step, over all layers: the median, and the range of most; None if nothing."""
    kept = [layer.trace[key] for layer in layers if layer.trace.get(key)]
    length = max(map(len, kept), default=0)
    if length < 2:
        return None
    columns = [[one[i] for one in kept if i < len(one) and math.isfinite(one[i])] for i in range(length)]
    first = int(length <= max(layer.steps for layer in layers))  # 0 where what is noted begins before the first step
    steps = [i + first for i, column in enumerate(columns) if column]
    columns = [sorted(column) for column in columns if column]
    middle = [statistics.median(column) for column in columns]
    low = [column[len(column) // 10] for column in columns]
    high = [column[-1 - len(column) // 10] for column in columns]
    alt = (
        f"{key} over {length} steps, {title}: the median of {len(kept)} layers goes from {middle[0]:.3g} to "
        f"{middle[-1]:.3g}."
    )
    with _drawing(2.2, alt) as (_, axes, made):
        axes.fill_between(steps, low, high, color=_COLOURS[0], alpha=0.25, linewidth=0, label="80% of the layers")
        axes.plot(steps, middle, color=_COLOURS[0], label="median")
        if min(low) > 0 and max(high) > 20 * min(low):
            _logarithmic(axes)
        axes.set_xlabel("step")
        axes.set_ylabel(key)
        axes.legend()
    return Picture(made[0], title, alt)


def against_sparsity(
    points: Sequence[Point], name: str, dense: float | None = None, *, share: bool = False
) -> Picture:
    """A measurement over sparsity, a line for each method, with N:M patterns beside it; the dense model is dashed.

    Bars are the points' deviations. With ``share`` the numbers are fractions, shown in percent.
    """
    methods = list(dict.fromkeys(point.method for point in points))
    patterns = list(dict.fromkeys(point.pattern for point in points if point.in_groups))
    plain = [point for point in points if not point.in_groups]
    words = "; ".join(
        f"{method}: " + ", ".join(f"{one.mean:.4g} at {one.pattern}" for one in points if one.method == method)
        for method in methods
    )
    alt = f"{name} against sparsity. {words}." + (f" The dense model has {dense:.4g}." if dense is not None else "")
    widths = [3.0] * bool(plain) + [1.0 * len(patterns)] * bool(patterns)
    with _drawing(3.0, alt, widths) as (figure, first, made):
        panels = figure.axes
        for i, method in enumerate(methods):
            style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
            style |= {"capsize": 2, "label": method}
            mine = sorted((one for one in plain if one.method == method), key=lambda one: one.sparsity)
            if mine:
                x = [one.sparsity for one in mine]
                first.errorbar(x, [one.mean for one in mine], [one.deviation for one in mine], **style)
            marks = [one for one in points if one.method == method and one.pattern in patterns]
            if marks:  # side by side, as methods at one pattern would hide each other
                shift = 0.5 * (i - (len(methods) - 1) / 2) / len(methods)
                x = [patterns.index(one.pattern) + shift for one in marks]
                values, bars = [one.mean for one in marks], [one.deviation for one in marks]
                panels[-1].errorbar(x, values, bars, linestyle="", **style)
        if dense is not None:
            for axes in panels:
                axes.axhline(dense, color=_INK, linestyle="--", linewidth=1, label="dense")
        _scale(first, [point.mean for point in points], share)
        first.set_ylabel(name)
        if plain:
            first.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
            first.set_xlabel("sparsity")
        if patterns:
            panels[-1].set_xticks(range(len(patterns)), patterns)
            panels[-1].set_xlim(-0.5, len(patterns) - 0.5)
            panels[-1].grid(visible=False, axis="x")
            panels[-1].set_xlabel("pattern")
        _legend_below(figure)
    return Picture(made[0], name, alt)


def times(stages: Mapping[str, float], title: str) -> Picture:
    """Seconds of each stage as bars."""
    names = list(stages)
    alt = f"Time, {title}: " + ", ".join(f"{name} {stages[name]:,.1f} seconds" for name in names) + "."
    with _drawing(0.6 + 0.24 * len(names), alt) as (_, axes, made):
        axes.grid(visible=False, axis="y")
        bars = axes.barh(names, list(stages.values()), color=_COLOURS[0], height=0.7)
        axes.bar_label(bars, [f" {value:,.1f} s" for value in stages.values()], fontsize=8)
        axes.margins(x=0.18)
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
    return Picture(made[0], title, alt)


# --- Drawing ----------------------------------------------------------------------------------------------


def _lines(
    lines: Mapping[str, tuple[list[int], list[float]]], title: str, alt: str, x_name: str, y_name: str
) -> Picture:
    from matplotlib.ticker import MaxNLocator

    with _drawing(2.8, alt) as (figure, axes, made):
        for i, (name, (x, y)) in enumerate(lines.items()):
            axes.plot(
                x, y, color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)], markersize=3, label=name
            )
        values = [value for _, y in lines.values() for value in y if value > 0]
        if values and max(values) > 4 * min(values):
            _logarithmic(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        _legend_below(figure)
    return Picture(made[0], title, alt)


def _scale(axes: Axes, values: Sequence[float], share: bool) -> None:
    """Percent for fractions; a logarithmic axis where numbers differ much."""
    if share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    elif values and min(values) > 0 and max(values) > 8 * min(values):
        _logarithmic(axes)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis whose numbers are plain: 0.02, 0.05, 0.1; over many decades only 0.01, 0.1, 1."""
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis, *axes.get_ylim())


def _plain_numbers(axis: Axis, low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:,.10g}" if 1e-5 <= value < 1e7 else f"{value:.0e}")
    axis.set_major_formatter(plain)
    if high < 50 * low:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_minor_formatter(plain)
    else:
        axis.set_minor_formatter(NullFormatter())


def _legend_below(figure: Figure) -> None:
    """A legend under the picture, each name once, in as many columns as the words leave room for."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            found.setdefault(label, handle)
    longest = max(map(len, found), default=0)
    columns = max(1, min(4, 54 // (longest + 6)))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns)


def _curve(points: Any) -> tuple[list[int], list[float]]:
    kept = [(x, y) for x, y in points if math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def _extremes(layers: Sequence[LayerRecord]) -> tuple[LayerRecord, LayerRecord]:
    """The layers with the lowest and the highest error; those without a finite one count last."""
    known = [layer for layer in layers if math.isfinite(layer.relative_error)] or list(layers)
    return min(known, key=lambda one: one.relative_error), max(known, key=lambda one: one.relative_error)


@contextmanager
def _drawing(height: float, alt: str, widths: Sequence[float] = (1.0,)) -> Iterator[tuple[Figure, Axes, list[str]]]:
    """An empty picture of ``height`` inches and its first panel; after the block, the list holds its SVG.

    ``widths`` are those of the panels beside each other, which share what they measure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    made: list[str] = []
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")  # no pyplot: no global state
        figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
        yield figure, figure.axes[0], made
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, dpi=150)
        made.append(_inline(file.getvalue(), alt))


_numbers = itertools.count(1)


def _inline(svg: str, alt: str) -> str:
    """The SVG file as an element of a page: named for those who cannot see it, its ids its own."""
    body = svg[svg.index("<svg") :]
    prefix = f"p{next(_numbers)}-"
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r"url\(#", f"url(#{prefix}", body)
    body = re.sub(r'href="#', f'href="#{prefix}', body)
    body = body.replace(_INK, "currentColor")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # Its size is the page's affair; the viewBox keeps its shape.
    head, _, rest = body.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'{head} role="img" aria-label="{label}">{rest}'
