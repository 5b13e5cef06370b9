"""An evaluation's files are complete, in order, and go on from wherever a run was stopped."""

import json
import threading
import time
from dataclasses import replace

from pfppo import evaluation
from pfppo.problems.benchmarks import Problem
from pfppo.config import UserError
from pfppo.sandbox import Sandbox, Verdict

import pytest

PROBLEMS = [
    Problem(
        f"t/{i}",
        f'def f(x):\n    """Add {i}."""\n',
        "f",
        f"    return x + {i}\n",
        f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
    )
    for i in range(7)
]


class Judge:
    """Stands for the sandbox: passes what ends in its own number; counts and can be slow."""

    def __init__(self):
        self.seen, self.closed, self.busy = [], False, threading.Event()

    def run(self, checks, progress=None):
        self.busy.set()
        self.seen += [check.program for check in checks]
        progress(len(checks))
        return [
            Verdict("passed" if "+ 0" in c.program else "wrong_answer", 0.01, "") for c in checks
        ]

    def close(self):
        self.closed = True


def row(i, j, text="    return x + 0\n"):
    return evaluation.sample_row(PROBLEMS[i], j, text)


def rows_of(first, last, group):
    return [row(i, j) for i in range(first, last) for j in range(group)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_every_sample_is_answered_once_executed_once_and_written_in_order(
    ranks, tmp_path, group, batch
):
    judge, rows, asked = Judge(), [], []

    def answer(first, last):
        asked.append((first, last))
        return rows_of(first, last, group)

    results = evaluation.fill(tmp_path, PROBLEMS, rows, answer, group, batch, judge, ranks)
    keys = [(f"t/{i}", j) for i in range(7) for j in range(group)]
    assert [(r["task_id"], r["sample"]) for r in results] == keys
    assert read(tmp_path / "results.jsonl") == results and read(tmp_path / "samples.jsonl") == rows
    assert all(set(r) == {"task_id", "sample", "passed", "outcome", "seconds"} for r in results)
    assert len(judge.seen) == 7 * group and not judge.closed
    assert [i for first, last in asked for i in range(first, last)] == list(range(7))
    assert all((last - first) * group <= max(batch, group) for first, last in asked)


@pytest.mark.parametrize("samples_left", range(0, 15, 3))
@pytest.mark.parametrize("results_left", range(0, 15, 3))
def test_what_is_there_is_not_done_again(ranks, tmp_path, samples_left, results_left):
    whole, wanted = tmp_path / "whole", rows_of(0, 7, 2)
    whole.mkdir()
    how = PROBLEMS, [], lambda a, b: rows_of(a, b, 2), 2, 4, Judge(), ranks
    finished = evaluation.fill(whole, *how)
    results_left = min(results_left, samples_left)
    for name, count in (("samples.jsonl", samples_left), ("results.jsonl", results_left)):
        lines = (whole / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:count]) + '{"task_id": "t/')  # cut by a kill
    judge, asked = Judge(), []

    def answer(first, last):
        asked.extend(range(first, last))
        return rows_of(first, last, 2)

    rows = evaluation.left(tmp_path / "samples.jsonl", 2, ranks)
    results = evaluation.fill(tmp_path, PROBLEMS, rows, answer, 2, 4, judge, ranks)
    assert results == finished == read(tmp_path / "results.jsonl")
    assert rows == wanted == read(tmp_path / "samples.jsonl")
    assert asked == list(range(samples_left // 2, 7))
    assert len(judge.seen) == 14 - results_left // 2 * 2


def test_one_chunk_is_executed_while_the_next_is_answered(ranks, tmp_path):
    judge = Judge()

    def answer(first, last):
        assert first == 0 or judge.busy.wait(5)  # the chunk before is with the judge by now
        return rows_of(first, last, 1)

    assert len(evaluation.fill(tmp_path, PROBLEMS, [], answer, 1, 1, judge, ranks)) == 7


def test_a_failure_does_not_wait_for_the_tests_under_way(ranks, tmp_path):
    def answer(first, last):
        if first:
            raise UserError("no more")
        return [row(0, 0, "    while True: pass\n")]

    start = time.monotonic()
    with Sandbox(workers=1, timeout=60) as sandbox, pytest.raises(UserError, match="no more"):
        evaluation.fill(tmp_path, PROBLEMS, [], answer, 1, 1, sandbox, ranks)
    assert time.monotonic() - start < 30
    assert len(read(tmp_path / "samples.jsonl")) == 1


@pytest.mark.parametrize(
    "response",
    [
        "    return x + 3\n",
        "    return x + 3\n\nprint(f(1))\n",
        "Here it is:\n```python\ndef f(x):\n    return x + 3\n```\nBye.",
        "def f(x):\n    return x + 3\n",
    ],
)
def test_prompt_and_completion_make_the_solution(response):
    problem = PROBLEMS[3]
    made = evaluation.sample_row(problem, 2, response)
    assert set(made) == {"task_id", "sample", "completion", "solution", "response"}
    assert made["response"] == response and made["sample"] == 2
    for program in (problem.prompt + made["completion"], made["solution"]):
        names = {}
        exec(program, names)
        assert names["f"](1) == 4


def test_rows_of_others_become_whole_programs_numbered_by_task(tmp_path):
    file = tmp_path / "theirs.jsonl"
    theirs = [
        {"task_id": "t/1", "completion": "    return x + 1\n"},
        {"task_id": "t/0", "solution": "def f(x):\n    return x\n", "_identifier": "t/0_0"},
        {"task_id": "t/1", "completion": "    return 0\n"},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in theirs))
    rows = evaluation.read_samples(file, PROBLEMS)
    assert [(r["task_id"], r["sample"]) for r in rows] == [("t/1", 0), ("t/0", 0), ("t/1", 1)]
    assert rows[0]["solution"] == PROBLEMS[1].prompt + "    return x + 1\n"
    assert rows[1]["solution"] == "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task_id": "t/9", "completion": ""}, "line 2: task_id 't/9' is in no problem"),
        ({"task_id": "t/1"}, "line 2: expected a string in 'completion' or 'solution'"),
        ({"task_id": "t/1", "solution": None}, "line 2: expected a string"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, message):
    file = tmp_path / "theirs.jsonl"
    good = {"task_id": "t/1", "completion": ""}
    file.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(UserError, match=message):
        evaluation.read_samples(file, PROBLEMS)


def test_solutions_with_a_future_import_stand_after_the_setup(tmp_path):
    setup = "from typing import *\n"
    problem = replace(PROBLEMS[1], setup=setup)
    file = tmp_path / "theirs.jsonl"
    code = "from __future__ import annotations\ndef f(x: List[int]):\n    return x\n"
    good = {"task_id": "t/1", "solution": None, "completion": "    return x + 1\n"}
    file.write_text(f"{json.dumps({'task_id': 't/1', 'solution': code})}\n{json.dumps(good)}\n")
    first, second = evaluation.read_samples(file, [problem])
    names = {}
    exec(first["solution"], names)
    assert names["f"](1) == 1 and names["List"]
    assert second["solution"] == setup + problem.prompt + good["completion"]
