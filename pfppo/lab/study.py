"""The paper's tables in one command: every filter and seed trained on the lab, and what came of it.

    python -m pfppo.lab.study --filters single,none,best_of_n,best_random,best_worst --seeds 5
    python -m pfppo.lab.study --filters none,best_of_n,best_random,best_worst --seeds 3 \\
        --reward noisy:middle,noisy:tails,noisy:uniform --out runs/noise

`eval_code.py` measures R^2 of every filter before training, on samples of the SFT policy and the
problems that PPO will learn from. Then each cell (filter, seed) is a run of `train_ppo.py` below
`--out`/cells (cells.py); what is finished is not made again, what was killed goes on. In the end
`--out` has `table.md`, `table.json` and, with matplotlib, figures. Several rewards are a study
each, in a folder each below `--out`.

Compute is matched in one of two ways:

    --match samples    every cell sees the same prompts x N in each of the same number of steps, so
                       best_random makes 2/5 of the updates of none
    --match updates    cells that keep less make more steps, until all have made as many updates
                       (where a filter keeps what exceeds a threshold: as with samples)

`single`, PPO-S, draws one sample of N times the prompts. Its samples have the same distribution as
those of `none`, hence the same R^2.

A cell's policy is selected on validation only. Intervals are 95 % bootstrap intervals over seeds;
with five seeds they are optimistic: of normal values about 85 % cover the mean.

What follows `--` goes to every cell: `-- --policy DIR --reward_model DIR --prompts FILE
--validation FILE --test FILE` is the study with models of one's own.

Not covered: several machines; cells of several ranks.
"""

import json
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from pfppo.config import Count, UserError, launch, reason, require
from pfppo.files import check_writable, write_json
from pfppo.filters import FILTERS, kept_per_prompt, load_filter
from pfppo.lab import cells, default, figures
from pfppo.reliability import spearman
from pfppo.reward import load_reward
from pfppo.run import Machine, differences

import numpy as np

