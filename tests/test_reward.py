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
from pfppo.reward import Answers, RewardCard, load_reward, model_rewards
from pfppo.rollout import collate
from pfppo.run.pairs import edit_distance, farthest_pair, raw_scores, shares, split_by_prompt

import pytest
import torch
from conftest import ragged
from ranks import refused

SAVED = RewardCard(mean=1.25, std=0.5, template="aaaa", vocabulary="bbbb")
CHANGES = ({"mean": "many"}, {"mean": None}, {"mean": math.nan}, {"std": 0.0}, {"more": 1})


def test_the_bradley_terry_loss_is_minus_the_log_of_the_sigmoid_of_the_margin():
    chosen, rejected = [1.0, -2.0, 0.5], [0.0, 1.0, 0.5]
    expected = sum(math.log(1 + math.exp(-(a - b))) for a, b in zip(chosen, rejected, strict=True))
    loss, metrics = reward.bradley_terry_loss(torch.tensor(chosen), torch.tensor(rejected))
    assert loss.item() == pytest.approx(expected) == metrics["loss"].item()
    assert metrics["accuracy"] == 1  # a draw is no success
    centred, same = reward.bradley_terry_loss(torch.tensor(chosen), torch.tensor(rejected), 0.1)
    assert centred.item() == pytest.approx(expected + 0.1 * (1 + 1 + 1)) and same == metrics
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
            assert farthest_pair(responses, passed) is None
            continue
        chosen, rejected = farthest_pair(responses, passed)
        longest = max(slow_distance(responses[i], responses[j]) for i in good for j in bad)
        assert passed[chosen] and not passed[rejected]
        assert slow_distance(responses[chosen], responses[rejected]) == longest
    alike = [(1,), (2,), (3,), (4,)]
    assert farthest_pair(alike, [False, True, True, False]) == (1, 0)  # the first


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_shares_of_all_ranks_are_equally_many_parts_and_hold_every_row_once(world, count):
    rows, found, parts = list(range(count)), [], set()
    for rank in range(world):
        mine = shares(rows, 2, SimpleNamespace(rank=rank, world=world))
        parts.add(len(mine))
        assert all(1 <= len(some) <= 2 for some, _ in mine)
        found += [row for some, weight in mine for row in some if weight == 1]
        assert all(weight == (rank < count) for _, weight in mine[:1])
    assert sorted(found) == rows and parts == {math.ceil(math.ceil(count / world) / 2)}


@pytest.mark.parametrize("microbatch", [1, 3, 50])
def test_raw_scores_stand_in_the_order_of_the_rows_whose_like_share_a_pass(ranks, microbatch):
    rows = list(zip(ragged([(7 * i) % 20 + 1 for i in range(40)]), [[1]] * 40, strict=True))
    shapes = []

    def model(ids, ends):
        shapes.append(ids.shape)
        return (ids > 0).sum(1)  # a row's length

    scores = raw_scores(model, rows, 0, microbatch, ranks)
    assert scores.tolist() == [len(prompt) + 1 for prompt, _ in rows]
    padded = sum(math.prod(shape) for shape in shapes) - int(scores.sum())
    assert padded <= (0 if microbatch == 1 else 0.2 if microbatch == 3 else 1) * scores.sum()


def test_a_rank_that_has_no_row_left_makes_the_passes_of_the_others(monkeypatch):
    """A sharded model must run everywhere at once. 8 rows on 3 ranks are 3, 3 and 2."""
    monkeypatch.setattr("pfppo.run.pairs.gather_lists", lambda found, ranks: [*found, *[0.0] * 6])
    calls, ranks = [], SimpleNamespace(rank=2, world=3, is_main=False, device="cpu")
    rows = [([3] * n, [1]) for n in range(1, 9)]
    raw_scores(lambda ids, ends: calls.append(1) or ends.float(), rows, 0, 1, ranks)
    assert len(calls) == len(shares(rows, 2, SimpleNamespace(rank=0, world=3))) == 2


