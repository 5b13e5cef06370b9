"""What is measured: every metric of `metrics.jsonl` is named, defined and summed over ranks here.

Over all P x N samples of the step (`of_samples`), "kept" means weight > 0:
    reward_all, reward_kept        mean normalised reward; of kept samples weighted by the filter
    score_all, score_kept, score_dropped    share that passes its tests, likewise
    kept                           share of samples with weight > 0
    response_length, truncated     mean tokens; share without EOS
Over the samples of this and the last steps, R2_STEPS together (`rolling_r2`):
    r2_all, r2_kept                R^2 of mean score on mean reward over 10 bins of equal weight
                                   (reliability.py), all samples and those kept, by their weights
Over kept samples, before the update (`Meter.mean`):
    kl_k1, kl_k3                   nats per response, policy against reference (ppo.py)
    entropy                        nats per token
    explained_variance             of returns by old values
Over the optimizer steps of the step (`Meter.share`): policy_loss, value_loss, approx_kl (k3 of the
update, nats per token) and clip_fraction, both weighted as the loss weighs tokens; grad_norm_actor,
grad_norm_critic.
    ratio_first_minibatch          mean of pi_new / pi_old over its tokens: exactly 1
Of the run: kl_coef (beta of this step), validation (greedy pass@1), empty_steps (nothing was kept)
and skipped_updates (a gradient was not finite), both counted from the start; tokens_per_second of
sampling; seconds_sample, seconds_score (tests and reward), seconds_update (all after scoring),
seconds_validation (with the export of a new best policy), seconds_save (what saving holds up).

What is missing (scores without tests, anything kept in an empty step) is null.
"""

import math
import resource
import time

from pfppo.benchmarks import pass_at_k_interval
from pfppo.fsdp import sum_over_ranks
from pfppo.reliability import binned_r2

import numpy as np
import torch

R2_STEPS = 5  # one step of the lab has too few samples to fill ten bins


def mean(values, weights=None):
    """Weighted mean, values that are NaN left out; None of nothing. A float."""
    weights = torch.ones_like(values) if weights is None else weights
    weights = weights * ~values.isnan()
    total = weights.sum().item()
    return (values.nan_to_num() * weights).sum().item() / total if total else None


def of_samples(rewards, weights, scores, lengths, finished):
    """Metrics of all samples of a step. All [P, N], of all ranks."""
    dropped = (weights == 0).to(scores.dtype)
    return {
        "reward_all": mean(rewards),
        "reward_kept": mean(rewards, weights),
        "score_all": mean(scores),
        "score_kept": mean(scores, weights),
        "score_dropped": mean(scores, dropped),
        "kept": 1 - mean(dropped),
        "response_length": mean(lengths.float()),
        "truncated": 1 - mean(finished.float()),
    }


def rolling_r2(steps):
    """R^2 of the reward, from the lines of `samples.jsonl` of several steps: [[record]]. Samples
    without tests are left out."""
    known = [r for records in steps for r in records if r["score"] is not None]
    reward, score, weight = (np.array([r[n] for r in known]) for n in ("reward", "score", "weight"))
    return {
        "r2_all": binned_r2(reward, score).r2,
        "r2_kept": binned_r2(reward, score, weight).r2,
    }


class Meter:
    """Collects sums on one rank; `result` adds them up over ranks and divides."""

    def __init__(self):
        self.sums, self.shares = {}, set()

    def add(self, name, total, count):
        """A sum and what it is divided by."""
        pair = torch.stack([total.detach().double(), count.detach().double()]).cpu()
        self.sums[name] = self.sums.get(name, 0) + pair

    def mean(self, name, values, weights):
        """A mean over rows or tokens of all ranks."""
        self.add(name, (values * weights).sum(), weights.sum())

    def share(self, name, part):
        """This rank's part of a number that is already divided by a global denominator."""
        self.shares.add(name)
        self.add(name, part, torch.zeros(()))

    def result(self, updates):
        """{name: float}; shares are averaged over the optimizer steps, a mean of nothing is NaN. A
        collective."""
        if not self.sums:
            return {}
        totals = sum_over_ranks(torch.stack(list(self.sums.values()))).tolist()
        return {
            name: total / (updates if name in self.shares else count or math.nan)
            for name, (total, count) in zip(self.sums, totals, strict=True)
        }


