"""Bradley-Terry, pairs, the card beside a reward model, the reward slot."""

import functools
import itertools
import json
import math
import random
from types import SimpleNamespace

from pfppo.batch import collate
from pfppo.config import UserError
from pfppo.reward import (
    CARD,
    Answers,
    RewardCard,
    bradley_terry_loss,
    check_agreement,
    edit_distance,
    farthest_pair,
    load_card,
    load_reward,
    model_rewards,
)

import pytest
import torch

SAVED = RewardCard(mean=1.25, std=0.5, template="aaaa", vocabulary="bbbb")

# --------------------------------------------------------------------------------- loss and pairs


def test_the_bradley_terry_loss_is_minus_the_log_of_the_sigmoid_of_the_margin():
    chosen, rejected = [1.0, -2.0, 0.5], [0.0, 1.0, 0.5]
    expected = sum(math.log(1 + math.exp(-(a - b))) for a, b in zip(chosen, rejected, strict=True))
    loss, metrics = bradley_terry_loss(torch.tensor(chosen), torch.tensor(rejected))
    assert loss.item() == pytest.approx(expected) == metrics["loss"].item()
    assert metrics["accuracy"] == 1  # a draw is no success


def test_the_bradley_terry_loss_is_finite_for_any_margin():
    loss, _ = bradley_terry_loss(torch.tensor([-1e4, 1e4]), torch.zeros(2))
    assert loss == 1e4


def slow_distance(a, b):
    @functools.cache
    def rest(i, j):
        """The distance of a[i:] and b[j:]."""
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        if a[i] == b[j]:
            return rest(i + 1, j + 1)
        return 1 + min(rest(i + 1, j), rest(i, j + 1), rest(i + 1, j + 1))

    return rest(0, 0)


@pytest.mark.parametrize(
    "a, b, distance",
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("abc", "bc", 1)],
)
def test_edit_distances_that_are_known(a, b, distance):
    assert edit_distance(a, b) == distance


def test_the_edit_distance_equals_the_recursive_definition():
    rng = random.Random(0)
    for _ in range(60):
        a, b = (tuple(rng.choices(range(3), k=rng.randint(0, 7))) for _ in range(2))
        assert edit_distance(a, b) == edit_distance(b, a) == slow_distance(a, b)


def test_the_pair_is_the_passing_and_the_failing_response_that_differ_most():
    responses = [[1, 2, 3], [1, 2, 4], [5, 6, 7, 8], [1, 2, 3, 4], [9]]
    for passed in itertools.product((True, False), repeat=5):
        good, bad = ([i for i in range(5) if passed[i] is value] for value in (True, False))
        if not good or not bad:
            assert farthest_pair(responses, passed) is None
            continue
        chosen, rejected = farthest_pair(responses, passed)
        longest = max(slow_distance(responses[i], responses[j]) for i in good for j in bad)
        assert passed[chosen] and not passed[rejected]
        assert slow_distance(responses[chosen], responses[rejected]) == longest


def test_of_pairs_that_differ_equally_the_first_is_taken():
    assert farthest_pair([[1], [2], [3], [4]], [False, True, True, False]) == (1, 0)


# ---------------------------------------------------------------------------------------- the card


def test_a_saved_card_is_loaded_as_it_was(tmp_path):
    SAVED.save(tmp_path)
    assert load_card(tmp_path) == SAVED


def test_a_reward_model_from_elsewhere_has_no_card(tmp_path):
    assert load_card(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"mean": 1.0, "std": 1.0, "template": "a"}',
        '{"mean": "many", "std": 1.0, "template": "a", "vocabulary": "b"}',
        '{"mean": null, "std": 1.0, "template": "a", "vocabulary": "b"}',
        '{"mean": 1.0, "std": 1.0, "template": "a", "vocabulary": "b", "more": 1}',
    ],
)
def test_a_damaged_card_is_refused_by_name(tmp_path, text):
    (tmp_path / CARD).write_text(text)
    with pytest.raises(UserError, match="damaged .*expected an object with mean, std") as caught:
        load_card(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / CARD))


def test_a_card_agrees_with_its_own_hashes():
    check_agreement(SAVED, "aaaa", "bbbb", "rm", "policy")


@pytest.mark.parametrize(
    "template, vocabulary, what, hashes",
    [
        ("cccc", "bbbb", "prompt template", ("aaaa", "cccc")),
        ("aaaa", "dddd", "vocabulary", ("bbbb", "dddd")),
    ],
)
def test_a_card_that_differs_from_the_policy_is_refused_with_both_hashes(
    template, vocabulary, what, hashes
):
    with pytest.raises(UserError) as caught:
        check_agreement(SAVED, template, vocabulary, "some/rm", "some/policy")
    message = str(caught.value)
    for part in ("--reward_model some/rm", "--policy some/policy", what, *hashes):
        assert part in message


