"""`train_ppo.py --selfcheck`: what PPO takes for granted, tried on the models at hand.

A few prompts of the first step are answered, shortly, and the checks look at these rows:

    first update    pi = pi_old = ref: every ratio is exactly 1, every KL exactly 0; losses finite
    padding         a row alone = the same row beside longer ones, padded further
    microbatches    the gradient of a minibatch = that of its rows one by one
    sampler         log-probs while sampling = those of the training forward
    reward model    its score = what plain transformers gives for the same files, row by row

What is tried are the training's own functions, given by train_ppo.py. The first line is exact in
any type. The others hold up to rounding: in fp32 the largest difference decides; in bf16 the mean,
as single tokens may be far off (above all in mixtures of experts, where rounding may send a token
to another expert). Rank 0 holds one whole copy of the reward model more, in the forward's type.

Not covered: whether samples or rewards are any good, speed, memory, the state of a checkpoint.
"""

import dataclasses
import time

from pfppo import ppo
from pfppo.data import step_prompts
from pfppo.fsdp import compute_dtype, gather_lists, sum_over_ranks
from pfppo.reward import model_rewards
from pfppo.rollout import collate

import torch
from torch.nn.functional import pad
from transformers import AutoModelForSequenceClassification

PROMPTS, SAMPLES, NEW_TOKENS = 2, 4, 32  # per rank; of a prompt, of a response at most
WIDER = 8  # columns of padding that are added
LEAST_DOUBT = 1e-3  # mean of 1 - p below which rounding of the probabilities counts too
# Which difference decides, and its limit: of log-probs in nats (a mean / mean (1 - p)), of scalars
# as a share of their size; and the limit of a gradient's, as a share of its norm.
TOLERANCES = {torch.float32: ("largest", 1e-3, 1e-3), torch.bfloat16: ("mean", 0.03, 0.2)}


class Report:
    """Lines, one per check, and what has failed. Every method is a collective."""

    def __init__(self, ranks, dtype):
        self.ranks, self.failed = ranks, 0
        self.decides, self.limit, self.of_norm = TOLERANCES[dtype]

    def line(self, name, figure, holds):
        """holds: None where there was nothing to check."""
        self.failed += holds is False
        word = {True: "ok", False: "FAILED", None: "skipped"}[holds]
        self.ranks.say(f"{word:8}{name:43}{figure}")

    def spread(self, values):
        """(mean, largest) of |values| over all ranks, any shape; NaN if one is."""
        whole = gather_lists(values.abs().flatten().tolist(), self.ranks)
        whole = torch.tensor(whole).double()
        return whole.mean().item(), whole.max().item()

    def exact(self, name, differences, what):
        largest = self.spread(differences)[1]
        self.line(name, f"{what} is {largest:.2g} at most, expected 0", largest == 0)

    def close(self, name, differences, unit, doubt=1.0):
        """Can the differences come from rounding? `doubt` scales the limit of a mean."""
        mean, largest = self.spread(differences)
        decisive, limit = largest, self.limit
        if self.decides == "mean":
            decisive, limit = mean, self.limit * doubt
        figure = f"differ by {mean:.1e} on average, {largest:.1e} at most"
        expected = f"expected {self.decides} at most {limit:.1e} {unit}"
        self.line(name, f"{figure}; {expected}", decisive <= limit)

    def close_logp(self, name, found, expected):
        """`close` of log-probs [tokens]. An error e of the logits moves one by about e (1 - p), so
        the mean is held against the mean of 1 - p: a sure policy must not hide a wrong sampler."""
        doubt, _ = self.spread(1 - expected.exp())
        self.close(name, found - expected, "nats", max(doubt, LEAST_DOUBT))

    def close_scalars(self, name, found, expected, model):
        """`close` of normalised scalars [...] in units of the raw scores' size: of their standard
        deviation or, as bf16 rounds in proportion, their mean if it is larger."""
        size = max(model.std, self.spread(expected * model.std + model.mean)[0])
        self.close(name, (found - expected) * model.std / size, "of their size")


