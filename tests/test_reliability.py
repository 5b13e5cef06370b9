"""R^2, Spearman, AUC, alignment: closed forms, slow definitions, odd cases."""

import math
from itertools import product

from pfppo.reliability import (
    Weights,
    alignment,
    auc,
    binned_r2,
    bootstrap_alignment,
    bootstrap_r2,
    spearman,
)

import numpy as np
import pytest


def rng(seed=0):
    return np.random.default_rng(seed)


def close(value, expected, **tolerance):
    np.testing.assert_allclose(value, expected, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


def slow_r2(rewards, scores, bins):
    """Sort, cut into bins of equally many samples, fit with numpy's own least squares."""
    order = np.argsort(rewards)
    x, y = np.stack([rewards, scores])[:, order].reshape(2, bins, -1).mean(2)
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    return 1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()


def by_rank(rewards, best=0.0, worst=0.0, others=0.0):
    """Weights of a filter that looks at ranks."""
    rank = np.argsort(np.argsort(-rewards, axis=1), axis=1)
    return np.where(rank == 0, best, np.where(rank == rewards.shape[1] - 1, worst, others))


def noisy_middle(prompts=2000, samples=5, seed=0):
    """Rewards in [-1, 1] that tell pass from fail in the tails and mislead between -1/2 and 1/2."""
    draw = rng(seed)
    rewards = draw.uniform(-1, 1, (prompts, samples))
    tails = np.where(rewards > 0, 0.9, 0.1)
    chance = np.where(np.abs(rewards) < 0.5, 0.5 + 0.3 * np.sin(12 * rewards), tails)
    return rewards, (draw.uniform(size=rewards.shape) < chance).astype(float)


def test_a_noiseless_line_gives_one_and_the_bins_lie_on_it():
    rewards = rng().normal(size=1000)
    binned = binned_r2(rewards, 0.3 + 0.1 * rewards)
    close([binned.r2, binned_r2(rewards, -rewards, bins=5).r2], 1)  # a falling one too
    close(binned.mean_score, 0.3 + 0.1 * binned.mean_reward)
    close(binned.weight, 100)
    assert (np.diff(binned.mean_reward) > 0).all() and binned.note == ""


def test_shuffled_scores_give_the_expectation_of_noise():
    rewards, scores = rng().normal(size=(400, 400)), rng(1).integers(2, size=(400, 400))
    found = [binned_r2(*both, bins=20).r2 for both in zip(rewards, scores, strict=True)]
    close(np.mean(found), 1 / 19, rtol=0.2)


def test_agrees_with_sorting_and_splitting():
    for seed, bins in product(range(5), (3, 8, 10)):
        rewards, scores = rng(seed).normal(size=(2, 120))
        scores = (scores + rewards > 0).astype(float)
        close(binned_r2(rewards, scores, bins=bins).r2, slow_r2(rewards, scores, bins))


def test_numbers_that_are_known():
    # bins of one sample: x = -1, 0, 1, 2, y = x^2: slope 1, SS_tot 9, SS_res 4
    close(binned_r2([-1, 0, 1, 2], [1, 0, 1, 4], bins=4).r2, 5 / 9)
    binned = binned_r2([0, 1, 2], [0, 0, 1], bins=2)  # a sample on a boundary is split
    close([binned.mean_reward, binned.mean_score], [[1 / 3, 5 / 3], [0, 2 / 3]])
    # bins of equal width do not count where they are empty
    binned = binned_r2([0, 1, 2, 9, 10], [0, 0, 1, 1, 0], bins=5, kind="equal_width")
    close([binned.mean_reward, binned.mean_score], [[0.5, 2, 9.5], [0, 1, 0.5]])
    close(binned.weight, [2, 1, 2])


def test_integer_weights_are_repetitions():
    draw = rng()
    rewards, scores = np.round(draw.normal(size=200), 1), draw.integers(2, size=200)
    weights = draw.integers(4, size=200)
    many = np.repeat(rewards, weights), np.repeat(scores, weights)
    one, other = binned_r2(rewards, scores, weights, 7), binned_r2(*many, bins=7)
    for name in ("r2", "mean_reward", "mean_score", "weight"):
        close(getattr(one, name), getattr(other, name))
    close(spearman(rewards, scores, weights), spearman(*many))
    close(auc(rewards, scores, weights), auc(*many))


def test_order_scale_and_units_do_not_matter():
    draw = rng()
    rewards, scores = np.round(draw.normal(size=90), 1), draw.integers(2, size=90)
    weights, order = draw.uniform(size=90), draw.permutation(90)
    expected = binned_r2(rewards, scores, weights).r2
    close(binned_r2(rewards[order], scores[order], weights[order]).r2, expected)
    close(binned_r2(rewards, scores, 1000 * weights).r2, expected)
    close(binned_r2(1e7 + 1e-3 * rewards, 1 - scores, weights).r2, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "rewards, scores, weights, bins, note",
    [
        ([1, 2, 3], [0, 1, 1], None, 1, "one bin"),
        ([2, 2, 2], [0, 1, 1], None, 3, "all rewards are equal"),
        ([1, 2, 2], [0, 1, 0], [0, 1, 1], 3, "all rewards are equal"),
        ([1, 2, 3], [1, 1, 1], None, 3, "all scores are equal"),
        ([1, 2, 3], [0, 1, 1], [0, 1, 1], 3, "all scores are equal"),
        ([1, 1, 2, 2], [0, 1, 0, 1], None, 2, "all bins have the same mean score"),
        (np.arange(8) // 2, [0, 1] * 4, [0.1, 0.2] * 4, 4, "all bins have the same mean score"),
        ([0, 1e-200, 2e-200], [0, 1, 1], None, 3, "all bins have the same mean reward"),
        ([1, 2, 3], [0, 1, 1], [0, 0, 0], 3, "no sample is kept"),
        ([], [], None, 3, "no sample is kept"),
        ([1, 2, np.nan], [0, 1, 1], None, 3, "a reward or score is not finite"),
        ([1, 2, -np.inf], [0, 1, 1], None, 3, "a reward or score is not finite"),
        ([1, 2, 3], [0, 1, np.nan], None, 3, "a reward or score is not finite"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_an_undefined_r2_is_nan_with_a_reason(rewards, scores, weights, bins, note):
    binned = binned_r2(rewards, scores, weights, bins)
    assert math.isnan(binned.r2) and binned.note == note


def test_two_bins_are_said_to_prove_nothing_and_more_bins_than_samples_work():
    binned = binned_r2([1, 2, 3, 4], [0, 1, 1, 1], bins=2)
    assert (binned.r2, binned.note) == (pytest.approx(1), "two bins: a line always fits")
    assert 0 < binned_r2([1, 2, 3], [0, 1, 0.5], bins=10).r2 < 1


def test_arrays_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"one shape, found \(2,\), \(3,\), \(2,\)"):
        binned_r2([1, 2], [1, 2, 3])
    for weights in ([1, -1], [1, np.nan], [1, np.inf]):
        with pytest.raises(ValueError, match="finite and >= 0"):
            binned_r2([1, 2], [0, 1], weights)
    with pytest.raises(ValueError, match="at least 1 bin .*, found 0 and"):
        binned_r2([1, 2], [0, 1], bins=0)
    with pytest.raises(ValueError, match="equal_count, equal_width, found 10 and odd"):
        binned_r2([1, 2], [0, 1], kind="odd")
    with pytest.raises(ValueError, match=r"\[P, N\], found shape \(2,\)"):
        bootstrap_r2([1, 2], [0, 1], [1, 1], 2, 10, rng())


def test_interval_agrees_with_repeating_whole_prompts():
    rewards, scores = noisy_middle(30)
    weights = rng(3).uniform(size=rewards.shape)
    chosen = rng(4).integers(30, size=(100, 30))
    r2 = [binned_r2(rewards[i], scores[i], weights[i], 6).r2 for i in chosen]
    close(bootstrap_r2(rewards, scores, weights, 6, 100, rng(4)), np.quantile(r2, [0.025, 0.975]))


def test_an_interval_holds_the_value_of_a_line_has_no_width_and_of_one_prompt_is_undefined():
    rewards, scores = noisy_middle(300)
    low, high = bootstrap_r2(rewards, scores, np.ones((300, 5)), 10, 300, rng(1))
    assert low < binned_r2(rewards, scores).r2 < high
    close(bootstrap_r2(rewards, 2 * rewards, np.ones((300, 5)), 5, 50, rng()), (1, 1))
    one = bootstrap_r2(rewards[:1], rewards[:1], np.ones((1, 5)), 2, 50, rng())
    steps = np.zeros(300, int)  # one prompt in many steps
    one += bootstrap_r2(rewards, scores, np.ones((300, 5)), 10, 9, rng(), prompts=steps)
    one += bootstrap_alignment(rewards, scores, Weights.of(np.ones((300, 5))), 9, rng(), steps)
    constant = bootstrap_r2(rewards, 0 * rewards, np.ones((300, 5)), 5, 50, rng())
    # Left out where it is undefined: here, where the second of two prompts is drawn twice.
    some = bootstrap_r2([[0, 1, 2]] * 2, [[0, 0, 1], [1, 1, 1]], np.ones((2, 3)), 3, 50, rng())
    assert np.isnan([*one, *constant]).all() and np.isfinite(some).all()


def slow_auc(rewards, scores, weights):
    rows = list(zip(rewards, scores, weights, strict=True))
    pairs = [(a, b) for a in rows for b in rows if a[1] > b[1]]  # a passed, b failed
    wins = sum(a[2] * b[2] * ((a[0] > b[0]) + (a[0] == b[0]) / 2) for a, b in pairs)
    return wins / sum(a[2] * b[2] for a, b in pairs)


def slow_spearman(rewards, scores):
    def ranks(values):  # mean of the places that equal values share
        return np.array([np.mean(np.flatnonzero(np.sort(values) == v)) for v in values])

    return np.corrcoef(ranks(rewards), ranks(scores))[0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_auc_and_spearman_agree_with_slow_definitions(seed):
    draw = rng(seed)
    rewards = np.round(draw.normal(size=60), 1)
    scores = (draw.normal(size=60) < rewards).astype(float)
    weights = draw.uniform(size=60)
    close(auc(rewards, scores, weights), slow_auc(rewards, scores, weights))
    close(auc(rewards, scores), slow_auc(rewards, scores, np.ones(60)))
    close(spearman(rewards, scores), slow_spearman(rewards, scores))
    close([spearman(rewards, rewards**3), spearman(rewards, -rewards)], [1, -1])


@pytest.mark.filterwarnings("error")
def test_auc_and_spearman_are_nan_where_undefined():
    for scores, weights in (([1, 1], None), ([0, 0], None), ([0, 1], [0, 0]), ([0, 1], [1, 0])):
        assert np.isnan([measure([1, 2], scores, weights) for measure in (auc, spearman)]).all()
    assert math.isnan(spearman([2, 2], [0, 1])) and auc([2, 2], [0, 1]) == 0.5
    assert math.isnan(auc([1, np.nan], [0, 1])) and math.isnan(spearman([1, np.inf], [0, 1]))
    assert math.isnan(auc([], [])) and math.isnan(spearman([], []))


def within(values):
    return values - values.mean(1, keepdims=True)


def slow_alpha(rewards, scores, draws):
    """The definition, over draws of weights as they come."""
    mean = np.mean(draws, 0)
    A, c = within(rewards), within(scores)
    A = A - (mean * A).sum() / mean.sum()
    taught, right = np.mean([(w * A) ** 2 for w in draws]), np.mean(c**2)
    return np.mean([w * A * c for w in draws]) / np.sqrt(taught * right)


def test_alignment_agrees_with_its_definition_over_draws():
    draw = rng()
    rewards, scores = draw.normal(size=(40, 5)), draw.integers(2, size=(40, 5)).astype(float)
    for draws in (
        draw.integers(2, size=(30, 40, 5)),
        draw.uniform(size=(1, 40, 5)),
        [np.ones((40, 5))],
    ):
        found = alignment(1e3 + 7 * rewards, -2 * scores, Weights.of(*draws))  # any unit
        close(-found.alpha, slow_alpha(rewards, scores, np.array(draws, dtype=float)))
        close(found.kappa, np.mean(np.array(draws) > 0))
        close(found.at_updates * found.at_samples, found.alpha**2)
        close(found.at_samples / found.at_updates, found.kappa)


def test_alignment_is_1_where_rewards_are_scores_and_minus_1_where_they_are_turned_round():
    scores = np.array([[1.0, 0, 0], [1, 1, 0], [1, 1, 1]])
    for sign in (1, -1):
        close(alignment(sign * scores, scores).alpha, sign)
    # Kept: the best and a worst one, c = 2/3, -1/3 and A = 1/2, -1/2 when their mean is off.
    best_worst = Weights.of(by_rank(scores[:1], 1, 1))
    close(alignment(scores[:1], scores[:1], best_worst).alpha, 0.75**0.5)


def test_a_reward_that_knows_only_the_prompts_difficulty_has_an_r2_near_1_and_no_alignment():
    """Its noise within a prompt is orthogonal to the scores; without any, nothing is taught."""
    right = np.arange(400)[:, None] * 5 // 400  # of four pairs of samples, both right or both wrong
    scores = np.repeat(right > np.arange(4), 2, axis=1).astype(float)
    noise = 0.01 * np.tile([1.0, -1], 4)
    assert binned_r2(right / 4 + noise, scores).r2 > 0.99
    close(alignment(right / 4 + noise, scores).alpha, 0)
    same = alignment(right / 4 + 0 * noise, scores)
    assert math.isnan(same.alpha) and same.note == "every advantage that is kept is 0"


def test_an_almost_useless_linear_reward_has_an_r2_that_tends_to_1_with_samples():
    found = []
    for prompts in (160, 40_000):
        rewards = rng(1).uniform(-1, 1, (prompts, 5))
        scores = (rng(2).uniform(size=rewards.shape) < 0.5 + 0.08 * rewards).astype(float)
        assert 0.5 < auc(rewards, scores) < 0.57
        found.append((binned_r2(rewards, scores).r2, alignment(rewards, scores).alpha))
    (few, before), (many, after) = found
    assert few < 0.6 and many > 0.98
    close([before, after], 0.08 * 2 / 3**0.5, atol=0.05)  # corr = slope * sd of r / sd of score


def test_cubed_rewards_change_r2_and_not_the_order_of_alignment():
    rewards = rng(3).normal(size=(4000, 5))
    scores = (rng(4).uniform(size=rewards.shape) < (0.5 + rewards / 5).clip(0, 1)).astype(float)
    kept = [Weights.of(by_rank(rewards, *share)) for share in ((1, 1, 1), (1, 1), (1,), (0, 1))]
    both = rewards, rewards**3
    r2 = [binned_r2(x, scores).r2 for x in both]
    alphas = [[alignment(x, scores, weights).alpha for weights in kept] for x in both]
    assert r2[0] > 0.99 and r2[1] < 0.85
    assert np.argsort(alphas[0]).tolist() == np.argsort(alphas[1]).tolist()


@pytest.mark.parametrize(
    "rewards, scores, weights, note",
    [
        ([[1, 2]], [[0, 1]], [[0, 0]], "no sample is kept"),
        ([[1, 2]], [[1, 1]], [[1, 1]], "no prompt has answers of different scores"),
        ([[1], [2]], [[1], [0]], [[1], [1]], "no prompt has answers of different scores"),
        (
            [[0.1] * 3, [0.3] * 3],
            [[0, 1, 1]] * 2,
            [[1] * 3] * 2,
            "every advantage that is kept is 0",
        ),
        ([[1, 3], [4, 6]], [[0, 1]] * 2, [[0, 1]] * 2, "every advantage that is kept is 0"),
        ([[1, np.inf]], [[0, 1]], [[1, 1]], "a reward or score is not finite"),
        ([[1, 2]], [[0, np.nan]], [[1, 1]], "a reward or score is not finite"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_an_undefined_alignment_is_nan_with_a_reason(rewards, scores, weights, note):
    found = alignment(rewards, scores, Weights.of(weights))
    assert math.isnan(found.alpha) and math.isnan(found.at_updates) and found.note == note


def test_the_interval_of_alignment_agrees_with_repeating_whole_prompts():
    rewards, scores = noisy_middle(30)
    weights = Weights.of(*rng(3).integers(2, size=(4, *rewards.shape)))
    chosen = rng(4).integers(15, size=(100, 15))  # each two rows are one prompt's
    rows = np.concatenate([2 * chosen, 2 * chosen + 1], 1)
    alpha = [
        alignment(rewards[i], scores[i], Weights(*(w[i] for w in weights))).alpha for i in rows
    ]
    found = bootstrap_alignment(rewards, scores, weights, 100, rng(4), np.arange(30) // 2)
    close(found, np.quantile(alpha, [0.025, 0.975]))
