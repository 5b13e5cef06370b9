"""What the plan's two looks can find, its equivalence test, and S4: chances by simulation.

    python tests/study/power.py

Differences of a filter to `none` are normal, one per reward model; a row per standard deviation of
theirs, a column per true difference, and the chance of equivalence where the difference is 0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pfppo.lab.intervals import t_quantile  # noqa: E402
from pfppo.lab.tables import as_table  # noqa: E402

import numpy as np  # noqa: E402

LOOKS = {6: 0.00145, 12: 0.02431}  # units: level (PLAN.md)
TRUE, MARGIN, RUNS = (0.0, 0.014, 0.02, 0.03), 0.02, 200_000


def half_width(values, confidence):
    """Of Student's interval over each row [runs, units]."""
    count = values.shape[1]
    return t_quantile(confidence, count - 1) * values.std(1, ddof=1) / count**0.5


def main():
    rng, lines = np.random.default_rng(0), []
    for sd in (0.015, 0.021, 0.03, 0.04):
        noise = sd * rng.standard_normal((RUNS, max(LOOKS)))
        found = []
        for true in TRUE:
            decided = np.zeros(RUNS, dtype=bool)
            for units, level in LOOKS.items():
                seen = (noise + true)[:, :units]
                decided |= abs(seen.mean(1)) > half_width(seen, 1 - level)
            found.append(decided.mean())
        equal = abs(noise.mean(1)) + half_width(noise, 0.9) < MARGIN
        lines.append([f"{x:.3f}" for x in (sd, *found, equal.mean())])
    head = ["standard deviation", *(f"found: {true:g}" for true in TRUE), f"within {MARGIN:g}"]
    print(as_table(head, lines))
    noise = 0.05 * rng.standard_normal((RUNS, 12))
    for true in (0.02, 0.05):  # 95 %, 12 seeds
        found = abs((noise + true).mean(1)) > half_width(noise, 0.95)
        print(f"S4, standard deviation 0.05, found: {true:g}: {found.mean():.3f}")


if __name__ == "__main__":
    main()
