"""Every row of FILTERS against the paper's table; ties; users' own filters."""

import math

from pfppo.config import UserError
from pfppo.filters import FILTERS, kept_per_prompt, load_filter

import pytest
import torch

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
]
KEPT = {  # of five samples, one for `single`; None: it varies
    **{"single": 1, "none": 5, "best_of_n": 1, "best_random": 2, "best_worst": 2},
    **{"top": None, "top_random": None, "top_bottom": None, "pow_1": 5, "pow_2": 5, "pow_3": 5},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(name, rewards, seed=0):
    return load_filter(name, rewards.shape[1])(rewards, generator(seed))


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


@pytest.mark.parametrize("samples", [2, 3, 5, 8])
def test_best_random_keeps_exactly_the_best_and_one_other_at_weight_1(samples):
    rewards = normal(500, samples)
    weights = weights_of("best_random", rewards)
    assert (weights.gather(1, rewards.argmax(1)[:, None]) == 1).all()
    assert (weights.sum(1) == 2).all() and set(weights.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("samples", [2, 3, 5, 8])
def test_best_worst_keeps_exactly_the_best_and_the_worst_at_weight_1(samples):
    rewards = normal(100, samples)
    expected = torch.zeros(100, samples)
    expected[range(100), rewards.argmax(1)] = 1
    expected[range(100), rewards.argmin(1)] = 1
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
    assert torch.equal(weights_of(name, rewards)[:, order], weights_of(name, rewards[:, order]))


@pytest.mark.parametrize("name", FILTERS)
def test_equal_generators_give_equal_weights_and_nothing_else_is_drawn_from(name):
    rewards = torch.randint(-1, 2, (50, samples_for(name)), generator=generator()).float()
    state = torch.get_rng_state()
    first = weights_of(name, rewards, seed=7)
    torch.manual_seed(123)  # the global state plays no part
    second = weights_of(name, rewards, seed=7)
    torch.set_rng_state(state)
    assert torch.equal(first, second)
    weights_of(name, rewards, seed=8)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["best_random", "top_random"])
def test_another_generator_state_draws_other_samples(name):
    assert not torch.equal(weights_of(name, normal(50), 1), weights_of(name, normal(50), 2))


@pytest.mark.parametrize("name", ["single", "none", "best_of_n"])
def test_one_sample_per_prompt_is_kept(name):
    assert torch.equal(weights_of(name, normal(6, 1)), torch.ones(6, 1))


@pytest.mark.parametrize(
    "name, samples, needed",
    [
        ("single", 5, "needs exactly 1 sample per prompt, found 5"),
        ("best_random", 1, "needs at least 2 samples per prompt, found 1"),
        ("best_worst", 1, "needs at least 2 samples per prompt, found 1"),
    ],
)
@pytest.mark.parametrize(
    "option, size", [("filter", " --samples_per_prompt"), ("filters", ", N =")]
)
def test_a_number_of_samples_that_a_filter_cannot_use_is_refused(
    name, samples, needed, option, size
):
    with pytest.raises(UserError) as caught:
        load_filter(name, samples, option)
    assert str(caught.value) == f"--{option} {name}{size} {samples}: {needed}"


def test_the_table_has_the_rows_of_the_paper():
    assert list(FILTERS) == list(KEPT)


@pytest.mark.parametrize("name", FILTERS)
def test_the_number_kept_of_a_prompt_is_known_or_known_to_vary(name):
    samples = samples_for(name)
    assert kept_per_prompt(load_filter(name, samples), samples) == KEPT[name]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError) as caught:
        load_filter("best_rnadom", 5)
    message = str(caught.value)
    assert message.startswith("--filter best_rnadom: unknown") and "\n" not in message
    assert all(name in message for name in [*FILTERS, "module:function", "file.py:function"])


def load_own(folder, result):
    """A user's filter with that result, loaded for 3 samples."""
    path = folder / "mine.py"
    path.write_text(f"import torch\n\n\ndef own(rewards, generator):\n    return {result}\n")
    return load_filter(f"{path}:own", 3)


@pytest.mark.parametrize(
    "result, expected",
    [
        ("(rewards > 0) * 0.5", [0.5, 0, 0.5]),
        ("rewards > 0", [1, 0, 1]),
        ("(rewards > 0).long()", [1, 0, 1]),
        ("(rewards > 0).double()", [1, 0, 1]),
        ("rewards.relu_()", [1, 0, 2]),  # works in place
        ("rewards ** 2 * torch.ones(1, requires_grad=True)", [1, 1, 4]),
    ],
)
def test_a_filter_of_ones_own_gives_plain_weights_and_cannot_change_the_rewards(
    tmp_path, result, expected
):
    rewards = torch.tensor([[1.0, -1.0, 2.0]])
    weights = load_own(tmp_path, result)(rewards, generator())
    assert weights.tolist() == [expected] and rewards.tolist() == [[1, -1, 2]]
    assert weights.dtype == torch.float32 and not weights.requires_grad


@pytest.mark.parametrize(
    "result, expected",
    [
        ("rewards[:, :2]", r"shape \(., 3\), found a tensor of shape \(., 2\)"),
        ("rewards.sum(1)", r"shape \(., 3\), found a tensor of shape \(.,\)"),
        ("torch.ones(2, 3)", r"shape \(3, 3\), found a tensor of shape \(2, 3\)"),
        ("rewards.numpy() * 0 + 1", r"shape \(., 3\), found ndarray"),
        ("[[1.0, 1.0, 1.0]] * 2", r"shape \(., 3\), found .*list"),
        ("None", r"shape \(., 3\), found .*NoneType"),
        ("torch.full_like(rewards, -1.0)", "finite and >= 0"),
        ("torch.full_like(rewards, float('nan'))", "finite and >= 0"),
        ("torch.full_like(rewards, float('inf'))", "finite and >= 0"),
        ("(rewards - rewards.mean()) / rewards.std() * 0 + 1", "finite and >= 0"),  # if all equal
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("exit(0)", "SystemExit: 0"),
    ],
)
def test_nonsense_is_one_line_that_names_the_filter_before_and_during_a_run(
    tmp_path, result, expected
):
    named = f"^--filter {tmp_path}/mine.py:own --samples_per_prompt 3: .*"
    with pytest.raises(UserError, match=named + expected):
        load_own(tmp_path, result)
    chosen = load_own(tmp_path, f"rewards * 0 + 1 if rewards.max() < 90 else {result}")
    with pytest.raises(UserError, match=named + expected) as caught:
        chosen(torch.full((3, 3), 99.0), generator())
    assert "\n" not in str(caught.value)


def test_a_filter_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="^--filter .*none.py:own: there is no file"):
        load_filter(f"{tmp_path}/none.py:own", 3)
