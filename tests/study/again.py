"""The study's tables again, from the runs that a table.json holds, with t-intervals over seeds.

    python tests/study/again.py tests/study/table.json tests/study/updates.json

For tables whose runs were made before intervals were Student's: the runs are the same, and what is
said of them is not. Prints one table per file; differences are paired by seed.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pfppo.lab.intervals import t_interval  # noqa: E402
from pfppo.lab.tables import shown  # noqa: E402

BASE, KEYS = "none", ("selected_greedy", "selected_sampled", "last_greedy", "last_sampled")


def main():
    for path in sys.argv[1:]:
        rows = {row["filter"]: row for row in json.loads(Path(path).read_text())["filters"]}
        print(f"\n{path}\n| filter | " + " | ".join(f"{key} | minus {BASE}" for key in KEYS) + " |")
        for name, row in rows.items():
            cells = []
            for key in KEYS:
                mine, base = (x[f"{key}_by_seed"] for x in (row, rows[BASE]))
                differ = [one - other for one, other in zip(mine, base, strict=True)]
                differ = None if name == BASE else t_interval(differ)
                cells += [shown(t_interval(mine)), shown(differ, "+")]
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
