"""Seconds of a PPO step by phase for every filter, at the same amount of samples.

    python tests/bench/step.py --policy runs/lab/policy --reward_model runs/lab/reward_model \
        --prompts runs/lab/train.jsonl
    ... --filters best_random --against TREE      # another version's files: git worktree add TREE

Runs `train_ppo.py` on one rank for a few steps with each filter in turn, round by round, and reads
`metrics.jsonl`; the first step of a run warms up and does not count. Learning rates are tiny, so
that all runs sample alike; `single` gets as many samples from N times as many prompts. Figures are
medians over steps and rounds, ratios are medians of the rounds' ratios to `none`, or of a filter
here to itself in the other version, in turn. Prints a table and one line of JSON. The whole step
beside another trainer's: `against_trl.py`.
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


def phases_of(name, args, folder, tree):
    """{phase: median seconds of a step} of one run of the version in a folder."""
    paths = ("--policy", args.policy, "--reward_model", args.reward_model)
    paths += ("--prompts", args.prompts, "--run_dir", folder)
    options = {"steps": args.steps, "filter": name, "actor_lr": 1e-9, "critic_lr": 1e-9}
    options |= {"save_every": 10**6, "eval_every": 10**6}
    if name == "single":
        options |= {"samples_per_prompt": 1, "prompts_per_step": P * N}
    words = [str(word) for pair in options.items() for word in (f"--{pair[0]}", pair[1])]
    command = [sys.executable, tree / "train_ppo.py", *paths, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
    found = {p: statistics.median(row[f"seconds_{p}"] for row in rows) for p in PHASES}
    found["step"] = statistics.median(sum(row[f"seconds_{p}"] for p in PHASES) for row in rows)
    return found | {"kept": statistics.mean(row["kept"] for row in rows)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reward_model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--filters", default=",".join(FILTERS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=lambda tree: Path(tree).resolve())
    args = parser.parse_args()
    sides = {name: (ROOT, "none") for name in ["none", *args.filters.split(",")]}
    if args.against:
        sides = {}
        for name in args.filters.split(","):
            sides[f"{name} before"] = (args.against, f"{name} before")
            sides[name] = (ROOT, f"{name} before")
    measured = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for side, (tree, _) in sides.items():
                name = side.removesuffix(" before")
                found = phases_of(name, args, Path(folder) / f"{side}-{number}", tree)
                measured[side].append(found)
                print(f"round {number + 1} {side:18} {found}", flush=True)
    names = (*PHASES, "step")
    print("".join(f"{name:>14}" for name in names) + "   (seconds, ratio)")
    result = {}
    for side, (_, base) in sides.items():
        pairs = list(zip(measured[side], measured[base], strict=True))
        middle = {
            name: (
                statistics.median(row[name] for row in measured[side]),
                statistics.median(ours[name] / theirs[name] for ours, theirs in pairs),
            )
            for name in names
        }
        result[side] = {name: [round(x, 3) for x in both] for name, both in middle.items()}
        result[side]["kept"] = statistics.mean(row["kept"] for row in measured[side])
        cells = "".join(f"{x:8.2f} {ratio:.2f}x" for x, ratio in middle.values())
        print(f"{cells}   {side}, {result[side]['kept']:.2f} kept")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
