"""Judged samples from a file, expected weights, and what is printed and written of them."""

import json
import random
from types import SimpleNamespace

from pfppo.comparison import expected_weights, load_filters, read_judged, report
from pfppo.config import UserError
from pfppo.filters import FILTERS

import pytest
import torch


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judged(prompts, samples, seed=0):
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
    rewards, scores = read_judged(write(tmp_path / "s.jsonl", rows))
    assert rewards.tolist() == [[13, 13.1], [14, 14.1], [23, 23.1], [24, 24.1]]
    assert scores.tolist() == [[0, 1]] * 4


def test_verdicts_are_scores(tmp_path):
    rows = [{"task_id": "a", "reward": 1, "passed": p} for p in (True, False)]
    assert read_judged(write(tmp_path / "s.jsonl", rows))[1].tolist() == [[1, 0]]


ROW = {"task_id": "a", "reward": 0.5, "score": 1.0}


@pytest.mark.parametrize(
    "rows, said",
    [
        ([{"task_id": "a", "score": 1.0}], "line 1: expected a number in 'reward', found none"),
        ([ROW, ROW | {"reward": None}], "line 2: expected a number in 'reward', found none"),
        ([ROW | {"reward": "high"}], "line 1: expected a number in 'reward', found 'high'"),
        ([ROW | {"score": float("nan")}], "expected a number in 'score' or 'passed', found nan"),
        ([{"task_id": "a", "reward": 1.0}], "expected a number in 'score' or 'passed', found none"),
        ([{"reward": 1.0, "score": 1.0}], "line 1: expected a 'task_id', found"),
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
    rewards = torch.arange(5.0).repeat(40, 1)
    found = expected_weights(load_filters("best_random,best_worst", 5, print), rewards, 0)
    assert (found["best_worst"] == [[1, 0, 0, 0, 1]]).all()
    assert found["best_random"][:, 4].tolist() == [1] * 40
    assert found["best_random"][:, :4] == pytest.approx(0.25, abs=0.15)
    assert found["best_random"][:, :4].mean(0) == pytest.approx(0.25, abs=0.03)


def test_noise_in_the_middle_makes_the_extremes_more_reliable_than_all_and_all_than_the_best(
    tmp_path, capsys
):
    rewards, scores = read_judged(write(tmp_path / "s.jsonl", judged(400, 5)))
    report(args(), load_filters("all", 5, print), rewards, scores, tmp_path)
    found = json.loads((tmp_path / "reliability.json").read_text())
    r2 = {row["filter"]: row["r2"] for row in found["filters"]}
    assert r2["best_worst"] > r2["none"] > r2["best_of_n"]
    assert len(found["repetitions"]) == 3 and found["problems"] == 400
    assert all(len(line["mean_score"]) == 10 for line in found["repetitions"])
    out = capsys.readouterr().out
    assert "400 problems x 5 samples" in out and "10 bins of equal weight" in out
    assert all(name in out for name in r2)


@pytest.mark.parametrize("bins, kind", [(1, "equal_count"), (2, "equal_width")])
@pytest.mark.parametrize(
    "change",
    [{"reward": 1.0}, {"score": 1.0}, {"score": 0.0}, {"reward": 0.0, "score": 0.0}, {}],
    ids=["constant rewards", "all pass", "all fail", "both constant", "as drawn"],
)
@pytest.mark.parametrize("P, N", [(1, 1), (1, 5), (30, 1), (30, 5)])
def test_whatever_the_samples_there_is_a_table(tmp_path, capsys, kind, bins, change, P, N):
    rows = [row | change for row in judged(P, N)]
    rewards, scores = read_judged(write(tmp_path / "s.jsonl", rows))
    chosen = load_filters("all", N, print)
    report(args(bins=bins, bin_kind=kind), chosen, rewards, scores, tmp_path)
    out = capsys.readouterr().out
    assert "nan" not in out.lower().replace("nance", "")
    found = json.loads((tmp_path / "reliability.json").read_text())
    for row in found["filters"]:
        assert row["r2"] is not None or row["note"]


def test_equal_width_is_said(tmp_path, capsys):
    rewards, scores = read_judged(write(tmp_path / "s.jsonl", judged(20, 5)))
    chosen = load_filters("none", 5, print)
    report(args(bins=7, bin_kind="equal_width"), chosen, rewards, scores, tmp_path)
    assert "7 bins of equal width" in capsys.readouterr().out