class Clock:
    """Seconds between calls of `lap`."""

    def __init__(self):
        self.laps, self.at = {}, time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.laps[f"seconds_{name}"] = now - self.at
        self.at = now


SECONDS = (
    *("tokens_per_second", "seconds_sample", "seconds_score", "seconds_update"),
    *("seconds_validation", "seconds_save"),
)
NAMES = (
    *("step", "reward_all", "reward_kept", "score_all", "score_kept", "score_dropped", "kept"),
    *("kl_k1", "kl_k3", "kl_coef", "entropy", "policy_loss", "value_loss", "approx_kl"),
    *("clip_fraction", "ratio_first_minibatch", "explained_variance", "r2_all", "r2_kept"),
    *("grad_norm_actor", "grad_norm_critic", "response_length", "truncated"),
    *("validation", "empty_steps", "skipped_updates"),
    *SECONDS,
)


def complete(metrics):
    """All of NAMES in their order; None where a value is missing or not finite."""
    unknown = set(metrics) - set(NAMES)
    assert not unknown, f"metrics without a definition: {unknown}"
    values = {name: metrics.get(name) for name in NAMES}
    known = {n: v for n, v in values.items() if v is not None and math.isfinite(v)}
    return dict.fromkeys(NAMES) | known


def line(metrics, steps):
    """The few numbers that matter, for the console."""

    def show(name, form):
        value = metrics.get(name)
        return "-" if value is None else format(value, form)

    seconds = sum(value for name, value in metrics.items() if name.startswith("seconds_"))
    text = (
        f"step {metrics['step']:>3}/{steps}  reward {show('reward_all', '+.2f')} "
        f"(kept {show('reward_kept', '+.2f')})  score {show('score_all', '.2f')} "
        f"(kept {show('score_kept', '.2f')})  kl {show('kl_k1', '.2f')}  "
        f"clip {show('clip_fraction', '.3f')}  length {show('response_length', '.0f')}  "
        f"{seconds:.1f} s"
    )
    if metrics.get("validation") is not None:
        text += f"  validation {metrics['validation']:.3f}"
    return text if metrics["kept"] else text + "  nothing kept: no update"


def sample_records(step, group_size, problems, texts, rewards, scores, weights):
    """The lines of `samples.jsonl` for B rows, as one list per prompt."""
    records = [
        {
            "step": step,
            "task_id": problem.task_id,
            "sample": i % group_size,
            "prompt": problem.question,
            "response": texts[i],
            "reward": rewards[i].item(),
            "score": None if scores[i].isnan() else scores[i].item(),
            "weight": weights[i].item(),
        }
        for i, problem in enumerate(problems)
    ]
    return [records[i : i + group_size] for i in range(0, len(records), group_size)]


def pass_rate(passed):
    """[0 or 1] of one answer per problem -> mean with its 95 % bootstrap interval over problems."""
    value, low, high = pass_at_k_interval([(1, int(p)) for p in passed], 1)
    return {"pass@1": value, "low": low, "high": high}


def table(rates, count):
    """{row: {column: pass_rate}} as the last lines of a run."""
    columns = list(next(iter(rates.values())))
    width = max(len(name) for name in rates)
    title = f"pass@1 on {count} test problems, with 95 % intervals"
    lines = ["", title, f"{'':{width}}  " + "  ".join(f"{column:22}" for column in columns)]
    for name, row in rates.items():
        cells = ("{pass@1:.3f} [{low:.3f}, {high:.3f}]".format(**row[c]) for c in columns)
        lines.append(f"{name:{width}}  " + "  ".join(f"{cell:22}" for cell in cells))
    return "\n".join([*lines, ""])


def peak_gib():
    """Most memory that this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
