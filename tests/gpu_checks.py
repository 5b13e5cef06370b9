"""Checks of gpu.py: networks here against the CPU's, and whole runs of train_ppo.py."""

import json
import tempfile
from pathlib import Path

import train_ppo
from pfppo.model import Policy
from pfppo.rollout import collate
from pfppo.run.memory import Plan
from pfppo.run.proofs import apart
from pfppo.sampler import draw_uniforms, sample

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

#             width, layers, heads, MLP, vocabulary
SHAPES = {
    "tiny": (32, 2, 4, 64, 128),  # in fp32 on a CPU within a moment
    "small": (576, 30, 9, 1536, 49152),  # 135M, of the checks of whole runs
    "mid": (2048, 22, 16, 5632, 32000),  # 1.2B, of the times
}
NEVER = [1 << 30]  # an end-of-sequence id that no token has
OFFLOADS = ("offload_ref", "offload_reward", "offload_optimizer")


def config_of(shape):
    width, layers, heads, mlp, vocabulary = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        initializer_range=0.2 if shape == "tiny" else 0.02,  # so that its logits differ
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def prompts_of(count, length, vocabulary):
    drawn = torch.randint(
        2, vocabulary, (count, length), generator=torch.Generator().manual_seed(0)
    )
    return [row[: length - i % 3].tolist() for i, row in enumerate(drawn)]


def log_probs_and_gradient(lm, rows):
    """([tokens], the gradients' norm), on the CPU, of a causal LM where it is."""
    policy = Policy(lm)
    logp, _ = policy(rows.ids, rows.states, rows.responses, rows.mask)
    logp.sum().backward()
    norm = torch.stack([p.grad.float().norm() for p in lm.parameters()]).norm()
    lm.zero_grad()
    return logp[rows.mask > 0].detach().cpu(), norm.item()


def check_parity(report, device, shape):
    """One model here and on the CPU: training's log-probs and gradients, the sampler's tokens."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.float32).eval()
    prompts = prompts_of(8, 12, SHAPES[shape][-1])
    how = {"stop": NEVER, "samples_per_prompt": 2, "batch": 5}
    uniforms = draw_uniforms(1, 0, [(i, j) for i in range(8) for j in range(2)], 16)
    drawn = sample(lm, prompts, uniforms, **how)
    asked = [prompt for prompt in prompts for _ in range(2)]
    rows = {d: collate(asked, drawn.ids, 0, d, drawn.logp) for d in (torch.device("cpu"), device)}
    expected, norm = log_probs_and_gradient(lm, rows[torch.device("cpu")])
    for dtype in (torch.float32, torch.bfloat16):
        lm, name = lm.to(device, dtype), str(dtype).removeprefix("torch.")
        logp, here = log_probs_and_gradient(lm, rows[device])
        difference, limit = apart(logp, expected, dtype)
        report.check(f"log-probs as on the CPU, {name}", difference <= limit, difference, limit)
        share, limit = abs(here / norm - 1), 1e-3 if dtype == torch.float32 else 0.05
        report.check(f"gradient's norm as on the CPU, {name}", share <= limit, share, limit)
        again = sample(lm, prompts, uniforms, **how)
        rows_again = collate(asked, again.ids, 0, device, again.logp)
        logp, _ = log_probs_and_gradient(lm, rows_again)
        sampled = rows_again.sampled_logp[rows_again.mask > 0].cpu()
        difference, limit = apart(sampled, logp, dtype)
        report.check(f"sampler and training, {name}", difference <= limit, difference, limit)
        if dtype == torch.float32:
            same = sum(a == b for a, b in zip(again.ids, drawn.ids, strict=True)) / len(drawn.ids)
            report.check("rows that are sampled as on the CPU, share", same >= 0.9, same, 0.9)


def write_folders(folder, shape):
    """policy/, reward_model/ and prompts.jsonl of a run."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(SHAPES[shape][-1] - 2))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    config = config_of(shape)
    torch.manual_seed(0)
    kinds = {"policy": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}
    for name, kind in kinds.items():
        config.num_labels = 1
        kind.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = prompts_of(16, 24, SHAPES[shape][-1])
    lines = [{"prompt": " ".join(words[i] for i in ids)} for ids in prompts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def arguments(folder, device, small, **changed):
    """Those of train_ppo.py for these folders."""
    names = {name: str(folder / name) for name in ("policy", "reward_model")}
    sizes = {"steps": 2, "eval_every": 2, "prompts_per_step": 8, "samples_per_prompt": 4}
    sizes |= {"filter": "none", "minibatch": 16, "microbatch": 8, "max_new_tokens": 16}
    if small:
        sizes |= {"prompts_per_step": 2, "minibatch": 4, "microbatch": 4, "max_new_tokens": 4}
        sizes |= {"samples_per_prompt": 2}
    sizes |= {"validation": "", "test": "", "save_every": 2, "allow_weak_isolation": True}
    names |= {"prompts": str(folder / "prompts.jsonl"), "run_dir": tempfile.mkdtemp(dir=folder)}
    args = train_ppo.Args(**names | sizes | {"device": device.type} | changed)
    args.run_dir += "/run"
    return args


def run(folder, device, small, **changed):
    """train_ppo.main: (its status, the last line of its metrics)."""
    args = arguments(folder, device, small, **changed)
    try:
        status = train_ppo.main(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    file = Path(args.run_dir) / "metrics.jsonl"
    return status, json.loads(file.read_text().splitlines()[-1]) if file.exists() else None


def check_runs(report, device, small, folder):
    """--selfcheck, a plain run and its times, every offload."""
    write_folders(folder, "tiny" if small else "small")
    for dtype in ("float32", "bfloat16")[small:]:
        status, _ = run(folder, device, small, selfcheck=True, param_dtype=dtype)
        report.check(f"train_ppo.py --selfcheck, {dtype}", status == 0, status, 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _, plain = run(folder, device, small, steps=2 - small)
    report.times["step"] = {n: v for n, v in plain.items() if "second" in n and v is not None}
    if device.type == "cuda":
        plan = Plan(arguments(folder, device, small), 1, torch.bfloat16, 24)
        share = torch.cuda.max_memory_allocated() / max(plan.phases().values())
        report.check("peak memory of a run, share of --plan", share <= 1.1, share, 1.1)
    for chosen in [OFFLOADS] if small else [*((name,) for name in OFFLOADS), OFFLOADS]:
        _, row = run(folder, device, small, steps=2 - small, **dict.fromkeys(chosen, True))
        names = ("reward_all", "grad_norm_actor", "grad_norm_critic")
        share = max(abs(row[n] - plain[n]) / max(abs(plain[n]), 1e-6) for n in names)
        report.check(f"{' '.join(chosen)} as without", share <= 0.05, share, 0.05)
