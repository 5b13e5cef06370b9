"""The paper's tables in one command: every filter and seed trained on the lab, and what came of it.

    python -m pfppo.study --filters single,none,best_of_n,best_random,best_worst --seeds 5
    python -m pfppo.study --filters none,best_of_n,best_random,best_worst --seeds 3 \\
        --reward noisy:middle,noisy:tails,noisy:uniform --out runs/noise

Each cell (filter, seed) is a `torchrun train_ppo.py` run with a directory of its own below
`--out`/cells; what is finished is not made again, what was killed goes on. Before them
`eval_code.py` measures R^2 of every filter on samples of the SFT policy, of the problems that PPO
will learn from. Then `table.md`, `table.json` and, with matplotlib, figures are written. Several
rewards are a study each, in a folder each below `--out`.

Compute is matched in one of two ways:

    --match samples    every cell sees the same prompts x N in each of the same number of steps, so
                       best_random makes 2/5 of the updates of none
    --match updates    cells that keep less make more steps, until all have made as many updates
                       (where a filter keeps what exceeds a threshold: as with samples)

`single`, PPO-S, draws one sample of N times the prompts. Its samples have the same distribution as
those of `none`, hence the same R^2.

Statistics: a cell's policy is selected on validation only; differences are paired by seed against
`none`, with a 95 % bootstrap interval over seeds. An interval that holds 0 is no verdict; and with
five seeds resampling is optimistic: of normal values it covers the mean in about 85 % of the cases.

What follows `--` goes to every cell: `-- --policy DIR --reward_model DIR --prompts FILE
--validation FILE --test FILE` is the study with models of one's own.

Not covered: several machines; cells of several ranks (cells.py).
"""

import dataclasses
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pfppo.config import Count, UserError, launch, reason, require
from pfppo.filters import FILTERS, kept_per_prompt, load_filter
from pfppo.lab import default as lab
from pfppo.lab import figures
from pfppo.lab.cells import Cell, Torchrun, read_cell, run_cells
from pfppo.reliability import spearman
from pfppo.reward import load_reward
from pfppo.run.folder import check_writable, write_json

import numpy as np

BASE = "none"  # what the others are compared with: PPO-M, all samples kept
# What R^2 is measured with as the cells are trained with: options of both scripts.
SHARED = ("policy", "reward_model", "prompt_style", "max_new_tokens", "max_prompt_tokens")
SHARED += ("temperature", "timeout", "workers", "sampling_batch", "param_dtype", "device")
SHARED += ("require_isolation",)
RATES = [f"{when}_{how}" for when in ("selected", "last") for how in ("greedy", "sampled")]


@dataclass
class Args:
    filters: str = "single,none,best_of_n,best_random,best_worst"  # comma-separated, or all
    seeds: Count = 5  # cells of a filter: seeds 1, 2, ...
    match: Literal["samples", "updates"] = "samples"  # what is equal between filters
    reward: str = "model"  # --reward of the cells, or several: noisy:middle,noisy:tails
    steps: Count = 30  # PPO steps of `none`
    prompts_per_step: Count = 48  # P
    samples_per_prompt: Count = 5  # N
    minibatch: Count = 48  # kept rows per optimizer step
    jobs: Count = 2  # cells that run at once
    out: str = "runs/study"  # where cells, tables and figures go


FREE = ("filters", "seeds", "jobs", "out")  # may differ when a study goes on


def cells_of(args, names):
    """All cells, seed by seed, so that an interrupted study has whole seeds."""
    found = []
    for seed in range(1, args.seeds + 1):
        for name in names:
            N = 1 if name == "single" else args.samples_per_prompt
            P = args.prompts_per_step * args.samples_per_prompt // N
            kept = kept_per_prompt(load_filter(name, N, "filters"), N) or N
            scale = N / kept if args.match == "updates" else 1
            options = {"filter": name, "seed": seed, "reward": args.reward}
            options |= {"prompts_per_step": P, "samples_per_prompt": N}
            options |= {"minibatch": args.minibatch, "steps": round(args.steps * scale)}
            folder = Path(args.out) / "cells" / f"{re.sub(r'[^a-zA-Z0-9_]+', '_', name)}-{seed}"
            found.append(Cell(name, seed, folder, options))
    return found


