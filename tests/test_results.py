"""The table of a sweep: means, deviations with the decimals of their mean, and what is left empty."""

from __future__ import annotations

from typing import Any

import pytest

from rarefy.sweeps.results import summarise, table, to_csv


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
    assert to_csv([cell(0), failed]).splitlines()[2] == "alps,2:4,0.5,1,,,,,,,,,failed,x"


def test_a_perplexity_that_is_not_finite_has_no_mean() -> None:
    cells = [cell(0), cell(1, perplexity=[{"label": "w2", "value": None}]), cell(0, method="wanda")]
    rows = table(cells, None)
    column = rows[0].index("perplexity w2")
    assert [row[column] for row in rows[1:]] == ["", "20.00"]
