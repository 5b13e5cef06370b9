"""Files of problems, prompts, pairs and samples; pass@k; overlap with training data."""

import bz2
import gzip
import itertools
import json
import lzma
import math
import random
from pathlib import Path
from types import SimpleNamespace

from pfppo.files import read_jsonl
from pfppo.problems import (
    Problem,
    assemble,
    check_of,
    load_pairs,
    load_problems,
    load_prompts,
    load_stops,
)
from pfppo.problems.contamination import grams, overlaps, report_overlap
from pfppo.problems.messages import few_shot_prompts, only_text, prompt_text, read_pair, read_turns
from pfppo.problems.programs import (
    pass_at_k,
    pass_at_k_interval,
    read_samples,
    sample_row,
    summary,
)
from pfppo.sandbox import Sandbox

import numpy as np
import pytest
from ranks import refused
from test_extract import ANSWERS, BARE, CODEX, STUB

DATA = Path(__file__).parents[2] / "shared" / "data"


def data(name):
    path = DATA / name
    return path if path.exists() else pytest.skip(f"benchmark file {name} is not in shared/data")


def run(check):
    """Run a trusted Check in this process."""
    names = {"__name__": "candidate"}
    exec(compile(check.program, "program", "exec"), names)
    exec(compile(check.test, "test", "exec"), names)
    if "def check(" in check.test:
        names["check"](eval(check.entry_point, names))


def reference_check(problem):
    """The problem's own solution as the candidate."""
    return check_of(problem, check_of(problem, "").reference)


@pytest.fixture(scope="module")
def passed():
    with Sandbox(workers=1) as sandbox:
        yield lambda *checks: [verdict.passed for verdict in sandbox.run(list(checks))]


def write(folder, *rows):
    """A JSONL file of objects, and of lines that stand as they are."""
    path = folder / "rows.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_humaneval_references_pass_in_three_styles():
    problems = load_problems(data("HumanEval.jsonl.gz"), "humaneval")
    assert len(problems) == 164 and load_prompts(data("HumanEval.jsonl.gz")) == problems
    for problem in problems:
        whole = problem.prompt + problem.canonical_solution
        body = assemble(problem, problem.canonical_solution + "\n\nif x:\n    it's")
        assert body.program == check_of(problem, "").reference + "\n\n"
        fenced = assemble(problem, f"Here you are:\n```python\n{whole}\n```\nThat's it.")
        bare = assemble(problem, f"Here you are:\n\n{whole}\nThat's it.")
        for check in (body, fenced, bare):
            run(check)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in the references
def test_mbpp_full_form_and_its_splits():
    path = data("mbpp.jsonl.gz")
    problems, test = load_problems(path, "mbpp"), load_problems(path, "mbpp", test_split=True)
    assert len(problems) == 974
    assert [p.task_id for p in test] == [f"Mbpp/{i}" for i in range(11, 511)]
    assert load_prompts(path, split="test") == test and load_prompts(path) == problems
    assert [len(load_prompts(path, split=name)) for name in ("train", "validation")] == [374, 90]
    shots = few_shot_prompts(test[:2], problems)
    assert [text.count("[BEGIN]") for text in shots] == [4, 4] and shots[0].endswith("[BEGIN]\n")
    assert shots[0].count("[DONE]") == 3 and test[1].instruction in shots[1]
    by_id = {p.task_id: p for p in problems}
    assert by_id["Mbpp/126"].entry_point == "sum"
    for problem in problems:
        assert "\r" not in problem.canonical_solution + problem.test
        compile(problem.prompt + problem.canonical_solution, problem.task_id, "exec")
        assert problem.entry_point in problem.instruction
    for problem in problems[5::25] + [by_id[f"Mbpp/{i}"] for i in (64, 126, 367, 596, 601, 927)]:
        run(reference_check(problem))
        run(assemble(problem, problem.canonical_solution))
        run(assemble(problem, f"[BEGIN]\n{problem.canonical_solution}\n[DONE]\n\nYou are"))
        run(assemble(problem, f"So:\n```python\n{problem.canonical_solution}```\nIt's it."))


def test_leetcode_contest_form():
    path = data("leetcode_contest_2023-07_2024-01.jsonl.gz")
    problems = load_problems(path, "leetcode")
    assert len(problems) == 180 and load_prompts(path) == problems
    for problem in problems:
        check = assemble(problem, "\n        return None\n\nIt's done.")
        names = {}
        exec(check.program, names)
        assert callable(eval(check.entry_point, names))
        compile(check.reference, problem.task_id, "exec")
        assert "```python\nclass" in problem.instruction or "ListNode" in problem.instruction


def test_leetcode_dataset_form():
    problems = load_problems(data("LeetCodeDataset-v0.3.1-test.jsonl.gz"), "leetcode")
    assert len(problems) == 228 and problems[0].extra["difficulty"] == "Medium"
    for problem in problems:
        compile(problem.setup + problem.prompt + "pass", problem.task_id, "exec")
    light = [p for p in problems if "sortedcontainers" not in p.setup + p.canonical_solution]
    assert len(light) == 210  # the others need a package
    for problem in light[:12]:
        run(reference_check(problem))
        run(assemble(problem, f"So:\n```python\n{problem.canonical_solution}```"))


# ------------------------------------------------------------------------------------- forms


def turn(role, content):
    return {"role": role, "content": content}


SYSTEM, ASK = turn("system", "s"), turn("user", "q")
YES, NO = turn("assistant", "yes"), turn("assistant", "no")

HUMANEVAL = {"task_id": "A/1", "prompt": 'def two(x):\n    """Twice."""\n', "entry_point": "two"}
HUMANEVAL |= {"canonical_solution": "    return 2 * x\n"}
HUMANEVAL |= {"test": "def check(candidate):\n    assert candidate(2) == 4\n"}
TWO = "def one(x):\r\n\treturn x\r\ndef two(x):\r\n\treturn one(x) + x"
MBPP = {"task_id": 12, "text": "Double.", "code": TWO, "test_list": ["assert two(SET) == 4 "]}
MBPP |= {"test_setup_code": "SET = 2"}
SANITIZED = {"task_id": 12, "prompt": "Double.", "code": TWO, "test_imports": ["import math"]}
SANITIZED |= {"test_list": ["assert two(math.floor(2.5)) == 4"]}
EVALPLUS = {"task_id": "Mbpp/12", "prompt": '"""\nDouble.\nassert two(2) == 4\n"""\n'}
EVALPLUS |= {"entry_point": "two", "canonical_solution": TWO, "assertion": "assert two(2) == 4"}
EVALPLUS |= {"base_input": [[2]], "plus_input": [[3]], "atol": 0}
HUGGING = {"task_id": 12, "prompt": "Double.", "code": TWO, "test_imports": []}
HUGGING |= {"test_list": ["assert two(2) == 4"]}
HUGGING |= {"test": "for x, y in zip([2, 3], [4, 6]):\n    assert two(x) == y\n"}
CONTEST = {"task_id": "c", "prompt": STUB.prompt, "prompt_sft": "Do it.", "test": STUB.test}
BY_FORM = {"humaneval": HUMANEVAL, "mbpp": MBPP, "leetcode": CONTEST}


