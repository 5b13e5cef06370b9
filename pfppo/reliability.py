"""How far a reward model (RM) can be trusted under a filter: the tool for choosing a filter before
training (PF-PPO, section 4).

R^2: samples of the filtered policy mu are grouped by similar reward; one line is fitted through the
groups' (mean reward, mean actual score); R^2 = 1 - SS_res / SS_tot. The paper gives neither number
nor kind of bins. Here a sample counts with its expected weight under the filter, bins hold equal
weight, a sample on a boundary is split between its bins, and samples of equal reward are spread
evenly: the order of the samples changes nothing, and weight 2 is the same as the sample twice. The
other kind cuts the range of rewards into bins of equal width; those that stay empty do not count.
Beside R^2 stand Spearman's rank correlation and AUC, which need no bins.

Reward is what the RM says, score the truth (tests passed, 0 or 1). Where a number is undefined it
is NaN with a reason, never an exception; ValueError is for arrays that do not fit together.

`report` does this for every filter on one samples.jsonl of eval_code.py or train_ppo.py; a filter
that keeps at random counts with the mean of DRAWS of its draws. Its figure is the paper's Fig. 1:
mean actual score against mean reward, bin by bin. There ten responses to each prompt are generated
ten times over; here each line is a resample of the prompts of one generation.

Not covered: uncertainty about few samples within a prompt (the bootstrap takes prompts whole), and
R^2's own bias. With b bins of pure noise its mean is 1 / (b - 1), not 0; where the reward is good,
noise within bins lowers it, once more in every resample: with few samples in a bin the percentile
interval lies low, and may miss R^2 itself. It compares filters on the same samples; it does not
cover the R^2 of infinitely many samples 95 times in 100.
"""

from dataclasses import dataclass

from pfppo.config import UserError, require
from pfppo.files import read_jsonl, write_json
from pfppo.filters import FILTERS, load_filter
from pfppo.rollout import seeded

import numpy as np
import torch

DRAWS = 2000  # of a filter that keeps at random: its expected weights are known to about 0.01
LARGEST = 1e9  # rewards are squared, in fp32
NAMES = {"equal_count": "equal weight", "equal_width": "equal width"}
HINT = "no figures: pip install matplotlib, and run the same command again"


@dataclass(frozen=True)
class Binned:
    """Bins in order of reward (none if there is nothing to bin). `note` says why r2 is NaN, or what
    to beware of; else it is ""."""

    r2: float
    mean_reward: np.ndarray  # [bins]
    mean_score: np.ndarray  # [bins]
    weight: np.ndarray  # [bins]
    note: str = ""


def binned_r2(rewards, scores, weights=None, bins=10, kind="equal_count"):
    """Binned of samples [n]; weights [n] >= 0 (default: all 1), only their proportions matter.
    kind: one of KINDS."""
    rewards, scores, weights = _samples(rewards, scores, weights)
    if bins < 1 or kind not in KINDS:
        expected = f"expected at least 1 bin and one of {', '.join(KINDS)}"
        raise ValueError(f"{expected}, found {bins} and {kind}")
    return _fit(*np.unique(rewards, return_inverse=True), scores, weights, bins, kind)


def _samples(rewards, scores, weights=None):
    """The three as flat float arrays [n], checked."""
    rewards, scores = np.asarray(rewards, dtype=float), np.asarray(scores, dtype=float)
    weights = np.ones(rewards.shape) if weights is None else np.asarray(weights, dtype=float)
    if not rewards.shape == scores.shape == weights.shape:
        found = f"{rewards.shape}, {scores.shape}, {weights.shape}"
        raise ValueError(f"expected rewards, scores and weights of one shape, found {found}")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("expected weights that are finite and >= 0")
    return rewards.ravel(), scores.ravel(), weights.ravel()


def _by_count(values, mass, bins):
    """Bins of equal weight: (function from sums per distinct reward to sums per bin, weights)."""
    ends = np.concatenate([[0.0], np.cumsum(mass)])

    def binned(sums):
        upto = np.concatenate([[0.0], np.cumsum(sums)])
        return np.diff(np.interp(np.linspace(0, ends[-1], bins + 1), ends, upto))

    return binned, np.full(bins, ends[-1] / bins)


