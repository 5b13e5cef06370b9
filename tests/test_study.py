"""The study: which cells there are, that they are made once, and what is said of them."""

import json
import math

from pfppo import study
from pfppo.config import UserError
from pfppo.study import Args, Cell, cells_of, interval, markdown, rank_correlation, summarize

import numpy as np
import pytest


def write_cell(cell, greedy, steps=4):
    """What train_ppo.py leaves of a run."""
    cell.folder.mkdir(parents=True)
    rates = {
        name: {kind: {"pass@1": value} for kind, value in (("greedy", greedy), ("sampled", 0.5))}
        for name in ("before", "best on validation, step 4", "last, step 4")
    }
    (cell.folder / "result.json").write_text(json.dumps({"problems": 500, "rates": rates}))
    row = {"kept": 0.4, "reward_all": 0.1, "score_all": 0.5, "kl_k1": 0.2, "seconds_sample": 30.0}
    rows = [
        {"step": s, "validation": 0.5 if s % 2 == 0 else None} | row for s in range(1, steps + 1)
    ]
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def args(tmp_path):
    return Args(filters="none,best_random", seeds=3, out=str(tmp_path), jobs=2)


NAMES = ["none", "best_random"]


def test_single_gets_n_times_the_prompts_and_others_the_same(args):
    cells = {cell.filter: cell.options for cell in cells_of(args, ["single", "none", "top"])}
    drawn = {o["prompts_per_step"] * o["samples_per_prompt"] * o["steps"] for o in cells.values()}
    assert drawn == {48 * 5 * 30}
    assert cells["single"]["prompts_per_step"] == 240


def test_matched_updates_give_more_steps_to_those_that_keep_less(args):
    args.match = "updates"
    cells = {c.filter: c.options for c in cells_of(args, ["none", "best_random", "best_of_n"])}
    assert [cells[n]["steps"] for n in cells] == [30, 75, 150]


def test_there_is_a_cell_for_every_filter_and_seed_with_a_folder_of_its_own(args):
    cells = cells_of(args, NAMES)
    assert [(c.filter, c.seed) for c in cells] == [(n, s) for s in (1, 2, 3) for n in NAMES]
    assert len({cell.folder for cell in cells}) == 6


def test_only_what_is_not_finished_is_run_and_a_failure_ends_the_study(args, monkeypatch):
    ran = []

    def run(script, options, log, threads, words):
        ran.append(options["run_dir"].name)
        if options["filter"] == "best_random" and options["seed"] == 3:
            raise UserError("train_ppo.py failed")
        write_cell(Cell("", 0, options["run_dir"], {}), 0.5)

    monkeypatch.setattr(study, "run_script", run)
    cells = cells_of(args, NAMES)
    write_cell(cells[0], 0.5)
    with pytest.raises(UserError, match="failed"):
        study.run_cells(cells, 1, [])
    assert sorted(ran) == sorted(cell.folder.name for cell in cells[1:])
    with pytest.raises(UserError):
        study.run_cells(cells, 2, [])
    assert ran[5:] == ["best_random-3"]


def test_differences_are_paired_by_seed(args):
    cells = cells_of(args, NAMES)
    for cell in cells:
        write_cell(cell, 0.1 * cell.seed + (0.05 if cell.filter == "best_random" else 0))
    r2 = {"r2": 0.9, "r2_low": 0.8, "r2_high": 0.95, "kept": 0.4}
    rows, _ = summarize(args, NAMES, cells, {"none": r2, "best_random": r2})
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


def test_a_folder_of_another_version_is_one_line(args):
    cell = cells_of(args, NAMES)[0]
    write_cell(cell, 0.5)
    (cell.folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(UserError, match="none-1: not a run of this version") as error:
        study.read_cell(cell)
    assert "\n" not in str(error.value)


def test_an_unknown_filter_is_one_line_before_anything_is_made(args):
    args.filters = "none,luck"
    with pytest.raises(UserError, match="--filters luck: unknown, expected some of"):
        study.main(args)
