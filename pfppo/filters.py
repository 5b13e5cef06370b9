"""The slot: which samples PPO learns from. This is all that PF-PPO adds to PPO (paper, section 4).

For each prompt the policy answers N times and the reward model (RM) scores the answers. A filter
turns the scores into weights, both [P, N], one row per prompt:

    0 drops the sample, 1 keeps it, anything else multiplies its policy *and* value loss.

What is kept is a sample of the filtered policy mu; PPO then runs on it as if pi had produced it,
without importance correction. Rewards are normalised: mean 0, standard deviation 1 over the samples
of the SFT policy, so thresholds are in standard deviations. Ties break at random: a filter draws
from the generator it is given and from nowhere else.

Rank filters keep the same number in every row. Threshold filters may empty a row: that prompt then
teaches nothing in this step.

The paper says what is kept on average, 2 of 5, not how; here `best_random` and `best_worst` keep
exactly two. `pow_k` is drawn with replacement in the paper; here the weight is the expectation of
that draw: the same gradient on average, with less noise.
"""

from functools import partial

from pfppo.config import UserError, load_function, reason, require

import torch


def ranking(rewards, generator):
    """Column indices [P, N] from the best reward to the worst; equal rewards in random order."""
    shuffled = torch.rand(rewards.shape, generator=generator).argsort(dim=1)
    order = rewards.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, order)


def _keep(rewards, columns):
    """Weight 1 at `columns` [P, K], 0 elsewhere."""
    return torch.zeros_like(rewards).scatter(1, columns, 1.0)


def _need(rewards, samples):
    if rewards.shape[1] < samples:
        raise ValueError(f"needs at least {samples} samples per prompt, found {rewards.shape[1]}")


def keep_all(rewards, generator):
    """PPO-M: every sample. PPO-S is the same with N = 1 and more prompts."""
    return torch.ones_like(rewards)


def single(rewards, generator):
    """PPO-S: one response per prompt, so there is nothing to choose from."""
    if rewards.shape[1] != 1:
        raise ValueError(f"needs exactly 1 sample per prompt, found {rewards.shape[1]}")
    return torch.ones_like(rewards)


def best_of_n(rewards, generator):
    """BoN, w = (1, 0, ..., 0): only the best. Nothing bad is left to learn from."""
    return _keep(rewards, ranking(rewards, generator)[:, :1])


def best_random(rewards, generator):
    """BR, w = (1/2, 1/(2(N-1)), ...): the best, and one of the others at random."""
    _need(rewards, 2)
    order = ranking(rewards, generator)
    prompts, samples = rewards.shape
    other = torch.randint(1, samples, (prompts, 1), generator=generator)
    return _keep(rewards, torch.cat([order[:, :1], order.gather(1, other)], dim=1))


def best_worst(rewards, generator):
    """BW, w = (1/2, 0, ..., 0, 1/2): the best and the worst."""
    _need(rewards, 2)
    return _keep(rewards, ranking(rewards, generator)[:, [0, -1]])


def threshold(rewards, generator, above=0.5, below=float("-inf"), others=0.0):
    """Keep rewards above one threshold or below another, each other sample with a probability."""
    sure = (rewards > above) | (rewards < below)
    lucky = torch.rand(rewards.shape, generator=generator) < others
    return (sure | lucky).to(rewards.dtype)


def power(rewards, generator, k):
    """Weight |R|^k with R = tanh(r / 2) in [-1, 1].

    (1 + R) / 2 is the Bradley-Terry probability of beating an average response, so R is the RM's
    own opinion on the scale that the paper asks for. The scale of the weights does not matter:
    losses divide by their sum.
    """
    return torch.tanh(rewards / 2).abs() ** k


FILTERS = {
    "single": single,
    "none": keep_all,
    "best_of_n": best_of_n,
    "best_random": best_random,
    "best_worst": best_worst,
    "top": partial(threshold, above=0.5),
    "top_random": partial(threshold, above=0.5, others=0.5),
    "top_bottom": partial(threshold, above=0.5, below=-0.5),
    "pow_1": partial(power, k=1),
    "pow_2": partial(power, k=2),
    "pow_3": partial(power, k=3),
}


def load_filter(spec, samples, option="filter"):
    """The filter of that name or place: rewards [P, N], generator -> weights [P, N], checked.

    It is tried on random rewards and on equal ones. Raises UserError, now and whenever it is
    applied, where it is unknown, fails, or gives nonsense.
    """
    chosen = load_function(spec, option, FILTERS)

    def checked(rewards, generator):
        sizes = " --samples_per_prompt" if option == "filter" else ", N ="
        where, shape = f"--{option} {spec}{sizes} {rewards.shape[1]}", tuple(rewards.shape)
        try:
            weights = chosen(rewards.clone(), generator)  # a user's filter may work in place
        except (Exception, SystemExit) as error:
            why = str(error) if type(error) is ValueError else reason(error)
            raise UserError(f"{where}: {why}") from error
        size = tuple(weights.shape) if isinstance(weights, torch.Tensor) else None
        kind = type(weights).__name__ if size is None else f"a tensor of shape {size}"
        expected = f"expected weights, a tensor of shape {shape}, found {kind}"
        require(size == shape, f"{where}: {expected}")
        weights = weights.detach().to(rewards.dtype)
        fits = torch.isfinite(weights).all() and (weights >= 0).all()
        require(fits, f"{where}: expected weights that are finite and >= 0")
        return weights

    generator = torch.Generator().manual_seed(0)
    for rewards in (torch.randn(2, samples, generator=generator), torch.zeros(3, samples)):
        checked(rewards, generator)
    return checked


def kept_per_prompt(chosen, samples):
    """How many samples a filter keeps of each prompt; None where that depends on the rewards."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(256, samples, generator=generator)
    counts = (chosen(rewards, generator) > 0).sum(1).unique()
    return int(counts) if len(counts) == 1 else None
