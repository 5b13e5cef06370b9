"""The study: which cells there are, that each is made once and ends with the study, what is said.

No cell is trained here: what the scripts would leave is written instead.
"""

import dataclasses
import json
import math
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
from pfppo.lab.intervals import t_inside, t_interval, t_quantile
from pfppo.lab.study import Args, cells_of, main, prepare
from pfppo.lab.tables import interactions, markdown, rank_correlation, regret

import numpy as np
import pytest
from ranks import refused
from running import write_rows

try:
    import matplotlib as MATPLOTLIB
except ImportError:
    MATPLOTLIB = None

KNOWN = {"r2": 0.9, "r2_low": 0.8, "r2_high": 0.95, "auc": 0.7}
KNOWN |= {"alpha": 0.4, "alpha_low": 0.3, "alpha_high": 0.5, "at_updates": 0.4, "at_samples": 0.4}


def write_cell(folder, options, greedy=0.5):
    """What train_ppo.py leaves of a run."""
    folder.mkdir(parents=True)
    rate = {"greedy": {"pass@1": greedy}, "sampled": {"pass@1": 0.5}}
    rates = dict.fromkeys(("before", "best on validation, step 4", "last, step 4"), rate)
    (folder / "args.json").write_text(json.dumps({"ppo_epochs": options.get("ppo_epochs", 1)}))
    (folder / "result.json").write_text(json.dumps({"problems": 500, "rates": rates}))
    (folder / "outcome.json").write_text(json.dumps({"answers": 8000, "pass": greedy}))
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
            write_cell(folder, options, 0.1 * (options["seed"] % 1000) + better)
        elif script == "eval_code.py":
            folder.mkdir(parents=True)
            rows = [{"filter": name, **KNOWN} for name in options["filters"].split(",")]
            (folder / "reliability.json").write_text(json.dumps({"filters": rows}))
        else:
            folder.mkdir(parents=True)
            (folder / "config.json").touch()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "run_script", run_script)
    monkeypatch.setattr(cells, "examine", lambda cell, asked, jobs: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return asked


@pytest.fixture
def args(tmp_path):
    few = {"seeds": 3, "steps": 4, "test_problems": 2, "jobs": 2}
    return Args(filters="none, best_random", out=str(tmp_path), **few)


def table_of(folder, match="samples"):
    return json.loads((folder / match / "table.json").read_text(), parse_constant=pytest.fail)


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
    args.match = "samples"  # what is the same in both is made once
    same = [cell for cell in cells_of(args, ["none", "best_random", "top"]) if cell in made]
    assert [cell["filter"] for cell in same] == ["none", "top"]
    assert len({cell["run_dir"] for cell in made + same}) == 4


def test_a_reward_model_has_cells_of_its_own_with_seeds_that_no_other_has(args, asked, tmp_path):
    """Its seeds are averaged: what is independent are reward models."""
    args.rm_seeds, args.seeds = 2, 2
    made = cells_of(args, ["none"])
    assert [cell["seed"] for cell in made] == [1, 1001, 2, 1002]
    models = [tmp_path / "reward_models" / name for name in "1122"]
    assert [cell["reward_model"] for cell in made] == models
    main(args)
    trained = [options for script, options in asked if script == "train_rm.py"]
    assert [(o["seed"], o["run_dir"]) for o in trained] == [(1, models[0]), (2, models[2])]
    measured = [o["reward_model"] for script, o in asked if script == "eval_code.py"]
    assert sorted(measured) == [models[0], models[2]]
    none, best = table_of(tmp_path)["filters"]
    assert none["outcome_by_unit"] == pytest.approx([0.1, 0.2]) and none["cells"] == 4
    assert best["outcome_difference"] == pytest.approx([0.05] * 3)
    assert none["r2"] == pytest.approx([0.9] * 3)  # over reward models
    assert "mean over 2 reward models" in (tmp_path / "samples/table.md").read_text()
    before = len(asked)
    args.rm_seeds, args.match = 3, "updates"  # what is there stays
    main(args)
    added = [options["run_dir"].name for script, options in asked[before:] if "filter" in options]
    assert sorted(added) == [f"best_random-{i}-10-steps" for i in (1, 1001, 1002, 1003, 2, 3)] + [
        "none-1003",
        "none-3",
    ]
    args.rm_seeds = 0
    assert "own_models True there, False here" in refused(main, args)
    assert "for the lab's policy" in refused(main, Args(rm_seeds=1, out="x"), ["--policy", "p"])


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


def test_a_trained_cell_is_examined_at_its_last_step_by_several_answers(tmp_path, monkeypatch):
    asked, cell = [], {"run_dir": tmp_path / "cell", "seed": 7}

    def run_script(script, folder, options, jobs):
        asked.append((script, options))
        place = Path(options.get("out", options.get("export", "")))
        place.mkdir(parents=True)  # an export that was cut short is in nobody's way
        write_rows(place / "results.jsonl", [{"passed": i < 3} for i in range(4)])

    monkeypatch.setattr(cells, "run_script", run_script)
    (tmp_path / "cell/last").mkdir(parents=True)
    cells.examine(cell, {"problems": "p", "samples_per_problem": 4, "temperature": 1.0}, 1)
    last = tmp_path / "cell/last"
    (one, export), (two, options) = asked
    assert (one, two) == ("train_ppo.py", "eval_code.py") and export["export"] == last
    assert options["policy"] == last and options["seed"] == 7 and not last.exists()
    assert json.loads((tmp_path / "cell/outcome.json").read_text()) == {"answers": 4, "pass": 0.75}
    assert cells.is_finished(cell)


def test_last_policies_answer_more_problems_than_the_lab_has_or_those_of_ones_own(args):
    args.test_problems = 3
    for _ in range(2):
        asked = study.asked_of(args, {"temperature": "0.7", "reward_model": "rm", "kl_coef": "1"})
        assert len(cells.whole_lines(asked.pop("problems"))) == 3
        assert asked == {"temperature": "0.7", "samples_per_problem": 4}
    assert study.asked_of(args, {"test": "t.jsonl"})["problems"] == "t.jsonl"


def test_a_cell_that_was_told_to_end_is_not_examined(args, monkeypatch):
    """It saves, and its status is 0."""
    monkeypatch.setattr(cells, "run_script", lambda *_: None)
    monkeypatch.setattr(cells, "examine", lambda *_: pytest.fail("examined"))
    said = refused(run_cells, cells_of(args, ["none"])[:1], 1, {}, {})
    assert said.endswith("was told to end; the same command goes on")


def test_problems_of_the_lab_are_not_asked_again(args, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args.test_problems = 3
    path = study.asked_of(args, {})["problems"]
    rows = cells.whole_lines(path)
    (tmp_path / "runs/lab").mkdir(parents=True, exist_ok=True)
    write_rows(tmp_path / "runs/lab/test.jsonl", rows[:2])
    path.unlink()
    again = [row["prompt"] for row in cells.whole_lines(study.asked_of(args, {})["problems"])]
    assert again[0] == rows[2]["prompt"] and len(again) == 3


def test_only_what_is_not_finished_is_run_and_a_failure_ends_it(args, asked):
    todo = cells_of(args, ["none"])
    write_cell(todo[0]["run_dir"], todo[0])
    for jobs in (1, 2):
        assert refused(run_cells, todo, jobs, {"fails_at": 3}, {}) == "it failed"
    ran = [(script, options["seed"], options["fails_at"]) for script, options in asked]
    assert ran == [("train_ppo.py", seed, 3) for seed in (2, 3, 3)]


@pytest.mark.parametrize("passes", [1, 3])
def test_a_cell_says_its_rates_and_its_curves(args, passes):
    cell = cells_of(args, ["none"])[0]
    write_cell(cell["run_dir"], cell | {"ppo_epochs": passes}, 0.75)
    result = read_cell(cell)
    assert result["selected_greedy"] == result["outcome"] == 0.75
    assert result["area"] == result["last_sampled"] == 0.5
    assert result["samples"] == [240, 480, 720, 960] and result["minutes"] == 2
    # 96 of 240 kept, 48 in a minibatch
    assert result["updates"] == [2 * passes, 4 * passes, 6 * passes, 8 * passes]
    assert read_cell(cell | {"minibatch": 40})["updates"][0] == 3 * passes  # 40, 40, 16
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
            run_cells([{"run_dir": tmp_path / "cell", "steps": 4}], 1, {}, {})
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
        assert (
            tmp_path / "samples/table.md"
        ).read_text() in said and "pip install matplotlib" in said


def test_differences_are_paired_by_seed(args, asked, tmp_path):
    main(args)
    none, best = table_of(tmp_path)["filters"]
    assert none["outcome_by_unit"] == pytest.approx([0.1, 0.2, 0.3])
    assert none["outcome"][0] == pytest.approx(0.2)
    assert best["outcome_difference"] == pytest.approx([0.05, 0.05, 0.05])
    low, high = best["outcome"][1:]
    assert low < 0.25 < high  # between seeds they differ more than from each other
    text = (tmp_path / "samples/table.md").read_text()
    assert "| none | 960 | 8 | 2.0 | 0.200 [-0.048, 0.448] | - | 0.500" in text
    assert "| best_random | 960 | 8 |" in text and "+0.050 [+0.050, +0.050]" in text
    assert all(part in text for part in ("| 0.900 [0.800, 0.950] |", "3 seeds", "0.2 hours"))
    args.base, args.confidence = "best_random", 0.8
    main(args)  # of the same cells, in a folder of its own
    assert (tmp_path / "samples/table.md").read_text() == text
    none, best = table_of(tmp_path, "samples-best_random-0.8")["filters"]
    assert none["outcome_difference"] == pytest.approx([-0.05] * 3)
    text = (tmp_path / "samples-best_random-0.8/table.md").read_text()
    assert best["outcome"][1] > low and "minus best_random" in text


def test_one_seed_has_no_verdict(args, asked, tmp_path):
    args.seeds = 1
    main(args)
    assert table_of(tmp_path)["filters"][1]["outcome"] == pytest.approx([0.15, None, None])
    assert "one of the seeds: no interval" in (tmp_path / "samples/table.md").read_text()


def test_the_rank_correlation_needs_three_filters_with_both():
    points = ((0.1, 0.2), (0.5, 0.3), (0.9, 0.8))
    rows = [{"r2": (r2, 0, 1), "auc": (-r2, 0, 1), "outcome": (p, 0, 0)} for r2, p in points]
    assert [rank_correlation(rows, name) for name in ("r2", "auc")] == pytest.approx([1, -1])
    assert [regret(rows, name) for name in ("r2", "auc")] == pytest.approx([0, 0.6])
    tied = [row | {"r2": (0.9, 0, 1)} for row in rows[1:]]  # the choice between them is a coin's
    assert regret([rows[0], *tied], "r2") == pytest.approx(0.25)
    unknown = {"r2": (None, None, None), "outcome": (1, 0, 0)}
    assert np.isnan(rank_correlation([*rows[:2], unknown], "r2"))
    assert np.isnan(regret([unknown], "r2"))


def test_an_interaction_is_what_a_filter_gains_more_under_one_reward_than_under_another():
    def rows(*less):
        return [{"filter": "none"}, {"filter": "top", "outcome_differences": list(less)}]

    text = interactions({"a": rows(0.3, 0.5), "b": rows(0.1, 0.1)}, Args())
    assert text.splitlines()[-1] == "| top | a | b | +0.300 [-0.971, +1.571] |"


def test_several_rewards_are_a_study_each(args, asked, tmp_path):
    args.reward = "noisy:middle,noisy:tails"
    main(args)
    for place in ("middle", "tails"):
        assert table_of(tmp_path / f"noisy-{place}")["reward"] == f"noisy:{place}"
    rewards = [options["reward"] for script, options in asked if script == "eval_code.py"]
    assert rewards == ["noisy:middle", "noisy:tails"]


def test_r2_is_measured_with_what_the_cells_are_given_and_single_has_that_of_none(args, asked):
    given = {"policy": "mine", "prompts": "p.jsonl", "kl_coef": "0.1", "allow_weak_isolation": None}
    assert prepare(args, ["single"], given) == [{"none": KNOWN}]
    _, options = asked[0]
    assert options["policy"] == "mine" and options["problems"] == "p.jsonl"
    assert "kl_coef" not in options and options["allow_weak_isolation"] is None
    assert options["filters"] == "none" and options["reward_model"] == "lab"
    args.filters = "single"
    main(args)
    assert len(asked) == 4 and table_of(Path(args.out))["filters"][0]["r2"] == [0.9, 0.8, 0.95]


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
        ({}, ("--refill", "2"), "-- --refill: the study itself sets this option"),  # more samples
        ({"filters": "none,luck"}, (), "--filters luck: unknown, expected one of"),
        ({"reward": "model,luck"}, (), "--reward luck: unknown, expected one of"),
        ({}, ("3",), "-- 3: expected --option value"),
        ({"samples_per_prompt": 1}, (), "--filters best_random, N = 1: needs"),
        ({"base": "top"}, (), "--base top: none of --filters"),
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
    unequal = table_of(tmp_path, "updates")["filters"]
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
    names = ("curves.png", "optimization.png", "statistics.png", "forest.png")
    assert written == {*(f"samples/{name}" for name in names), "two/rewards.png"}


def test_without_matplotlib_one_line_says_how_to_get_it(asked, tmp_path):
    for said in (figures.draw_study(tmp_path, {}, [], ""), figures.draw_rewards(tmp_path, {}, "x")):
        assert "pip install matplotlib" in said and "\n" not in said
    assert not list(tmp_path.iterdir())


ROWS = [
    {"step": 1, "reward_all": 0.5, "kl_k1": math.nan, "score_all": None, "kept": 0.4},
    {"step": 2, "reward_all": 9.0, "validation": 0.25},
    {"step": 2, "reward_all": 0.75, "validation": 0.5, "kl_kept": "much"},  # resumed: counts
]


def run_folder(folder, rows, more=""):
    folder.mkdir(parents=True)
    path = write_rows(folder / "metrics.jsonl", rows)
    path.write_text(path.read_text() + more)
    return str(folder)


def draw(monkeypatch, folders, out=""):
    """figures.main; the figure that it saved."""
    if MATPLOTLIB is None:
        pytest.skip("matplotlib is not installed")
    monkeypatch.setitem(sys.modules, "matplotlib", MATPLOTLIB)
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *a, **o: saved.append(f) or savefig(f, *a, **o)
    )
    figures.main(figures.Args(str(out)), folders)
    return saved[0]


def test_a_run_is_read_without_what_is_missing_and_what_a_kill_cut_short(tmp_path):
    kind, curves = figures.read_run(run_folder(tmp_path / "run", ROWS, '{"step": 3, "rewa'))
    assert kind is figures.PPO
    known = {name: [part.tolist() for part in curve] for name, curve in curves.items()}
    assert known == {"reward_all": [[1, 2], [0.5, 0.75]], "validation": [[2], [0.5]]}


def test_curves_of_a_run_go_into_its_folder_and_say_what_has_no_values(
    tmp_path, monkeypatch, capsys
):
    figure = draw(monkeypatch, [run_folder(tmp_path / "run", ROWS)])
    assert (tmp_path / "run/curves.png").read_bytes()[:4] == b"\x89PNG"
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["reward (sd of the SFT policy's samples)", "validation: greedy pass@1"]
    said = capsys.readouterr().out
    assert f"{tmp_path / 'run/curves.png'}; no values of: score: share that" in said


def test_curves_of_several_runs_have_a_color_each_a_style_for_what_is_kept_and_a_legend(
    tmp_path, monkeypatch
):
    rows = [{"step": i, "reward_all": i % 5, "reward_kept": 1 + i % 5} for i in range(1, 61)]
    folders = [run_folder(tmp_path / name / "same", rows) for name in ("a", "b")]
    folders.append(run_folder(tmp_path / "c", rows[:1]))
    figure = draw(monkeypatch, folders, tmp_path / "new" / "all")
    assert (tmp_path / "new/all.png").exists()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*folders[:2], "c"]
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["all", "kept"]
    lines = [
        line for line in axis.get_lines() if line.get_alpha() is None and len(line.get_xdata())
    ]
    assert [line.get_linestyle() for line in lines] == ["-", "--"] * 3
    assert len({tuple(line.get_color()) for line in lines}) == 3
    means = lines[0].get_ydata()  # of 5 steps: 1, 2, 3, 4, 0
    assert means[4:].tolist() == pytest.approx([2] * 56) and means[0] == 1


