"""Every filter on one set of judged samples: what it keeps, and how well rewards tell scores there.

    samples.jsonl -> rewards, scores [P, N] -> expected weights of every filter -> table, figure

A judged sample is a line with `task_id`, `reward`, and `score` (or `passed`): `samples.jsonl` of
eval_code.py and of train_ppo.py are made of them. A filter that keeps at random counts with the
mean of DRAWS of its draws, not with one.

The figure is the paper's Fig. 1: mean actual score against mean reward, bin by bin. There ten
responses to each prompt are generated ten times over; here each line is a resample of the prompts
of one generation.

The mathematics is in reliability.py.
"""

import math

from pfppo import figures, rundir
from pfppo.benchmarks import read_jsonl
from pfppo.config import UserError, require
from pfppo.filters import FILTERS, load_filter
from pfppo.reliability import format_table, reliability_table, resampled_bins

import numpy as np
import torch

DRAWS = 200  # of a filter that keeps at random: its expected weights are known to about 0.03
NAMES = {"equal_count": "equal weight", "equal_width": "equal width"}


def load_filters(names, samples, say):
    """{name: filter} of those asked for; of all, those that take so many samples per problem."""
    if names != "all":
        return {name: load_filter(name, samples, "filters") for name in names.split(",")}
    chosen = {}
    for name in FILTERS:
        try:
            chosen[name] = load_filter(name, samples)
        except UserError as error:  # `single` takes one sample, some others at least two
            say(f"left out: {error}")
    return chosen


def read_judged(path):
    """(rewards, scores) [P, N] from a JSONL file of judged samples. Raises UserError.

    The samples of one problem (and of one `step`, where there are steps) are one row; all problems
    need equally many.
    """
    groups = {}
    for line, row in read_jsonl(path):
        task, place = row.get("task_id"), f"{path}, line {line}"
        require(isinstance(task, str | int), f"{place}: expected a 'task_id', found {sorted(row)}")
        pair = []
        for names in (("reward",), ("score", "passed")):
            value = next((row[name] for name in names if row.get(name) is not None), None)
            good = isinstance(value, bool | int | float) and math.isfinite(value)
            found = (
                f"found {value!r}"
                if value is not None
                else "found none: "
                + ("samples are judged by eval_code.py with --reward_model, or by train_ppo.py")
            )
            require(good, f"{place}: expected a number in {' or '.join(map(repr, names))}, {found}")
            pair.append(float(value))
        groups.setdefault((row.get("step"), task), []).append(pair)
    sizes = sorted({len(group) for group in groups.values()})
    require(sizes, f"{path}: holds no samples")
    require(
        len(sizes) == 1,
        f"{path}: expected equally many samples of each problem, found {sizes[0]} to {sizes[-1]}",
    )
    both = torch.tensor(list(groups.values()), dtype=torch.float64)  # [P, N, 2]
    return both[..., 0], both[..., 1]


def expected_weights(chosen, rewards, seed):
    """{name: weights [P, N]}, expected over the draws of filters that keep at random."""
    expected = {}
    for name, weigh in chosen.items():
        generator = torch.Generator().manual_seed(seed)
        draws = [weigh(rewards, generator) for _ in range(DRAWS)]
        expected[name] = torch.stack(draws).mean(0).double().numpy()
    return expected


def report(args, chosen, rewards, scores, out):
    """Print the table, write `reliability.json` and the figure below `out`, say what was written.

    rewards, scores [P, N]; args: bins, bin_kind, repetitions, seed.
    """
    expected = expected_weights(chosen, rewards.float(), args.seed)
    rewards, scores = rewards.double().numpy(), scores.double().numpy()
    rows = reliability_table(
        rewards, scores, expected, args.bins, seed=args.seed, kind=args.bin_kind
    )
    P, N = rewards.shape
    print(f"\nrewards of {P} problems x {N} samples: mean {rewards.mean():.3f}, ", end="")
    print(f"standard deviation {rewards.std():.3f}; {scores.mean():.3f} pass")
    print(f"R^2 over {args.bins} bins of {NAMES[args.bin_kind]}, 95 % bootstrap over prompts")
    print(format_table(rows))
    rng = np.random.default_rng(args.seed)
    how = args.bins, args.bin_kind, args.repetitions, rng
    lines = [
        (binned.mean_reward.tolist(), binned.mean_score.tolist())
        for binned in resampled_bins(rewards, scores, np.ones_like(rewards), *how)
    ]
    known = {"problems": P, "samples_per_problem": N, "bins": args.bins, "bin_kind": args.bin_kind}
    curves = [{"mean_reward": reward, "mean_score": score} for reward, score in lines]
    out.mkdir(parents=True, exist_ok=True)
    rundir.write_json(out / "reliability.json", known | {"filters": rows, "repetitions": curves})
    print(f"\n{out}: reliability.json; ", end="")
    print(figures.draw_reliability(out / "reliability.png", lines))
