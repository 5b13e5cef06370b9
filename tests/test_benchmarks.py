"""Loaders against real and broken files, programs, pass@k.

Programs are mostly run by plain `exec`: all of them stand here or are reference solutions.
"""

import gzip
import itertools
import json
import math
from pathlib import Path

from pfppo.problems.benchmarks import Problem, assemble, check_of, few_shot_prompts, instruction_of, load_problems, pass_at_k, pass_at_k_interval, read_jsonl, reference_check
from pfppo.config import UserError
from pfppo.sandbox import Sandbox

import numpy as np
import pytest
from test_extract import BARE, CODEX, STUB

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


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------ programs


def test_check_has_the_reference_and_leaves_a_given_program_alone():
    program = "def f(xs):\n    return 5\nprint(1)\n"
    check = check_of(CODEX, program)
    assert check.program == program
    assert check.reference == CODEX.prompt + CODEX.canonical_solution
    assert check.entry_point == "f"
    run(check)
    run(reference_check(CODEX))
    run(assemble(CODEX, CODEX.canonical_solution))


def test_a_whole_canonical_solution_replaces_the_prompts_signature():
    assert reference_check(BARE).program == "def f(xs): return 5\n"
    run(reference_check(BARE))


def test_reference_without_a_solution_still_has_the_prompts_names():
    names = {}
    exec(check_of(STUB, "").reference, names)
    assert {"Node", "Solution", "deque"} <= set(names)
    with pytest.raises(UserError, match="T/1 has no reference solution"):
        reference_check(STUB)


# ---------------------------------------------------------------------------------- real files


def test_humaneval_references_pass_in_three_styles():
    problems = load_problems(data("HumanEval.jsonl.gz"))
    assert len(problems) == 164
    for problem in problems:
        whole = problem.prompt + problem.canonical_solution
        body = assemble(problem, problem.canonical_solution + "\n\nif x:\n    it's")
        assert body.program == check_of(problem, "").reference + "\n\n"
        fenced = assemble(problem, f"Here you are:\n```python\n{whole}\n```\nThat's it.")
        bare = assemble(problem, f"Here you are:\n\n{whole}\nThat's it.")
        for check in (body, fenced, bare):
            run(check)


def test_humaneval_pass_fails_everywhere():
    for problem in load_problems(data("HumanEval.jsonl.gz")):
        with pytest.raises((AssertionError, TypeError, AttributeError)):
            run(assemble(problem, "    pass\n"))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in the references
def test_mbpp_full_form():
    problems = load_problems(data("mbpp.jsonl.gz"), "mbpp")
    test = load_problems(data("mbpp.jsonl.gz"), "mbpp", test_split=True)
    assert len(problems) == 974 and [p.task_id for p in test] == [
        f"Mbpp/{i}" for i in range(11, 511)
    ]
    shots = few_shot_prompts(test[:2], problems)
    assert [text.count("[BEGIN]") for text in shots] == [4, 4] and shots[0].endswith("[BEGIN]\n")
    assert shots[0].count("[DONE]") == 3 and test[1].instruction in shots[1]
    by_id = {p.task_id: p for p in problems}
    assert by_id["Mbpp/126"].entry_point == "sum"
    for problem in problems:
        assert "\r" not in problem.canonical_solution + problem.test
        compile(problem.prompt + problem.canonical_solution, problem.task_id, "exec")
        assert f"{problem.entry_point}" in problem.instruction
    some = problems[5::25] + [by_id[f"Mbpp/{i}"] for i in (64, 126, 367, 533, 596, 927)]
    for problem in some:
        run(reference_check(problem))
        run(assemble(problem, problem.canonical_solution))
        run(assemble(problem, f"[BEGIN]\n{problem.canonical_solution}\n[DONE]\n\nYou are"))


def test_leetcode_contest_form():
    problems = load_problems(data("leetcode_contest_2023-07_2024-01.jsonl.gz"), "leetcode")
    assert len(problems) == 180
    for problem in problems:
        check = assemble(problem, "\n        return None\n\nIt's done.")
        names = {}
        exec(check.program, names)
        assert callable(eval(check.entry_point, names))
        compile(check.reference, problem.task_id, "exec")
        assert "```python\nclass" in problem.instruction or "ListNode" in problem.instruction


def test_leetcode_dataset_form():
    problems = load_problems(data("LeetCodeDataset-v0.3.1-test.jsonl.gz"), "leetcode")
    assert len(problems) == 228
    for problem in problems:
        compile(problem.setup + problem.prompt + "pass", problem.task_id, "exec")
    light = [p for p in problems if "sortedcontainers" not in p.setup + p.canonical_solution]
    assert len(light) == 210  # the others need a package
    for problem in light[:12]:
        run(reference_check(problem))
        run(assemble(problem, f"So:\n```python\n{problem.canonical_solution}```"))