def test_held_out_numbers_of_a_reward_model_stand_where_they_were_measured(tmp_path, monkeypatch):
    unseen = {10: 0.5, 20: 0.25}
    rows = [{"step": i, "loss": 1 / i, "held_out_loss": unseen.get(i)} for i in range(1, 25)]
    (axis,) = draw(monkeypatch, [run_folder(tmp_path / "rm", rows)]).axes
    assert axis.get_title() == "loss (nats per pair)"
    held_out = next(line for line in axis.get_lines() if line.get_marker() == "o")
    assert dict(zip(*held_out.get_data(), strict=True)) == unseen


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "not the folder of a run, it has no metrics.jsonl"),
        ("", "metrics.jsonl: no step is in it yet"),
        ("{}\n", "metrics.jsonl, line 1: damaged, expected an object with a step"),
        ('{"step": 1}\nx\n', "metrics.jsonl, line 2: damaged, expected a JSON object"),
        ('{"step": 1, "loss": NaN}\n', "no metrics of train_ppo.py or train_rm.py in it"),
        ('{"step": 1, "loss": 1}\n', "matplotlib: pip install matplotlib"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, monkeypatch, text, said):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run/metrics.jsonl").write_text(text)
    folders = [str(tmp_path / "run")]
    assert refused(figures.main, figures.Args(), folders).endswith(said)
    assert "no such folder" in refused(figures.main, figures.Args(), [str(tmp_path / "none")])


