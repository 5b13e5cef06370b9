"""The paper's tables in one command: every filter and seed trained on the lab, and what came of it.

    python -m pfppo.study --filters single,none,best_of_n,best_random,best_worst --seeds 5

Each cell (filter, seed) is a `torchrun train_ppo.py` run with a directory of its own below
`--out`/cells; what is finished is not made again, what was killed goes on. Before them
`eval_code.py` measures R^2 of every filter on samples of the SFT policy. Then `table.md`,
`table.json` and, with matplotlib, figures are written.

Compute is matched in one of two ways:

    --match samples    every cell sees the same prompts x N in each of the same number of steps, so
                       best_random makes 2/5 of the updates of none; single gets N times the prompts
    --match updates    cells that keep less make more steps, until all have made as many updates

Statistics: a cell's policy is selected on validation only; differences are paired by seed against
`none`, with a 95 % bootstrap interval over seeds. An interval that holds 0 is no verdict.

Not covered: other worlds than the lab (the cells' options can be given after `--`: `-- --policy
DIR --prompts FILE ...`), several machines.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pfppo import figures
from pfppo.config import Count, UserError, launch, reason, require
from pfppo.filters import FILTERS, kept_per_prompt, load_filter
from pfppo.reliability import spearman
from pfppo.rundir import write_json

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
BASE = "none"  # what the others are compared with: PPO-M, all samples kept


@dataclass
class Args:
    filters: str = "single,none,best_of_n,best_random,best_worst"  # comma-separated, or all
    seeds: Count = 5  # cells of a filter: seeds 1, 2, ...
    match: Literal["samples", "updates"] = "samples"  # what is equal between filters
    reward: str = "model"  # --reward of the cells: model, tests, combined, noisy:middle, ...
    steps: Count = 30  # PPO steps of `none`
    prompts_per_step: Count = 48  # P
    samples_per_prompt: Count = 5  # N
    minibatch: Count = 48  # kept rows per optimizer step
    jobs: Count = 2  # cells that run at once
    out: str = "runs/study"  # where cells, tables and figures go


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


def cells_of(args, names):
    """All cells, seed by seed, so that an interrupted study has whole seeds."""
    found = []
    for seed in range(1, args.seeds + 1):
        for name in names:
            N = 1 if name == "single" else args.samples_per_prompt
            P = args.prompts_per_step * args.samples_per_prompt // N
            kept = kept_per_prompt(load_filter(name, N), N) or N
            scale = N / kept if args.match == "updates" else 1
            options = {"filter": name, "seed": seed, "reward": args.reward}
            options |= {"prompts_per_step": P, "samples_per_prompt": N}
            options |= {"minibatch": args.minibatch, "steps": round(args.steps * scale)}
            found.append(Cell(name, seed, Path(args.out) / "cells" / f"{name}-{seed}", options))
    return found


def run_script(script, options, log, threads, words=()):
    """Run a script under torchrun, its output into a file. Raises UserError with its last line."""
    argv = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    with open(log, "a") as file:
        done = subprocess.run(
            [*launcher, str(ROOT / script), *argv, *words],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        said = [line for line in Path(log).read_text().splitlines() if ": error: " in line]
        raise UserError(f"{script} failed, see {log}: {said[-1] if said else 'no message'}")


def run_cells(cells, jobs, words):
    """Run what is not finished, `jobs` at once. Raises UserError on the first that fails."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    left = [cell for cell in cells if not cell.is_finished]
    with tqdm(total=len(cells), initial=len(cells) - len(left), desc="cells", unit="") as bar:

        def run(cell):
            cell.folder.parent.mkdir(parents=True, exist_ok=True)
            options = cell.options | {"run_dir": cell.folder}
            begin, log = time.monotonic(), cell.folder.with_suffix(".log")
            run_script("train_ppo.py", options, log, threads, ["--resume", *words])
            bar.update()
            seconds = time.monotonic() - begin
            bar.write(f"{cell.filter}, seed {cell.seed}: {seconds / 60:.1f} minutes")

        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(run, cell) for cell in left]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def measure(args, names, words):
    """{filter: row of the reliability table} on samples of the SFT policy; makes the lab too."""
    folder = Path(args.out) / "reliability"
    table = folder / "reliability.json"
    if not table.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        asked = [name for name in names if name != "single"]
        options = {"reward_model": "lab", "samples_per_problem": args.samples_per_prompt}
        options |= {"filters": ",".join(asked), "out": folder}
        log = folder.with_suffix(".log")
        run_script("eval_code.py", options, log, os.cpu_count() or 1, ["--resume"])
    rows = {row["filter"]: row for row in json.loads(table.read_text())}
    return rows | ({"single": rows[BASE]} if BASE in rows else {})  # one sample: the same policy