def test_leetcodes_usual_names_need_no_import(tmp_path, passed):
    (problem,) = load_problems(write(tmp_path, CONTEST))
    names = "deque, heappush, bisect_left, accumulate, lru_cache, Optional, inf, re, math.comb"
    run(assemble(problem, f"{names}\n        return pow(2, 5, 27) if gcd(4, 6) == 2 else 0\n"))
    row = {"prompt": "", "entry_point": "Solution"}  # HumanEval's form
    row["test"] = "my_solution = Solution()\nassert my_solution.twice(nums=[1]) == [1, 1]\n"
    (problem,) = load_problems(write(tmp_path, row))
    code = "class Solution:\n    def twice(self, nums: List[int]):\n        return nums * {}\n"
    checks = (assemble(problem, code.format(times)) for times in (2, 3))
    assert passed(*checks) == [True, False]


@pytest.mark.parametrize("row", [MBPP, SANITIZED, EVALPLUS, HUGGING])
def test_each_form_of_mbpp_is_one_problem(tmp_path, row):
    (problem,) = load_problems(write(tmp_path, row), "mbpp")
    assert (problem.task_id, problem.entry_point) == ("Mbpp/12", "two")
    assert "task: Double. Your code" in problem.instruction and "two(" in problem.prompt
    run(reference_check(problem))
    text = 'Split """a""" at \\d and \\x'
    if "text" in row:  # it survives as a docstring
        (quoted,) = load_problems(write(tmp_path, row | {"text": text}))
        assert eval(quoted.prompt.strip()) == f"\n{text}\nassert two(SET) == 4\n"
    for wrong in ("x", "4" if row is HUGGING else "0"):  # Hugging Face's has more inputs
        with pytest.raises(AssertionError):
            run(assemble(problem, f"def two(x):\n    return {wrong}"))


def test_published_test_splits_are_googles_and_all_of_evalplus_selection(tmp_path):
    ids = (2, 11, 510, 511, 600, 601)
    for form in (MBPP, SANITIZED, HUGGING, EVALPLUS):
        named = [f"Mbpp/{i}" if form is EVALPLUS else i for i in ids]
        path = write(tmp_path, *(form | {"task_id": name} for name in named))
        plus = form in (HUGGING, EVALPLUS)
        chosen = load_problems(path, test_split=True)
        assert [p.task_id for p in chosen] == [f"Mbpp/{i}" for i in (ids if plus else ids[1:3])]
        for split, wanted in (("test", ids[1:3]), ("validation", ids[3:5]), ("train", ids[5:])):
            chosen = load_prompts(path, split=split)
            assert [p.task_id for p in chosen] == [f"Mbpp/{i}" for i in wanted]
        assert len(load_problems(path)) == len(load_prompts(path)) == 6
    path = write(tmp_path, MBPP | {"task_id": 700})  # better than nothing
    assert len(load_problems(path, test_split=True)) == len(load_prompts(path, split="test")) == 1


