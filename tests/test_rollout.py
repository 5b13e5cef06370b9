"""Rows, masks, what is kept of them on each rank, minibatches, sizes of a run; streams, steps.

Not here: that ranks, padding and microbatches change no gradient (test_ppo.py).
"""

import math
from dataclasses import fields
from types import SimpleNamespace

from pfppo.rollout import Rollout, check_sizes, collate, seeded, step_prompts

import pytest
import torch
from ranks import refused

EOS, PAD = 2, 0
PROMPTS = [[10, 11, 12], [13, 14, 15], [16], [17, 18, 19, 20, 21]]
RESPONSES = [[30, 31, 32, EOS], [33, 34, 35, 36, 37, 38], [39, 40, EOS], [EOS]]
TENSORS = [field.name for field in fields(Rollout) if field.name != "parts"]


def rollout(pad_id=PAD):
    """Four ragged rows with all tensors; off the mask 1000."""
    rows = collate(PROMPTS, RESPONSES, pad_id)
    rows.rewards = torch.tensor([0.5, -1.0, 2.0, 0.0])
    rows.weights = torch.tensor([1.0, 0.0, 2.0, 0.5])
    count = float(rows.mask.sum())
    numbers = torch.full((4, 6), 1000.0).masked_scatter(rows.mask > 0, torch.arange(count))
    for i, name in enumerate(name for name in TENSORS if getattr(rows, name) is None):
        setattr(rows, name, numbers + i / 8)
    return rows


def test_a_row_is_laid_out_as_drawn():
    rows = collate(PROMPTS[:2], RESPONSES[:2], PAD)
    assert rows.ids[0].tolist() == [10, 11, 12, 30, 31, 32, EOS, PAD, PAD]
    assert rows.states[0, :4].tolist() == [2, 3, 4, 5]
    assert rows.ends[0].tolist() == [6]
    assert rows.responses[0, :4].tolist() == [30, 31, 32, EOS]
    assert rows.mask[0].tolist() == [1, 1, 1, 1, 0, 0]
    assert (len(rows), rows.width) == (2, 6)
    empty = Rollout(rows.ids, rows.prompt_lengths, torch.tensor([2, 0]))
    assert empty.mask.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_a_pad_that_equals_eos_changes_nothing_but_the_padding(pad_id):
    rows = rollout(pad_id)
    assert [y[:n].tolist() for y, n in zip(rows.responses, rows.lengths, strict=True)] == RESPONSES
    assert rows.mask.sum(1).tolist() == [4, 6, 3, 1]
    assert rows.ids.gather(1, rows.ends)[:, 0].tolist() == [EOS, 38, EOS, EOS]
    for ids, prompt, response in zip(rows.ids.tolist(), PROMPTS, RESPONSES, strict=True):
        assert ids == prompt + response + [pad_id] * (9 - len(prompt + response))


def test_collate_refuses_prompts_without_a_response():
    with pytest.raises(ValueError):
        collate(PROMPTS, RESPONSES[:3], PAD)


def assert_row(rows, i, whole, j):
    """Row i of `rows` is row j of `whole`, up to padding."""
    n, end = int(whole.lengths[j]), int(whole.prompt_lengths[j] + whole.lengths[j])
    for name in TENSORS:
        one, other = getattr(rows, name)[i], getattr(whole, name)[j]
        if one.ndim:
            stop = end if name == "ids" else n
            one, other = one[:stop], other[:stop]
        assert torch.equal(one, other), name


def test_select_gives_the_rows_asked_for_cut_to_the_longest_of_them():
    whole = rollout()
    chosen = whole.select(torch.tensor([3, 0, 3]))
    for i, j in enumerate([3, 0, 3]):
        assert_row(chosen, i, whole, j)
    assert chosen.ids.shape == (3, 7) and chosen.adv.shape == chosen.mask.shape == (3, 4)
    assert collate(PROMPTS, RESPONSES, PAD).select(torch.tensor([1])).adv is None  # not there yet


# -------------------------------------------------------------- what is kept, ranks, minibatches

N = 3
RANKS = {w: [SimpleNamespace(rank=rank, world=w) for rank in range(w)] for w in (1, 2, 4)}


def draw_weights(seed):
    """[8, N] of 0, 1/2 or 2, about half of them kept; of seed 0 exactly two of every prompt."""
    if seed == 0:
        return torch.tensor([[2.0, 0, 0.5]]).expand(8, -1)
    drawn = torch.rand(8, N, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn < 0.25, 0.5, 2.0 * (drawn < 0.5))


def kept_on(rank, weights, minibatch):
    """What a rank keeps. A row is prompt i and a response of one to N times j."""
    own = [(i, j) for i in range(rank.rank, len(weights), rank.world) for j in range(N)]
    rows = collate([[i] for i, _ in own], [[j] * (1 + (i + j) % N) for i, j in own], PAD)
    kept = rows.kept(weights, minibatch, rank)
    assert rows.weights is None  # the source is left alone
    return kept


def named(minibatches):
    """[[(prompt i, sample j, weight)]]"""
    return [
        list(zip(*rows.ids[:, :2].T.tolist(), rows.weights.tolist(), strict=True))
        for rows in minibatches
    ]


