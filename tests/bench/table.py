"""Rows for "Speed" in this folder's README, out of the JSON that benchmarks print.

    python tests/bench/sampler.py --only s1 > s1.txt
    python tests/bench/table.py "sampler.py --only s1" s1.txt

Takes commands and files with what they printed, in turn; their last lines go to `speed.json`, under
their commands. Prints a row of Markdown for each command that stands there.
"""

import json
import sys
from pathlib import Path

KNOWN = Path(__file__).with_name("speed.json")


def times(values):
    return ", ".join(f"{value:.2f}x" for value in values)


def told(found):
    """(what, figure) of one benchmark's result."""
    if "TRL" in found:
        names = [name for name in found if name != "TRL"]
        what = f"seconds of a whole PPO step to those of TRL's: {', '.join(names)}"
        return what, times(found[name]["ratio"] for name in names)
    if "none" in found:
        names = [name for name in found if name != "none"]
        what = f"seconds of the update phase to those of `none`: {', '.join(names)}"
        return what, times(found[name]["update"][1] for name in names)
    if any(name.endswith(" before") for name in found):
        what = "seconds of sampling, scoring, update, the step to those of the version before"
        (now,) = (value for name, value in found.items() if not name.endswith(" before"))
        return what, times(now[phase][1] for phase in ("sample", "score", "update", "step"))
    kinds = [name for name in found if "ratio" in found[name]]
    what = f"the sampler, {', '.join(kinds)}: its tokens/s to `generate`'s; the share of its time "
    what += "that the matrix products of its passes take alone; useful row-steps"
    shares = (", ".join(f"{found[k][n]:.0%}" for k in kinds) for n in ("limit", "useful"))
    return what, "; ".join([times(found[kind]["ratio"] for kind in kinds), *shares])


def main():
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    for command, file in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        known[command] = json.loads(Path(file).read_text().splitlines()[-1])
    KNOWN.write_text(json.dumps(known, indent=1) + "\n")
    print("| what | figure | `python tests/bench/...` |\n|---|---|---|")
    for command, found in known.items():
        print("| {} | {} | `{}` |".format(*told(found), command))


if __name__ == "__main__":
    main()
