"""Cells of a study: runs of train_ppo.py under torchrun, several at once, and what they left.

A cell has a folder of its own. One that has a `result.json` is finished and is not made again; one
that was killed goes on, because every cell is started with --resume. When the study ends, whatever
ends it, its cells end too: torchrun is sent SIGTERM and passes it on, so they save first.

Not covered: several machines; cells of several ranks.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pfppo.config import UserError, reason, require
from pfppo.sandbox import isolation

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
CURVES = ("reward_all", "score_all", "validation", "kl_k1")


@dataclass(frozen=True)
class Cell:
    """One run of train_ppo.py."""

    filter: str
    seed: int
    folder: Path
    options: dict

    @property
    def is_finished(self):
        return (self.folder / "result.json").exists()

    @property
    def steps_done(self):
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


class Torchrun:
    """Runs scripts, their output in files; they end when this process does (Linux)."""

    def __init__(self):
        self.running = set()

    def __call__(self, script, options, log, threads):
        """Run a script. options: {name: value}, None for a flag. Raises UserError, with the
        script's own line, if it fails."""
        pairs = [(f"--{n}",) if v is None else (f"--{n}", str(v)) for n, v in options.items()]
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        argv = [sys.executable, *module, str(ROOT / script), *sum(pairs, ()), "--resume"]
        orphan = None  # torchrun passes SIGTERM on: the run saves, and ends
        if sys.platform == "linux":
            pdeathsig = isolation.PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0
            orphan = partial(isolation.call, "prctl", *pdeathsig)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            start = file.tell()
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            process = subprocess.Popen(
                argv, env=environment, stdout=file, stderr=subprocess.STDOUT, preexec_fn=orphan
            )
        self.running.add(process)
        status = process.wait()
        self.running.discard(process)
        if status:
            with open(log, errors="replace") as file:
                file.seek(start)
                said = [line for line in file if ": error: " in line]
            why = said[-1].partition(": error: ")[2].strip() if said else "no message"
            raise UserError(f"{script} failed, see {log}: {why}")

    def stop(self):
        for process in list(self.running):
            process.terminate()


def run_cells(cells, jobs, given, run):
    """Run what is not finished, `jobs` at once. Raises UserError on the first that fails."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    left = [cell for cell in cells if not cell.is_finished]
    steps = sum(cell.options["steps"] for cell in cells)
    done = sum(cell.steps_done for cell in cells)
    what = f"{len(left)} of {len(cells)} cells to run"
    with tqdm(total=steps, initial=done, desc=what, unit="step") as bar:

        def make(cell):
            options = cell.options | {"run_dir": cell.folder} | given
            begin = time.monotonic()
            run("train_ppo.py", options, cell.folder.with_suffix(".log"), threads)
            minutes = (time.monotonic() - begin) / 60
            bar.write(f"{cell.filter}, seed {cell.seed}: {minutes:.1f} minutes")

        with ThreadPoolExecutor(jobs) as pool:
            waiting = {pool.submit(make, cell) for cell in left}
            try:
                while waiting:
                    ended, waiting = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
                    for future in ended:
                        future.result()
                    bar.update(sum(cell.steps_done for cell in cells) - bar.n)
            except UserError:  # those that run may finish
                pool.shutdown(cancel_futures=True)
                raise
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                run.stop()
                raise


def read_cell(cell):
    """What a finished cell says: pass rates, and curves from metrics.jsonl. Raises UserError."""
    try:
        options = json.loads((cell.folder / "args.json").read_text())
        rates = list(json.loads((cell.folder / "result.json").read_text())["rates"].values())
        lines = (cell.folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        sampled = cell.options["prompts_per_step"] * cell.options["samples_per_prompt"]
        kept = [round(row["kept"] * sampled) for row in rows]
        passes = options.get("ppo_epochs", 1)
        updates = [passes * max(n > 0, round(n / cell.options["minibatch"])) for n in kept]
        if [row["step"] for row in rows] != list(range(1, cell.options["steps"] + 1)):
            raise ValueError(f"metrics.jsonl has not the steps 1 to {cell.options['steps']}")
        found = {
            f"{when}_{how}": rate[how]["pass@1"]
            for when, rate in zip(("before", "selected", "last"), rates, strict=True)
            for how in ("greedy", "sampled")
        }
        found["curves"] = {"samples": [sampled * row["step"] for row in rows]}
        found["curves"] |= {"updates": np.cumsum(updates).tolist()}
        found["curves"] |= {name: [row[name] for row in rows] for name in CURVES}
        found["seconds"] = sum(
            v for row in rows for n, v in row.items() if n.startswith("seconds_") and v
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{cell.folder}: not a run of this version ({reason(error)})") from error
    differ = [
        f"{name} {options.get(name)!r} there, {value!r} here"
        for name, value in cell.options.items()
        if options.get(name) != value
    ]
    require(not differ, f"{cell.folder}: a run with other arguments ({'; '.join(differ)})")
    return found
