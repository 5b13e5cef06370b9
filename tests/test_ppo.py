"""PPO's mathematics against slow definitions: loops, written here from the papers' equations."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from pfppo.ppo import (
    adapted_kl_coef,
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    loss_coefficients,
    policy_loss,
    token_rewards,
    value_loss,
    weighted_mean,
    whiten,
)

import pytest
import torch

LENGTHS = [4, 1, 6, 3]
T = 6
MASK = torch.tensor([[float(j < n) for j in range(T)] for n in LENGTHS], dtype=torch.float64)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, **tolerance):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, **tolerance)


def on_two_ranks(function, *parts):
    """[function(*part, reduce) of each rank], the ranks run as threads."""
    barrier, slots = threading.Barrier(2, timeout=20), [None, None]

    def run(rank):
        def reduce(x):
            slots[rank] = x
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        return function(*parts[rank], reduce)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


# ---------------------------------------------------------------------------------- token rewards


def test_token_rewards_are_minus_beta_kl_and_the_reward_at_the_last_token():
    rewards, kl, beta = draw(4, seed=1), draw(4, T, seed=2), 0.3
    expected = torch.zeros(4, T)
    for i, length in enumerate(LENGTHS):
        for j in range(length):
            expected[i, j] = -beta * kl[i, j]
        expected[i, length - 1] += rewards[i]
    close(token_rewards(rewards, kl, MASK, beta), expected.double())


def test_a_row_without_tokens_gets_no_reward():
    found = token_rewards(tensor(5.0, 5.0), torch.zeros(2, 3), tensor([0, 0, 0], [1, 1, 0]), 0.1)
    close(found, [[0, 0, 0], [0, 5, 0]])


# ----------------------------------------------------------------------------------------------- KL


def test_k1_and_k3_have_the_kl_as_their_mean_over_a_categorical():
    p, q = draw(5, seed=3).softmax(0), draw(5, seed=4).softmax(0)
    kl = sum(p[i] * math.log(p[i] / q[i]) for i in range(5))
    close((p * kl_k1(p.log(), q.log())).sum(), kl)
    close((p * kl_k3(p.log(), q.log())).sum(), kl)


def test_k3_is_never_negative_and_zero_for_equal_policies():
    logp, ref_logp = draw(1000, seed=5), draw(1000, seed=6)
    assert (kl_k3(logp, ref_logp) > 0).all() and (kl_k1(logp, ref_logp) < 0).any()
    assert (kl_k3(logp, logp) == 0).all() and (kl_k1(logp, logp) == 0).all()


def test_k3_stays_finite_where_the_policies_share_nothing():
    assert kl_k3(torch.tensor([-500.0, 0.0]), torch.tensor([0.0, -500.0])).isfinite().all()


# ---------------------------------------------------------------------------------------------- GAE


def slow_gae(rewards, values, lengths, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_(t+l), with V = 0 after the last token."""
    adv = torch.zeros_like(values)
    for i, length in enumerate(lengths):
        v = [*values[i, :length].tolist(), 0.0]
        delta = [rewards[i, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            adv[i, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length))
    return adv


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_double_sum_on_ragged_rows(gamma, lam):
    rewards, values = draw(4, T, seed=7), draw(4, T, seed=8)  # noise off the mask as well
    adv, returns = gae(rewards, values, MASK, gamma, lam)
    expected = slow_gae(rewards, values, LENGTHS, gamma, lam)
    close(adv, expected)
    close(returns, (expected + values) * MASK)


def test_with_gamma_and_lambda_1_returns_are_the_rewards_to_go_whatever_the_values():
    rewards = draw(4, T, seed=7)
    _, returns = gae(rewards, 10 * draw(4, T, seed=9), MASK, 1.0, 1.0)
    expected = [
        [rewards[i, j:n].sum().item() if j < n else 0.0 for j in range(T)]
        for i, n in enumerate(LENGTHS)
    ]
    close(returns, expected)


def test_values_that_are_the_rewards_to_go_leave_no_advantage():
    rewards = torch.full((1, 4), -0.5)
    values = torch.tensor([[-2.0, -1.5, -1.0, -0.5]])
    adv, _ = gae(rewards, values, torch.ones(1, 4))
    close(adv, torch.zeros(1, 4))


# --------------------------------------------------------------------------------------- whitening


def test_whitened_numbers_have_weighted_mean_0_and_variance_1():
    weights = MASK * tensor([0.5], [2.0], [1.0], [3.0])
    x = whiten(7 + 5 * draw(4, T, seed=10), weights)
    close((x * weights).sum(), 0.0, atol=1e-9, rtol=0)
    close((x**2 * weights).sum() / weights.sum(), 1.0)
    assert (x[MASK == 0] == 0).all()


def test_a_weight_of_n_whitens_like_n_equal_rows():
    x, counts = draw(4, T, seed=11), torch.tensor([2, 1, 3, 1])
    rows = torch.arange(4).repeat_interleave(counts)
    close(whiten(x, MASK * counts[:, None])[rows], whiten(x[rows], MASK[rows]))


def test_a_row_of_weight_0_has_no_influence_on_the_others():
    x, weights = draw(4, T, seed=12), MASK * tensor([1], [0], [1], [1])
    other = x.clone()
    other[1] = 1e6
    close(whiten(x, weights), whiten(other, weights))
    assert (whiten(other, weights)[1] == 0).all()


def test_whitening_undoes_shift_and_scale():
    x = draw(4, T, seed=13)
    close(whiten(3 * x - 40, MASK), whiten(x, MASK), rtol=1e-6, atol=1e-6)


def test_whitening_of_nothing_or_of_equal_numbers_is_0():
    assert (whiten(draw(2, 3), torch.zeros(2, 3)) == 0).all()
    assert (whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)) == 0).all()


