"""How far a reward model (RM) can be trusted under a filter: the tool for choosing a filter before
training (PF-PPO, section 4).

R^2: samples of the filtered policy mu are grouped by similar reward; one line is fitted through the
groups' (mean reward, mean actual score); R^2 = 1 - SS_res / SS_tot. The paper gives neither number
nor kind of bins. Here a sample counts with its expected weight under the filter, bins hold equal
weight, a sample on a boundary is split between its bins, and samples of equal reward are spread
evenly: the order of the samples changes nothing, and weight 2 is the same as the sample twice. The
other kind cuts the range of rewards into bins of equal width; those that stay empty do not count.
Beside R^2 stand Spearman's rank correlation and AUC, which need no bins.

Alignment: R^2 says how straight the line of pooled groups is, not what a policy gradient gets from
them. A reward that knows how hard a prompt is, and nothing of its answers, has an R^2 near 1 and
teaches nothing; cubed rewards rank as before and have another R^2. `alignment` is the cosine of
what PPO teaches and of what would be right to teach, on the same samples.

Reward is what the RM says, score the truth (tests passed, 0 or 1). Where a number is undefined it
is NaN with a reason, never an exception; ValueError is for arrays that do not fit together.

Not covered: uncertainty about few samples within a prompt (the bootstrap takes prompts whole), and
R^2's own bias. With b bins of pure noise its mean is 1 / (b - 1), not 0; where the reward is good,
noise within bins lowers it, once more in every resample: with few samples in a bin the percentile
interval lies low, and may miss R^2 itself. It compares filters on the same samples; it does not
cover the R^2 of infinitely many samples 95 times in 100.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Weights(NamedTuple):
    """What a filter gives to samples [P, N], expected over its draws."""

    mean: np.ndarray  # E[w]
    square: np.ndarray  # E[w^2]
    kept: np.ndarray  # P(w > 0)

    @classmethod
    def of(cls, *draws):
        """Of weights [P, N] that one filter drew on the same samples; one draw, where it draws
        nothing at random."""
        sums = 0
        for draw in draws:
            w = np.asarray(draw, dtype=float)
            sums = sums + np.stack([w, w**2, w > 0])
        return cls(*sums / len(draws))


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
    for times in _resampled(shape[0], resamples, rng, prompts):
        yield _fit(values, group, scores, weights * np.repeat(times, shape[1]), bins, kind)


def bootstrap_r2(rewards, scores, weights, bins, resamples, rng, kind="equal_count", prompts=None):
    """(low, high): 95 % percentile interval of R^2 over prompts; rewards, scores, weights [P, N].
    Resamples in which R^2 is undefined are left out; NaN if all are, or if there is one prompt."""
    drawn = resampled_bins(rewards, scores, weights, bins, kind, resamples, rng, prompts)
    return _percentiles([binned.r2 for binned in drawn], len(rewards), prompts)


def _resampled(rows, resamples, rng, prompts=None):
    """How often each row [P] is in each resample of the prompts."""
    prompts = np.arange(rows) if prompts is None else prompts
    count = len(np.unique(prompts))
    for _ in range(resamples):
        yield np.bincount(rng.integers(count, size=count), minlength=count)[prompts]


def _percentiles(values, rows, prompts=None):
    """(low, high), 95 %, of values in resamples as of `_resampled`; those that are NaN left out."""
    known = [value for value in values if not np.isnan(value)]
    if (rows if prompts is None else len(np.unique(prompts))) < 2 or not known:
        return np.nan, np.nan
    return tuple(np.quantile(known, [0.025, 0.975]).tolist())


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


@dataclass(frozen=True)
class Alignment:
    """`note` says why alpha is NaN; else it is ""."""

    alpha: float
    kappa: float  # share of the samples that have a gradient: those kept
    note: str = ""

    @property
    def at_updates(self):
        """alpha / sqrt(kappa): to first order, what filters gain from equally many updates."""
        return self.alpha / np.sqrt(self.kappa) if self.kappa else np.nan

    @property
    def at_samples(self):
        """alpha sqrt(kappa): what they gain from equally many samples."""
        return self.alpha * np.sqrt(self.kappa)


def alignment(rewards, scores, weights=None):
    """Alignment of what PPO teaches under a filter with what is right. rewards, scores [P, N];
    weights: Weights (default: all 1).

    A policy pi(y|x) ~ exp f(x, y) that takes a step eta along the taught logits w A, with w the
    filter's weight and A the advantage, gains (natural gradient, first order)

        dJ / d eta = E_x sum_y pi w A (S - J_x) = E[w A c],        c = S - J_x

    of the true score S, whose mean at the prompt is J_x. Whitening, Adam and the clip fix a step's
    size whatever the scale of w A, and the squared size of a gradient over a batch of independent
    samples is mostly their noise, proportional to E[w^2 A^2]. Hence the gain for a step's size, as
    a number that scale and unit do not change (by Cauchy and Schwarz it is between -1 and 1):

        alpha = E[w A c] / sqrt(E[w^2 A^2] E[c^2])

    Here J_x is the mean score of the prompt's N samples, and A the reward minus their mean reward
    (what a critic knows that knows the prompt) and minus the weighted mean over what is kept (what
    whitening takes off). Both means hold the sample itself, which shrinks A and c by the same
    (N - 1) / N in all samples, and leaves alpha.

    E[..] is over all samples, kept or not. Of B samples that are kept, B / kappa were drawn: per
    kept one the gain is 1 / kappa of it, the noise 1 / sqrt(kappa). So filters compare by
    alpha / sqrt(kappa) where they make equally many updates, and, as these are kappa of the
    samples, by alpha sqrt(kappa) where they see equally many samples.

    Not covered: anything beyond the first step (a plateau weakens all of it), the KL term, errors
    that lie outside of what the policy samples now, and lengths: a response counts as one, while
    whitening is over tokens, and sequence_mean teaches each token w A / length. Source: this
    project; no paper has it.
    """
    return _aligned(_moments(rewards, scores, weights).sum(0))


def _moments(rewards, scores, weights):
    """Sums over each prompt's samples [P, 10], of which alpha is a function: so a resample of the
    prompts is a sum of its rows."""
    if np.ndim(rewards) != 2:
        raise ValueError(f"expected rewards [P, N], found shape {np.shape(rewards)}")
    weights = Weights.of(np.ones(np.shape(rewards))) if weights is None else weights
    for part in weights:
        _samples(rewards, scores, part)
    w, square, kept = weights
    A, c = _from_mean(rewards), _from_mean(scores)
    columns = w, w * A, w * c, w * A * c, square, square * A, square * A**2, c**2, kept, 0 * w + 1
    return np.stack([column.sum(1) for column in columns], 1)


def _from_mean(values):
    """Values [P, N] minus their row's mean; exactly 0 where those of a row are equal."""
    values = np.asarray(values, dtype=float)
    with np.errstate(invalid="ignore"):  # infinite ones become NaN
        values = values - values[:, :1]
        return values - values.mean(1, keepdims=True)


def _aligned(sums):
    """Alignment from the sums of `_moments` over all prompts [10]."""
    w, wa, wc, wac, square, square_a, square_aa, cc, kept, count = sums
    if not np.isfinite(sums).all():
        return Alignment(np.nan, np.nan, "a reward or score is not finite")
    if not w:
        return Alignment(np.nan, 0.0, "no sample is kept")
    mean, alpha, kappa, note = wa / w, np.nan, float(kept / count), ""
    taught = square_aa - 2 * mean * square_a + mean**2 * square
    if not cc:
        note = "no prompt has answers of different scores"
    elif taught <= 1e-12 * (square_aa + mean**2 * square):
        note = "every advantage that is kept is 0"
    else:
        alpha = float((wac - mean * wc) / np.sqrt(taught * cc))
    return Alignment(alpha, kappa, note)


def bootstrap_alignment(rewards, scores, weights, resamples, rng, prompts=None):
    """(low, high): 95 % percentile interval of alpha over prompts, as `bootstrap_r2`."""
    moments = _moments(rewards, scores, weights)
    drawn = _resampled(len(moments), resamples, rng, prompts)
    alphas = [_aligned(times @ moments).alpha for times in drawn]
    return _percentiles(alphas, len(moments), prompts)
