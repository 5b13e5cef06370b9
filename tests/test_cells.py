"""A cell of the study is a script that runs: how it is examined, how it fails and how it ends."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from pfppo.lab import cells
from pfppo.lab.cells import run_cells

import pytest
from ranks import refused
from running import write_rows


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
