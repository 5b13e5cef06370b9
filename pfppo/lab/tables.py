"""The tables of a study: what came of every filter, with intervals, beside what was known before.

A unit is what is independent: a reward model with `--rm_seeds`, whose seeds are averaged, else a
seed. Numbers with an interval are [mean, low, high], None where they are not known.
"""

from pfppo.filters import reads_scores
from pfppo.lab.intervals import t_interval
from pfppo.reliability import spearman

import numpy as np

ALL = "none"  # PPO-M, all samples kept: `single` has its statistics
KEYS = ["outcome", "area"]  # of a cell; the first is what the study is about
KEYS += [f"{when}_{kind}" for when in ("selected", "last") for kind in ("greedy", "sampled")]
KEYS += ["minutes"]
STATISTICS = ("r2", "auc", "alpha", "at_updates", "at_samples")  # of the reliability table


def summarize(args, results, reliability):
    """One dict per filter, plain numbers for JSON. results: {filter: [`read_cell` of each cell]};
    reliability: [{filter: row of the reliability table}] of each reward model."""
    rows, base = [], results.get(args.base)
    for name, mine in results.items():
        row = {"filter": name, "oracle": reads_scores(name), "cells": len(mine)}
        for key in KEYS:
            row[f"{key}_by_unit"] = values = _by_unit(mine, key, args.rm_seeds)
            row[key] = t_interval(values, args.confidence)
            if base and name != args.base:
                others = _by_unit(base, key, args.rm_seeds)
                row[f"{key}_differences"] = less = np.subtract(values, others).tolist()
                row[f"{key}_difference"] = t_interval(less, args.confidence)
        row["samples"] = mine[0]["samples"][-1]
        row["updates"] = round(np.mean([result["updates"][-1] for result in mine]))
        known = [measured[ALL if name == "single" else name] for measured in reliability]
        for key in STATISTICS:
            one = [known[0].get(key + end) for end in ("", "_low", "_high")]
            row[f"{key}_by_unit"] = values = [found[key] for found in known]
            several = t_interval(values, args.confidence)
            row[key] = several if len(known) > 1 else one
        rows.append(row)
    return rows


def _by_unit(cells, key, models):
    """One value per unit."""
    values = [cell[key] for cell in cells]
    return values if not models else np.reshape(values, (models, -1)).mean(1).tolist()


def rank_correlation(rows, name):
    """Spearman of a statistic before training and the outcome; NaN of less than 3 filters."""
    both = _with_outcome(rows, name)
    return spearman(*np.array(both).T) if len(both) > 2 else float("nan")


def regret(rows, name):
    """What the filter with the highest statistic lacks to the best one's outcome, of several that
    have it their mean; NaN of none."""
    known = _with_outcome(rows, name)
    chosen = [outcome for value, outcome in known if value == max(known)[0]]
    return max(outcome for _, outcome in known) - np.mean(chosen) if known else float("nan")


def _with_outcome(rows, name):
    """(statistic, outcome) of each row that has both; the first to three decimals, as it is shown:
    `random_two` has R^2 and AUC of `none` but for its draws, which would decide the order."""
    found = [(row[name][0], row["outcome"][0]) for row in rows]
    return [(round(value, 3), outcome) for value, outcome in found if value is not None]


def shown(value, sign=""):
    mean, low, high = value or (None, None, None)
    bounds = "" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return "-" if mean is None else f"{mean:{sign}.3f}{bounds}"


def as_table(head, lines):
    """Markdown of cells, [[text]]."""
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(args, rows, hours):
    """The table as Markdown, with what it needs to be read."""
    minus = f"minus {args.base}"
    head = ["filter", "samples", "updates", "minutes", "sampled, last", minus, "area", minus]
    head += ["greedy, selected", minus, "sampled, selected", "greedy, last", "R^2", "AUC", "alpha"]
    lines = []
    for row in rows:
        name = row["filter"] + " (oracle)" * row["oracle"]
        line = [name, f"{row['samples']:,}", f"{row['updates']:,}", f"{row['minutes'][0]:.1f}"]
        for key in ("outcome", "area", "selected_greedy"):
            line += [shown(row[key]), shown(row.get(f"{key}_difference"), "+")]
        line += [f"{row[key][0]:.3f}" for key in ("selected_sampled", "last_greedy")]
        lines.append(line + [shown(row[name]) for name in ("r2", "auc", "alpha")])
    units = len(rows[0]["outcome_by_unit"])
    what = "reward models" if args.rm_seeds else "seeds"
    mean = f"one of the {what}: no interval, and so no verdict."
    if units > 1:
        mean = f"""mean over {units} {what} with Student's interval of {args.confidence:g} over \
them; differences are paired, and an interval that holds 0 is no verdict."""
    differ = args.match == "updates" and len({row["updates"] for row in rows}) > 1
    but = " as far as filters keep a fixed number (see the column)" if differ else ""
    of_one = "" if args.rm_seeds > 1 else ", of one sampling, percentiles of 95 % over its prompts"
    found = (f"{n} {rank_correlation(rows, n):.2f}, {regret(rows, n):.3f}" for n in STATISTICS)
    return f"""{as_table(head, lines)}

Test pass@1, {mean} Sampled, last: {args.draws} answers to each problem. Area: share of all \
samples that is right, mean over the steps. Selected: the step that was best on validation. \
Compute: matched by {args.match}{but}. Reward: {args.reward}. Minutes: wall-clock of a cell's \
steps. R^2, AUC, alpha: before training{of_one}.

Spearman correlation with the outcome over filters, and regret of the filter that is highest: \
{"; ".join(found).replace("nan", "undefined")}. The steps of all cells took {hours:.1f} hours.
"""


def interactions(tables, args):
    """What each filter gains over the base more under the first reward than under each other one,
    paired by unit, as Markdown. tables: {reward: rows}."""
    gains = {
        reward: {row["filter"]: row.get("outcome_differences") for row in rows}
        for reward, rows in tables.items()
    }
    first, *others = tables
    lines = []
    for reward in others:
        for name in [name for name in gains[first] if name != args.base]:
            more = np.subtract(gains[first][name], gains[reward][name]).tolist()
            more = t_interval(more, args.confidence)
            lines.append([name, first, reward, shown(more, "+")])
    table = as_table(["filter", "gain under", "minus that under", "is"], lines)
    what = f"over {args.base}, matched by {args.match}; Student's interval of {args.confidence:g}"
    return f"{table}\n\nGains in sampled pass@1 of the last policy {what}, paired.\n"
