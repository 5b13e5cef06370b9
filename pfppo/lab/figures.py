"""Curves of your own runs, and the figures of a study, with matplotlib where it is installed.

    python -m pfppo.lab.figures RUN                      # one run: RUN/curves.png
    python -m pfppo.lab.figures RUN RUN ... --out FILE   # several, a line each in every panel

RUN is a folder of train_ppo.py or train_rm.py, finished or not. What has no value (scores without
tests, a step in which nothing was kept) has no point; a panel without any is left out.

The figures of a study:

    curves.png         reward and greedy pass@1 against samples drawn and optimizer steps
    optimization.png   the reward model's reward against the actual score while training goes on
    forest.png         differences to PPO-M with their intervals
    statistics.png     R^2, AUC and alignment before training against pass@1 after it, by filter
    rewards.png        differences to PPO-M under several rewards

The numbers behind them are in `table.json` and `metrics.jsonl`.
"""

import importlib.util
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from pfppo.config import UserError, launch, reason, require
from pfppo.files import check_writable, whole_lines
from pfppo.lab.intervals import t_quantile
from pfppo.lab.tables import rank_correlation
from pfppo.run import plotting

import numpy as np

SMOOTH = 5  # steps
FOREST = {"outcome": "sampled pass@1, last", "area": "area under the curve"}
LABELS = {"samples": "samples drawn", "updates": "optimizer steps"}
LABELS |= {"reward_all": "reward of all samples", "validation": "greedy pass@1, validation"}

# Curves of any runs: {panel: {what is drawn: its label in the panel}}; metrics.py defines them.
PPO = {
    "reward (sd of the SFT policy's samples)": {"reward_all": "all", "reward_kept": "kept"},
    "score: share that is right": {
        "score_all": "all",
        "score_kept": "kept",
        "score_dropped": "dropped",
    },
    "validation: greedy pass@1": {"validation": ""},
    "KL to the reference (nats per response)": {"kl_k1": "policy", "kl_kept": "kept samples"},
    "response length (tokens)": {"response_length": ""},
    "share of responses cut off": {"truncated": ""},
    "clip fraction (share of tokens)": {"clip_fraction": ""},
    "R² of score on reward, last 5 steps": {"r2_all": "all", "r2_kept": "kept"},
    "alignment of what is taught": {"alpha_all": "all", "alpha_kept": "kept"},
}
RM = {
    "loss (nats per pair)": {"loss": "training", "held_out_loss": "held out"},
    "pair accuracy": {"accuracy": "training", "held_out_accuracy": "held out"},
    "gradient norm, before clipping": {"grad_norm": ""},
    "learning rate": {"lr": ""},
}
# How panels begin whose values are 0 to 1, and those whose steps differ by luck.
SHARES = ("score", "valid", "share", "clip", "pair")
STYLES = ("-", "--", ":")  # of what is drawn in a panel; a color is a run
SMOOTHED = ("reward", "score", "KL", "response", "share", "clip", "alignment", "loss", "pair")
SMOOTHED += ("gradient",)


@plotting
def draw_study(plot, folder, results, rows, base):
    """The figures of a study. results: {filter: [`read_cell` of each cell]}; rows: the table's;
    base: the filter that others are compared with."""
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

    others = [row for row in rows if row["filter"] != base and "outcome_difference" in row]
    if others:
        figure, axis = plot.subplots(figsize=(7, 1.5 + 0.35 * len(others)), layout="constrained")
        for key, shift in (("outcome", 0.12), ("area", -0.12)):
            values = [row[f"{key}_difference"] for row in others]
            _points(axis, np.arange(len(others))[::-1] + shift, values, FOREST[key], across=True)
        axis.set_yticks(range(len(others))[::-1], [row["filter"] for row in others])
        axis.axvline(0, color="gray", lw=0.8)
        axis.set(xlabel=f"difference to {base}, paired")
        axis.legend(fontsize="small")
        figure.savefig(folder / "forest.png", dpi=120)

    names = {"r2": "R^2", "auc": "AUC", "alpha": "alignment"}
    figure, axes = plot.subplots(1, 3, figsize=(13, 4.5), layout="constrained", sharey=True)
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        for row in [row for row in rows if row[name][0] is not None]:
            _points(axis, [row[name][0]], [row["outcome"]], row["filter"])
        correlation = rank_correlation(rows, name)
        axis.set(xlabel=f"{label} before training", title=f"Spearman {correlation:.2f}")
    axes[0].set(ylabel="sampled pass@1 of the last policy")
    if axes[0].containers:  # none where every statistic is undefined
        axes[0].legend(fontsize="small")
    figure.savefig(folder / "statistics.png", dpi=120)
    return "curves.png, optimization.png, statistics.png" + ", forest.png" * bool(others)


