"""The study: which cells there are, that each is made once and ends with the study, what is said.

No cell is trained here: what the scripts would leave is written instead.
"""

import dataclasses
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import eval_code
import train_ppo
from pfppo.config import UserError
from pfppo.lab import cells, figures, study
from pfppo.lab.cells import read_cell, run_cells
from pfppo.lab.study import Args, cells_of, main, markdown, measure, rank_correlation

import numpy as np
import pytest
from ranks import refused

try:
    import matplotlib as MATPLOTLIB
except ImportError:
    MATPLOTLIB = None

R2 = {"r2": 0.9, "r2_low": 0.8, "r2_high": 0.95, "kept": 0.4}


def write_cell(folder, options, greedy=0.5):
    """What train_ppo.py leaves of a run."""
    folder.mkdir(parents=True)
    rate = {"greedy": {"pass@1": greedy}, "sampled": {"pass@1": 0.5}}
    rates = dict.fromkeys(("before", "best on validation, step 4", "last, step 4"), rate)
    (folder / "args.json").write_text(json.dumps({"ppo_epochs": options.get("ppo_epochs", 1)}))
    (folder / "result.json").write_text(json.dumps({"problems": 500, "rates": rates}))
    row = {"kept": 0.4, "reward_all": 0.1, "score_all": 0.5}
    row |= {"seconds_sample": 30.0, "seconds_save": None}
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, options["steps"] + 1):
            row |= {"step": step, "validation": None if step % 2 else 0.5}
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """[(script, options)] that were run: instead of a process, what the script would leave."""
    asked = []

    def run_script(script, folder, options, jobs=1):
        asked.append((script, options))
        if options.get("fails_at") == options.get("seed", 0):
            raise UserError("it failed")
        if script == "train_ppo.py":
            better = 0.05 if options["filter"] == "best_random" else 0
            write_cell(folder, options, 0.1 * options["seed"] + better)
        else:
            folder.mkdir(parents=True)
            rows = [{"filter": name, **R2} for name in options["filters"].split(",")]
            (folder / "reliability.json").write_text(json.dumps({"filters": rows}))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "run_script", run_script)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return asked


@pytest.fixture
def args(tmp_path):
    return Args(filters="none, best_random", seeds=3, steps=4, out=str(tmp_path), jobs=2)


def table_of(folder):
    return json.loads((folder / "table.json").read_text(), parse_constant=pytest.fail)


def test_there_is_a_cell_for_every_filter_and_seed_with_equally_many_samples(args):
    made = cells_of(args, ["single", "none", "top"])
    pairs = [(cell["filter"], cell["seed"]) for cell in made]
    assert pairs == [(name, seed) for seed in (1, 2, 3) for name in ("single", "none", "top")]
    assert len({cell["run_dir"] for cell in made}) == 9  # a folder of its own
    drawn = {o["prompts_per_step"] * o["samples_per_prompt"] * o["steps"] for o in made}
    assert drawn == {48 * 5 * 4} and made[0]["prompts_per_step"] == 240


def test_matched_updates_give_more_steps_to_those_that_keep_less(args):
    args.match, args.steps, args.seeds = "updates", 30, 1
    made = cells_of(args, ["none", "best_random", "best_of_n", "top"])
    assert [cell["steps"] for cell in made] == [30, 75, 150, 30]


def test_only_what_is_not_finished_is_run_and_a_failure_ends_it(args, asked):
    todo = cells_of(args, ["none"])
    write_cell(todo[0]["run_dir"], todo[0])
    for jobs in (1, 2):
        assert refused(run_cells, todo, jobs, {"fails_at": 3}) == "it failed"
    ran = [(script, options["seed"], options["fails_at"]) for script, options in asked]
    assert ran == [("train_ppo.py", seed, 3) for seed in (2, 3, 3)]


@pytest.mark.parametrize("passes", [1, 3])
def test_a_cell_says_its_rates_and_its_curves(args, passes):
    cell = cells_of(args, ["none"])[0]
    write_cell(cell["run_dir"], cell | {"ppo_epochs": passes}, 0.75)
    result = read_cell(cell)
    assert result["selected_greedy"] == 0.75 and result["last_sampled"] == 0.5
    assert result["samples"] == [240, 480, 720, 960] and result["minutes"] == 2
    # 96 of 240 kept, 48 in a minibatch
    assert result["updates"] == [2 * passes, 4 * passes, 6 * passes, 8 * passes]
    assert result["validation"] == [None, 0.5, None, 0.5]


