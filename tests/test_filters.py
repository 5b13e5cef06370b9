"""Every row of FILTERS against the paper's table; ties; user's own filters."""

import math

from pfppo.config import UserError
from pfppo.filters import FILTERS, apply_filter, kept_per_prompt, load_filter

import pytest
import torch

REWARDS = torch.tensor([0.1, 2.0, -1.5, 0.9, -0.2])  # best: column 1, worst: column 2
PAPER = {  # share of the kept mass per column of REWARDS (paper, section 4, N = 5)
    "none": [1 / 5] * 5,
    "best_of_n": [0, 1, 0, 0, 0],
    "best_random": [1 / 8, 1 / 2, 1 / 8, 1 / 8, 1 / 8],
    "best_worst": [0, 1 / 2, 1 / 2, 0, 0],
}
KEPT = {"single": 1, "none": 5, "best_of_n": 1, "best_random": 2, "best_worst": 2}
KEPT |= {"pow_1": 5, "pow_2": 5, "pow_3": 5}
VARYING = ("top", "top_random", "top_bottom")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(name, rewards, seed=0):
    return apply_filter(FILTERS[name], rewards, generator(seed))


def rows(rewards, count):
    """The same prompt `count` times."""
    return torch.as_tensor(rewards, dtype=torch.float32).expand(count, -1)


def samples_for(name):
    return 1 if name == "single" else 5


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum().item()


def test_the_table_has_the_rows_of_the_paper():
    assert list(FILTERS) == [
        *("single", "none", "best_of_n", "best_random", "best_worst"),
        *("top", "top_random", "top_bottom", "pow_1", "pow_2", "pow_3"),
    ]


@pytest.mark.parametrize("name", PAPER)
def test_kept_mass_has_the_frequencies_of_the_paper(name):
    mass = weights_of(name, rows(REWARDS, 8000)).sum(0)
    expected = torch.tensor(PAPER[name]) * mass.sum()
    never = expected == 0
    assert (mass[never] == 0).all()
    # The 99.9 % quantile of chi-square with at most 4 degrees of freedom is 18.5.
    assert chi_square(mass[~never], expected[~never]) < 18.5


@pytest.mark.parametrize("samples", [2, 3, 5, 8])
@pytest.mark.parametrize("name", ["best_random", "best_worst"])
def test_exactly_two_are_kept_of_every_prompt_at_weight_1(name, samples):
    rewards = torch.randn(200, samples, generator=generator(samples))
    weights = weights_of(name, rewards)
    assert (weights.sum(1) == 2).all() and set(weights.unique().tolist()) <= {0.0, 1.0}


def test_best_random_always_keeps_the_best():
    rewards = torch.randn(500, 5, generator=generator(1))
    assert (weights_of("best_random", rewards).gather(1, rewards.argmax(1)[:, None]) == 1).all()


def test_best_worst_keeps_the_best_and_the_worst():
    rewards = torch.randn(100, 4, generator=generator(2))
    expected = torch.zeros(100, 4)
    expected[range(100), rewards.argmax(1)] = 1
    expected[range(100), rewards.argmin(1)] = 1
    assert torch.equal(weights_of("best_worst", rewards), expected)


def test_top_keeps_what_is_above_half_a_standard_deviation():
    rewards = torch.tensor([[0.5, 0.51, -3.0], [-0.6, 0.0, 0.4], [9.0, 1.0, 0.6]])
    expected = torch.tensor([[0.0, 1, 0], [0, 0, 0], [1, 1, 1]])
    assert torch.equal(weights_of("top", rewards), expected)


def test_top_bottom_keeps_both_ends():
    rewards = torch.tensor([[0.5, 0.51, -0.5, -0.51], [0.0, 0.1, -0.1, 0.4]])
    expected = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0]])
    assert torch.equal(weights_of("top_bottom", rewards), expected)


def test_top_random_keeps_the_top_and_half_of_the_others():
    weights = weights_of("top_random", rows([0.6, 0.5, -4.0], 4000))
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