# ---------------------------------------------------------------------------------------- the slot


def answers(scores=(1.0, 0.0, 1.0)):
    return Answers(
        ask_model=lambda: torch.tensor([0.5, -0.25, 2.0]),
        prompts=["p0", "p1", "p2"],
        responses=["a", "bb", "ccc"],
        problems=[SimpleNamespace(task_id=f"task/{i}") for i in range(3)],
        scores=torch.tensor(scores),
    )


def rollout():
    return collate([[1, 2], [3], [4, 5, 6]], [[7, 8], [9, 10, 11], [12]], pad_id=0)


def last_token(ids, positions):
    """A reward model that gives the id of the token it is asked about: [B, 1, 1]."""
    return ids.gather(1, positions)[:, :, None].float()


@pytest.mark.parametrize("microbatch", [1, 2, 3, 8])
def test_the_model_is_asked_at_the_last_response_token_whatever_the_microbatch(microbatch):
    found = model_rewards(last_token, rollout(), microbatch)
    assert found.tolist() == [8, 11, 12] and found.dtype == torch.float32


def test_rewards_of_the_model_are_clipped_on_both_sides():
    def model(ids, positions):
        return last_token(ids, positions) * 10 - 100

    assert model_rewards(model, rollout(), 2, limit=15.0).tolist() == [-15, 10, 15]
    assert model_rewards(model, rollout(), 2).tolist() == [-20, 10, 20]


def test_the_oracle_gives_plus_1_to_what_passes_and_minus_1_to_what_fails():
    assert load_reward("tests")(answers()).tolist() == [1, -1, 1]


def test_an_unknown_reward_lists_the_known_ones():
    for name in ("luck", "noisy:everywhere"):
        with pytest.raises(UserError, match=f"--reward {name}: ") as error:
            load_reward(name)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown, expected one of model, tests, combined, noisy:"):
        load_reward("luck")


def test_the_combined_reward_is_the_sum_of_reward_model_and_oracle():
    model, oracle = load_reward("model")(answers()), load_reward("tests")(answers())
    assert model.tolist() == [0.5, -0.25, 2.0]
    assert torch.equal(load_reward("combined")(answers()), model + oracle)


@pytest.mark.parametrize("place", ["middle", "tails", "uniform"])
def test_a_noisy_reward_depends_on_place_and_seed_and_needs_no_model(place):
    rewards = [load_reward(f"noisy:{place}", seed)(answers()) for seed in (1, 1, 2)]
    assert torch.equal(rewards[0], rewards[1]) and not torch.equal(rewards[0], rewards[2])


def own_reward(folder, result):
    path = folder / "mine.py"
    path.write_text(
        f"import torch\n\ndef own(prompts, responses, problems):\n    return {result}\n"
    )
    return load_reward(f"{path}:own")


@pytest.mark.parametrize(
    "result, expected",
    [
        ("[len(response) for response in responses]", [1, 2, 3]),
        ("[float(prompt[1:]) for prompt in prompts]", [0, 1, 2]),
        ("[-int(p.task_id[-1]) for p in problems]", [0, -1, -2]),
        ("torch.ones(3, dtype=torch.float64)", [1, 1, 1]),
    ],
)
def test_a_reward_of_ones_own_sees_prompts_responses_and_problems(tmp_path, result, expected):
    found = own_reward(tmp_path, result)(answers())
    assert found.tolist() == expected and found.dtype == torch.float32


@pytest.mark.parametrize(
    "result", ["[1.0, 2.0]", "torch.ones(3, 1)", "1.0", "[1.0, float('nan'), 0.0]", "[1e999] * 3"]
)
def test_a_reward_of_ones_own_that_gives_nonsense_is_refused(tmp_path, result):
    reward = own_reward(tmp_path, result)
    found = r"expected 3 finite numbers, found (shape \(|\[(nan|inf))"
    with pytest.raises(UserError, match=f"--reward .*mine.py:own: {found}"):
        reward(answers())


@pytest.mark.parametrize("name", ["prompts", "responses", "problems"])
def test_a_reward_that_works_in_place_leaves_the_answers_alone(tmp_path, name):
    asked, untouched = answers(), answers()
    reward = own_reward(tmp_path, f"{name}.clear() or [1.0, 2.0, 3.0]")
    assert reward(asked).tolist() == [1, 2, 3]
    assert getattr(asked, name) == getattr(untouched, name)


def test_a_reward_may_carry_a_gradient_that_nobody_wants(tmp_path):
    found = own_reward(tmp_path, "torch.ones(3, requires_grad=True) * 2")(answers())
    assert found.tolist() == [2, 2, 2] and not found.requires_grad


def test_a_card_is_readable_json(tmp_path):
    SAVED.save(tmp_path)
    assert json.loads((tmp_path / CARD).read_text())["mean"] == 1.25