NO_WORD = re.compile(r"\W+", re.ASCII)  # what no folder is named by
BASE = "none"  # what the others are compared with: PPO-M, all samples kept
KEYS = [f"{when}_{kind}" for when in ("selected", "last") for kind in ("greedy", "sampled")]
JUDGED = ("r2", "r2_low", "r2_high", "kept")  # of the reliability table
# What R^2 is measured with as the cells are trained with: options of both scripts.
SHARED = ("policy", "reward_model", "prompt_style", "max_new_tokens", "max_prompt_tokens")
SHARED += ("temperature", "timeout", "param_dtype", *(field.name for field in fields(Machine)))


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
    """All cells, seed by seed, so that an interrupted study has whole seeds. Raises UserError."""
    made = []
    for seed in range(1, args.seeds + 1):
        for name in names:
            N = 1 if name == "single" else args.samples_per_prompt
            kept = kept_per_prompt(load_filter(name, N, "filters"), N) or N
            scale = N / kept if args.match == "updates" else 1
            options = {"filter": name, "seed": seed, "reward": args.reward}
            options |= {"steps": round(args.steps * scale), "minibatch": args.minibatch}
            options |= {"prompts_per_step": args.prompts_per_step * args.samples_per_prompt // N}
            folder = Path(args.out, "cells", f"{NO_WORD.sub('-', name)}-{seed}")
            made.append(options | {"samples_per_prompt": N, "run_dir": folder})
    return made


def parse_words(words):
    """{option: value} of the words after `--`; a flag's value is None. Raises UserError."""
    options, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            options[name] = value if equals else None
        else:
            require(name and options[name] is None, f"-- {word}: expected --option value ...")
            options[name] = word
    tested = options.get("prompts", "lab") == "lab" or options.get("test")
    what = "the table is of pass rates on test problems, expected --test FILE too"
    require(tested, f"-- --prompts: {what}")
    return options


def measure(args, names, given):
    """{filter: row of the reliability table} on samples of the SFT policy; makes the lab too.
    Raises UserError."""
    asked = {BASE if name == "single" else name: None for name in names}  # each once, in order
    folder = Path(args.out, "reliability")
    if not read_reliability(folder).keys() >= asked.keys():
        problems = given.get("prompts", "lab")
        problems = default.FOLDER / default.PATHS["prompts"] if problems == "lab" else problems
        options = {"reward_model": "lab", "reward": args.reward, "problems": problems}
        options |= {"samples_per_problem": args.samples_per_prompt, "temperature": 1.0}
        options |= {"filters": ",".join(asked), "out": folder}
        options |= {name: given[name] for name in SHARED if name in given}
        cells.run_script("eval_code.py", folder, options)
    return read_reliability(folder)


def read_reliability(folder):
    """The rows that are there. Raises UserError where they are damaged."""
    path = folder / "reliability.json"
    try:
        rows = json.loads(path.read_text())["filters"] if path.exists() else []
        return {row["filter"]: {name: row[name] for name in JUDGED} for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, delete it ({reason(error)})") from error


def interval(values, seed=0, resamples=10_000):
    """(mean, low, high): 95 % bootstrap interval of the mean over seeds; None of one value."""
    values = np.array(values)
    if len(values) < 2:
        return values[0], None, None
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return values.mean(), *np.quantile(values[draws].mean(1), [0.025, 0.975]).tolist()


def summarize(results, reliability):
    """The table: one dict per filter, plain numbers for JSON. results: {filter: [`read_cell` of
    each seed]}."""
    rows = []
    for name, mine in results.items():
        row = {"filter": name, "seeds": len(mine)}
        for key in KEYS:
            row[f"{key}_by_seed"] = [result[key] for result in mine]
            row[key] = interval(row[f"{key}_by_seed"])
            if BASE in results and name != BASE:
                pairs = zip(mine, results[BASE], strict=True)
                row[f"{key}_difference"] = interval([one[key] - base[key] for one, base in pairs])
        row["samples"] = mine[0]["samples"][-1]
        row["updates"] = round(np.mean([result["updates"][-1] for result in mine]))
        row["minutes"] = float(np.mean([result["minutes"] for result in mine]))
        rows.append(row | reliability[BASE if name == "single" else name])
    return rows


def rank_correlation(rows):
    """Spearman of R^2 before training and greedy pass@1 after it; NaN of less than 3 filters."""
    both = [(row["r2"], row["selected_greedy"][0]) for row in rows if row["r2"] is not None]
    return spearman(*np.array(both).T) if len(both) > 2 else float("nan")


def markdown(args, rows, hours):
    """The table as Markdown, with what it needs to be read."""

    def shown(value, sign=""):
        mean, low, high = value or (None, None, None)
        bounds = "" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
        return "-" if mean is None else f"{mean:{sign}.3f}{bounds}"

    minus = f"minus {BASE}"
    head = f"filter | samples | updates | minutes | greedy, selected | {minus} | sampled, selected"
    head += f" | {minus} | greedy, last | sampled, last | R^2 before training"
    lines = [head, " | ".join(["---"] * (head.count("|") + 1))]
    for row in rows:
        line = f"{row['filter']} | {row['samples']:,} | {row['updates']:,} | {row['minutes']:.1f}"
        for key in ("selected_greedy", "selected_sampled"):
            line += f" | {shown(row[key])} | {shown(row.get(key + '_difference'), '+')}"
        line += f" | {row['last_greedy'][0]:.3f} | {row['last_sampled'][0]:.3f}"
        lines.append(f"{line} | {shown([row['r2'], row['r2_low'], row['r2_high']])}")
    table = "\n".join(f"| {line} |" for line in lines)
    mean = "one seed: no interval, and so no verdict."
    if args.seeds > 1:
        mean = f"""mean over {args.seeds} seeds with a 95 % bootstrap interval over seeds; \
differences are paired by seed, and an interval that holds 0 is no verdict."""
    differ = args.match == "updates" and len({row["updates"] for row in rows}) > 1
    but = " as far as filters keep a fixed number (see the column)" if differ else ""
    correlation = rank_correlation(rows)
    correlation = "undefined" if np.isnan(correlation) else f"{correlation:.2f}"
    return f"""{table}

Test pass@1, {mean} Compute: matched by {args.match}{but}. Reward: {args.reward}. \
Selected: the step that was best on validation. Minutes: of a cell's steps.

Spearman correlation of R^2 and greedy pass@1 over filters: {correlation}. \
The steps of all cells took {hours:.1f} hours.
"""


def check_study(args, given):
    """Refuse a folder with another study's cells, before anything runs. Raises UserError."""
    out = Path(args.out)
    check_writable(out, "out")
    here = {n: v for n, v in asdict(args).items() if n not in args.FREE} | {"given": given}
    path = out / "study.json"
    try:
        differ = differences(json.loads(path.read_text()) if path.exists() else here, here)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({reason(error)})") from error
    other = f"--out {out}: a study with other arguments ({differ}): choose another name"
    require(not differ, other)
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, here)


def study(args, names, given):
    """One reward: run what is missing, write table and figures. Returns the table's rows."""
    planned, out = cells_of(args, names), Path(args.out)
    own = sorted(given.keys() & {*planned[0], "resume", "export", "plan", "selfcheck"})
    require(not own, f"-- --{' --'.join(own)}: the study itself sets this option of its cells")
    check_study(args, given)
    for cell in filter(cells.is_finished, planned):
        cells.read_cell(cell)  # what does not fit is told before hours of training
    reliability = measure(args, names, given)
    cells.run_cells(planned, args.jobs, given)
    results = [cells.read_cell(cell) for cell in planned]  # seed by seed
    results = {name: results[i :: len(names)] for i, name in enumerate(names)}
    rows = summarize(results, reliability)
    hours = sum(row["minutes"] * row["seeds"] for row in rows) / 60
    text = markdown(args, rows, hours)
    (out / "table.md").write_text(text)
    table = {"match": args.match, "reward": args.reward, "hours": hours, "filters": rows}
    write_json(out / "table.json", table)
    drawn = figures.draw_study(out, results, rows, rank_correlation(rows))
    print(f"{text}\n{out}: table.md, table.json; {drawn}")
    return rows


def listed(text, option):
    """The names in a comma-separated list. Raises UserError where one stands there twice."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        require(names.count(name) == 1, f"--{option} {text}: {name} stands there twice")
    return names


def main(args, words=()):
    """Run what is missing of every reward's cells, then write the tables and figures of all. words:
    options for the runs themselves, as they stood behind `--`. Raises UserError."""
    names = list(FILTERS) if args.filters == "all" else listed(args.filters, "filters")
    rewards, given, tables = listed(args.reward, "reward"), parse_words(words), {}
    for reward in rewards:
        load_reward(reward)
    for reward in rewards:
        part = replace(args, reward=reward)
        if len(rewards) > 1:
            print(f"{reward}:", flush=True)
            part.out = str(Path(args.out, NO_WORD.sub("-", reward)))
        tables[reward] = study(part, names, given)
    if len(rewards) > 1 and BASE in names:
        print(f"{args.out}: {figures.draw_rewards(Path(args.out), tables, BASE)}")


if __name__ == "__main__":  # what stands behind `--` goes to every cell
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words = sys.argv[cut + 1 :]
    del sys.argv[cut:]
    launch(lambda args: main(args, words), Args)