def test_two_ranks_whiten_like_one():
    x, weights = draw(4, T, seed=14), MASK * tensor([1], [2], [0.5], [1])
    parts = on_two_ranks(whiten, (x[:1], weights[:1]), (x[1:], weights[1:]))
    close(torch.cat(parts), whiten(x, weights))


def test_a_rank_without_rows_of_its_own_does_not_disturb_the_other():
    x = draw(4, T, seed=14)
    parts = on_two_ranks(whiten, (x, MASK), (draw(1, T), torch.zeros(1, T, dtype=torch.float64)))
    close(parts[0], whiten(x, MASK))
    assert (parts[1] == 0).all()


def test_the_weighted_mean_is_that_of_the_loop_on_one_rank_and_on_two():
    x, weights = draw(5, seed=15), tensor(0, 1, 2.5, 0.5, 4)
    expected = sum(float(w * v) for v, w in zip(x, weights, strict=True)) / 8
    close(weighted_mean(x, weights), expected)
    for found in on_two_ranks(weighted_mean, (x[:2], weights[:2]), (x[2:], weights[2:])):
        close(found, expected)


def test_the_weighted_mean_of_nothing_is_0():
    assert weighted_mean(draw(3), torch.zeros(3)) == 0


# ------------------------------------------------------------------------------------ coefficients


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_coefficients_are_the_weights_of_rows_or_of_tokens(aggregation):
    weights = tensor(0.5, 2.0, 0.0, 1.0)
    expected = torch.zeros(4, T)
    for i, length in enumerate(LENGTHS):
        for j in range(length):
            expected[i, j] = weights[i] / (length if aggregation == "sequence_mean" else 1)
    close(loss_coefficients(MASK, weights, aggregation), expected.double())


def test_a_row_without_tokens_has_no_coefficients():
    assert (loss_coefficients(torch.zeros(1, 3), torch.ones(1)) == 0).all()


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="'mean'"):
        loss_coefficients(MASK, torch.ones(4), "mean")


# ------------------------------------------------------------------------------------- policy loss


@pytest.mark.parametrize(
    "adv, ratio, loss, slope, clipped",
    [  # slope: d loss / d log pi = -adv * ratio where it is not clipped
        (+2.0, 1.5, -2.4, 0.0, 1),
        (+2.0, 0.5, -1.0, -1.0, 0),
        (-2.0, 1.5, +3.0, +3.0, 0),
        (-2.0, 0.5, +1.6, 0.0, 1),
        (+2.0, 1.1, -2.2, -2.2, 0),
        (-2.0, 0.9, +1.8, +1.8, 0),
    ],
)
def test_the_clipped_surrogate_by_hand(adv, ratio, loss, slope, clipped):
    old_logp = tensor([-1.0])
    logp = (old_logp + math.log(ratio)).requires_grad_()
    found, metrics = policy_loss(logp, old_logp, tensor([adv]), tensor([1.0]), clip=0.2)
    found.backward()
    close(found.detach(), loss)
    close(logp.grad, [[slope]])
    assert metrics["clip_fraction"] == clipped


def batch(seed=20):
    """What both losses take, for rows of LENGTHS; numbers off the mask are noise."""
    old_logp, old_values = draw(4, T, seed=seed), draw(4, T, seed=seed + 1)
    return SimpleNamespace(
        mask=MASK,
        weights=tensor(1.0, 0.0, 2.0, 0.5),
        old_logp=old_logp,
        logp=old_logp + 0.3 * draw(4, T, seed=seed + 2),
        adv=draw(4, T, seed=seed + 3),
        old_values=old_values,
        values=old_values + 0.3 * draw(4, T, seed=seed + 4),
        returns=draw(4, T, seed=seed + 5),
    )


