"""From what a model said to what is executed: checks, the rows of a samples file, and pass@k."""

import ast
import functools
import warnings
from collections import Counter
from dataclasses import replace

from pfppo.config import require
from pfppo.files import read_jsonl
from pfppo.problems.extract import definition_of, extract_code, program_of
from pfppo.sandbox import Check

import numpy as np


def assemble(problem, response):
    """The Check of a model's response: its code, the problem's tests, the reference."""
    return check_of(problem, extract_code(response, problem))


def check_of(problem, program):
    """The Check of a whole program, unchanged: `prompt + completion`, or a sample's `solution`
    (with `problem.setup` before it, where the benchmark has one)."""
    return Check(program, problem.test, problem.entry_point, _reference(problem))


def reference_check(problem):
    """The problem's own solution as the candidate. UserError where the benchmark has none."""
    code = problem.canonical_solution
    require(code.strip(), f"{problem.task_id} has no reference solution")
    return check_of(problem, program_of(problem, code, bool(definition_of(problem).search(code))))


@functools.lru_cache(maxsize=4096)
def _reference(problem):
    """Trusted source of the names that the tests use; "" if the file's own is not Python."""
    code = problem.canonical_solution
    if not code.strip():  # the names of the prompt and of the setup still serve the tests
        code = "pass\n" if problem.prompt.endswith(" ") else "    pass\n"
    program = program_of(problem, code, bool(definition_of(problem).search(code)))
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    return program


def read_samples(path, problems):
    """Rows of a samples file as rows of ours, in its order. Raises UserError."""
    known = {problem.task_id: problem for problem in problems}
    counts, samples = Counter(), []
    for line, row in read_jsonl(path):
        task = row.get("task_id")
        task = f"Mbpp/{task}" if isinstance(task, int) else task  # as Google's file has them
        expected = f"expected one of the problems', such as {next(iter(known))!r}"
        there = isinstance(task, str) and task in known
        require(there, f"{path}, line {line}: task_id {task!r} is in no problem: {expected}")
        whole = row.get("solution") is not None
        code = row["solution"] if whole else row.get("completion")
        require(
            isinstance(code, str),
            f"{path}, line {line}: expected a string in 'completion' or 'solution', "
            f"found {sorted(row)}",
        )
        code = code if whole else known[task].prompt + code
        program = program_of(replace(known[task], prompt=""), code, whole=True)  # adds the setup
        row = {"task_id": task, "sample": counts[task], "solution": program}
        counts[task] += 1
        samples.append(row)
    return samples


def sample_row(problem, number, response):
    """One line of samples.jsonl. prompt + completion is the program, whatever the response is."""
    program = assemble(problem, response).program
    head = problem.setup + problem.prompt
    longer = program.startswith(head)
    # A program that defines all again stands after the prompt, whose function is then a docstring.
    completion = program[len(head) :] if longer else "\n" + program.removeprefix(problem.setup)
    return {
        "task_id": problem.task_id,
        "sample": number,
        "completion": completion,
        "solution": program,
        "response": response,
    }


def pass_at_k(n, c, k):
    """Unbiased chance that one of k samples passes, from c passes among n: 1 - C(n-c, k) / C(n, k).

    arXiv 2107.03374, eq. 1, as a stable product. UserError unless 1 <= k <= n and 0 <= c <= n.
    """
    require(1 <= k <= n, f"pass@{k} needs at least {max(k, 1)} samples of each problem, found {n}")
    require(0 <= c <= n, f"{c} of {n} samples passed: expected 0 to {n}")
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def pass_at_k_interval(counts, k, resamples=1000, seed=0):
    """(mean, low, high) of pass@k over problems [(n, c), ...]: 95 % bootstrap over problems.

    The interval speaks of the choice of problems, not of sampling; equal problems give width 0.
    """
    values = np.array([pass_at_k(n, c, k) for n, c in counts])
    require(len(values), "pass@k of no problems")
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def summary(results, ks):
    """The rows of results.jsonl as text: pass@k with its interval for each k, and outcomes."""
    n, c = Counter(), Counter()
    for row in results:
        n[row["task_id"]] += 1
        c[row["task_id"]] += row["passed"]
    lines = [f"{len(results)} samples of {len(n)} problems"]
    for k in ks:
        counts = [(n[task], c[task]) for task in n if n[task] >= k]
        if counts:
            value, low, high = pass_at_k_interval(counts, k)
            lines.append(f"pass@{k:<4} {value:.3f} [{low:.3f}, {high:.3f}]  {len(counts)} problems")
        else:
            lines.append(f"pass@{k:<4} no problem has {k} samples")
    lines.append("\noutcome        samples   share")
    for name, count in Counter(row["outcome"] for row in results).most_common():
        lines.append(f"{name:<14} {count:>7} {count / len(results):>7.1%}")
    return "\n".join(lines)