def interval(values, seed=0, resamples=10_000):
    """(mean, low, high): 95 % bootstrap interval of the mean over seeds; NaN of one value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def read_cell(cell):
    """What a finished cell says: pass rates, and curves from metrics.jsonl. Raises UserError."""
    try:
        rates = list(json.loads((cell.folder / "result.json").read_text())["rates"].values())
        lines = (cell.folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        sampled = cell.options["prompts_per_step"] * cell.options["samples_per_prompt"]
        updates = [
            max(r["kept"] > 0, round(r["kept"] * sampled / cell.options["minibatch"])) for r in rows
        ]
        found = {
            f"{when}_{how}": rate[how]["pass@1"]
            for when, rate in zip(("before", "selected", "last"), rates, strict=True)
            for how in ("greedy", "sampled")
        }
        found["curves"] = {
            "samples": [sampled * row["step"] for row in rows],
            "updates": np.cumsum(updates).tolist(),
            **{
                name: [row[name] for row in rows]
                for name in ("reward_all", "score_all", "validation", "kl_k1")
            },
        }
        found["seconds"] = sum(
            v for row in rows for n, v in row.items() if n.startswith("seconds_") and v
        )
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{cell.folder}: not a run of this version ({reason(error)})") from error


def summarize(args, names, cells, reliability):
    """The table: one dict per filter, plain numbers for JSON."""
    results = {(cell.filter, cell.seed): read_cell(cell) for cell in cells}
    seeds = range(1, args.seeds + 1)
    rows = []
    for name in names:
        mine = [results[name, seed] for seed in seeds]
        row = {"filter": name, "seeds": args.seeds}
        for key in ("selected_greedy", "selected_sampled", "last_greedy", "last_sampled"):
            row[key] = interval([result[key] for result in mine])
            if BASE in names:
                pairs = [results[name, s][key] - results[BASE, s][key] for s in seeds]
                row[f"{key}_difference"] = interval(pairs)
        row["samples"] = mine[0]["curves"]["samples"][-1]
        row["updates"] = mine[0]["curves"]["updates"][-1]
        row["minutes"] = sum(result["seconds"] for result in mine) / 60 / len(mine)
        judged = reliability.get(name, {})
        row |= {key: judged.get(key) for key in ("r2", "r2_low", "r2_high", "kept")}
        rows.append(row)
    return rows, results


def rank_correlation(rows):
    """Spearman of R^2 before training and greedy pass@1 after it, over filters; NaN of less than 3
    filters that have both."""
    both = [(row["r2"], row["selected_greedy"][0]) for row in rows if row["r2"] is not None]
    return spearman(*np.array(both).T) if len(both) > 2 else float("nan")


def markdown(args, rows, hours):
    """The table as Markdown, with what it needs to be read."""
    head = [
        "filter",
        "samples",
        "updates",
        "minutes",
        "greedy, selected",
        f"- {BASE}",
        "sampled, selected",
        "greedy, last",
        "R^2 before training",
    ]

    def shown(value, sign=""):
        mean, low, high = value
        bounds = "" if np.isnan(low) else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
        return f"{mean:{sign}.3f}{bounds}"

    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        difference = row.get("selected_greedy_difference")
        r2 = "-" if row["r2"] is None else shown((row["r2"], row["r2_low"], row["r2_high"]))
        cells = [
            row["filter"],
            f"{row['samples']:,}",
            f"{row['updates']:,}",
            f"{row['minutes']:.1f}",
            shown(row["selected_greedy"]),
            "-" if difference is None or row["filter"] == BASE else shown(difference, "+"),
            shown(row["selected_sampled"]),
            shown(row["last_greedy"]),
            r2,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    equal = {
        "samples": "samples drawn are equal between filters",
        "updates": "optimizer steps are equal between filters",
    }[args.match]
    correlation = rank_correlation(rows)
    lines += [
        "",
        f"Test pass@1, mean over {args.seeds} seeds with a 95 % bootstrap interval over seeds; "
        f"differences are paired by seed. Compute: {equal}. Reward: {args.reward}. Selected: the "
        "step that was best on validation. An interval that holds 0 is no verdict.",
        "",
        f"Spearman correlation of R^2 and greedy pass@1 over filters: {correlation:.2f}. "
        f"All cells took {hours:.1f} hours of training.",
    ]
    return "\n".join(lines) + "\n"


def main(args, words=()):
    names = list(FILTERS) if args.filters == "all" else args.filters.split(",")
    for name in names:
        require(
            name in FILTERS, f"--filters {name}: unknown, expected some of {', '.join(FILTERS)}"
        )
    out = Path(args.out)
    reliability = measure(args, names, words)
    cells = cells_of(args, names)
    run_cells(cells, args.jobs, words)
    rows, results = summarize(args, names, cells, reliability)
    hours = sum(result["seconds"] for result in results.values()) / 3600
    text = markdown(args, rows, hours)
    (out / "table.md").write_text(text)
    write_json(out / "table.json", {"match": args.match, "reward": args.reward, "filters": rows})
    print(text)
    curves = {
        name: [results[name, s]["curves"] for s in range(1, args.seeds + 1)] for name in names
    }
    print(figures.draw_study(out, curves, rows))


def start():
    """Options of the study stand before `--`, those that go to every cell behind it."""
    words = []
    if "--" in sys.argv:
        cut = sys.argv.index("--")
        sys.argv[cut:], words = [], sys.argv[cut + 1 :]
    launch(lambda args: main(args, words), Args)


if __name__ == "__main__":
    start()
