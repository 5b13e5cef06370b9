"""Cells: made once, several at once, and gone when the study goes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pfppo.lab import cells
from pfppo.lab.cells import Cell, Torchrun, read_cell, run_cells
from pfppo.config import UserError

import pytest
from conftest import ROOT

OPTIONS = {"filter": "none", "seed": 1, "prompts_per_step": 48, "samples_per_prompt": 5}
OPTIONS |= {"minibatch": 48, "steps": 4}


def write_cell(folder, options, greedy):
    """What train_ppo.py leaves of a run."""
    folder.mkdir(parents=True)
    rates = {
        name: {kind: {"pass@1": value} for kind, value in (("greedy", greedy), ("sampled", 0.5))}
        for name in ("before", "best on validation, step 4", "last, step 4")
    }
    arguments = {name: value for name, value in options.items() if name != "run_dir"}
    (folder / "args.json").write_text(json.dumps(arguments))
    (folder / "result.json").write_text(json.dumps({"problems": 500, "rates": rates}))
    row = {"kept": 0.4, "reward_all": 0.1, "score_all": 0.5, "kl_k1": 0.2, "seconds_sample": 30.0}
    rows = [
        {"step": s, "validation": 0.5 if s % 2 == 0 else None} | row
        for s in range(1, options["steps"] + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def three(folder):
    return [Cell("none", s, folder / f"none-{s}", OPTIONS | {"seed": s}) for s in (1, 2, 3)]


def test_only_what_is_not_finished_is_run_and_a_failure_ends_it(tmp_path):
    ran = []

    def run(script, options, log, threads):
        ran.append(options["run_dir"].name)
        assert script == "train_ppo.py" and options["kl_coef"] == "0.1"
        if options["seed"] == 3:
            raise UserError("train_ppo.py failed")
        write_cell(options["run_dir"], options, 0.5)

    todo = three(tmp_path)
    write_cell(todo[0].folder, todo[0].options, 0.5)
    for jobs in (1, 2):
        with pytest.raises(UserError, match="failed"):
            run_cells(todo, jobs, {"kl_coef": "0.1"}, run)
    assert ran == ["none-2", "none-3", "none-3"]


def test_a_cell_says_its_rates_and_its_curves(tmp_path):
    cell = three(tmp_path)[0]
    write_cell(cell.folder, cell.options, 0.75)
    found = read_cell(cell)
    assert found["selected_greedy"] == 0.75 and found["last_sampled"] == 0.5
    assert found["curves"]["samples"] == [240, 480, 720, 960]
    assert found["curves"]["updates"] == [2, 4, 6, 8]  # 96 of 240 kept, 48 in a minibatch
    assert found["curves"]["validation"] == [None, 0.5, None, 0.5]
    assert found["seconds"] == 120


@pytest.mark.parametrize(
    "name, text",
    [
        ("metrics.jsonl", '{"epoch": 1}\n'),
        ("metrics.jsonl", "{"),
        ("metrics.jsonl", '{"step": 1, "kept": 0.4}\n'),
        ("result.json", '{"rates": {"before": {}}}'),
        ("result.json", "[]"),
        ("args.json", "no"),
    ],
)
def test_a_folder_of_another_version_is_one_line(tmp_path, name, text):
    cell = three(tmp_path)[0]
    write_cell(cell.folder, cell.options, 0.5)
    (cell.folder / name).write_text(text)
    with pytest.raises(UserError, match="none-1: not a run of this version") as error:
        read_cell(cell)
    assert "\n" not in str(error.value)


def test_every_pass_over_the_samples_is_an_update(tmp_path):
    cell = three(tmp_path)[0]
    write_cell(cell.folder, cell.options | {"ppo_epochs": 3}, 0.5)
    assert read_cell(cell)["curves"]["updates"] == [6, 12, 18, 24]


def test_a_run_with_other_arguments_is_refused(tmp_path):
    cell = three(tmp_path)[0]
    write_cell(cell.folder, OPTIONS | {"minibatch": 24}, 0.5)
    with pytest.raises(UserError, match="with other arguments .minibatch 24 there, 48 here"):
        read_cell(cell)


def test_a_script_that_fails_is_told_with_its_own_line(tmp_path):
    options = {"steps": 1, "run_dir": tmp_path / "run", "prompts": tmp_path / "none.jsonl"}
    with pytest.raises(UserError, match="train_ppo.py failed, see .*log: .*none.jsonl"):
        Torchrun()("train_ppo.py", options, tmp_path / "a/log", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_runs_ends_with_the_study(tmp_path, number):
    """The script writes its process number and sleeps; the study is killed meanwhile."""
    script = tmp_path / "sleeper.py"
    script.write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(300)\n"
    )
    study = (
        "from pathlib import Path\n"
        "from pfppo import cells\n"
        f"cell = cells.Cell('none', 1, Path({str(tmp_path / 'cell')!r}), {{'steps': 4}})\n"
        "run = cells.Torchrun()\n"
        f"ask = lambda script, *rest: run({str(script)!r}, *rest)\n"
        "ask.stop = run.stop\n"
        "cells.run_cells([cell], 1, {}, ask)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", study],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    worker = int((tmp_path / "pid").read_text())
    process.send_signal(number)
    assert process.wait(60) != 0
    wait_until(lambda: not Path(f"/proc/{worker}").exists())


def wait_until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_scripts_are_those_beside_the_package():
    assert (cells.ROOT / "train_ppo.py").exists()
