"""What is measured: definitions, missing values, sums over a world of one rank."""

import json
import math
import random
from types import SimpleNamespace

from pfppo.metrics import (
    NAMES,
    Clock,
    Meter,
    complete,
    line,
    mean,
    of_samples,
    pass_rate,
    peak_gib,
    rolling_r2,
    sample_records,
    table,
)
from pfppo.reliability import binned_r2

import numpy as np
import pytest
import torch

NAN = float("nan")


def step(**changes):
    """The metrics of a step as `line` takes them."""
    values = dict(step=3, reward_all=0.25, reward_kept=0.75, score_all=0.5, score_kept=0.625)
    values |= dict(kept=0.4, kl_k1=1.5, clip_fraction=0.01, response_length=31.6)
    return values | dict(seconds_sample=1.0, seconds_score=0.5, seconds_update=2.0) | changes


# -------------------------------------------------------------------------------------------- means


def test_a_mean_leaves_out_nan_and_is_weighted():
    values = torch.tensor([1.0, NAN, 4.0])
    assert mean(values) == 2.5
    assert mean(values, torch.tensor([3.0, 100.0, 1.0])) == 1.75


@pytest.mark.parametrize(
    "values, weights", [([NAN, NAN], None), ([1.0, 2.0], [0.0, 0.0]), ([NAN, 2.0], [1.0, 0.0])]
)
def test_a_mean_of_nothing_is_missing(values, weights):
    weights = None if weights is None else torch.tensor(weights)
    assert mean(torch.tensor(values), weights) is None


def test_metrics_of_samples_are_those_of_the_definitions():
    found = of_samples(
        rewards=torch.tensor([[1.0, -1.0], [3.0, 0.0]]),
        weights=torch.tensor([[0.5, 0.0], [1.5, 0.0]]),
        scores=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        lengths=torch.tensor([[3, 5], [7, 9]]),
        finished=torch.tensor([[True, True], [False, True]]),
    )
    assert found == {
        "reward_all": 0.75,
        "reward_kept": 2.5,  # weighted by the filter
        "score_all": 0.5,
        "score_kept": 0.25,
        "score_dropped": 0.5,
        "kept": 0.5,
        "response_length": 6,
        "truncated": 0.25,
    }


def samples(weights, scores):
    return of_samples(torch.ones(2, 2), weights, scores, torch.ones(2, 2), torch.ones(2, 2) > 0)


def test_scores_of_prompts_without_tests_are_missing():
    found = samples(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.full((2, 2), NAN))
    assert found["score_all"] is found["score_kept"] is found["score_dropped"] is None


def test_where_nothing_is_kept_what_is_kept_has_no_mean():
    found = samples(torch.zeros(2, 2), torch.ones(2, 2))
    assert found["reward_kept"] is found["score_kept"] is None
    assert (found["kept"], found["score_dropped"], found["reward_all"]) == (0, 1, 1)


def test_where_all_is_kept_nothing_dropped_has_a_score():
    found = samples(torch.ones(2, 2), torch.ones(2, 2))
    assert found["score_dropped"] is None and found["kept"] == 1


# -------------------------------------------------------------------------------- records and lines


def test_complete_has_every_name_in_order_and_null_for_what_is_missing_or_not_finite():
    known = {"kept": 0.4, "step": 7, "kl_k1": NAN, "kl_k3": math.inf, "entropy": None}
    record = complete(known)
    assert list(record) == list(NAMES)
    assert (record["step"], record["kept"]) == (7, 0.4)
    assert all(record[name] is None for name in NAMES if name not in ("step", "kept"))
    json.dumps(record, allow_nan=False)


def test_the_names_that_readers_rely_on_are_there_once():
    promised = """step reward_all reward_kept score_all score_kept score_dropped kl_k1 kl_k3 entropy
        clip_fraction ratio_first_minibatch value_loss explained_variance response_length truncated
        grad_norm_actor grad_norm_critic tokens_per_second seconds_sample seconds_score
        seconds_update seconds_validation seconds_save""".split()
    assert set(promised) <= set(NAMES) and len(set(NAMES)) == len(NAMES)


def test_a_metric_without_a_definition_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="rewrad_all"):
        complete({"rewrad_all": 1.0})


def test_the_line_of_a_step_shows_the_numbers_that_matter():
    assert line(step(), 40) == (
        "step   3/40  reward +0.25 (kept +0.75)  score 0.50 (kept 0.62)  kl 1.50  "
        "clip 0.010  length 32  3.5 s"
    )


def test_the_line_of_an_empty_step_says_so_and_shows_no_numbers_it_has_not():
    missing = dict(reward_kept=None, score_kept=None, kl_k1=None, clip_fraction=None)
    text = line(step(kept=0.0, **missing), 40)
    assert text.endswith("nothing kept: no update")
    assert "(kept -)" in text and "kl -" in text and "clip -" in text


def test_the_line_shows_validation_only_when_it_was_looked_at():
    assert "validation 0.625" in line(step(validation=0.625), 40)
    assert "validation" not in line(step(validation=None), 40)


