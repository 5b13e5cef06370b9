"""The embedded default: problems, a tokenizer and an SFT policy, made on first use in `runs/lab/`.

    train.jsonl  rm.jsonl  validation.jsonl  test.jsonl     problems of world.py, HumanEval form
    policy/                                                 tokenizer and SFT policy
    reward_model/                                           made by train_rm.py from rm.jsonl

Everything is a function of `SEED` and takes some minutes on two CPU cores. The policy is a
Llama of 4 layers and width 128, trained from scratch to the end of its schedule on programs with
common bugs: it knows the tasks and makes the mistakes of the corpus. No network, no GPU.

A policy that was half made is made again; a reward model goes on where it was stopped.
"""

import dataclasses
import json
import math
import random
import re
import shutil
from pathlib import Path

from pfppo.config import described, model_folders, parts
from pfppo.fsdp import agreed
from pfppo.lab import world
from pfppo.model import Policy
from pfppo.rollout import collate
from pfppo.run import check_shared, is_trained

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path("runs/lab")
PATHS = {"policy": "policy", "reward_model": "reward_model", "validation": "validation.jsonl"}
# Options whose defaults are the lab's, a tiny model's with short answers.
TUNED = ("max_new_tokens", "kl_coef", "lr", "actor_lr", "critic_lr")
PATHS |= {"prompts": "train.jsonl", "test": "test.jsonl", "problems": "test.jsonl"}
SEED = 0
PROBLEMS = {"train": 2000, "rm": 3200, "validation": 200, "test": 500}
VOCABULARY, POSITIONS = 512, 512
SFT_STEPS, SFT_BATCH, SFT_LR = 500, 64, 2e-3
EOS, PAD = "<eos>", "<pad>"


def resolve(args, **paths):
    """Put paths where arguments say "lab"; "auto" problems are the lab's with its prompts, and none
    with others. paths: others than in PATHS."""
    if getattr(args, "pairs", ""):
        args.prompts = ""  # pairs that are there need not be built
    for name in ("validation", "test"):
        if getattr(args, name, "") == "auto":
            setattr(args, name, "lab" if args.prompts == "lab" else "")
    for name, path in (PATHS | paths).items():
        if "lab" in (given := parts(getattr(args, name, ""))):
            chosen = [str(FOLDER / path) if part == "lab" else part for part in given]
            setattr(args, name, ",".join(chosen))


def named(args):
    """[(option, path)] of what is named, reward models one by one."""
    others = [name for name in PATHS if name not in ("policy", "reward_model")]
    others = [(name, path) for name in others if (path := getattr(args, name, ""))]
    return model_folders(args) + others


def is_ours(path):
    """Whether it is the lab's."""
    return Path(path).is_relative_to(FOLDER)


def make(args, ranks, make_reward_model=None):
    """Make what is missing of the lab that `args` name, on rank 0 while the others wait; its reward
    model, by make_reward_model(folder, ranks), on all ranks. Raises UserError."""
    if hint := hint_of(args):
        ranks.say(hint)
    used = {name for name, path in named(args) if is_ours(path)}
    if not used:
        return
    check_shared(FOLDER, f"the lab's folder {FOLDER}", ranks)
    with agreed(ranks, patient=True):
        if ranks.is_main:
            make_problems()
            if used & {"policy", "reward_model"} and not (FOLDER / "policy").exists():
                make_policy(ranks.device)
    if "reward_model" in used and not is_trained(FOLDER / "reward_model"):
        make_reward_model(str(FOLDER / "reward_model"), ranks)


