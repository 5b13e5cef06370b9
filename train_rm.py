"""Train a reward model from preference pairs (PF-PPO, arXiv 2409.06957, section 5).

    loss = -log sigmoid(r(chosen) - r(rejected)), one epoch or two, initialised from the SFT policy

    torchrun train_rm.py                                                     # the lab, from nothing
    torchrun train_rm.py --policy DIR --prompts problems.jsonl --run_dir DIR # samples, tests, pairs
    torchrun train_rm.py --policy DIR --pairs pairs.jsonl --run_dir DIR      # pairs as they are

Without `--pairs` the pairs are built the paper's way: N samples of the SFT policy per prompt are
executed, and the passing and the failing one of maximum edit distance form the pair. The run
directory becomes the checkpoint: it loads as `AutoModelForSequenceClassification` with one label,
and holds `reward_model.json` (normaliser, template and vocabulary hashes) and `pairs.jsonl`.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from pfppo import data, fsdp, lab, loading, reward, run
from pfppo.answers import Examiner
from pfppo.config import Count, Positive, Seed, Share, require
from pfppo.files import append_jsonl, write_json
from pfppo.model import check_positions, empty_classifier
from pfppo.problems import prompt_text
from pfppo.rollout import collate, rows_per_rank, seeded

import torch
from tqdm import tqdm


@dataclass
class Args(run.Machine):  # and options that change no number: pfppo/run/options.py
    # What there is
    policy: str = "lab"  # SFT policy: a folder, a Hub id, or "lab" (made on first use)
    pairs: str = ""  # JSONL with prompt, chosen, rejected, text or messages; empty: from --prompts
    prompts: str = "lab"  # JSONL in HumanEval form, or "lab": what pairs are built from
    run_dir: str = ""  # where the checkpoint goes; empty: runs/reward_model, -2, ...
    prompt_style: Literal["plain", "chat", "deepseek"] = "plain"  # as code, or as a dialogue
    max_prompt_tokens: Count = 1024  # longest prompt
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU
    seed: Seed = 1  # samples, order of pairs, new head
    # Pairs from samples
    samples_per_prompt: Count = 5  # N samples per prompt when pairs are built
    max_new_tokens: Count = 64  # longest response that is sampled
    temperature: Positive = 1.0  # of the samples
    timeout: Positive = 3.0  # CPU seconds that one sample's tests may take
    # Training
    lr: Positive = 5e-4  # AdamW; the paper's 6.7B model: 1e-5
    epochs: Count = 2  # the paper: 1
    batch: Count = 16  # pairs per optimizer step
    microbatch: Count = 16  # pairs per forward and rank
    grad_norm: Positive = 1.0  # global norm that gradients are clipped to
    held_out: Share = 0.1  # share of the prompts whose pairs measure accuracy
    gradient_checkpointing: bool = False  # blocks run again in backward: less memory, more time


def pairs_by_tests(args, tokens, ranks):
    """Pairs by executing tests. Returns (pairs as token ids, as text, all samples as rows)."""
    asked = data.read_problems(args, "prompts", tokens)
    check_positions(args.policy, "policy", asked.longest + args.max_new_tokens)
    with Examiner(tokens, args, ranks) as examiner:
        dtype = fsdp.compute_dtype(args.param_dtype, ranks)
        lm = loading.read_causal_lm(args.policy, dtype=dtype).to(ranks.device)
        run.prove_policy(lm, tokens)
        how = (args.temperature, args.samples_per_prompt)
        groups = examiner.answers(lm, asked, "pairs", *how, bars=True)
    pairs, texts, rows = [], [], []
    for problem, prompt, group in zip(asked.problems, asked.prompts, groups, strict=True):
        rows += [(prompt, answer.ids) for answer in group]
        farthest = reward.farthest_pair([a.ids for a in group], [a.passed for a in group])
        if farthest:
            chosen, rejected = (group[i] for i in farthest)
            pairs.append((prompt, chosen.ids, rejected.ids))
            texts.append((prompt_text(problem, args.prompt_style), chosen.text, rejected.text))
    passed = sum(answer.passed for group in groups for answer in group) / len(rows)
    ranks.say(
        f"pairs: {len(pairs)} of {len(asked)} prompts have a passing and a failing sample; "
        f"the SFT policy passes {passed:.3f} of {len(rows)} samples"
    )
    return pairs, texts, rows


def make_for_lab(folder, ranks):
    """The lab's reward model, on any number of ranks; 400 pairs tell its accuracy."""
    batch = math.ceil(16 / ranks.world) * ranks.world
    main(Args(run_dir=folder, batch=batch, held_out=0.25), ranks)


