"""A study's tables again, from the runs that a table.json holds, with t-intervals.

    python tests/study/again.py tests/study/look-2/table.json --confidence 0.97569
    python tests/study/again.py tests/study/table.json tests/study/updates.json

Of every outcome, also those that `table.md` leaves out, and of tables whose runs were made before
intervals were Student's: the runs are the same. Differences are paired, by reward model or by seed.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pfppo.lab.intervals import t_interval  # noqa: E402
from pfppo.lab.tables import KEYS, as_table, shown  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--base", default="none")
    parser.add_argument("--confidence", type=float, default=0.95)
    args = parser.parse_args()
    for path in args.tables:
        rows = {row["filter"]: row for row in json.loads(Path(path).read_text())["filters"]}
        unit = "by_unit" if "outcome_by_unit" in rows[args.base] else "by_seed"
        keys = [key for key in KEYS if f"{key}_{unit}" in rows[args.base]]
        lines = []
        for name, row in rows.items():
            cells = []
            for key in keys:
                mine, base = (x[f"{key}_{unit}"] for x in (row, rows[args.base]))
                differ = [one - other for one, other in zip(mine, base, strict=True)]
                differ = None if name == args.base else t_interval(differ, args.confidence)
                cells += [shown(t_interval(mine, args.confidence)), shown(differ, "+")]
            lines.append([name, *cells])
        head = sum(([key, f"minus {args.base}"] for key in keys), ["filter"])
        print(f"\n{path}\n{as_table(head, lines)}")


if __name__ == "__main__":
    main()
