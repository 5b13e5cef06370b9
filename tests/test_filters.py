"""Every row of FILTERS against the paper's table; ties."""

import math
from collections import Counter
from itertools import combinations, permutations

from pfppo.filters import FILTERS, kept_per_prompt, load_filter, made_up

import pytest
import torch
from ranks import refused

REWARDS = [0.1, 2.0, -1.5, 0.9, -0.2]  # best: column 1, worst: column 2
EQUAL = [0.0] * 5
SHARES = [  # of the kept mass per column of rewards: the paper's table (section 4, N = 5), and ties
    ("none", REWARDS, [1 / 5] * 5),
    ("best_of_n", REWARDS, [0, 1, 0, 0, 0]),
    ("best_random", REWARDS, [1 / 8, 1 / 2, 1 / 8, 1 / 8, 1 / 8]),
    ("best_worst", REWARDS, [0, 1 / 2, 1 / 2, 0, 0]),
    *((name, EQUAL, [1 / 5] * 5) for name in ("best_of_n", "best_random", "best_worst")),
    ("best_of_n", [1.0, 1.0, 0.0], [1 / 2, 1 / 2, 0]),
    ("best_worst", [1.0, 0.0, 0.0], [1 / 2, 1 / 4, 1 / 4]),
    ("random_two", REWARDS, [1 / 5] * 5),
    ("max_variance", [2.0, 1, 0, -1, -2], [1 / 3, 1 / 6, 0, 1 / 6, 1 / 3]),  # two choices alike
    ("max_variance", [1.0, 0, 0, 0, 0], [1 / 3, 1 / 6, 1 / 6, 1 / 6, 1 / 6]),
    ("large_advantage", [1.0, -1, -1, 1, 0], [1 / 4, 1 / 4, 1 / 4, 1 / 4, 0]),
    ("rank_weighted", EQUAL, [1 / 5] * 5),
]
KEPT = {  # of five samples, one for `single`; None: it varies
    **{"single": 1, "none": 5, "best_of_n": 1, "best_random": 2, "best_worst": 2},
    **{"top": None, "top_random": None, "top_bottom": None, "pow_1": 5, "pow_2": 5, "pow_3": 5},
    **{"random_two": 2, "best_random_ht": 2, "max_variance": 3, "large_advantage": 2},
    **{"informative": None, "reject": None, "finished_only": None, "rank_weighted": 4},
    "agreeing": None,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(name, rewards, seed=0):
    return load_filter(name, rewards.shape[1])(rewards, generator(seed), made_up(rewards))


def normal(prompts, samples=5):
    return torch.randn(prompts, samples, generator=generator())


def repeated(rewards, count):
    """The same prompt `count` times."""
    return torch.as_tensor(rewards, dtype=torch.float32).expand(count, -1)


def samples_for(name):
    return 1 if name == "single" else 5


@pytest.mark.parametrize("name, rewards, shares", SHARES)
def test_kept_mass_has_the_frequencies_of_the_paper_and_ties_break_evenly(name, rewards, shares):
    mass = weights_of(name, repeated(rewards, 8000)).sum(0)
    expected = torch.tensor(shares) * mass.sum()
    assert (mass[expected == 0] == 0).all()
    chi_square = ((mass - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_square < 18.5  # the 99.9 % quantile with 4 degrees of freedom


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_best_random_and_best_worst_keep_the_best_and_one_other_at_weight_1(samples):
    rewards, expected = normal(500, samples), torch.zeros(500, samples)
    weights = weights_of("best_random", rewards)
    assert (weights.gather(1, rewards.argmax(1)[:, None]) == 1).all()
    assert (weights.sum(1) == 2).all() and set(weights.unique().tolist()) <= {0.0, 1.0}
    for column in (rewards.argmax(1), rewards.argmin(1)):
        expected[range(500), column] = 1
    assert torch.equal(weights_of("best_worst", rewards), expected)


@pytest.mark.parametrize(
    "name, expected", [("top", [0, 1, 0, 0, 0, 0]), ("top_bottom", [0, 1, 0, 1, 0, 0])]
)
def test_thresholds_are_half_a_standard_deviation_and_rows_may_be_full_or_empty(name, expected):
    rewards = torch.tensor([[0.5, 0.51, -0.5, -0.51, 0.0, 0.4], [0.0] * 6, [9.0, 1, 2, 3, 0.6, 7]])
    assert weights_of(name, rewards).tolist() == [expected, [0] * 6, [1] * 6]


def test_top_random_keeps_the_top_and_half_of_the_others():
    weights = weights_of("top_random", repeated([0.6, 0.5, -4.0], 4000))
    assert (weights[:, 0] == 1).all()
    others = weights[:, 1:].sum(0)
    assert ((others - 2000).abs() < 4 * math.sqrt(1000)).all()  # four standard deviations
    both = (weights[:, 1] * weights[:, 2]).sum()
    assert abs(both - 1000) < 4 * math.sqrt(750)  # and they are drawn independently


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pow_k_weighs_by_the_power_of_the_reward_in_minus_1_to_1(k):
    rewards = [[0.0, 0.3, -0.3, 2.0, -10.0]]
    expected = [[abs(math.tanh(r / 2)) ** k for r in rewards[0]]]
    weights = weights_of(f"pow_{k}", torch.tensor(rewards))
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("name", [n for n in FILTERS if "random" not in n and n != "single"])
def test_a_filter_does_not_care_where_in_its_row_a_sample_stands(name):
    rewards, order = normal(20), torch.tensor([3, 0, 4, 2, 1])
    given = made_up(rewards)
    there = {key: values[:, order] for key, values in given.items()}
    here, there = (
        load_filter(name, 5)(x, generator(), other)
        for x, other in ((rewards, given), (rewards[:, order], there))
    )
    assert torch.equal(here[:, order], there)


@pytest.mark.parametrize("name", FILTERS)
def test_weights_are_drawn_from_the_given_generator_and_from_nothing_else(name):
    rewards = torch.randint(-1, 2, (50, samples_for(name)), generator=generator()).float()
    with torch.random.fork_rng(devices=[]):
        first = weights_of(name, rewards, seed=7)
        torch.manual_seed(123)  # the global state plays no part
        state = torch.get_rng_state()
        assert torch.equal(first, weights_of(name, rewards, seed=7))
        other = weights_of(name, rewards, seed=8)
        assert torch.equal(torch.get_rng_state(), state)
    assert "random" not in name or not torch.equal(first, other)


@pytest.fixture
def every_draw(monkeypatch):
    """(name, a prompt's rewards) -> its weights [outcomes, N] at every outcome of chance: all
    orders of the samples and all places of the other one, each as likely as any."""

    def weights(name, rewards):
        orders = list(permutations(range(len(rewards))))
        others, count = range(1, len(rewards)), len(orders)
        drawn = torch.tensor([order for order in orders for _ in others]).float()
        places = torch.tensor([[other] for _ in range(count) for other in others])
        monkeypatch.setattr(torch, "rand", lambda shape, generator: drawn)
        monkeypatch.setattr(torch, "randint", lambda low, high, shape, generator: places)
        return FILTERS[name](repeated(rewards, len(drawn)), None)

    return weights


def test_random_two_keeps_every_pair_equally_often(every_draw):
    rows = every_draw("random_two", [3.0, 1.0, 1.0, 2.0]).nonzero()[:, 1].view(-1, 2).tolist()
    assert Counter(map(tuple, rows)) == {pair: 72 / 6 for pair in combinations(range(4), 2)}


def test_best_random_ht_has_the_choices_of_best_random_and_the_expectation_1(every_draw):
    for rewards in ([0.1, 2.0, -1.5, 2.0], [0.1, 2.0, -1.5, 3.0], [1.0, 1.0, 1.0], [2.0, 1.0]):
        weights, N = every_draw("best_random_ht", rewards), len(rewards)
        assert torch.equal(weights > 0, every_draw("best_random", rewards) > 0)
        assert weights.double().mean(0).tolist() == [1] * N
        best = rewards.count(max(rewards))
        for row in weights.unique(dim=0):
            assert row.sum() == N and (row > 0).sum() == 2 and (N == 2 or row.max() == N - 1)
        assert len(weights.unique(dim=0)) == (best * (N - 1) if N > 2 else 1)


@pytest.mark.parametrize("name, kept", [("large_advantage", 2), ("max_variance", 3)])
def test_halves_that_are_equally_far_break_even_whatever_fp32_makes_of_the_rewards(name, kept):
    for i in range(60):
        mean, sd = 0.3 + i / 97, 0.4 + i / 89
        rewards = repeated([(x - mean) / sd for x in (1, 1, 1, 0, 0, 0)][i % 2 : 6 - i % 2], 400)
        high = weights_of(name, rewards)[:, : rewards.shape[1] // 2].sum()
        assert 0.4 < high / (400 * kept) < 0.6
    for turn in range(5):  # ties between steps that fp32 does not have, wherever a sample stands
        rewards = repeated([-0.3, -0.3, 0.1, 0.2, 0.2], 400).roll(turn, 1)
        low = (weights_of("max_variance", rewards) * (rewards < 0)).sum(1)
        assert 0.4 < (low - 1).mean() < 0.6  # {-.3, -.3, .2} or {-.3, .2, .2}


@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_max_variance_is_the_largest_of_all_choices_and_with_two_it_is_best_worst(m):
    rewards = normal(200)
    weights = FILTERS["max_variance"].func(rewards, generator(), m)
    assert (weights.sum(1) == m).all()
    choices = torch.tensor(list(combinations(range(5), m)))
    largest = choices[rewards[:, choices].var(2).argmax(1)]
    assert torch.equal(weights, torch.zeros(200, 5).scatter(1, largest, 1.0))
    assert m > 2 or torch.equal(weights, weights_of("best_worst", rewards))


def test_large_advantage_keeps_those_furthest_from_their_prompts_mean():
    rewards = normal(200)
    distance = ((rewards - rewards.mean(1, True)) / rewards.std(1, keepdim=True)).abs()
    choices = torch.tensor(list(combinations(range(5), 2)))
    furthest = choices[distance[:, choices].sum(2).argmax(1)]
    expected = torch.zeros(200, 5).scatter(1, furthest, 1.0)
    assert torch.equal(weights_of("large_advantage", rewards), expected)


def test_prompts_that_teach_nothing_are_dropped_by_rewards_or_by_scores():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [3.0, 2, 1]])
    assert weights_of("informative", rewards).sum(1).tolist() == [0, 3, 3]
    for code in range(8):  # all verdicts on three samples
        scores = torch.tensor([[float(code >> i & 1) for i in range(3)]])
        weights = load_filter("reject", 3)(rewards[:1], generator(), {"scores": scores})
        assert weights.tolist() == [[float(0 < code < 7)] * 3]
        finished = {"finished": scores > 0}
        weights = load_filter("finished_only", 3)(rewards[:1], generator(), finished)
        assert torch.equal(weights, scores)


@pytest.mark.parametrize("samples", [2, 3, 4, 5])
def test_rank_weighted_falls_to_the_middle_rank(samples):
    rewards = normal(50, samples)
    ranks = torch.tensor([[sum(x > y for x in row) for y in row] for row in rewards])
    expected = (ranks * 2 / (samples - 1) - 1).abs()
    torch.testing.assert_close(weights_of("rank_weighted", rewards), expected)


def test_agreeing_keeps_advantages_whose_mean_over_models_is_beyond_their_deviation():
    members = torch.randn(40, 3, 4, generator=generator()).round(decimals=1) + torch.arange(4)
    weights = load_filter("agreeing", 3)(members.mean(2), generator(), {"members": members})
    for prompt, row in zip(members.double(), weights, strict=True):
        for sample in range(3):
            advantages = [(prompt[sample, k] - prompt[:, k].mean()).item() for k in range(4)]
            mean = sum(advantages) / 4
            sd = (sum((x - mean) ** 2 for x in advantages) / 3) ** 0.5
            assert row[sample] == (abs(mean) > sd) or abs(abs(mean) - sd) < 1e-6
    assert 0.1 < weights.mean() < 0.9


@pytest.mark.parametrize("name", ["single", "none", "best_of_n"])
def test_one_sample_per_prompt_is_kept(name):
    assert torch.equal(weights_of(name, normal(6, 1)), torch.ones(6, 1))


@pytest.mark.parametrize(
    "name, samples, needed",
    [
        ("single", 5, "exactly 1 sample"),
        ("best_random", 1, "at least 2 samples"),
        ("best_worst", 1, "at least 2 samples"),
        ("informative", 1, "at least 2 samples"),
        ("reject", 1, "at least 2 samples"),
        ("agreeing", 1, "at least 2 samples"),
    ],
)
def test_a_number_of_samples_that_a_filter_cannot_use_is_refused(name, samples, needed):
    for option, size in (("filter", " --samples_per_prompt"), ("filters", ", N =")):
        wanted = f"needs {needed} per prompt, found {samples}"
        message = refused(load_filter, name, samples, option)
        assert message == f"--{option} {name}{size} {samples}: {wanted}"


def test_the_table_has_the_rows_of_the_paper_and_those_of_others():
    assert list(FILTERS) == list(KEPT)


@pytest.mark.parametrize("name", FILTERS)
def test_the_number_kept_of_a_prompt_is_known_or_known_to_vary(name):
    samples = samples_for(name)
    assert kept_per_prompt(load_filter(name, samples), samples) == KEPT[name]


def test_an_unknown_name_lists_the_known_ones():
    message = refused(load_filter, "best_rnadom", 5)
    assert message.startswith("--filter best_rnadom: unknown")
    assert all(name in message for name in [*FILTERS, "module:function", "file.py:function"])


@pytest.mark.parametrize("samples", range(3, 16))
def test_rank_weighted_drops_the_middle_one_of_an_odd_number_and_nothing_else(samples):
    kept = kept_per_prompt(load_filter("rank_weighted", samples), samples)
    assert kept == samples - samples % 2