def test_a_script_that_fails_is_told_with_its_own_line(tmp_path):
    (tmp_path / "script.py").write_text("import sys\nsys.exit(f'script.py: error: {sys.argv[1:]}')")
    for number in (1, 2):
        options = {"plan": None, "steps": number}
        said = refused(cells.run_script, tmp_path / "script.py", tmp_path / "a/run", options)
        log = f"{tmp_path}/a/run.log"
        assert said.endswith(f"failed, see {log}: ['--resume', '--plan', '--steps={number}']")
    assert (tmp_path / "a/run.log").read_text().count("error") == 2


SLEEPER = """import signal, time
signal.signal(signal.SIGTERM, lambda *_: open("saved", "w") and exit())
open("started", "w")
time.sleep(300)"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_runs_is_told_to_save_when_the_study_ends(tmp_path, monkeypatch, number):
    """A fork is the study; the script writes files when it starts and when it gets SIGTERM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    (tmp_path / "train_ppo.py").write_text(SLEEPER)
    if not (process := os.fork()):
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
            run_cells([{"run_dir": tmp_path / "cell", "steps": 4}], 1, {})
        finally:
            os._exit(1)
    for name in ("started", "saved"):
        end = time.monotonic() + 60
        while not (tmp_path / name).exists():
            assert time.monotonic() < end, name
            time.sleep(0.02)
        if name == "started":
            os.kill(process, number)
    assert os.waitpid(process, 0)[1] != 0


def test_scripts_are_those_beside_the_package_and_take_the_options_that_the_study_knows():
    assert (cells.ROOT / "train_ppo.py").exists() and (cells.ROOT / "eval_code.py").exists()
    known = [{f.name for f in dataclasses.fields(s.Args)} for s in (train_ppo, eval_code)]
    assert known[0] & known[1] >= set(study.SHARED)


def test_a_study_leaves_its_tables_and_makes_nothing_twice(args, asked, tmp_path, capsys):
    for seeds, runs in ((3, 6), (3, 6), (4, 8)):
        args.seeds = seeds
        main(args)
        assert [script for script, _ in asked] == ["eval_code.py"] + runs * ["train_ppo.py"]
        said = capsys.readouterr().out
        assert (tmp_path / "table.md").read_text() in said and "pip install matplotlib" in said


def test_differences_are_paired_by_seed(args, asked, tmp_path):
    main(args)
    none, best = table_of(tmp_path)["filters"]
    assert none["selected_greedy_by_seed"] == pytest.approx([0.1, 0.2, 0.3])
    assert none["selected_greedy"][0] == pytest.approx(0.2)
    assert best["selected_greedy_difference"] == pytest.approx([0.05, 0.05, 0.05])
    low, high = best["selected_greedy"][1:]
    assert low < 0.25 < high  # between seeds they differ more than from each other
    text = (tmp_path / "table.md").read_text()
    assert "| none | 960 | 8 | 2.0 | 0.200 [0.100, 0.300] | - | 0.500" in text
    assert "| best_random | 960 | 8 |" in text and "+0.050 [+0.050, +0.050]" in text
    assert all(part in text for part in ("| 0.900 [0.800, 0.950] |", "3 seeds", "0.2 hours"))


def test_one_seed_has_no_verdict(args, asked, tmp_path):
    args.seeds = 1
    main(args)
    assert table_of(tmp_path)["filters"][1]["selected_greedy"] == pytest.approx([0.15, None, None])
    assert "one seed: no interval" in (tmp_path / "table.md").read_text()


def test_the_rank_correlation_needs_three_filters_with_both():
    points = ((0.1, 0.2), (0.5, 0.3), (0.9, 0.8))
    rows = [{"r2": r2, "selected_greedy": (p, 0, 0)} for r2, p in points]
    assert rank_correlation(rows) == pytest.approx(1)
    assert np.isnan(rank_correlation([*rows[:2], {"r2": None, "selected_greedy": (1, 0, 0)}]))


def test_several_rewards_are_a_study_each(args, asked, tmp_path):
    args.reward = "noisy:middle,noisy:tails"
    main(args)
    for place in ("middle", "tails"):
        assert table_of(tmp_path / f"noisy-{place}")["reward"] == f"noisy:{place}"
    rewards = [options["reward"] for script, options in asked if script == "eval_code.py"]
    assert rewards == ["noisy:middle", "noisy:tails"]


def test_r2_is_measured_with_what_the_cells_are_given_and_single_has_that_of_none(args, asked):
    given = {"policy": "mine", "prompts": "p.jsonl", "kl_coef": "0.1", "allow_weak_isolation": None}
    assert measure(args, ["single"], given) == {"none": R2}
    _, options = asked[0]
    assert options["policy"] == "mine" and options["problems"] == "p.jsonl"
    assert "kl_coef" not in options and options["allow_weak_isolation"] is None
    assert options["filters"] == "none" and options["reward_model"] == "lab"
    args.filters = "single"
    main(args)
    assert len(asked) == 4 and table_of(Path(args.out))["filters"][0]["r2"] == 0.9