def test_what_belongs_to_a_question_is_asked(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = {"problem": "p", "messages": turns}, {"prompt": "q, b", "context": "c"}
    rows += ({"question": "q", "system": "Be brief."},)
    first, whole, briefed = load_prompts(write(tmp_path, *rows))
    assert (first.question, whole.question, briefed.question) == ("p", "q, b", "q")
    assert [turn["role"] for turn in briefed.messages] == ["system", "user"]


def test_rows_of_ones_own_in_mbpps_form_are_all_taken(tmp_path):
    """Where an id is none of MBPP's; where all are, a line says what is left out."""
    said = []
    path = write(tmp_path, *(MBPP | {"task_id": i} for i in (0, 11, 601)))
    assert len(load_problems(path, test_split=True)) == 3
    assert len(load_prompts(path, "train", said.append)) == 3 and not said
    path = write(tmp_path, *(MBPP | {"task_id": i} for i in (11, 601)))
    assert len(load_prompts(path, "train", said.append)) == 1
    assert len(load_problems(path, test_split=True, say=said.append)) == 1
    own = "where they are not MBPP's, an id such as 'own/1' takes all"
    for line, split in zip(said, ("train split by task id (601 to 974", "test split"), strict=True):
        assert line.startswith(f"{path}: 1 of 2 problems, MBPP's {split}") and line.endswith(own)


def test_few_shots_need_their_three_tasks(tmp_path):
    problems = load_problems(write(tmp_path, *(MBPP | {"task_id": i} for i in (2, 4, 11))))
    message = refused(few_shot_prompts, problems[2:], problems)
    assert "few_shot: the problems have no task ['Mbpp/3']" in message


def test_what_is_asked_is_the_files_instruction_or_code_as_a_block_or_the_prompt(tmp_path):
    code, mbpp = load_problems(write(tmp_path, HUMANEVAL, MBPP))
    for style in ("chat", "deepseek"):
        text = prompt_text(code, style)
        assert text.startswith("Please continue to complete the function.")
        assert text.endswith(f"```python\n{code.prompt.strip()}\n```")
        assert prompt_text(mbpp, style) == mbpp.instruction
    assert prompt_text(code, "plain") == code.prompt and prompt_text(mbpp, "plain") == mbpp.prompt
    rows = {"prompt": "Say hello."}, {"prompt": "Write f.", "test": "assert f(1)"}
    for problem, row in zip(load_prompts(write(tmp_path, *rows)), rows, strict=True):
        assert prompt_text(problem, "chat") == row["prompt"]


PLUS = HUMANEVAL | {"base_input": [[2], [0.5]], "atol": 0}
PLUS |= {"plus_input": [[-3], [[1, [0.1]]], ["a'\"\\n"]]}
PLUS |= {"prompt": 'def root(x):\n    return x**0.5\n\ndef two(x):\n    """Twice."""\n'}


def test_evalplus_own_humaneval_form_compares_with_the_reference_on_all_inputs(tmp_path, passed):
    (problem,) = load_problems(write(tmp_path, PLUS))
    bodies = {
        "return 2 * x": True,
        "return x + x": True,
        "return 2 * x if x != -3 else 0": False,
        "return 2 * x if x != 0.5 else 1.0000001": True,  # EvalPlus's tolerance for floats
        "return 2 * x if x != 0.5 else 1.001": False,
        "return 2 * x if not isinstance(x, str) else x": False,
        "return 2 * x if not isinstance(x, list) else (2 * x)[:3]": False,
    }
    checks = (assemble(problem, f"    {body}\n") for body in bodies)
    assert passed(reference_check(problem), *checks) == [True, *bodies.values()]


def test_a_problem_may_lack_entry_point_and_reference(tmp_path, passed):
    row = {"task_id": "A", "prompt": "", "test": "assert f(1) == 2", "entry_point": None}
    (problem,) = load_problems(write(tmp_path, row))
    assert (problem.entry_point, problem.canonical_solution) == ("f", "")
    programs = ["def f(x):\n    return x + 1\n", "def f(x):\n    return x\n"]
    assert passed(*(check_of(problem, program) for program in programs)) == [True, False]


def test_a_problem_without_a_usable_reference_has_none(tmp_path):
    for prompt, solution in (("", ""), ("def two(x):\n", "return ("), ("\0", "")):
        row = HUMANEVAL | {"prompt": prompt, "canonical_solution": solution}
        (problem,) = load_problems(write(tmp_path, row))
        check = check_of(problem, "def two(x):\n    return x * 2\n")
        assert check.reference == ""
        run(check)


def test_a_reference_leaves_a_given_program_alone_and_may_replace_the_signature():
    program = "def f(xs):\n    return 5\nprint(1)\n"
    check = check_of(CODEX, program)
    assert (check.program, check.entry_point) == (program, "f")
    assert check.reference == CODEX.prompt + CODEX.canonical_solution
    for right in (check, reference_check(CODEX), assemble(CODEX, CODEX.canonical_solution)):
        run(right)
    assert reference_check(BARE).program == "def f(xs): return 5\n"
    names = {}
    exec(check_of(STUB, "").reference, names)  # without a solution: the names of the prompt
    assert {"Node", "Solution", "deque"} <= set(names)


# ------------------------------------------------------------------------- one's own prompts


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"prompt": "a"}, {"prompt": "a", "test": "", "entry_point": "", "task_id": "line 2"}),
        ({"prompt": [ASK]}, {"prompt": "", "messages": [ASK], "question": "q"}),
        (HUMANEVAL | {"task_id": 7}, {"task_id": "7", "entry_point": "two"}),
        (HUMANEVAL | {"test": None}, {"test": "", "entry_point": "two"}),
        (HUMANEVAL | {"setup": "x = 1\n", "instruction": "Do."}, {"setup": "x = 1\n"}),
        ({"messages": [SYSTEM, ASK]}, {"messages": [SYSTEM, ASK], "prompt": "", "test": ""}),
        ({"messages": [ASK], "test_list": ["assert f(1) == 2"]}, {"entry_point": "f"}),
        ({"prompt": "q", "test_list": ["assert set(f(1)) == {2}"]}, {"entry_point": "f"}),
        ({"prompt": "q", "test": "import a\nassert a.b(f(1)) == 2"}, {"entry_point": "f"}),
        ({"prompt": "q", "test": "def s(x): return x\nassert s(f(1))"}, {"entry_point": "f"}),
        ({"prompt": "q", "answer": "42", "source": None}, {"extra": {"answer": "42"}}),
        (MBPP | {"level": [1]}, {"extra": {"level": [1]}, "task_id": "Mbpp/12"}),
        (HUMANEVAL | {"prompt": [ASK]}, {"messages": [ASK], "prompt": "", "entry_point": "two"}),
        ({"prompt": "q", "messages": [ASK, YES]}, {"prompt": "q", "messages": []}),
        ({"question": "q", "answer": "#### 4"}, {"prompt": "q", "extra": {"answer": "#### 4"}}),
        ({"problem": "q", "solution": "s"}, {"prompt": "q", "extra": {"solution": "s"}}),
        ({"instruction": "q", "input": "", "output": "s"}, {"prompt": "q", "test": ""}),
        ({"conversations": [{"from": "human", "value": "q"}]}, {"messages": [ASK]}),
        ({"question": "q", "starter_code": "", "url": "u"}, {"prompt": "q", "test": ""}),  # APPS
        ({"question": "q", "test_list": ["assert f(1) == 2"]}, {"entry_point": "f"}),
    ],
)
def test_a_row_of_ones_own_is_read_by_the_fields_it_has(tmp_path, row, wanted):
    (problem,) = load_prompts(write(tmp_path, "", row))
    assert {name: getattr(problem, name) for name in wanted} == wanted


