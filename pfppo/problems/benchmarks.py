"""Problems in HumanEval form, out of benchmark files and out of people's own.

Every row becomes a `Problem`: `setup + prompt + canonical_solution` is a Python program, and `test`
is run against a candidate program. A row's fields tell its form:

    prompt_sft or problem_description  LeetCode: DeepSeek-Coder's contests, LeetCodeDataset
    test_list or assertion             MBPP, full, sanitized; MBPP+ of EvalPlus, of Hugging Face
    any others                         HumanEval; EvalPlus's HumanEval+, whose inputs (it has no
                                       asserts) are compared with the reference; a prompt alone,
                                       which may be called as in ASKED (GSM8K, MATH, Alpaca)

Not covered: the extra inputs in EvalPlus's own MbppPlus.jsonl, which need a conversion for each
task (its base asserts are used; the Hugging Face file of MBPP+ has all inputs in `test`).
"""

import builtins
import json
import keyword
import re
from dataclasses import dataclass, field, replace

from pfppo.config import require
from pfppo.files import read_jsonl
from pfppo.problems.extract import lines_of
from pfppo.problems.messages import read_turns, require_whole, short, with_system

# What LeetCode gives every submission; builtins come last because math has a `pow` of its own.
PREAMBLE = """\
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string
from bisect import *; from collections import *; from functools import *; from heapq import *
from itertools import *; from math import *; from typing import *; from builtins import *
"""
MBPP_SPLITS = {"test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
ASKED = ("prompt", "question", "instruction", "problem", "query", "Question", "Problem")
ASKED += ("messages", "conversations")  # last: an SFT file's dialogue ends with the answer
CALL = re.compile(r"(?<![\w.])(\w+)\s*\(")
KINDS = {int: "a number", float: "a number", str: "a string", list: "a list"}


@dataclass(frozen=True)
class Problem:
    task_id: str
    prompt: str  # code that a completion continues
    entry_point: str  # function name, or "Solution().method"; "" if unknown
    canonical_solution: str  # continues the prompt, or defines the entry point itself; may be ""
    test: str  # defines check(candidate), or bare asserts; "" where nothing is to be executed
    setup: str = ""  # trusted code that stands before every program: imports, ListNode
    instruction: str = ""  # what an instruction-tuned model is asked, where the file says it
    messages: list = field(default_factory=list, hash=False)  # a dialogue, in place of the prompt
    extra: dict = field(default_factory=dict, hash=False)  # further fields, for rewards, verifiers

    @property
    def is_code(self):
        """Whether an answer is a program, to be taken out of what was said."""
        return bool(self.test or self.entry_point)

    @property
    def question(self):
        """The prompt, or the last turn of the dialogue: what people and rewards are told."""
        return self.messages[-1]["content"] if self.messages else self.prompt


class _Row(dict):
    """One object of a file, without its nulls. `row("field")` is its value, checked, or a UserError
    that says where; `used` are the fields that were asked for."""

    def __init__(self, fields, path, line):
        super().__init__((name, value) for name, value in fields.items() if value is not None)
        self.where, self.used = f"{path}, line {line}", set()
        self.task_id = str(self("task_id", int, str, default=f"line {line}"))

    def require(self, condition, message):
        require(condition, f"{self.where}: {message}")

    def __call__(self, name, *kinds, empty=False, default=None):
        """kinds: types that the value may have; a string if none is named."""
        kinds, value = kinds or (str,), self.get(name, default)
        self.used.add(name)
        expected = f"expected {' or '.join(KINDS[kind] for kind in kinds)}"
        has = f"has: {', '.join(self) or 'no field'}"
        self.require(value is not None, f"field '{name}' is missing ({expected}; {has})")
        fits = type(value) in kinds and (empty or default is not None or value not in ("", []))
        self.require(fits, f"field '{name}': {expected}, found {short(value)}")
        return lines_of(value) if isinstance(value, str) else value

    def text(self, name):
        """The field's string, or its list of strings as lines; "" where it is missing."""
        value = self(name, str, list, default="")
        odd = [short(part) for part in value if not isinstance(part, str)]
        self.require(not odd, f"field '{name}': expected a list of strings, found {odd[:1]} in it")
        return value if isinstance(value, str) else "".join(f"{part.rstrip()}\n" for part in value)

    def asked(self):
        """(prompt, messages): a text, or a dialogue, under the first of its names."""
        name, others = next((n for n in ASKED if n in self), "prompt"), ", ".join(ASKED[1:])
        require_whole(self, name, self.where)
        if name not in self:
            expected = "expected a string or a list; has: " + (", ".join(self) or "no field")
            self.require(False, f"field 'prompt' is missing ({expected}); also read: {others}")
        value = self(name, str, list, empty=True)
        system = self("system", str, default="", empty=True)
        if isinstance(value, str) and not system:
            return value, []
        turns = read_turns(value, f"{self.where}: field '{name}'", "user")
        return "", with_system(turns, system, self.where)


def load_problems(path, form="", test_split=False, verifier=None, say=lambda line: None):
    """The problems of a file, in its order. All have tests, or what another `verifier` needs
    (verifiers.py), which is tried on them. Raises UserError.

    form: a key of FORMS that every row must have; "": any. test_split: of Google's MBPP only the
    test split (if any of it is there); MBPP+, a selection, is taken whole, as it is published.
    """
    require(form in ("", *FORMS), f"form {form!r} is unknown: expected {', '.join(FORMS)}")
    pairs = _read(path, form, tested=not verifier)
    problems = [problem for _, problem in pairs]
    if verifier:
        verifier.check(problems, path)
    if not test_split:
        return problems
    plain = [problem for row, problem in pairs if not {"test", "assertion"} & row.keys()]
    left_out = {p.task_id for p in plain} - {p.task_id for p in of_split(plain, "test", path, say)}
    return [problem for problem in problems if problem.task_id not in left_out]


def load_prompts(path, split="", say=lambda line: None):
    """What is sampled from: problems of any form, with tests or without. split: of MBPP's tasks
    only those of "train", "validation" or "test" (`of_split`); `say` is told so. Raises
    UserError."""
    problems = [problem for _, problem in _read(path)]
    return of_split(problems, split, path, say) if split else problems


def of_split(problems, split, path, say):
    """Those of MBPP's tasks that are in a split, and all other problems, which `say` is told; all
    of them where none is in it, or where some task has an id that MBPP has not: such a file is no
    part of MBPP."""
    numbers = [number for problem in problems if (number := mbpp_number(problem)) is not None]
    others = any(not 1 <= number <= MBPP_SPLITS["train"][-1] for number in numbers)
    chosen = [problem for problem in problems if in_split(problem, split)]
    if others or not chosen or len(chosen) == len(problems):
        return problems
    ids = MBPP_SPLITS[split]
    whose = f"MBPP's {split} split by task id ({ids[0]} to {ids[-1]})"
    own = "where they are not MBPP's, an id such as 'own/1' takes all"
    say(f"{path}: {len(chosen)} of {len(problems)} problems, {whose}; {own}")
    return chosen


def mbpp_number(problem):
    """The number in a task id of MBPP; None of any other problem."""
    number = re.fullmatch(r"Mbpp/(\d+)", problem.task_id)
    return int(number[1]) if number else None


def in_split(problem, split):
    """Whether a task's id is in a split of MBPP; other problems are in all."""
    number = mbpp_number(problem)
    return number is None or number in MBPP_SPLITS[split]


def _read(path, form="", tested=False):
    """[(row, Problem)] of a file."""
    pairs, lines = [], {}
    for line, fields in read_jsonl(path):
        row = _Row(fields, path, line)
        own = next((name for name, marks in MARKS.items() if marks & row.keys()), "humaneval")
        other = f"expected a row of {form}, found one of {own} (has: {', '.join(row)})"
        row.require(form in ("", own), other)
        problem = FORMS[own](row)
        if tested and not problem.test:
            row("test")  # says that it is missing
        asks = problem.test or problem.question.strip()
        row.require(asks, "field 'prompt' is empty, expected some text")
        first = lines.setdefault(problem.task_id, line)
        row.require(first == line, f"task_id {problem.task_id!r} was on line {first} already")
        extra = {name: value for name, value in row.items() if name not in row.used}
        pairs.append((row, replace(problem, extra=extra)))
    return pairs


def _called(test):
    """The function that asserts are about: the first that they call and do not define."""
    known = {*dir(builtins), *keyword.kwlist, *re.findall(r"\bdef\s+(\w+)", test)}
    return next((name for name in CALL.findall(test) if name not in known), "")


def _humaneval(row):
    (prompt, turns), test = row.asked(), row("test", default="")
    optional = ("entry_point", "canonical_solution", "setup", "instruction")
    name, solution, setup, instruction = (row(field, default="") for field in optional)
    if "plus_input" in row:
        test = PLUS_TEST.format(
            inputs=json.dumps(row("base_input", list) + row("plus_input", list, empty=True)),
            reference=prompt + solution,
            name=name,
            atol=row("atol", int, float, default=0),
        )
    given = name or "def check(" not in test
    row.require(given, "field 'entry_point' is missing: 'test' defines check(candidate)")
    if re.search(r"\bSolution\(\)", test):
        setup = setup or PREAMBLE
    name = name or _called(test)
    return Problem(row.task_id, prompt, name, solution, test, setup, instruction, turns)


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
    """Google's full (`text`) and sanitized (`prompt`) forms, MBPP+ from EvalPlus (`assertion`) or
    Hugging Face (`test`), and rows of one's own, which may lack a reference. The task id is
    "Mbpp/11" in all, as EvalPlus has it; the prompt is a docstring unless it is code, the
    instruction the sentence of the MBPP paper, both with the asserts of the file."""
    number = row.task_id.removeprefix("Mbpp/")
    task = f"Mbpp/{number}" if number.isdecimal() else number
    text, turns = (row("text"), []) if "text" in row else row.asked()
    code = row("canonical_solution" if "canonical_solution" in row else "code", default="")
    test = row.text("assertion") or row.text("test")
    if not test:
        row("test_list", list)
        test = row.text("test_imports") + row.text("test_setup_code") + "\n" + row.text("test_list")
    shown = row.text("test_list") or row.text("assertion")
    calls = CALL.findall(shown + test)
    defined = re.findall(r"^def\s+(\w+)", f"{text}\n{code}", re.M)
    guess = max(defined, key=calls.count, default="" if code else _called(shown + test))
    name = row("entry_point", default=guess)
    expected = f"expected a call of what {'the reference' if code else 'is asked for'} defines"
    row.require(name in calls, f"field 'test_list': {expected}, found {short(shown)}")
    if turns or re.search(rf"^def\s+{name}\b", text, re.M):
        return Problem(task, text, name, code, test, messages=turns)
    words = text.strip().strip('"').strip().partition("\nassert ")[0]
    instruction = f"You are an expert Python programmer, and here is your task: {words} "
    instruction += f"Your code should pass these tests:\n\n{shown}"
    prompt = text if text.lstrip().startswith('"""') else _docstring(f"{words}\n{shown}")
    return Problem(task, prompt, name, code, test, instruction=instruction)


def _docstring(text):
    escaped = text.strip().replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return f'"""\n{escaped}\n"""\n'


def _leetcode(row):
    """DeepSeek-Coder's contest form (`prompt_sft`; no reference solutions), or newfacade's
    LeetCodeDataset (`starter_code`). The prompt is the statement as a docstring, then the stub."""
    task, prompt, test = row.task_id, row("prompt"), row("test")
    if "prompt_sft" in row:
        method = re.search(r"\bmy_solution\.(\w+)\(", test)
        row.require(method, "field 'test': expected a call 'my_solution.NAME(...)'")
        name = f"Solution().{method[1]}"
        return Problem(task, prompt, name, "", test, PREAMBLE, row("prompt_sft"))
    stub = _docstring(row("problem_description")) + row("starter_code")
    solution = row("completion", default="")
    return Problem(task, stub, row("entry_point"), solution, test, prompt, row("query"))


FORMS = {"leetcode": _leetcode, "mbpp": _mbpp, "humaneval": _humaneval}
MARKS = {"leetcode": {"prompt_sft", "problem_description"}, "mbpp": {"test_list", "assertion"}}