# ---------------------------------------------------------------------------- forms, written here

HUMANEVAL = {
    "task_id": "A/1",
    "prompt": 'def two(x):\n    """Twice."""\n',
    "entry_point": "two",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
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


def test_leetcodes_usual_names_need_no_import(tmp_path):
    (problem,) = load_problems(write(tmp_path / "contest.jsonl", [CONTEST]), "leetcode")
    names = "deque, heappush, bisect_left, accumulate, lru_cache, Optional, inf, re, math.comb"
    run(assemble(problem, f"{names}\n        return pow(2, 5, 27) if gcd(4, 6) == 2 else 0\n"))


def test_a_task_text_survives_as_a_docstring(tmp_path):
    text = 'Split """a""" at \\d and \\x'
    (problem,) = load_problems(write(tmp_path / "mbpp.jsonl", [MBPP | {"text": text}]), "mbpp")
    assert eval(problem.prompt.strip()) == f"\n{text}\nassert two(SET) == 4\n"


@pytest.mark.parametrize("row", [MBPP, SANITIZED, EVALPLUS, HUGGING])
def test_each_form_of_mbpp_is_one_problem(tmp_path, row):
    (problem,) = load_problems(write(tmp_path / "mbpp.jsonl", [row]), "mbpp")
    assert (problem.task_id, problem.entry_point) == ("Mbpp/12", "two")
    assert "task: Double. Your code" in problem.instruction and "two(" in problem.prompt
    run(reference_check(problem))
    with pytest.raises(AssertionError):
        run(assemble(problem, "def two(x):\n    return x"))


def test_the_hugging_face_form_of_mbpp_plus_runs_its_extra_inputs(tmp_path):
    (problem,) = load_problems(write(tmp_path / "mbpp.jsonl", [HUGGING]), "mbpp")
    with pytest.raises(AssertionError):
        run(assemble(problem, "def two(x):\n    return 4"))


def test_the_test_split_is_googles_and_not_of_evalplus_selection(tmp_path):
    ids = (2, 11, 510, 511)
    for form, wanted in (
        (MBPP, [11, 510]),
        (SANITIZED, [11, 510]),
        (HUGGING, [2, 11, 510, 511]),
        (EVALPLUS, [2, 11, 510, 511]),
    ):
        named = [f"Mbpp/{i}" if form is EVALPLUS else i for i in ids]
        path = write(tmp_path / "mbpp.jsonl", [form | {"task_id": name} for name in named])
        found = load_problems(path, "mbpp", test_split=True)
        assert [p.task_id for p in found] == [f"Mbpp/{i}" for i in wanted]
        assert len(load_problems(path, "mbpp")) == 4
    path = write(tmp_path / "mbpp.jsonl", [MBPP | {"task_id": 700}])
    assert len(load_problems(path, "mbpp", test_split=True)) == 1  # better than nothing


def test_few_shots_need_their_three_tasks(tmp_path):
    rows = [MBPP | {"task_id": i} for i in (2, 4, 11)]
    problems = load_problems(write(tmp_path / "mbpp.jsonl", rows), "mbpp")
    with pytest.raises(UserError, match=r"few_shot: the problems have no task \['Mbpp/3'\]"):
        few_shot_prompts(problems[2:], problems)


def test_an_instruction_is_the_files_own_or_the_prompt_in_a_block(tmp_path):
    (problem,) = load_problems(write(tmp_path / "h.jsonl", [HUMANEVAL]))
    text = instruction_of(problem)
    assert text.startswith("Please continue to complete the function.")
    assert text.endswith(f"```python\n{problem.prompt.strip()}\n```")
    (problem,) = load_problems(write(tmp_path / "m.jsonl", [MBPP]), "mbpp")
    assert instruction_of(problem) == problem.instruction
    assert instruction_of(Problem("x", "Say hello.", "", "", "")) == "Say hello."


PLUS = HUMANEVAL | {
    "prompt": 'def root(x):\n    return x**0.5\n\ndef two(x):\n    """Twice."""\n',
    "base_input": [[2], [0.5]],
    "plus_input": [[-3], [[1, [0.1]]], ["a'\"\\n"]],
    "atol": 0,
}


@pytest.mark.parametrize(
    ("body", "passes"),
    [
        ("return 2 * x", True),
        ("return x + x", True),
        ("return 2 * x if x != -3 else 0", False),
        ("return 2 * x if x != 0.5 else 1.0000001", True),  # EvalPlus's tolerance for floats
        ("return 2 * x if x != 0.5 else 1.001", False),
        ("return 2 * x if not isinstance(x, str) else x", False),
        ("return 2 * x if not isinstance(x, list) else (2 * x)[:3]", False),
    ],
)
def test_evalplus_own_humaneval_form_compares_with_the_reference_on_all_inputs(
    tmp_path, body, passes
):
    (problem,) = load_problems(write(tmp_path / "plus.jsonl", [PLUS]))
    with Sandbox(workers=1) as sandbox:
        verdicts = sandbox.run([reference_check(problem), assemble(problem, f"    {body}\n")])
    assert [v.passed for v in verdicts] == [True, passes], verdicts


def test_one_array_of_objects_is_read_as_rows(tmp_path):
    path = tmp_path / "sanitized.json"
    path.write_text(json.dumps([SANITIZED, SANITIZED | {"task_id": 13}], indent=2))
    assert [p.task_id for p in load_problems(path, "mbpp")] == ["Mbpp/12", "Mbpp/13"]


def test_gzip_blank_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "packed.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8"}'))
    assert read_jsonl(path) == [(1, {"a": 1}), (4, {"a": "\u2028"})]