def test_tests_alone_make_a_problem_and_code_in_a_prompt_stays_code(tmp_path, passed):
    tests = {"test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
    stub = 'def add(a, b):\n    """Add."""\n'
    rows = ({"prompt": prompt} | tests for prompt in ("Add.", stub))
    told, continued = load_prompts(write(tmp_path, *rows))
    assert "assert add(1, 2) == 3" in told.prompt and "task: Add. Your code" in told.instruction
    assert continued.prompt == stub and continued.instruction == ""
    answers = ["```python\ndef add(a, b):\n    return a + b\n```", "    return a + b\n"]
    checks = [assemble(told, answers[0]), *(assemble(continued, answer) for answer in answers)]
    assert passed(*checks, assemble(continued, "    return a - b\n")) == [True, True, True, False]


@pytest.mark.parametrize("form", BY_FORM)
def test_a_named_form_refuses_rows_of_other_forms(tmp_path, form):
    for other, row in BY_FORM.items():
        path = write(tmp_path, BY_FORM[form], row | {"task_id": "x"})
        if other == form:
            assert len(load_problems(path, form)) == len(load_problems(path)) == 2
        else:
            message = refused(load_problems, path, form)
            assert f"line 2: expected a row of {form}, found one of {other} (has: " in message
    assert "'apps' is unknown: expected leetcode, mbpp, " in refused(load_problems, path, "apps")


BROKEN = [  # row or line, what the message says of it
    ("{'prompt'", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('"\\ud800', "not JSON"),
    ("3", "expected an object {...}, found 3"),
    ({"text": "a"}, "field 'prompt' is missing (expected a string or a list; has: text)"),
    ({"prompt": 3}, "field 'prompt': expected a string or a list, found 3"),
    ({"text": "a"}, "; also read: question, instruction, problem, query"),
    ({"instruction": "q", "input": "r"}, "'instruction' and 'input': expected one text of both"),
    ({"Question": "How many?", "Body": "Tom has 3."}, "'Question' and 'Body': expected one text"),
    ({"question": "Which?", "options": ["a", "b"]}, "'question' and 'options': expected one"),
    ({"prompt": None}, "field 'prompt' is missing (expected a string or a list; has: no field)"),
    ({"prompt": " \n"}, "field 'prompt' is empty, expected some text"),
    ({"messages": [ASK, YES]}, "field 'messages': expected a system turn or none"),
    ({"prompt": "a", "task_id": 7.5}, "field 'task_id': expected a number or a string, found 7.5"),
    (HUMANEVAL | {"test": ["x"]}, "field 'test': expected a string, found ['x']"),
    (HUMANEVAL | {"entry_point": ""}, "field 'entry_point' is missing: 'test' defines check"),
    (PLUS | {"base_input": 3}, "field 'base_input': expected a list, found 3"),
    (MBPP | {"test_list": []}, "field 'test_list': expected a list, found []"),
    (MBPP | {"test_list": ["a", 2]}, "field 'test_list': expected a list of strings, found ['2']"),
    (MBPP | {"code": "two = 2"}, "expected a call of what the reference defines, found 'assert"),
    ({"prompt": "q", "test_list": ["x"]}, "expected a call of what is asked for defines"),
    (MBPP | {"test_setup_code": 1}, "field 'test_setup_code': expected a string or a list, found"),
    (CONTEST | {"test": "assert f()"}, "field 'test': expected a call 'my_solution.NAME(...)'"),
]


@pytest.mark.parametrize("row, message", BROKEN)
def test_a_line_that_cannot_be_read_is_named_with_field_found_and_expected(tmp_path, row, message):
    path = write(tmp_path, {"prompt": "fine"}, "", row)
    told = refused(load_prompts, path)
    assert told.startswith(f"{path}, line 3: ") and message in told


def test_a_repeated_task_id_names_both_lines_and_a_benchmark_needs_tests(tmp_path):
    for load in (load_problems, load_prompts):
        message = refused(load, write(tmp_path, HUMANEVAL, HUMANEVAL))
        assert "line 2: task_id 'A/1' was on line 1 already" in message
    path = write(tmp_path, HUMANEVAL, {"prompt": "q"})
    assert len(load_prompts(path)) == 2
    assert "line 2: field 'test' is missing (expected a string; has" in refused(load_problems, path)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, ": cannot be read (No such file"),
        (b"", ": no rows"),
        (b"\n \n", ": no rows"),
        (b'[{"a": 1},', ", line 1: not JSON"),
        (b'[{"a": 1}, 2]', ", line 2: expected an object {...}, found 2"),
        (b'{}\n{"a": "\xe9"}', ", line 2: not JSON ('utf-8' codec can't decode"),
        (b"\x1f\x8b\x08rest", ": cannot be read (Compressed file ended"),
        (gzip.compress(b'{"a": 1}')[:-6], ": cannot be read (Compressed file ended"),
    ],
)
def test_a_file_that_is_broken_or_missing_is_named(tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    if content is not None:
        path.write_bytes(content)
    for load in (load_problems, load_prompts, load_pairs):
        assert refused(load, path).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "p.csv",
            b"prompt,answer\na,b\n",
            "is CSV (columns: prompt, answer), expected JSONL: conv",
        ),
        (
            "p.txt",
            b'"prompt"\t"answer"\na\tb\n',
            "is TSV (columns: prompt, answer), expected JSONL",
        ),
        (
            "p.parquet",
            b"PAR1\x15",
            "python -c \"import pandas; pandas.read_parquet('{}').to_json('p.",
        ),
        (
            "p.arrow",
            b"\xff\xff\xff\xffx",
            'is Arrow, expected JSONL: convert it, python -c "import d',
        ),
        ("p.xlsx", b"PK\x03\x04", "is a zip archive or a spreadsheet, expected JSONL"),
        ("p.jsonl.zst", b"(\xb5/\xfdx", "is packed by zstd, expected JSONL"),
        ("p.jsonl", b"<!DOCTYPE html>", "is HTML or XML, expected JSONL"),
        ("p.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull), expected JSO"),
        ("set/x.jsonl", b"{}", "{} is a folder"),
        (
            "set/dataset_dict.json",
            b"{}",
            "datasets.load_from_disk('{}')['train'].to_json('set.jsonl",
        ),
    ],
)
def test_a_file_of_another_kind_is_told_and_how_to_convert_it(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    path = path.parent if "/" in name else path
    for load in (load_problems, load_prompts, load_pairs):
        told = refused(load, path)
        assert told.startswith(f"{path}: is ")
        assert message.removeprefix("{} ").format(path) in told


def test_a_hub_id_in_place_of_a_file_is_told_how_to_make_one():
    told = refused(load_prompts, "openai/gsm8k")
    assert "datasets.load_dataset('openai/gsm8k', split='train').to_json('gsm8k.jsonl')" in told


def test_windows_encoding_other_packers_and_objects_over_lines_are_read(tmp_path):
    rows, path = [{"a": "\xe9"}, {"a": [1, {"b": 2}]}], tmp_path / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    indented = "\n".join(json.dumps(row, indent=2) for row in rows)
    for content in (
        text.encode("utf-16"),
        text.encode("utf-16").replace(b"\n\0", b"\r\0\n\0"),
        bz2.compress(text.encode()),
        lzma.compress(text.encode()),
        indented.encode(),
        b"\xef\xbb\xbf" + indented.encode(),
    ):
        path.write_bytes(content)
        assert read_jsonl(path) == [(1, rows[0]), (2, rows[1])]
    path.write_text(indented[:-2])
    assert refused(read_jsonl, path).startswith(f"{path}, line 1: not JSON")


def test_gzip_blank_lines_byte_order_mark_and_one_array_are_read(tmp_path):
    path = tmp_path / "packed.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8"}'))
    assert read_jsonl(path) == [(1, {"a": 1}), (4, {"a": "\u2028"})]
    path.write_text(json.dumps([SANITIZED, SANITIZED | {"task_id": 13}], indent=2))
    assert [p.task_id for p in load_problems(path, "mbpp")] == ["Mbpp/12", "Mbpp/13"]


# --------------------------------------------------------------------------- dialogues, pairs


