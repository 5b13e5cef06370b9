"""The slot: which samples PPO learns from. This is all that PF-PPO adds to PPO (paper, section 4).

For each prompt the policy answers N times and the reward model (RM) scores the answers. A filter
turns the scores into weights, both [P, N], one row per prompt:

    0 drops the sample, 1 keeps it, anything else multiplies its policy *and* value loss.

What is kept is a sample of the filtered policy mu; PPO then runs on it as if pi had produced it,
without importance correction. Rewards are normalised: mean 0, standard deviation 1 over the samples
of the SFT policy, so thresholds are in standard deviations. Ties break at random: a filter draws
from the generator it is given and from nowhere else.

What else a filter wants to know it gets by the name of a parameter, one of `GIVEN`; one that asks
for nothing gets nothing. A row that reads scores knows the truth: tables mark it *oracle*.

Rank filters keep the same number in every row. Threshold filters may empty a row: that prompt then
teaches nothing in this step.

The paper says what is kept on average, 2 of 5, not how; here `best_random` and `best_worst` keep
exactly two. `pow_k` is drawn with replacement in the paper; here the weight is the expectation of
that draw: the same gradient on average, with less noise.
"""

import inspect
from difflib import get_close_matches
from functools import partial

from pfppo.config import UserError, load_function, own_reason, parts, require

import torch

GIVEN = {  # what a filter may ask for, of the samples [P, N] that the rewards are of
    "scores": "actual scores, 1 right, 0 wrong",
    "lengths": "tokens of the responses",
    "finished": "bools: ends with EOS, was not cut off",
    "logp": "the sampler's log-probs of the responses",
    "members": "[P, N, K] rewards by each of several --reward_model",
}
# How many of each there are of a sample where nobody says how many reward models: K for members.
KNOWN = dict.fromkeys(GIVEN, 1) | {"members": 2}


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


def _exact(rewards):
    """Rewards as whole numbers, 0 to 2^20 over their prompt's range: sums and squares of a few are
    exact, so what is equal but for fp32's last bits is equal, and ties break at random."""
    low, high = rewards.double().aminmax(dim=1, keepdim=True)
    return ((rewards - low) / (high - low).clamp(min=1e-30) * 2**20).round()


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


def _best_and_other(rewards, generator):
    """Columns [P, 2] of the best, and of one of the others at random."""
    _need(rewards, 2)
    order = ranking(rewards, generator)
    prompts, samples = rewards.shape
    other = torch.randint(1, samples, (prompts, 1), generator=generator)
    return torch.cat([order[:, :1], order.gather(1, other)], dim=1)


def best_random(rewards, generator):
    """BR, w = (1/2, 1/(2(N-1)), ...): the best, and one of the others at random."""
    return _keep(rewards, _best_and_other(rewards, generator))


def best_worst(rewards, generator):
    """BW, w = (1/2, 0, ..., 0, 1/2): the best and the worst."""
    _need(rewards, 2)
    return _keep(rewards, ranking(rewards, generator)[:, [0, -1]])


def random_two(rewards, generator):
    """Two at random: what BR and BW would be if the choice did not matter. A control."""
    _need(rewards, 2)
    return _keep(rewards, torch.rand(rewards.shape, generator=generator).argsort(dim=1)[:, :2])


def best_random_ht(rewards, generator):
    """BR without its shift: the best weighs 1, the other one, which is drawn with probability
    1 / (N - 1), N - 1, so that every sample has the expectation 1 (Horvitz and Thompson, 1952; cf.
    arXiv 2603.04135)."""
    columns = _best_and_other(rewards, generator)
    weights = torch.tensor([1.0, rewards.shape[1] - 1]).expand(columns.shape)
    return torch.zeros_like(rewards).scatter(1, columns, weights.to(rewards.dtype))


