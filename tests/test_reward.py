"""Bradley-Terry, pairs, the card beside a reward model, the reward slot, noisy rewards."""

import functools
import itertools
import json
import math
import random
import re
from dataclasses import replace
from types import SimpleNamespace

from pfppo import reward
from pfppo.config import UserError
from pfppo.reliability import binned_r2
from pfppo.reward import Answers, RewardCard, edit_distance, load_reward, model_rewards
from pfppo.rollout import collate

import pytest
import torch
from ranks import refused

SAVED = RewardCard(mean=1.25, std=0.5, template="aaaa", vocabulary="bbbb")
CHANGES = ({"mean": "many"}, {"mean": None}, {"mean": math.nan}, {"std": 0.0}, {"more": 1})


def test_the_bradley_terry_loss_is_minus_the_log_of_the_sigmoid_of_the_margin():
    chosen, rejected = [1.0, -2.0, 0.5], [0.0, 1.0, 0.5]
    expected = sum(math.log(1 + math.exp(-(a - b))) for a, b in zip(chosen, rejected, strict=True))
    loss, metrics = reward.bradley_terry_loss(torch.tensor(chosen), torch.tensor(rejected))
    assert loss.item() == pytest.approx(expected) == metrics["loss"].item()
    assert metrics["accuracy"] == 1  # a draw is no success
    assert reward.bradley_terry_loss(torch.tensor([-1e4, 1e4]), torch.zeros(2))[0] == 1e4  # finite


@functools.cache
def slow_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return slow_distance(a[1:], b[1:])
    return 1 + min(slow_distance(*rest) for rest in ((a[1:], b), (a, b[1:]), (a[1:], b[1:])))


def test_the_edit_distance_equals_the_recursive_definition():
    assert edit_distance("kitten", "sitting") == 3
    rng = random.Random(0)
    for _ in range(60):
        a, b = (tuple(rng.choices(range(3), k=rng.randint(0, 7))) for _ in range(2))
        assert edit_distance(a, b) == edit_distance(b, a) == slow_distance(a, b)


def test_the_pair_is_the_passing_and_the_failing_response_that_differ_most():
    responses = [(1, 2, 3), (1, 2, 4), (5, 6, 7, 8), (1, 2, 3, 4), (9,)]
    for passed in itertools.product((True, False), repeat=5):
        good, bad = ([i for i in range(5) if passed[i] is value] for value in (True, False))
        if not good or not bad:
            assert reward.farthest_pair(responses, passed) is None
            continue
        chosen, rejected = reward.farthest_pair(responses, passed)
        longest = max(slow_distance(responses[i], responses[j]) for i in good for j in bad)
        assert passed[chosen] and not passed[rejected]
        assert slow_distance(responses[chosen], responses[rejected]) == longest
    alike = [(1,), (2,), (3,), (4,)]
    assert reward.farthest_pair(alike, [False, True, True, False]) == (1, 0)  # the first


def test_a_saved_card_is_json_and_loaded_as_it_was_and_without_one_there_is_none(tmp_path):
    assert reward.load_card(tmp_path) is None
    SAVED.save(tmp_path)
    assert reward.load_card(tmp_path) == SAVED
    assert json.loads((tmp_path / reward.CARD).read_text())["mean"] == 1.25


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", '{"mean": 1.0, "std": 1.0, "template": "a"}'),
        *(json.dumps(vars(SAVED) | change) for change in CHANGES),
    ],
)
def test_a_damaged_card_is_refused_by_name(tmp_path, text):
    (tmp_path / reward.CARD).write_text(text)
    damaged = f"{tmp_path / reward.CARD}: damaged .*expected an object with mean, std"
    assert re.match(damaged, refused(reward.load_card, tmp_path))