ANOTHER = "none-2: not a run of this version"


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("cells/none-2/metrics.jsonl", '{"epoch": 1}\n', ANOTHER),
        ("cells/none-2/metrics.jsonl", '{"step": 1, "kept": 0.4}\n', ANOTHER),
        ("cells/none-2/result.json", '{"rates": {"before": {}}}', ANOTHER),
        ("cells/none-2/result.json", "[]", ANOTHER),
        ("cells/none-2/args.json", "no", ANOTHER),
        ("reliability/reliability.json", "{", "reliability.json: damaged, delete it"),
        ("study.json", "[]", "study.json: damaged"),
        ("study.json", '{"steps": 7}', "a study with other arguments .*steps 7 there, 4 here"),
    ],
)
def test_what_does_not_fit_is_one_line_before_hours_of_training(
    args, asked, tmp_path, name, text, said
):
    main(args)
    (tmp_path / name).write_text(text)
    args.seeds, before = 5, len(asked)
    assert re.search(said, refused(main, args)) and len(asked) == before


@pytest.mark.parametrize(
    "change, words, said",
    [
        ({"filters": "none, none"}, (), "--filters none, none: none stands there twice"),
        ({}, ("--prompts", "p.jsonl"), "-- --prompts: the table is of pass rates on test problems"),
        ({}, ("--plan",), "-- --plan: the study itself sets this option"),
        ({"filters": "none,luck"}, (), "--filters luck: unknown, expected one of"),
        ({"reward": "model,luck"}, (), "--reward luck: unknown, expected one of"),
        ({}, ("3",), "-- 3: expected --option value"),
        ({"samples_per_prompt": 1}, (), "--filters best_random, N = 1: needs"),
        ({"out": __file__}, (), f"--out {__file__}: {__file__} is a file"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_made(args, asked, change, words, said):
    args = dataclasses.replace(args, **change)
    assert refused(main, args, words).startswith(said)
    assert not asked and not (Path(args.out) / "study.json").exists()


def test_unequal_updates_are_not_called_equal(args, asked, tmp_path):
    args.match = "updates"
    main(args)
    unequal = table_of(tmp_path)["filters"]
    equal = [row | {"updates": 8} for row in unequal]
    assert "matched by updates as far as filters keep a fixed number" in markdown(args, unequal, 1)
    assert "matched by updates." in markdown(args, equal, 1)


def test_words_are_options_and_flags():
    words = ["--kl-coef=0.1", "--policy", "DIR", "--allow_weak_isolation", "--lam", "0.9"]
    expected = {"kl_coef": "0.1", "policy": "DIR", "allow_weak_isolation": None, "lam": "0.9"}
    assert study.parse_words(words) == expected


def test_figures_are_written(args, asked, tmp_path, monkeypatch):
    if MATPLOTLIB is None:
        pytest.skip("matplotlib is not installed")
    monkeypatch.setitem(sys.modules, "matplotlib", MATPLOTLIB)
    args.seeds = 1
    main(args)
    changed = {"seeds": 2, "reward": "noisy:middle,noisy:tails", "out": str(tmp_path / "two")}
    monkeypatch.setattr(figures, "draw_study", lambda *args: "")
    main(dataclasses.replace(args, **changed))
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert written == {"curves.png", "optimization.png", "r2.png", "two/rewards.png"}


def test_without_matplotlib_one_line_says_how_to_get_it(asked, tmp_path):
    for said in (figures.draw_study(tmp_path, {}, [], 0), figures.draw_rewards(tmp_path, {}, "x")):
        assert "pip install matplotlib" in said and "\n" not in said
    assert not list(tmp_path.iterdir())


def test_a_band_is_mean_and_95_percent_of_the_mean_where_all_seeds_have_a_value():
    runs = [{"samples": [10, 20, 30], "validation": [None, 0.5, 0.7]}]
    runs += [runs[0] | {"validation": [0.1, 0.7, 0.9]}]
    at, mean, low, high = figures._band(runs, "samples", "validation")
    assert at.tolist() == [20, 30] and mean == pytest.approx([0.6, 0.8])
    half = 1.96 * np.std([0.5, 0.7], ddof=1) / 2**0.5
    assert high - mean == pytest.approx([half, half]) and mean - low == pytest.approx([half, half])