def max_variance(rewards, generator, m):
    """The m samples whose rewards have the largest variance: some of the best and some of the worst
    (PODS, arXiv 2504.13818). With m = 2 it is BW."""
    _need(rewards, m)
    order, N = ranking(rewards, generator), rewards.shape[1]
    choices = [[*range(i), *range(N - m + i, N)] for i in range(m + 1)]  # places in the order
    best_first = _exact(rewards).gather(1, order)
    chosen = [best_first[:, places] for places in choices]
    spread = [m * (x**2).sum(1) - x.sum(1) ** 2 for x in chosen]  # m^2 variances
    widest = ranking(torch.stack(spread, 1), generator)[:, 0]
    return _keep(rewards, order.gather(1, torch.tensor(choices)[widest]))


def large_advantage(rewards, generator, k):
    """The k samples furthest from their prompt's mean reward (CPPO, arXiv 2503.22342; dividing by
    the prompt's standard deviation changes no rank)."""
    _need(rewards, k)
    x = _exact(rewards)
    distance = (rewards.shape[1] * x - x.sum(1, keepdim=True)).abs()
    return _keep(rewards, ranking(distance, generator)[:, :k])


def informative(rewards, generator):
    """All samples of the prompts whose rewards differ (DAPO's dynamic sampling by rewards in place
    of scores, arXiv 2503.14476, section 3.2; --refill draws more prompts)."""
    return _whole(rewards, rewards)


def reject(rewards, generator, scores):
    """An oracle: all samples but those of prompts that are answered all right or all wrong
    (Reinforce-Rej, arXiv 2504.11343)."""
    return _whole(rewards, scores)


def _whole(rewards, values):
    """Weight 1 in the rows whose values differ."""
    _need(rewards, 2)
    return torch.ones_like(rewards) * (values.amax(1, True) > values.amin(1, True))


def finished_only(rewards, generator, finished):
    """Samples that were not cut off (overlong filtering: DAPO, arXiv 2503.14476, section 3.4)."""
    return finished.to(rewards.dtype)


def rank_weighted(rewards, generator):
    """Ours: BW made soft. Weights fall from 1 at the best and the worst to 0 at the middle rank."""
    _need(rewards, 2)
    last = rewards.shape[1] - 1
    weights = ((2 * torch.arange(last + 1) - last).abs() / last).expand(rewards.shape)
    return torch.zeros_like(rewards).scatter(1, ranking(rewards, generator), weights)


def agreeing(rewards, generator, members, above=1.0):
    """Samples on whose advantage the reward models agree: where the mean of their K rewards, each
    less its mean over the prompt, is more than `above` standard deviations (over K) from 0. Ours;
    cf. the ensembles of arXiv 2310.02743, which correct the reward instead."""
    _need(rewards, 2)
    if members.shape[2] < 2:
        raise ValueError("needs at least 2 reward models, found 1")
    advantages = members - members.mean(1, keepdim=True)
    return (advantages.mean(2).abs() > above * advantages.std(2)).to(rewards.dtype)


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


LARGEST = 1e30  # of a weight

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
    "random_two": random_two,
    "best_random_ht": best_random_ht,
    "max_variance": partial(max_variance, m=3),
    "large_advantage": partial(large_advantage, k=2),
    "informative": informative,
    "reject": reject,
    "finished_only": finished_only,
    "rank_weighted": rank_weighted,
    "agreeing": agreeing,
}