def _by_width(values, mass, bins):
    """The same for bins of equal width between the lowest and the highest reward that is kept."""
    low, *_, high = np.repeat(values[mass > 0], 2)
    place = ((values - low) / (high - low or 1.0) * bins).clip(0, bins - 1).astype(int)
    filled = np.bincount(place, mass, bins) > 0

    def binned(sums):
        return np.bincount(place, sums, bins)[filled]

    return binned, binned(mass)


KINDS = {"equal_count": _by_count, "equal_width": _by_width}


def _fit(values, group, scores, weights, bins, kind):
    """Binned from the distinct rewards `values` (ascending) and each sample's index in them [n]."""
    mass, kept = np.bincount(group, weights, len(values)), weights > 0
    finite = np.isfinite(values).all() and np.isfinite(scores).all()
    if not (finite and kept.any()):
        note = "no sample is kept" if finite else "a reward or score is not finite"
        return Binned(np.nan, np.empty(0), np.empty(0), np.empty(0), note)
    middle = values[len(values) // 2]
    binned, weight = KINDS[kind](values, mass, bins)
    reward = binned(mass * (values - middle)) / weight + middle
    score = binned(np.bincount(group, weights * scores, len(values))) / weight
    bins = len(weight)
    x, y = reward - reward.mean(), score - score.mean()
    note = ""
    if np.count_nonzero(mass) == 1:
        note = "all rewards are equal"
    elif np.ptp(scores[kept]) == 0:
        note = "all scores are equal"
    elif bins == 1:
        note = "one bin"
    elif y @ y <= 1e-20 * bins * np.ptp(scores[kept]) ** 2:
        note = "all bins have the same mean score"
    elif x @ x == 0:
        note = "all bins have the same mean reward"
    if note:
        return Binned(np.nan, reward, score, weight, note)
    residual = y - x * (x @ y) / (x @ x)
    note = "two bins: a line always fits" if bins == 2 else ""
    r2 = float(1 - (residual @ residual) / (y @ y))
    return Binned(r2, reward, score, weight, note)


def resampled_bins(rewards, scores, weights, bins, kind, resamples, rng, prompts=None):
    """Binned of each resample of the prompts; rewards, scores, weights [P, N].

    Prompts are resampled whole, because the samples of one prompt are alike; prompts [P] says which
    rows are one prompt's (default: each row is another's). `rng` is advanced by the same amount
    whatever the weights, so equal seeds compare filters on equal resamples.
    """
    shape = np.shape(rewards)
    if len(shape) != 2:
        raise ValueError(f"expected rewards [P, N], found shape {shape}")
    rewards, scores, weights = _samples(rewards, scores, weights)
    values, group = np.unique(rewards, return_inverse=True)
    prompts = np.arange(shape[0]) if prompts is None else prompts
    count = len(np.unique(prompts))
    for _ in range(resamples):
        times = np.bincount(rng.integers(count, size=count), minlength=count)[prompts]
        yield _fit(values, group, scores, weights * np.repeat(times, shape[1]), bins, kind)


def bootstrap_r2(rewards, scores, weights, bins, resamples, rng, kind="equal_count", prompts=None):
    """(low, high): 95 % percentile interval of R^2 over prompts; rewards, scores, weights [P, N].

    Resamples in which R^2 is undefined are left out; NaN if all are, or if there is one prompt.
    """
    drawn = resampled_bins(rewards, scores, weights, bins, kind, resamples, rng, prompts)
    found = np.array([binned.r2 for binned in drawn])
    found = found[~np.isnan(found)]
    if len(rewards) < 2 or not len(found):
        return np.nan, np.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def spearman(rewards, scores, weights=None):
    """Rank correlation of rewards and scores, ties at mid-rank; NaN if either is constant."""
    rewards, scores, weights = _samples(rewards, scores, weights)
    if not (np.isfinite(rewards).all() and np.isfinite(scores).all() and weights.any()):
        return np.nan
    if min(np.ptp(rewards[weights > 0]), np.ptp(scores[weights > 0])) == 0:
        return np.nan
    weights = weights / weights.sum()
    x, y = _midranks(rewards, weights) - 0.5, _midranks(scores, weights) - 0.5  # 0.5 is their mean
    return float((weights * x) @ y / np.sqrt((weights @ x**2) * (weights @ y**2)))


def _midranks(values, weights):
    """For each value: the weight below it plus half the weight equal to it, as shares [n]."""
    distinct, group = np.unique(values, return_inverse=True)
    mass = np.bincount(group, weights, len(distinct))
    return ((np.cumsum(mass) - mass / 2) / mass.sum())[group]


def auc(rewards, scores, weights=None):
    """Chance that a passing sample (score >= 1) has a higher reward than a failing one; ties half.

    NaN if no sample passes or none fails.
    """
    rewards, scores, weights = _samples(rewards, scores, weights)
    passed, failed = weights * (scores >= 1), weights * (scores < 1)
    if not (np.isfinite(rewards).all() and np.isfinite(scores).all()):
        return np.nan
    if not (passed.any() and failed.any()):
        return np.nan
    return float(_midranks(rewards, failed) @ passed / passed.sum())


def reliability_table(
    rewards, scores, weights, bins=10, resamples=500, seed=0, kind="equal_count", prompts=None
):
    """One dict of plain numbers per filter, ready for JSON; None where undefined, `note` says why.

    rewards, scores [P, N]; weights {name: expected weights [P, N]}: the chance of
    being kept under a filter that keeps at random, not one draw. `kept` is the mean of
    min(weight, 1): the share kept, if the filter keeps or drops. `pass_kept` and `pass_dropped` are
    mean scores weighted by what is kept and by the rest. `r2_low` and `r2_high` are the 95 %
    interval over prompts, all filters on the same resamples.
    """
    rows = []
    for name, expected in weights.items():
        _, flat_scores, flat = _samples(rewards, scores, expected)
        binned = binned_r2(rewards, scores, expected, bins, kind)
        rng = np.random.default_rng(seed)
        low, high = bootstrap_r2(rewards, scores, expected, bins, resamples, rng, kind, prompts)
        share = np.minimum(flat, 1.0)
        numbers = {
            "kept": share.mean() if share.size else np.nan,
            "pass_kept": _mean(flat_scores, flat),
            "pass_dropped": _mean(flat_scores, 1.0 - share),
            "r2": binned.r2,
            "r2_low": low,
            "r2_high": high,
            "spearman": spearman(rewards, scores, expected),
            "auc": auc(rewards, scores, expected),
        }
        numbers = {key: float(x) if np.isfinite(x) else None for key, x in numbers.items()}
        rows.append({"filter": name, **numbers, "note": binned.note})
    return rows


def _mean(values, weights):
    """Weighted mean; NaN where rounding is all the weight there is."""
    return values @ weights / weights.sum() if weights.sum() > 1e-9 * len(weights) else np.nan


def format_table(rows):
    """`reliability_table`'s rows as aligned text, best R^2 not singled out; "-" where undefined."""

    head = "filter,kept,pass kept,pass dropped,R^2,95 %,Spearman,AUC,note"
    lines = [head.split(",")]
    for row in rows:
        shown = {n: "-" if v is None else f"{v:.3f}" for n, v in row.items() if n[0] not in "fn"}
        shown["interval"] = (
            "-" if row["r2_low"] is None else "{r2_low} .. {r2_high}".format(**shown)
        )
        names = ("kept", "pass_kept", "pass_dropped", "r2", "interval", "spearman", "auc")
        lines.append([row["filter"], *(shown[name] for name in names), row["note"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *cells, note in lines:
        middle = "  ".join(c.rjust(w) for c, w in zip(cells, widths[1:-1], strict=True))
        text.append(f"{first.ljust(widths[0])}  {middle}  {note}".rstrip())
    return "\n".join(text)


# ---- every filter on one set of samples ----------------------------------------------------------


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


def report(args, chosen, samples, out):
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
