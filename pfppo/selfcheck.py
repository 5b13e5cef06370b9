"""`train_ppo.py --selfcheck`: what PPO takes for granted, tried on the models at hand.

A few prompts of the first step are answered, shortly, and the checks look at these rows:

    first update    pi = pi_old = ref, so every ratio is exactly 1 and every KL exactly 0
    padding         a row alone = the same row beside longer ones, padded further
    microbatches    the gradient of a minibatch = that of its rows one by one
    sampler         log-probs while sampling = those of the training forward
    reward model    its raw score = what plain transformers gives for the same files
    tokens          policy and reward model read a prompt as the same ids

What is tried are the training's own functions, given by train_ppo.py. The first line is exact in
any type. The others hold up to rounding: in fp32 the largest difference decides; in bf16 the mean,
as single tokens may be far off (above all in mixtures of experts, where rounding may send a token
to another expert). Rank 0 holds one whole copy of the reward model more, in the forward's type.

Not covered: whether samples or rewards are any good, speed, memory, the state of a checkpoint. A
card that does not fit is an error while loading (loading.py); here a change since then is found.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from pfppo import ppo
from pfppo.batch import Rollout, collate, flat, over_microbatches, unflat
from pfppo.data import load_tokenizer, render_all, step_prompts, template_hash, vocabulary_hash
from pfppo.fsdp import agreed, compute_dtype, from_main, gather_lists, gathered, sum_over_ranks
from pfppo.reward import RewardCard, check_agreement, load_card, model_rewards

import torch
from torch.nn.functional import pad
from transformers import AutoModelForSequenceClassification

PROMPTS = 2  # per rank
SAMPLES = 4  # of a prompt at most
NEW_TOKENS = 32  # of a response at most
LEAST_DOUBT = 1e-3  # mean of 1 - p below which rounding of the probabilities counts too
WIDER = 8  # columns of padding that are added
RENDERED = 256  # prompts that are rendered by the tokenizers of both models


@dataclass(frozen=True)
class Tolerance:
    """How far rounding may go in one type of forward passes."""

    decides: str  # "largest" or "mean": which figure is held against `difference`
    difference: float  # of log-probs in nats, a mean / mean (1 - p); of scalars / their size
    gradient: float  # norm of the difference of two gradients as a share of the gradient's


TOLERANCES = {
    torch.float32: Tolerance("largest", 1e-3, 1e-3),
    torch.bfloat16: Tolerance("mean", 0.03, 0.2),
}


@dataclass(frozen=True)
class Subject:
    """What train_ppo.py has before its loop, its own functions included."""

    args: object  # train_ppo.Args
    examiner: object  # examine.Examiner, with tokenizer and ranks
    problems: list
    prompts: list[list[int]]
    pad_id: int
    policy: torch.nn.Module
    reference: torch.nn.Module
    twin: torch.nn.Module
    reward_model: torch.nn.Module | None
    critic: torch.nn.Module
    log_probs: Callable  # (policy, rows, args) -> log-probs [B, T], entropy [B, T]
    values_of: Callable  # (critic, rows) -> [values [B, T]]
    backward: Callable  # (args, policy, critic, rows, ranks): leaves the gradients

    @property
    def ranks(self):
        return self.examiner.ranks

    @property
    def dtype(self):
        return compute_dtype(self.args.param_dtype, self.ranks)


@dataclass(frozen=True)
class Batch:
    """The rows that all checks look at, B on each rank."""

    rows: Rollout
    wider: Rollout  # the same rows with more padding
    sampled_logp: torch.Tensor  # [response tokens], the sampler's


@dataclass(frozen=True)
class Verdict:
    """What one check says. `holds` is None where there was nothing to check."""

    figure: str
    holds: bool | None


WORDS = {True: "ok", False: "FAILED", None: "skipped"}
NO_REWARD_MODEL = Verdict("there is no --reward_model", None)


def run(subject):
    """Print one line per check. Returns the exit status, on all ranks: 1 if one failed, else 0.
    A collective. Raises UserError where the reward model's tokenizer or card cannot be read."""
    started, ranks = time.monotonic(), subject.ranks
    batch = draw_batch(subject)
    tokens = sum(gather_lists([int(batch.rows.lengths.sum())], ranks))
    ranks.say(
        f"selfcheck: {len(batch.rows) * ranks.world} rows with {tokens} response tokens, "
        f"forward passes in {str(subject.dtype).removeprefix('torch.')}, ranks: {ranks.world}"
    )
    failed = []
    for name, check in CHECKS:
        verdict = check(subject, batch)
        if verdict.holds is False:
            failed.append(name)
        ranks.say(f"{WORDS[verdict.holds]:8}{name:47}{verdict.figure}")
    count = f"{len(failed)} of {len(CHECKS)} checks FAILED" if failed else "nothing FAILED"
    ranks.say(f"selfcheck: {count}, {time.monotonic() - started:.0f} s")
    return int(bool(failed))


