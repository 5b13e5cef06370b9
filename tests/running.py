"""How the tests run the three scripts: on a tiny random checkpoint, with tiny numbers."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import train_rm
from pfppo.config import parse
from pfppo.lab import default as lab
from pfppo.lab import world
from pfppo.metrics import SECONDS
from pfppo.run import launch

import torch
import torch.distributed as dist
from conftest import ROOT
from ranks import fork
from transformers import LlamaConfig, LlamaForCausalLM


def run(script, *argv):
    """The script's main in this process, as `python script.py ARGV` would run it; its status."""
    try:
        return script.main(parse(script.Args, [str(word) for word in argv]))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def forked(script, *argv, ranks=2):
    """The script on several ranks, forked from this process, which has imported all there is:
    (exit statuses, what they printed)."""

    def work():
        sys.argv = [Path(script.__file__).name, *map(str, argv)]
        launch(script.main, script.Args)

    return fork(work, ranks)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_problems(path, problems):
    rows = [{k: v for k, v in dataclasses.asdict(p).items() if v} for p in problems]
    return write_rows(path, rows)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def numbers(run_dir):
    """metrics.jsonl without what depends on the machine's speed."""
    return [
        {name: value for name, value in row.items() if name not in SECONDS}
        for row in read(run_dir / "metrics.jsonl")
    ]


def make_tiny(folder):
    """A folder with a random policy, problems, and a reward model taught a little."""
    corpus = [(p, y) for p, y in world.draw_corpus(0, 3000) if len(p + y) < 120][:600]
    tokenizer = lab.make_tokenizer(corpus)
    config = LlamaConfig(
        vocab_size=lab.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    for name, split, count in (("train", "train", 24), ("held_out", "test", 6)):
        write_problems(folder / f"{name}.jsonl", world.draw_problems(1, split, count))
    pairs = [
        {"prompt": p.prompt, "chosen": p.canonical_solution, "rejected": "    return 0\n"}
        for p in world.draw_problems(1, "train", 24)
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    rm = ("--policy", folder / "policy", "--pairs", folder / "pairs.jsonl")
    run(train_rm, *rm, "--run_dir", folder / "rm", "--batch", 8, "--held_out", 0.25)
    return folder


def options(tiny, run_dir, **changed):
    """A tiny train_ppo command line."""
    chosen = {
        "policy": tiny / "policy",
        "reward_model": tiny / "rm",
        "prompts": tiny / "train.jsonl",
        "validation": tiny / "held_out.jsonl",
        "test": tiny / "held_out.jsonl",
        "run_dir": run_dir,
        "steps": 2,
        "prompts_per_step": 4,
        "samples_per_prompt": 3,
        "minibatch": 4,
        "microbatch": 2,
        "max_new_tokens": 12,
        "eval_every": 2,
        "save_every": 1,
        "actor_lr": 1e-3,
    } | changed
    return [word for name, value in chosen.items() for word in (f"--{name}", value)]


def started(script, tiny, run_dir, *words, ranks=0, launch=(), popen=None, **changed):
    """A script as a process of its own; with ranks, under torchrun with the options `launch`;
    popen: more for subprocess.Popen."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, *launch]
    argv = [script, *options(tiny, run_dir, **changed), *words]
    return subprocess.Popen(
        [sys.executable, *map(str, (torchrun if ranks else []) + argv)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen or {},
    )


def wait_for_steps(process, run_dir, steps):
    """Until metrics.jsonl has so many lines."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