@plotting
def draw_rewards(plot, folder, tables, base):
    """The outcome minus that of the filter `base`, paired. tables: {reward: rows}."""
    figure, axis = plot.subplots(figsize=(7, 4.5), layout="constrained")
    differences = {}  # {filter: [(mean, low, high) under each reward]}
    for row in sum(tables.values(), []):
        if row["filter"] != base:
            differences.setdefault(row["filter"], []).append(row["outcome_difference"])
    for number, (name, values) in enumerate(differences.items()):
        shift = (number - (len(differences) - 1) / 2) * 0.15
        _points(axis, np.arange(len(tables)) + shift, values, name)
    axis.axhline(0, color="gray", lw=0.8)
    axis.set_xticks(range(len(tables)), list(tables))
    axis.set(ylabel=f"sampled pass@1 of the last policy, minus {base}", xlabel="reward")
    axis.legend()
    figure.savefig(folder / "rewards.png", dpi=120)
    return "rewards.png"


def _band(curves, x, y):
    """(x, mean, low, high) of a list of curves over seeds: mean and 95 % of the mean, by t."""
    values = np.array([curve[y] for curve in curves], dtype=float)  # None is NaN
    seen = ~np.isnan(values).any(0)
    mean = values[:, seen].mean(0)
    count, spread = len(values), values[:, seen].std(0, ddof=1) if len(values) > 1 else 0
    half = t_quantile(0.95, count - 1) * spread / count**0.5 if count > 1 else 0
    at = np.array([curve[x] for curve in curves]).mean(0)[seen]
    return at, mean, mean - half, mean + half


def _points(axis, at, values, label, across=False):
    """Means with their intervals. values: [(mean, low, high)]; without an interval None. across:
    they lie."""
    mean, low, high = np.array(values, dtype=float).T
    x, y, bars = (mean, at, "xerr") if across else (at, mean, "yerr")
    bars = {bars: [mean - low, high - mean]}
    axis.errorbar(x, y, **bars, fmt="o", capsize=3, label=label)


# ---- curves of any runs --------------------------------------------------------------------------


@dataclass
class Args:
    out: str = ""  # PNG, PDF or SVG file; empty: curves.png in the folder, of a single RUN


def read_run(folder):
    """(panels: PPO or RM, {metric: (steps, values)}) of a run's folder. Raises UserError."""
    folder = Path(folder)
    require(folder.is_dir(), f"{folder}: there is no such folder, expected that of a run")
    path = folder / "metrics.jsonl"
    require(path.is_file(), f"{folder}: not the folder of a run, it has no metrics.jsonl")
    rows = whole_lines(path)
    require(rows, f"{path}: no step is in it yet")
    for line, row in enumerate(rows, 1):
        known = isinstance(row.get("step"), int)
        require(known, f"{path}, line {line}: damaged, expected an object with a step")
    known = {name for row in rows for name, value in row.items() if is_number(value)}
    kinds = [panels for panels in (PPO, RM) if known.intersection(names_of(panels))]
    require(kinds, f"{path}: no metrics of train_ppo.py or train_rm.py in it")
    rows = {row["step"]: row for row in rows}  # the last line of a step counts
    curves = {}
    for name in names_of(kinds[0]):
        seen = [(step, row.get(name)) for step, row in sorted(rows.items())]
        seen = [(step, value) for step, value in seen if is_number(value)]
        if seen:
            curves[name] = tuple(np.array(column) for column in zip(*seen, strict=True))
    return kinds[0], curves


def names_of(panels):
    return [name for names in panels.values() for name in names]


def is_number(value):
    """Not null, not NaN, and no text."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def running_mean(values, window):
    """Means of up to `window` values that end at each; as many as there are values."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