class Filter:
    """A filter that is checked: rewards [P, N], generator, {name: tensor} -> weights [P, N]. Raises
    UserError wherever it fails, or gives nonsense.

    known: what it will be given, {name: how many of it for a sample}. asks: the parameters of the
    function that are in GIVEN, without those that have a default and are not known.
    """

    def __init__(self, spec, function, option, known=KNOWN):
        self.spec, self.function, self.option, self.known = spec, function, option, known
        try:
            parameters = [*inspect.signature(function).parameters.values()]
        except ValueError:  # of functions in C
            parameters = []
        early = [p.name for p in parameters[:2] if p.name in GIVEN and p.kind != p.KEYWORD_ONLY]
        first = f"expected rewards and generator first, found {', '.join(early)}"
        require(not early, f"--{option} {spec}: {first}")
        named = [p for p in parameters[2:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        asks = [p for p in named if p.name in GIVEN and (p.name in known or p.default is p.empty)]
        self.asks = [p.name for p in asks]
        for p in named:
            # A default may be its own affair, or that of a name that is misspelt.
            own = p.default is not p.empty and not get_close_matches(p.name, GIVEN, cutoff=0.8)
            unknown = f"asks for {p.name!r}, expected some of {', '.join(GIVEN)}"
            require(p.name in GIVEN or own, f"--{option} {spec}: {unknown}")
        for name in self.asks:
            missing = f"asks for {name} ({GIVEN[name]}), which are not known here"
            require(name in known, f"--{option} {spec}: {missing}")

    @property
    def label(self):
        """Its name in tables."""
        return f"{self.spec} (oracle)" if "scores" in self.asks else self.spec

    def __call__(self, rewards, generator, given=None):
        sizes = " --samples_per_prompt" if self.option == "filter" else ", N ="
        where, shape = f"--{self.option} {self.spec}{sizes} {rewards.shape[1]}", rewards.shape
        for name in self.asks:
            require(name in given, f"{where}: asks for {name}, which these samples have not")
        given = {name: given[name].clone() for name in self.asks}
        weights = torch.empty_like(rewards)  # nobody else's memory
        try:
            found = self.function(rewards.clone(), generator, **given)  # it may work in place
            size = tuple(found.shape) if isinstance(found, torch.Tensor) else None
            if right := size == shape and not found.is_complex():
                weights.copy_(found.detach())
        except (Exception, SystemExit) as error:
            why = str(error) if type(error) is ValueError else own_reason(error)
            raise UserError(f"{where}: {why}") from error
        kind = type(found).__name__ if size is None else f"a tensor of shape {size}, {found.dtype}"
        require(right, f"{where}: expected weights, a tensor of shape {tuple(shape)}, found {kind}")
        fits = ((weights >= 0) & (weights <= LARGEST)).all()  # losses add them, in float32
        require(fits, f"{where}: expected weights that are finite and >= 0, at most {LARGEST:g}")
        return weights


def load_filter(spec, samples, option="filter", known=KNOWN):
    """The Filter of that name or place, tried on random rewards and on equal ones. Raises UserError
    where it is unknown, asks for what is not `known`, or fails."""
    chosen = Filter(spec, load_function(spec, option, FILTERS), option, known)
    generator = torch.Generator().manual_seed(0)
    for rewards in (torch.randn(2, samples, generator=generator), torch.zeros(3, samples)):
        chosen(rewards, generator, made_up(rewards, chosen.known))
    return chosen


def reads_scores(spec):
    """Whether a filter is an oracle. Raises UserError where it cannot be loaded."""
    return "scores" in Filter(spec, load_function(spec, "filter", FILTERS), "filter").asks


def usable(known):
    """Names of FILTERS that ask for nothing but what is known."""
    return [name for name in FILTERS if {*Filter(name, FILTERS[name], "filter").asks} <= {*known}]


def known_to(reward_models):
    """{name: how many of it for a sample} of what a run with this --reward_model can give."""
    known = KNOWN | {"members": len(parts(reward_models))}
    return {name: count for name, count in known.items() if name != "members" or count > 1}


def made_up(rewards, known=KNOWN):
    """What a filter may ask for, of samples that are not there: to try it on."""
    lengths = (rewards * 8).round().abs().long() + 1
    K = known.get("members", KNOWN["members"])
    members = torch.stack([rewards.roll(k, 0) for k in range(K)], 2)  # as of other prompts
    given = (rewards > 0).float(), lengths, lengths < 8, -lengths.float(), members
    return dict(zip(GIVEN, given, strict=True))


def kept_per_prompt(chosen, samples):
    """How many samples a filter keeps of each prompt; None where that depends on the rewards, or on
    the call: one that draws once for all prompts may keep nothing now and all of them later."""
    generator, found = torch.Generator().manual_seed(0), set()
    for std in [1] * 16 + [10]:
        if std > 1 and found != {0}:  # large rewards are for a filter that waits for them
            continue
        rewards = std * torch.randn(16, samples, generator=generator)
        rewards = torch.cat([rewards, torch.ones(2, samples)])
        weights = chosen(rewards, generator, made_up(rewards, chosen.known))
        found |= {*(weights > 0).sum(1).tolist()}
    return found.pop() if len(found) == 1 else None
