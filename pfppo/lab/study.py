"""The paper's tables in one command: every filter and seed trained on the lab, and what came of it.

    python -m pfppo.lab.study --filters none,random_two,best_worst --rm_seeds 12 --seeds 1
    python -m pfppo.lab.study --filters none,best_worst --seeds 12 \\
        --reward noisy:middle,noisy:uniform,noisy:bugs:0.3 --out runs/noise

`eval_code.py` measures R^2, AUC and alignment of every filter before training, on samples of the
SFT policy and the problems that PPO will learn from. Then each cell (filter, seed) is a run of
`train_ppo.py` below `--out`/cells (cells.py); what is finished is not made again, what was killed
goes on. In the end `--out`/samples (or updates; another --base or --confidence is added to that
name) has `table.md`, `table.json` and, with matplotlib, figures. Several rewards are a study each,
in a folder each below `--out`, and what a filter gains more under one than under another stands in
`interactions.md` in --out/samples.

Compute is matched in one of two ways; cells that are the same in both are made once:

    --match samples    every cell sees the same prompts x N in each of the same number of steps, so
                       best_random makes 2/5 of the updates of none
    --match updates    cells that keep less make more steps, until all have made as many updates
                       (where a filter keeps what exceeds a threshold: as with samples)

`single`, PPO-S, draws one sample of N times the prompts. Its samples have the same distribution as
those of `none`, hence the same R^2.

The outcome is the pass rate of the last policy, `--draws` sampled answers to each test problem;
those of the policy that was best on validation stand beside it. Intervals are Student's t over
what is independent: seeds, or with `--rm_seeds` reward models, each trained on pairs of its own,
whose seeds are averaged. (Seeds that share a reward model say nothing about others.) Differences
are paired. What was planned before the runs of tests/study stands there, in PLAN.md.

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

from pfppo.config import Count, Natural, Share, UserError, launch, reason, require
from pfppo.files import check_writable, read_jsonl, write_json, write_jsonl
from pfppo.filters import KNOWN, kept_per_prompt, known_to, load_filter, usable
from pfppo.lab import cells, default, figures, tables, world
from pfppo.reward import load_reward
from pfppo.run import Machine, differences, is_trained

NO_WORD = re.compile(r"\W+", re.ASCII)  # what no folder is named by
MODELS = 1000  # reward models at most: the seeds of model m are m, 1000 + m, ...
# What R^2 is measured with as the cells are trained with: options of both scripts.
SHARED = ("policy", "reward_model", "prompt_style", "max_new_tokens", "max_prompt_tokens")
SHARED += ("temperature", "timeout", "param_dtype", *(field.name for field in fields(Machine)))


@dataclass
class Args:
    filters: str = "single,none,best_of_n,best_random,best_worst"  # comma-separated, or all
    seeds: Count = 5  # cells of a filter (and of a reward model)
    rm_seeds: Natural = 0  # reward models, each from pairs of its own; 0: the one there is
    match: Literal["samples", "updates"] = "samples"  # what is equal between filters
    base: str = "none"  # the filter that the others are compared with
    reward: str = "model"  # --reward of the cells, or several: noisy:middle,noisy:tails
    steps: Count = 30  # PPO steps of `none`
    prompts_per_step: Count = 48  # P
    samples_per_prompt: Count = 5  # N
    minibatch: Count = 48  # kept rows per optimizer step
    test_problems: Count = 2000  # that the last policies answer, of the lab (else those of --test)
    draws: Count = 4  # sampled answers to each
    confidence: Share = 0.95  # of intervals
    jobs: Count = 2  # cells that run at once
    out: str = "runs/study"  # where cells, tables and figures go

    # May differ when a study goes on
    FREE = ("filters", "seeds", "rm_seeds", "match", "base", "confidence", "jobs", "out")


def model_of(args, seed):
    """The number of the reward model of a cell, and its folder."""
    number = (seed - 1) % MODELS + 1
    return number, Path(args.out, "reward_models", str(number))


def cells_of(args, names, known=KNOWN):
    """All cells, seed by seed, so that an interrupted study has whole seeds; of several reward
    models one after the other, each with seeds that no other has. Raises UserError."""
    made, models = [], max(1, args.rm_seeds)
    step = MODELS if args.rm_seeds else 1
    for seed in (1 + m + step * s for m in range(models) for s in range(args.seeds)):
        for name in names:
            N = 1 if name == "single" else args.samples_per_prompt
            kept = kept_per_prompt(load_filter(name, N, "filters", known), N) or N
            scale = N / kept if args.match == "updates" else 1
            options = {"filter": name, "seed": seed, "reward": args.reward}
            options |= {"steps": round(args.steps * scale), "minibatch": args.minibatch}
            options |= {"prompts_per_step": args.prompts_per_step * args.samples_per_prompt // N}
            folder = f"{NO_WORD.sub('-', name)}-{seed}"
            folder += f"-{options['steps']}-steps" if options["steps"] != args.steps else ""
            options |= {"reward_model": model_of(args, seed)[1]} if args.rm_seeds else {}
            folder = Path(args.out, "cells", folder)
            made.append(options | {"samples_per_prompt": N, "run_dir": folder})
    whose = {cell["run_dir"]: cell["filter"] for cell in made}
    for name, other in ((cell["filter"], whose[cell["run_dir"]]) for cell in made):
        shared = f"--filters: the cells of {name} and {other} would share a folder, rename one"
        require(name == other, shared)
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


def prepare(args, names, given):
    """Make the reward models and measure every filter with each; makes the lab too. Returns
    [{filter: row of the reliability table}] of each model. Raises UserError."""
    asked = {
        tables.ALL if name == "single" else name: None for name in names
    }  # each once, in order
    shared = {name: given[name] for name in SHARED if name in given}
    problems = given.get("prompts", "lab")
    problems = default.FOLDER / default.PATHS["prompts"] if problems == "lab" else problems
    folders = [Path(args.out, "reliability")]
    if args.rm_seeds:
        folders = [Path(args.out, f"reliability-{i + 1}") for i in range(args.rm_seeds)]

    def work(number):
        folder, options = folders[number], {"reward_model": "lab", "temperature": 1.0} | shared
        if args.rm_seeds:
            seed, model = model_of(args, number + 1)
            if not is_trained(model):
                how = shared | {"seed": seed, "run_dir": model, "held_out": 0.25}  # as the lab's
                cells.run_script("train_rm.py", model, how, args.jobs)
            options["reward_model"] = model
        if not read_reliability(folder).keys() >= asked.keys():
            options |= {"reward": args.reward, "problems": problems, "filters": ",".join(asked)}
            options |= {"samples_per_problem": args.samples_per_prompt, "out": folder}
            cells.run_script("eval_code.py", folder, options, args.jobs)

    work(0)  # alone, as it makes the lab
    cells.at_once(work, range(1, len(folders)), args.jobs)
    return [read_reliability(folder) for folder in folders]


def read_reliability(folder):
    """The rows that are there. Raises UserError where they are damaged."""
    path = folder / "reliability.json"
    wanted = (*tables.STATISTICS, "r2_low", "r2_high", "alpha_low", "alpha_high")
    try:
        rows = json.loads(path.read_text())["filters"] if path.exists() else []
        return {row["filter"]: {name: row[name] for name in wanted} for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, delete it ({reason(error)})") from error


def asked_of(args, given):
    """Options of eval_code.py with which last policies are examined; writes the problems."""
    options = {"temperature": 1.0} | {name: given[name] for name in SHARED if name in given}
    options.pop("reward_model", None)
    if not (path := given.get("test")):
        path = Path(args.out, "test.jsonl")
        if not path.exists():
            ours = default.FOLDER.glob("*.jsonl")  # which runs see; made by now
            seen = {row["prompt"] for path in ours for _, row in read_jsonl(path)}
            drawn = world.draw_problems("study", "test", args.test_problems, seen)
            write_jsonl(path, [{k: v for k, v in asdict(p).items() if v} for p in drawn])
    return options | {"problems": path, "samples_per_problem": args.draws}


def check_study(args, given):
    """Refuse a folder with another study's cells, before anything runs. Raises UserError."""
    out = Path(args.out)
    check_writable(out, "out")
    here = {n: v for n, v in asdict(args).items() if n not in args.FREE} | {"given": given}
    here["own_models"] = args.rm_seeds > 0  # else its cells are of others
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
    planned, out = cells_of(args, names, known_of(given)), Path(args.out)
    own = sorted(given.keys() & {*planned[0], "resume", "export", "plan", "selfcheck", "refill"})
    require(not own, f"-- --{' --'.join(own)}: the study itself sets this option of its cells")
    what = "makes reward models for the lab's policy, from the lab's problems"
    require(not (args.rm_seeds and given.get("policy")), f"--rm_seeds {args.rm_seeds}: {what}")
    check_study(args, given)
    for cell in filter(cells.is_finished, planned):
        cells.read_cell(cell)  # what does not fit is told before hours of training
    reliability = prepare(args, names, given)
    cells.run_cells(planned, args.jobs, given, asked_of(args, given))
    results = [cells.read_cell(cell) for cell in planned]  # seed by seed
    results = {name: results[i :: len(names)] for i, name in enumerate(names)}
    rows = tables.summarize(args, results, reliability)
    hours = sum(row["minutes"][0] * row["cells"] for row in rows) / 60
    text, out = tables.markdown(args, rows, hours), results_folder(args)
    (out / "table.md").write_text(text)
    table = {name: getattr(args, name) for name in ("match", "reward", "base", "confidence")}
    write_json(out / "table.json", table | {"hours": hours, "filters": rows})
    drawn = figures.draw_study(out, results, rows, args.base)
    print(f"{text}\n{out}: table.md, table.json; {drawn}")
    return rows


