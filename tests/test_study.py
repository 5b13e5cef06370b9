"""The study: which cells there are, that they are made once, and what is said of them."""

import json
import math

from pfppo.lab import study
from pfppo.config import UserError
from pfppo.lab.study import Args, cells_of, interval, main, markdown, measure, parse_words, rank_correlation, summarize

import numpy as np
import pytest
from test_cells import write_cell


@pytest.fixture
def args(tmp_path):
    return Args(filters="none,best_random", seeds=3, steps=4, out=str(tmp_path), jobs=2)


NAMES = ["none", "best_random"]


def test_single_gets_n_times_the_prompts_and_others_the_same(args):
    cells = {cell.filter: cell.options for cell in cells_of(args, ["single", "none", "top"])}
    drawn = {o["prompts_per_step"] * o["samples_per_prompt"] * o["steps"] for o in cells.values()}
    assert drawn == {48 * 5 * 4}
    assert cells["single"]["prompts_per_step"] == 240


def test_matched_updates_give_more_steps_to_those_that_keep_less(args):
    args.match, args.steps = "updates", 30
    cells = {c.filter: c.options for c in cells_of(args, ["none", "best_random", "best_of_n"])}
    assert [cells[n]["steps"] for n in cells] == [30, 75, 150]


def test_there_is_a_cell_for_every_filter_and_seed_with_a_folder_of_its_own(args):
    cells = cells_of(args, NAMES)
    assert [(c.filter, c.seed) for c in cells] == [(n, s) for s in (1, 2, 3) for n in NAMES]
    assert len({cell.folder for cell in cells}) == 6


def test_differences_are_paired_by_seed(args):
    cells = cells_of(args, NAMES)
    for cell in cells:
        better = 0.05 if cell.filter == "best_random" else 0
        write_cell(cell.folder, cell.options, 0.1 * cell.seed + better)
    rows, _ = summarize(args, NAMES, cells, {"none": R2, "best_random": R2})
    none, best = rows
    assert none["selected_greedy"][0] == pytest.approx(0.2)
    assert best["selected_greedy_difference"] == pytest.approx((0.05, 0.05, 0.05))
    low, high = best["selected_greedy"][1:]
    assert low < 0.25 < high  # between seeds they differ more than from each other
    assert (best["samples"], best["updates"]) == (4 * 240, 4 * 2)
    text = markdown(args, rows, 1.5)
    assert "| best_random | 960 | 8 |" in text and "+0.050 [+0.050, +0.050]" in text
    assert "3 seeds" in text and "1.5 hours" in text


def test_one_seed_has_no_interval():
    mean, low, high = interval([0.5])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)


def test_an_interval_holds_the_mean_and_shrinks_with_seeds():
    values = np.random.default_rng(0).normal(size=50)
    widths = [interval(values[:n])[2] - interval(values[:n])[1] for n in (5, 50)]
    assert widths[1] < widths[0]
    mean, low, high = interval(values)
    assert low < mean < high


def test_the_rank_correlation_needs_three_filters_with_both():
    rows = [
        {"r2": r2, "selected_greedy": (p, 0, 0)} for r2, p in ((0.1, 0.2), (0.5, 0.3), (0.9, 0.8))
    ]
    assert rank_correlation(rows) == pytest.approx(1)
    assert math.isnan(rank_correlation([*rows[:2], {"r2": None, "selected_greedy": (1, 0, 0)}]))


