"""The truth slot: numbers, verifiers of one's own, tests that no program could pass."""

import json
from types import SimpleNamespace

from pfppo.answers import Examiner
from pfppo.config import UserError
from pfppo.problems import Problem, load_problems, load_prompts, load_verifier
from pfppo.problems.numbers import answer_number, number_of

import pytest
from ranks import forked, refused

LAST = load_verifier("last_number")


def asking(*answers):
    extras = ({"answer": answer} for answer in answers)
    return [Problem(f"q/{i}", "How many?\n", "", "", "", extra=x) for i, x in enumerate(extras)]


def test_math_rows_have_their_answer_in_other_fields_too(tmp_path):
    rows = [
        {"problem": "1 + 1?", "solution": r"So \boxed{2}, not 3."},
        {"Question": "q", "Answer": 2},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_prompts(path)
    LAST.check(problems, "here")
    assert [verdict.passed for verdict in LAST(problems, ["It is 2", "3"])] == [True, False]


def test_rows_with_answers_and_no_tests_are_told_of_the_verifier(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "answer": "#### 7"}\n')
    with pytest.raises(UserError, match="have no 'test', .*: --verify last_number.$"):
        load_problems(tmp_path / "rows.jsonl", verifier=load_verifier("tests"))


def is_right(response, answer):
    (verdict,) = LAST(asking(answer), [response])
    return verdict.passed


# ------------------------------------------------------------------------------- last_number

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = 72.\n#### 72"
RIGHT = {
    72: [GSM8K, "\\boxed{72}", "72.", "She sold 5, so 72!", "**72**", "72 m^2", "72 m2", "72 m²"]
    + [
        "\\boxed{72 \\text{ cm}^{2}}",
        "\\approx72",
        "\\(72\\)",
        "Rs72",
        "US$72",
        "72€",
        "72 dollars",
    ]
    + ["答案是72。", "٧٢", "７２", "<think>5</think>72", "72.00", "7.2e1", "0.72 \\times 10^{2}"],
    "72": [GSM8K, "72.0", "$72"],
    GSM8K: ["72", "So it is 72 clips."],
    "4 m = \\boxed{72} cm in 2 parts": ["72"],
    1234: ["1,234", "$1,234.00", "1{,}234", "1\\,234", "1\u202f234", "1'234", "１，２３４"],
    "1,234,567": ["1234567", "12,34,567"],
    5.5: ["$5.50", "\\$5.5", "5½", "5 1/2", "11/2", "5\\frac{1}{2}"],
    0.1: ["0.1", ".1", "1/10", "10%", "1e-1"],
    -3: ["-3", "so −3", "x=-3", "(-3)", "-$3", "$-3$", "**-3**", "是-3", "- 2 and\n-3"],
    3: ["10-3", "pages 2–3", "5 - 3", "- 3 apples", "3.0", "x_1 = 3"],
    "3/4": ["0.75", "3/4", "\\frac{3}{4}", "\\dfrac34", "¾", "75%"],
    "1/3": ["1/3", "\\frac{1}{3}"],
    50: ["50%", "50 %", "50\\%"],
    "50%": ["50", "0.5", "1/2", "50%"],
    "10:30": ["at 10:30"],
    1024: ["2^10", "2^{10}"],
    1e22: ["10000000000000000000000", "1e22"],
}
WRONG = {
    72: ["", "no idea", "72 and 3", "-72", "72.5", "<think>72", "x72", "1:72", "72π"],
    2: ["H2O", "x_2", "m^2", "\\sqrt{2}", "2\\pi", "\\frac{\\pi}{2}", "1/2", "1.2.2"],
    234: ["1,234"],
    1234: ["1.234", "234"],
    "3/4": ["4", "3", "3:4", "0.7500001"],
    "10/3": ["3.333333333333333333333"],
    0.5: ["5%", "5000%"],
    "50%": ["5", "0.5%"],
    "10:30": ["9:30", "30", "10"],
    9: ["9" * 6000, "1e999999999", "9^999999999", "9/0"],
    0: ["1e-400", "0/0"],
}


@pytest.mark.parametrize("answer", RIGHT, ids=lambda answer: str(answer)[:9])
def test_the_last_number_is_read_as_people_and_models_write_it(answer):
    assert [text for text in RIGHT[answer] if not is_right(text, answer)] == []


@pytest.mark.parametrize("answer", WRONG, ids=str)
def test_what_is_not_exactly_the_answer_is_wrong(answer):
    assert [text for text in WRONG[answer] if is_right(text, answer)] == []


@pytest.mark.parametrize(
    "answer", ["Tom", "", "#### none", "\\sqrt{2}", "2 \\pi", True, None, [72], float("inf"), {}]
)
def test_a_row_whose_answer_is_no_number_is_named(answer):
    expected = (
        r"FILE: 'q/1': --verify last_number needs a number in the field 'answer' or .*, found"
    )
    with pytest.raises(UserError, match=expected):
        LAST.check(asking(72, answer), "FILE")
    assert not is_right("72", answer)


def test_long_responses_are_read_in_linear_time():  # else this takes hours
    for part in (
        "1,",
        "1 ",
        "1/",
        "9",
        "\\frac{",
        "1:",
        "1.",
        "-",
        "10^",
        "{",
        "1e",
        "$",
        "A",
        "^{ ",
    ):
        assert answer_number(part * 20000) is None or part in ("1,", "1 ", "1/", "1.", "1e", "10^")
        number_of(part * 20000)


# ----------------------------------------------------------------------- verifiers of one's own

OWN = """
import json, pathlib
import numpy, torch
with open(pathlib.Path(__file__).with_suffix(".log"), "a") as log:
    log.write("imported ")
def even(responses, problems):
    return [len(response) % 2 == 0 for response in responses]
def reward(answers):
    levels = torch.tensor([float(problem.extra["level"]) for problem in answers.problems])
    return answers.scores + levels + answers.by_model
def oracle(answers):
    levels = [problem.extra["level"] for problem in answers.problems]
    return [score + level for score, level in zip(answers.scores, levels)]
def keep(rewards, generator):
    return torch.ones_like(rewards)
def raises(responses, problems):
    raise KeyError("x")
def leaves(responses, problems):
    exit(3)
def late(responses, problems):
    if any(responses):
        raise KeyError("late")
    return [0] * len(responses)
"""


def own_of(tmp_path, result="[]"):
    text = f"{OWN}\ndef own(responses, problems):\n    return {result}\n"
    (tmp_path / "own.py").write_text(text)
    return f"{tmp_path / 'own.py'}:"


@pytest.mark.parametrize(
    "result",
    [
        *("[True, False]", "(1, 0)", "[1.0, 0.0]", "numpy.array([True, False])"),
        *("[numpy.bool_(True), numpy.int64(0)]", "torch.tensor([True, False])"),
        *("(r == 'a' for r in responses)", "numpy.array([1, 0])", "torch.tensor([1.0, 0.0])"),
        *("[p.extra['answer'] == 1 for p in problems]", "responses.clear() or [1, 0]"),
    ],
)
def test_a_verifier_of_ones_own_gives_bools_of_any_kind(tmp_path, result):
    problems, texts = asking(1, 2), ["a", "b"]
    verdicts = load_verifier(own_of(tmp_path, result) + "own")(problems, texts)
    assert [verdict.passed for verdict in verdicts] == [True, False]
    assert [verdict.outcome for verdict in verdicts] == ["correct", "wrong"]
    assert texts == ["a", "b"]


@pytest.mark.parametrize(
    "result, said",
    [
        ("[True]", "expected 2 bools, one for each response, found 1"),
        ("[0.7, 1]", "expected 2 bools, one for each response, found [0.7] among them"),
        ("[None, True]", "expected 2 bools, one for each response, found [None] among them"),
        ("[2, 1]", "expected 2 bools, one for each response, found [2] among them"),
        ("['yes', 1]", "expected 2 bools, one for each response, found ['yes'] among them"),
        ("[float('nan'), 1]", "expected 2 bools, one for each response, found [nan] among them"),
        (
            "numpy.ones((2, 2))",
            "expected 2 bools, one for each response, found [[1.0, 1.0]] among them",
        ),
        ("None", "TypeError: "),
        ("True", "TypeError: "),
        ("[][0]", "IndexError: list index out of range"),
        ("exit(3)", "SystemExit: 3"),
    ],
)
def test_a_verifier_of_ones_own_that_fails_is_one_line_that_names_it(tmp_path, result, said):
    spec = own_of(tmp_path, result) + "own"
    message = refused(load_verifier(spec).check, asking(1, 2, 3), "FILE")  # tried on two rows
    assert message.startswith(f"--verify {spec}: {said}"), message


def test_an_unknown_verifier_is_one_line():
    known = "expected one of tests, last_number, module:function or file.py:function"
    assert refused(load_verifier, "luck") == f"--verify luck: unknown, {known}"


def test_a_verifier_that_fails_on_one_rank_ends_all_of_them(tmp_path):
    own = own_of(tmp_path, "[0] * (len(responses) - int(__import__('os').environ['RANK']))")
    args = SimpleNamespace(verify=f"{own}own")

    def work(ranks):
        with Examiner(None, args, ranks) as examiner:
            return refused(examiner.scores, asking(1, 2), ["a", "b"])

    for message in forked(work):
        assert "own.py:own: expected 2 bools, one for each response, found 1" in message


@pytest.mark.parametrize(
    "test, said",
    [
        ("def test_add():\n    assert add(1, 2) == 3\n", "runs nothing"),
        ("import unittest\nclass T(unittest.TestCase):\n    pass\n", "runs nothing"),
        ("LIMIT = 3  # to come\n", "runs nothing"),
        ("found = add(1, 2)\n", ""),  # that it ends is all that is asked
        ("def check(candidate:\n    pass\n", "is no Python"),
        ("class T:\n    pass\nT()\n", ""),
        ("for i in range(3):\n    assert add(i, 0) == i\n", ""),
        ("def check(candidate):\n    assert candidate(1)\n", ""),
    ],
)
def test_tests_that_no_program_could_pass_are_told(test, said):
    """Not called wrong answers, one by one."""
    check, problem = load_verifier("tests").check, Problem("t", "", "add", "", test)
    if said:
        assert refused(check, [problem], "f.jsonl").startswith(f"f.jsonl: 't': 'test' {said}")
    else:
        check([problem], "f.jsonl")