def main(args, ranks=None):
    ranks = ranks or fsdp.init_ranks(args.device, minutes=args.collective_timeout)
    N, size = args.samples_per_prompt, args.batch
    require(args.pairs or N > 1, f"--samples_per_prompt {N}: a pair needs at least 2")
    share, microbatch = rows_per_rank(size, "batch", args.microbatch, ranks.world)
    args.prompts = "" if args.pairs else args.prompts
    lab.resolve(args, prompts="rm.jsonl")
    loading.fetch(args, ("policy",), ranks)
    folder = run.claim(args, ranks, "runs/reward_model")
    lab.make(args, ranks)

    # Pairs of token ids (prompt, chosen, rejected); rows are for the normaliser
    tokens = data.Tokens.of(args, ranks.say)
    if args.pairs:
        pairs, texts = data.read_pairs(args.pairs, tokens)
        rows = reward.rows_of(pairs)
    else:
        pairs, texts, rows = pairs_by_tests(args, tokens, ranks)
    training, held_out = reward.split_by_prompt(pairs, args.held_out, args.seed)
    per_epoch = len(training) // size
    few = f"--batch {size}: more than the {len(training)} pairs there are for training"
    require(per_epoch > 0, few)

    # Model: the SFT policy's backbone, a new scalar head
    model = loading.new_scalar(args, ranks)
    run.prove_scalar(model, tokens, "policy", args.policy, ranks.device)
    optimizer, steps = fsdp.adamw(model, args.lr), per_epoch * args.epochs
    ranks.say(
        f"reward model: {len(training)} pairs for training, {len(held_out)} held out, "
        f"{steps} steps of {size} -> {share} per rank -> microbatches of {microbatch}"
    )

    bar = tqdm(range(steps), "reward model", mininterval=1, disable=not ranks.is_main)
    for step in bar:
        epoch, part = divmod(step, per_epoch)
        shuffled = torch.randperm(len(training), generator=seeded("pairs", args.seed, epoch))
        mine = shuffled[part * size : (part + 1) * size][ranks.rank :: ranks.world]
        warm = min(1.0, (step + 1) / (1 + 0.03 * steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        sums = torch.zeros(2, device=ranks.device)
        for start in range(0, share, microbatch):
            some = [training[i] for i in mine[start : start + microbatch]]
            prompts, chosen, rejected = zip(*some, strict=True)
            batch = collate(prompts * 2, chosen + rejected, tokens.pad, ranks.device)
            scores = model(batch.ids, batch.ends)[:, 0, 0]  # [2 * microbatch]: chosen, rejected
            loss, metrics = reward.bradley_terry_loss(*scores.chunk(2))
            (loss * ranks.world / size).backward()  # FSDP averages over ranks, the loss is a sum
            sums += torch.stack([metrics["loss"], metrics["accuracy"]])
        fsdp.step(model, optimizer, warm * cosine, args.grad_norm)
        loss, accuracy = (fsdp.sum_over_ranks(sums) / size).tolist()
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)

    # Normaliser, accuracy, checkpoint
    how = tokens.pad, args.microbatch, ranks
    raw = reward.raw_scores(model, rows, *how)
    alike = f"--run_dir {folder}: the model scores all {len(rows)} responses alike"
    require(raw.std() > 0, alike)
    card = reward.RewardCard(raw.mean().item(), raw.std().item(), *tokens.hashes())
    accuracies = []
    for part in (training, held_out):
        chosen, rejected = reward.raw_scores(model, reward.rows_of(part), *how).view(-1, 2).T
        accuracies.append((chosen > rejected).double().mean().item())

    def write_pairs(temporary):
        write_json(temporary / "args.json", asdict(args))
        names = ("prompt", "chosen", "rejected")
        append_jsonl(temporary / "pairs.jsonl", [dict(zip(names, t, strict=True)) for t in texts])

    config = model.classifier.config
    config.pad_token_id = tokens.classifier_pad
    unsharded, extra = empty_classifier(config), [card.save, write_pairs]
    run.write(model.classifier, folder, unsharded, tokens.tokenizer, ranks, extra)
    unseen = f"{accuracies[1]:.3f} on {len(held_out)} held-out pairs"
    unseen = unseen if held_out else "none held out"
    ranks.say(
        f"reward model in {folder}: pair accuracy {accuracies[0]:.3f} in training, {unseen}; "
        f"normaliser mean {card.mean:.3f}, sd {card.std:.3f} over {len(rows)} responses"
    )


if __name__ == "__main__":
    run.launch(main, Args)
