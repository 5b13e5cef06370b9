"""Differences of a study's outcome with intervals over units and problems at once.

    python tests/study/crossed.py runs/plan --filters random_two,best_random,best_worst --units 12

Student's interval over reward models (or seeds) is about the problems that were asked: all cells
have the same. Here other problems might have been drawn, too. With d [U, P], a filter's pass rate
minus the base's of unit u on problem p, and units and problems crossed, the mean of d has variance
(units) / U + (problems) / P + (rest) / UP: the variance of unit means over U, and that of problem
means over P, have the rest in them once each, so it is subtracted once. Degrees of freedom are
Satterthwaite's, and those over units at most.

The answers are those in a study's folder, `cells/FILTER-UNIT/answers/results.jsonl`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pfppo.files import whole_lines  # noqa: E402
from pfppo.lab.intervals import t_quantile  # noqa: E402
from pfppo.lab.tables import as_table, shown  # noqa: E402

import numpy as np  # noqa: E402


def crossed_interval(d, confidence=0.95):
    """((mean, low, high), standard errors over units, problems and both). d: [U, P]."""
    (U, P), mean = d.shape, d.mean()
    rest = d - d.mean(1, keepdims=True) - d.mean(0) + mean
    free = np.array([U - 1, P - 1, (U - 1) * (P - 1)])
    parts = np.array([d.mean(1).var(ddof=1) / U, d.mean(0).var(ddof=1) / P, 0.0])
    parts[2] = (rest**2).sum() / free[2] / (U * P)
    both = max(parts[0] + parts[1] - parts[2], parts[0])  # never less than over units alone
    df = max(1, int(both**2 / (parts**2 / free).sum()))
    half = t_quantile(confidence, min(df, int(free[0]))) * both**0.5
    return (mean, mean - half, mean + half), (*parts[:2] ** 0.5, both**0.5)


def rates(folder, name, units):
    """[U, P] pass rates of a filter's last policies, problem by problem."""
    each = []
    for unit in range(1, units + 1):
        answers = {}
        for row in whole_lines(Path(folder) / f"cells/{name}-{unit}/answers/results.jsonl"):
            answers.setdefault(row["task_id"], []).append(row["passed"])
        each.append([np.mean(answers[task]) for task in sorted(answers)])
    return np.array(each)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--filters", default="random_two,best_random,best_worst")
    parser.add_argument("--base", default="none")
    parser.add_argument("--units", type=int, default=12)
    parser.add_argument("--confidence", type=float, default=0.95)
    args = parser.parse_args()
    base, lines = rates(args.folder, args.base, args.units), []
    for name in args.filters.split(","):
        differ = rates(args.folder, name, args.units) - base
        interval, errors = crossed_interval(differ, args.confidence)
        lines.append([name, shown(interval, "+"), *(f"{error:.4f}" for error in errors)])
    head = ["filter", f"minus {args.base}", "s.e. over units", "over problems", "over both"]
    print(as_table(head, lines))


if __name__ == "__main__":
    main()
