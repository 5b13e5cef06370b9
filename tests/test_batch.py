"""Rows, masks, minibatches and the sizes of a run."""

from dataclasses import fields
from types import SimpleNamespace

from pfppo.batch import (
    check_sizes,
    collate,
    flat,
    last_positions,
    minibatch_plan,
    over_microbatches,
    owned,
    response_mask,
    rows_of,
    state_positions,
    unflat,
)
from pfppo.config import UserError

import pytest
import torch

EOS, PAD = 2, 0
PROMPTS = [[10, 11, 12], [13, 14, 15], [16], [17, 18, 19, 20, 21]]
RESPONSES = [[30, 31, 32, EOS], [33, 34, 35, 36, 37, 38], [39, 40, EOS], [EOS]]


def rollout(pad_id=PAD):
    """Four ragged rows, two prompts of two samples, with all fields; off the mask 1000."""
    rows = collate(PROMPTS, RESPONSES, pad_id)
    rows.rewards = torch.tensor([0.5, -1.0, 2.0, 0.0])
    rows.weights = torch.tensor([1.0, 0.0, 2.0, 0.5])
    count = float(rows.mask.sum())
    numbers = torch.full((4, 6), 1000.0).masked_scatter(rows.mask > 0, torch.arange(count))
    for i, name in enumerate(("old_logp", "ref_logp", "old_values", "adv", "returns")):
        setattr(rows, name, numbers + i / 8)
    return rows


def on_mask(x, rows):
    return [x[i, :n].tolist() for i, n in enumerate(rows.lengths)]


# ------------------------------------------------------------------------------------- the drawing


def test_a_row_is_laid_out_as_drawn():
    rows = collate(PROMPTS[:2], RESPONSES[:2], PAD)
    assert rows.ids[0].tolist() == [10, 11, 12, 30, 31, 32, EOS, PAD, PAD]
    assert rows.states[0, :4].tolist() == [2, 3, 4, 5]
    assert rows.ends[0].tolist() == [6]
    assert rows.responses[0, :4].tolist() == [30, 31, 32, EOS]
    assert rows.mask[0].tolist() == [1, 1, 1, 1, 0, 0]
    assert (len(rows), rows.width) == (2, 6)