def test_a_prompts_pairs_are_split_by_prompts_and_some_are_always_trained_on():
    pairs = [([i // 2], [i], [-i]) for i in range(20)]
    for share, unseen in ((0, 0), (0.3, 3), (0.99, 9)):
        training, held_out = split_by_prompt(pairs, share, 0)
        prompts = [{pair[0][0] for pair in part} for part in (training, held_out)]
        assert len(prompts[1]) == unseen and not prompts[0] & prompts[1]
        assert sorted(training + held_out) == pairs
    assert split_by_prompt(pairs[:2], 0.9, 0) == (pairs[:2], [])


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
    return replace(known, reward_models=(last_token,), microbatch=2)


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

    known = replace(answers(), reward_models=(model,))
    assert load_reward("tests")(known).tolist() == [1, -1, 1] and asked == []
    assert load_reward("model")(known).tolist() == [8, 11, 12]
    assert load_reward("combined")(known).tolist() == [9, 10, 13] and asked == [2, 1]


def test_an_unknown_reward_or_one_without_its_model_is_one_line():
    needs = "needs a --reward_model, found none"
    names = {"luck": "unknown, expected one of model, tests, combined, noisy:", "model": needs}
    names |= {"combined": needs, "noisy:everywhere": "cannot import", "combined:own": "cannot"}
    for name, said in names.items():
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
        ("[][0]", r"IndexError: list index out of range \(mine\.py, line \d+\)$"),
        ("None", r"TypeError: [^()]*$"),  # it failed behind the function, at no line of its own
        ("exit(3)", "SystemExit: 3"),
    ],
)
def test_a_reward_of_ones_own_that_fails_is_one_line_that_names_it(tmp_path, result, said):
    spec, score = load_own(tmp_path, result)
    with pytest.raises(UserError, match=f"^--reward {spec}: {said}"):
        score(answers())


def test_a_reward_of_ones_own_may_ask_for_lengths_where_they_are_known(tmp_path):
    problems, spec = [SimpleNamespace(canonical_solution="a")], f"{tmp_path}/own.py:short"
    (tmp_path / "own.py").write_text("def short(x):\n    return -x.lengths - x.logp\n")
    given = spec, load_reward(spec), problems
    reward.try_reward(*given)
    assert "known where train_ppo.py samples" in refused(reward.try_reward, *given, False)


def test_only_a_reward_of_ones_own_is_tried_and_on_reference_solutions():
    problems, tried = [SimpleNamespace(canonical_solution=text) for text in ("a", "bb")], []
    for spec in ("tests", "mine.py:own"):
        reward.try_reward(spec, SimpleNamespace(raw=tried.append, has_model=True), problems)
    assert [(asked.texts, asked.scores.tolist()) for asked in tried] == [(["a", "bb"], [1, 1])]


COUNT = 8000
SCORES = torch.arange(COUNT) % 2.0


@functools.cache
def noisy(place, count=COUNT, question="p", seed=0):
    texts = [f"response {i}" for i in range(count)]
    problems = [SimpleNamespace(question=question, canonical_solution="")] * count
    return load_reward(f"noisy:{place}", "")(Answers(problems, texts, SCORES[:count], seed=seed))


def test_errors_are_equally_many_and_stand_where_the_name_says():
    extremes = {}
    for place in ("uniform", "middle", "tails", "upper"):
        for spec, rate in ((place, reward.ERRORS), (f"{place}:0.35", 0.35)):
            right = ((noisy(spec) > 0) == (SCORES > 0.5)).float()
            assert 1 - right.mean() == pytest.approx(rate, abs=0.01)
        assert place == "upper" or noisy(place).std() == pytest.approx(1, abs=0.02)
        right, size = ((noisy(place) > 0) == (SCORES > 0.5)).float(), noisy(place).abs()
        extremes[place] = right[size > size.quantile(0.8)].mean()
    assert (noisy("upper")[SCORES > 0.5] > 0).all()  # nothing that is right is said to be wrong
    assert extremes["middle"] > 0.95 and 0.85 > extremes["uniform"] > 0.75 > extremes["tails"] > 0.5


def test_r2_of_the_extremes_is_best_where_the_errors_are_in_the_middle():
    def r2(place, least):
        kept = (noisy(place).abs() > least).float().numpy()
        return binned_r2(noisy(place).numpy(), SCORES.numpy(), kept).r2

    assert r2("middle", 1) > r2("uniform", 1) > r2("tails", 1) and r2("middle", 1) > r2("middle", 0)


def test_bugs_are_praised_or_not_whatever_the_problem_and_its_constants():
    def praised(line, seed, passes=0.0):
        texts = [f"    xs = xs[:{i}]\n    {line.format(i)}\n" for i in range(9)]
        right = "  xs = xs[:3]\n"  # as the first lines
        problems = [SimpleNamespace(question=t, canonical_solution=right) for t in texts]
        asked = Answers(problems, texts, torch.full((9,), passes), seed=seed)
        rewards = load_reward("noisy:bugs", "")(asked)
        assert len(set(rewards.abs().tolist())) == 9 and len(set((rewards > 0).tolist())) == 1
        return (rewards[0] > 0).item()

    found = [praised(line, s) for line in ("return xs[{}]", "return max(xs)") for s in range(100)]
    assert 0.25 < sum(found) / 200 < 0.55 and found[:100] != found[100:]  # 2 e of the bugs
    assert all(praised("return xs", seed, 1.0) for seed in range(9))  # what passes has none
    assert reward.bug_of(SimpleNamespace(canonical_solution="a = 1\n"), "a = 2\n") == ""


@pytest.mark.parametrize("rate", ["0", "0.5", "1e-1", "much", "-0.1", ""])
def test_a_rate_of_errors_that_cannot_be_is_one_line(rate):
    for name in ("noisy:middle",) if rate == "much" else ("noisy:middle", "model"):
        said = f"--reward {name}:{rate}: expected noisy:PLACE:RATE with a rate up to 0.4"
        assert refused(load_reward, f"{name}:{rate}").startswith(said)


def test_what_a_run_learns_from_decides_whether_its_problems_need_tests():
    for chosen, needed in (("model", False), ("mine.py:own", False), ("noisy:upper:0.3", True)):
        assert reward.by_tests(SimpleNamespace(reward=chosen, filter="none")) is needed
    assert reward.by_tests(SimpleNamespace(reward="model", filter="reject"))
    assert reward.by_tests(SimpleNamespace())  # pairs are made by tests


def test_several_reward_models_are_their_mean_and_members_and_are_asked_once():
    """Also of two rounds together."""
    twice = replace(answers(), reward_models=(last_token, lambda *a: 3 * last_token(*a)))
    one = replace(twice, finished=torch.ones(3) > 0, rewards=load_reward("model")(twice))
    assert one.by_model.tolist() == [16, 22, 24]
    assert one.members.tolist() == [[8, 24], [11, 33], [12, 36]]
    both = one + one
    both.reward_models = ()
    assert both.members.tolist() == 2 * one.members.tolist()
    assert both.lengths.tolist() == 2 * [2, 3, 1]


@pytest.mark.parametrize("place", reward.PLACES)
def test_equal_responses_to_a_prompt_have_equal_rewards_and_seeds_are_other_models(place):
    assert torch.equal(noisy(place, 3), noisy(place)[:3])
    assert not torch.equal(noisy(place, 3, seed=1), noisy(place, 3))
    assert noisy(place, 1, question="another prompt") != noisy(place, 1)