BROKEN = [  # content, form, what the message says after the file's name
    (b"", "humaneval", ": no rows"),
    (b"\n \n", "humaneval", ": no rows"),
    (b'{"a": 1}\n\n{"a": \n', "humaneval", ", line 3: not JSON"),
    (b"[" * 100_000, "humaneval", ", line 1: not JSON"),
    (b'[{"a": 1},', "humaneval", ", line 1: not JSON"),
    (b'[{"a": 1}, 2]', "humaneval", ", line 2: expected an object {...}, found a number"),
    (b"[1]\n", "humaneval", ", line 1: expected an object {...}, found a list"),
    (b"null\n", "humaneval", ", line 1: expected an object {...}, found null"),
    (b"{}\n\xff\xfe", "humaneval", ", line 2: not UTF-8 text"),
    (b"\x1f\x8b\x08rest", "humaneval", ": cannot be read"),
    (gzip.compress(b'{"a": 1}')[:-6], "humaneval", ": cannot be read"),
    (b"{}", "humaneval", ", line 1: field 'prompt' is missing (expected a string (may be empty)"),
    (
        b'{"text": 1, "task_id": 1}',
        "mbpp",
        ", line 1: field 'text': expected a string, found a num",
    ),
    (
        b'{"task_id": 2.5}',
        "mbpp",
        "line 1: field 'task_id': expected a number or a string, found a",
    ),
    (b'{"task_id": "a", "prompt": "b", "test": "c"}', "leetcode", "needs 'prompt_sft' (DeepSeek"),
    (b'{"task_id": "a", "prompt": "b", "test": "c", "prompt_sft": ""}', "leetcode", "my_solution"),
]


@pytest.mark.parametrize("content, form, message", BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path, content, form, message):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_problems(path, form)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_unknown_form_are_named(tmp_path):
    with pytest.raises(UserError, match="none.jsonl: cannot be read .No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="'apps' is unknown: expected one of humaneval, mbpp, leet"):
        load_problems(tmp_path / "none.jsonl", "apps")


MAY_LACK = ("entry_point", "canonical_solution")


@pytest.mark.parametrize("field", list(HUMANEVAL))
def test_a_missing_or_wrong_field_is_named(tmp_path, field):
    for value, found in ((None, "found null"), (3, "found a number"), ([], "found a list")):
        if value is None and field in MAY_LACK:
            continue
        path = write(tmp_path / "p.jsonl", [HUMANEVAL, HUMANEVAL | {"task_id": "B", field: value}])
        with pytest.raises(UserError, match=f"p.jsonl, line 2: field '{field}': expected.*{found}"):
            load_problems(path)
    if field not in MAY_LACK:
        row = {name: value for name, value in HUMANEVAL.items() if name != field}
        with pytest.raises(UserError, match=f"p.jsonl, line 1: field '{field}' is missing"):
            load_problems(write(tmp_path / "p.jsonl", [row]))


@pytest.mark.parametrize(
    "row, message",
    [
        (MBPP | {"task_id": "twelve"}, "'task_id': expected 11 or 'Mbpp/11', found 'twelve'"),
        (MBPP | {"test_list": []}, "field 'test_list': expected a list, found an empty one"),
        (
            MBPP | {"test_list": ["assert 1", 2]},
            "expected a list of strings, found .'a number'. in",
        ),
        (MBPP | {"test_list": "assert"}, "field 'test_list': expected a list, found a string"),
        (MBPP | {"code": "two = 2"}, "call no function that the reference defines"),
        (EVALPLUS | {"entry_point": "three"}, "call no function that the reference defines"),
        (MBPP | {"test_setup_code": 1}, "field 'test_setup_code': expected a string or a list"),
    ],
)
def test_a_wrong_field_of_mbpp_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=f"mbpp.jsonl, line 1: .*{message}"):
        load_problems(write(tmp_path / "mbpp.jsonl", [row]), "mbpp")


