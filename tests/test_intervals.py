"""Statistics of the study: Student's t, rank correlation, regret, interactions."""

import json
import math
import runpy
import sys
from pathlib import Path

from pfppo.lab.intervals import t_inside, t_interval, t_quantile
from pfppo.lab.study import Args
from pfppo.lab.tables import KEYS, interactions, rank_correlation, regret

import numpy as np
import pytest


@pytest.mark.parametrize(
    "df, wanted", [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_students_t_has_the_quantiles_of_the_books_and_its_density(df, wanted):
    assert t_quantile(0.95, df) == pytest.approx(wanted, abs=5e-5)
    x = np.linspace(0, 3, 30_001)
    density = (1 + x**2 / df) ** (-(df + 1) / 2) * math.gamma((df + 1) / 2)
    density /= math.sqrt(df * math.pi) * math.gamma(df / 2)
    assert t_inside(3.0, df) == pytest.approx(2 * np.trapezoid(density, x), abs=1e-8)


def test_an_interval_is_students_and_covers_the_mean_as_often_as_it_says():
    mean, low, high = t_interval([1.0, 2, 3, 6])
    half = 3.18245 * np.std([1, 2, 3, 6], ddof=1) / 2
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-4)
    assert t_interval([2.0]) == (2, None, None) and t_interval([2.0, None]) == (None, None, None)
    drawn = np.random.default_rng(0).normal(size=(2000, 3))
    for confidence in (0.8, 0.95):
        inside = [
            low < 0 < high for _, low, high in (t_interval(x, confidence) for x in drawn.tolist())
        ]
        assert np.mean(inside) == pytest.approx(confidence, abs=0.03)


def test_a_crossed_interval_covers_where_units_and_problems_are_drawn():
    crossed = runpy.run_path(str(Path(__file__).parent / "study/crossed.py"))["crossed_interval"]
    rng, inside, alone = np.random.default_rng(0), [], []
    for _ in range(600):
        parts = (rng.normal(size=shape) for shape in ((8, 1), (1, 40), (8, 40)))
        d = sum(scale * part for scale, part in zip((0.2, 1.0, 1.0), parts, strict=True))
        (_, low, high), errors = crossed(d)
        inside.append(low < 0 < high)
        _, low, high = t_interval(d.mean(1).tolist())
        alone.append(low < 0 < high)
        assert errors[2] >= errors[0] == pytest.approx(d.mean(1).std(ddof=1) / 8**0.5)
    assert np.mean(alone) < 0.8 < 0.92 < np.mean(inside) < 0.99


def test_the_rank_correlation_needs_three_filters_with_both():
    points = ((0.1, 0.2), (0.5, 0.3), (0.9, 0.8))
    rows = [{"r2": (r2, 0, 1), "auc": (-r2, 0, 1), "outcome": (p, 0, 0)} for r2, p in points]
    assert [rank_correlation(rows, name) for name in ("r2", "auc")] == pytest.approx([1, -1])
    assert [regret(rows, name) for name in ("r2", "auc")] == pytest.approx([0, 0.6])
    tied = [row | {"r2": (0.9, 0, 1)} for row in rows[1:]]  # the choice between them is a coin's
    assert regret([rows[0], *tied], "r2") == pytest.approx(0.25)
    drawn = [row | {"r2": (r2, 0, 1)} for row, r2 in zip(rows[1:], (0.8761, 0.8759), strict=True)]
    assert regret(drawn, "r2") == pytest.approx(0.25)  # equal as far as the table shows
    unknown = {"r2": (None, None, None), "outcome": (1, 0, 0)}
    assert np.isnan(rank_correlation([*rows[:2], unknown], "r2"))
    assert np.isnan(regret([unknown], "r2"))


def test_an_interaction_is_what_a_filter_gains_more_under_one_reward_than_under_another():
    def rows(*less):
        return [{"filter": "none"}, {"filter": "top", "outcome_differences": list(less)}]

    text = interactions({"a": rows(0.3, 0.5), "b": rows(0.1, 0.1)}, Args())
    assert "over none, matched by samples; Student's interval of 0.95" in text
    assert text.splitlines()[2] == "| top | a | b | +0.300 [-0.971, +1.571] |"


def test_the_intervals_of_the_readme_are_those_of_the_table_that_is_kept(monkeypatch, capsys):
    root = Path(__file__).parent
    table, text = str(root / "study/look-2/table.json"), (root.parent / "README.md").read_text()
    for more in ("", "--base random_two", "--confidence 0.97569", "--confidence 0.9"):
        monkeypatch.setattr(sys, "argv", ["again.py", table, *more.split()])
        runpy.run_path(str(root / "study/again.py"), run_name="__main__")
        rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
        rows = {row[0].strip("| "): row for row in rows if len(row) > 5}
        wide = "confidence" in more
        for name in ("best_random", "best_worst", *(() if wide else ("none", "random_two"))):
            outcome, difference = rows[name][1:3]
            assert difference in text and (wide or outcome in text)
            if not more and name.startswith("best"):
                assert rows[name][1 + 2 * KEYS.index("last_sampled") + 1] in text
    paths = {reward: root / f"study/block-c/{reward}.json" for reward in ("middle", "uniform")}
    tables = {reward: json.loads(path.read_text())["filters"] for reward, path in paths.items()}
    shown = interactions(tables, Args()).splitlines()[2].split(" | ")[3].strip("| ")
    assert shown in text