@pytest.mark.parametrize(
    "name", ["none", "best_of_n", "best_worst", "top", "top_bottom", "pow_1", "pow_2", "pow_3"]
)
def test_a_filter_does_not_care_where_in_its_row_a_sample_stands(name):
    order = torch.tensor([3, 0, 4, 2, 1])
    rewards = torch.randn(20, 5, generator=generator(3))
    assert torch.equal(weights_of(name, rewards)[:, order], weights_of(name, rewards[:, order]))


# -------------------------------------------------------------------------------- ties and drawing


@pytest.mark.parametrize("name", ["best_of_n", "best_random", "best_worst"])
def test_between_equal_rewards_every_sample_is_equally_likely(name):
    counts = weights_of(name, torch.zeros(8000, 5)).sum(0)
    assert chi_square(counts, counts.sum() / 5) < 18.5


def test_the_best_of_two_equal_ones_is_drawn_and_the_worst_is_not():
    counts = weights_of("best_of_n", rows([1.0, 1.0, 0.0], 4000)).sum(0)
    assert counts[2] == 0 and abs(counts[0] - 2000) < 4 * math.sqrt(1000)


def test_the_worst_of_two_equal_ones_is_drawn():
    counts = weights_of("best_worst", rows([1.0, 0.0, 0.0], 4000)).sum(0)
    assert counts[0] == 4000 and abs(counts[1] - 2000) < 4 * math.sqrt(1000)


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
    rewards = torch.randn(50, 5, generator=generator())
    assert not torch.equal(weights_of(name, rewards, 1), weights_of(name, rewards, 2))


@pytest.mark.parametrize("name", FILTERS)
def test_rewards_are_left_as_they_were(name):
    rewards = torch.randn(10, samples_for(name), generator=generator())
    before = rewards.clone()
    weights_of(name, rewards)
    assert torch.equal(rewards, before)


# ------------------------------------------------------------------------------ numbers of samples


@pytest.mark.parametrize("name", ["single", "none", "best_of_n"])
def test_one_sample_per_prompt_is_kept(name):
    chosen = load_filter(name, 1)
    assert torch.equal(chosen(torch.randn(6, 1), generator()), torch.ones(6, 1))


@pytest.mark.parametrize("name", ["none", "best_random", "best_worst"])
def test_of_two_samples_both_are_kept(name):
    rewards = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    assert torch.equal(weights_of(name, rewards), torch.ones(2, 2))


@pytest.mark.parametrize(
    "name, samples, needed",
    [
        ("single", 5, "needs exactly 1 sample per prompt, found 5"),
        ("best_random", 1, "needs at least 2 samples per prompt, found 1"),
        ("best_worst", 1, "needs at least 2 samples per prompt, found 1"),
    ],
)
def test_a_number_of_samples_that_a_filter_cannot_use_is_refused(name, samples, needed):
    with pytest.raises(UserError) as caught:
        load_filter(name, samples)
    assert str(caught.value) == f"--filter {name} --samples_per_prompt {samples}: {needed}"


@pytest.mark.parametrize("name", FILTERS)
def test_the_number_kept_of_a_prompt_is_known_or_known_to_vary(name):
    found = kept_per_prompt(load_filter(name, samples_for(name)), samples_for(name))
    assert found == (None if name in VARYING else KEPT[name])


# ------------------------------------------------------------------------------ names and functions


@pytest.mark.parametrize("name", FILTERS)
def test_every_name_loads(name):
    rewards = torch.randn(4, samples_for(name), generator=generator(5))
    loaded = load_filter(name, samples_for(name))(rewards, generator(6))
    assert torch.equal(loaded, FILTERS[name](rewards, generator(6)))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError) as caught:
        load_filter("best_rnadom", 5)
    message = str(caught.value)
    assert message.startswith("--filter best_rnadom: unknown") and "\n" not in message
    assert all(name in message for name in [*FILTERS, "module:function", "file.py:function"])


OWN = "import torch\n\n\ndef own(rewards, generator):\n    return "


