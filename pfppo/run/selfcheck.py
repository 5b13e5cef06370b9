"""`train_ppo.py --selfcheck`: what PPO takes for granted, tried on the models at hand.

A few prompts of the first step are answered, shortly, and the checks look at these rows:

    first update    pi = pi_old = ref: every ratio is exactly 1, every KL exactly 0; losses finite
    padding         a row alone = the same row beside longer ones, padded further
    microbatches    the gradient of a minibatch = that of its rows one by one
    sampler         log-probs while sampling = those of the training forward
    files           log-probs and scores = what plain transformers gives for the same folders

What is tried are the training's own functions. The first line is exact in any type (up to rounding
with --compile), the others hold up to rounding: in fp32 the largest difference decides; in bf16 the
mean, as single tokens may be far off (above all where they go to another expert). Rank 0 holds one
more model, whole.

Not covered: whether samples or rewards are any good, speed, memory, the state of a checkpoint.
"""

import dataclasses
import time

from pfppo import ppo
from pfppo.config import parts
from pfppo.fsdp import compute_dtype, gather_lists, sum_over_ranks
from pfppo.rollout import collate, step_prompts
from pfppo.run.proofs import plain_logp, plain_scores

import torch
from torch.nn.functional import pad

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
        """{"mean", "largest"} of |values| over all ranks, any shape; NaN if one is."""
        whole = gather_lists(values.abs().flatten().tolist(), self.ranks)
        whole = torch.tensor(whole).double()
        return {"mean": whole.mean().item(), "largest": whole.max().item()}

    def hold(self, name, differences, decides, limit, unit="(exact)"):
        """The mean or the largest |difference| against a limit."""
        sizes = self.spread(differences)
        figure = f"differ by {sizes['mean']:.1e} on average, {sizes['largest']:.1e} at most"
        expected = f"expected {decides} at most {limit:.1e} {unit}"
        self.line(name, f"{figure}; {expected}", sizes[decides] <= limit)

    def close_logp(self, name, logp, expected):
        """Log-probs [tokens]. An error e of the logits moves one by about e (1 - p), so the mean is
        held against the mean of 1 - p: a sure policy must not hide a wrong sampler."""
        doubt = max(self.spread(1 - expected.exp())["mean"], LEAST_DOUBT)
        limit = self.limit * (doubt if self.decides == "mean" else 1)
        self.hold(name, logp - expected, self.decides, limit, "nats")

    def close_scalars(self, name, scalars, expected, model):
        """Normalised scalars [...] in units of the raw scores' size: of their standard deviation
        or, as bf16 rounds in proportion, their mean if it is larger."""
        size = max(1.0, self.spread(expected + model.mean / model.std)["mean"])
        self.hold(name, (scalars - expected) / size, self.decides, self.limit, "of their size")


def selfcheck(models, trained, examiner, train, forward, backward):
    """Print one line per check. Returns the exit status, on all ranks: 1 if one failed, else 0.
    trained: {name: (model, optimizer)}; forward: {name: (model, rows, args) -> [B, T]}; backward:
    (trained, rows, args, ranks) -> sums of metrics, leaves gradients. A collective.
    """
    started, args, ranks = time.monotonic(), examiner.args, examiner.ranks
    dtype, one_row = compute_dtype(args.param_dtype, ranks), dataclasses.replace(args, microbatch=1)
    report, (rows, sampled_logp) = Report(ranks, dtype), draw(models, examiner, train)
    responses = rows.mask > 0
    ranks.say(f"selfcheck: {ranks.world} x {len(rows)} rows, forward passes in {dtype}")
    # Old log-probs as in step 4 of the algorithm, new ones as in step 6: with gradients.
    rows.old_logp, _ = rows.evaluate(forward["actor"], models.policy, args)
    rows.ref_logp, _ = rows.evaluate(forward["actor"], models.reference, args)
    ratios = []
    for mb in rows.microbatches(args.microbatch):
        logp, _ = forward["actor"](models.policy, mb, args)
        ratios.append((logp - mb.old_logp).exp().detach().flatten())
        (logp.sum() * 0).backward()  # every forward with gradients is followed by its backward
    models.policy.zero_grad()
    # Compiled, a pass with gradients is another program than one without.
    how = (report.decides, report.limit, "(compiled)") if args.compile else ("largest", 0.0)
    report.hold("ratio before the first update, from 1", torch.cat(ratios) - 1, *how)
    report.hold("KL before the first update, from 0", rows.old_logp - rows.ref_logp, *how)

    # `evaluate` cuts rows to their length, the forward passes keep their padding.
    logp, _ = rows.evaluate(forward["actor"], models.policy, one_row)
    with torch.no_grad():
        padded, _ = forward["actor"](models.policy, rows, args)
    report.close_logp("log-probs, alone and padded", padded[responses], logp[responses])
    if critic := models.critic:
        rows.old_values = rows.evaluate(forward["critic"], critic, args)
        values = rows.evaluate(forward["critic"], critic, one_row)[responses]
        with torch.no_grad():
            padded = forward["critic"](critic, rows, args)[responses]
        report.close_scalars("values, alone and padded", padded, values, critic)
    report.close_logp("log-probs, sampler and training", sampled_logp, rows.old_logp[responses])
    check_gradients(report, trained, rows, backward, args)
    check_files(report, models, rows, logp[responses], dtype, args)
    count = f"{report.failed} checks FAILED" if report.failed else "nothing FAILED"
    ranks.say(f"selfcheck: {count}, {time.monotonic() - started:.0f} s")
    return int(bool(report.failed))


