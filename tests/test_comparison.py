"""Filters on one file of judged samples: what is read, their table and the report."""

import json
import math
import sys
from functools import partial
from itertools import product
from types import SimpleNamespace

from pfppo.filters import FILTERS, KNOWN
from pfppo.reliability import Weights
from pfppo.run import comparison
from pfppo.run.comparison import read_judged

import numpy as np
import pytest
from ranks import refused
from running import write_rows as write
from test_reliability import by_rank, close, noisy_middle, rng

ROW = {"task_id": "a", "reward": 0.5, "score": 1.0}


def table(rewards, scores, weights, **how):
    """The table of filters that keep with these chances, or always with weights above 1."""
    weights = {name: Weights(w, w**2, np.minimum(w, 1)) for name, w in weights.items()}
    return comparison.reliability_table(rewards, scores, weights, **how)


@pytest.mark.parametrize("seed", range(3))
def test_noise_in_the_middle_gives_the_order_of_the_paper(seed):
    rewards, scores = noisy_middle(seed=seed)
    shares = ((1, 1), (1, 0.25, 0.25), (1, 1, 1), (1,))  # best_worst, best_random, none, best_of_n
    weights = {str(share): by_rank(rewards, *share) for share in shares}
    rows = table(rewards, scores, weights, resamples=100)
    assert [row["kept"] for row in rows] == pytest.approx([0.4, 0.4, 1, 0.2])
    for better, worse in zip(rows, rows[1:], strict=False):
        assert better["r2_low"] > worse["r2_high"]


def test_table_has_the_shares_in_expectation_and_is_json():
    rewards = np.array([[3.0, 2, 1], [1, 2, 3]])
    scores = np.array([[1.0, 1, 0], [0, 0, 1]])
    weights = {"none": np.full((2, 3), 2.0), "best_random": by_rank(rewards, 1, 0.5, 0.5)}
    none, best_random = table(rewards, scores, weights, bins=3, resamples=20)
    (rounded,) = table(rewards, scores, {"none": np.full((2, 3), 1 - 1e-15)}, bins=3)
    assert rounded["pass_dropped"] is None
    (empty,) = table(rewards[:0], scores[:0], {"none": rewards[:0]})
    assert empty["r2"] is empty["kept"] is None and empty["note"] == "no sample is kept"
    assert (none["kept"], none["pass_kept"], none["pass_dropped"]) == (1, 0.5, None)
    kept = [best_random[name] for name in ("kept", "pass_kept", "pass_dropped")]
    close(kept, [2 / 3, 2.5 / 4, 0.5 / 2])  # two bests that pass, half of four others, one passes
    assert none["auc"] == pytest.approx(8.5 / 9) and none["note"] == ""
    keys = "filter kept pass_kept pass_dropped r2 r2_low r2_high spearman auc alpha alpha_low"
    keys = [*keys.split(), "alpha_high", "at_updates", "at_samples", "note"]
    assert list(none) == keys and json.loads(json.dumps([none, best_random])) == [none, best_random]


def test_filters_are_compared_on_the_same_resamples():
    rewards, scores = noisy_middle(60)
    ones = np.ones(rewards.shape)
    same, again = table(rewards, scores, {"a": ones, "b": ones}, resamples=50)
    assert same | {"filter": "b"} == again
    (other,) = table(rewards, scores, {"a": ones}, resamples=50, seed=1)
    assert other["r2_low"] != same["r2_low"]


def test_text_is_aligned_and_shows_a_dash_where_undefined():
    rewards, scores = noisy_middle(50)
    weights = {"none": np.ones(rewards.shape), "a_long_name": np.zeros(rewards.shape)}
    rows = table(rewards, scores, weights, resamples=20)
    head, none, nothing = comparison.format_table(rows).split("\n")
    rate = f"{scores.mean():.3f}"
    assert none.split()[:4] == ["none", "1.000", rate, "-"]
    assert none.split()[5:8:2] == [f"{rows[0]['r2_low']:.3f}", f"{rows[0]['r2_high']:.3f}"]
    assert nothing.split() == f"a_long_name 0.000 - {rate} {8 * '- '}no sample is kept".split()
    for title, cell, dash in (("kept", "1.000", "0.000"), ("score dropped", "-  ", rate)):
        assert head.index(title) + len(title) == nothing.index(dash) + 5
        assert none[: head.index(title) + len(title)].endswith(cell.strip())
    assert comparison.format_table([]).startswith("filter")


