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

import json
import re
from dataclasses import dataclass, field

from pfppo.config import require
from pfppo.files import KINDS, read_jsonl
from pfppo.problems.extract import lines_of
from pfppo.problems.messages import read_turns

# What LeetCode gives every submission; builtins come last because math has a `pow` of its own.
PREAMBLE = """\
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string
from bisect import *; from collections import *; from functools import *; from heapq import *
from itertools import *; from math import *; from typing import *; from builtins import *
"""
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


def load_prompts(path):
    """Prompts as a list of Problem; fields other than `prompt` may be empty. Raises UserError."""
    problems, seen = [], {}
    names = [name for name in Problem.__dataclass_fields__ if name != "messages"]
    for line, row in read_jsonl(path):
        where, turns = f"{path}, line {line}", []
        if isinstance(row.get("prompt"), list):
            turns = read_turns(row["prompt"], f"{where}: field 'prompt'", "user")
            row = row | {"prompt": ""}
        values = {"task_id": f"line {line}"} | row
        for name in names:
            value = values.setdefault(name, "") if name != "prompt" else values.get(name)
            found = "nothing" if name not in row else type(value).__name__
            require(
                isinstance(value, str),
                f"{where}: field '{name}': expected a string, found {found}",
            )
        filled = turns or values["prompt"].strip()
        require(filled, f"{where}: field 'prompt' is empty, expected some text")
        require(
            bool(values["test"]) == bool(values["entry_point"]),
            f"{where}: expected both or neither of the fields 'test' and 'entry_point'",
        )
        first = seen.setdefault(values["task_id"], line)
        require(first == line, f"{where}: task_id {values['task_id']!r} stands in line {first} too")
        problems.append(Problem(**{name: values[name] for name in names}, messages=turns))
    return problems


def prompt_text(problem, style):
    """What a problem asks: its dialogue; code to continue; an instruction in "chat", "deepseek"."""
    if problem.messages:
        return problem.messages
    return instruction_of(problem) if style in ("chat", "deepseek") else problem.prompt
