"""Problems in the forms of the benchmarks: their files, their splits, their references."""

from pathlib import Path

from pfppo.problems import assemble, check_of, load_problems, load_prompts
from pfppo.problems.messages import few_shot_prompts, prompt_text

import pytest
from conftest import write
from ranks import refused
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


def reference_check(problem):
    """The problem's own solution as the candidate."""
    return check_of(problem, check_of(problem, "").reference)


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
