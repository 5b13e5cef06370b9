"""Answers and their marks."""

import math

from pfppo.problems.benchmarks import Problem
from pfppo.examine import Examiner, execute, scores_of
from pfppo.sandbox import Sandbox, Verdict
from pfppo.lab.world import draw_problems

import pytest
from conftest import EOS, tiny_lm, tiny_tokenizer


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1) as sandbox:
        yield sandbox


def test_references_pass_wrong_answers_fail_and_untested_problems_have_no_mark(sandbox):
    first, second = draw_problems(3, "test", 2)
    untested = Problem("x", "def f():\n", "", "", "")
    texts = [first.canonical_solution, "    return None\n", "    return 1\n"]
    verdicts = execute([first, second, untested], texts, sandbox)
    scores = scores_of(verdicts).tolist()
    assert scores[:2] == [1.0, 0.0] and verdicts[2] is None and math.isnan(scores[2])


def test_scores_keep_the_order():
    verdicts = [Verdict("passed", 0.1), None, Verdict("timeout", 3.0)]
    scores = scores_of(verdicts).tolist()
    assert scores[0] == 1 and math.isnan(scores[1]) and scores[2] == 0


def test_an_examination_answers_every_problem_and_repeats(sandbox, ranks):
    tokenizer = tiny_tokenizer()
    problems = [Problem(str(i), "a b", "", "", "") for i in range(3)]
    prompts = [[3 + i, 4] for i in range(3)]
    examiner = Examiner(tokenizer, [EOS], sandbox, ranks, seed=1, max_new_tokens=5)
    model = tiny_lm("llama")
    groups = examiner(model, problems, prompts, "tag", 1.0, samples=2)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert not any(answer.passed for group in groups for answer in group)
    assert groups == examiner(model, problems, prompts, "tag", 1.0, samples=2)
    other = examiner(model, problems, prompts, "another tag", 1.0, samples=2)
    assert [a.ids for g in groups for a in g] != [a.ids for g in other for a in g]
