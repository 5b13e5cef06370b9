"""What is measured: definitions, missing values, what padding and ranks may not change."""

import json
import math
import random
from types import SimpleNamespace

from pfppo import metrics
from pfppo.metrics import NAMES, Meter, complete, line, mean, rolling_r2
from pfppo.reliability import binned_r2
from pfppo.rollout import Rollout, collate, seeded

import numpy as np
import pytest
import torch

NAN = float("nan")


@pytest.mark.parametrize(
    "values, weights, expected",
    [
        ([1.0, NAN, 4.0], None, 2.5),
        ([1.0, NAN, 4.0], [3.0, 100.0, 1.0], 1.75),
        ([NAN, NAN], None, None),
        ([1.0, 2.0], [0.0, 0.0], None),
        ([NAN, 2.0], [1.0, 0.0], None),
    ],
)
def test_a_mean_is_weighted_leaves_out_nan_and_is_missing_of_nothing(values, weights, expected):
    assert mean(torch.tensor(values), weights and torch.tensor(weights)) == expected


def of_samples(ranks, weights, scores, rewards=((1.0, 1.0), (1.0, 1.0))):
    """What is measured of two prompts with two samples each, 24 tokens in 2 seconds."""
    meter, lengths = Meter(ranks), SimpleNamespace(lengths=torch.tensor([3, 5, 7, 9]))
    meter.laps["seconds_sample"] = 2.0
    ended = torch.tensor([True, True, False, True])
    answers = SimpleNamespace(rows=lengths, scores=torch.tensor(scores), finished=ended)
    meter.samples(answers, torch.tensor(rewards), torch.tensor(weights))
    return meter.values


def test_metrics_of_samples_are_those_of_the_definitions(ranks):
    rewards, weights = [[1.0, -1.0], [3.0, 0.0]], [[0.5, 0.0], [1.5, 0.0]]
    expected = {"reward_all": 0.75, "reward_kept": 2.5, "kept": 0.5}  # weighted by the filter
    expected |= {"score_all": 0.5, "score_kept": 0.25, "score_dropped": 0.5}
    expected |= {"response_length": 6, "truncated": 0.25, "tokens_per_second": 12}
    # A = 1, -1 and 3/2, -3/2, c = 1/2, -1/2 and -1/2, 1/2: (1 - 3/2) / sqrt(13/2)
    expected |= {"alpha_all": -0.5 / 6.5**0.5}
    # A = 1, 3/2 where weights are, minus 11/8: w A c = -3/32, -3/32; w^2 A^2 = 9/256, 9/256
    expected |= {"alpha_kept": -0.1875 / (18 / 256) ** 0.5}
    found = of_samples(ranks, weights, [1.0, 0.0, 0.0, 1.0], rewards)
    assert found == pytest.approx(expected)


def test_alignment_is_over_prompts_whose_scores_are_known(ranks):
    rewards, scores = [[1.0, -1.0], [3.0, 0.0]], [1.0, 0.0, NAN, 1.0]
    found = of_samples(ranks, [[1.0, 1.0], [1.0, 0.0]], scores, rewards)
    assert found["alpha_all"] == found["alpha_kept"] == pytest.approx(1)
    found = of_samples(ranks, [[1.0, 1.0], [1.0, 0.0]], [NAN] * 4, rewards)
    assert math.isnan(found["alpha_all"]) and math.isnan(found["alpha_kept"])


def test_what_samples_do_not_show_is_missing(ranks):
    untested = of_samples(ranks, [[1.0, 0.0], [1.0, 0.0]], [NAN] * 4)
    assert untested["score_all"] is untested["score_kept"] is untested["score_dropped"] is None
    nothing = of_samples(ranks, [[0.0, 0.0], [0.0, 0.0]], [1.0] * 4)
    assert nothing["reward_kept"] is nothing["score_kept"] is None
    assert (nothing["kept"], nothing["score_dropped"], nothing["reward_all"]) == (0, 1, 1)
    everything = of_samples(ranks, [[1.0, 1.0], [1.0, 1.0]], [1.0] * 4)
    assert everything["score_dropped"] is None and everything["kept"] == 1


def row_of(meter):
    """A step's row, and what it counts in a state that has counted 2 and 5."""
    state = SimpleNamespace(step=7, kl_coef=0.1, empty_steps=2, skipped_updates=5)
    row = meter.row(state)
    assert (row.pop("step"), row.pop("kl_coef")) == (7, 0.1)
    return row, row.pop("empty_steps") - 2, row.pop("skipped_updates") - 5