def drawn(prompts, samples):
    """`noisy_middle` as rows of a file."""
    numbers = np.stack(noisy_middle(prompts, samples), -1).reshape(-1, 2).tolist()
    return [{"task_id": i // samples, "reward": r, "score": s} for i, (r, s) in enumerate(numbers)]


@pytest.fixture
def report(tmp_path, monkeypatch):
    """(rows, filters, options) -> reliability.json, with few draws and resamples and no figure."""
    monkeypatch.setattr(comparison, "DRAWS", 40)
    monkeypatch.setattr(
        comparison, "reliability_table", partial(comparison.reliability_table, resamples=20)
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    def reported(rows, names="all", bins=10, kind="equal_count"):
        samples = read_judged(write(tmp_path / "s.jsonl", rows))
        args = SimpleNamespace(bins=bins, bin_kind=kind, repetitions=3, seed=1)
        N = samples.rewards.shape[1]
        chosen = comparison.load_filters(names, N, print, dict.fromkeys(samples.given, 2))
        comparison.compare_filters(args, chosen, samples, tmp_path)
        return json.loads((tmp_path / "reliability.json").read_text())

    return reported


def test_a_file_is_read_by_problem_and_step_in_any_order_of_lines(tmp_path):
    rows = [
        {"step": s, "task_id": t, "reward": 10 * s + t + j / 10, "score": j}
        for s, j, t in product((1, 2), (0, 1), (3, 4))
    ]
    found = read_judged(write(tmp_path / "s.jsonl", rows))
    rewards, scores = found.rewards.tolist(), found.scores.tolist()
    assert [*map(sorted, rewards)] == [[13, 13.1], [14, 14.1], [23, 23.1], [24, 24.1]]
    assert all(s == [int(x % 1 > 0.05) for x in r] for r, s in zip(rewards, scores, strict=True))
    assert found.prompts.tolist() == [0, 1, 0, 1]
    by_group = comparison.judged_rows(sorted(rows, key=lambda row: row["reward"]), 2)
    assert by_group.rewards.tolist() == rewards
    turned = read_judged(write(tmp_path / "s.jsonl", rows[::-1]))
    assert turned.rewards.tolist() == rewards and turned.scores.tolist() == scores


def test_no_place_tells_a_reward_or_a_score(tmp_path):
    rows = [{"task_id": i // 4, "reward": (i // 2) % 2, "score": i % 2} for i in range(4000)]
    samples = read_judged(write(tmp_path / "s.jsonl", rows))
    for values in (samples.rewards, samples.scores, samples.scores[samples.rewards == 1]):
        shares = values.reshape(-1, 4 if values.ndim == 2 else 2).mean(0)
        assert abs(shares - 0.5).max() < 0.06  # 4 standard deviations


def test_verdicts_are_scores_and_samples_without_tests_are_left_out(tmp_path, capsys):
    rows = [{"task_id": "a", "reward": 1, "passed": p} for p in (True, False)]
    rows += [{"task_id": "b", "reward": 1.0, "score": None}]
    rows += [{"task_id": "c", "reward": 1.0, "score": score} for score in (1, None)]
    assert sorted(read_judged(write(tmp_path / "s.jsonl", rows)).scores.tolist()[0]) == [0, 1]
    assert "left out: 3 samples of problems without a score for each" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows, said",
    [
        ([{"task_id": "a", "score": 1.0}], "line 1: expected a number in 'reward', found none"),
        ([ROW, ROW | {"reward": None}], "line 2: expected a number in 'reward', found none"),
        ([ROW | {"reward": "high"}], "line 1: expected a number in 'reward', found 'high'"),
        ([ROW | {"score": math.nan}], "expected a number in 'score' or 'passed', found 'nan'"),
        ([ROW | {"reward": 10**400}], "expected a number in 'reward', found '1000"),
        ([ROW | {"reward": 1e300}], "expected a number in 'reward', found '1e+300'"),
        ([ROW | {"step": [1]}], "expected a 'task_id', and a number or nothing in 'step', found"),
        ([ROW | {"score": None}], "expected samples with a score, found none"),
        ([{"task_id": "a", "reward": 1.0}], "expected a number in 'score' or 'passed', found none"),
        ([{"reward": 1.0, "score": 1.0}], "line 1: expected a 'task_id', and"),
        ([ROW, ROW, ROW | {"task_id": "b"}], "expected equally many samples of each problem,"),
        ([], "no rows"),
        (None, "cannot be read (No such file"),
    ],
)
def test_a_file_that_was_not_judged_is_one_line(tmp_path, rows, said):
    path = tmp_path / "s.jsonl"
    message = refused(read_judged, path if rows is None else write(path, rows))
    assert message.startswith(str(path)) and said in message


@pytest.mark.parametrize(
    "field, values, why",
    [
        ("members", [[1, 2], [0.5, math.nan]], "no list of as many numbers in line 2"),
        ("members", [[1, 2], [3]], "no list of as many numbers in line 2"),
        ("members", ["a", "b"], "no list of as many numbers in line 1"),
        ("finished", [True, "yes"], "no true or false in line 2"),
        ("finished", [[True, False]] * 2, "no true or false in line 1"),
        ("length", [3, -3], "no whole number >= 0 in line 2"),
        ("logp", [[-1.0, -2.0]] * 2, "no number in line 1"),  # per token, as other tools have it
        ("logp", [-1.0, None], "no number in line 2"),
        ("logp", [None, None], ""),
    ],
)
def test_a_field_that_is_not_what_filters_know_is_said_and_not_given_to_them(
    tmp_path, capsys, field, values, why
):
    rows = [ROW | {field: value} for value in values]
    assert list(read_judged(write(tmp_path / "s.jsonl", rows)).given) == ["scores"]
    said = f"note: filters cannot ask for {field!r}: {why}\n" if why else ""
    assert capsys.readouterr().out == said


def test_samples_that_stand_twice_are_told(tmp_path, capsys):
    rows = [ROW | {"sample": number} for number in (0, 1)]
    assert read_judged(write(tmp_path / "s.jsonl", [*rows, *rows])).rewards.shape == (1, 4)
    said = capsys.readouterr().out
    assert said.startswith("note: 2 samples have the problem and number of another one")
    read_judged(write(tmp_path / "s.jsonl", [*rows, *(row | {"step": 1} for row in rows)]))
    assert not capsys.readouterr().out


def test_all_filters_are_those_that_take_so_many_samples(capsys):
    assert list(comparison.load_filters("all", 5, print, KNOWN)) == [
        n for n in FILTERS if n != "single"
    ]
    assert "left out: " in capsys.readouterr().out
    assert "best_random" not in comparison.load_filters("all", 1, print, KNOWN)
    assert list(comparison.load_filters("none,top", 5, print, {})) == ["none", "top"]
    assert not {"agreeing", "reject"} & comparison.load_filters("all", 5, print, {}).keys()
    assert "agreeing: asks for members ([P, N, K] rewards by" in capsys.readouterr().out
    said = refused(comparison.load_filters, "reject", 5, print, {"members": 2})
    assert (
        said
        == "--filters reject: asks for scores (actual scores, 1 right, 0 wrong), "
        + "which are not known here"
    )


def test_random_choices_count_with_their_expectation():
    samples = SimpleNamespace(rewards=np.arange(5.0)[None].repeat(40, 0), given={})
    chosen = comparison.load_filters("best_random,best_worst", 5, print, {})
    found = comparison.expected_weights(chosen, samples, 0)
    assert (found["best_worst"].mean == [[1, 0, 0, 0, 1]]).all()
    assert found["best_random"].mean[:, 4].tolist() == [1] * 40
    assert found["best_random"].mean[:, :4] == pytest.approx(0.25, abs=0.05)
    assert found["best_random"].mean[:, :4].mean(0) == pytest.approx(0.25, abs=0.01)


def test_a_report_has_every_filter_and_repetition_and_prints_them(report, capsys):
    found, out = report(drawn(60, 5)), capsys.readouterr().out
    names = [row["filter"] for row in found["filters"]]
    unknown = ("single", "finished_only", "agreeing")  # what a file has not
    assert names == [name for name in FILTERS if name not in unknown]
    assert "reject (oracle)" in out and "none (oracle)" not in out
    assert [len(line["mean_score"]) for line in found["repetitions"]] == [10] * 3
    assert found["problems"] == 60 and "60 x 5 samples of 60 problems" in out
    assert all(name in out for name in names) and "pip install matplotlib" in out


@pytest.mark.parametrize("bins, kind", [(1, "equal_count"), (2, "equal_width")])
@pytest.mark.parametrize(
    "change",
    [{"reward": 1.0}, {"score": 1.0}, {"score": 0.0}, {"reward": 0.0, "score": 0.0}, {}],
)
@pytest.mark.parametrize("P, N", [(1, 1), (1, 5), (30, 1)])
@pytest.mark.filterwarnings("error")
def test_whatever_the_samples_there_is_a_table(report, capsys, kind, bins, change, P, N):
    found = report([row | change for row in drawn(P, N)], bins=bins, kind=kind)
    assert all(row["r2"] is not None or row["note"] for row in found["filters"])
    out = capsys.readouterr().out
    assert "nan" not in out.lower().replace("nance", "")
    assert f"{bins} bins of {'equal weight' if bins == 1 else 'equal width'}" in out


def test_the_order_of_the_lines_changes_nothing(report):
    assert report(drawn(30, 5)) == report(rng().permutation(drawn(30, 5)))


def test_steps_of_one_prompt_are_resampled_together(report):
    """The same samples in four steps are four times as many, and tell no more."""
    once = [row | {"step": 1} for row in drawn(40, 5)]
    four = [row | {"step": step} for row in once for step in range(4)]
    widths = [report(rows, "none")["filters"][0] for rows in (once, four)]
    assert widths[0] == pytest.approx(widths[1])


def test_the_figure_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    line = {"mean_reward": [0, 1], "mean_score": [0.2, 0.8]}
    said = comparison.draw_reliability(tmp_path / "r.png", [line] * 2)
    assert said == "r.png, 2 repetitions" and (tmp_path / "r.png").stat().st_size