def test_rewards_without_spread_have_no_normaliser():
    assert reward.spread_of(torch.tensor([1.0, 3.0]), "rm") == [2, pytest.approx(2**0.5)]
    for raw in ([1.0], [2.0, 2.0], [1.0, math.inf], [1.0, math.nan]):
        with pytest.raises(UserError, match=f"--reward_model rm: rewards of {len(raw)} samples"):
            reward.spread_of(torch.tensor(raw), "--reward_model rm")


def last_token(ids, positions):
    """A reward model that gives the id of the token it is asked about: [B, 1, 1]."""
    return ids.gather(1, positions)[:, :, None].float()


def answers():
    problems = [SimpleNamespace(task_id=f"task/{i}", question=f"p{i}") for i in range(3)]
    rows = collate([[1, 2], [3], [4, 5, 6]], [[7, 8], [9, 10, 11], [12]], pad_id=0)
    known = Answers(problems, ["a", "bb", "ccc"], torch.tensor([1.0, 0.0, 1.0]), rows=rows)
    return replace(known, reward_model=last_token, microbatch=2)


@pytest.mark.parametrize("microbatch", [1, 2, 3, 8])
def test_the_model_is_asked_at_the_last_response_token(microbatch):
    found = model_rewards(last_token, answers().rows, microbatch)
    assert found.tolist() == [8, 11, 12] and found.dtype == torch.float32


def test_whatever_the_reward_it_is_normalised_and_clipped_on_both_sides():
    slot = load_reward("model", clip=2.0)
    assert slot(answers()).tolist() == [2, 2, 2]  # as it is, until somebody has measured it
    slot.mean, slot.std = 11.0, 0.5
    assert slot(answers()).tolist() == [-2, 0, 2] and slot.raw(answers()).tolist() == [8, 11, 12]


def test_equal_rows_have_equal_rewards_whatever_their_place_in_the_batch():
    def model(ids, positions):  # whose last bits depend on the place
        return last_token(ids, positions) + 1e-3 * torch.arange(len(ids))[:, None, None]

    found = model_rewards(model, answers().rows.select(torch.tensor([2, 0, 1, 0, 2])), 5)
    assert found[0] == found[4] and found[1] == found[3] and len(found.unique()) == 3
    shorter = collate([[1], [1]], [[7], [7, 0]], pad_id=0)  # no equal row: its response ends before
    assert model_rewards(last_token, shorter, 2).tolist() == [7, 0]


def test_rewards_by_name_are_the_models_the_oracles_and_their_sum_and_a_model_is_asked_once():
    asked = []

    def model(ids, positions):
        asked.append(len(ids))
        return last_token(ids, positions)

    known = replace(answers(), reward_model=model)
    assert load_reward("tests")(known).tolist() == [1, -1, 1] and asked == []
    assert load_reward("model")(known).tolist() == [8, 11, 12]
    assert load_reward("combined")(known).tolist() == [9, 10, 13] and asked == [2, 1]


def test_an_unknown_reward_or_one_without_its_model_is_one_line():
    needs = "needs a --reward_model, found none"
    names = {"luck": "unknown, expected one of model, tests, combined, noisy:", "model": needs}
    for name, said in (names | {"combined": needs, "noisy:everywhere": "cannot import"}).items():
        message = refused(load_reward, name, reward_model="")
        assert message.startswith(f"--reward {name}: {said}")


def load_own(folder, result, takes="prompts, responses, problems"):
    path = folder / "mine.py"
    path.write_text(f"import torch\n\n\ndef own({takes}):\n    return {result}\n")
    return f"{path}:own", load_reward(f"{path}:own")