@plotting
def draw_runs(plot, path, panels, runs):
    """One panel per row of `panels` that has values, a color per run. runs: {label: curves}. Raises
    UserError where the file cannot be written."""
    shown = {t: n for t, n in panels.items() if any(c.keys() & n.keys() for c in runs.values())}
    columns = min(len(shown), 4 if len(shown) > 4 else 2)
    rows = math.ceil(len(shown) / columns)
    size = (4.2 * columns, 3.2 * rows + 0.5)
    figure, axes = plot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    longest = max(len(steps) for curves in runs.values() for steps, _ in curves.values())
    window = max(SMOOTH, longest // 30) if longest >= 4 * SMOOTH else 1
    colors = plot.get_cmap("tab10" if len(runs) <= 10 else "turbo", max(len(runs), 10)).colors
    for axis, (title, names) in zip(axes.flat, shown.items(), strict=False):
        for color, curves in zip(colors, runs.values(), strict=False):
            for style, name in zip(STYLES, names, strict=False):
                if name in curves:
                    smooth = window if title.startswith(SMOOTHED) else 1
                    _curve(axis, *curves[name], color, style, smooth)
        if len(names) > 1:  # which style is what, once for all runs
            for style, label in zip(STYLES, names.values(), strict=False):
                axis.plot([], [], style, color="black", label=label)
            axis.legend(fontsize="small", framealpha=0.6)
        if title.startswith(SHARES):
            low, high = axis.get_ylim()
            axis.set_ylim(max(low, -0.02), min(high, 1.02))
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("PPO step" if panels is PPO else "optimizer step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.ticklabel_format(axis="y", scilimits=(-3, 5))
        axis.grid(alpha=0.25)
    if window > 1:
        note = f"running means of {window} steps over single steps (faint)"
        figure.supxlabel(note, fontsize="small")
    lines = [plot.Line2D([], [], color=c) for c, _ in zip(colors, runs, strict=False)]
    figure.legend(lines, list(runs), loc="outside upper left", ncols=min(len(runs), 4))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # or a format that matplotlib does not know
        raise UserError(f"--out {path}: {reason(error)}") from error
    missing = [title for title in panels if title not in shown]
    return f"{path}" + (f"; no values of: {', '.join(missing)}" if missing else "")


def _curve(axis, steps, values, color, style, window):
    """Values at single steps, with points where few steps have one; with a window, running means
    where there are more values than it holds, and the first kind of a panel faint below them."""
    sparse = len(values) < 0.75 * (steps[-1] - steps[0] + 1) or len(values) == 1
    if sparse or len(values) <= window or window == 1:
        axis.plot(steps, values, style, color=color, marker="o" if sparse else "", ms=4)
        return
    if style == STYLES[0]:
        axis.plot(steps, values, style, color=color, alpha=0.25, lw=0.8)
    axis.plot(steps, running_mean(values, window), style, color=color)


def main(args, folders):
    """Draw the curves of all runs into one file. Raises UserError."""
    require(folders, "no RUN, expected folders of runs: python -m pfppo.lab.figures RUN ...")
    several = f"{len(folders)} runs: expected --out FILE, where their figure goes"
    require(args.out or len(folders) == 1, several)
    found = [read_run(folder) for folder in folders]
    panels = found[0][0]
    for folder, (kind, _) in zip(folders, found, strict=True):
        what = f"{folders[0]}, {folder}: a run of PPO and a reward model's training"
        require(kind is panels, f"{what}, draw them apart")
    names = [Path(folder).resolve().name for folder in folders]
    labels = [n if names.count(n) == 1 else str(f) for n, f in zip(names, folders, strict=True)]
    path = Path(args.out or folders[0])
    path = path / "curves.png" if path.is_dir() else path
    path = path if path.suffix else path.with_suffix(".png")
    check_writable(path.parent, "out")
    installed = importlib.util.find_spec("matplotlib")
    require(installed, "figures need matplotlib: pip install matplotlib")
    runs = {label: curves for label, (_, curves) in zip(labels, found, strict=True)}
    print(draw_runs(path, panels, runs))


def split_words(words):
    """(folders, options) of a command line: every option but --help has a value."""
    folders, options, words = [], [], list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            folders.append(word)
            continue
        options.append(word)
        if "=" not in word and word not in ("-h", "--help") and words:
            options.append(words.pop(0))
    return folders, options


if __name__ == "__main__":
    folders, sys.argv[1:] = split_words(sys.argv[1:])
    launch(lambda args: main(args, folders), Args)