def test_of_a_turn_role_and_content_are_kept_and_parts_of_text_put_together():
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]
    assert read_turns([ASK | {"name": "x"}], "here", "user") == [ASK]
    assert read_turns([turn("user", parts)], "here", "user") == [turn("user", "qr")]


@pytest.mark.parametrize("system", ["", "system "])
@pytest.mark.parametrize("roles", ["user", "user assistant user"])
def test_a_prompt_has_a_system_turn_or_none_then_user_and_assistant_by_turns(system, roles):
    turns = [turn(role, "x") for role in (system + roles).split()]
    assert read_turns(turns, "here", "user") == turns


ORDERS = "user assistant > user", "user > assistant"  # > what the last one must be
ORDERS += "system > user", "system assistant > assistant", "user user > user", "human > user"
ORDERS += "assistant user > user", "user system > user", "user tool assistant > assistant"


@pytest.mark.parametrize("roles, last", [order.split(" > ") for order in ORDERS])
def test_other_orders_and_roles_are_refused_with_what_was_found(roles, last):
    message = refused(read_turns, [turn(role, "x") for role in roles.split()], "here", last)
    assert message.startswith("here: expected ") and f"the last one {last}" in message
    assert message.endswith(f"found {', '.join(roles.split())}")


@pytest.mark.parametrize(
    "value, expected",
    [
        (3, "here: expected a string or a list of messages, found 3"),
        ([], "here: expected a system turn or none, then"),
        ([{"from": "human"}], "message 1: expected an object with 'role' and 'content', found {'f"),
        ([turn("user", " \n")], "here, message 1: 'content' is empty"),
        ([turn("user", [])], "here, message 1: 'content' is empty"),
        ([turn("user", None)], "message 1: 'content': expected a string or parts of text only, f"),
        ([ASK, turn("assistant", ""), ASK], "here, message 2: 'content' is empty"),
        ([turn("user", [{"type": "image", "url": "x"}])], "text only, found [{'type': 'image'"),
        ([turn(["user"], "x")], "found ['user']"),
    ],
)
def test_a_bad_turn_is_named_with_its_number(value, expected):
    assert expected in refused(read_turns, value, "here", "user")


OTHER = turn("user", "other")
ORCA, SHORT = [SYSTEM, ASK], "Human: q\n\nAssistant:"
HH = "\n\nHuman: q\n\nAssistant: a\n\nb: c\n\nHuman: r?\n\nAssistant: {}"
SAFE, SHP = {"prompt": "q", "response_0": "no", "response_1": "yes"}, {"history": "q"}
SHARED = {
    "conversations": [
        {"from": who, "value": what}
        for who, what in (("human", "q"), ("gpt", "a\n\nb: c"), ("human", "r?"))
    ],
    "chosen": {"from": "gpt", "value": "yes"},
    "rejected": {"from": "gpt", "value": "no"},
}
LONG = [turn("user", "q"), turn("assistant", "a\n\nb: c"), turn("user", "r?")]


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"prompt": "q", "chosen": "yes", "rejected": "no"}, "q"),
        ({"instruction": "q", "pos": "yes", "neg": "no"}, "q"),
        ({"instruction": [ASK], "pos": [YES], "neg": "no", "input": ""}, "q"),
        ({"prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO], "score_chosen": 7.0}, "q"),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, "q"),
        ({"prompt": " r? ", "chosen": [*LONG, YES], "rejected": [*LONG, NO]}, LONG),
        ({"prompt": LONG, "chosen": "yes", "rejected": "no"}, LONG),
        ({"chosen": HH.format("yes"), "rejected": HH.format("no")}, LONG),  # HH-RLHF
        ({"chosen": f"\n\n{SHORT} yes", "rejected": f"{SHORT} no"}, "q"),
        ({"prompt": f"\n\n{SHORT}", "chosen": "yes", "rejected": "no"}, "q"),
        ({"system": "s", "question": "q", "chosen": "yes", "rejected": "no"}, ORCA),
        ({"system": "", "question": "q", "chosen": "yes", "rejected": "no"}, "q"),
        ({"system": "s", "input": "q", "chosen": "yes", "rejected": "no"}, ORCA),
        ({"system": "s", "chosen": [*ORCA, YES], "rejected": [*ORCA, NO]}, ORCA),
        ({"prompt": "q", "better": "yes", "worse": "no"}, "q"),
        ({"question": "q", "response_j": "yes", "response_k": "no"}, "q"),
        ({"prompt": "q", "chosen": YES, "rejected": NO}, "q"),
        (SHARED, LONG),
        (SAFE | {"better_response_id": 1, "safer_response_id": 1}, "q"),
        (SAFE | {"safer_response_id": 1}, "q"),
        (SHP | {"human_ref_A": "yes", "human_ref_B": "no", "labels": 1}, "q"),
        (SHP | {"human_ref_A": "no", "human_ref_B": "yes", "labels": 0}, "q"),
    ],
)
def test_every_form_of_a_pair_gives_prompt_and_two_texts(tmp_path, row, wanted):
    assert load_pairs(write(tmp_path, "", row)) == [(2, (wanted, "yes", "no"))]
    written = dict(zip(("prompt", "chosen", "rejected"), (wanted, "yes", "no"), strict=True))
    assert load_pairs(write(tmp_path, written)) == [(1, (wanted, "yes", "no"))]