def test_masks_and_positions_are_functions_of_lengths():
    prompt_lengths, lengths = torch.tensor([1, 4]), torch.tensor([3, 0])
    assert response_mask(lengths, 4).tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    assert state_positions(prompt_lengths, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert last_positions(prompt_lengths, lengths).tolist() == [[3], [3]]


def test_the_state_of_a_token_stands_just_before_it():
    rows = rollout()
    after = rows.ids.gather(1, (rows.states + 1).clamp(max=rows.ids.shape[1] - 1))
    assert on_mask(after, rows) == RESPONSES


def test_the_last_position_holds_the_last_response_token():
    rows = rollout()
    assert rows.ids.gather(1, rows.ends)[:, 0].tolist() == [EOS, 38, EOS, EOS]


def test_a_pad_that_equals_eos_changes_nothing_but_the_padding():
    one, other = rollout(PAD), rollout(EOS)
    for name in ("mask", "states", "ends", "lengths"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert on_mask(one.responses, one) == on_mask(other.responses, other) == RESPONSES
    for i, n in enumerate((one.prompt_lengths + one.lengths).tolist()):
        assert torch.equal(one.ids[i, :n], other.ids[i, :n])
        assert (one.ids[i, n:] == PAD).all() and (other.ids[i, n:] == EOS).all()


def test_token_weights_are_the_weights_on_response_tokens_only():
    rows = rollout()
    expected = [[w] * n + [0] * (6 - n) for w, n in zip([1, 0, 2, 0.5], [4, 6, 3, 1], strict=True)]
    assert rows.token_weights.tolist() == expected


def test_collate_refuses_prompts_without_a_response():
    with pytest.raises(ValueError):
        collate(PROMPTS, RESPONSES[:3], PAD)


# ----------------------------------------------------------------------------------------- select


def assert_row(rows, i, whole, j):
    """Row i of `rows` is row j of `whole`, up to padding."""
    n, end = int(whole.lengths[j]), int(whole.prompt_lengths[j] + whole.lengths[j])
    for field in fields(whole):
        one, other = (getattr(x, field.name)[k] for x, k in ((rows, i), (whole, j)))
        if one.ndim:
            stop = end if field.name == "ids" else n
            one, other = one[:stop], other[:stop]
        assert torch.equal(one, other), field.name


def test_select_gives_the_rows_asked_for_cut_to_the_longest_of_them():
    whole = rollout()
    chosen = whole.select(torch.tensor([3, 0, 3]))
    for i, j in enumerate([3, 0, 3]):
        assert_row(chosen, i, whole, j)
    assert chosen.ids.shape == (3, 7) and chosen.adv.shape == chosen.mask.shape == (3, 4)


def test_select_leaves_out_what_is_not_there_yet():
    chosen = collate(PROMPTS, RESPONSES, PAD).select(torch.tensor([1]))
    assert chosen.adv is None and chosen.weights is None and len(chosen) == 1


def test_padded_select_fills_with_rows_of_weight_0_and_leaves_its_source_alone():
    whole = rollout()
    chosen = whole.padded_select(torch.tensor([2, 3]), 4)
    assert_row(chosen, 0, whole, 2)
    assert_row(chosen, 1, whole, 3)
    assert chosen.weights.tolist() == [2.0, 0.5, 0.0, 0.0]
    assert whole.weights.tolist() == [1.0, 0.0, 2.0, 0.5]


def test_padded_select_of_nothing_is_rows_of_weight_0():
    chosen = rollout().padded_select(torch.tensor([], dtype=torch.long), 2)
    assert chosen.weights.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("size, sizes", [(1, [1] * 4), (2, [2, 2]), (3, [3, 1]), (9, [4])])
def test_microbatches_are_all_rows_in_order(size, sizes):
    whole = rollout()
    parts = whole.microbatches(size)
    assert [len(part) for part in parts] == sizes
    places = [(part, i) for part in parts for i in range(len(part))]
    for j, (part, i) in enumerate(places):
        assert_row(part, i, whole, j)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_a_forward_over_microbatches_equals_one_over_all_rows(size):
    def forward(model, rows, factor):
        return model * factor * rows.responses * rows.mask, rows.adv * rows.mask

    model, whole = torch.tensor(0.5, requires_grad=True), rollout()
    products, adv = over_microbatches(forward, model, whole, size, 3)
    assert torch.equal(products, 1.5 * whole.responses * whole.mask)
    assert torch.equal(adv, whole.adv * whole.mask)
    assert not products.requires_grad


# ------------------------------------------------------------------------------------ flat, unflat


def test_flat_holds_the_response_tokens_of_all_minibatches_in_order():
    whole = rollout()
    parts = [whole.select(torch.tensor([2, 3])), whole.select(torch.tensor([0]))]
    expected = sum((on_mask(whole.adv, whole)[i] for i in (2, 3, 0)), [])
    assert flat(parts, "adv").tolist() == expected


def test_unflat_is_the_reverse_of_flat_and_0_off_the_mask():
    whole = rollout()
    parts = whole.microbatches(3)
    unflat(parts, "adv", 2 * flat(parts, "returns"))
    for part in parts:
        assert torch.equal(part.adv, 2 * torch.where(part.mask > 0, part.returns, 0.0))


# ------------------------------------------------------------------------------ minibatches, ranks

WORLDS = (1, 2, 4)
N = 3


def draw_weights(seed, prompts=8, share=0.5):
    """[P, N], about a share of them kept."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(prompts, N, generator=generator) < share).float()


def kept(weights):
    return [tuple(pair) for pair in weights.nonzero().tolist()]


def pairs(part):
    return list(zip(*(x.tolist() for x in part), strict=True))


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_own_every_prompt_once(world):
    shares = [list(owned(8, rank, world)) for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(8)) and len({len(s) for s in shares}) == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("minibatch", [1, 4, 5, 100])
def test_every_kept_sample_is_in_exactly_one_minibatch(seed, minibatch):
    weights = draw_weights(seed)
    plan = minibatch_plan(weights, minibatch)
    assert sum((pairs(part) for part in plan), []) == kept(weights)
    sizes = [len(groups) for groups, _ in plan]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("minibatch", [2, 4, 8, 16])
def test_minibatches_have_the_size_asked_for_where_it_divides(minibatch):
    weights = torch.zeros(8, N)
    weights[:, [0, 2]] = 1
    plan = minibatch_plan(weights, minibatch)
    assert [len(groups) for groups, _ in plan] == [minibatch] * (16 // minibatch)


def test_nothing_kept_is_no_plan():
    assert minibatch_plan(torch.zeros(4, N), 2) == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("world", WORLDS)
def test_the_rows_of_all_ranks_together_are_the_minibatch(world, seed):
    weights = draw_weights(seed)
    for part in minibatch_plan(weights, 4):
        found = []
        for rank in range(world):
            places = [(group, j) for group in owned(8, rank, world) for j in range(N)]
            rows, size = rows_of(*part, N, rank, world)
            assert len(rows) <= size
            found += [places[row] for row in rows]
        assert sorted(found) == pairs(part)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_run_equally_many_rows_as_many_as_the_fullest_has(world, seed):
    for part in minibatch_plan(draw_weights(seed, share=0.2), 3):
        answers = [rows_of(*part, N, rank, world) for rank in range(world)]
        assert {size for _, size in answers} == {max(len(rows) for rows, _ in answers)}


def test_a_rank_that_keeps_nothing_runs_as_many_rows_as_the_others():
    weights = torch.zeros(4, N)
    weights[0] = 1  # rank 0 of 2
    (part,) = minibatch_plan(weights, 3)
    rows, size = rows_of(*part, N, rank=1, world=2)
    assert (len(rows), size) == (0, 3)


def test_a_full_step_is_spread_evenly_over_ranks():
    weights = torch.ones(8, N)
    for part in minibatch_plan(weights, 12):
        assert [len(rows_of(*part, N, rank, 4)[0]) for rank in range(4)] == [3] * 4


# ------------------------------------------------------------------------------------------- sizes


def sizes(**changes):
    values = dict(prompts_per_step=12, samples_per_prompt=5, minibatch=8, microbatch=4)
    values |= dict(ppo_epochs=2, filter="best_random") | changes
    return SimpleNamespace(**values)


def test_sizes_that_divide_are_one_line():
    assert check_sizes(sizes(), 2, 2) == (
        "sizes: 12 prompts x 5 samples -> 60 sampled -> 24 kept by best_random -> "
        "6 optimizer steps of 8 rows -> 4 per rank -> microbatches of 4"
    )


def test_a_filter_whose_number_varies_is_said_to_vary():
    assert "what top keeps, a number that varies" in check_sizes(sizes(filter="top"), None, 1)


def test_a_microbatch_larger_than_the_rows_of_a_rank_is_all_of_them():
    assert check_sizes(sizes(microbatch=100), 2, 2).endswith("4 per rank -> microbatches of 4")


@pytest.mark.parametrize(
    "changes, keeps, world, numbers",
    [
        ({}, 2, 5, ["--prompts_per_step 12", "5 ranks"]),
        ({"minibatch": 9}, 2, 2, ["--minibatch 9", "2 ranks"]),
        ({"minibatch": 2}, 2, 4, ["--minibatch 2", "4 ranks"]),
        ({"microbatch": 3}, 2, 1, ["--microbatch 3", "8 rows", "--minibatch 8"]),
        ({"microbatch": 3}, None, 2, ["--microbatch 3", "4 rows", "--minibatch 8"]),
        ({"minibatch": 16}, 2, 1, ["--minibatch 16", "24 samples", "--filter best_random"]),
        ({"minibatch": 48}, 2, 1, ["--minibatch 48", "24 samples", "12 prompts x 5 samples"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_both_numbers(changes, keeps, world, numbers):
    with pytest.raises(UserError) as caught:
        check_sizes(sizes(**changes), keeps, world)
    message = str(caught.value)
    assert all(number in message for number in numbers) and "\n" not in message
