"""Judged samples from a file, expected weights, and what is printed and written of them."""

import json
import random
from types import SimpleNamespace

from pfppo.comparison import expected_weights, load_filters, read_judged, report
from pfppo.config import UserError
from pfppo.filters import FILTERS

import numpy as np
import pytest


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawn(prompts, samples, seed=0):
    """Rows whose rewards tell scores at both ends of the range and nothing in the middle."""
    draw = random.Random(seed)
    for i in range(prompts):
        for j in range(samples):
            reward = draw.uniform(-2, 2)
            sure = abs(reward) > 0.8
            score = float(reward > 0) if sure else float(draw.random() < 0.5)
            yield {"task_id": f"t/{i}", "sample": j, "reward": reward, "score": score}


def args(**options):
    known = {"bins": 10, "bin_kind": "equal_count", "repetitions": 3, "seed": 1}
    return SimpleNamespace(**known | options)


def test_a_file_is_read_by_problem_and_step_in_any_order_of_lines(tmp_path):
    rows = [
        {"step": s, "task_id": t, "reward": 10 * s + t + j / 10, "score": j}
        for s in (1, 2)
        for j in (0, 1)
        for t in (3, 4)
    ]
    found = read_judged(write(tmp_path / "s.jsonl", rows))
    assert found.rewards.tolist() == [[13, 13.1], [14, 14.1], [23, 23.1], [24, 24.1]]
    assert found.scores.tolist() == [[0, 1]] * 4
    assert found.prompts.tolist() == [0, 1, 0, 1]


def test_verdicts_are_scores(tmp_path):
    rows = [{"task_id": "a", "reward": 1, "passed": p} for p in (True, False)]
    assert read_judged(write(tmp_path / "s.jsonl", rows)).scores.tolist() == [[0, 1]]


ROW = {"task_id": "a", "reward": 0.5, "score": 1.0}


