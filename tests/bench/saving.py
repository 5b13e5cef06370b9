"""What saving costs: the share of a PPO step that a checkpoint holds training up.

    python tests/bench/saving.py --policy DIR --reward_model DIR --prompts FILE [--steps 12]

A run saves at every step: the worst case, a checkpoint is then written during every step. Printed
are medians over the steps of seconds_save (waiting for the one before, copying to host memory,
sealing) as a share of the step, and of the whole step beside that of a run that does not save, in
rounds by turns. Figures are ratios; with --save_every K the share is a Kth.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def steps_of(args, folder, save_every):
    """Rows of metrics.jsonl of a run."""
    options = {"policy": args.policy, "reward_model": args.reward_model, "prompts": args.prompts}
    options |= {"steps": args.steps, "save_every": save_every, "eval_every": 1000}
    options |= {"run_dir": folder, "validation": "", "test": ""}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, ROOT / "train_ppo.py", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seconds(row):
    parts = ("sample", "score", "update", "save")
    return sum(row[f"seconds_{part}"] for part in parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("policy", "reward_model", "prompts"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    shares, ratios = [], []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            saving = steps_of(args, Path(folder) / "saving", 1)[1:-1]
            plain = steps_of(args, Path(folder) / "plain", 1000)[1:-1]
        shares += [row["seconds_save"] / seconds(row) for row in saving]
        ratios += [seconds(a) / seconds(b) for a, b in zip(saving, plain, strict=True)]
        print(
            f"round {number + 1}: seconds_save {statistics.median(shares):.2%} of a step; "
            f"a step that saves takes {statistics.median(ratios):.3f} of one that does not",
            flush=True,
        )


if __name__ == "__main__":
    main()
