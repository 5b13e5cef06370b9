"""What is measured: every metric of `metrics.jsonl` is named, defined and summed over ranks here.

Over all samples of the step, P x N of each round (`Meter.samples`), "kept" means weight > 0:
    reward_all, reward_kept        mean normalised reward; of kept samples weighted by the filter
    score_all, score_kept, score_dropped    share that is right (--verify), likewise
    kept                           share of samples with weight > 0
    alpha_all, alpha_kept          alignment of what is taught with what is right (reliability.py),
                                   of all samples and under the filter; prompts with tests only
    response_length, truncated     mean tokens; share without EOS
Over the samples of this and the last steps, R2_STEPS together (`rolling_r2`):
    r2_all, r2_kept                R^2 of mean score on mean reward over 10 bins of equal weight
                                   (reliability.py), all samples and those kept, by their weights
Over one random sample of each prompt (`Meter.watched`), so whatever the filter keeps:
    kl_k1, kl_k3                   nats per response, policy against reference (ppo.py)
    sampler_kl                     nats per token (k3), the sampler's log-probs against training's
Over kept samples, before the update (`Meter.kept`):
    kl_kept                        k1 likewise: what the reward has of it
    entropy                        nats per token
    explained_variance             of returns by old values
Over the optimizer steps of the step (`Meter.losses`, `gradient`): policy_loss,
value_loss, approx_kl (k3 of the update, nats per token) and clip_fraction, both weighted as the
loss weighs tokens; grad_norm_actor, grad_norm_critic.
    ratio_first_minibatch          mean of pi_new / pi_old over its tokens: exactly 1, or --compile
Of the run: kl_coef (beta of this step), validation (greedy pass@1) and
validation_truncated (share of these answers without EOS), empty_steps (nothing was kept) and
skipped_updates (a gradient was not finite), both counted from the start; tokens_per_second of
sampling; seconds_sample, seconds_score (tests and reward), seconds_update (all after scoring),
seconds_validation (with the export of a new best policy), seconds_save (what saving holds up).

What is missing (scores where nobody knows, anything kept in an empty step) is null.
"""

import math
import resource
import time

from pfppo import ppo
from pfppo.fsdp import gather_rows, sum_over_ranks
from pfppo.reliability import Weights, alignment, binned_r2

import numpy as np
import torch

LONG = 30.0  # seconds of a step whose line says what they went into
R2_STEPS = 5  # one step of the lab has too few samples to fill ten bins


def mean(values, weights=None):
    """Weighted mean, values that are NaN left out; None of nothing. A float."""
    weights = torch.ones_like(values) if weights is None else weights
    weights = weights * ~values.isnan()
    total = weights.sum().item()
    return (values.nan_to_num() * weights).sum().item() / total if total else None


def rolling_r2(steps):
    """R^2 of the reward, from the lines of `samples.jsonl` of several steps: [[record]]. Samples
    without tests are left out."""
    known = [r for records in steps for r in records if r["score"] is not None]
    reward, score, weight = (np.array([r[n] for r in known]) for n in ("reward", "score", "weight"))
    return {
        "r2_all": binned_r2(reward, score).r2,
        "r2_kept": binned_r2(reward, score, weight).r2,
    }


def alphas(rewards, scores, weights):
    """Alignment over the prompts of a step whose scores are known; all tensors [P, N]."""
    known = ~scores.isnan().any(1)
    rewards, scores, weights = (x[known].double().numpy() for x in (rewards, scores, weights))
    kept = alignment(rewards, scores, Weights.of(weights))
    return {"alpha_all": alignment(rewards, scores).alpha, "alpha_kept": kept.alpha}