def together(ranks):
    """Of all ranks' named minibatches the kept rows, minibatch by minibatch."""
    minibatches = zip(*ranks, strict=True)
    return [sorted(row for row in sum(parts, []) if row[2] > 0) for parts in minibatches]


def test_what_two_ranks_keep_is_cut_and_padded_as_drawn():
    weights = torch.tensor([[1.0, 0, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
    first, second = (named(kept_on(rank, weights, 4).microbatches(4)) for rank in RANKS[2])
    assert first == [[(0, 0, 1), (0, 2, 1)], [(2, 1, 1), (2, 2, 1), (2, 0, 1)]]
    assert second == [[(1, 0, 1), (1, 1, 1)], [(3, 0, 1), (1, 2, 0), (1, 2, 0)]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("minibatch", [1, 4, 5, 100])
@pytest.mark.parametrize("world", RANKS)
def test_minibatches_do_not_depend_on_the_number_of_ranks(world, minibatch, seed):
    """They are the kept samples, each once, in runs of one size; all ranks run equally many."""
    weights = draw_weights(seed)
    expected = [(i, j, weights[i, j].item()) for i, j in weights.nonzero().tolist()]
    shares = [named(kept_on(rank, weights, minibatch).microbatches(100)) for rank in RANKS[world]]
    joined = together(shares)
    assert sorted(sum(joined, [])) == sorted(expected)
    assert [row[:1] for row in sum(joined, [])] == [row[:1] for row in expected]  # prompts in order
    assert len(joined) == math.ceil(len(expected) / minibatch)
    assert max(map(len, joined)) - min(map(len, joined)) <= 1
    for parts in zip(*shares, strict=True):  # as many as the fullest keeps, short ones fill up
        real = [[row for row in rows if row[2] > 0] for rows in parts]
        assert {*map(len, parts)} == {max(map(len, real))}
        for rows in parts:
            assert all((i + j) % N == 0 for i, j, weight in rows if weight == 0)


def test_where_no_rank_keeps_anything_there_are_no_rows_and_no_minibatches():
    kept = kept_on(RANKS[2][1], torch.zeros(8, N), 4)
    assert (len(kept), kept.width, kept.mask.shape) == (0, 0, (0, 0))
    assert kept.minibatches(seeded("test")) == []


def test_each_minibatch_comes_once_in_an_order_that_follows_the_generator_alone():
    def order(kept, key):
        return named(kept.minibatches(seeded("test", key)))

    one, *two = (kept_on(rank, draw_weights(0), 2) for rank in RANKS[1] + RANKS[2])
    assert order(one, 1) == order(one, 1) != order(one, 2)
    assert sorted(order(one, 1)) == sorted(order(one, 2))
    assert sorted(order(one, 1)) == sorted(map(sorted, named(one.microbatches(2))))
    assert together([order(kept, 1) for kept in two]) == order(one, 1)


@pytest.mark.parametrize("size, sizes", [(1, [1] * 4), (2, [2, 2]), (3, [3, 1]), (9, [4])])
def test_parts_are_all_rows_once_and_evaluation_does_not_see_them(size, sizes):
    def forward(model, rows, args):
        return model * args.factor * rows.responses * rows.mask, rows.adv * rows.mask

    whole, args = rollout(), SimpleNamespace(microbatch=size, factor=3)
    assert [len(part) for part in whole.microbatches(size)] == sizes
    for parts in (whole.microbatches(size), whole.minibatches(seeded("test"))):
        places = [(part, i) for part in parts for i in range(len(part))]
        rows = [whole.ids[:, 0].tolist().index(part.ids[i, 0]) for part, i in places]
        assert sorted(rows) == [0, 1, 2, 3]
        for j, (part, i) in zip(rows, places, strict=True):
            assert_row(part, i, whole, j)
    model = torch.tensor(0.5, requires_grad=True)
    products, adv = whole.evaluate(forward, model, args)
    assert torch.equal(products, 1.5 * whole.responses * whole.mask)
    assert torch.equal(adv, whole.adv * whole.mask) and not products.requires_grad
    assert torch.equal(whole.evaluate(lambda *x: forward(*x)[1], model, args), adv)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_the_losses_see_the_very_microbatches_that_were_evaluated(size):
    """Equal rows beside equal rows, equally wide: so the first ratio is exactly 1."""
    kept, evaluated = kept_on(RANKS[2][1], draw_weights(1), 5), []

    def forward(model, rows, args):
        evaluated.append(rows.ids.tolist())
        return rows.mask

    kept.evaluate(forward, None, SimpleNamespace(microbatch=size))
    minibatches = kept.minibatches(seeded("test"))
    learned = [mb.ids.tolist() for rows in minibatches for mb in rows.microbatches(size)]
    assert sorted(learned) == sorted(evaluated) and max(map(len, learned)) <= size


def test_rows_of_one_length_stand_together_so_that_little_is_padded():
    """Positions that a model sees per token, of 96 long-tailed responses in microbatches of 4."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(96, generator=generator) * 1.2 + 3).exp().long().clamp(1, 400).tolist()
    rows = collate([[1] * 8] * 96, [[2] * n for n in lengths], PAD)
    rows.parts = (48, 48)

    def share(parts):
        return sum(part.ids.numel() for part in parts) / int(rows.ends.sum() + 96)

    drawn = [rows.select(part) for part in torch.arange(96).split(4)]
    assert share(rows.microbatches(4)) < 1.25 < 2 < share(drawn)


def test_streams_of_different_purposes_or_keys_share_nothing_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    keys = [("filter", 1, 2), ("noise", 1, 2), ("filter", 1, 3), ("filter", 2, 2), ("filter", 12)]
    keys += [("filter1", 2), ("filter", "1", 2), ("filter", 1, 2, 0)]
    drawn = torch.cat([torch.randint(2**62, (100,), generator=seeded(*key)) for key in keys])
    assert len(drawn.unique()) == 100 * len(keys)
    assert torch.equal(torch.randint(2**62, (100,), generator=seeded(*keys[0])), drawn[:100])
    assert torch.equal(torch.get_rng_state(), before)


def sizes(**changes):
    values = dict(prompts_per_step=12, samples_per_prompt=5, minibatch=8, microbatch=4)
    return SimpleNamespace(**values | dict(ppo_epochs=2, filter="best_random") | changes)


def test_sizes_that_divide_are_one_line():
    expected = (
        "sizes: 12 prompts x 5 samples -> 60 sampled -> 24 kept by best_random -> "
        "6 optimizer steps of 8 rows -> 4 per rank -> microbatches of 4"
    )
    assert check_sizes(sizes(), 2, 2) == check_sizes(sizes(microbatch=100), 2, 2) == expected
    assert "what top keeps, a number that varies" in check_sizes(sizes(filter="top"), None, 1)


@pytest.mark.parametrize(
    "changes, keeps, world, numbers",
    [
        ({}, 2, 5, ["--prompts_per_step 12", "5 ranks: 10, 15 do"]),
        ({"minibatch": 9}, 2, 2, ["--minibatch 9", "2 ranks: 4, 6, 8 do"]),
        ({"minibatch": 2}, 2, 4, ["--minibatch 2", "4 ranks: 4, 8, 12 do"]),
        ({"minibatch": 21}, 2, 2, ["2 ranks: 6, 8, 24 do"]),  # 12: no 4 rows divide 6
        ({"minibatch": 2}, None, 4, ["--minibatch 2", "4 ranks: 4 does"]),
        ({"microbatch": 3}, 2, 1, ["--microbatch 3", "8 rows", "--minibatch 8: 1, 2, 4 do"]),
        ({"minibatch": 48}, 2, 1, ["x 5 samples: 8, 12, 24 do"]),
        ({"microbatch": 3}, None, 2, ["--microbatch 3", "4 rows", "--minibatch 8"]),
        ({"minibatch": 16}, 2, 1, ["--minibatch 16", "24 samples", "--filter best_random"]),
        ({"minibatch": 48}, 2, 1, ["--minibatch 48", "24 samples", "12 prompts x 5 samples"]),
        ({"filter": "mine.py:own"}, 0, 1, ["--filter mine.py:own: keeps none"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_both_numbers(changes, keeps, world, numbers):
    message = refused(check_sizes, sizes(**changes), keeps, world)
    assert all(number in message for number in numbers)


def epoch_of(count, size, epoch, seed):
    steps = range(epoch * (count // size), (epoch + 1) * (count // size))
    return sum((prompts(count, size, step, seed) for step in steps), [])


def prompts(count, size, step, seed, round=0, refill=0):
    args = SimpleNamespace(prompts_per_step=size, seed=seed, refill=refill)
    return step_prompts(args, count, step, round)


@pytest.mark.parametrize("count, size", [(12, 4), (11, 4)])
def test_an_epoch_is_a_permutation_of_the_prompts_but_for_a_part_that_fills_no_step(count, size):
    epochs = [epoch_of(count, size, epoch, seed=1) for epoch in range(20)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == count // size * size
    assert len(set(map(tuple, epochs))) == 20  # each another one
    assert set(sum(epochs, [])) == set(range(count))  # every prompt is seen sooner or later


def test_a_step_is_a_function_of_seed_and_step_alone():
    first = prompts(50, 5, 7, seed=1)
    torch.rand(3)  # the global state plays no part
    assert prompts(50, 5, 7, seed=1) == first
    assert prompts(50, 5, 7, seed=2) != first
    assert prompts(50, 5, 8, seed=1) != first


@pytest.mark.parametrize("count", [24, 29])
def test_the_rounds_of_a_step_have_prompts_that_no_other_round_or_step_of_the_epoch_has(count):
    for epoch in range(3):
        steps = 2 * epoch, 2 * epoch + 1  # of three rounds of four
        rounds = [
            prompts(count, 4, step, 1, round, refill=2) for step in steps for round in range(3)
        ]
        assert len({*sum(rounds, [])}) == 24 and {*sum(rounds, [])} <= {*range(count)}
