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

Not covered: uncertainty about few samples within a prompt (the bootstrap takes prompts whole), and
R^2's own bias. With b bins of pure noise its mean is 1 / (b - 1), not 0; where the reward is good,
noise within bins lowers it, once more in every resample: with few samples in a bin the percentile
interval lies low, and may miss R^2 itself. It compares filters on the same samples; it does not
cover the R^2 of infinitely many samples 95 times in 100.
"""

from dataclasses import dataclass

import numpy as np


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
    r2 = np.nan
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
    else:
        residual = y - x * (x @ y) / (x @ x)
        r2 = float(1 - (residual @ residual) / (y @ y))
        note = "two bins: a line always fits" if bins == 2 else ""
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
    Resamples in which R^2 is undefined are left out; NaN if all are, or if there is one prompt."""
    drawn = resampled_bins(rewards, scores, weights, bins, kind, resamples, rng, prompts)
    r2 = np.array([binned.r2 for binned in drawn])
    r2 = r2[~np.isnan(r2)]
    if len(rewards) < 2 or not len(r2):
        return np.nan, np.nan
    return tuple(np.quantile(r2, [0.025, 0.975]).tolist())


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
    NaN if no sample passes or none fails."""
    rewards, scores, weights = _samples(rewards, scores, weights)
    passed, failed = weights * (scores >= 1), weights * (scores < 1)
    finite = np.isfinite(rewards).all() and np.isfinite(scores).all()
    if not (finite and passed.any() and failed.any()):
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
        name, *numbers, note = row.values()
        *shares, r2, low, high, rank, area = ("-" if x is None else f"{x:.3f}" for x in numbers)
        interval = low if low == "-" else f"{low} .. {high}"
        lines.append([name, *shares, r2, interval, rank, area, note])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *cells, note in lines:
        middle = "  ".join(c.rjust(w) for c, w in zip(cells, widths[1:-1], strict=True))
        text.append(f"{first.ljust(widths[0])}  {middle}  {note}".rstrip())
    return "\n".join(text)