def test_a_filter_of_ones_own_is_taken_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN + "(rewards > 0) * 0.5\n")
    weights = apply_filter(load_filter(f"{path}:own", 3), torch.tensor([[1.0, -1, 2]]), generator())
    assert weights.tolist() == [[0.5, 0, 0.5]]


def test_a_filter_of_ones_own_is_taken_from_a_module(tmp_path, monkeypatch):
    (tmp_path / "filters_of_mine.py").write_text(OWN + "(rewards > 0) * 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_filter("filters_of_mine:own", 3)(torch.ones(1, 3), None).tolist() == [[0.5] * 3]


@pytest.mark.parametrize(
    "result, expected",
    [
        ("rewards[:, :2]", r"shape \(2, 3\), found a tensor of shape \(2, 2\)"),
        ("rewards.sum(1)", r"shape \(2, 3\), found a tensor of shape \(2,\)"),
        ("rewards.numpy() * 0 + 1", r"shape \(2, 3\), found ndarray"),
        ("exit(0)", "SystemExit: 0"),
        ("[[1.0, 1.0, 1.0]] * 2", r"shape \(2, 3\), found .*list"),
        ("None", r"shape \(2, 3\), found .*NoneType"),
        ("torch.full_like(rewards, -1.0)", "finite and >= 0"),
        ("torch.full_like(rewards, float('nan'))", "finite and >= 0"),
        ("torch.full_like(rewards, float('inf'))", "finite and >= 0"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("torch.ones(2, rewards.shape[1])", r"shape \(3, 3\), found a tensor of shape \(2, 3\)"),
        ("(rewards - rewards.mean()) / rewards.std() * 0 + 1", "finite and >= 0"),
    ],
)
def test_a_filter_that_gives_nonsense_is_refused_before_the_run(tmp_path, result, expected):
    path = tmp_path / "mine.py"
    path.write_text(f"{OWN}{result}\n")
    with pytest.raises(UserError, match=expected) as caught:
        load_filter(f"{path}:own", 3)
    assert str(caught.value).startswith(f"--filter {path}:own --samples_per_prompt 3: ")


def test_a_filter_that_fails_later_is_still_one_line_that_names_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"{OWN}rewards.new_ones(rewards.shape) if rewards.max() < 90 else [][0]\n")
    chosen = load_filter(f"{path}:own", 3)
    with pytest.raises(UserError, match="^--filter .*mine.py:own .*: IndexError: list index out"):
        chosen(torch.full((2, 3), 99.0), generator())


@pytest.mark.parametrize("place", ["none.py:own", "mine.py:other", "no_such_module_here:own"])
def test_a_filter_that_is_not_there_is_refused(tmp_path, place):
    (tmp_path / "mine.py").write_text(OWN + "rewards\n")
    place = f"{tmp_path}/{place}" if ".py" in place else place
    with pytest.raises(UserError, match="^--filter .*: "):
        load_filter(place, 3)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_nonsense_is_refused_during_the_run_too(bad):
    weights = torch.tensor([[1.0, bad]])
    with pytest.raises(ValueError, match="finite and >= 0"):
        apply_filter(lambda rewards, generator: weights, torch.zeros(1, 2), generator())


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
def test_weights_of_any_type_come_out_in_that_of_the_rewards(kind):
    weights = apply_filter(lambda r, g: (r > 0).to(kind), torch.tensor([[1.0, -1.0]]), generator())
    assert weights.dtype == torch.float32 and weights.tolist() == [[1.0, 0.0]]


def test_a_filter_that_works_in_place_leaves_the_rewards_alone():
    rewards = REWARDS.repeat(3, 1)
    apply_filter(lambda r, generator: r.zero_(), rewards, torch.Generator())
    assert torch.equal(rewards, REWARDS.repeat(3, 1))


def test_weights_that_carry_a_gradient_are_taken_without_it():
    weight = torch.ones(1, requires_grad=True)
    found = apply_filter(lambda r, g: torch.sigmoid(r * weight), REWARDS, torch.Generator())
    assert not found.requires_grad and torch.equal(found, REWARDS.sigmoid())