def parse_words(words):
    """{option: value} of the words after `--`; a flag's value is None."""
    found, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else None
        else:
            require(name and found[name] is None, f"-- {word}: expected --option value ...")
            found[name] = word
    return found


def measure(args, names, given, run):
    """{filter: row of the reliability table} on samples of the SFT policy; makes the lab too."""
    asked = [name for name in names if name != "single"] or [BASE]
    if given.get("prompts", "lab") == "lab":
        lab.FOLDER.mkdir(parents=True, exist_ok=True)
        lab.make_problems()
        given = given | {"prompts": lab.FOLDER / "train.jsonl"}
    folder = Path(args.out) / "reliability"
    path = folder / "reliability.json"
    known = _read_reliability(path) if path.exists() else []
    if not {row["filter"] for row in known} >= set(asked):
        options = {"reward_model": "lab", "reward": args.reward, "problems": given["prompts"]}
        options |= {"samples_per_problem": args.samples_per_prompt, "temperature": 1.0}
        options |= {"filters": ",".join(asked), "out": folder}
        options |= {name: given[name] for name in SHARED if name in given}
        run("eval_code.py", options, folder.with_suffix(".log"), os.cpu_count() or 1)
        known = _read_reliability(path)
    rows = {row["filter"]: row for row in known}
    return rows | ({"single": rows[BASE]} if BASE in rows else {})


def _read_reliability(path):
    try:
        rows = json.loads(path.read_text())["filters"]
        return [{n: row[n] for n in ("filter", "kept", "r2", "r2_low", "r2_high")} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, delete it ({reason(error)})") from error


def interval(values, seed=0, resamples=10_000):
    """(mean, low, high): 95 % bootstrap interval of the mean over seeds; NaN of one value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def summarize(args, names, cells, reliability):
    """The table: one dict per filter, plain numbers for JSON; and what each cell says."""
    results = {(cell.filter, cell.seed): read_cell(cell) for cell in cells}
    seeds = range(1, args.seeds + 1)
    rows = []
    for name in names:
        mine = [results[name, seed] for seed in seeds]
        row = {"filter": name, "seeds": args.seeds}
        for key in RATES:
            row[f"{key}_by_seed"] = [result[key] for result in mine]
            row[key] = interval(row[f"{key}_by_seed"])
            if BASE in names:
                pairs = [results[name, s][key] - results[BASE, s][key] for s in seeds]
                row[f"{key}_difference"] = interval(pairs)
        row["samples"] = mine[0]["curves"]["samples"][-1]
        row["updates"] = round(np.mean([result["curves"]["updates"][-1] for result in mine]))
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

    def shown(value, sign=""):
        mean, low, high = value
        bounds = "" if np.isnan(low) else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
        return f"{mean:{sign}.3f}{bounds}"

    def against(row, key):
        value = row.get(f"{key}_difference")
        return "-" if value is None or row["filter"] == BASE else shown(value, "+")

    def r2(row):
        low, high = (np.nan if row[n] is None else row[n] for n in ("r2_low", "r2_high"))
        return "-" if row["r2"] is None else shown((row["r2"], low, high))

    columns = {
        "filter": lambda row: row["filter"],
        "samples": lambda row: f"{row['samples']:,}",
        "updates": lambda row: f"{row['updates']:,}",
        "minutes": lambda row: f"{row['minutes']:.1f}",
        "greedy, selected": lambda row: shown(row["selected_greedy"]),
        f"minus {BASE}": lambda row: against(row, "selected_greedy"),
        "sampled, selected": lambda row: shown(row["selected_sampled"]),
        f"minus {BASE} ": lambda row: against(row, "selected_sampled"),
        "greedy, last": lambda row: f"{row['last_greedy'][0]:.3f}",
        "sampled, last": lambda row: f"{row['last_sampled'][0]:.3f}",
        "R^2 before training": r2,
    }
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell(row) for cell in columns.values()) + " |")
    correlation = rank_correlation(rows)
    shown_as = "undefined" if np.isnan(correlation) else f"{correlation:.2f}"
    mean = (
        f"mean over {args.seeds} seeds with a 95 % bootstrap interval over seeds; differences are "
        "paired by seed, and an interval that holds 0 is no verdict."
        if args.seeds > 1
        else "one seed: no interval, and so no verdict."
    )
    differ = args.match == "updates" and len({row["updates"] for row in rows}) > 1
    but = " as far as filters keep a fixed number (see the column)" if differ else ""
    lines += [
        "",
        f"Test pass@1, {mean} Compute: matched by {args.match}{but}. Reward: {args.reward}. "
        "Selected: the step that was best on validation. Minutes: of a cell's steps.",
        "",
        f"Spearman correlation of R^2 and greedy pass@1 over filters: {shown_as}. "
        f"The steps of all cells took {hours:.1f} hours.",
    ]
    return "\n".join(lines) + "\n"


def _plain(value):
    """A value for JSON, which knows no NaN."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def check_study(args, given):
    """Refuse a folder with another study's cells, before anything runs. Raises UserError."""
    out = Path(args.out)
    check_writable(out, "out")
    mine = {n: v for n, v in dataclasses.asdict(args).items() if n not in FREE} | {"given": given}
    path = out / "study.json"
    try:
        there = json.loads(path.read_text()) if path.exists() else mine
        differ = [f"{n} {there.get(n)!r} there, {v!r} here" for n, v in mine.items()]
        differ = [text for text, n in zip(differ, mine, strict=True) if there.get(n) != mine[n]]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({reason(error)})") from error
    advice = "choose another name"
    require(
        not differ, f"--out {out}: a study with other arguments ({'; '.join(differ)}): {advice}"
    )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, mine)


