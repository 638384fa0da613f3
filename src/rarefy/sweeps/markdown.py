"""The results of a sweep as Markdown: one table of all, and for each text one of methods and patterns."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rarefy.runs.recipe import LOOP
from rarefy.sweeps.results import (
    Facts,
    LeftOut,
    Summary,
    heading_of,
    measurements,
    number_words,
    spread,
    summarise,
    table,
)


def to_markdown(
    cells: Sequence[Facts],
    dense: Facts | None,
    sweep: Facts,
    left_out: Sequence[LeftOut] = (),
) -> str:
    """The table with what is needed to read it, a table of methods and patterns for each text, and what failed.

    ``sweep`` is what ``compare.json`` holds.
    """
    settings = sweep["settings"]
    lines = ["# Comparison of pruning methods", "", f"Model: `{settings['model']}`. {_protocol(settings, cells)}", ""]
    lines += _table(table(cells, dense), left=2)
    for key, rows in by_pattern(cells, dense, left_out).items():
        lines += ["", f"## {heading_of(key).capitalize()}", "", *_table(rows, left=1)]
    failed = [facts for facts in cells if facts["status"] == "failed"]
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"- {one['method']}, {one['pattern']}, seed {one['seed']}: {one['reason']}" for one in failed]
    partly = [facts for facts in cells if facts["status"] != "failed" and facts.get("reason")]
    if partly:
        lines += ["", "Not solved everywhere:", ""]
        lines += [f"- {one['method']}, {one['pattern']}, seed {one['seed']}: {one['reason']}" for one in partly]
    if left_out:
        lines += ["", "Left out:", "", *(f"- {one.name}, {one.asked}: {one.reason}" for one in left_out)]
    if systems := {name: keys for name, keys in sweep.get("rows", {}).items() if keys}:
        lines += ["", "Rows:", "", *(f"- {name}: `{_keys(keys)}`" for name, keys in systems.items())]
    lines += ["", "```", *sweep.get("commands", []), "```", ""]
    return "\n".join(lines)


def _keys(system: Facts) -> str:
    """The keys of a system as its file has them."""
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in system.items())


def by_pattern(
    cells: Sequence[Facts], dense: Facts | None, left_out: Sequence[LeftOut] = ()
) -> dict[str, list[list[str]]]:
    """For each text a table with a row for each method and a column for each pattern; none of one pattern alone.

    Keys are those of ``measurements``. A method with two patterns in one column, such as two scopes, has two rows.
    """
    summaries = summarise(cells)
    columns = list(dict.fromkeys(one.asked for one in summaries))
    keys = dict.fromkeys(key for one in summaries for key in one.mean if key.startswith("perplexity_"))
    if len(columns) < 2:
        return {}
    places = [(one.method, one.asked) for one in summaries]
    names = [
        one.method if places.count(place) == 1 else f"{one.method}, {one.pattern}"
        for one, place in zip(summaries, places, strict=True)
    ]
    found = {}
    for key in keys:
        rows = [["method", *columns]]
        if dense:
            rows.append(["dense", *[number_words(key, measurements(dense).get(key))] * len(columns)])
        for name in dict.fromkeys([*names, *(one.name for one in left_out)]):
            own = {one.asked: one for one, its in zip(summaries, names, strict=True) if its == name}
            without = {one.asked for one in left_out if one.name == name}
            rows.append([name, *(_value(key, own.get(column), column in without) for column in columns)])
        found[key] = rows
    return found


def _value(key: str, summary: Summary | None, left_out: bool) -> str:
    """A mean; nothing where a cell has not been computed yet."""
    if summary is None:
        return "left out" if left_out else ""
    return spread(key, summary) if summary.seeds else "failed"


def _table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A Markdown table: the first row is its heading, the first ``left`` columns are aligned to the left."""
    lines = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "|".join(["---"] * left + ["---:"] * (len(rows[0]) - left)) + "|", *lines[1:]]


def _protocol(settings: Facts, cells: Sequence[Facts]) -> str:
    seeds = len({facts["seed"] for facts in cells})
    seeds_words = f" Mean ± standard deviation over {seeds} seeds, each with its own windows." if seeds > 1 else ""
    shrinks = " Of smaller models, sparsity is the share of the parameters that went." if _any_smaller(cells) else ""
    limit = f", {_limit_words(settings['limit'])} of each" if settings.get("limit") else ""
    tasks = f" Tasks: zero-shot accuracy by lm-eval{limit}." if settings.get("tasks") else ""
    windows = f"the first {settings['max_windows']:,}" if settings.get("max_windows") else "all"
    loop = "".join(f" --{key.replace('_', '-')} {settings[key]}" for key in LOOP if key in settings)
    loop = f" All cells: `{loop.strip()}`." if loop else ""
    tuned = any("tune" in facts.get("seconds", {}) for facts in cells)
    tuning = " Seconds of tuning: with those of recording the dense model." if tuned else ""
    return (
        f"Calibration: {settings['num_samples']:,} windows of {settings['sequence_length']:,} tokens from "
        f"{settings['calibration']}. Perplexity: {windows} windows of {settings['eval_length']:,} tokens, without "
        f"overlap; KL divergence from the dense model in nats per token.{tasks} Relative error: the geometric mean "
        f"of the layers' lost output energy. Seconds: the time of pruning.{tuning} Peak memory: of the whole process "
        f"while a cell is pruned and tuned, with what the comparison holds beside it.{loop}{shrinks}{seeds_words}"
    )


def _any_smaller(cells: Sequence[Facts]) -> bool:
    return any(facts.get("shrink") for facts in cells)


def _limit_words(limit: int | float) -> str:
    return f"the first {limit:,} items" if limit >= 1 else f"the first {100 * limit:g}% of the items"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
