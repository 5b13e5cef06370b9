"""PPO's mathematics against slow definitions: loops, written here from the papers' equations.

What changes no gradient is tried on the script's own `backward`, with tables for models: their
outputs are their parameters, so there is a gradient for each token.
"""

import math
from types import SimpleNamespace

import train_ppo
from pfppo import fsdp, ppo
from pfppo.rollout import Rollout, seeded

import pytest
import torch
from ranks import Peers

LENGTHS = [4, 1, 6, 3]
T = 6
MASK = torch.tensor([[float(j < n) for j in range(T)] for n in LENGTHS], dtype=torch.float64)
TOKENS = [(i, j) for i, n in enumerate(LENGTHS) for j in range(n)]
AGGREGATIONS = ["sequence_mean", "token_mean"]


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, **tolerance):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, **tolerance)


# ------------------------------------------------------------------- rewards, KL, GAE, whitening


def test_token_rewards_are_minus_beta_kl_and_the_reward_at_the_last_token():
    rewards, kl, beta = draw(4, seed=1), draw(4, T, seed=2), 0.3
    expected = torch.zeros(4, T).double()
    for i, j in TOKENS:
        expected[i, j] = -beta * kl[i, j] + (rewards[i] if j == LENGTHS[i] - 1 else 0)
    close(ppo.token_rewards(rewards, kl, MASK, beta), expected)


def test_a_row_without_tokens_gets_no_reward_and_has_no_coefficients():
    mask = tensor([0, 0, 0], [1, 1, 0])
    rewards = ppo.token_rewards(tensor(5.0, 5.0), torch.zeros(2, 3), mask, 0.1)
    close(rewards, [[0, 0, 0], [0, 5, 0]])
    close(ppo.loss_coefficients(mask, torch.ones(2)), [[0, 0, 0], [0.5, 0.5, 0]])


def test_k1_and_k3_have_the_kl_as_their_mean_over_a_categorical():
    p, q = draw(5, seed=3).softmax(0), draw(5, seed=4).softmax(0)
    kl = sum(p[i] * math.log(p[i] / q[i]) for i in range(5))
    close((p * ppo.kl_k1(p.log(), q.log())).sum(), kl)
    close((p * ppo.kl_k3(p.log(), q.log())).sum(), kl)


