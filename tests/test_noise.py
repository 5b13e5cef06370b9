"""The noise laboratory: errors are equally many, and stand where they are told to."""

from pfppo.noise import ERRORS, PLACES, noisy_rewards
from pfppo.reliability import binned_r2

import pytest
import torch

SCORES = torch.tensor([i % 2 for i in range(20_000)], dtype=torch.float32)
TEXTS = [f"response {i}" for i in range(20_000)]


@pytest.fixture(scope="module")
def rewards():
    return {place: noisy_rewards(place, SCORES, ["p"] * 20_000, TEXTS, 0) for place in PLACES}


def right(rewards):
    return ((rewards > 0) == (SCORES > 0.5)).float()


@pytest.mark.parametrize("place", PLACES)
def test_errors_are_equally_many(rewards, place):
    assert 1 - right(rewards[place]).mean() == pytest.approx(ERRORS, abs=0.01)
    assert rewards[place].std() == pytest.approx(1, abs=0.02)


def test_errors_stand_where_they_are_told_to(rewards):
    def extremes(place):
        size = rewards[place].abs()
        return right(rewards[place])[size > size.quantile(0.8)].mean()

    assert extremes("middle") > 0.95 > 0.85 > extremes("uniform") > 0.75 > extremes("tails") > 0.5


def test_r2_of_the_extremes_is_best_where_the_errors_are_in_the_middle(rewards):
    def r2(place, least):
        kept = (rewards[place].abs() > least).float().numpy()
        return binned_r2(rewards[place].numpy(), SCORES.numpy(), kept).r2

    assert r2("middle", 1) > r2("middle", 0)
    assert r2("middle", 1) > r2("uniform", 1) > r2("tails", 1)


def test_equal_responses_have_equal_rewards_and_seeds_are_other_models(rewards):
    again = noisy_rewards("middle", SCORES[:3], ["p"] * 3, TEXTS[:3], 0)
    assert torch.equal(again, rewards["middle"][:3])
    other = noisy_rewards("middle", SCORES, ["p"] * 20_000, TEXTS, 1)
    assert not torch.equal(rewards["middle"], other)
    assert noisy_rewards("middle", SCORES[:1], ["another prompt"], TEXTS[:1], 0) != again[0]