def test_a_wrong_command_line_of_curves_is_one_line(tmp_path, monkeypatch):
    ppo, rm = (run_folder(tmp_path / n, [{"step": 1, n: 1}]) for n in ("reward_all", "loss"))
    for folders, out, said in (
        ([], "", "no RUN, expected folders of runs"),
        ([ppo, ppo], "", "2 runs: expected --out FILE"),
        ([ppo, rm], "x.png", "a run of PPO and a reward model's training, draw them apart"),
        ([ppo], f"{ppo}/metrics.jsonl/x.png", "metrics.jsonl is a file, expected a folder"),
    ):
        assert said in refused(figures.main, figures.Args(out), folders)
    with pytest.raises(UserError, match="--out .*x.xyz: .*'xyz' is not supported"):
        draw(monkeypatch, [ppo], tmp_path / "x.xyz")


def test_folders_and_options_stand_in_any_order():
    for words in ("a b --out f", "--out f a b", "a --out f b"):
        assert figures.split_words(words.split()) == (["a", "b"], ["--out", "f"])
    assert figures.split_words(["--out=f", "a", "--help"]) == (["a"], ["--out=f", "--help"])


def test_a_band_is_mean_and_95_percent_of_the_mean_where_all_seeds_have_a_value():
    runs = [{"samples": [10, 20, 30], "validation": [None, 0.5, 0.7]}]
    runs += [runs[0] | {"validation": [0.1, 0.7, 0.9]}]
    at, mean, low, high = figures._band(runs, "samples", "validation")
    assert at.tolist() == [20, 30] and mean == pytest.approx([0.6, 0.8])
    half = 12.7062 * np.std([0.5, 0.7], ddof=1) / 2**0.5  # t of one degree of freedom
    assert high - mean == pytest.approx([half] * 2, rel=1e-5)
    assert mean - low == pytest.approx([half] * 2, rel=1e-5)