def test_metrics_of_kept_rows_are_those_of_the_loop_and_padded_rows_change_none(ranks):
    def measured(rows):
        meter = Meter(ranks)
        meter.kept(rows)
        return row_of(meter)[0]

    names = ("old_logp", "ref_logp", "entropy", "old_values", "returns")
    numbers = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    rows = Rollout(
        ids=torch.zeros(4, 7, dtype=torch.long),
        prompt_lengths=torch.ones(4, dtype=torch.long),
        lengths=torch.tensor([3, 6, 1, 4]),  # the longest is padding
        weights=torch.tensor([0.5, 0.0, 2.0, 1.0]),
        **dict(zip(names, numbers, strict=True)),
    )
    real = torch.arange(6) < torch.tensor([3, 0, 1, 4])[:, None]
    expected = {"kl_kept": (rows.old_logp - rows.ref_logp)[real].sum() / 3}  # per response
    expected |= {"entropy": rows.entropy[real].mean()}
    found = measured(rows)
    assert found == pytest.approx(measured(rows.select(torch.tensor([0, 2, 3]))))
    assert [found[name] for name in expected] == pytest.approx([*map(float, expected.values())])


def test_the_kl_of_the_policy_is_that_of_one_random_sample_of_each_prompt_whatever_is_kept():
    """Best of N keeps what has gone furthest from the reference; its KL is not the policy's."""
    ref, logp = (torch.log_softmax(torch.tensor(x), 0) for x in ([0.0, 0, 0], [2.0, 0, -1]))
    kl, P, N = (logp.exp() * (logp - ref)).sum().item(), 4000, 5
    tokens = torch.multinomial(logp.exp(), P * N, True, generator=seeded("test"))
    rows = collate([[0]] * (P * N), tokens[:, None].tolist(), pad_id=0)
    rows.old_logp, rows.ref_logp = logp[tokens][:, None], ref[tokens][:, None]
    rows.sampled_logp = rows.old_logp - 0.1
    rewards, found = -tokens.view(P, N).float(), []  # token 0 is the best
    for world in (1, 2):
        sums = 0
        for rank in (SimpleNamespace(rank=r, world=world) for r in range(world)):
            own = torch.arange(P * N).view(P, N)[rank.rank :: world].flatten()
            meter = Meter(rank)
            meter.watched(rows.select(own).one_of_each(rewards, rank, seeded("kl", 1)))
            sums += torch.stack([meter.sums[n] for n in ("kl_k1", "kl_k3", "sampler_kl")])
        found.append(sums[:, 0] / sums[:, 1])
        assert (sums[:, 1] == P).all()
    torch.testing.assert_close(*found)  # on any number of ranks
    assert found[0][:2].tolist() == pytest.approx([kl, kl], abs=0.03)
    assert found[0][2].item() == pytest.approx(math.exp(0.1) - 1 - 0.1, 1e-4)  # per token
    best = rewards.argmax(1) + N * torch.arange(P)
    assert (rows.old_logp - rows.ref_logp)[best].mean() > 1.3 * kl  # what was measured before


@pytest.mark.parametrize("world", [1, 2, 3])
def test_losses_and_norms_are_means_over_optimizer_steps_whatever_the_ranks(monkeypatch, world):
    """The ranks say the same; each has its part of a loss, and all of a norm."""
    monkeypatch.setattr(metrics, "sum_over_ranks", lambda x: world * x)
    meter = Meter(SimpleNamespace(world=world))
    for loss, ratios, norm in ((0.75, 6.0, 3.0), (0.25, 100.0, 5.0)):
        part, tokens = torch.tensor(loss / world, requires_grad=True), torch.tensor(4.0)
        meter.losses({"policy_loss": part, "ratio_sum": torch.tensor(ratios), "tokens": tokens})
        meter.gradient("actor", norm)
    assert not meter.sums["policy_loss"].requires_grad  # no graph is kept
    expected = {"policy_loss": 0.5, "grad_norm_actor": 4.0, "ratio_first_minibatch": 1.5}
    assert row_of(meter) == (pytest.approx(expected), 0, 0)


def test_an_empty_step_and_gradients_that_are_not_finite_are_counted_and_have_no_numbers(ranks):
    assert row_of(Meter(None)) == ({}, 1, 0)
    meter = Meter(ranks)
    for norm in (NAN, math.inf, 1.0):
        meter.gradient("actor", norm)
    row, _, skipped = row_of(meter)
    assert skipped == 2 and complete(row)["grad_norm_actor"] is None


def test_laps_are_in_seconds_and_peak_memory_is_in_gib(monkeypatch):
    monkeypatch.setattr("time.perf_counter", iter([10.0, 12.5, 13.0]).__next__)
    meter = Meter(None)
    meter.lap("sample")
    meter.lap("score")
    assert meter.laps == {"seconds_sample": 2.5, "seconds_score": 0.5}
    assert (
        0.05 < float(metrics.peak_memory().removesuffix(" GiB")) < 64
    )  # torch alone is more than 50 MiB
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    assert metrics.peak_memory().startswith("3.0 GiB on the device, ")


PROMISED = """step reward_all reward_kept score_all score_kept score_dropped kl_k1 kl_k3 entropy
    clip_fraction ratio_first_minibatch value_loss explained_variance response_length truncated
    grad_norm_actor grad_norm_critic tokens_per_second seconds_sample seconds_score
    seconds_update seconds_validation seconds_save""".split()


