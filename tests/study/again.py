"""A study's tables again, from the runs that a table.json holds, with t-intervals.

    python tests/study/again.py tests/study/look-2/table.json --confidence 0.97569
    python tests/study/again.py tests/study/table.json tests/study/updates.json

Of every outcome, also those that `table.md` leaves out, and of tables whose runs were made before
intervals were Student's: the runs are the same. Differences are paired, by reward model or by seed.
Below, what foretells the order of filters: Spearman's correlation of a statistic with an outcome
and the regret of choosing by it, of the means, and, where each unit has statistics of its own,
within a unit, with an interval over units.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pfppo.lab.intervals import t_interval  # noqa: E402
from pfppo.lab.tables import (  # noqa: E402
    KEYS,
    STATISTICS,
    as_table,
    rank_correlation,
    regret,
    shown,
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--base", default="none")
    parser.add_argument("--confidence", type=float, default=0.95)
    args = parser.parse_args()
    for path in args.tables:
        rows = {row["filter"]: row for row in json.loads(Path(path).read_text())["filters"]}
        unit = "by_unit" if "outcome_by_unit" in rows[args.base] else "by_seed"
        keys = [key for key in (*KEYS, *STATISTICS) if f"{key}_{unit}" in rows[args.base]]
        lines = []
        for name, row in rows.items():
            cells = []
            for key in keys:
                mine, base = (x[f"{key}_{unit}"] for x in (row, rows[args.base]))
                pairs = zip(mine, base, strict=True)
                differ = [None if None in pair else pair[0] - pair[1] for pair in pairs]
                differ = None if name == args.base else t_interval(differ, args.confidence)
                cells += [shown(t_interval(mine, args.confidence)), shown(differ, "+")]
            lines.append([name, *cells])
        head = sum(([key, f"minus {args.base}"] for key in keys), ["filter"])
        print(f"\n{path}\n{as_table(head, lines)}\n")
        outcomes = ["outcome"] if "outcome" in keys else ["last_sampled", "selected_greedy"]
        print(foretold([*rows.values()], outcomes, args.confidence))


def foretold(rows, outcomes, confidence):
    """What statistics before training say of these outcomes, as Markdown. rows: of a table.json."""
    lines = []
    for name, key in ((name, key) for key in outcomes for name in STATISTICS if name in rows[0]):
        whole = [{name: _listed(row[name]), "outcome": _listed(row[key])} for row in rows]
        line = [name, key]
        for measure in (rank_correlation, regret):
            values, base = (_by_unit(rows, one, key, measure) for one in (name, "r2"))
            more = [x - y for x, y in zip(values, base, strict=True)] if values else None
            more = None if name == "r2" or not more else t_interval(more, confidence)
            within = t_interval(values, confidence) if values else None
            line += [f"{measure(whole, name):.3f}", shown(within), shown(more, "+")]
        lines.append(line)
    head = ["statistic", "outcome"]
    for what in ("Spearman", "regret"):
        head += [f"{what}, of means", "within a unit", "minus that of r2"]
    return as_table(head, lines)


def _listed(value):
    """A mean, or [mean, low, high], as a list."""
    return value if isinstance(value, list) else [value]


def _by_unit(rows, name, key, measure):
    """A measure of each unit by itself; of less than two units none."""
    units = len(rows[0].get(f"{name}_by_unit", ()))
    each = (
        [{name: [row[f"{name}_by_unit"][i]], "outcome": [row[f"{key}_by_unit"][i]]} for row in rows]
        for i in range(units)
    )
    return [float(measure(unit, name)) for unit in each] if units > 1 else []


if __name__ == "__main__":
    main()
