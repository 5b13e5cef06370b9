"""PPO's mathematics: token rewards, KL estimators, GAE, whitening, clipped losses. Pure functions.

`advantages` is step 5 of the algorithm and `losses` step 6, put together of the functions above
them. Everything is aligned to responses: column j of a [B, T] tensor belongs to the j-th response
token, and `mask` [B, T] is 1 on response tokens (rollout.py). Sums over a batch that is spread over
ranks go through `reduce`, a function that sums a tensor over all ranks; by default there is one.

Losses are sums over rows and tokens of c_it * loss_it, whose coefficients have one *global*
denominator (`loss_coefficients`): so microbatches, padding and the number of ranks leave the
gradient unchanged.

Not covered: which samples are learned from (filters.py), the forward passes (model.py).
"""

import torch

LOG_RATIO_LIMIT = 20.0  # exp(20) is still finite in fp32, and long clipped


def _same(tensor):
    return tensor


def kl_k1(logp, ref_logp):
    """k1 = log pi - log ref, [B, T]: unbiased, may be negative (Schulman, "Approximating KL")."""
    return logp - ref_logp


def kl_k3(logp, ref_logp):
    """k3 = r - 1 - log r with r = ref / pi, [B, T]: unbiased, never negative, less variance."""
    log_ratio = (ref_logp - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - 1 - log_ratio


def token_rewards(rewards, kl, mask, beta):
    """Paper, eq. 4: -beta * kl at every response token, the reward [B] added at the last one.

    kl, mask [B, T] -> [B, T]. A row of length 0 gets nothing.
    """
    lengths = mask.sum(1).long()
    at_last = torch.arange(mask.shape[1], device=mask.device) == lengths[:, None] - 1  # [B, T]
    return (-beta * kl) * mask + rewards[:, None] * at_last


def gae(token_rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16). All [B, T].

    values[:, j] is the value of the state before token j; after the last token it is 0 (the episode
    ends, truncated or not). Returns (advantages, returns), both 0 off the mask.
    """
    values = values * mask
    adv = torch.zeros_like(values)
    following_adv = torch.zeros_like(values[:, 0])
    following_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * following_value - values[:, t]
        following_adv = (delta + gamma * lam * following_adv) * mask[:, t]
        following_value = values[:, t]
        adv[:, t] = following_adv
    return adv, (adv + values) * mask


def weighted_mean(x, weights, reduce=_same):
    """sum(x * weights) / sum(weights) over all ranks; 0 where the weights sum to 0. Scalar."""
    x, weights = x[weights > 0], weights[weights > 0]  # so that padding cannot change a bit
    sums = reduce(torch.stack([(x * weights).sum(), weights.sum()]).double())
    return (sums[0] / sums[1]).to(x.dtype) if sums[1] > 0 else torch.zeros_like(x.sum())


def whiten(x, weights, reduce=_same, eps=1e-8):
    """x [B, T] shifted and scaled to weighted mean 0 and variance 1 over the global batch.

    weights [B, T] >= 0, 0 off the mask; the result is 0 where they are 0.
    """
    mean = weighted_mean(x, weights, reduce)
    variance = weighted_mean((x - mean) ** 2, weights, reduce)
    return (x - mean) * (variance + eps).rsqrt() * (weights > 0)


def advantages(rows, beta, gamma=1.0, lam=0.95, reduce=_same):
    """Step 5. (advantages, returns), both [B, T], of a Rollout with rewards, weights, old_logp,
    ref_logp and old_values.

    Advantages are whitened over all that is kept in this step, on all ranks: over its response
    tokens, each with the filter's weight of its row. Returns are not.
    """
    kl = kl_k1(rows.old_logp, rows.ref_logp)
    rewards = token_rewards(rows.rewards, kl, rows.mask, beta)
    adv, returns = gae(rewards, rows.old_values, rows.mask, gamma, lam)
    return whiten(adv, rows.mask * rows.weights[:, None], reduce), returns


def loss_coefficients(mask, weights, aggregation="sequence_mean", minibatches=1, reduce=_same):
    """Coefficients c [B, T] of both losses, where the filter's weights [B] enter.

    sequence_mean: c ~ weight / length on the mask, so every response counts alike.
    token_mean:    c ~ weight on the mask, so every token counts alike.

    They sum to the number of minibatches over all that is kept in a step, on all ranks: to 1 on
    average over a minibatch, so that one with much weight moves the policy further than one with
    little.
    """
    if aggregation == "sequence_mean":
        weights = weights / mask.sum(1).clamp(min=1)
    elif aggregation != "token_mean":
        raise ValueError(f"expected sequence_mean or token_mean, found {aggregation!r}")
    coefficients = mask * weights[:, None]
    return coefficients * (minibatches / reduce(coefficients.sum()))


def policy_loss(logp, old_logp, adv, coefficients, clip=0.2):
    """Clipped surrogate (arXiv 1707.06347, eq. 7). All [B, T].

    Returns (loss, metrics): scalars, each a sum over tokens, to be added over microbatches and
    ranks. approx_kl is k3 of the update; ratio_sum / tokens is exactly 1 in the first minibatch.
    """
    log_ratio = (logp - old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    unclipped = -adv * ratio
    clipped = -adv * ratio.clamp(1 - clip, 1 + clip)
    loss = (torch.maximum(unclipped, clipped) * coefficients).sum()
    with torch.no_grad():
        metrics = {
            "policy_loss": loss.detach(),
            "clip_fraction": ((clipped > unclipped) * coefficients).sum(),
            "approx_kl": ((ratio - 1 - log_ratio) * coefficients).sum(),
            "ratio_sum": (ratio * (coefficients > 0)).sum(),
            "tokens": (coefficients > 0).sum().to(loss.dtype),
        }
    return loss, metrics


def value_loss(values, old_values, returns, coefficients, clip=0.2):
    """1/2 max((V - R)^2, (clip(V) - R)^2), V clipped around old values. All [B, T].

    Returns (loss, metrics), summed like `policy_loss`.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    squared = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    loss = 0.5 * (squared * coefficients).sum()
    return loss, {"value_loss": loss.detach()}


def losses(name, output, rows, clip=0.2, value_clip=0.2):
    """Step 6. (loss, metrics) of one model's output for a Rollout with old numbers, advantages and
    coefficients: of the "actor" (log-probs, entropy), of the "critic" values, all [B, T]."""
    if name == "actor":
        logp, _ = output
        return policy_loss(logp, rows.old_logp, rows.adv, rows.coefficients, clip)
    return value_loss(output, rows.old_values, rows.returns, rows.coefficients, value_clip)


def explained_variance(values, returns, weights, reduce=_same):
    """1 - Var(returns - values) / Var(returns), weighted, global; NaN if constant."""
    errors = returns - values
    residual = (errors - weighted_mean(errors, weights, reduce)) ** 2
    spread = (returns - weighted_mean(returns, weights, reduce)) ** 2
    total = weighted_mean(spread, weights, reduce)
    constant = total <= 1e-12 * weighted_mean(returns**2, weights, reduce)
    explained = 1 - weighted_mean(residual, weights, reduce) / total
    return explained.masked_fill(constant, float("nan"))


def adapted_kl_coef(beta, kl, target, samples, horizon=10_000):
    """The adaptive controller of arXiv 1909.08593, section 2.2: beta grows while kl > target.

    kl and target are sums over a response (nats), `samples` the number of responses in the step.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * samples / horizon)
