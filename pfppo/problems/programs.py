"""From what a model said to what is executed: checks, the rows of a samples file, and pass@k."""

import ast
import functools
import warnings
from collections import Counter
from dataclasses import replace

from pfppo.config import require
from pfppo.files import read_jsonl
from pfppo.problems.benchmarks import MBPP_SPLITS, in_split
from pfppo.problems.extract import definition_of, extract_code, program_of
from pfppo.problems.messages import short
from pfppo.sandbox import Check

import numpy as np


def assemble(problem, response):
    """The Check of a model's response: its code, the problem's tests, the reference."""
    return check_of(problem, extract_code(response, problem))


def check_of(problem, program):
    """The Check of a whole program, unchanged: `prompt + completion`, or a sample's `solution`
    (with `problem.setup` before it, where the benchmark has one)."""
    return Check(program, problem.test, problem.entry_point, _reference(problem))


@functools.lru_cache(maxsize=4096)
def _reference(problem):
    """Trusted source of the names that the tests use; "" if the file's own is not Python."""
    code = problem.canonical_solution
    if not code.strip():  # the names of the prompt and of the setup still serve the tests
        code = "pass\n" if problem.prompt.endswith(" ") else "    pass\n"
    program = program_of(problem, code, bool(definition_of(problem).search(code)))
    return program if _is_python(program) else ""


def _is_python(program):
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


SAID = ("response", "completion", "solution")  # fields of a samples file that hold an answer


def load_samples(path):
    """[(line, task_id, {field: text} of SAID)] of a samples file. Raises UserError."""
    rows = []
    for line, row in read_jsonl(path):
        said = {name: row[name] for name in SAID if isinstance(row.get(name), str)}
        expected = "expected a string in 'completion', 'solution' or 'response'"
        odd = [f"{name}: {short(row[name])}" for name in SAID if name in row]
        found = ", ".join(odd or sorted(row))
        require(said, f"{path}, line {line}: {expected}, found {found}")
        lacks = f"field 'task_id' is missing (has: {', '.join(row)})"
        require("task_id" in row, f"{path}, line {line}: {lacks}")
        rows.append((line, row["task_id"], said))
    return rows


def read_samples(path, problems, allow_partial=False, say=print):
    """Rows of a samples file as rows of ours, in its order. Raises UserError, also where a problem
    (of MBPP: of the split that the samples are from) has no sample, unless `allow_partial`: pass@k
    then speaks of the others, perhaps the easy ones, and a line says so."""
    known = {problem.task_id: problem for problem in problems}
    counts, samples, empty, fenced = Counter(), [], 0, 0
    for line, given, said in load_samples(path):
        names = (str(given), f"Mbpp/{given}")  # a number in Google's file
        task = next((name for name in names if name in known), None)
        expected = f"expected one of the problems', such as {next(iter(known))!r}"
        require(task, f"{path}, line {line}: task_id {given!r} is in no problem: {expected}")
        sample = {"task_id": task, "sample": counts[task], "response": next(iter(said.values()))}
        samples.append(sample | {"solution": _solution(known[task], said)})
        counts[task] += 1
        empty += not any(text.strip() for text in said.values())
        if "response" not in said and "```" in sample["response"]:
            fenced += not _is_python(samples[-1]["solution"])
    splits = [s for s in MBPP_SPLITS if all(in_split(known[task], s) for task in counts)]
    asked = [task for task in known if not splits or in_split(known[task], splits[0])]
    missing = [task for task in asked if task not in counts]
    few = f"{len(missing)} of {len(asked)} problems have no sample, such as {missing[:1]}"
    advice = "expected one at least of each; --allow_partial leaves them out of pass@k"
    require(allow_partial or not missing, f"{path}: {few}: {advice}")
    if missing:
        say(f"--allow_partial: {few}; pass@k leaves them out")
    if empty:
        say(f"{path}: {empty} of {len(samples)} samples are empty")
    if fenced:
        why = "hold ``` and are no Python: code is taken out of texts in 'response' alone"
        say(f"{path}: {fenced} of {len(samples)} samples {why}")
    return samples


def _solution(problem, said):
    """What is executed of a sample: a whole program, the setup included; of no code the text."""
    if not problem.is_code:
        return next(iter(said.values()))
    if said.keys() == {"response"}:  # as a chat model says it
        return assemble(problem, said["response"]).program
    code = said["solution"] if "solution" in said else problem.prompt + said["completion"]
    return program_of(replace(problem, prompt=""), code, whole=True)


def sample_row(problem, number, response):
    """One line of samples.jsonl. Of code, prompt + completion is the program, whatever the response
    is; elsewhere both are the response."""
    row = {"task_id": problem.task_id, "sample": number}
    if not problem.is_code:
        return row | dict.fromkeys(("completion", "solution", "response"), response)
    program = assemble(problem, response).program
    head = problem.setup + problem.prompt
    # A program that defines all again stands after the prompt, whose function is then a docstring.
    again = "\n" + program.removeprefix(problem.setup)
    completion = program[len(head) :] if program.startswith(head) else again
    return row | {"completion": completion, "solution": program, "response": response}


def pass_at_k(n, c, k):
    """Unbiased chance that one of k samples passes, from c passes among n: 1 - C(n-c, k) / C(n, k)
    (arXiv 2107.03374, eq. 1) as a stable product. UserError unless 1 <= k <= n and 0 <= c <= n."""
    require(1 <= k <= n, f"pass@{k} needs at least {max(k, 1)} samples of each problem, found {n}")
    require(0 <= c <= n, f"{c} of {n} samples passed: expected 0 to {n}")
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def pass_at_k_interval(counts, k, resamples=1000, seed=0):
    """(mean, low, high) of pass@k over problems [(n, c), ...]: 95 % bootstrap over problems. The
    interval speaks of the choice of problems, not of sampling; equal problems give width 0."""
    values = np.array([pass_at_k(n, c, k) for n, c in counts])
    require(len(values), "pass@k of no problems")
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return tuple(map(float, (values.mean(), *np.quantile(means, [0.025, 0.975]))))


def summary(results, ks, rate="pass"):
    """The rows of results.jsonl as text: pass@k with its interval for each k, and outcomes. rate:
    another word for pass."""
    n = Counter(row["task_id"] for row in results)
    c = Counter(row["task_id"] for row in results if row["passed"])
    lines = [f"{len(results)} samples of {len(n)} problems"]
    for k in ks:
        value, counts = f"no problem has {k} samples", [(n[t], c[t]) for t in n if n[t] >= k]
        if counts:
            mean, low, high = pass_at_k_interval(counts, k)
            value = f"{mean:.3f} [{low:.3f}, {high:.3f}]  {len(counts)} problems"
        lines.append(f"{rate}@{k:<4} {value}")
    lines.append("\noutcome        samples   share")
    for name, count in Counter(row["outcome"] for row in results).most_common():
        lines.append(f"{name:<14} {count:>7} {count / len(results):>7.1%}")
    return "\n".join(lines)
