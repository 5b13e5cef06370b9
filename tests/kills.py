"""A run killed with SIGKILL at random instants, resumed each time, against one that never stopped.

    python tests/kills.py [--kills 20] [--seed 0] [--ranks N]

A tiny run saves at every step and looks at validation at every second one. Again and again it is
started with --resume and killed after a random time: while it reads, samples, updates, saves or
exports; when it comes to its end before the last kill, another one is begun. In the end its
metrics, samples, checkpoint and exported policy must be equal to those of the run that was left
alone, bit for bit. Exit status 1 if not. (test_scale.py makes fewer kills.)
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from pfppo.run import checkpoint, export  # noqa: E402

import torch  # noqa: E402
from running import make_tiny, numbers, read, started  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

CHANGED = {"steps": 60, "save_every": 1, "eval_every": 2, "keep": 2, "test": ""}


def everything(run_dir):
    """What two runs must have in common."""
    newest = checkpoint.complete(run_dir)[0]
    weights = export.policy_of(newest) | load_file(run_dir / "policy/model.safetensors")
    rest = numbers(run_dir), read(run_dir / "samples.jsonl"), (newest / "state.json").read_text()
    return weights, rest


def whole_run(tiny, run_dir, ranks):
    """Run to the end and return the seconds it took."""
    begin = time.monotonic()
    process = started("train_ppo.py", tiny, run_dir, "--resume", ranks=ranks, **CHANGED)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said[-2000:]
    return time.monotonic() - begin


def killed_run(tiny, run_dir, ranks, kills, longest, draw):
    """Kill at most so many times, then run to the end. Returns what was going on at each kill."""
    moments, metrics = [], run_dir / "metrics.jsonl"

    def steps():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    while len(moments) < kills:
        before = steps()
        process = started("train_ppo.py", tiny, run_dir, "--resume", ranks=ranks, **CHANGED)
        try:
            process.communicate(timeout=draw.uniform(0.2, 1.2) * longest)
            return moments  # it came to its end before
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        saving = list(run_dir.glob("checkpoints/*.tmp")) or list(run_dir.glob("*.tmp"))
        moments.append(
            "while saving" if saving else "in a step" if steps() > before else "starting"
        )
    whole_run(tiny, run_dir, ranks)
    return moments


def equal(first, second):
    (weights, rest), (others, other_rest) = everything(first), everything(second)
    same = weights.keys() == others.keys()
    return same and rest == other_rest and all(torch.equal(weights[n], others[n]) for n in weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "tiny").mkdir()
        tiny = make_tiny(folder / "tiny")
        longest = whole_run(tiny, folder / "whole", args.ranks)
        draw, moments, same, runs = random.Random(args.seed), Counter(), True, 0
        while same and moments.total() < args.kills:
            runs += 1
            left, run_dir = args.kills - moments.total(), folder / f"killed {runs}"
            moments.update(killed_run(tiny, run_dir, args.ranks, left, longest, draw))
            same = equal(folder / "whole", run_dir)
            print(f"run {runs}: {dict(moments)}", flush=True)
    print(f"{moments.total()} kills in {runs} runs of {CHANGED['steps']} steps: {dict(moments)}")
    print("metrics, samples, checkpoint and policy are", "equal" if same else "NOT equal")
    sys.exit(not same)


if __name__ == "__main__":
    main()
