"""How time and memory of a PPO step grow with its sizes; slopes of log-log lines.

    python tests/bench/scaling.py

Random Llamas, so that no response ends early. One size at a time is multiplied: prompts per step,
response length, samples per prompt, width. Each point is a run of `train_ppo.py` on one rank with
no filter (all samples are kept) and microbatches of 40 rows; seconds are those of sampling, scoring
and update, the median of the steps after the first, then of the rounds. A slope of 1 is linear. A
response twice as long has twice the tokens, each with more before it: a little over 1. Width counts
quadratically in matrix products: up to 2. Prints a table and one line of JSON.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pfppo.lab import default as lab  # noqa: E402
from pfppo.lab import world  # noqa: E402

import torch  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

BASE = {"prompts_per_step": 16, "max_new_tokens": 64, "samples_per_prompt": 5, "width": 128}
POINTS = {
    "prompts_per_step": (16, 32, 64, 128),
    "max_new_tokens": (64, 128, 256),
    "samples_per_prompt": (2, 5, 10),
    "width": (128, 256, 512),
}


def make_models(folder, width):
    """A random policy and reward model of four layers, with the lab's kind of tokenizer."""
    torch.manual_seed(0)
    tokenizer = lab.make_tokenizer(world.draw_corpus(0, 500))
    config = LlamaConfig(
        vocab_size=lab.VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    for name, kind in (("lm", LlamaForCausalLM), ("rm", LlamaForSequenceClassification)):
        kind(config).save_pretrained(folder / f"{name}{width}")
        tokenizer.save_pretrained(folder / f"{name}{width}")


def measure(folder, sizes, steps, number):
    """{"seconds": of a step, "gib": peak memory} of one run."""
    sizes = dict(sizes)
    width = sizes.pop("width")
    run = folder / f"run{number}"
    rows = sizes["prompts_per_step"] * sizes["samples_per_prompt"]
    options = sizes | {
        "policy": folder / f"lm{width}",
        "reward_model": folder / f"rm{width}",
        "prompts": folder / "prompts.jsonl",
        "run_dir": run,
        "filter": "none",
        "steps": steps,
        "minibatch": rows,
        "microbatch": min(rows, 40) if rows % 40 == 0 else 32,
        "save_every": 10**6,
        "eval_every": 10**6,
        "actor_lr": 1e-9,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, ROOT / "train_ppo.py", *words],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()[1:]]
    phases = ("seconds_sample", "seconds_score", "seconds_update")
    seconds = statistics.median(sum(line[phase] for phase in phases) for line in lines)
    return {"seconds": seconds, "gib": float(re.search(r"rank 0: ([\d.]+) GiB", done.stdout)[1])}


def slope(sizes, values):
    """Of the least-squares line through (log size, log value)."""
    x, y = ([math.log(v) for v in column] for column in (sizes, values))
    return statistics.linear_regression(x, y).slope


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder, number = Path(name), 0
        for width in POINTS["width"]:
            make_models(folder, width)
        problems = world.draw_problems(0, "train", 160)
        lines = [json.dumps({"prompt": problem.prompt}) for problem in problems]
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        for knob, sizes in POINTS.items():
            points = {size: [] for size in sizes}
            for _ in range(args.rounds):
                for size in sizes:
                    number += 1
                    points[size].append(measure(folder, BASE | {knob: size}, args.steps, number))
            seconds, gib = (
                [statistics.median(p[key] for p in points[size]) for size in sizes]
                for key in ("seconds", "gib")
            )
            found[knob] = {
                "sizes": sizes,
                "seconds": [round(s, 3) for s in seconds],
                "gib": gib,
                "slope of time": round(slope(sizes, seconds), 2),
                "slope of memory": round(slope(sizes, gib), 2),
            }
            pairs = zip(sizes, seconds, gib, strict=True)
            table = "   ".join(f"{size}: {s:.2f} s {g:.1f} GiB" for size, s, g in pairs)
            print(f"{knob:18} {table}   slope of time {slope(sizes, seconds):.2f}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