def test_a_response_may_be_empty_as_text_and_as_a_turn():
    assert read_pair({"chosen": f"{SHORT} yes", "rejected": SHORT}, "here") == ("q", "yes", "")
    for empty in ("", [turn("assistant", "")], [ASK, turn("assistant", "")]):
        chosen = [ASK, YES] if len(empty) == 2 else "yes"
        row = {"prompt": "q", "chosen": chosen, "rejected": empty}
        assert read_pair(row, "here") == ("q", "yes", "")


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"chosen": [ASK, YES], "rejected": [OTHER, NO]}, "differ before their last messages (1 a"),
        ({"chosen": HH.format("a"), "rejected": f"{SHORT} b"}, "(3 and 1 messages there)"),
        ({"chosen": [YES], "rejected": [NO]}, ": field 'prompt' (or 'instruction'): expected a s"),
        ({"prompt": "x", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "start with, found 'x' in"),
        ({"prompt": [OTHER], "chosen": [ASK, YES], "rejected": [ASK, NO]}, "(or 'instruction'): e"),
        ({"prompt": [ASK, YES], "chosen": "a", "rejected": "b"}, "the last one user, found user"),
        ({"prompt": "q", "chosen": [ASK], "rejected": [ASK]}, "'chosen' (or 'pos'): expected a s"),
        ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, ": chosen and rejected are the same"),
        ({"prompt": "q", "rejected": "no"}, "'chosen' (or 'pos'): expected a string or a list of"),
        ({"prompt": "q", "chosen": "a", "neg": 3}, "'rejected' (or 'neg'): expected a string or"),
        ({"instruction": "q", "input": "r", "pos": "a", "neg": "b"}, "one text of both, in 'prom"),
        ({"question": "q", "context": "c", "pos": "a", "neg": "b"}, "'question' and 'context': e"),
        ({"system": 3, "question": "q", "pos": "a", "neg": "b"}, "field 'system' and the prompt"),
        (
            {"prompt": "q", "completion": "a", "label": True},
            "nothing (has: prompt, completion, label); write rows of prompt, chosen, rejected",
        ),
        (SAFE, "expected 0 or 1 in better_response_id or safer_response_id, found {}"),
        (SAFE | {"better_response_id": 2}, "found {'better_response_id': 2}"),
    ],
)
def test_a_pair_that_is_none_is_named_with_line_field_found_and_expected(tmp_path, row, expected):
    path = write(tmp_path, {"prompt": "q", "chosen": "yes", "rejected": "no"}, row)
    message = refused(load_pairs, path)
    assert message.startswith(f"{path}, line 2") and expected in message


def test_rows_whose_two_choices_differ_are_left_out_however_many(tmp_path):
    agreed, said = SAFE | {"better_response_id": 1, "safer_response_id": 1}, []
    differ = SAFE | {"better_response_id": 1, "safer_response_id": 0}
    pairs = load_pairs(write(tmp_path, agreed, differ, differ), said.append)
    assert [line for line, _ in pairs] == [1] and "2 of 3 rows are no pairs" in said[0]
    advice = "to learn one of them, take better_response_id or safer_response_id out of the rows"
    assert advice in said[0] and advice in refused(load_pairs, write(tmp_path, differ, differ))


def test_a_few_rows_among_many_that_are_no_pairs_are_left_out_and_told(tmp_path):
    fine = [{"prompt": "q", "chosen": "yes", "rejected": str(i)} for i in range(199)]
    same, said = {"prompt": "q", "chosen": "no", "rejected": "no"}, []
    path = write(tmp_path, *fine[:50], same, *fine[50:])
    assert [line for line, _ in load_pairs(path, said.append)] == [*range(1, 51), *range(52, 201)]
    (line,) = said
    assert line.startswith(
        f"{path}: 1 of 200 rows are no pairs and left out, the first: {path}, li"
    )
    message = refused(load_pairs, write(tmp_path, *fine[:197], same, same, same))
    assert "line 198: chosen and rejected are the same" in message
    assert message.endswith(" (3 of 200 rows are no pairs)")


def test_only_one_users_turn_is_text():
    assert only_text("q") == only_text([ASK]) == "q"
    message = refused(only_text, [SYSTEM, ASK])
    assert "system, user" in message and "--prompt_style chat" in message


# ------------------------------------------------------------------------------- stop strings

RUN_ON = (  # what base models write behind their answers
    "\n\ndef test_{0}():\n    assert {0}(1) == 2\n",
    "\n\n\nclass Test(unittest.TestCase):\n    def test(self):\n        pass\n",
    "\nprint({0}([1, 2]))\n",
    "\n# Test\nif __name__ == '__main__':\n    print({0}(1))\n",
    "\nassert {0}(3) == 4\n",
    '\n"""\nWrite a function to do it.\nassert g(1)\n"""\ndef g(x):\n    return x\n',
    "\n```\n\nThis works.\n```python\nx = 1\n```\n",
    "\n@lru_cache\ndef h(x):\n    return x\nprint(h(1))\n",
    "\nimport sys\nThis is prose.\n\nprint(1)\n",
    "\n\ndef main():\n    print({0}(1))\n\nif __name__ == '__main__':\n    main()\n",
)


def stops_of(**changes):
    asked = {"benchmark": "humaneval", "prompt_style": "plain", "verify": "tests", "stop": None}
    return load_stops(SimpleNamespace(**asked | changes))


@pytest.mark.parametrize("name", ["HumanEval.jsonl.gz", "mbpp.jsonl.gz"])
def test_the_usual_stops_cut_what_runs_on_and_leave_the_program_as_it_is(name, passed):
    stops, checks = stops_of(), []
    for number, problem in enumerate(load_problems(data(name), test_split=True)):
        said = problem.canonical_solution
        assert stops.cut(said, problem) == said
        for more in RUN_ON[number % 5 :: 5]:
            text = said.rstrip() + more.format(problem.entry_point)
            cut = stops.cut(text, problem)
            helper = problem.prompt[:3] == '"""' and more in RUN_ON[:2]  # may belong to the answer
            assert (cut == text) == helper
            whole, rest = assemble(problem, text), assemble(problem, cut)
            assert rest.program.rstrip() == whole.program.rstrip()
        checks += [whole, rest] if number % 10 == 0 else []
    verdicts = passed(*checks)
    assert verdicts[::2] == verdicts[1::2] and sum(verdicts) > 0.9 * len(verdicts)


@pytest.mark.parametrize("name", ANSWERS)
def test_the_usual_stops_leave_every_kind_of_answer_its_program(name):
    problem, text, _ = ANSWERS[name]
    stops = stops_of()
    cut = stops.cut(text, problem)
    assert assemble(problem, cut).program.rstrip() == assemble(problem, text).program.rstrip()
    for end in range(len(text)):  # nor do they cut more of a text that is still being written
        assert stops.cut(text[:end], problem) in (cut, text[:end])


BODY, WHOLE = CODEX.canonical_solution, "def f(xs):\n    return g(xs)\n"
HELPED = f"{WHOLE}\ndef g(xs):\n    return 5"