@pytest.mark.parametrize(
    "rows, said",
    [
        ([{"task_id": "a", "score": 1.0}], "line 1: expected a number in 'reward', found none"),
        ([ROW, ROW | {"reward": None}], "line 2: expected a number in 'reward', found none"),
        ([ROW | {"reward": "high"}], "line 1: expected a number in 'reward', found 'high'"),
        ([ROW | {"score": float("nan")}], "expected a number in 'score' or 'passed', found 'nan'"),
        ([ROW | {"reward": 10**400}], "expected a number in 'reward', found '1000"),
        ([ROW | {"reward": 1e300}], "expected a number in 'reward', found '1e+300'"),
        ([ROW | {"step": [1]}], "expected a 'task_id', and a number or nothing in 'step', found"),
        ([ROW | {"score": None}], "expected samples with a score, found none"),
        ([{"task_id": "a", "reward": 1.0}], "expected a number in 'score' or 'passed', found none"),
        ([{"reward": 1.0, "score": 1.0}], "line 1: expected a 'task_id', and"),
        (
            [ROW, ROW, ROW | {"task_id": "b"}],
            "expected equally many samples of each problem, found",
        ),
    ],
)
def test_a_file_that_was_not_judged_is_one_line(tmp_path, rows, said):
    path = write(tmp_path / "s.jsonl", rows)
    with pytest.raises(UserError) as error:
        read_judged(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_empty_file_is_one_line(tmp_path):
    for path in (tmp_path / "none.jsonl", write(tmp_path / "empty.jsonl", [])):
        with pytest.raises(UserError, match=path.name):
            read_judged(path)


def test_all_filters_are_those_that_take_so_many_samples(capsys):
    assert list(load_filters("all", 5, print)) == [n for n in FILTERS if n != "single"]
    assert "left out: " in capsys.readouterr().out
    assert "best_random" not in load_filters("all", 1, print)
    assert list(load_filters("none,top", 5, print)) == ["none", "top"]


def test_random_choices_count_with_their_expectation():
    rewards = np.arange(5.0)[None].repeat(40, 0)
    found = expected_weights(load_filters("best_random,best_worst", 5, print), rewards, 0)
    assert (found["best_worst"] == [[1, 0, 0, 0, 1]]).all()
    assert found["best_random"][:, 4].tolist() == [1] * 40
    assert found["best_random"][:, :4] == pytest.approx(0.25, abs=0.05)
    assert found["best_random"][:, :4].mean(0) == pytest.approx(0.25, abs=0.01)


def test_noise_in_the_middle_makes_the_extremes_more_reliable_than_all_and_all_than_the_best(
    tmp_path, capsys
):
    samples = read_judged(write(tmp_path / "s.jsonl", drawn(400, 5)))
    report(args(), load_filters("all", 5, print), samples, tmp_path)
    found = json.loads((tmp_path / "reliability.json").read_text())
    r2 = {row["filter"]: row["r2"] for row in found["filters"]}
    assert r2["best_worst"] > r2["none"] > r2["best_of_n"]
    assert len(found["repetitions"]) == 3 and found["problems"] == 400
    assert all(len(line["mean_score"]) == 10 for line in found["repetitions"])
    out = capsys.readouterr().out
    assert "400 x 5 samples of 400 problems" in out and "10 bins of equal weight" in out
    assert all(name in out for name in r2)


@pytest.mark.parametrize("bins, kind", [(1, "equal_count"), (2, "equal_width")])
@pytest.mark.parametrize(
    "change",
    [{"reward": 1.0}, {"score": 1.0}, {"score": 0.0}, {"reward": 0.0, "score": 0.0}, {}],
    ids=["constant rewards", "all pass", "all fail", "both constant", "as drawn"],
)
@pytest.mark.parametrize("P, N", [(1, 5), (30, 1)])
def test_whatever_the_samples_there_is_a_table(tmp_path, capsys, kind, bins, change, P, N):
    rows = [row | change for row in drawn(P, N)]
    samples = read_judged(write(tmp_path / "s.jsonl", rows))
    chosen = load_filters("all", N, print)
    report(args(bins=bins, bin_kind=kind), chosen, samples, tmp_path)
    out = capsys.readouterr().out
    assert "nan" not in out.lower().replace("nance", "")
    found = json.loads((tmp_path / "reliability.json").read_text())
    for row in found["filters"]:
        assert row["r2"] is not None or row["note"]


def test_equal_width_is_said(tmp_path, capsys):
    samples = read_judged(write(tmp_path / "s.jsonl", drawn(20, 5)))
    chosen = load_filters("none", 5, print)
    report(args(bins=7, bin_kind="equal_width"), chosen, samples, tmp_path)
    assert "7 bins of equal width" in capsys.readouterr().out


def test_the_order_of_the_lines_changes_nothing(tmp_path):
    rows = list(drawn(30, 5))
    found = []
    for seed in (0, 1):
        random.Random(seed).shuffle(rows)
        samples = read_judged(write(tmp_path / "s.jsonl", rows))
        report(args(), load_filters("all", 5, print), samples, tmp_path)
        found.append((tmp_path / "reliability.json").read_text())
    assert found[0] == found[1]


def test_samples_without_tests_are_left_out_and_counted(tmp_path, capsys):
    rows = [ROW, {"task_id": "b", "reward": 1.0, "score": None}]
    assert read_judged(write(tmp_path / "s.jsonl", rows)).rewards.tolist() == [[0.5]]
    assert "left out: 1 samples whose problems have no tests" in capsys.readouterr().out


def test_steps_of_one_prompt_are_resampled_together(tmp_path):
    """The same samples in four steps are four times as many, and tell no more."""
    once = [row | {"step": 1} for row in drawn(40, 5)]
    four = [row | {"step": step} for row in once for step in range(4)]
    widths = []
    for rows in (once, four):
        samples = read_judged(write(tmp_path / "s.jsonl", rows))
        report(args(), load_filters("none", 5, print), samples, tmp_path)
        (row,) = json.loads((tmp_path / "reliability.json").read_text())["filters"]
        widths.append((row["r2"], row["r2_low"], row["r2_high"]))
    assert widths[0] == pytest.approx(widths[1])
