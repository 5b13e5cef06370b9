"""Samples become programs, of ours and of others; pass@k, its interval and the summary."""

import itertools
import math

from pfppo.problems import Problem, load_problems
from pfppo.problems.programs import pass_at_k, pass_at_k_interval, read_samples, sample_row, summary

import numpy as np
import pytest
from conftest import write
from ranks import refused
from test_problems import HUMANEVAL, MBPP

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