@pytest.mark.parametrize(
    "result, expected",
    [
        ("[len(response) for response in responses]", [1, 2, 3]),
        ("[float(prompt[1:]) for prompt in prompts]", [0, 1, 2]),
        ("[-int(p.task_id[-1]) for p in problems]", [0, -1, -2]),
        ("torch.ones(3, dtype=torch.float64, requires_grad=True) * 2", [2, 2, 2]),
        *[(f"{x}.clear() or [1, 2, 3]", [1, 2, 3]) for x in ("prompts", "responses", "problems")],
    ],
)
def test_a_reward_of_ones_own_sees_the_answers_and_cannot_change_them(tmp_path, result, expected):
    asked, (_, score) = answers(), load_own(tmp_path, result)
    found = score(asked)
    assert found.tolist() == expected and found.dtype == torch.float32 and not found.requires_grad
    assert asked.texts == answers().texts and asked.problems == answers().problems


def test_a_reward_of_one_parameter_gets_all_there_is(tmp_path):
    _, score = load_own(tmp_path, "answers.scores + answers.by_model", "answers")
    assert score(answers()).tolist() == [9, 11, 13]


@pytest.mark.parametrize(
    "result, said",
    [
        ("[1.0, 2.0]", r"expected 3 finite numbers, found shape \(2,\)"),
        ("torch.ones(3, 1)", r"expected 3 finite numbers, found shape \(3, 1\)"),
        ("1.0", r"expected 3 finite numbers, found shape \(\)"),
        ("[1.0, float('nan'), 0.0]", r"expected 3 finite numbers, found \[nan"),
        ("[1e999] * 3", r"expected 3 finite numbers, found \[inf"),
        ("[][0]", "IndexError: list index out of range"),
        ("exit(3)", "SystemExit: 3"),
    ],
)
def test_a_reward_of_ones_own_that_fails_is_one_line_that_names_it(tmp_path, result, said):
    spec, score = load_own(tmp_path, result)
    with pytest.raises(UserError, match=f"^--reward {spec}: {said}"):
        score(answers())


def test_only_a_reward_of_ones_own_is_tried_and_on_reference_solutions():
    problems, tried = [SimpleNamespace(canonical_solution=text) for text in ("a", "bb")], []
    for spec in ("tests", "mine.py:own"):
        reward.try_reward(spec, SimpleNamespace(raw=tried.append), problems)
    assert [(asked.texts, asked.scores.tolist()) for asked in tried] == [(["a", "bb"], [1, 1])]


COUNT = 8000
SCORES = torch.arange(COUNT) % 2.0


@functools.cache
def noisy(place, count=COUNT, question="p", seed=0):
    texts = [f"response {i}" for i in range(count)]
    problems = [SimpleNamespace(question=question)] * count
    return load_reward(f"noisy:{place}", "")(Answers(problems, texts, SCORES[:count], seed=seed))


def test_errors_are_equally_many_and_stand_where_the_name_says():
    extremes = {}
    for place in reward.PLACES:
        right = ((noisy(place) > 0) == (SCORES > 0.5)).float()
        assert 1 - right.mean() == pytest.approx(reward.ERRORS, abs=0.01)
        assert noisy(place).std() == pytest.approx(1, abs=0.02)
        size = noisy(place).abs()
        extremes[place] = right[size > size.quantile(0.8)].mean()
    assert extremes["middle"] > 0.95 and 0.85 > extremes["uniform"] > 0.75 > extremes["tails"] > 0.5


def test_r2_of_the_extremes_is_best_where_the_errors_are_in_the_middle():
    def r2(place, least):
        kept = (noisy(place).abs() > least).float().numpy()
        return binned_r2(noisy(place).numpy(), SCORES.numpy(), kept).r2

    assert r2("middle", 1) > r2("uniform", 1) > r2("tails", 1) and r2("middle", 1) > r2("middle", 0)


@pytest.mark.parametrize("place", reward.PLACES)
def test_equal_responses_to_a_prompt_have_equal_rewards_and_seeds_are_other_models(place):
    assert torch.equal(noisy(place, 3), noisy(place)[:3])
    assert not torch.equal(noisy(place, 3, seed=1), noisy(place, 3))
    assert noisy(place, 1, question="another prompt") != noisy(place, 1)
