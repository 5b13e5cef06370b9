"""Single-edit mutants of reference solutions: does the sandbox say what a fresh process says?

    python tests/mutants.py --data DIR --count 800

DIR holds HumanEval.jsonl.gz and mbpp.jsonl.gz. A mutant is a reference solution with one edit:
another comparison or operator, a constant off by one, a negated condition, a statement left out.
Prints one line per disagreement and a summary; exit status 1 if there is any.
"""

import argparse
import ast
import copy
import random
import resource
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pfppo.problems.benchmarks import load_problems
from pfppo.problems.programs import reference_check  # noqa: E402
from pfppo.sandbox import Sandbox  # noqa: E402

COMPARISONS = [ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq]
OPERATORS = [ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod]
UNSEEDED = {f"HumanEval/{i}" for i in (32, 38, 50, 53)}  # their tests draw other inputs each time


def edits(tree):
    """Functions that change one node of the tree in place, in a fixed order."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            found += [
                lambda n=node, k=kind: n.ops.__setitem__(0, k())
                for kind in COMPARISONS
                if not isinstance(node.ops[0], kind)
            ]
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            found += [
                lambda n=node, k=kind: setattr(n, "op", k())
                for kind in OPERATORS
                if not isinstance(node.op, kind)
            ]
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            found += [lambda n=node, d=step: setattr(n, "value", n.value + d) for step in (-1, 1)]
        elif isinstance(node, (ast.If, ast.While)):
            found.append(lambda n=node: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test)))
        body = getattr(node, "body", None)
        if isinstance(body, list) and len(body) > 1:
            found += [lambda b=body, i=i: b.pop(i) for i in range(len(body))]
    return found


def mutants(check, count, rng):
    """Up to `count` programs, each one edit away from the check's own."""
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(check.program)
    total = len(edits(tree))
    made = []
    for number in rng.sample(range(total), min(count, total)):
        other = copy.deepcopy(tree)
        edits(other)[number]()
        made.append(replace(check, program=ast.unparse(ast.fix_missing_locations(other)) + "\n"))
    return made


def fresh_process(check, seconds):
    """Whether program and test together end with status 0 in a process of their own."""
    call = f"\ncheck({check.entry_point})\n" if "def check(" in check.test else "\n"

    def limits():
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(f"{check.program}\n{check.test}{call}")
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(file)],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=limits,
                timeout=10 * seconds,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def draw(data, count, seed=0):
    """[(task id, Check)]: `count` mutants, equally many of each benchmark."""
    rng = random.Random(seed)
    drawn = []
    for name, form in (("HumanEval.jsonl.gz", "humaneval"), ("mbpp.jsonl.gz", "mbpp")):
        problems = [p for p in load_problems(Path(data) / name, form) if p.task_id not in UNSEEDED]
        some, enough = [], len(drawn) + count // 2
        for problem in rng.sample(problems, len(problems)):
            some += [(problem.task_id, c) for c in mutants(reference_check(problem), 3, rng)]
        drawn += some[: enough - len(drawn)]
    return drawn


def compare(drawn, seconds=3.0, workers=2):
    """[(task id, Check, Verdict, what the fresh process says)]"""
    with Sandbox(workers=workers, timeout=seconds) as sandbox:
        verdicts = sandbox.run([check for _, check in drawn])
    with ThreadPoolExecutor(workers) as pool:
        fresh = list(pool.map(lambda item: fresh_process(item[1], seconds), drawn))
    return [(*item, *found) for item, *found in zip(drawn, verdicts, fresh, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of the benchmark files")
    parser.add_argument("--count", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = compare(draw(args.data, args.count, args.seed))
    differ = [row for row in found if row[2].passed != row[3]]
    for task, check, verdict, fresh in differ:
        print(f"{task}: sandbox {verdict.outcome} ({verdict.detail}), fresh process passed={fresh}")
        print(check.program)
    passed = sum(verdict.passed for _, _, verdict, _ in found)
    print(f"{len(found)} mutants, {passed} pass; {len(differ)} verdicts differ")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
