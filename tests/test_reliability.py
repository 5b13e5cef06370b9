"""R^2, Spearman and AUC of rewards against scores: closed forms, slow definitions, odd cases."""

import json
import math

from pfppo.reliability import (
    auc,
    binned_r2,
    bootstrap_r2,
    format_table,
    reliability_table,
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
    x = np.array([part.mean() for part in np.split(rewards[order], bins)])
    y = np.array([part.mean() for part in np.split(scores[order], bins)])
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    return 1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()


def expected_weights(rewards, best=0.0, worst=0.0, others=0.0):
    rank = np.argsort(np.argsort(-rewards, axis=1), axis=1)
    last = rewards.shape[1] - 1
    return np.where(rank == 0, best, np.where(rank == last, worst, others))


def noisy_middle(prompts=2000, samples=5, seed=0):
    """Rewards in [-1, 1] that tell pass from fail in the tails and mislead between -1/2 and 1/2."""
    draw = rng(seed)
    rewards = draw.uniform(-1, 1, (prompts, samples))
    tails = np.where(rewards > 0, 0.9, 0.1)
    chance = np.where(np.abs(rewards) < 0.5, 0.5 + 0.3 * np.sin(12 * rewards), tails)
    return rewards, (draw.uniform(size=rewards.shape) < chance).astype(float)


# -------------------------------------------------------------------------------------- binned R^2


def test_a_noiseless_line_gives_one_and_the_bins_lie_on_it():
    rewards = rng().normal(size=1000)
    binned = binned_r2(rewards, 0.3 + 0.1 * rewards)
    close(binned.r2, 1)
    close(binned.mean_score, 0.3 + 0.1 * binned.mean_reward)
    close(binned.weight, 100)
    assert (np.diff(binned.mean_reward) > 0).all() and binned.note == ""


def test_a_falling_line_gives_one_too():
    rewards = rng().normal(size=50)
    close(binned_r2(rewards, -rewards, bins=5).r2, 1)


def test_shuffled_scores_give_the_expectation_of_noise():
    draw = rng()
    found = [
        binned_r2(draw.normal(size=400), draw.integers(2, size=400), bins=20).r2 for _ in range(400)
    ]
    close(np.mean(found), 1 / 19, rtol=0.2)


def test_agrees_with_sorting_and_splitting():
    for seed in range(5):
        rewards, scores = rng(seed).normal(size=(2, 120))
        scores = (scores + rewards > 0).astype(float)
        for bins in (3, 8, 10):
            close(binned_r2(rewards, scores, bins=bins).r2, slow_r2(rewards, scores, bins))


def test_a_parabola_is_a_known_number():
    # bins of one sample: x = -1, 0, 1, 2, y = x^2: slope 1, SS_tot 9, SS_res 4
    close(binned_r2([-1, 0, 1, 2], [1, 0, 1, 4], bins=4).r2, 5 / 9)


def test_a_sample_on_a_boundary_is_split():
    binned = binned_r2([0, 1, 2], [0, 0, 1], bins=2)
    close(binned.mean_reward, [1 / 3, 5 / 3])
    close(binned.mean_score, [0, 2 / 3])


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
    close(binned_r2(1e6 + 1e-3 * rewards, 1 - scores, weights).r2, expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_noise_in_the_middle_gives_the_order_of_the_paper(seed):
    rewards, scores = noisy_middle(seed=seed)
    weights = {
        "best_worst": expected_weights(rewards, best=1, worst=1),
        "best_random": expected_weights(rewards, best=1, worst=0.25, others=0.25),
        "none": np.ones(rewards.shape),
        "best_of_n": expected_weights(rewards, best=1),
    }
    rows = reliability_table(rewards, scores, weights, resamples=100)
    assert [row["kept"] for row in rows] == pytest.approx([0.4, 0.4, 1, 0.2])
    for better, worse in zip(rows, rows[1:], strict=False):
        assert better["r2_low"] > worse["r2_high"]


@pytest.mark.parametrize(
    "rewards, scores, weights, bins, note",
    [
        ([1, 2, 3], [0, 1, 1], None, 1, "one bin"),
        ([2, 2, 2], [0, 1, 1], None, 3, "all rewards are equal"),
        ([1, 2, 2], [0, 1, 0], [0, 1, 1], 3, "all rewards are equal"),
        ([1, 2, 3], [1, 1, 1], None, 3, "all scores are equal"),
        ([1, 2, 3], [0, 1, 1], [0, 1, 1], 3, "all scores are equal"),
        ([1, 1, 2, 2], [0, 1, 0, 1], None, 2, "all bins have the same mean score"),
        (
            [1, 1, 2, 2, 3, 3, 4, 4],
            [0, 1] * 4,
            [0.1, 0.2] * 4,
            4,
            "all bins have the same mean score",
        ),
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
    with pytest.raises(ValueError, match="at least 1 bin, found 0"):
        binned_r2([1, 2], [0, 1], bins=0)
    with pytest.raises(ValueError, match=r"\[P, N\], found shape \(2,\)"):
        bootstrap_r2([1, 2], [0, 1], [1, 1], 2, 10, rng())


# --------------------------------------------------------------------------------------- bootstrap


def test_interval_holds_the_value_and_follows_the_seed():
    rewards, scores = noisy_middle(300)
    ones = np.ones(rewards.shape)
    low, high = bootstrap_r2(rewards, scores, ones, 10, 300, rng(1))
    assert low < binned_r2(rewards.ravel(), scores.ravel()).r2 < high
    assert bootstrap_r2(rewards, scores, ones, 10, 300, rng(1)) == (low, high)
    assert bootstrap_r2(rewards, scores, ones, 10, 300, rng(2)) != (low, high)


def test_interval_agrees_with_repeating_whole_prompts():
    rewards, scores = noisy_middle(30)
    weights = rng(3).uniform(size=rewards.shape)
    draw, found = rng(4), []
    for _ in range(100):
        rows = draw.integers(30, size=30)
        again = rewards[rows].ravel(), scores[rows].ravel(), weights[rows].ravel()
        found.append(binned_r2(*again, bins=6).r2)
    expected = np.quantile(found, [0.025, 0.975])
    close(bootstrap_r2(rewards, scores, weights, 6, 100, rng(4)), expected)


def test_interval_of_a_line_has_no_width_and_of_one_prompt_is_undefined():
    rewards = rng().normal(size=(40, 3))
    close(bootstrap_r2(rewards, 2 * rewards, np.ones((40, 3)), 5, 50, rng()), (1, 1))
    one = bootstrap_r2(rewards[:1], rewards[:1], np.ones((1, 3)), 2, 50, rng())
    constant = bootstrap_r2(rewards, 0 * rewards, np.ones((40, 3)), 5, 50, rng())
    assert np.isnan([*one, *constant]).all()


# --------------------------------------------------------------------------------- Spearman and AUC


def slow_auc(rewards, scores, weights):
    wins = total = 0.0
    for r, s, w in zip(rewards, scores, weights, strict=True):
        for r2, s2, w2 in zip(rewards, scores, weights, strict=True):
            if s == 1 and s2 == 0:
                wins += w * w2 * (1.0 if r > r2 else 0.5 if r == r2 else 0.0)
                total += w * w2
    return wins / total


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
    close(spearman(rewards, rewards**3), 1)
    close(spearman(rewards, -rewards), -1)


@pytest.mark.filterwarnings("error")
def test_auc_and_spearman_are_nan_where_undefined():
    for scores, weights in (([1, 1], None), ([0, 0], None), ([0, 1], [0, 0]), ([0, 1], [1, 0])):
        assert math.isnan(auc([1, 2], scores, weights))
        assert math.isnan(spearman([1, 2], scores, weights))
    assert math.isnan(spearman([2, 2], [0, 1])) and auc([2, 2], [0, 1]) == 0.5
    assert math.isnan(auc([1, np.nan], [0, 1])) and math.isnan(spearman([1, np.inf], [0, 1]))
    assert math.isnan(auc([], [])) and math.isnan(spearman([], []))


# ------------------------------------------------------------------------------------------- table


def test_table_has_the_shares_in_expectation_and_is_json():
    rewards = np.array([[3.0, 2, 1], [1, 2, 3]])
    scores = np.array([[1.0, 1, 0], [0, 0, 1]])
    weights = {"none": np.ones((2, 3)), "best_random": expected_weights(rewards, 1, 0.5, 0.5)}
    none, best_random = reliability_table(rewards, scores, weights, bins=3, resamples=20)
    (rounded,) = reliability_table(rewards, scores, {"none": np.full((2, 3), 1 - 1e-15)}, bins=3)
    assert rounded["pass_dropped"] is None
    assert json.loads(json.dumps([none, best_random])) == [none, best_random]
    assert (none["kept"], none["pass_kept"], none["pass_dropped"]) == (1, 0.5, None)
    close(best_random["kept"], 2 / 3)
    close(best_random["pass_kept"], 2.5 / 4)  # two bests that pass, half of four others, one passes
    close(best_random["pass_dropped"], 0.5 / 2)
    assert none["auc"] == pytest.approx(8.5 / 9) and none["note"] == ""
    keys = "filter kept pass_kept pass_dropped r2 r2_low r2_high spearman auc note"
    assert list(none) == keys.split()


def test_filters_are_compared_on_the_same_resamples():
    rewards, scores = noisy_middle(60)
    ones = np.ones(rewards.shape)
    same, again = reliability_table(rewards, scores, {"a": ones, "b": ones}, resamples=50)
    assert same | {"filter": "b"} == again
    (other,) = reliability_table(rewards, scores, {"a": ones}, resamples=50, seed=1)
    assert other["r2_low"] != same["r2_low"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4), (0, 4)])
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_the_poorest_samples_give_a_table_with_notes(shape, score):
    rewards = np.arange(np.prod(shape), dtype=float).reshape(shape)
    weights = {"none": np.ones(shape), "nothing": np.zeros(shape)}
    none, nothing = reliability_table(rewards, np.full(shape, score), weights, resamples=5)
    assert none["r2"] is None and none["note"] and nothing["note"] == "no sample is kept"
    assert nothing["pass_kept"] is None


def test_text_is_aligned_and_shows_a_dash_where_undefined():
    rewards, scores = noisy_middle(50)
    weights = {"none": np.ones(rewards.shape), "a_long_name": np.zeros(rewards.shape)}
    rows = reliability_table(rewards, scores, weights, resamples=20)
    head, none, nothing = format_table(rows).split("\n")
    rate = f"{scores.mean():.3f}"
    assert none.split()[:4] == ["none", "1.000", rate, "-"]
    assert none.split()[5:8:2] == [f"{rows[0]['r2_low']:.3f}", f"{rows[0]['r2_high']:.3f}"]
    assert nothing.split() == f"a_long_name 0.000 - {rate} - - - - no sample is kept".split()
    for title, cell, dash in (("kept", "1.000", "0.000"), ("pass dropped", "-  ", rate)):
        assert head.index(title) + len(title) == nothing.index(dash) + 5
        assert none[: head.index(title) + len(title)].endswith(cell.strip())
    assert format_table([]).startswith("filter")