def selfcheck(models, trained, examiner, train, forward, backward):
    """Print one line per check. Returns the exit status, on all ranks: 1 if one failed, else 0.

    trained: {name: (model, optimizer)}; forward: {name: (model, rows, args) -> [B, T]}; backward:
    (trained, rows, args, ranks) -> sums of metrics, leaves gradients. A collective.
    """
    started, args, ranks = time.monotonic(), examiner.args, examiner.ranks
    dtype, one_row = compute_dtype(args.param_dtype, ranks), dataclasses.replace(args, microbatch=1)
    report, (rows, wider, sampled_logp) = Report(ranks, dtype), draw(models, examiner, train)
    tokens, there = sum(gather_lists([len(sampled_logp)], ranks)), rows.mask > 0
    ranks.say(
        f"selfcheck: {len(rows) * ranks.world} rows with {tokens} response tokens, forward passes "
        f"in {str(dtype).removeprefix('torch.')}, ranks: {ranks.world}"
    )
    # Old log-probs as in step 4 of the algorithm, new ones as in step 6: with gradients.
    rows.old_logp, _ = rows.evaluate(forward["actor"], models.policy, args)
    rows.ref_logp, _ = rows.evaluate(forward["actor"], models.reference, args)
    if models.critic is not None:
        rows.old_values = rows.evaluate(forward["critic"], models.critic, args)
    ratios = []
    for mb in rows.microbatches(args.microbatch):
        logp, _ = forward["actor"](models.policy, mb, args)
        ratios.append((logp - mb.old_logp).exp().detach().flatten())
        (logp.sum() * 0).backward()  # every forward with gradients is followed by its backward
    models.policy.zero_grad()
    report.exact("ratio before the first update", torch.cat(ratios) - 1, "|ratio - 1|")
    kl = ppo.kl_k1(rows.old_logp, rows.ref_logp)
    report.exact("KL before the first update", kl, "|log pi - log ref|")

    logp, _ = rows.evaluate(forward["actor"], models.policy, one_row)
    with torch.no_grad():
        wide_logp, _ = forward["actor"](models.policy, wider, args)
    report.close_logp("log-probs, alone and padded", wide_logp[there], logp[there])
    if models.critic is not None:
        values = rows.evaluate(forward["critic"], models.critic, one_row)[there]
        with torch.no_grad():
            wide_values = forward["critic"](models.critic, wider, args)[there]
        report.close_scalars("values, alone and padded", wide_values, values, models.critic)
    report.close_logp("log-probs, sampler and training", sampled_logp, rows.old_logp[there])

    # Weights 1 and 2 in turn, rewards +1 and -1; microbatches as large as they may be, and of one.
    turns = torch.arange(len(rows), device=ranks.device) % 2
    rows.rewards, rows.weights = 2.0 * turns - 1, 1.0 + turns
    rows.adv, rows.returns = ppo.advantages(rows, 0.0, args.gamma, args.lam, sum_over_ranks)
    how = args.loss_aggregation, 1, sum_over_ranks
    rows.coefficients = ppo.loss_coefficients(rows.mask, rows.weights, *how)
    large = dataclasses.replace(args, microbatch=min(len(rows), max(2, args.microbatch)))
    gradients, losses = [], []
    for sized in (large, one_row):
        sums = backward(trained, rows, sized, ranks)
        losses += [value for name, value in sums.items() if name.endswith("_loss")]
        gradients.append([[p.grad for p in model.parameters()] for model, _ in trained.values()])
        for model, _ in trained.values():
            model.zero_grad()
    apart = [relative_distance(*pair, ranks) for pair in zip(*gradients, strict=True)]
    figure = " and ".join(f"{share:.1e} of the norm" for share in apart)
    figure = f"differ by {figure}; expected at most {report.of_norm:g}"
    holds = all(share <= report.of_norm for share in apart)
    report.line("gradients, large and small microbatches", figure, holds)
    losses = sum_over_ranks(torch.stack(losses)).tolist()[: len(losses) // 2]
    figure = " and ".join(f"{loss:.3g}" for loss in losses)
    report.line("losses of the first update", figure, bool(torch.tensor(losses).isfinite().all()))

    what, model = "rewards, here and by plain transformers", models.reward_model
    if model is None:
        report.line(what, "there is no --reward_model", None)
    else:
        ours = model_rewards(model, wider, args.microbatch)
        theirs = ours[:0]
        if ranks.is_main:
            theirs = (plain_scores(args.reward_model, rows, dtype) - model.mean) / model.std
        report.close_scalars(what, ours[: len(theirs)], theirs, model)
    count = f"{report.failed} checks FAILED" if report.failed else "nothing FAILED"
    ranks.say(f"selfcheck: {count}, {time.monotonic() - started:.0f} s")
    return int(bool(report.failed))


def draw(models, examiner, train):
    """(rows, the same with more padding, the sampler's log-probs [tokens]): short answers to a few
    prompts of the first step. A collective."""
    args, ranks, tokens = examiner.args, examiner.ranks, examiner.tokens
    count = ranks.world * min(PROMPTS, args.prompts_per_step // ranks.world)
    order = step_prompts(len(train), args.prompts_per_step, 0, args.seed)
    prompts = [train.prompts[i] for i in order[:count]]
    # At most half of what a response may have, so that there are positions left for padding.
    short = max(1, min(NEW_TOKENS, args.max_new_tokens // 2))
    samples = min(max(args.samples_per_prompt, 2), SAMPLES)  # 2, to have a microbatch of 2
    how = (args.temperature, samples)
    with models.gathered(models.policy) as model:
        drawn, keys = examiner.draw(model, prompts, "selfcheck", *how, longest=short)
    rows = collate([prompts[i] for i, _ in keys], drawn.ids, tokens.pad, ranks.device)
    room = int(rows.prompt_lengths.max()) + args.max_new_tokens - rows.ids.shape[1]
    ids = pad(rows.ids, (0, min(WIDER, room)), value=tokens.pad)
    logp = torch.tensor([x for row in drawn.logp for x in row], device=ranks.device)
    return rows, dataclasses.replace(rows, ids=ids), logp


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
    scores = [
        model(input_ids=ids[None, :end]).logits[0, 0]
        for ids, end in zip(rows.ids, ends, strict=True)
    ]
    return torch.stack(scores).float().cpu()
