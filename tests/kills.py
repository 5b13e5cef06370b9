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


def ended(tiny, run_dir, ranks=0, seconds=600.0):
    """Begin a run or go on with it, for so long at most. Whether it came to its end."""
    process = started("train_ppo.py", tiny, run_dir, "--resume", ranks=ranks, **CHANGED)
    try:
        said = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    assert process.returncode == 0, said[-2000:]
    return True


def moment(run_dir, steps):
    """What a run that had made so many steps was doing when it was killed."""
    if list(run_dir.glob("checkpoints/*.tmp")) or list(run_dir.glob("*.tmp")):
        return "while saving"
    return "in a step" if steps_of(run_dir) > steps else "starting"


def steps_of(run_dir):
    metrics = run_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def everything(run_dir):
    """What two runs must have in common."""
    newest = checkpoint.complete(run_dir)[0]
    weights = export.policy_of(newest) | load_file(run_dir / "policy/model.safetensors")
    rest = numbers(run_dir), read(run_dir / "samples.jsonl"), (newest / "state.json").read_text()
    return weights, rest


def equal(*run_dirs):
    (weights, rest), (others, other_rest) = map(everything, run_dirs)
    same = weights.keys() == others.keys() and rest == other_rest
    return same and all(torch.equal(weights[name], others[name]) for name in weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (("kills", 20), ("seed", 0), ("ranks", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    draw, moments, same, runs = random.Random(args.seed), Counter(), True, 0
    with tempfile.TemporaryDirectory() as folder:
        whole, tiny = Path(folder, "whole"), make_tiny(Path(folder))
        begin = time.monotonic()
        ended(tiny, whole, args.ranks)
        longest = time.monotonic() - begin
        while same and moments.total() < args.kills:
            runs, run_dir = runs + 1, Path(folder, f"killed {runs}")
            steps, limit = 0, longest
            while not ended(tiny, run_dir, args.ranks, draw.uniform(0.2, 1.2) * limit):
                moments[moment(run_dir, steps)] += 1
                steps = steps_of(run_dir)
                limit = longest if moments.total() < args.kills else 1000
            same = equal(whole, run_dir)
            print(f"run {runs}: {dict(moments)}", flush=True)
    print(f"{moments.total()} kills in {runs} runs of {CHANGED['steps']} steps: {dict(moments)}")
    print("metrics, samples, checkpoint and policy are", "equal" if same else "NOT equal")
    sys.exit(not same)


if __name__ == "__main__":
    main()