class Runner:
    """Instead of torchrun: leaves what the scripts would, and remembers what was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, script, options, log, threads):
        self.asked.append((script, options))
        if script == "train_ppo.py":
            write_cell(options["run_dir"], options, 0.1 * options["seed"])
        else:
            options["out"].mkdir(parents=True)
            rows = [{"filter": name, **R2} for name in options["filters"].split(",")]
            (options["out"] / "reliability.json").write_text(json.dumps({"filters": rows}))


R2 = {"r2": 0.9, "r2_low": 0.8, "r2_high": 0.95, "kept": 0.4}


@pytest.fixture
def runner(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study.lab, "make_problems", lambda: None)
    made = Runner()
    monkeypatch.setattr(study, "Torchrun", lambda: made)
    return made


def test_a_study_leaves_its_tables_and_makes_nothing_twice(args, runner, tmp_path, capsys):
    main(args)
    assert len(runner.asked) == 1 + 6
    assert runner.asked[0][0] == "eval_code.py"
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["filter"] for row in table["filters"]] == NAMES
    assert table["filters"][1]["selected_greedy_by_seed"] == pytest.approx([0.1, 0.2, 0.3])
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    main(args)
    assert len(runner.asked) == 7
    args.seeds = 4
    main(args)
    assert len(runner.asked) == 9


def test_several_rewards_are_a_study_each(args, runner, tmp_path):
    args.reward = "noisy:middle,noisy:tails"
    main(args)
    for folder in ("noisy-middle", "noisy-tails"):
        table = json.loads((tmp_path / folder / "table.json").read_text())
        assert table["reward"].replace(":", "-") == folder
    asked = [options["reward"] for script, options in runner.asked if script == "eval_code.py"]
    assert asked == ["noisy:middle", "noisy:tails"]


def test_r2_is_measured_with_what_the_cells_are_given(args, runner, tmp_path):
    given = {"policy": "mine", "prompts": "p.jsonl", "kl_coef": "0.1", "require_isolation": None}
    rows = measure(args, ["single", "none"], given, runner)
    script, options = runner.asked[0]
    assert options["policy"] == "mine" and options["problems"] == "p.jsonl"
    assert "kl_coef" not in options and options["require_isolation"] is None
    assert options["filters"] == "none" and rows["single"] == rows["none"]


def test_a_folder_of_another_study_is_refused_before_anything_is_made(args, runner):
    main(args)
    asked = len(runner.asked)
    args.steps = 7
    with pytest.raises(UserError, match="a study with other arguments .steps 4 there, 7 here"):
        main(args)
    assert len(runner.asked) == asked


def test_cells_of_another_version_are_refused_before_hours_of_training(args, runner, tmp_path):
    main(args)
    (tmp_path / "cells/none-2/metrics.jsonl").write_text('{"epoch": 1}\n')
    args.seeds, asked = 5, len(runner.asked)
    with pytest.raises(UserError, match="none-2: not a run of this version"):
        main(args)
    assert len(runner.asked) == asked


@pytest.mark.parametrize(
    "change, words, said",
    [
        ({"filters": "none, none"}, (), "--filters none, none: none stands there twice"),
        ({"reward": "model,model"}, (), "--reward model,model: model stands there twice"),
        ({}, ("--prompts", "p.jsonl"), "-- --prompts: the table is of pass rates on test problems"),
        ({}, ("--plan",), "-- --plan: the study itself sets this option"),
        ({"filters": "none,luck"}, (), "--filters luck: unknown, expected one of"),
        ({"reward": "model,luck"}, (), "--reward luck: unknown, expected one of"),
        ({}, ("--steps", "3"), "-- --steps: the study itself sets this option"),
        ({}, ("3",), "-- 3: expected --option value"),
        (
            {"samples_per_prompt": 1},
            (),
            "--filters best_random, N = 1: needs",
        ),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_made(args, runner, change, words, said):
    for name, value in change.items():
        setattr(args, name, value)
    with pytest.raises(UserError) as error:
        main(args, words)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert not runner.asked


def test_one_seed_has_no_verdict_and_tables_are_json(args, runner, tmp_path):
    args.seeds, args.filters = 1, "none, best_random"
    main(args)
    table = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
    assert table["filters"][1]["selected_greedy"] == [0.1, None, None]
    assert "one seed: no interval" in (tmp_path / "table.md").read_text()


def test_unequal_updates_are_not_called_equal(args, runner, tmp_path):
    args.match = "updates"
    main(args)
    rows = json.loads((tmp_path / "table.json").read_text())["filters"]
    unequal, equal = rows, [row | {"updates": 8} for row in rows]
    assert "matched by updates as far as filters keep a fixed number" in markdown(args, unequal, 1)
    assert "matched by updates." in markdown(args, equal, 1)


def test_a_damaged_reliability_file_is_one_line(args, runner, tmp_path):
    main(args)
    (tmp_path / "reliability/reliability.json").write_text("{")
    with pytest.raises(UserError, match="reliability.json: damaged, delete it"):
        main(args)


def test_words_are_options_and_flags():
    words = ["--kl-coef=0.1", "--policy", "DIR", "--require_isolation", "--lam", "0.9"]
    expected = {"kl_coef": "0.1", "policy": "DIR", "require_isolation": None, "lam": "0.9"}
    assert parse_words(words) == expected
