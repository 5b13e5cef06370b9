"""Figures where matplotlib is installed, one line where it is not."""

import importlib.util

from pfppo.lab import figures

import numpy as np
import pytest

CURVE = {"samples": [10, 20, 30], "updates": [2, 4, 6], "reward_all": [0.0, 0.5, 1.0]}
CURVE |= {"score_all": [0.5, 0.6, 0.55], "validation": [None, 0.5, 0.7]}
ROWS = [{"filter": "none", "r2": 0.9, "selected_greedy": (0.8, 0.7, 0.9)}]
ROWS += [ROWS[0] | {"filter": "top", "r2": None, "selected_greedy_difference": (0.1, 0.0, 0.2)}]


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_plot", lambda: None)
    for said in (
        figures.draw_study(tmp_path, {"none": [CURVE]}, ROWS, 0.5),
        figures.draw_reliability(tmp_path / "x.png", []),
        figures.draw_rewards(tmp_path, {"model": ROWS}, "none"),
    ):
        assert "pip install matplotlib" in said and "\n" not in said
    assert not list(tmp_path.iterdir())


def test_a_band_is_mean_and_95_percent_of_the_mean_where_all_seeds_have_a_value():
    other = CURVE | {"validation": [0.1, 0.7, 0.9]}
    at, mean, low, high = figures._band([CURVE, other], "samples", "validation")
    assert at.tolist() == [20, 30] and mean == pytest.approx([0.6, 0.8])
    half = 1.96 * np.std([0.5, 0.7], ddof=1) / 2**0.5
    assert high - mean == pytest.approx([half, half]) and mean - low == pytest.approx([half, half])


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_figures_are_written(tmp_path):
    curves = {name: [CURVE, CURVE] for name in ("none", "best_random")}
    figures.draw_study(tmp_path, curves, ROWS, 0.5)
    figures.draw_reliability(tmp_path / "reliability.png", [([0, 1], [0.2, 0.8])])
    figures.draw_rewards(tmp_path, {"noisy:middle": ROWS, "noisy:tails": ROWS}, "none")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"rewards.png", "curves.png", "optimization.png", "r2.png", "reliability.png"}
