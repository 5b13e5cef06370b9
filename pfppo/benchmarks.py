"""Problems in HumanEval form: reading benchmark files, programs to execute, pass@k.

Every benchmark becomes `Problem`s: `setup + prompt + canonical_solution` is a Python program, and
`test` is run against a candidate program.

    problems = load_problems("HumanEval.jsonl.gz")  # form: humaneval, mbpp, leetcode
    sandbox.run([assemble(problem, response)])  # what a model said
    sandbox.run([check_of(problem, program)])  # a whole program from a samples file, as it stands

EvalPlus's own HumanEvalPlus.jsonl has inputs instead of asserts: the test then compares with the
reference solution on all of them (its rule for floats, its special case `find_zero`).

Not covered: the extra inputs in EvalPlus's own MbppPlus.jsonl, which need a conversion for each
task (its base asserts are used; the Hugging Face file of MBPP+ has all inputs in `test`).
"""

import ast
import functools
import gzip
import json
import re
import warnings
import zlib
from dataclasses import dataclass, field

from pfppo.config import UserError, require
from pfppo.extract import definition_of, extract_code, lines_of, program_of
from pfppo.sandbox import Check

import numpy as np

# What LeetCode gives every submission; builtins come last because math has a `pow` of its own.
PREAMBLE = """\
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string
from bisect import *; from collections import *; from functools import *; from heapq import *
from itertools import *; from math import *; from typing import *; from builtins import *
"""
KINDS = {bool: "true/false", int: "a number", float: "a number", str: "a string", list: "a list"}
KINDS |= {dict: "an object", type(None): "null"}
MBPP_TEST = range(11, 511)  # task ids of the MBPP paper's test split
MBPP_SHOTS = ("Mbpp/2", "Mbpp/3", "Mbpp/4")  # its three examples
# The wording of DeepSeek-Coder's evaluation of instruction-tuned models.
INSTRUCTION = """\
Please continue to complete the function. You are not allowed to modify the given code and do the \
completion only. Please return all completed function in a codeblock. Here is the given code to do \
completion:
```python
{prompt}
```"""


@dataclass(frozen=True)
class Problem:
    task_id: str
    prompt: str  # code that a completion continues
    entry_point: str  # function name, or "Solution().method"
    canonical_solution: str  # continues the prompt, or defines the entry point itself; may be ""
    test: str  # defines check(candidate), or bare asserts
    setup: str = ""  # trusted code that stands before every program: imports, ListNode
    instruction: str = ""  # what an instruction-tuned model is asked, where the file says it
    messages: list = field(default_factory=list, hash=False)  # a dialogue, in place of the prompt

    @property
    def question(self):
        """The prompt, or the last turn of the dialogue: what people and rewards are told."""
        return self.messages[-1]["content"] if self.messages else self.prompt


def read_jsonl(path):
    """[(line number, object)] of a JSONL file, gzipped or not; blank lines are skipped.

    One JSON array of objects is read too (Google's sanitized-mbpp.json); its numbers count entries.
    UserError: unreadable, not UTF-8, not JSON, not an object, no rows.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None
    rows, number = [], 1
    try:
        if re.match(r"\s*\[\s*\{", text):
            rows = list(enumerate(json.loads(text), 1))
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((number, json.loads(line)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    for number, row in rows:
        found = f"expected an object {{...}}, found {KINDS[type(row)]}"
        require(isinstance(row, dict), f"{path}, line {number}: {found}")
    require(rows, f"{path}: no rows (expected one JSON object per line)")
    return rows


class _Row(dict):
    """One object of a file. `row("field")`: its value, checked, or a UserError that says where."""

    where = ""

    def __call__(self, name, *kinds, empty=False):
        kinds = kinds or (str,)
        expected = f"expected {' or '.join(KINDS[kind] for kind in kinds)}"
        expected += " (may be empty)" if empty else ""
        has = f"has: {', '.join(self) or 'no field'}"
        require(name in self, f"{self.where}: field '{name}' is missing ({expected}; {has})")
        value = self[name]
        fits = type(value) in kinds and (empty or value not in ("", []))
        found = KINDS[type(value)] if type(value) not in kinds else f"an empty one ({value!r})"
        require(fits, f"{self.where}: field '{name}': {expected}, found {found}")
        return lines_of(value) if isinstance(value, str) else value

    def text(self, name):
        """The field's string, or its list of strings as lines; "" where it is missing."""
        value = self(name, str, list, empty=True) if name in self else ""
        odd = [KINDS[type(part)] for part in value if not isinstance(part, str)]
        expected = f"field '{name}': expected a list of strings, found {odd[:1]} in it"
        require(not odd, f"{self.where}: {expected}")
        return value if isinstance(value, str) else "".join(f"{part.rstrip()}\n" for part in value)


def load_problems(path, form="humaneval", test_split=False):
    """The problems of a file, in its order. `form`: a key of FORMS; variants are told by fields.

    test_split: of Google's MBPP, full or sanitized, only the test split (if any of it is there);
    EvalPlus's selection of 378 tasks is taken whole. UserError: file, line and field with what was
    found and expected; a repeated task_id.
    """
    require(form in FORMS, f"form {form!r} is unknown: expected one of {', '.join(FORMS)}")
    problems, chosen, lines = [], [], {}
    for number, fields in read_jsonl(path):
        row = _Row(fields)
        row.where = f"{path}, line {number}"
        problem = FORMS[form](row)
        first = lines.setdefault(problem.task_id, number)
        message = f"{row.where}: task_id {problem.task_id!r} was on line {first} already"
        require(first == number, message)
        problems.append(problem)
        google = form == "mbpp" and not {"test", "assertion"} & row.keys()
        if not google or int(problem.task_id.removeprefix("Mbpp/")) in MBPP_TEST:
            chosen.append(problem)
    return chosen if test_split and chosen else problems