def changed(rows, change):
    return SimpleNamespace(**{name: change(value) for name, value in vars(rows).items()})


def tokens(c):
    """(row, column, coefficient) of every response token that counts."""
    return [(i, j, c[i, j].item()) for i, n in enumerate(LENGTHS) for j in range(n)]


def test_the_policy_loss_and_its_metrics_equal_the_loop():
    b, eps = batch(), 0.2
    c = loss_coefficients(b.mask, b.weights) / b.weights.sum()
    loss = clipped = kl = ratios = count = 0.0
    for i, j, weight in tokens(c):
        log_ratio = (b.logp[i, j] - b.old_logp[i, j]).item()
        ratio, adv = math.exp(log_ratio), b.adv[i, j].item()
        limited = min(max(ratio, 1 - eps), 1 + eps)
        loss -= weight * min(ratio * adv, limited * adv)
        clipped += weight * (limited * adv < ratio * adv)
        kl += weight * (ratio - 1 - log_ratio)
        ratios += ratio * (weight > 0)
        count += weight > 0
    found, metrics = policy_loss(b.logp, b.old_logp, b.adv, c, eps)
    close(found, loss)
    expected = {"policy_loss": loss, "clip_fraction": clipped, "approx_kl": kl}
    expected |= {"ratio_sum": ratios, "tokens": count}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    assert 0 < clipped < 1  # the batch has both kinds of tokens


def test_with_equal_policies_the_ratio_is_exactly_1_and_the_slope_the_advantage():
    b = batch()
    c = loss_coefficients(b.mask, b.weights) / b.weights.sum()
    logp = b.old_logp.clone().requires_grad_()
    loss, metrics = policy_loss(logp, b.old_logp, b.adv, c)
    loss.backward()
    assert metrics["ratio_sum"] == metrics["tokens"]
    assert metrics["clip_fraction"] == 0 and metrics["approx_kl"] == 0
    close(logp.grad, -b.adv * c)


@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_log_ratios_are_limited_so_that_the_loss_is_finite(gap):
    logp = torch.tensor([[gap]], requires_grad=True)
    loss, metrics = policy_loss(logp, torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1, 1))
    loss.backward()
    close(loss.detach(), math.exp(20) if gap > 0 else 0.8)
    assert logp.grad.isfinite().all() and metrics["approx_kl"].isfinite()


# -------------------------------------------------------------------------------------- value loss


@pytest.mark.parametrize(
    "value, ret, loss, slope",
    [  # the old value is 0, the clip 0.2
        (0.1, 1.0, 0.405, -0.9),  # within the clip
        (2.0, 0.0, 2.000, 2.0),  # moved away from the return: not excused
        (2.0, 3.0, 3.920, 0.0),  # moved towards it by more than the clip: no more to gain
        (-2.0, -3.0, 3.920, 0.0),
    ],
)
def test_the_clipped_value_loss_by_hand(value, ret, loss, slope):
    values = tensor([value]).requires_grad_()
    found, _ = value_loss(values, tensor([0.0]), tensor([ret]), tensor([1.0]), clip=0.2)
    found.backward()
    close(found.detach(), loss)
    close(values.grad, [[slope]])


def test_the_value_loss_equals_the_loop():
    b, eps, loss = batch(), 0.2, 0.0
    c = loss_coefficients(b.mask, b.weights, "token_mean")
    for i, j, weight in tokens(c):
        value, old, ret = (x[i, j].item() for x in (b.values, b.old_values, b.returns))
        limited = min(max(value, old - eps), old + eps)
        loss += weight * 0.5 * max((value - ret) ** 2, (limited - ret) ** 2)
    found, metrics = value_loss(b.values, b.old_values, b.returns, c, eps)
    close(found, loss)
    close(metrics["value_loss"], loss)


# ------------------------------------------------------------------------------------- invariances


def losses(rows, total, aggregation="sequence_mean"):
    """(both losses [2], gradients of logp and values) of rows that are part of a minibatch."""
    logp, values = rows.logp.clone().requires_grad_(), rows.values.clone().requires_grad_()
    c = loss_coefficients(rows.mask, rows.weights, aggregation) / total
    actor, _ = policy_loss(logp, rows.old_logp, rows.adv, c)
    critic, _ = value_loss(values, rows.old_values, rows.returns, c)
    (actor + critic).backward()
    return torch.stack([actor, critic]).detach(), logp.grad, values.grad