def test_k3_is_never_negative_zero_for_equal_policies_and_always_finite():
    logp, ref_logp = draw(1000, seed=5), draw(1000, seed=6)
    assert (ppo.kl_k3(logp, ref_logp) > 0).all() and (ppo.kl_k1(logp, ref_logp) < 0).any()
    assert (ppo.kl_k3(logp, logp) == 0).all() and (ppo.kl_k1(logp, logp) == 0).all()
    assert ppo.kl_k3(torch.tensor([-500.0, 0.0]), torch.tensor([0.0, -500.0])).isfinite().all()


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_double_sum_on_ragged_rows(gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_(t+l), with V = 0 after the last token."""
    rewards, values = draw(4, T, seed=7), draw(4, T, seed=8)  # noise off the mask as well
    expected = torch.zeros_like(values)
    for i, length in enumerate(LENGTHS):
        v = [*values[i, :length].tolist(), 0.0]
        delta = [rewards[i, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[i, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length))
    adv, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    close(adv, expected)
    close(returns, (expected + values) * MASK)


def test_whitening_gives_weighted_mean_0_and_variance_1_as_the_loop_does():
    x, weights = 7 + 5 * draw(4, T, seed=10), MASK * tensor([0.5], [0.0], [1.0], [3.0])
    pairs = [(x[i, j].item(), weights[i, j].item()) for i, j in TOKENS]
    total = sum(w for _, w in pairs)
    mean = sum(w * v for v, w in pairs) / total
    variance = sum(w * (v - mean) ** 2 for v, w in pairs) / total
    close(ppo.whiten(x, weights), (x - mean) / variance**0.5 * (weights > 0))


@pytest.mark.parametrize("fill", [0.0, 1e6, -3e-5])
def test_padded_rows_and_columns_change_no_bit_of_what_is_whitened(fill):
    """In fp32, where the order of a sum is seen."""
    x, weights = 5 * draw(40, T, seed=12).float() + 1, MASK.float().repeat(10, 1) * 0.7
    wide, weighed = torch.full((43, T + 5), fill), torch.zeros(43, T + 5)
    wide[1:41, :T], weighed[1:41, :T] = x, weights
    found = ppo.whiten(wide, weighed)
    assert torch.equal(found[1:41, :T], ppo.whiten(x, weights))
    assert (found[weighed == 0] == 0).all()


def test_whitening_and_mean_of_nothing_and_whitening_of_equal_numbers_are_0():
    assert (ppo.whiten(draw(2, 3), torch.zeros(2, 3)) == 0).all()
    assert (ppo.whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)) == 0).all()
    assert ppo.weighted_mean(draw(3), torch.zeros(3)) == 0


def test_ranks_whiten_like_one_also_where_one_has_no_rows_of_its_own():
    x, weights = draw(4, T, seed=14), MASK * tensor([1], [2], [0.5], [1])
    nothing = draw(1, T), torch.zeros(1, T).double()
    parts = Peers(3).run(ppo.whiten, (x[:1], weights[:1]), nothing, (x[1:], weights[1:]))
    close(torch.cat([parts[0], parts[2]]), ppo.whiten(x, weights))
    assert (parts[1] == 0).all()


def test_explained_variance_equals_the_weighted_loop_on_one_rank_and_on_two():
    values, returns, weights = draw(6, seed=30), draw(6, seed=31), tensor(1, 2, 0, 1, 0.5, 3)

    def variance(x):
        mean = sum(w * v for w, v in zip(weights.tolist(), x, strict=True)) / 7.5
        return sum(w * (v - mean) ** 2 for w, v in zip(weights.tolist(), x, strict=True)) / 7.5

    expected = 1 - variance((returns - values).tolist()) / variance(returns.tolist())
    close(ppo.explained_variance(values, returns, weights), expected)
    parts = [[x[rows] for x in (values, returns, weights)] for rows in (slice(2), slice(2, 6))]
    for found in Peers(2).run(ppo.explained_variance, *parts):
        close(found, expected)


def test_explained_variance_is_1_of_perfect_0_of_constant_values_and_nan_of_constant_returns():
    returns, ones = draw(6, seed=32), torch.ones(6).double()
    close(ppo.explained_variance(returns, returns, ones), 1.0)
    close(ppo.explained_variance(returns + 3, returns, ones), 1.0)  # a shift is no variance
    close(ppo.explained_variance(ones, returns, ones), 0.0, atol=1e-9, rtol=0)
    for count in (1, 9):  # in fp32 the variance of nine tenths is not 0 but rounding
        constant = torch.full((count,), 0.1)
        assert ppo.explained_variance(torch.arange(count), constant, constant).isnan()


@pytest.mark.parametrize(
    "kl, error", [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2), (-9.0, -0.2)]
)
def test_beta_grows_while_the_kl_is_above_its_target_and_at_most_by_a_fifth(kl, error):
    expected = 0.05 * (1 + error * 250 / 10_000)
    assert ppo.adapted_kl_coef(0.05, kl, target=6.0, samples=250) == pytest.approx(expected)


# ---------------------------------------------------------------------------- advantages, losses


class Table(torch.nn.Module):
    """A policy or critic: row i of a table for a row that begins with token i."""

    def __init__(self, table, is_policy):
        super().__init__()
        self.table, self.is_policy = torch.nn.Parameter(table.clone()), is_policy

    def forward(self, ids, states, *_):
        found = self.table[ids[:, 0], : states.shape[1]]  # [B, T]
        return (found, found.detach()) if self.is_policy else found[..., None]

    def set_requires_all_reduce(self, _):
        """Of a sharded model; there are no copies of a table."""


def rows_of(lengths, own, **fields):
    """Rows that begin with the tokens `own`, and are so long; off the mask there is noise."""
    ids, ones = own[:, None].repeat(1, 1 + T), torch.ones_like(own)
    return Rollout(ids, ones, torch.tensor(lengths)[own], **fields)


def batch():
    """Four rows with all that steps 5 and 6 take; row 1 is padding."""
    names = ("old_logp", "ref_logp", "old_values", "adv", "returns")
    numbers = {name: draw(4, T, seed=20 + i) for i, name in enumerate(names)}
    numbers |= {"rewards": draw(4, seed=25), "weights": tensor(1.0, 0.0, 2.0, 0.5)}
    rows = rows_of(LENGTHS, torch.arange(4), **numbers)
    rows.coefficients = ppo.loss_coefficients(MASK, rows.weights)
    return rows


LOGP = batch().old_logp + 0.3 * draw(4, T, seed=27)  # what the policy says of them now
VALUES = batch().old_values + 0.4 * draw(4, T, seed=29)
METRICS = ("policy_loss", "clip_fraction", "approx_kl", "ratio_sum", "tokens", "value_loss")


def options(**changes):
    known = dict(microbatch=4, temperature=1.0, clip=0.2, value_clip=0.3)
    return SimpleNamespace(**known | changes)


def learn(rows, logp=LOGP, values=VALUES, world=1, **changes):
    """The script's backward: (metrics, gradients of log-probs, of values)."""
    models = {"actor": Table(logp, True), "critic": Table(values, False)}
    trained = {name: (model, None) for name, model in models.items()}
    sums = train_ppo.backward(trained, rows, options(**changes), SimpleNamespace(world=world))
    metrics = {name: x.item() for name, x in sums.items()}
    return metrics, *(model.table.grad for model in models.values())


def assert_same(found, expected):
    """Of two results of `learn`."""
    assert found[0] == pytest.approx(expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        close(one, other)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(fsdp, "sum_over_ranks", lambda x: x)


def test_advantages_are_gae_of_token_rewards_whitened_by_the_filters_weights():
    rows, beta = batch(), 0.3
    rewards = ppo.token_rewards(rows.rewards, rows.old_logp - rows.ref_logp, MASK, beta)
    raw, expected = ppo.gae(rewards, rows.old_values, MASK, 0.9, 0.8)
    adv, returns = ppo.advantages(rows, beta, 0.9, 0.8)
    close(adv, ppo.whiten(raw, MASK * rows.weights[:, None]))
    close(returns, expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_coefficients_are_the_weights_of_rows_or_of_tokens(aggregation):
    weights, expected = tensor(0.5, 2.0, 0.0, 1.0), torch.zeros(4, T).double()
    for i, j in TOKENS:
        expected[i, j] = weights[i] / (LENGTHS[i] if aggregation == "sequence_mean" else 1)
    found = ppo.loss_coefficients(MASK, weights, aggregation, minibatches=3)
    close(found, expected / expected.sum() * 3)  # 1 for each minibatch, on average
    parts = [(MASK[rows], weights[rows], aggregation, 3) for rows in (slice(1), slice(1, 4))]
    close(torch.cat(Peers(2).run(ppo.loss_coefficients, *parts)), found)


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="'mean'"):
        ppo.loss_coefficients(MASK, torch.ones(4), "mean")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_both_losses_their_metrics_and_their_gradients_equal_the_loop(aggregation):
    rows, expected, cases = batch(), dict.fromkeys(METRICS, 0.0), set()
    c = rows.coefficients = ppo.loss_coefficients(MASK, rows.weights, aggregation)
    slopes = torch.zeros(2, 4, T).double()
    for i, j in TOKENS:
        weight, adv = c[i, j].item(), rows.adv[i, j].item()
        log_ratio = (LOGP[i, j] - rows.old_logp[i, j]).item()
        ratio = math.exp(log_ratio)
        limited = min(max(ratio, 0.8), 1.2)
        clipped = limited * adv < ratio * adv
        slopes[0, i, j] = 0 if clipped else -weight * adv * ratio
        cases.add((adv > 0, limited < ratio, limited > ratio))
        expected["policy_loss"] -= weight * min(ratio * adv, limited * adv)
        expected["clip_fraction"] += weight * clipped
        expected["approx_kl"] += weight * (ratio - 1 - log_ratio)
        expected["ratio_sum"] += ratio * (weight > 0)
        expected["tokens"] += weight > 0
        value, old, ret = (x[i, j].item() for x in (VALUES, rows.old_values, rows.returns))
        limited = min(max(value, old - 0.3), old + 0.3)
        held = abs(limited - ret) > abs(value - ret)  # moved further than the clip: no more to gain
        slopes[1, i, j] = 0 if held else weight * (value - ret)
        cases.add(("value", limited != value, held))
        expected["value_loss"] += weight * 0.5 * ((limited if held else value) - ret) ** 2
    assert len(cases) == 6 + 3  # there are tokens of all kinds
    assert_same(learn(rows), (expected, *slopes))


@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_log_ratios_are_limited_so_that_the_loss_is_finite(gap):
    logp = torch.tensor([[gap]], requires_grad=True)
    loss, metrics = ppo.policy_loss(logp, torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1, 1))
    loss.backward()
    close(loss.detach(), math.exp(20) if gap > 0 else 0.8)
    assert logp.grad.isfinite().all() and metrics["approx_kl"].isfinite()


def test_with_equal_policies_the_ratio_is_exactly_1_and_the_slope_the_advantage():
    rows = batch()
    metrics, slope, _ = learn(rows, logp=rows.old_logp)
    assert metrics["ratio_sum"] == metrics["tokens"]
    assert metrics["clip_fraction"] == 0 and metrics["approx_kl"] == 0
    close(slope, -rows.adv * rows.coefficients)


# ----------------------------------------------------------------------- what changes no gradient


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [0, 2, 3]], ids=["another", "without weight 0"])
def test_the_order_of_rows_and_rows_that_are_dropped_change_nothing(order):
    assert_same(learn(batch().select(torch.tensor(order))), learn(batch()))