def test_complete_has_every_name_once_in_order_and_null_for_what_is_missing_or_not_finite():
    record = complete({"kept": 0.4, "step": 7, "kl_k1": NAN, "kl_k3": math.inf, "entropy": None})
    assert list(record) == list(NAMES) and set(PROMISED) <= set(NAMES)
    assert (record["step"], record["kept"]) == (7, 0.4)
    assert all(record[name] is None for name in NAMES if name not in ("step", "kept"))
    json.dumps(record, allow_nan=False)
    with pytest.raises(AssertionError, match="rewrad_all"):  # it has no definition
        complete({"rewrad_all": 1.0})


def line_of(**changes):
    values = dict(step=3, reward_all=0.25, reward_kept=0.75, score_all=0.5, score_kept=0.625)
    values |= dict(kept=0.4, kl_k1=1.5, clip_fraction=0.01, response_length=31.6)
    values |= dict(seconds_sample=1.0, seconds_score=0.5, seconds_update=2.0)
    return line(values | changes, 40)


@pytest.mark.parametrize(
    "truncated, shown", [(0.61, "  cut 0.61  "), (0.004, "  cut 0.004  "), (1.0, "  cut 1.00  ")]
)
def test_the_line_of_a_step_says_what_share_was_cut_off(truncated, shown):
    assert shown in line_of(truncated=truncated)
    assert "cut" not in line_of(truncated=0.0)


@pytest.mark.parametrize("truncated, said", [(0.4, " (0.40 cut)"), (0.05, ""), (None, "")])
def test_validation_says_where_much_was_cut_off(truncated, said):
    text = line_of(validation=0.5, validation_truncated=truncated)
    assert text.endswith(f"  validation 0.500{said}")


def test_the_line_of_a_step_shows_the_numbers_that_matter_and_those_that_are_there():
    expected = (
        "step   3/40  reward +0.25 (kept +0.75)  score 0.50 (kept 0.62)  kl 1.50  "
        "clip 0.010  length 32  3.5 s"
    )
    assert line_of() == line_of(validation=None) == expected
    assert line_of(validation=0.625) == expected + "  validation 0.625"
    slow = line_of(seconds_update=60.4, seconds_validation=None)
    assert slow == expected.replace("3.5 s", "61.9 s (sample 1, score 0, update 60)")
    empty = line_of(kept=0.0, reward_kept=None, score_kept=None, kl_k1=None, clip_fraction=None)
    assert empty.endswith("nothing kept: no update")
    assert "(kept -)" in empty and "kl -" in empty and "clip -" in empty


def test_sample_records_are_one_list_per_prompt_and_null_where_there_are_no_tests():
    answers = SimpleNamespace(
        problems=[SimpleNamespace(task_id=f"t/{i // 2}", question=f"p{i // 2}") for i in range(4)],
        texts=["a", "b", "c", "d"],
        rewards=torch.tensor([0.5, 1, 2, 3]),
        scores=torch.tensor([1.0, 0, NAN, NAN]),
        rows=SimpleNamespace(lengths=torch.tensor([4, 5, 6, 7])),
        finished=torch.tensor([True, True, True, False]),
        logp=torch.tensor([-1.0, -2, -3, -4.00001]),
        reward_models=(),
    )
    found = metrics.sample_records(6, 2, answers, torch.tensor([1.0, 0, 0, 2]))
    assert [[record["sample"] for record in group] for group in found] == [[0, 1], [0, 1]]
    last = {"step": 6, "task_id": "t/1", "sample": 1, "prompt": "p1", "response": "d"}
    last |= {"reward": 3.0, "score": None, "weight": 2.0, "length": 7, "finished": False}
    last |= {"logp": -4.0}
    assert found[1][1] == last
    answers.reward_models, answers.members = (None, None), torch.eye(4)[:, :2]
    both = metrics.sample_records(6, 2, answers, torch.ones(4))
    assert both[0][1]["members"] == [0.0, 1.0]
    assert [record["score"] for record in found[0]] == [1.0, 0.0]


def test_rolling_r2_is_that_of_all_and_of_kept_samples_of_several_steps():
    """Rewards tell scores exactly at both ends, and nothing in the middle, which is dropped."""
    draw = random.Random(0)
    records = []
    for i in range(400):
        reward = draw.uniform(-1, 1)
        sure = abs(reward) > 0.5
        score = float(reward > 0) if sure else float(i % 2)
        records.append({"reward": reward, "score": score, "weight": float(sure)})
    untested = [{"reward": 0.0, "score": None, "weight": 1.0}] * 50  # no tests: no score
    found = rolling_r2([records[:100], records[100:] + untested])
    reward, score, weight = np.array([list(record.values()) for record in records]).T
    assert found["r2_all"] == binned_r2(reward, score).r2 < found["r2_kept"]
    assert found["r2_kept"] == pytest.approx(binned_r2(reward[weight > 0], score[weight > 0]).r2)
    rows = [complete(rolling_r2([known])) for known in ([], untested)]
    assert [(row["r2_all"], row["r2_kept"]) for row in rows] == [(None, None)] * 2
