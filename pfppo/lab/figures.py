"""Figures as PNG, with matplotlib where it is installed; without it one line says how to get it.

    curves.png         reward and greedy pass@1 against samples drawn and optimizer steps
    optimization.png   the reward model's reward against the actual score while training goes on
    r2.png             R^2 before training against pass@1 after it, one point per filter
    rewards.png        differences to PPO-M under several rewards

The numbers behind them are in `table.json` and `metrics.jsonl`.
"""

from pfppo.run import HINT, pyplot

import numpy as np

SMOOTH = 5  # steps
LABELS = {"samples": "samples drawn", "updates": "optimizer steps"}
LABELS |= {"reward_all": "reward of all samples", "validation": "greedy pass@1, validation"}


def draw_study(folder, results, rows, correlation):
    """Three figures of a study. results: {filter: [`read_cell` of each seed]}; rows: the table's;
    correlation: of R^2 and pass@1. Returns one line about what was written."""
    plot = pyplot()
    if plot is None:
        return HINT
    figure, axes = plot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for row, y in zip(axes, ("reward_all", "validation"), strict=True):
        for axis, x in zip(row, ("samples", "updates"), strict=True):
            for name, runs in results.items():
                at, mean, low, high = _band(runs, x, y)
                (line,) = axis.plot(at, mean, label=name)
                axis.fill_between(at, low, high, color=line.get_color(), alpha=0.15, lw=0)
            axis.set(xlabel=LABELS[x], ylabel=LABELS[y])
    axes[0, 0].legend()
    figure.savefig(folder / "curves.png", dpi=120)

    figure, axis = plot.subplots(figsize=(6, 5), layout="constrained")
    for name, runs in results.items():  # every step has other prompts: some of them together
        window = np.ones(min(SMOOTH, len(runs[0]["samples"])))
        reward, score = (
            np.convolve(_band(runs, "samples", y)[1], window / window.sum(), "valid")
            for y in ("reward_all", "score_all")
        )
        axis.plot(reward, score, "-o", markevery=[-1], label=name)
    axis.set(xlabel=LABELS["reward_all"], ylabel="actual score of all samples")
    axis.set(title=f"running means of {SMOOTH} steps; a dot at the end")
    axis.legend()
    figure.savefig(folder / "optimization.png", dpi=120)

    figure, axis = plot.subplots(figsize=(6, 5), layout="constrained")
    for row in rows:
        if row["r2"] is not None:
            _points(axis, [row["r2"]], [row["selected_greedy"]], row["filter"])
    axis.set(xlabel="R^2 before training", ylabel="greedy pass@1 on test problems")
    axis.set(title=f"Spearman correlation {correlation:.2f}")
    axis.legend()
    figure.savefig(folder / "r2.png", dpi=120)
    plot.close("all")
    return "curves.png, optimization.png, r2.png"


def draw_rewards(folder, tables, base):
    """Greedy pass@1 minus that of the filter `base`, paired by seed. tables: {reward: rows}.
    Returns one line about what was written."""
    plot = pyplot()
    if plot is None:
        return HINT
    figure, axis = plot.subplots(figsize=(7, 4.5), layout="constrained")
    differences = {}  # {filter: [(mean, low, high) under each reward]}
    for row in sum(tables.values(), []):
        if row["filter"] != base:
            differences.setdefault(row["filter"], []).append(row["selected_greedy_difference"])
    for number, (name, values) in enumerate(differences.items()):
        shift = (number - (len(differences) - 1) / 2) * 0.15
        _points(axis, np.arange(len(tables)) + shift, values, name)
    axis.axhline(0, color="gray", lw=0.8)
    axis.set_xticks(range(len(tables)), list(tables))
    axis.set(ylabel=f"greedy pass@1 on test problems, minus {base}", xlabel="reward")
    axis.legend()
    figure.savefig(folder / "rewards.png", dpi=120)
    plot.close("all")
    return "rewards.png"


def _band(curves, x, y):
    """(x, mean, low, high) of a list of curves over seeds: mean and 95 % of the mean, normal."""
    values = np.array([curve[y] for curve in curves], dtype=float)  # None is NaN
    seen = ~np.isnan(values).any(0)
    mean = values[:, seen].mean(0)
    half = 1.96 * values[:, seen].std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
    at = np.array([curve[x] for curve in curves]).mean(0)[seen]
    return at, mean, mean - half, mean + half


def _points(axis, at, values, label):
    """Means with their intervals. values: [(mean, low, high)]; without an interval None."""
    mean, low, high = np.array(values, dtype=float).T
    axis.errorbar(at, mean, [mean - low, high - mean], fmt="o", capsize=3, label=label)