def test_a_weight_of_2_counts_like_two_equal_rows():
    twice = batch().select(torch.tensor([0, 2, 2, 3]))
    twice.weights = tensor(1.0, 1.0, 1.0, 0.5)
    twice.coefficients = ppo.loss_coefficients(twice.mask, twice.weights)
    found, expected = learn(twice), learn(batch())
    counted = {name: found[0][name] for name in ("ratio_sum", "tokens")}
    assert_same(found, (expected[0] | counted, *expected[1:]))


def steps(rank, size, aggregation, reduce):
    """Steps 4 to 6 on one rank: `learn` of each minibatch, microbatches of that size."""
    weights = tensor([1, 0, 2], [1, 0, 0], [1, 1, 1], [0, 0.5, 0])  # kept by rank 0 of 2: 5, 1: 2
    own = torch.arange(12).view(4, 3)[rank.rank :: rank.world].flatten()
    lengths = [2, 5, 1, 6, 3, 4, 5, 1, 2, 4, 2, 3]
    rows = rows_of(lengths, own, rewards=draw(12, seed=40)[own])
    kept, args = rows.kept(weights, 4, rank), options(microbatch=size)
    tables = [draw(12, T, seed=seed) for seed in range(41, 46)]
    kept.old_logp, _ = kept.evaluate(train_ppo.log_probs, Table(tables[0], True), args)
    kept.ref_logp, _ = kept.evaluate(train_ppo.log_probs, Table(tables[1], True), args)
    kept.old_values = kept.evaluate(train_ppo.values_of, Table(tables[2], False), args)
    kept.adv, kept.returns = ppo.advantages(kept, 0.1, reduce=reduce)
    how = aggregation, len(kept.parts), reduce
    kept.coefficients = ppo.loss_coefficients(kept.mask, kept.weights, *how)
    minibatches = kept.minibatches(seeded("test"))
    return [learn(mb, *tables[3:], rank.world, microbatch=size) for mb in minibatches]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("world, size", [(1, 1), (1, 2), (2, 100), (2, 1), (4, 2)])
def test_ranks_padded_rows_and_microbatches_change_neither_metrics_nor_gradients(
    monkeypatch, world, size, aggregation
):
    one, *ranks = [SimpleNamespace(rank=r, world=w) for w in (1, world) for r in range(w)]
    expected = steps(one, 100, aggregation, lambda x: x)
    peers = Peers(world)
    monkeypatch.setattr(fsdp, "sum_over_ranks", peers.sum)
    found = peers.run(steps, *((rank, size, aggregation) for rank in ranks))
    assert len(expected) == 2
    for minibatch, parts in zip(expected, zip(*found, strict=True), strict=True):
        metrics, *gradients = zip(*parts, strict=True)
        summed = {name: sum(part[name] for part in metrics) for name in METRICS}
        assert_same((summed, *(sum(x) / world for x in gradients)), minibatch)  # FSDP averages
