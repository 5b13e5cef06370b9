"""Cells of a study: runs of train_ppo.py, several at once, and what they left.

A cell is the options of its run, {name: value}, `run_dir` a folder of its own. When it is trained,
its last policy (not the one that was best on validation: to select hides differences) answers the
study's test problems; what came of it is `outcome.json`, and a cell that has one is finished. One
that was killed goes on, as every cell is started with --resume. When the study ends, whatever ends
it, its cells are sent SIGTERM: they save, and end too.

Not covered: several machines; cells of several ranks.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import accumulate
from pathlib import Path

from pfppo.config import UserError, reason, require
from pfppo.files import whole_lines, write_json
from pfppo.fsdp import PR_SET_PDEATHSIG

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
CURVES = ("reward_all", "score_all", "validation")
RUNNING, ENDED = set(), threading.Event()  # processes; set where no more shall begin
# What a process does first (a preexec_fn is not safe beside threads); elsewhere than on Linux it
# outlives a study that is killed.
END_WITH_STUDY = f"""import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {signal.SIGTERM.value}, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""
START = [sys.executable, *(["-c", END_WITH_STUDY] if sys.platform == "linux" else [])]


def is_finished(cell):
    return (cell["run_dir"] / "outcome.json").exists()


def steps_done(cell):
    path = cell["run_dir"] / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_script(script, folder, options, jobs=1):
    """Run a script in a process of its own, its output appended to `folder`.log. options: {name:
    value}, None for a flag. Raises UserError, with the script's own line, if it fails."""
    require(not ENDED.is_set(), "the study has been ended")
    argv = [*START, str(ROOT / script), "--resume"]
    argv += [f"--{n}" if value is None else f"--{n}={value}" for n, value in options.items()]
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a+", errors="replace") as log:
        start = log.tell()
        # In a session of its own: Ctrl-C is the study's alone, which then sends SIGTERM.
        how = {"stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen(argv, env=env, **how)
        RUNNING.add(process)
        status = process.wait()
        RUNNING.discard(process)
        log.seek(start)
        why = re.findall(": error: (.*)", log.read()) or ["no message"]
    require(status == 0, f"{script} failed, see {log.name}: {why[-1].strip()}")


def run_cells(cells, jobs, given, asked):
    """Run what is not finished, `jobs` at once; asked: of `examine`. Raises UserError on the first
    that fails."""
    left = [cell for cell in cells if not is_finished(cell)]
    title = f"{len(left)} of {len(cells)} cells to run"
    bar = tqdm(desc=title, unit="step", total=sum(cell["steps"] for cell in cells))
    bar.n = bar.initial = sum(map(steps_done, cells))

    def make(cell):
        begin = time.monotonic()
        if not (cell["run_dir"] / "result.json").exists():
            run_script("train_ppo.py", cell["run_dir"], cell | given, jobs)
            ended = (cell["run_dir"] / "result.json").exists()
            require(ended, f"{cell['run_dir']}: was told to end; the same command goes on")
        examine(cell, asked, jobs)
        minutes = (time.monotonic() - begin) / 60
        bar.write(f"{cell['filter']}, seed {cell['seed']}: {minutes:.1f} minutes")

    with bar:
        at_once(make, left, jobs, lambda: bar.update(sum(map(steps_done, cells)) - bar.n))


def examine(cell, asked, jobs):
    """Write a trained cell's `outcome.json`: the pass rate of its last policy. asked: options of
    eval_code.py, problems and samples of each among them."""
    run, last, answers = cell["run_dir"], cell["run_dir"] / "last", cell["run_dir"] / "answers"
    shutil.rmtree(last, ignore_errors=True)  # of an export that was cut short
    run_script("train_ppo.py", run, {"run_dir": run, "export": last}, jobs)
    options = asked | {"policy": last, "seed": cell["seed"], "out": answers}
    run_script("eval_code.py", answers, options, jobs)
    passed = [row["passed"] for row in whole_lines(answers / "results.jsonl")]
    write_json(run / "outcome.json", {"answers": len(passed), "pass": sum(passed) / len(passed)})
    shutil.rmtree(last)


def at_once(work, items, jobs, tick=lambda: None):
    """work(item) of all, `jobs` at once, and tick() every two seconds. Raises UserError on the
    first that fails; whatever else ends it ends what runs, too."""
    ENDED.clear()
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(work, item) for item in items}
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                tick()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, UserError):  # else those that run may finish
                ENDED.set()  # a cell that has been told to save is not examined next
                for process in list(RUNNING):
                    process.terminate()
            raise


def read_cell(cell):
    """What a finished cell says: pass rates; `area` under the curve, the mean over the steps of the
    share of samples that is right; minutes; and from metrics.jsonl curves, a list of one number per
    step each. Raises UserError."""
    folder, steps = cell["run_dir"], cell["steps"]
    drawn = cell["prompts_per_step"] * cell["samples_per_prompt"]  # samples of a step
    try:
        asked = json.loads((folder / "args.json").read_text())
        if asked["filter"] != cell["filter"]:
            raise ValueError(f"filter {asked['filter']}, expected {cell['filter']}")
        rates = json.loads((folder / "result.json").read_text())["rates"].values()
        result = {
            f"{when}_{kind}": rate[kind]["pass@1"]
            for when, rate in zip(("before", "selected", "last"), rates, strict=True)
            for kind in ("greedy", "sampled")
        }
        rows = whole_lines(folder / "metrics.jsonl")
        if [row["step"] for row in rows] != list(range(1, steps + 1)):
            raise ValueError(f"metrics.jsonl has not the steps 1 to {steps}")
        result["outcome"] = json.loads((folder / "outcome.json").read_text())["pass"]
        result["area"] = sum(row["score_all"] for row in rows) / steps
        kept = [round(row["kept"] * drawn) for row in rows]
        updates = [asked.get("ppo_epochs", 1) * math.ceil(n / cell["minibatch"]) for n in kept]
        seconds = [row[name] for row in rows for name in row if name.startswith("seconds_")]
        result |= {name: [row[name] for row in rows] for name in CURVES}
        result |= {"samples": [drawn * row["step"] for row in rows]}
        result |= {"updates": list(accumulate(updates)), "minutes": sum(filter(None, seconds)) / 60}
        return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{folder}: not a run of this version ({reason(error)})") from error
