"""Every filter on one set of judged samples, before training: what it keeps, and how well rewards
tell scores there (reliability.py).

    samples.jsonl -> rewards, scores [P, N] -> expected weights of every filter -> table, figure

A judged sample is a line with `task_id`, `reward`, and `score` (or `passed`): samples.jsonl of
eval_code.py and of train_ppo.py are made of them. A filter that keeps at random counts with the
mean of DRAWS of its draws. The figure is the paper's Fig. 1: mean actual score against mean reward,
bin by bin. There ten responses to each prompt are generated ten times over; here each line is a
resample of the prompts of one generation.
"""

from dataclasses import dataclass

from pfppo.config import UserError, require
from pfppo.files import read_jsonl, write_json
from pfppo.filters import FILTERS, load_filter
from pfppo.reliability import format_table, reliability_table, resampled_bins
from pfppo.rollout import seeded

import numpy as np
import torch

DRAWS = 2000  # of a filter that keeps at random: its expected weights are known to about 0.01
LARGEST = 1e9  # rewards are squared, in fp32
NAMES = {"equal_count": "equal weight", "equal_width": "equal width"}
HINT = "no figures: pip install matplotlib, and run the same command again"


@dataclass(frozen=True)
class Judged:
    """Samples in groups, a group one prompt's samples in one step, in an order of their own."""

    rewards: np.ndarray  # [P, N]
    scores: np.ndarray  # [P, N]
    prompts: np.ndarray  # [P], numbers; groups of one prompt have one number


def judged(groups):
    """Judged from [(prompt, [(reward, score)] * N)], whatever their order."""
    groups = sorted((sorted(pairs), prompt) for prompt, pairs in groups)
    numbers = {}
    prompts = [numbers.setdefault(prompt, len(numbers)) for _, prompt in groups]
    both = np.array([pairs for pairs, _ in groups], dtype=float)  # [P, N, 2]
    return Judged(both[..., 0], both[..., 1], np.array(prompts))


def judged_rows(rows, group):
    """Judged from rows of samples.jsonl, `group` of each problem together."""
    pairs = [(row["reward"], row["score"]) for row in rows]
    groups = (pairs[i : i + group] for i in range(0, len(pairs), group))
    return judged(zip((row["task_id"] for row in rows[::group]), groups, strict=True))


def load_filters(names, samples, say):
    """{name: filter} of those asked for; of all, those that take so many samples per problem."""
    chosen = {}
    for name in FILTERS if names == "all" else map(str.strip, names.split(",")):
        try:
            chosen[name] = load_filter(name, samples, "filters")
        except UserError as error:  # `single` takes one sample, some others at least two
            if names != "all":
                raise
            say(f"left out: {error}")
    return chosen


def read_judged(path, say=print):
    """Judged from a JSONL file. Raises UserError.

    The samples of one problem (and of one `step`, where there are steps) are a group; all need
    equally many. Those of problems without tests, with score null, are left out.
    """
    groups, untested = {}, 0
    for line, row in read_jsonl(path):
        place = f"{path}, line {line}"
        key = row.get("step"), row.get("task_id")
        named = isinstance(key[1], str | int) and isinstance(key[0], int | None)
        found = f"found step {key[0]!r}, task_id {key[1]!r}"
        require(named, f"{place}: expected a 'task_id', and a number or nothing in 'step', {found}")
        reward = _number(row, ("reward",), place)
        if "score" in row and row["score"] is None:
            untested += 1
            continue
        groups.setdefault(key, []).append((reward, _number(row, ("score", "passed"), place)))
    sizes = sorted({len(group) for group in groups.values()})
    require(sizes, f"{path}: expected samples with a score, found none")
    unequal = f"expected equally many samples of each problem, found {sizes[0]} to {sizes[-1]}"
    require(len(sizes) == 1, f"{path}: {unequal}")
    if untested:
        say(f"left out: {untested} samples whose problems have no tests")
    return judged((str(task), pairs) for (_, task), pairs in groups.items())


def _number(row, names, place):
    """The number in one of these fields. Raises UserError."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    fits = isinstance(value, bool | int | float) and abs(value) <= LARGEST  # NaN is not
    found = f"found {str(value)[:40]!r}"
    if value is None:
        found = "found none: samples are judged by eval_code.py with a reward, or by train_ppo.py"
    require(fits, f"{place}: expected a number in {' or '.join(map(repr, names))}, {found}")
    return float(value)


def expected_weights(chosen, rewards, seed):
    """{name: weights [P, N]}, expected over the draws of filters that keep at random."""
    expected, rewards = {}, torch.tensor(rewards, dtype=torch.float32)
    for name, weigh in chosen.items():
        generator = seeded("filter", seed)
        draws = [weigh(rewards, generator) for _ in range(8)]
        if any(not draw.equal(draws[0]) for draw in draws):
            draws += [weigh(rewards, generator) for _ in range(DRAWS - 8)]
        expected[name] = (sum(draw.double() for draw in draws) / len(draws)).numpy()
    return expected


def compare_filters(args, chosen, samples, out):
    """Print the table, write `reliability.json` and the figure below `out`, say what was written.

    samples: Judged; args: bins, bin_kind, repetitions, seed.
    """
    rewards, scores, prompts = samples.rewards, samples.scores, samples.prompts
    expected = expected_weights(chosen, rewards, args.seed)
    how = {"kind": args.bin_kind, "prompts": prompts}
    rows = reliability_table(rewards, scores, expected, args.bins, seed=args.seed, **how)
    P, N = rewards.shape
    count = len(np.unique(prompts))
    spread = f"mean {rewards.mean():.3f}, standard deviation {rewards.std():.3f}"
    print(f"\n{P} x {N} samples of {count} problems: {scores.mean():.3f} pass; rewards: {spread}")
    print(f"R^2 over {args.bins} bins of {NAMES[args.bin_kind]}; 95 %: percentiles over resampled ")
    print("prompts, which lie low where bins hold few samples (reliability.py)")
    print(format_table(rows))
    everything = rewards, scores, np.ones_like(rewards), args.bins
    how |= {"resamples": args.repetitions, "rng": np.random.default_rng(args.seed)}
    drawn = resampled_bins(*everything, **how)
    lines = [(binned.mean_reward.tolist(), binned.mean_score.tolist()) for binned in drawn]
    known = {"problems": count, "groups": P, "samples_per_problem": N}
    known |= {"bins": args.bins, "bin_kind": args.bin_kind, "filters": rows}
    known |= {"repetitions": [{"mean_reward": r, "mean_score": s} for r, s in lines]}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "reliability.json", known)
    print(f"\n{out}: reliability.json; ", end="")
    print(draw_reliability(out / "reliability.png", lines))


def pyplot():
    """matplotlib's pyplot without a screen, or None."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plot

    return plot


def draw_reliability(path, lines):
    """The paper's Fig. 1. lines: [(mean rewards [bins], mean scores [bins])], one per repetition.

    Returns one line about what was written.
    """
    plot = pyplot()
    if plot is None:
        return HINT
    figure, axis = plot.subplots(figsize=(6, 5), layout="constrained")
    for reward, score in lines:
        axis.plot(reward, score, marker=".", alpha=0.6, color="tab:blue")
    axis.set(xlabel="mean reward of the bin", ylabel="mean actual score of the bin")
    figure.savefig(path, dpi=120)
    plot.close("all")
    return f"{path.name}, {len(lines)} repetitions"