def known_of(given):
    """What a cell can give to a filter."""
    return known_to(given.get("reward_model") or "lab")


def results_folder(args):
    """Where tables and figures go, made where it is not there."""
    usual = (NO_WORD.sub("-", args.base), Args.base), (args.confidence, Args.confidence)
    others = [str(asked) for asked, default in usual if asked != default]
    out = Path(args.out, "-".join([args.match, *others]))
    out.mkdir(exist_ok=True)
    return out


def listed(text, option):
    """The names in a comma-separated list. Raises UserError where one stands there twice."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        require(names.count(name) == 1, f"--{option} {text}: {name} stands there twice")
    return names


def main(args, words=()):
    """Run what is missing of every reward's cells, then write the tables and figures of all. words:
    options for the runs themselves, as they stood behind `--`. Raises UserError."""
    rewards, given, found = listed(args.reward, "reward"), parse_words(words), {}
    names = usable(known_of(given)) if args.filters == "all" else listed(args.filters, "filters")
    for reward in rewards:
        load_reward(reward)
    require(args.base in [*names, tables.ALL], f"--base {args.base}: none of --filters")
    require(0 < args.confidence < 1, f"--confidence {args.confidence:g}: expected between 0 and 1")
    for reward in rewards:
        part = replace(args, reward=reward)
        if len(rewards) > 1:
            print(f"{reward}:", flush=True)
            part.out = str(Path(args.out, NO_WORD.sub("-", reward)))
        found[reward] = study(part, names, given)
    if len(rewards) > 1 and args.base in names:
        text, out = tables.interactions(found, args), results_folder(args)
        (out / "interactions.md").write_text(text)
        print(f"{text}\n{out}: interactions.md; {figures.draw_rewards(out, found, args.base)}")


if __name__ == "__main__":  # what stands behind `--` goes to every cell
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words = sys.argv[cut + 1 :]
    del sys.argv[cut:]
    launch(lambda args: main(args, words), Args)