def study(args, names, given, run):
    """One reward: run what is missing, write table and figures. Returns the table's rows."""
    check_study(args, given)
    cells = cells_of(args, names)
    for cell in cells:
        if cell.is_finished:
            read_cell(cell)  # what does not fit is told before hours of training
    reliability = measure(args, names, given, run)
    run_cells(cells, args.jobs, given, run)
    rows, results = summarize(args, names, cells, reliability)
    hours = sum(result["seconds"] for result in results.values()) / 3600
    text, out = markdown(args, rows, hours), Path(args.out)
    (out / "table.md").write_text(text)
    known = {"match": args.match, "reward": args.reward, "hours": hours, "filters": rows}
    write_json(out / "table.json", _plain(known))
    curves = {n: [results[n, s]["curves"] for s in range(1, args.seeds + 1)] for n in names}
    print(text)
    drawn = figures.draw_study(out, curves, rows, rank_correlation(rows))
    print(f"{out}: table.md, table.json; {drawn}")
    return rows


def main(args, words=()):
    names = list(FILTERS) if args.filters == "all" else _listed(args.filters, "filters")
    rewards, given = _listed(args.reward, "reward"), parse_words(words)
    for name in names:
        load_filter(name, 1 if name == "single" else args.samples_per_prompt, "filters")
    for reward in rewards:
        load_reward(reward)
    own = {"filter", "seed", "reward", "steps", "prompts_per_step", "samples_per_prompt"}
    own |= {"minibatch", "run_dir", "resume", "export", "plan", "selfcheck"}
    taken = sorted(own & given.keys())
    require(not taken, f"-- --{taken and taken[0]}: the study itself sets this option of its cells")
    require(
        given.get("prompts", "lab") == "lab" or given.get("test"),
        "-- --prompts: the table is of pass rates on test problems, expected --test FILE too",
    )
    run = Torchrun()
    if len(rewards) == 1:
        study(args, names, given, run)
        return
    found = {}
    for reward in rewards:
        folder = Path(args.out) / re.sub(r"[^a-zA-Z0-9_]+", "-", reward)
        print(f"{reward}:", flush=True)
        part = dataclasses.replace(args, reward=reward, out=str(folder))
        found[reward] = study(part, names, given, run)
    if BASE in names:
        print(f"{args.out}: {figures.draw_rewards(Path(args.out), found, BASE)}")


def _listed(text, option):
    """The names in a comma-separated list. Raises UserError where one stands there twice."""
    names = [name.strip() for name in text.split(",")]
    twice = [name for name in names if names.count(name) > 1]
    require(not twice, f"--{option} {text}: {twice and twice[0]} stands there twice")
    return names


def start():
    """Options of the study stand before `--`, those that go to every cell behind it."""
    words = []
    if "--" in sys.argv:
        cut = sys.argv.index("--")
        sys.argv[cut:], words = [], sys.argv[cut + 1 :]
    launch(lambda args: main(args, words), Args)


if __name__ == "__main__":
    start()
