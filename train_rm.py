"""Train a reward model from preference pairs (PF-PPO, arXiv 2409.06957, section 5).

    loss = -log sigmoid(r(chosen) - r(rejected)) + c (r(chosen) + r(rejected))^2

One epoch or two, initialised from the SFT policy; the paper has no c.

    torchrun train_rm.py                                                     # the lab, from nothing
    torchrun train_rm.py --policy DIR --prompts problems.jsonl --run_dir DIR # samples, tests, pairs
    torchrun train_rm.py --policy DIR --pairs pairs.jsonl --run_dir DIR      # pairs as they are

Without `--pairs` the pairs are built the paper's way: N samples of the SFT policy per prompt are
verified, and the right and the wrong one of maximum edit distance form the pair. The run
directory becomes the checkpoint: it loads as `AutoModelForSequenceClassification` with one label,
and holds `reward_model.json` (normaliser, template and vocabulary hashes), samples, pairs and
metrics. Until then `--resume` goes on: from the samples, and from the last step that was saved.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

from pfppo import data, fsdp, lab, loading, reward, run
from pfppo.config import Count, NonNegative, Positive, Seed, Share, require
from pfppo.rollout import collate, seeded

import torch
from tqdm import tqdm


@dataclass
class Args(run.Saved):  # and options that change no number: pfppo/run/options.py
    # What there is
    policy: str = "lab"  # SFT policy: a folder, a Hub id, or "lab" (made on first use)
    pairs: str = ""  # JSONL with prompt, chosen, rejected, text or messages; empty: from --prompts
    prompts: str = "lab"  # JSONL: HumanEval, MBPP, ..., or "lab": what pairs are built from
    run_dir: str = ""  # where the checkpoint goes; empty: runs/reward_model, -2, ...
    prompt_style: run.styles("plain", "chat", "deepseek") = "plain"  # as code, or as a dialogue
    max_prompt_tokens: Count = 1024  # longest prompt; longer ones are left out
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU
    seed: Seed = 1  # samples, order of pairs, new head
    # Pairs from samples
    samples_per_prompt: Count = 5  # N samples per prompt when pairs are built
    max_new_tokens: Count = 64  # longest response that is sampled
    temperature: Positive = 1.0  # of the samples
    timeout: Positive = 3.0  # CPU seconds that one sample's tests may take
    verify: str = "tests"  # what is right: tests, last_number (= `answer`), file.py:function
    # Training
    lr: Positive = 5e-4  # AdamW; the paper's 6.7B model: 1e-5
    epochs: Count = 2  # the paper: 1
    center_coef: NonNegative = 0.01  # c, so that answers to different prompts compare; paper: 0
    batch: Count = 16  # pairs per optimizer step; the last one of an epoch takes what is left
    microbatch: Count = 16  # pairs per forward and rank; memory only, changes no number
    grad_norm: Positive = 1.0  # global norm that gradients are clipped to
    held_out: Share = 0.1  # share of the prompts whose pairs measure accuracy
    gradient_checkpointing: bool = False  # blocks run again in backward: less memory, more time
    save_every: Count = 50  # steps between checkpoints
    FREE = ("microbatch",)  # may differ on --resume, as what is inherited


def make_for_lab(folder, ranks):
    """The lab's reward model, on any number of ranks; 400 pairs tell its accuracy. Where it was
    stopped before, it goes on; where it is stopped now, so is what it was made for."""
    main(Args(run_dir=folder, held_out=0.25, resume=True), ranks)
    if not run.is_trained(folder):
        sys.exit(0)


def main(args, ranks=None):
    ranks = ranks or fsdp.init_ranks(args.device, args.shard_group_size, args.collective_timeout)
    N, size = args.samples_per_prompt, args.batch
    require(args.pairs or N > 1, f"--samples_per_prompt {N}: a pair needs at least 2")
    require(args.held_out < 1, f"--held_out {args.held_out:g}: leaves no pairs for training")
    lab.resolve(args, prompts="rm.jsonl")
    lab.check(args, ranks)
    loading.fetch(args, ("policy",), ranks)
    session = run.RewardSession(args, ranks)  # its folder, checkpoints, log and end
    if session.is_finished():
        return
    lab.make(args, ranks)

    # Pairs of token ids (prompt, chosen, rejected); rows are for the normaliser
    tokens = data.Tokens.of(args, ranks.say)
    if args.pairs:
        pairs, texts = run.read_pairs(args.pairs, tokens, ranks.say)
        session.check(pairs)
        rows = run.rows_of(pairs)
    else:
        pairs, texts, rows = run.pairs_by_tests(args, tokens, session.folder, ranks)
    session.open(texts)
    training, held_out = run.split_by_prompt(pairs, args.held_out, args.seed)

    # Model: the SFT policy's backbone, a new scalar head
    model = loading.new_scalar(args, ranks)
    run.prove_scalar(model, tokens, "policy", args.policy, ranks.device)
    trained = {"reward_model": (model, optimizer := fsdp.adamw(model, args.lr))}
    per_epoch = math.ceil(len(training) / size)
    most = min(args.microbatch, math.ceil(size / ranks.world))  # nothing takes more than training
    steps, how = per_epoch * args.epochs, (tokens.pad, most, ranks)
    ranks.say(
        f"reward model: {len(training)} pairs for training, {len(held_out)} held out; "
        f"{args.epochs} epochs of {per_epoch} steps of {size} pairs"
    )
    state = session.load(trained)  # the newest checkpoint's, or that of step 0

    bar = {"initial": state.step, "total": steps, "mininterval": 1, "disable": not ranks.is_main}
    bar = tqdm(range(state.step, steps), "reward model", **bar)
    for step in bar:
        if session.stops():
            break
        epoch, part = divmod(step, per_epoch)
        shuffled = torch.randperm(len(training), generator=seeded("pairs", args.seed, epoch))
        batch = [training[i] for i in shuffled[part * size : (part + 1) * size]]
        batch = [batch[i] for i in run.by_length(batch)]  # in any order the gradient is the same
        sums = torch.zeros(2, device=ranks.device)
        for some, weight in fsdp.accumulate(trained, run.shares(batch, args.microbatch, ranks)):
            prompts, chosen, rejected = zip(*some, strict=True)
            mb = collate(prompts * 2, chosen + rejected, tokens.pad, ranks.device)
            scores = model(mb.ids, mb.ends)[:, 0, 0]  # [2 * microbatch]: chosen, rejected
            loss, metrics = reward.bradley_terry_loss(*scores.chunk(2), args.center_coef)
            mean = weight * ranks.world / len(batch)  # FSDP averages over ranks, the loss is a sum
            (loss * mean).backward()
            sums += weight * torch.stack([metrics["loss"], metrics["accuracy"]])
        warm = min(1.0, (step + 1) / (1 + 0.03 * steps))
        factor = warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        norm = fsdp.step(model, optimizer, factor, args.grad_norm)

        # Measure, save
        state.step = step + 1
        loss, accuracy = (fsdp.sum_over_ranks(sums) / len(batch)).tolist()
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
        row = {"step": state.step, "epoch": epoch + 1, "loss": loss, "accuracy": accuracy}
        row |= {"grad_norm": norm, "lr": factor * args.lr}
        seen = held_out if state.step % per_epoch == 0 else []  # at the end of an epoch
        unseen = run.pair_metrics(model, seen, *how)
        session.save(trained, state, steps)
        session.log(row | {f"held_out_{name}": value for name, value in unseen.items()})
    bar.close()
    if session.close(trained, state):  # all is saved; True where it was told to end
        return

    # Normaliser, accuracy, checkpoint
    raw = run.raw_scores(model, rows, *how, bar="normaliser")
    alike = f"--run_dir {session.folder}: the model scores all {len(rows)} responses alike"
    require(raw.std() > 0, alike)
    card = reward.RewardCard(raw.mean().item(), raw.std().item(), *tokens.hashes(), tokens.named)
    known = run.pair_metrics(model, training, *how)["accuracy"]
    unseen = run.pair_metrics(model, held_out, *how)["accuracy"]
    session.finish(model, tokens, card)
    unseen = f"{unseen:.3f} on {len(held_out)} held-out pairs" if held_out else "none held out"
    ranks.say(
        f"reward model in {session.folder}: pair accuracy {known:.3f} in training, {unseen}; "
        f"normaliser mean {card.mean:.3f}, sd {card.std:.3f} over {len(rows)} responses"
    )


if __name__ == "__main__":
    run.launch(main, Args)
