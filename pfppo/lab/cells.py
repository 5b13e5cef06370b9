"""Cells of a study: runs of train_ppo.py, several at once, and what they left.

A cell has a folder of its own. One that has a `result.json` is finished and is not made again; one
that was killed goes on, because every cell is started with --resume. When the study ends, whatever
ends it, its cells are sent SIGTERM: they save, and end too.

Not covered: several machines; cells of several ranks.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pfppo.config import UserError, reason, require
from pfppo.files import whole_lines
from pfppo.fsdp import PR_SET_PDEATHSIG

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
CURVES = ("reward_all", "score_all", "validation", "kl_k1")
RUNNING = set()  # processes
END_WITH_STUDY = None  # what a new process does first
if sys.platform == "linux":  # elsewhere it outlives a study that is killed
    END_WITH_STUDY = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@dataclass(frozen=True)
class Cell:
    """One run of train_ppo.py."""

    folder: Path
    options: dict  # {name: value}

    @property
    def is_finished(self):
        return (self.folder / "result.json").exists()

    @property
    def steps_done(self):
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


def run_script(script, folder, options, jobs=1):
    """Run a script in a process of its own, its output appended to `folder`.log. options: {name:
    value}, None for a flag. Raises UserError, with the script's own line, if it fails."""
    argv = [sys.executable, str(ROOT / script), "--resume"]
    argv += [f"--{n}" if value is None else f"--{n}={value}" for n, value in options.items()]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a+", errors="replace") as log:
        start = log.tell()
        process = subprocess.Popen(
            argv, env=environment, stdout=log, stderr=log, preexec_fn=END_WITH_STUDY
        )
        RUNNING.add(process)
        status = process.wait()
        RUNNING.discard(process)
        log.seek(start)
        why = re.findall(": error: (.*)", log.read()) or ["no message"]
    require(status == 0, f"{script} failed, see {log.name}: {why[-1].strip()}")


def run_cells(cells, jobs, given):
    """Run what is not finished, `jobs` at once. Raises UserError on the first that fails."""
    left = [cell for cell in cells if not cell.is_finished]
    bar = tqdm(desc=f"{len(left)} of {len(cells)} cells to run", unit="step")
    bar.total = sum(cell.options["steps"] for cell in cells)
    bar.n = bar.initial = sum(cell.steps_done for cell in cells)

    def make(cell):
        begin = time.monotonic()
        run_script("train_ppo.py", cell.folder, cell.options | given, jobs)
        minutes = (time.monotonic() - begin) / 60
        bar.write(f"{cell.options['filter']}, seed {cell.options['seed']}: {minutes:.1f} minutes")

    with bar, ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(make, cell) for cell in left}
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                bar.update(sum(cell.steps_done for cell in cells) - bar.n)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, UserError):  # else those that run may finish
                for process in list(RUNNING):
                    process.terminate()
            raise


def read_cell(cell):
    """What a finished cell says: pass rates, minutes, and from metrics.jsonl curves, a list of one
    number per step each. Raises UserError."""
    P, N, steps, minibatch = (
        cell.options[name]
        for name in ("prompts_per_step", "samples_per_prompt", "steps", "minibatch")
    )
    try:
        passes = json.loads((cell.folder / "args.json").read_text()).get("ppo_epochs", 1)
        rates = json.loads((cell.folder / "result.json").read_text())["rates"].values()
        result = {
            f"{when}_{kind}": rate[kind]["pass@1"]
            for when, rate in zip(("before", "selected", "last"), rates, strict=True)
            for kind in ("greedy", "sampled")
        }
        rows = whole_lines(cell.folder / "metrics.jsonl")
        if [row["step"] for row in rows] != list(range(1, steps + 1)):
            raise ValueError(f"metrics.jsonl has not the steps 1 to {steps}")
        kept = [round(row["kept"] * P * N) for row in rows]
        updates = [passes * max(n > 0, round(n / minibatch)) for n in kept]
        result |= {name: [row[name] for row in rows] for name in CURVES}
        result["samples"] = [P * N * row["step"] for row in rows]
        result["updates"] = np.cumsum(updates).tolist()
        seconds = [row[name] for row in rows for name in row if name.startswith("seconds_")]
        result["minutes"] = sum(filter(None, seconds)) / 60
        return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{cell.folder}: not a run of this version ({reason(error)})") from error