def test_a_repeated_task_id_names_both_lines(tmp_path):
    path = write(tmp_path / "p.jsonl", [HUMANEVAL, HUMANEVAL])
    with pytest.raises(UserError, match="p.jsonl, line 2: task_id 'A/1' was on line 1 already"):
        load_problems(path)


@pytest.mark.parametrize("prompt, solution", [("", ""), ("def two(x):\n", "return ("), ("\0", "")])
def test_a_problem_without_a_usable_reference_has_none(tmp_path, prompt, solution):
    row = HUMANEVAL | {"prompt": prompt, "canonical_solution": solution}
    (problem,) = load_problems(write(tmp_path / "p.jsonl", [row]))
    check = check_of(problem, "def two(x):\n    return x * 2\n")
    assert check.reference == ""
    run(check)


# ---------------------------------------------------------------------------------------- pass@k


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
    with pytest.raises(UserError):
        pass_at_k(n, c, k)


def test_interval_is_the_bootstrap_over_problems():
    counts = [(10, 10)] * 200 + [(10, 0)] * 200
    mean, low, high = pass_at_k_interval(counts, 1)
    half_width = 1.96 * 0.5 / math.sqrt(400)
    assert mean == 0.5
    np.testing.assert_allclose([mean - low, high - mean], half_width, rtol=0.15)
    assert pass_at_k_interval(counts, 1) == (mean, low, high)
    assert pass_at_k_interval(counts, 1, seed=1) != (mean, low, high)


def test_interval_of_equal_problems_has_no_width_and_of_none_is_an_error():
    assert pass_at_k_interval([(4, 1)] * 7, 2) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(UserError, match="no problems"):
        pass_at_k_interval([], 1)


def test_a_problem_may_lack_entry_point_and_reference(tmp_path):
    row = {"task_id": "A", "prompt": "", "test": "assert f(1) == 2", "entry_point": None}
    (problem,) = load_problems(write(tmp_path / "p.jsonl", [row]))
    assert (problem.entry_point, problem.canonical_solution) == ("", "")
    programs = ["def f(x):\n    return x + 1\n", "def f(x):\n    return x\n"]
    with Sandbox(workers=1) as sandbox:
        found = sandbox.run([check_of(problem, program) for program in programs])
    assert [verdict.passed for verdict in found] == [True, False]


@pytest.mark.parametrize(
    "response",
    [
        "```python\ndef inc(self, x: int) -> int:\n    return x + 1\n```",
        "```python\n    def inc(self, x: int) -> int:\n        return x + 1\n```",
        "    def inc(self, x):\n        return x + 1\n",
        "def inc(self, x):\n    return x + 1\n\nThis adds one.",
        "import math\ndef inc(self, x):\n    return math.ceil(x + 0.5)",
        "So:\n```py\ndef inc(self, x):\n    return self.h(x)\ndef h(self, x): return x + 1\n```",
        "return x + 1",
        "def inc(x):\n            return x + 1\n        return inc(x)\n",
    ],
)
def test_a_method_may_be_repeated_without_its_class(response):
    stub = "class Solution:\n    def inc(self, x: int) -> int:\n        "
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    problem = Problem("t", stub, "Solution().inc", "return x + 1\n", test)
    with Sandbox(workers=1) as sandbox:
        assert sandbox.run([assemble(problem, response)])[0].passed


def test_leetcodes_tests_in_humanevals_form_have_its_usual_names(tmp_path):
    row = {"task_id": "A", "prompt": "", "entry_point": "Solution", "canonical_solution": ""}
    row["test"] = "my_solution = Solution()\nassert my_solution.twice(nums=[1]) == [1, 1]\n"
    (problem,) = load_problems(write(tmp_path / "p.jsonl", [row]))
    code = "class Solution:\n    def twice(self, nums: List[int]):\n        return nums * {}\n"
    with Sandbox(workers=1) as sandbox:
        found = sandbox.run([assemble(problem, code.format(times)) for times in (2, 3)])
    assert [verdict.passed for verdict in found] == [True, False]
