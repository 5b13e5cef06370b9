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

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pfppo import data, export, fsdp, lab, peers, rundir
from pfppo.batch import collate, owned
from pfppo.config import Count, Positive, Seed, Share, launch, require
from pfppo.examine import Examiner
from pfppo.fsdp import gather_lists
from pfppo.loading import fetch, new_scalar
from pfppo.model import check_positions, empty_classifier, read_causal_lm
from pfppo.reward import RewardCard, bradley_terry_loss, farthest_pair
from pfppo.sampler import check_cache, stop_ids
from pfppo.sandbox import Sandbox

import torch
from tqdm import tqdm


@dataclass
class Args:
    policy: str = "lab"  # SFT policy: a folder, or "lab" (made on first use)
    pairs: str = ""  # JSONL with prompt, chosen, rejected, text or messages; empty: from --prompts
    prompts: str = "lab"  # JSONL in HumanEval form, or "lab": what pairs are built from
    run_dir: str = ""  # where the checkpoint goes; empty: runs/reward_model, -2, ...
    seed: Seed = 1  # samples, order of pairs, new head
    samples_per_prompt: Count = 5  # N samples per prompt when pairs are built
    max_new_tokens: Count = 64  # longest response that is sampled
    max_prompt_tokens: Count = 1024  # longest prompt
    temperature: Positive = 1.0  # of the samples
    prompt_style: Literal["plain", "chat", "deepseek"] = "plain"  # as code, or as a dialogue
    lr: Positive = 5e-4  # AdamW; the paper's 6.7B model: 1e-5
    epochs: Count = 2  # the paper: 1
    batch: Count = 16  # pairs per optimizer step
    microbatch: Count = 16  # pairs per forward and rank
    grad_norm: Positive = 1.0  # global norm that gradients are clipped to
    held_out: Share = 0.1  # share of the prompts whose pairs measure accuracy
    timeout: Positive = 3.0  # CPU seconds that one sample's tests may take
    workers: Count = 2  # sandbox processes per rank
    require_isolation: bool = False  # refuse a sandbox without namespaces and seccomp
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU
    gradient_checkpointing: bool = False  # blocks run again in backward; memory only
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one


def pairs_from_samples(args, tokenizer, ranks):
    """Pairs by executing tests. Returns (pairs as token ids, as text, all samples as rows)."""
    problems, prompts = data.load_rendered(
        args.prompts, tokenizer, args.prompt_style, args.max_prompt_tokens
    )
    untested = [problem.task_id for problem in problems if not problem.test]
    require(not untested, f"--prompts {args.prompts}: task {untested[:1]} has no test")
    check_cache(args.policy)
    stop = stop_ids(args.policy, tokenizer)
    longest = max(map(len, prompts)) + args.max_new_tokens
    check_positions(args.policy, "policy", longest, "the longest prompt with --max_new_tokens")
    how = {"require_isolation": args.require_isolation}
    with Sandbox(args.workers, args.timeout, **how) as sandbox:
        examiner = Examiner(tokenizer, stop, sandbox, ranks, args.seed, args.max_new_tokens)
        dtype = fsdp.compute_dtype(args.param_dtype, ranks)
        model = read_causal_lm(args.policy, dtype=dtype).to(ranks.device)
        N = args.samples_per_prompt
        groups = examiner(model, problems, prompts, "pairs", args.temperature, N, bars=True)
    pairs, texts = [], []
    for problem, prompt, group in zip(problems, prompts, groups, strict=True):
        found = farthest_pair([a.ids for a in group], [a.passed for a in group])
        if found:
            chosen, rejected = (group[i] for i in found)
            pairs.append((prompt, chosen.ids, rejected.ids))
            texts.append((data.text_of(problem, args.prompt_style), chosen.text, rejected.text))
    marks = [answer.passed for group in groups for answer in group]
    ranks.say(
        f"pairs: {len(pairs)} of {len(problems)} prompts have a passing and a failing sample; "
        f"the SFT policy passes {sum(marks) / len(marks):.3f} of {len(marks)} samples"
    )
    rows = [(p, answer.ids) for p, group in zip(prompts, groups, strict=True) for answer in group]
    return pairs, texts, rows


def read_pairs(args, tokenizer):
    """Pairs of a file. The normaliser then comes from all its responses, chosen and rejected."""
    how = tokenizer, args.prompt_style, args.max_prompt_tokens
    pairs, triples = data.load_pairs(args.pairs, *how)
    longest = max(len(ids) + max(map(len, responses)) for ids, *responses in pairs)
    check_positions(args.policy, "policy", longest, f"the longest row of --pairs {args.pairs}")
    return pairs, triples, [(p, ids) for p, *responses in pairs for ids in responses]


def scores_of(model, rows, pad_id, args, ranks):
    """Raw scores of (prompt ids, response ids) rows, spread over ranks: [len(rows)] on each."""
    mine = [rows[i] for i in owned(len(rows), ranks.rank, ranks.world)]
    size = 2 * args.microbatch
    scores = []
    with torch.no_grad():
        for start in range(0, math.ceil(len(rows) / ranks.world), size):  # equal on all ranks
            prompts, responses = zip(*(mine[start : start + size] or rows[:1]), strict=True)
            batch = collate(prompts, responses, pad_id, ranks.device)
            scores += model(batch.ids, batch.ends).flatten().tolist()
    return torch.tensor(gather_lists(scores[: len(mine)], ranks), dtype=torch.float64)


def accuracy_of(model, pairs, pad_id, args, ranks):
    """Share of the pairs whose chosen response scores higher; NaN without pairs."""
    rows = [(prompt, ids) for prompt, *responses in pairs for ids in responses]
    scores = scores_of(model, rows, pad_id, args, ranks).view(-1, 2)
    return (scores[:, 0] > scores[:, 1]).double().mean().item()


