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


def _band(curves, x, y):
    """(x, mean, low, high) of a list of curves over seeds: mean and 95 % of the mean, normal."""
    values = np.array([curve[y] for curve in curves], dtype=float)  # None is NaN
    seen = ~np.isnan(values).any(0)
    mean = values[:, seen].mean(0)
    half = 1.96 * values[:, seen].std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
    at = np.array([curve[x] for curve in curves]).mean(0)[seen]
    return at, mean, mean - half, mean + half


def draw_study(folder, curves, rows, correlation):
    """Three figures of a study. curves: {filter: [curves of a seed]}; rows: the table's;
    correlation: of R^2 and pass@1.

    Returns one line about what was written.
    """
    plot = pyplot()
    if plot is None:
        return HINT
    figure, axes = plot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    labels = {"samples": "samples drawn", "updates": "optimizer steps"}
    labels |= {"reward_all": "reward of all samples", "validation": "greedy pass@1, validation"}
    for row, y in zip(axes, ("reward_all", "validation"), strict=True):
        for axis, x in zip(row, ("samples", "updates"), strict=True):
            for name, runs in curves.items():
                at, mean, low, high = _band(runs, x, y)
                (line,) = axis.plot(at, mean, label=name)
                axis.fill_between(at, low, high, color=line.get_color(), alpha=0.15, lw=0)
            axis.set(xlabel=labels[x], ylabel=labels[y])
    axes[0, 0].legend()
    figure.savefig(folder / "curves.png", dpi=120)

    figure, axis = plot.subplots(figsize=(6, 5), layout="constrained")
    for name, runs in curves.items():  # every step has other prompts: some of them together
        means = (_band(runs, "samples", y)[1] for y in ("reward_all", "score_all"))
        window = np.ones(min(SMOOTH, len(runs[0]["samples"])))
        reward, score = (np.convolve(mean, window / window.sum(), "valid") for mean in means)
        (line,) = axis.plot(reward, score, label=name)
        axis.plot(reward[-1], score[-1], "o", color=line.get_color())
    axis.set(xlabel=labels["reward_all"], ylabel="actual score of all samples")
    axis.set(title=f"running means of {SMOOTH} steps; a dot at the end")
    axis.legend()
    figure.savefig(folder / "optimization.png", dpi=120)

    figure, axis = plot.subplots(figsize=(6, 5), layout="constrained")
    for row in (row for row in rows if row["r2"] is not None):
        mean, low, high = row["selected_greedy"]
        bars = {"yerr": [[mean - low], [high - mean]], "capsize": 3}
        axis.errorbar(row["r2"], mean, marker="o", ls="", label=row["filter"], **bars)
    axis.set(xlabel="R^2 before training", ylabel="greedy pass@1 on test problems")
    axis.set(title=f"Spearman correlation {correlation:.2f}")
    axis.legend()
    figure.savefig(folder / "r2.png", dpi=120)
    plot.close("all")
    return "curves.png, optimization.png, r2.png"


def draw_rewards(folder, tables, base):
    """Greedy pass@1 minus that of the filter `base`, paired by seed. tables: {reward: rows}.

    Returns one line about what was written.
    """
    plot = pyplot()
    if plot is None:
        return HINT
    figure, axis = plot.subplots(figsize=(7, 4.5), layout="constrained")
    names = [row["filter"] for row in next(iter(tables.values())) if row["filter"] != base]
    for number, name in enumerate(names):
        values = np.array(
            [
                row["selected_greedy_difference"]
                for rows in tables.values()
                for row in rows
                if row["filter"] == name
            ]
        )
        mean, low, high = values.T
        at = np.arange(len(tables)) + (number - (len(names) - 1) / 2) * 0.15
        axis.errorbar(at, mean, yerr=[mean - low, high - mean], fmt="o", capsize=3, label=name)
    axis.axhline(0, color="gray", lw=0.8)
    axis.set_xticks(range(len(tables)), list(tables))
    axis.set(ylabel=f"greedy pass@1 on test problems, minus {base}", xlabel="reward")
    axis.legend()
    figure.savefig(folder / "rewards.png", dpi=120)
    plot.close("all")
    return "rewards.png"
