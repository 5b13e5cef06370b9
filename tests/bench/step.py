"""Seconds of a PPO step by phase for every filter, at the same amount of samples.

    python tests/bench/step.py --policy runs/lab/policy --reward_model runs/lab/reward_model \
        --prompts runs/lab/train.jsonl

Runs `train_ppo.py` on one rank for a few steps with each filter in turn, round by round, and reads
`metrics.jsonl`; the first step of a run warms up and does not count. Learning rates are tiny, so
that all runs sample alike; `single` gets as many samples from N times as many prompts. Figures are
medians over steps and rounds, ratios are medians of the rounds' ratios to `none`. Prints a table
and one line of JSON. The whole step beside another trainer's: `against_trl.py`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pfppo.filters import FILTERS  # noqa: E402
from train_ppo import Args  # noqa: E402

P, N = Args.prompts_per_step, Args.samples_per_prompt
PHASES = ("sample", "score", "update")


def phases_of(name, args, folder):
    """{phase: median seconds of a step} of one run."""
    paths = ("--policy", args.policy, "--reward_model", args.reward_model)
    paths += ("--prompts", args.prompts, "--run_dir", folder)
    options = {"steps": args.steps, "filter": name, "actor_lr": 1e-9, "critic_lr": 1e-9}
    options |= {"save_every": 10**6, "eval_every": 10**6}
    if name == "single":
        options |= {"samples_per_prompt": 1, "prompts_per_step": P * N}
    words = [str(word) for pair in options.items() for word in (f"--{pair[0]}", pair[1])]
    command = [sys.executable, ROOT / "train_ppo.py", *paths, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
    found = {p: statistics.median(row[f"seconds_{p}"] for row in rows) for p in PHASES}
    return found | {"kept": statistics.mean(row["kept"] for row in rows)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reward_model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--filters", default=",".join(FILTERS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    names = list(dict.fromkeys(["none", *args.filters.split(",")]))
    measured = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name in names:
                found = phases_of(name, args, Path(folder) / f"{name}-{number}")
                measured[name].append(found)
                print(f"round {number + 1} {name:12} {found}", flush=True)
    print(f"\n{'filter':12} {'kept':>5} {'sample':>7} {'score':>7} {'update':>7}  update / none")
    result = {}
    for name, rounds in measured.items():
        middle = {key: statistics.median(r[key] for r in rounds) for key in (*PHASES, "kept")}
        pairs = zip(rounds, measured["none"], strict=True)
        middle["ratio"] = statistics.median(a["update"] / b["update"] for a, b in pairs)
        result[name] = {key: round(value, 3) for key, value in middle.items()}
        times = "".join(f" {middle[phase]:7.2f}" for phase in PHASES)
        print(f"{name:12} {middle['kept']:5.2f}{times}  {middle['ratio']:.2f} x")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