def hint_of(args):
    """A line on the options that still have the lab's value, where --policy is not the lab's (or
    the problems of an evaluation are not); "" where there are none. What the paper takes is said by
    the option's own comment."""
    values = vars(args)
    policy, asked = values.get("policy"), values.get("problems")  # an evaluation has these
    ours = [is_ours(path) for path in (policy, asked) if path]
    if not policy or any(ours) or not dataclasses.is_dataclass(args):
        return ""
    comments = described(type(args))
    unused = {"max_new_tokens"} if values.get("pairs") else set()
    still = []
    for field in dataclasses.fields(args):
        if field.name in TUNED and field.name not in unused and values[field.name] == field.default:
            paper = re.search(r"the paper[^;]*: *(.*)", comments[field.name][1])
            other = f" (the paper: {paper[1]})" if paper else ""
            still.append(f"--{field.name} {field.default:g}{other}")
    what = f"hint: --policy {policy} is not the lab's, but these have the lab's values"
    return f"{what}: {', '.join(still)}" if still else ""


def make_problems():
    """What is missing of the four files of problems. No prompt stands in two of them."""
    paths = {name: FOLDER / f"{name}.jsonl" for name in PROBLEMS}
    if all(path.exists() for path in paths.values()):
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    taken = set()
    for name, count in PROBLEMS.items():
        split = "train" if name == "rm" else name
        drawn = world.draw_problems(f"{SEED} {name}", split, count, taken)
        problems = list(tqdm(drawn, f"{name} problems", count, mininterval=1))
        taken |= {problem.prompt for problem in problems}
        if not paths[name].exists():
            rows = [{k: v for k, v in dataclasses.asdict(p).items() if v} for p in problems]
            temporary = paths[name].with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
            temporary.rename(paths[name])
            print(f"lab: {count} problems in {paths[name]}")


def make_tokenizer(corpus=None):
    """A byte-level BPE whose tokens stay within a line and never join digits; learned from the
    beginning of the SFT corpus, in two seconds."""
    corpus = corpus or world.draw_corpus(SEED, 4000)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\n|[0-9]"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((p + y for p, y in corpus), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def make_policy(device, seed=SEED):
    """Train the SFT policy and write it, with its tokenizer, to `policy/`. seed: of its initial
    weights (tests/study/spread.py)."""
    corpus = world.draw_corpus(SEED, SFT_STEPS * SFT_BATCH)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # transformers draws initial weights from the global state
        model = LlamaForCausalLM(config).to(device)
    loss = train_policy(Policy(model), rows_of(corpus, tokenizer), tokenizer.pad_token_id, device)
    folder = FOLDER / "policy.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    folder.rename(FOLDER / "policy")
    size = sum(p.numel() for p in model.parameters())
    print(f"lab: SFT policy of {size:,} parameters, loss {loss:.3f} nats per token")


def rows_of(corpus, tokenizer):
    """[(prompt ids, response ids with EOS)]"""
    prompts, responses = (tokenizer(list(part))["input_ids"] for part in zip(*corpus, strict=True))
    return [(p, [*y, tokenizer.eos_token_id]) for p, y in zip(prompts, responses, strict=True)]


def train_policy(policy, rows, pad_id, device):
    """One epoch of supervised fine-tuning; returns the mean loss of the last fifty steps.

    Rows of similar length share a batch: padding would be a third of the work.
    """
    rng, pool, batches, losses = random.Random(SEED), 20 * SFT_BATCH, [], []
    for start in range(0, len(rows), pool):
        ordered = sorted(rows[start : start + pool], key=lambda row: len(row[0]) + len(row[1]))
        parts = [ordered[i : i + SFT_BATCH] for i in range(0, len(ordered), SFT_BATCH)]
        batches += rng.sample(parts, len(parts))
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=SFT_LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    bar = tqdm(batches, "SFT policy", mininterval=1)
    for step, batch in enumerate(bar):
        warm = min(1.0, (step + 1) / 20)
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / len(batches))
        optimizer.param_groups[0]["lr"] = SFT_LR * warm * cosine
        data = collate(*zip(*batch, strict=True), pad_id, device)
        logp, _ = policy(data.ids, data.states, data.responses, data.mask)
        loss = -logp.sum() / data.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return sum(losses[-50:]) / len(losses[-50:])