class Meter:
    """What one step measures. Sums are this rank's, until `row` adds them up over ranks."""

    def __init__(self, ranks):
        self.ranks, self.at = ranks, time.perf_counter()
        self.laps = {}  # seconds
        self.values = {}  # equal on all ranks
        self.sums = {}  # name: [total, count], to be divided
        self.updates = self.skipped = 0

    def lap(self, name):
        """Seconds since the last lap; those of one name are added up."""
        now = time.perf_counter()
        name = f"seconds_{name}"
        self.laps[name], self.at = self.laps.get(name, 0) + now - self.at, now

    def add(self, name, total, count):
        pair = torch.stack([x.detach().double().cpu() for x in (total, count)])
        self.sums[name] = self.sums.get(name, 0) + pair

    def samples(self, answers, rewards, weights):
        """All samples of the step. answers: this rank's; rewards, weights [P, N]: of all ranks."""
        N, lengths = rewards.shape[1], answers.rows.lengths.cpu()
        scores, lengths, finished = (
            gather_rows(x.float().view(-1, N), self.ranks)
            for x in (answers.scores, lengths, answers.finished)
        )
        dropped = (weights == 0).to(scores.dtype)
        self.values |= {
            "reward_all": mean(rewards),
            "reward_kept": mean(rewards, weights),
            "score_all": mean(scores),
            "score_kept": mean(scores, weights),
            "score_dropped": mean(scores, dropped),
            "kept": 1 - mean(dropped),
            "response_length": mean(lengths),
            "truncated": 1 - mean(finished),
        }
        self.values |= alphas(rewards, scores, weights)
        tokens = self.values["response_length"] * rewards.numel()
        self.values["tokens_per_second"] = tokens / self.laps["seconds_sample"]

    def watched(self, rows):
        """One random sample of each prompt: KL of the policy itself, whatever a filter keeps."""
        count = torch.tensor(float(len(rows)))
        for name, estimator in (("kl_k1", ppo.kl_k1), ("kl_k3", ppo.kl_k3)):
            kl = estimator(rows.old_logp, rows.ref_logp)
            self.add(name, (kl * rows.mask).double().sum(), count)
        kl = ppo.kl_k3(rows.sampled_logp, rows.old_logp)
        self.add("sampler_kl", (kl * rows.mask).sum(), rows.mask.sum())

    def kept(self, kept):
        """The survivors with all their old numbers. A collective."""
        alive = (kept.weights > 0).double()  # 0 where a row is padded
        tokens = kept.mask * alive[:, None]
        self.add("entropy", (kept.entropy * tokens).sum(), tokens.sum())
        kl = ppo.kl_k1(kept.old_logp, kept.ref_logp)
        self.add("kl_kept", (kl * tokens).sum(), alive.sum())
        if kept.old_values is not None:
            how = kept.mask * kept.weights[:, None], sum_over_ranks
            explained = ppo.explained_variance(kept.old_values, kept.returns, *how)
            self.values["explained_variance"] = explained.item()

    def losses(self, sums):
        """What the losses of one optimizer step say: parts of numbers divided by a global
        denominator already, but for the ratio."""
        sums = dict(sums)
        ratio = sums.pop("ratio_sum"), sums.pop("tokens")
        if not self.updates:
            self.add("ratio_first_minibatch", *ratio)
        self.updates += 1
        for name, part in sums.items():
            self.add(name, part, torch.tensor(1.0 / self.ranks.world))

    def gradient(self, name, norm):
        """A gradient's norm, equal on all ranks; one that is not finite skipped an update."""
        one = torch.tensor(1.0 / self.ranks.world)
        self.add(f"grad_norm_{name}", norm * one, one)
        self.skipped += not math.isfinite(norm)

    def row(self, state):
        """{name: value} of the step; counts what the state of the run counts. A collective."""
        state.empty_steps += not self.updates
        state.skipped_updates += self.skipped
        if self.sums:
            totals = sum_over_ranks(torch.stack(list(self.sums.values()))).tolist()
            for name, (total, count) in zip(self.sums, totals, strict=True):
                self.values[name] = total / count if count else math.nan
        counted = {name: getattr(state, name) for name in ("empty_steps", "skipped_updates")}
        return {"step": state.step, "kl_coef": state.kl_coef, **self.values, **counted}