def test_sample_records_are_one_list_per_prompt_and_null_where_there_are_no_tests():
    problems = [SimpleNamespace(task_id=f"t/{i // 2}", question=f"p{i // 2}") for i in range(4)]
    numbers = [torch.tensor(x) for x in ([0.5, 1, 2, 3], [1.0, 0, NAN, NAN], [1.0, 0, 0, 2])]
    found = sample_records(6, 2, problems, ["a", "b", "c", "d"], *numbers)
    assert [[record["sample"] for record in group] for group in found] == [[0, 1], [0, 1]]
    assert found[1][1] == {
        "step": 6,
        "task_id": "t/1",
        "sample": 1,
        "prompt": "p1",
        "response": "d",
        "reward": 3.0,
        "score": None,
        "weight": 2.0,
    }
    assert [record["score"] for record in found[0]] == [1.0, 0.0]


# ------------------------------------------------------------------------------------------- meters


def test_a_meter_divides_sums_by_sums_and_not_means_by_calls(ranks):
    meter = Meter()
    meter.mean("kl_k1", torch.tensor([1.0, 9.0]), torch.tensor([1.0, 0.0]))
    meter.mean("kl_k1", torch.tensor([4.0, 4.0, 4.0]), torch.ones(3))
    meter.add("ratio_first_minibatch", torch.tensor(6.0), torch.tensor(4.0))
    assert meter.result(updates=7) == {"kl_k1": 3.25, "ratio_first_minibatch": 1.5}


def test_a_meter_averages_shares_over_the_optimizer_steps(ranks):
    meter = Meter()
    for part in (0.25, 0.5, 1.5, 0.75):  # two microbatches in each of two steps
        meter.share("policy_loss", torch.tensor(part))
    assert meter.result(updates=2) == {"policy_loss": 1.5}


def test_a_meter_keeps_no_graph(ranks):
    meter, loss = Meter(), torch.tensor(2.0, requires_grad=True)
    meter.share("value_loss", loss * 1)
    assert not meter.sums["value_loss"].requires_grad


def test_a_meter_of_an_empty_step_has_no_results():
    assert Meter().result(updates=0) == {}


def test_a_clock_names_the_seconds_between_laps(monkeypatch):
    now = iter([10.0, 12.5, 13.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock()
    clock.lap("sample")
    clock.lap("score")
    assert clock.laps == {"seconds_sample": 2.5, "seconds_score": 0.5}


# ------------------------------------------------------------------------------------- end of a run


def test_a_pass_rate_stands_within_its_interval():
    rate = pass_rate([1.0] * 30 + [0.0] * 10)
    value, low, high = rate["pass@1"], rate["low"], rate["high"]
    # the normal approximation: 0.75 +- 1.96 * sqrt(0.75 * 0.25 / 40) = 0.616 to 0.884
    assert value == 0.75 and low == pytest.approx(0.616, abs=0.04)
    assert high == pytest.approx(0.884, abs=0.04)


def test_rolling_r2_is_that_of_all_and_of_kept_samples_of_several_steps():
    """Rewards tell scores exactly at both ends, and nothing in the middle, which is dropped."""
    draw = random.Random(0)
    records = []
    for i in range(400):
        reward = draw.uniform(-1, 1)
        sure = abs(reward) > 0.5
        score = float(reward > 0) if sure else float(i % 2)
        records.append({"reward": reward, "score": score, "weight": float(sure)})
    records += [{"reward": 0.0, "score": None, "weight": 1.0}] * 50  # no tests: no score
    found = rolling_r2([records[:100], records[100:]])
    arrays = (np.array([r[n] for r in records[:400]]) for n in ("reward", "score", "weight"))
    reward, score, weight = arrays
    assert found["r2_all"] == binned_r2(reward, score).r2 < found["r2_kept"]
    only = weight > 0
    assert found["r2_kept"] == pytest.approx(binned_r2(reward[only], score[only]).r2)


@pytest.mark.parametrize("records", [[], [{"reward": 1.0, "score": None, "weight": 1.0}]])
def test_r2_without_scores_is_missing(records):
    row = complete({"step": 1} | rolling_r2([records]))
    assert row["r2_all"] is None and row["r2_kept"] is None


def test_the_table_has_a_row_per_policy_and_a_column_per_way_of_decoding():
    rates = {
        name: {
            column: {"pass@1": value, "low": value - 0.1, "high": value + 0.1}
            for column, value in zip(("greedy", "sampled"), values, strict=True)
        }
        for name, values in {"before": (0.5, 0.6), "after": (0.7, 0.8)}.items()
    }
    title, head, *rows = table(rates, 200).strip().split("\n")
    assert "200 test problems" in title and head.split() == ["greedy", "sampled"]
    assert rows[0].split() == ["before", *"0.500 [0.400, 0.600] 0.600 [0.500, 0.700]".split()]
    assert rows[1].split() == ["after", *"0.700 [0.600, 0.800] 0.800 [0.700, 0.900]".split()]
    assert head.index("sampled") == rows[0].index("0.600 [") == rows[1].index("0.800 [")


def test_peak_memory_is_in_gib():
    assert 0.05 < peak_gib() < 64  # torch alone is more than 50 MiB