@pytest.mark.parametrize(
    "text, stays",
    [
        (f"{BODY}\n\ndef g():\n    pass\n", f"{BODY}\n"),
        (f"    s = '''\ndef g\n'''\n{BODY}\nif x:\n", f"    s = '''\ndef g\n'''\n{BODY}"),
        (f"    x = [\n@\n]\n# note\n{BODY}\n@x", f"    x = [\n@\n]\n# note\n{BODY}"),
        (f"{HELPED}\nprint(f(1))\nx", HELPED),
        ("import a\nprint(1)\ndef g(xs):\n    pass\n", None),  # f is still to come
        (f"Sure:\n```python\nimport a\n\n{WHOLE}\nprint(1)\n```\n", None),
        (f"```python\n{WHOLE}```\nThe corrected version:\n```python\n{WHOLE}```\n", None),
        (f"<think>\n{WHOLE}\nprint(1)\n</think>\n{WHOLE}", None),
        (f"    def f(xs):\n        return g(xs)\n\ndef g(xs):\n{BODY}", None),
        ("", None),
        ("\ndef g():\n    pass\n", None),
    ],
)
def test_the_usual_stops_count_where_extraction_keeps_nothing_below(text, stays):
    stops = stops_of()
    stays = text if stays is None else stays
    assert stops.cut(text, CODEX) == stays
    assert assemble(CODEX, stays).program.rstrip() == assemble(CODEX, text).program.rstrip()


@pytest.mark.parametrize(
    "changes, texts",
    [
        ({"benchmark": "lab"}, ()),
        ({"benchmark": "leetcode"}, ()),
        ({"prompt_style": "chat"}, ()),
        ({"prompt_style": "deepseek"}, ()),
        ({"verify": "last_number"}, ()),
        ({"stop": [""]}, ()),
        ({"prompt_style": "few_shot"}, ("[DONE]", "\nYou are an expert Python programmer")),
        ({"stop": [r"\ndef", r"\t\\n", "\nx", r"\boxed"]}, ("\ndef", "\t\\n", "\nx", r"\boxed")),
    ],
)
def test_stops_are_the_ones_that_are_given_or_those_of_benchmark_and_style(changes, texts):
    stops = stops_of(**changes)
    assert stops.texts == texts and bool(stops) == bool(texts)
    assert stops.cut("a" + "".join(texts), CODEX) == "a"
    asked = stops_of(**changes | {"stop": ["b", "a"]})  # counts anywhere, in any style
    assert asked.cut("xaby", CODEX) == "x"


def test_a_few_shot_prompt_of_mbpp_goes_on_with_what_its_stops_say():
    problems = load_problems(data("mbpp.jsonl.gz"))
    stops, prompts = stops_of(prompt_style="few_shot"), few_shot_prompts(problems[:1], problems)
    answer = prompts[0].partition("[BEGIN]\n")[2]
    assert stops.cut(answer, problems[0]) == problems[1].canonical_solution.strip() + "\n"
    assert stops.cut(f"x\n\n{problems[0].instruction}", problems[0]) == "x\n"


def test_no_stop_beside_others_is_refused():
    message = refused(stops_of, stop=["", "x"])
    assert message == '--stop: expected strings, or "" alone for none, found both'


# ----------------------------------------------------------------------------- samples, pass@k

ADD = [
    Problem(f"t/{i}", f'def f(x):\n    """Add {i}."""\n', "f", f"    return x + {i}\n", "assert f")
    for i in range(4)
]


def test_prompt_and_completion_make_the_solution():
    whole = "def f(x):\n    return x + 3\n"
    body = "    return x + 3\n\nprint(f(1))\n"
    for response in (body, whole, f"Here it is:\n```python\n{whole}```\nBye."):
        row = sample_row(ADD[3], 2, response)
        assert set(row) == {"task_id", "sample", "completion", "solution", "response"}
        assert row["response"] == response and row["sample"] == 2
        for program in (ADD[3].prompt + row["completion"], row["solution"]):
            names = {}
            exec(program, names)
            assert names["f"](1) == 4


def test_rows_of_others_become_whole_programs_numbered_by_task(tmp_path):
    rows = [
        {"task_id": "t/1", "completion": "    return x + 1\n", "solution": None},
        {"task_id": "t/0", "solution": "def f(x):\n    return x\n", "_identifier": "t/0_0"},
        {"task_id": "t/1", "completion": "    return 0\n"},
    ]
    found = read_samples(write(tmp_path, *rows), ADD[:2])
    assert [(r["task_id"], r["sample"]) for r in found] == [("t/1", 0), ("t/0", 0), ("t/1", 1)]
    assert found[0]["solution"] == ADD[1].prompt + "    return x + 1\n"
    assert found[1]["solution"] == "def f(x):\n    return x\n"
    problems = load_problems(write(tmp_path, MBPP, HUMANEVAL | {"task_id": 7}))
    rows = ({"task_id": task, "solution": ""} for task in (12, "7", 7, "Mbpp/12"))  # numbers too
    found = read_samples(write(tmp_path, *rows), problems)
    assert [row["task_id"] for row in found] == ["Mbpp/12", "7", "7", "Mbpp/12"]


def test_programs_of_others_stand_below_the_setup_but_for_a_future_import(tmp_path):
    problem = Problem("t", ADD[1].prompt, "f", "", "", setup="from typing import *\n")
    code = "from __future__ import annotations\ndef f(x: List[int]):\n    return x\n"
    rows = {"task_id": "t", "solution": code}, {"task_id": "t", "completion": "    return 1\n"}
    first, second = read_samples(write(tmp_path, *rows), [problem])
    names = {}
    exec(first["solution"], names)
    assert names["f"](1) == 1 and names["List"]
    assert second["solution"] == f"{problem.setup}{problem.prompt}    return 1\n"


def test_a_response_alone_is_read_as_a_model_says_it_and_other_texts_as_they_stand(tmp_path):
    code, said = "def f(x):\n    return 2\n", []
    fenced = f"Here it is:\n```python\n{code}```\n"
    kinds = ("response", "solution", "solution", "completion")
    texts = (fenced, fenced, code + "    # not ``` here\n", " \n")
    rows = [{"task_id": "t/1", k: text} for k, text in zip(kinds, texts, strict=True)]
    found = read_samples(write(tmp_path, *rows), ADD[1:2], say=said.append)
    assert [row["solution"] for row in found[:2]] == [code, fenced]
    empty, held = said
    assert "1 of 4 samples are empty" in empty and "1 of 4 samples hold ``` and" in held


