"""How much labs differ that ought to be the same: one is made from each of several SFT seeds.

    python tests/study/spread.py --labs 8 --out runs/spread

The problems are the same. Rounding of another machine sends the SFT run elsewhere as another seed
of its initial weights does, and all that follows (samples, pairs, reward model) with it. Of each
lab: minutes of making, pass rate of the policy's samples, pair accuracy of its reward model; AUC,
R^2 and alpha of that over --problems x 5 samples; then means and standard deviations. Labs that are
there are not made again.
"""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pfppo.config import Count, Natural, launch  # noqa: E402

COLUMNS = ("minutes", "passed", "accuracy", "auc", "r2", "alpha")


@dataclass
class Args:
    labs: Count = 8  # SFT seeds
    first: Natural = 0  # the first of them; 0 is the lab's own
    problems: Count = 500  # of the test, 5 samples each
    jobs: Count = 2  # labs made at once, one thread each
    out: str = "runs/spread"


def make(args, seed):
    """One lab in a working folder of its own. Returns its row."""
    folder = Path(args.out, str(seed)).absolute()
    path = folder / "lab.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        sft = f"make_problems(); make_policy('cpu', {seed})"
        sft = f"from pfppo.lab.default import *; {sft}"
        run(folder, "-c", sft)
        said = run(
            folder, ROOT / "train_rm.py", "--run_dir", "runs/lab/reward_model", "--held_out", 0.25
        )
        minutes = (time.monotonic() - begun) / 60
        lines = (folder / "runs/lab/test.jsonl").read_text().splitlines(keepends=True)
        (folder / "asked.jsonl").write_text("".join(lines[: args.problems]))
        asked = ["--problems", "asked.jsonl", "--reward_model", "lab", "--samples_per_problem", 5]
        run(folder, ROOT / "eval_code.py", *asked, "--filters", "none", "--out", "runs/eval")
        row = json.loads((folder / "runs/eval/reliability.json").read_text())["filters"][0]
        row = {name: row[name] for name in ("auc", "r2", "alpha")} | {"minutes": minutes}
        row["accuracy"] = float(re.search(r"in training, ([\d.]+) on", said)[1])
        row["passed"] = float(re.search(r"SFT policy passes ([\d.]+) of", said)[1])
        path.write_text(json.dumps(row))
    return json.loads(path.read_text())


def run(folder, *words):
    """What a script printed."""
    place = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=folder, env=place, stdout=subprocess.PIPE, text=True)
    done.check_returncode()
    return done.stdout


def main(args):
    seeds = range(args.first, args.first + args.labs)
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda seed: make(args, seed), seeds))
    print(f"{'SFT seed':>8}  " + "  ".join(f"{name:>8}" for name in COLUMNS))
    for seed, row in zip(seeds, rows, strict=True):
        print(f"{seed:8}  " + "  ".join(f"{row[name]:8.3f}" for name in COLUMNS))
    for what, of in [("mean", mean), ("s.d.", stdev)][: len(rows)]:
        print(f"{what:>8}  " + "  ".join(f"{of(r[n] for r in rows):8.3f}" for n in COLUMNS))


if __name__ == "__main__":
    launch(main, Args)