def draw_batch(subject):
    """Short answers to a few prompts of the first step. A collective."""
    args, ranks = subject.args, subject.ranks
    count = ranks.world * min(PROMPTS, args.prompts_per_step // ranks.world)
    order = step_prompts(len(subject.prompts), args.prompts_per_step, 0, args.seed)
    prompts = [subject.prompts[i] for i in order[:count]]
    # At most half of what a response may have, so that there are positions left for padding.
    short = max(1, min(NEW_TOKENS, args.max_new_tokens // 2))
    samples = min(max(args.samples_per_prompt, 2), SAMPLES)  # 2, to have a microbatch of 2
    examiner = dataclasses.replace(subject.examiner, max_new_tokens=short)
    with gathered(subject.policy.lm, subject.twin) as model:
        drawn, keys = examiner.draw(model, prompts, "selfcheck", args.temperature, samples)
    rows = collate([prompts[i] for i, _ in keys], drawn.ids, subject.pad_id, ranks.device)
    room = int(rows.prompt_lengths.max()) + args.max_new_tokens - rows.ids.shape[1]
    ids = pad(rows.ids, (0, min(WIDER, room)), value=subject.pad_id)
    logp = torch.tensor([x for row in drawn.logp for x in row], device=ranks.device)
    return Batch(rows, dataclasses.replace(rows, ids=ids), logp)


def spread(differences, ranks):
    """(mean, largest) of |differences| over all ranks, any shape; NaN if one is. A collective."""
    whole = torch.tensor(gather_lists(differences.abs().flatten().tolist(), ranks)).double()
    return whole.mean().item(), whole.max().item()


def exact(differences, what, ranks):
    """A verdict that holds if all differences are 0."""
    largest = spread(differences, ranks)[1]
    return Verdict(f"{what} is {largest:.2g} at most, expected 0", largest == 0)


def close(differences, subject, unit, doubt=1.0):
    """A verdict that holds if the differences can come from rounding; `doubt` scales the mean's."""
    decides, limit = TOLERANCES[subject.dtype].decides, TOLERANCES[subject.dtype].difference
    mean, largest = spread(differences, subject.ranks)
    decisive, limit = (mean, limit * doubt) if decides == "mean" else (largest, limit)
    figure = f"differ by {mean:.1e} on average, {largest:.1e} at most"
    return Verdict(f"{figure}; expected {decides} at most {limit:.1e} {unit}", decisive <= limit)


def close_logp(found, expected, subject):
    """`close` of log-probs [tokens]. An error e of the logits moves one by about e (1 - p), so the
    mean is held against the mean of 1 - p: a sure policy must not hide a wrong sampler."""
    doubt, _ = spread(1 - expected.exp(), subject.ranks)
    return close(found - expected, subject, "nats", max(doubt, LEAST_DOUBT))


def close_scalars(found, expected, model, subject):
    """`close` of normalised scalars [...] in units of the raw scores' size."""
    # Their standard deviation or, as bf16 rounds in proportion, their mean if it is larger.
    raw = expected * model.std + model.mean
    size = max(model.std, spread(raw, subject.ranks)[0])
    return close((found - expected) * model.std / size, subject, "of their size")


def ratio_is_one(subject, batch):
    """Old log-probs as in step 4 of the algorithm, new ones as in step 6: with gradients."""
    args, differences = subject.args, []
    rows = dataclasses.replace(batch.rows, old_logp=trained_logp(subject.policy, subject, batch))
    for mb in rows.microbatches(args.microbatch):
        logp, _ = subject.log_probs(subject.policy, mb, args)
        differences.append(((logp - mb.old_logp).exp() - 1).detach().flatten())
        (logp.sum() * 0).backward()  # every forward with gradients is followed by its backward
    subject.policy.zero_grad()
    return exact(torch.cat(differences), "|ratio - 1|", subject.ranks)


def kl_is_zero(subject, batch):
    """The policy has not moved, so it is its own reference."""
    logp, ref_logp = (trained_logp(m, subject, batch) for m in (subject.policy, subject.reference))
    return exact(ppo.kl_k1(logp, ref_logp), "|log pi - log ref|", subject.ranks)


def log_probs_ignore_padding(subject, batch):
    alone, _ = over_microbatches(subject.log_probs, subject.policy, batch.rows, 1, subject.args)
    with torch.no_grad():
        beside, _ = subject.log_probs(subject.policy, batch.wider, subject.args)
    there = batch.rows.mask > 0
    return close_logp(beside[there], alone[there], subject)


def values_ignore_padding(subject, batch):
    (alone,) = over_microbatches(subject.values_of, subject.critic, batch.rows, 1)
    with torch.no_grad():
        (beside,) = subject.values_of(subject.critic, batch.wider)
    there = batch.rows.mask > 0
    return close_scalars(beside[there], alone[there], subject.critic, subject)


def rewards_ignore_padding(subject, batch):
    if subject.reward_model is None:
        return NO_REWARD_MODEL
    alone = model_rewards(subject.reward_model, batch.rows, 1)
    with torch.no_grad():
        beside = subject.reward_model(batch.wider.ids, batch.wider.ends)[:, 0, 0].cpu()
    return close_scalars(beside, alone, subject.reward_model, subject)


def gradients_ignore_microbatches(subject, batch):
    """One backward with microbatches as large as --microbatch allows, one with single rows."""
    rows, models = with_advantages(subject, batch.rows), (subject.policy, subject.critic)
    whole = min(len(rows), max(2, subject.args.microbatch))  # no more rows than fit in memory
    gradients = []
    for size in (whole, 1):
        args = dataclasses.replace(subject.args, microbatch=size)
        subject.backward(args, *models, rows, subject.ranks)
        gradients.append([[p.grad for p in model.parameters()] for model in models])
        for model in models:
            model.zero_grad()
    pairs = zip(*gradients, strict=True)
    actor, critic = (relative_distance(*pair, subject.ranks) for pair in pairs)
    limit = TOLERANCES[subject.dtype].gradient
    figure = f"differ by {actor:.1e} of the norm for the actor, {critic:.1e} for the critic"
    return Verdict(f"{figure}; expected at most {limit:g}", actor <= limit and critic <= limit)


def sampler_agrees_with_training(subject, batch):
    logp = trained_logp(subject.policy, subject, batch)
    return close_logp(batch.sampled_logp, logp[batch.rows.mask > 0], subject)


def reward_model_reloads(subject, batch):
    """Plain transformers, one row at a time, on rank 0 and its rows."""
    model, ranks = subject.reward_model, subject.ranks
    if model is None:
        return NO_REWARD_MODEL
    ours = model_rewards(model, batch.rows, subject.args.microbatch)
    theirs = ours[:0]
    if ranks.is_main:
        raw = plain_scores(subject.args.reward_model, batch.rows, subject.dtype)
        theirs = (raw - model.mean) / model.std
    return close_scalars(ours[: len(theirs)], theirs, model, subject)


def reward_model_reads_the_same_tokens(subject, batch):
    if subject.reward_model is None:
        return NO_REWARD_MODEL
    verdict = None
    with agreed(subject.ranks):
        if subject.ranks.is_main:
            verdict = same_tokens(subject)
    return from_main(verdict, subject.ranks)


CHECKS = (
    ("ratio before the first update", ratio_is_one),
    ("KL before the first update", kl_is_zero),
    ("log-probs, alone and padded", log_probs_ignore_padding),
    ("values, alone and padded", values_ignore_padding),
    ("rewards, alone and padded", rewards_ignore_padding),
    ("gradients, large and small microbatches", gradients_ignore_microbatches),
    ("log-probs, sampler and training", sampler_agrees_with_training),
    ("rewards, here and by plain transformers", reward_model_reloads),
    ("tokens and template of policy and reward model", reward_model_reads_the_same_tokens),
)  # (name, (subject, batch) -> Verdict); all ranks run them in this order


def trained_logp(model, subject, batch):
    """[B, T] log-probs as training has them before the first update, in its microbatches."""
    args = subject.args
    return over_microbatches(subject.log_probs, model, batch.rows, args.microbatch, args)[0]


def with_advantages(subject, rows):
    """The rows with all that the losses need, weights 1 and 2 in turn. A collective."""
    args, ranks, size = subject.args, subject.ranks, subject.args.microbatch
    turns = torch.arange(len(rows), device=ranks.device) % 2
    model, rewards = subject.reward_model, 2.0 * turns - 1
    if model is not None:
        rewards = model_rewards(model, rows, size, args.reward_clip)
    rows = dataclasses.replace(rows, rewards=rewards.to(ranks.device), weights=1.0 + turns)
    rows.old_logp, _ = over_microbatches(subject.log_probs, subject.policy, rows, size, args)
    (rows.old_values,) = over_microbatches(subject.values_of, subject.critic, rows, size)
    token_rewards = ppo.token_rewards(rows.rewards, torch.zeros_like(rows.mask), rows.mask, 0.0)
    given = token_rewards, rows.old_values, rows.mask, args.gamma, args.lam
    rows.adv, rows.returns = ppo.gae(*given)
    adv, weights = (flat([rows], name) for name in ("adv", "token_weights"))
    unflat([rows], "adv", ppo.whiten(adv, weights, sum_over_ranks))
    return rows


def relative_distance(gradients, others, ranks):
    """|a - b| / |a| of two lists of sharded gradients, in the same order. A collective."""
    squares = torch.zeros(2, dtype=torch.float64)
    for pair in zip(gradients, others, strict=True):  # None where the loss does not reach
        a, b = (torch.zeros(()) if x is None else x.to_local() for x in pair)
        squares += torch.tensor([(a - b).norm().item(), a.norm().item()]).double() ** 2
    difference, norm = sum_over_ranks(squares.to(ranks.device)).sqrt().tolist()
    return difference / norm if norm else float("nan")


@torch.no_grad()
def plain_scores(path, rows, dtype):
    """Raw scores [B], fp32, on the CPU, of a sequence classifier as transformers reads it."""
    device = rows.ids.device
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype).to(device).eval()
    # A row alone has no padding: the score stands at its last token, whichever that is.
    model.config.get_text_config().pad_token_id = None
    ends = (rows.prompt_lengths + rows.lengths).tolist()
    pairs = zip(rows.ids, ends, strict=True)
    scores = [model(input_ids=ids[None, :end]).logits[0, 0] for ids, end in pairs]
    return torch.stack(scores).float().cpu()


def same_tokens(subject):
    """The verdict of one rank on vocabulary, template, and prompts rendered by both tokenizers."""
    args, ours = subject.args, subject.examiner.tokenizer
    path, style = args.reward_model, args.prompt_style
    theirs = load_tokenizer(path, "reward_model")
    card = RewardCard(0.0, 1.0, template_hash(theirs, style), vocabulary_hash(theirs))
    card = load_card(path) or card
    problems = subject.problems[:RENDERED]
    try:
        check_agreement(card, template_hash(ours, style), vocabulary_hash(ours), path, args.policy)
        rendered = render_all(problems, theirs, style, args.max_prompt_tokens, args.prompts)
    except Exception as error:  # a chat template of theirs may fail in a dozen ways
        return Verdict(" ".join(str(error).split()), False)
    for problem, found, expected in zip(problems, rendered, subject.prompts, strict=False):
        if found != expected:
            lengths = f"{len(found)} tokens by its tokenizer, {len(expected)} by the policy's"
            return Verdict(f"task {problem.task_id} has other ids ({lengths})", False)
    return Verdict(f"hashes agree; the same ids for {len(rendered)} prompts", True)