def denominator(rows, aggregation="sequence_mean"):
    return loss_coefficients(rows.mask, rows.weights, aggregation).sum()


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_microbatches_with_a_global_denominator_give_the_same_losses_and_gradients(
    aggregation, cut
):
    whole = batch()
    total = denominator(whole, aggregation)
    parts = [
        losses(changed(whole, lambda x, r=rows: x[r]), total, aggregation)
        for rows in (slice(0, cut), slice(cut, 4))
    ]
    loss, *gradients = losses(whole, total, aggregation)
    close(parts[0][0] + parts[1][0], loss)
    for i, gradient in enumerate(gradients, 1):
        close(torch.cat([part[i] for part in parts]), gradient)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_padding_columns_change_neither_losses_nor_gradients(aggregation):
    def widen(x):
        return torch.cat([x, 9 + draw(4, 3, seed=99)], 1) if x.ndim == 2 else x

    rows = batch()
    wide = changed(rows, widen)
    wide.mask = torch.cat([MASK, torch.zeros(4, 3)], 1)
    found = losses(wide, denominator(wide, aggregation), aggregation)
    expected = losses(rows, denominator(rows, aggregation), aggregation)
    close(found[0], expected[0])
    for after, before in zip(found[1:], expected[1:], strict=True):
        close(after[:, :T], before)
        assert (after[:, T:] == 0).all()


def test_the_order_of_rows_changes_neither_losses_nor_gradients():
    rows, order = batch(), torch.tensor([2, 0, 3, 1])
    found = losses(changed(rows, lambda x: x[order]), denominator(rows))
    for after, before in zip(found, losses(rows, denominator(rows)), strict=True):
        close(after, before[order] if before.ndim == 2 else before)


def test_a_dropped_row_and_an_absent_row_are_the_same():
    rows, kept = batch(), [0, 2, 3]  # row 1 has weight 0
    found = losses(changed(rows, lambda x: x[kept]), denominator(rows))
    expected = losses(rows, denominator(rows))
    close(found[0], expected[0])
    for after, before in zip(found[1:], expected[1:], strict=True):
        close(after, before[kept])
        assert (before[1] == 0).all()


def test_a_weight_of_2_counts_like_two_equal_rows():
    rows = batch()
    twice = changed(rows, lambda x: x[[0, 2, 2, 3]])
    twice.weights = tensor(1.0, 1.0, 1.0, 0.5)
    close(losses(twice, denominator(twice))[0], losses(rows, denominator(rows))[0])


def test_advantages_do_not_depend_on_padding_columns():
    def advantages(extra):
        wide = [torch.cat([x, 9 + draw(4, extra, seed=50)], 1) for x in (kl, values)]
        mask = torch.cat([MASK, torch.zeros(4, extra)], 1)
        adv, _ = gae(token_rewards(draw(4, seed=51), wide[0], mask, 0.1), wide[1], mask)
        return whiten(adv, mask)[:, :T]

    kl, values = draw(4, T, seed=52), draw(4, T, seed=53)
    close(advantages(3), advantages(0))


# ------------------------------------------------------------------------- explained variance, beta


def test_explained_variance_equals_the_weighted_loop_on_one_rank_and_on_two():
    values, returns, weights = draw(6, seed=30), draw(6, seed=31), tensor(1, 2, 0, 1, 0.5, 3)

    def variance(x):
        mean = sum(w * v for w, v in zip(weights.tolist(), x, strict=True)) / 7.5
        return sum(w * (v - mean) ** 2 for w, v in zip(weights.tolist(), x, strict=True)) / 7.5

    expected = 1 - variance((returns - values).tolist()) / variance(returns.tolist())
    close(explained_variance(values, returns, weights), expected)
    whole = (values, returns, weights)
    parts = [[x[:2] for x in whole], [x[2:] for x in whole]]
    for found in on_two_ranks(explained_variance, *parts):
        close(found, expected)


def test_explained_variance_is_1_for_perfect_values_and_0_for_constant_ones():
    returns, ones = draw(6, seed=32), torch.ones(6, dtype=torch.float64)
    close(explained_variance(returns, returns, ones), 1.0)
    close(explained_variance(returns + 3, returns, ones), 1.0)  # a shift is no variance
    close(explained_variance(ones, returns, ones), 0.0, atol=1e-9, rtol=0)


def test_explained_variance_of_one_token_is_nan():
    assert explained_variance(torch.ones(1), torch.zeros(1), torch.ones(1)).isnan()


@pytest.mark.parametrize(
    "kl, error", [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2), (-9.0, -0.2)]
)
def test_beta_grows_while_the_kl_is_above_its_target_and_at_most_by_a_fifth(kl, error):
    expected = 0.05 * (1 + error * 250 / 10_000)
    assert adapted_kl_coef(0.05, kl, target=6.0, samples=250) == pytest.approx(expected)