def make_for_lab(folder, ranks):
    """The lab's reward model, on any number of ranks."""
    main(Args(run_dir=folder, batch=math.ceil(16 / ranks.world) * ranks.world), ranks)


def main(args, ranks=None):
    ranks = ranks or fsdp.init_ranks(args.device)  # train_ppo.py has joined its ranks already
    require(
        args.pairs or args.samples_per_prompt > 1,
        f"--samples_per_prompt {args.samples_per_prompt}: a pair needs at least 2",
    )
    share, left = divmod(args.batch, ranks.world)
    require(left == 0, f"--batch {args.batch}: does not divide over {ranks.world} ranks")
    microbatch = min(share, args.microbatch)
    require(
        share % microbatch == 0,
        f"--microbatch {microbatch}: does not divide the {share} pairs per rank and step",
    )
    args.prompts = "" if args.pairs else args.prompts
    used = lab.resolve(args, prompts="rm")
    fetch(args, ("policy",), ranks)
    run = Path(fsdp.from_main(args.run_dir or str(rundir.unused("runs/reward_model")), ranks))
    rundir.check_writable(run, "run_dir")
    empty = not run.exists() or not any(run.iterdir())
    require(empty, f"--run_dir {run}: is not empty, choose another name")
    lab.make(ranks, args, used)

    # Data: pairs of token ids (prompt, chosen, rejected); rows are for the normaliser
    tokenizer = data.load_tokenizer(args.policy)
    data.check_style(tokenizer, args.prompt_style, args.policy)
    pad_id = data.pad_id_of(tokenizer)
    if args.pairs:
        pairs, texts, rows = read_pairs(args, tokenizer)
    else:
        pairs, texts, rows = pairs_from_samples(args, tokenizer, ranks)
    of_prompt = defaultdict(list)  # a prompt's pairs are all held out, or all trained on
    for pair in pairs:
        of_prompt[tuple(pair[0])].append(pair)
    groups, generator = list(of_prompt.values()), torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(groups), generator=generator).tolist()
    cut = round(len(groups) * args.held_out)
    held_out, training = (sum((groups[i] for i in p), []) for p in (order[:cut], order[cut:]))
    per_epoch = len(training) // args.batch
    require(
        per_epoch > 0,
        f"--batch {args.batch}: more than the {len(training)} pairs there are for training",
    )

    # Model: the SFT policy's backbone, a new scalar head
    model = new_scalar(args.policy, args.seed, ranks, args.param_dtype)
    if args.gradient_checkpointing:
        fsdp.recompute_blocks(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    steps = per_epoch * args.epochs
    ranks.say(
        f"reward model: {len(training)} pairs for training, {len(held_out)} held out, "
        f"{steps} steps of {args.batch} -> {share} per rank -> microbatches of {microbatch}"
    )

    bar = tqdm(range(steps), "reward model", mininterval=1, disable=not ranks.is_main)
    for step in bar:
        epoch, part = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(training), generator=generator).tolist()
        mine = shuffled[part * args.batch : (part + 1) * args.batch][ranks.rank :: ranks.world]
        warm = min(1.0, (step + 1) / math.ceil(0.03 * steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = args.lr * warm * cosine
        sums = torch.zeros(2, device=ranks.device)
        for start in range(0, share, microbatch):
            some = [training[i] for i in mine[start : start + microbatch]]
            prompts, chosen, rejected = zip(*some, strict=True)
            batch = collate(prompts * 2, chosen + rejected, pad_id, ranks.device)
            # [2 * microbatch]: chosen, then rejected
            scores = model(batch.ids, batch.ends)[:, 0, 0]
            loss, metrics = bradley_terry_loss(*scores.chunk(2))
            (loss * ranks.world / args.batch).backward()
            sums += torch.stack([metrics["loss"], metrics["accuracy"]])
        fsdp.clip_gradients(model, args.grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss, accuracy = (fsdp.sum_over_ranks(sums) / args.batch).tolist()
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)

    # Normaliser, accuracy, checkpoint
    raw = scores_of(model, rows, pad_id, args, ranks)
    require(raw.std() > 0, f"--run_dir {run}: the model scores all {len(rows)} responses alike")
    template = data.template_hash(tokenizer, args.prompt_style)
    card = RewardCard(
        raw.mean().item(), raw.std().item(), template, data.vocabulary_hash(tokenizer)
    )
    accuracies = [accuracy_of(model, part, pad_id, args, ranks) for part in (training, held_out)]

    def write_pairs(folder):
        rundir.write_json(folder / "args.json", asdict(args))
        with open(folder / "pairs.jsonl", "w") as file:
            for text in texts:
                row = dict(zip(("prompt", "chosen", "rejected"), text, strict=True))
                file.write(json.dumps(row) + "\n")

    config = model.classifier.config
    config.pad_token_id = data.classifier_pad_id(tokenizer, stop_ids(args.policy, tokenizer))
    twin = empty_classifier(config)
    export.write(model.classifier, run, twin, tokenizer, ranks, [card.save, write_pairs])
    unseen = (
        f"{accuracies[1]:.3f} on {len(held_out)} held-out pairs" if held_out else "none held out"
    )
    ranks.say(
        f"reward model in {run}: pair accuracy {accuracies[0]:.3f} in training, {unseen}; "
        f"normaliser mean {card.mean:.3f}, standard deviation {card.std:.3f} "
        f"over {len(rows)} responses"
    )


if __name__ == "__main__":
    launch(peers.together(main), Args)