def _humaneval(row):
    prompt, task = row("prompt", empty=True), row("task_id")
    name, solution = (  # without them: bare asserts, and no reference
        row(field, empty=True) if row.get(field) is not None else ""
        for field in ("entry_point", "canonical_solution")
    )
    if "plus_input" not in row:
        leetcode = PREAMBLE if re.search(r"\bSolution\(\)", row("test")) else ""
        return Problem(task, prompt, name, solution, row("test"), leetcode)
    inputs = row("base_input", list) + row("plus_input", list, empty=True)
    test = PLUS_TEST.format(
        inputs=json.dumps(inputs), reference=prompt + solution, name=name, atol=row.get("atol", 0)
    )
    return Problem(task, prompt, name, solution, test)


PLUS_TEST = """\
import copy, json, math
INPUTS = json.loads({inputs!r})
EXPECTED = {{"__name__": "expected"}}
exec({reference!r}, EXPECTED)
def same(found, wanted, atol):
    if isinstance(wanted, (list, tuple)) and type(found) is type(wanted):
        return len(found) == len(wanted) and all(same(f, w, atol) for f, w in zip(found, wanted))
    if isinstance(wanted, float) and type(found) is float:
        return found == wanted or math.isclose(found, wanted, rel_tol=1e-7, abs_tol=atol or 1e-6)
    return found == wanted
def check(candidate):
    for args in INPUTS:
        found = candidate(*copy.deepcopy(args))
        if {name!r} == "find_zero":
            assert abs(EXPECTED["poly"](*args, found)) <= ({atol!r} or 1e-4)
        else:
            assert same(found, EXPECTED[{name!r}](*copy.deepcopy(args)), {atol!r}), args
"""


def _mbpp(row):
    """Google's full (`text`) and sanitized (`prompt`) forms, and MBPP+ from EvalPlus (`assertion`)
    or Hugging Face (`test`). The task id is "Mbpp/11" in all, as EvalPlus has it; the prompt is a
    docstring, the instruction the sentence of the MBPP paper, both with the asserts of the file."""
    task = str(row("task_id", int, str)).removeprefix("Mbpp/")
    message = f"{row.where}: field 'task_id': expected 11 or 'Mbpp/11', found {row['task_id']!r}"
    require(task.isdecimal(), message)
    prompt = row("text" if "text" in row else "prompt")
    code = row("canonical_solution" if "canonical_solution" in row else "code")
    test = row.text("assertion") or row.text("test")
    if not test:
        row("test_list", list)
        test = row.text("test_imports") + row.text("test_setup_code") + "\n" + row.text("test_list")
    shown = row.text("test_list") or row.text("assertion")
    calls = re.findall(r"(?<![\w.])(\w+)\s*\(", shown + test)
    defined = re.findall(r"^def\s+(\w+)", code, re.M)
    name = row("entry_point") if "entry_point" in row else max(defined, key=calls.count, default="")
    require(name in calls, f"{row.where}: the tests call no function that the reference defines")
    text = prompt.strip().strip('"').strip().partition("\nassert ")[0]
    instruction = f"You are an expert Python programmer, and here is your task: {text} "
    instruction += f"Your code should pass these tests:\n\n{shown}"
    prompt = prompt if prompt.lstrip().startswith('"""') else _docstring(f"{text}\n{shown}")
    return Problem(f"Mbpp/{task}", prompt, name, code, test, instruction=instruction)


def _docstring(text):
    escaped = text.strip().replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return f'"""\n{escaped}\n"""\n'


def instruction_of(problem):
    """What an instruction-tuned model is asked: the file's own words, or the prompt as a block."""
    if problem.instruction or not problem.entry_point:
        return problem.instruction or problem.prompt
    return INSTRUCTION.format(prompt=problem.prompt.strip())


def few_shot_prompts(problems, all_problems):
    """The MBPP paper's prompts for base models: tasks 2, 3 and 4 solved, then the task in question.

    UserError where `all_problems` does not hold these three.
    """
    known = {problem.task_id: problem for problem in all_problems}
    missing = [task for task in MBPP_SHOTS if task not in known]
    require(not missing, f"--prompt_style few_shot: the problems have no task {missing}")
    shots = "".join(
        f"{known[task].instruction}\n[BEGIN]\n{known[task].canonical_solution.strip()}\n[DONE]\n\n"
        for task in MBPP_SHOTS
    )
    return [f"{shots}{problem.instruction}\n[BEGIN]\n" for problem in problems]


def _leetcode(row):
    """DeepSeek-Coder's contest form (`prompt_sft`; no reference solutions), or newfacade's
    LeetCodeDataset (`starter_code`). The prompt is the statement as a docstring, then the stub."""
    task, prompt, test = row("task_id"), row("prompt"), row("test")
    if "prompt_sft" in row:
        method = re.search(r"\bmy_solution\.(\w+)\(", test)
        require(method, f"{row.where}: field 'test': expected a call 'my_solution.NAME(...)'")
        name = f"Solution().{method[1]}"
        return Problem(task, prompt, name, "", test, PREAMBLE, row("prompt_sft"))
    found = "needs 'prompt_sft' (DeepSeek's contest form) or 'starter_code' (LeetCodeDataset)"
    require("starter_code" in row, f"{row.where}: {found}; has: {', '.join(row)}")
    stub = _docstring(row("problem_description")) + row("starter_code")
    solution = row("completion")
    return Problem(task, stub, row("entry_point"), solution, test, prompt, row("query"))


FORMS = {"humaneval": _humaneval, "mbpp": _mbpp, "leetcode": _leetcode}


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