@pytest.mark.parametrize(
    "row, message",
    [
        ({"task_id": "t/9", "completion": ""}, "line 2: task_id 't/9' is in no problem: expected"),
        ({"task_id": ["t/1"], "completion": ""}, "line 2: task_id ['t/1'] is in no problem"),
        ({"task_id": "t/1"}, "line 2: expected a string in 'completion', 'solution' or 'response'"),
        ({"task_id": "t/1", "solution": None}, "line 2: expected a string"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(tmp_path, row, message):
    path = write(tmp_path, {"task_id": "t/1", "completion": ""}, row)
    assert message in refused(read_samples, path, ADD)


def test_problems_without_a_sample_are_an_error_unless_they_are_allowed(tmp_path):
    path = write(tmp_path, {"task_id": "t/2", "completion": " 1"})
    message = refused(read_samples, path, ADD)
    assert message.startswith(f"{path}: 3 of 4 problems have no sample, such as ['t/0']: ")
    assert "--allow_partial" in message
    said = []
    assert len(read_samples(path, ADD, allow_partial=True, say=said.append)) == 1
    told = (
        "--allow_partial: 3 of 4 problems have no sample, such as ['t/0']; pass@k leaves them out"
    )
    assert said == [told]
    mbpp = load_problems(write(tmp_path, *(MBPP | {"task_id": i} for i in (2, 11, 12, 601))))
    for tasks, lacking in (((11, 12), 0), ((11,), "1 of 2"), ((11, 601), "2 of 4")):
        path = write(tmp_path, *({"task_id": task, "solution": ""} for task in tasks))
        if lacking:
            assert f"{lacking} problems have no sample" in refused(read_samples, path, mbpp)
        else:
            assert len(read_samples(path, mbpp)) == 2  # a split is whole


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_pass(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_stable_where_the_binomials_overflow():
    exact = 1 - math.comb(9_900, 100) / math.comb(10_000, 100)
    assert pass_at_k(10_000, 100, 100) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("n, c, k", [(5, 2, 6), (5, 2, 0), (0, 0, 1), (5, 6, 1), (5, -1, 1)])
def test_pass_at_k_of_impossible_counts_is_an_error(n, c, k):
    refused(pass_at_k, n, c, k)


def test_interval_is_the_bootstrap_over_problems():
    counts = [(10, 10)] * 200 + [(10, 0)] * 200
    mean, low, high = pass_at_k_interval(counts, 1)
    half_width = 1.96 * 0.5 / math.sqrt(400)
    assert mean == 0.5
    np.testing.assert_allclose([mean - low, high - mean], half_width, rtol=0.15)
    assert pass_at_k_interval(counts, 1) == (mean, low, high)
    assert pass_at_k_interval(counts, 1, seed=1) != (mean, low, high)
    assert pass_at_k_interval([(4, 1)] * 7, 2) == pytest.approx((0.5, 0.5, 0.5))
    assert "no problems" in refused(pass_at_k_interval, [], 1)


def test_a_summary_has_each_k_with_its_problems_and_the_outcomes():
    names = "a a a b".split()
    rows = [{"task_id": name, "passed": name == "a", "outcome": name} for name in names]
    lines = summary(rows, (1, 3, 5)).splitlines()
    assert lines[0] == "4 samples of 2 problems"
    assert lines[1].startswith("pass@1    0.500 [0.000, 1.000]  2 problems")
    assert lines[2].startswith("pass@3    1.000 [1.000, 1.000]  1 problems")
    assert lines[3].endswith("no problem has 5 samples")
    assert [line.split() for line in lines[-2:]] == [["a", "3", "75.0%"], ["b", "1", "25.0%"]]


# ------------------------------------------------------------------------------------ overlap

CODE = '''def mean(values):
    """The arithmetic mean of a list of numbers, or None of an empty one."""
    if not values:  # nothing to divide by
        return None
    return sum(values) / len(values)
'''


def overlap(training, *parts):
    (found,) = overlaps(enumerate(training), [grams(*parts)])
    return found


def test_overlap_is_the_share_of_grams_and_names_the_text_that_has_most():
    tokens = [f"t{i}" for i in range(50)]
    part, whole = " ".join(tokens[:25]), " ".join(tokens)
    assert overlap([part], whole) == (pytest.approx((25 - 12) / (50 - 12)), 0)
    assert overlap([part, "nothing", f"x {whole}"], whole) == (1.0, 2)
    assert overlap(["def mean(values): return 0", "import sum"], CODE) == (0.0, None)


def test_format_comments_and_quotes_hide_nothing():
    other = CODE.replace("    ", "\t").replace('"""', "'''").replace("  # nothing to divide by", "")
    assert overlap(["x = 1", other.upper()], CODE) == (1.0, 1)


def test_a_text_shorter_than_a_gram_is_one_gram():
    assert overlap(["x = 1"], "x=1")[0] == 1.0 and overlap(["x = 1; y = 2"], "x = 1")[0] == 0.0
    assert grams("# only a comment") == set() and overlap(["anything"], "")[0] == 0.0


def test_a_problem_is_found_whether_its_solution_follows_its_prompt_or_stands_elsewhere():
    prompt, solution = CODE.split("    if", 1)
    solution = "    if" + solution
    for training in (CODE, f"{solution}\n# and\n{prompt}"):
        assert overlap([training], prompt, solution)[0] == 1.0
    assert grams(prompt, "pass") == grams(prompt)  # too short to be anybody's
    assert 0 < overlap([prompt], prompt, solution)[0] < 1


def test_texts_are_read_once_and_searched_for_all_problems_together():
    draw = random.Random(0)
    words = [f"name_{i}" for i in range(1000)]
    texts = [" ".join(draw.choices(words, k=100)) for _ in range(100)]
    found = overlaps(((i, text) for i, text in enumerate(texts * 3)), list(map(grams, texts)))
    assert found == [(1.0, i) for i in range(100)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "Write this:\n" + CODE}]},
        {"prompt": "x", "chosen": "y", "rejected": [{"role": "assistant", "content": CODE}]},
    ],
)
def test_a_report_names_the_problem_the_share_and_the_line(tmp_path, capsys, row):
    path = write(tmp_path, {"prompt": "x = 1"}, "", row)
    head, _, tail = CODE.partition('"""\n')
    mean = Problem("t/0", head + '"""\n', "mean", tail, "")
    clean = Problem("t/1", "Nothing like it at all, in so many words.", "", "", "")
    assert report_overlap(path, [mean, clean], tmp_path, 0.5) == 1
    out = capsys.readouterr().out
    assert "2 training texts, 2 problems" in out and "13-grams" in out
    assert "1 problems overlap, 1 by more than 0.5" in out
    written = json.loads((tmp_path / "contamination.json").read_text())["problems"]
    rows = [(r["task_id"], r["line"], r["overlap"]) for r in written]
    assert rows == [("t/0", 3, 1.0), ("t/1", None, 0.0)]
    assert report_overlap(path, [mean], tmp_path, 1.0) == 0  # nothing is more than all
    assert "line 1: not JSON" in refused(report_overlap, write(tmp_path, "x"), [], tmp_path, 1.0)
