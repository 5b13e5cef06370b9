"""The study: which cells there are, that each is made once, what its tables say.

No cell is trained here: what the scripts would leave is written instead.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import eval_code
import train_ppo
from pfppo.config import UserError
from pfppo.lab import cells, figures, study
from pfppo.lab.cells import read_cell, run_cells
from pfppo.lab.study import Args, cells_of, main, prepare
from pfppo.lab.tables import markdown

import pytest
from ranks import refused
from running import write_rows
from test_figures import MATPLOTLIB

KNOWN = {"r2": 0.9, "r2_low": 0.8, "r2_high": 0.95, "auc": 0.7}
KNOWN |= {"alpha": 0.4, "alpha_low": 0.3, "alpha_high": 0.5, "at_updates": 0.4, "at_samples": 0.4}


def write_cell(folder, options, greedy=0.5):
    """What train_ppo.py leaves of a run."""
    folder.mkdir(parents=True)
    rate = {"greedy": {"pass@1": greedy}, "sampled": {"pass@1": 0.5}}
    rates = dict.fromkeys(("before", "best on validation, step 4", "last, step 4"), rate)
    (folder / "args.json").write_text(json.dumps({"ppo_epochs": 1} | options, default=str))
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


def test_filters_of_ones_own_share_no_cells(args, tmp_path):
    names = [f"{tmp_path}/a/b.py:f", f"{tmp_path}/a-b.py:f"]
    (tmp_path / "a").mkdir()
    for name in names:
        Path(name[:-2]).write_text("def f(rewards, generator):\n    return rewards**2\n")
    said = refused(cells_of, args, names)
    assert said.startswith("--filters: the cells of ") and said.endswith("rename one")
    (one,), (other,) = (cells_of(args, [name])[:1] for name in names)
    write_cell(one["run_dir"], one)
    assert refused(read_cell, other).endswith(f"filter {names[0]}, expected {names[1]})")


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


def test_a_filter_of_ones_own_can_be_the_base(args, asked, tmp_path):
    (tmp_path / "own.py").write_text("def all(rewards, generator):\n    return rewards * 0 + 1\n")
    args.base = f"{tmp_path}/own.py:all"
    args.filters += f",{args.base}"
    main(args)
    (folder,) = tmp_path.glob("samples-*")
    assert folder.name.endswith("-own-py-all") and (folder / "table.md").exists()


def test_one_seed_has_no_verdict(args, asked, tmp_path):
    args.seeds = 1
    main(args)
    assert table_of(tmp_path)["filters"][1]["outcome"] == pytest.approx([0.15, None, None])
    assert "one of the seeds: no interval" in (tmp_path / "samples/table.md").read_text()


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
        ({"filters": "none,agreeing"}, (), "--filters agreeing: asks for members"),
        ({"confidence": 1.0}, (), "--confidence 1: expected between 0 and 1"),
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
    assert written == {*(f"samples/{name}" for name in names), "two/samples/rewards.png"}


def test_without_matplotlib_one_line_says_how_to_get_it(asked, tmp_path):
    for said in (figures.draw_study(tmp_path, {}, [], ""), figures.draw_rewards(tmp_path, {}, "x")):
        assert "pip install matplotlib" in said and "\n" not in said
    assert not list(tmp_path.iterdir())