def draw(models, examiner, train):
    """(rows, the sampler's log-probs [tokens]): short answers to a few prompts of the first step,
    padded by some columns, as far as the models have positions. A collective."""
    args, ranks, tokens = examiner.args, examiner.ranks, examiner.tokens
    count = ranks.world * min(PROMPTS, args.prompts_per_step // ranks.world)
    order = step_prompts(args, len(train), 0)
    prompts = [train.prompts[i] for i in order[:count]]
    samples = min(max(args.samples_per_prompt, 2), SAMPLES)  # 2, to have a microbatch of 2
    longest = max(1, min(NEW_TOKENS, args.max_new_tokens // 2))  # half, to have room for padding
    which = "selfcheck", args.temperature, samples
    with models.gathered(models.policy) as lm:
        drawn, keys = examiner.draw(lm, prompts, *which, longest=longest)
    rows = collate([prompts[i] for i, _ in keys], drawn.ids, tokens.pad, ranks.device)
    room = int(rows.prompt_lengths.max()) + args.max_new_tokens - rows.ids.shape[1]
    rows.ids = pad(rows.ids, (0, min(WIDER, room)), value=tokens.pad)
    return rows, torch.tensor(sum(drawn.logp, []), device=ranks.device)


def check_gradients(report, trained, rows, backward, args):
    """Microbatches as large as they may be, and of one row; weights 1 and 2, rewards -1 and +1."""
    ranks, turns = report.ranks, torch.arange(len(rows), device=rows.ids.device) % 2
    rows.rewards, rows.weights = 2.0 * turns - 1, 1.0 + turns
    rows.adv, rows.returns = ppo.advantages(rows, 0.0, args.gamma, args.lam, sum_over_ranks)
    how = args.loss_aggregation, 1, sum_over_ranks
    rows.coefficients = ppo.loss_coefficients(rows.mask, rows.weights, *how)
    gradients, losses = [], []
    for microbatch in (min(len(rows), max(2, args.microbatch)), 1):
        sums = backward(trained, rows, dataclasses.replace(args, microbatch=microbatch), ranks)
        losses.append([value for name, value in sums.items() if name.endswith("_loss")])
        gradients.append([flat_gradient(model) for model, _ in trained.values()])
    squares = [[(a - b).norm() ** 2, a.norm() ** 2] for a, b in zip(*gradients, strict=True)]
    apart, norms = sum_over_ranks(torch.tensor(squares, device=ranks.device)).sqrt().T
    name, share = "gradients, large and small microbatches", apart / norms  # NaN without gradient
    report.hold(name, share, "largest", report.of_norm, "of the norm")
    losses = sum_over_ranks(torch.stack(losses[0]))
    figure = " and ".join(f"{loss:.3g}" for loss in losses.tolist())
    report.line("losses of the first update", figure, bool(losses.isfinite().all()))


def flat_gradient(model):
    """This rank's part of a model's gradient, in one row; the model is left without."""
    slices = [(p.to_local(), p.grad) for p in model.parameters()]
    parts = [torch.zeros_like(p) if g is None else g.to_local() for p, g in slices]
    model.zero_grad()
    return torch.cat([part.detach().flatten() for part in parts])


def check_files(report, models, rows, logp, dtype, args):
    """What plain transformers says of the same folders and rows, on rank 0. logp [tokens]"""
    name, what, theirs = "{}, here and by plain transformers", (rows, dtype), logp[:0]
    if report.ranks.is_main:
        theirs = plain_logp(args.policy, *what, models.policy.never, args.temperature)
    report.close_logp(name.format("log-probs"), logp[: len(theirs)], theirs)
    if (model := models.reward_model) is None:
        return report.line(name.format("rewards"), "there is no --reward_model", None)
    with torch.no_grad():
        ours = model(rows.ids, rows.ends)[:, 0, 0].float()  # padded as they are
    theirs = ours[:0]
    if report.ranks.is_main:
        theirs = plain_scores(parts(args.reward_model)[0], *what)
        theirs = (theirs - model.mean) / model.std
    report.close_scalars(name.format("rewards"), ours[: len(theirs)], theirs, model)
