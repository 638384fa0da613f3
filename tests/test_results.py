"""The table of a sweep: means, deviations with the decimals of their mean, and what is left empty."""

from __future__ import annotations

from typing import Any

import pytest

from rarefy.sweeps.markdown import by_pattern
from rarefy.sweeps.results import summarise, table, to_csv
from rarefy.sweeps.wanted import LeftOut


def cell(seed: int, **more: Any) -> dict[str, Any]:
    return {
        "method": "alps",
        "pattern": "2:4",
        "asked_sparsity": 0.5,
        "sparsity": 0.5,
        "seed": seed,
        "perplexity": [{"label": "w2", "value": 20.0}],
        "divergence": [{"label": "w2", "kl": 0.25, "agreement": 0.5}],
        "tasks": {"piqa": {"samples": 9, "metrics": {"acc": {"value": 0.6, "stderr": 0.1}}}},
        "relative_error": 0.0144,
        "seconds": {"prune": 10.0},
        "status": "done",
        "reason": "",
        **more,
    }


def shown(column: str, *cells: dict[str, Any]) -> str:
    heading, row = table(cells, None)
    return row[heading.index(column)]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.0144, 0.0144), "0.0144 ± 0.0000"),  # exactly the same
        ((0.0144, 0.01444), "0.0144 ± 3e-05"),  # nearly the same
        ((0.0072, 0.0074), "0.00730 ± 0.00014"),
        ((1e-7, 3e-7), "2.00e-07 ± 1.41e-07"),
    ],
)
def test_deviations_have_the_decimals_of_their_mean(values: tuple[float, float], text: str) -> None:
    cells = [cell(seed, relative_error=value) for seed, value in enumerate(values)]
    assert shown("relative error", *cells) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [((20.5, 21.5), "21.00 ± 0.71"), ((4000.0, 6000.0), "5,000 ± 1,414")],
)
def test_perplexities_have_two_decimals_or_none(values: tuple[float, float], text: str) -> None:
    cells = [cell(seed, perplexity=[{"label": "w2", "value": value}]) for seed, value in enumerate(values)]
    assert shown("perplexity w2", *cells) == text


def test_shares_are_percentages_and_one_seed_has_no_deviation() -> None:
    assert shown("piqa accuracy", cell(0)) == "60.0%"
    assert shown("same top-1 w2", cell(0)) == "50.0%"
    assert shown("KL w2", cell(0)) == "0.250"
    assert shown("sparsity", cell(0), cell(1)) == "50.00%"
    better = {"piqa": {"samples": 9, "metrics": {"acc": {"value": 0.62, "stderr": 0.1}}}}
    assert shown("piqa accuracy", cell(0), cell(1, tasks=better)) == "61.0% ± 1.4%"


def test_failed_seeds_are_counted_and_leave_the_mean_alone() -> None:
    failed = {"method": "alps", "pattern": "2:4", "asked_sparsity": 0.5, "seed": 1, "status": "failed", "reason": "x"}
    (summary,) = summarise([cell(0), failed])
    assert (summary.seeds, summary.failed, summary.mean["perplexity_w2"]) == (1, 1, 20.0)
    assert table([cell(0), failed], None)[1][1] == "2:4 (1 failed)"
    other = cell(0, method="wanda")
    assert table([failed, other], None)[1][2:4] == ["failed", "failed"]
    assert to_csv([cell(0), failed]).splitlines()[2] == "alps,2:4,0.5,1,,,,,,,,,,,failed,x"


def test_a_perplexity_that_is_not_finite_has_no_mean() -> None:
    cells = [cell(0), cell(1, perplexity=[{"label": "w2", "value": None}]), cell(0, method="wanda")]
    rows = table(cells, None)
    column = rows[0].index("perplexity w2")
    assert [row[column] for row in rows[1:]] == ["", "20.00"]


def test_memory_and_tuning_have_columns_where_they_were_measured() -> None:
    assert "seconds of tuning" not in table([cell(0)], None)[0]
    assert "peak GB" not in table([cell(0)], None)[0]
    tuned = cell(0, method="tuned", seconds={"record": 1.0, "prune": 10.0, "tune": 4.0}, peak_bytes=2_500_000_000)
    heading, plain, other = table([cell(0), tuned], None)
    assert heading[-3:] == ["seconds", "seconds of tuning", "peak GB"]
    assert plain[-3:] == ["10.0", "", ""]
    assert other[-3:] == ["10.0", "5.0", "2.5"]


def test_a_table_of_methods_and_patterns_for_each_text() -> None:
    both = [{"label": "w2", "value": 20.0}, {"label": "c4", "value": 30.0}]
    rows = {"asked": "2:4", "perplexity": both}
    half = {"asked": "50%", "pattern": "unstructured 50%", "perplexity": [both[0], {"label": "c4", "value": 32.0}]}
    cells = [cell(0, **rows), cell(1, **rows | {"perplexity": [{"label": "w2", "value": 22.0}, both[1]]})]
    cells += [cell(0, **half), cell(0, **rows, method="wanda"), cell(0, **half, method="wanda", status="failed")]
    cells[-1].pop("perplexity")
    dense = {"perplexity": both}
    found = by_pattern(cells, dense, [LeftOut("owl", "2:4", "it has no steps"), LeftOut("wanda", "50%", "no")])
    assert list(found) == ["perplexity_w2", "perplexity_c4"]
    assert found["perplexity_w2"] == [
        ["method", "2:4", "50%"],
        ["dense", "20.00", "20.00"],
        ["alps", "21.00 ± 1.41", "20.00"],
        ["wanda", "20.00", "failed"],
        ["owl", "left out", ""],
    ]
    assert found["perplexity_c4"][2] == ["alps", "30.00 ± 0.00", "32.00"]
    assert by_pattern(cells[:2], dense) == {}  # of one pattern it would be the table of all


def test_two_scopes_of_one_sparsity_are_two_rows() -> None:
    cells = [cell(0, asked="50%", pattern=one) for one in ("row 50%", "unstructured 50%")] + [cell(0, asked="2:4")]
    names = [row[0] for row in by_pattern(cells, None)["perplexity_w2"]]
    assert names == ["method", "alps, row 50%", "alps, unstructured 50%", "alps"]