SECONDS = (
    *("tokens_per_second", "seconds_sample", "seconds_score", "seconds_update"),
    *("seconds_validation", "seconds_save"),
)
NAMES = (
    *("step", "reward_all", "reward_kept", "score_all", "score_kept", "score_dropped", "kept"),
    *("kl_k1", "kl_k3", "kl_kept", "sampler_kl", "kl_coef", "entropy", "policy_loss", "value_loss"),
    *("approx_kl", "clip_fraction", "ratio_first_minibatch", "explained_variance"),
    *("r2_all", "r2_kept", "alpha_all", "alpha_kept", "grad_norm_actor", "grad_norm_critic"),
    *("response_length", "truncated"),
    *("validation", "validation_truncated", "empty_steps", "skipped_updates", *SECONDS),
)


def complete(metrics):
    """All of NAMES in their order; None where a value is missing or not finite."""
    unknown = set(metrics) - set(NAMES)
    assert not unknown, f"metrics without a definition: {unknown}"
    known = {n: v for n, v in metrics.items() if v is not None and math.isfinite(v)}
    return dict.fromkeys(NAMES) | known


def share(value):
    """A share that is not 0, and so not shown as such."""
    return format(value, ".2f" if value >= 0.005 else ".1g")


def validation(value, truncated):
    """The pass rate for the console; where a tenth of the answers are cut off, it says so."""
    cut = f" ({share(truncated)} cut)" if truncated and truncated >= 0.1 else ""
    return f"{value:.3f}{cut}"


def line(metrics, steps):
    """The few numbers that matter, for the console."""

    def show(name, form):
        value = metrics.get(name)
        return "-" if value is None else format(value, form)

    laps = {n[8:]: x for n, x in metrics.items() if n.startswith("seconds_") and x}
    seconds = sum(laps.values())
    text = (
        f"step {metrics['step']:>3}/{steps}  reward {show('reward_all', '+.2f')} "
        f"(kept {show('reward_kept', '+.2f')})  score {show('score_all', '.2f')} "
        f"(kept {show('score_kept', '.2f')})  kl {show('kl_k1', '.2f')}  "
        f"clip {show('clip_fraction', '.3f')}  length {show('response_length', '.0f')}  "
    )
    if metrics.get("truncated"):  # had no EOS within --max_new_tokens
        text += f"cut {share(metrics['truncated'])}  "
    text += f"{seconds:.1f} s"
    if seconds >= LONG:
        text += f" ({', '.join(f'{name} {value:.0f}' for name, value in laps.items())})"
    if (value := metrics.get("validation")) is not None:
        text += f"  validation {validation(value, metrics.get('validation_truncated'))}"
    return text if metrics["kept"] else text + "  nothing kept: no update"


def sample_records(step, group_size, answers, weights):
    """The lines of `samples.jsonl` for B answers with weights [B], as one list per prompt."""
    logp = answers.logp.tolist()
    records = [
        {
            "step": step,
            "task_id": problem.task_id,
            "sample": i % group_size,
            "prompt": problem.question,
            "response": answers.texts[i],
            "reward": answers.rewards[i].item(),
            "score": None if answers.scores[i].isnan() else answers.scores[i].item(),
            "weight": weights[i].item(),
            "length": answers.rows.lengths[i].item(),
            "finished": answers.finished[i].item(),
            "logp": round(logp[i], 4),
        }
        | ({"members": answers.members[i].tolist()} if len(answers.reward_models) > 1 else {})
        for i, problem in enumerate(answers.problems)
    ]
    return [records[i : i + group_size] for i in range(0, len(records), group_size)]


def peak_memory():
    """The most memory that this process has held, as text."""
    host = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    if not torch.cuda.is_initialized():
        return host
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the device, {host} on the host"
