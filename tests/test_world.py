"""The lab's world: problems that their references pass and common bugs fail, and its corpus.

Programs are run here by plain `exec`: all of them are our own.
"""

import itertools
import random
from collections import Counter
from unittest.mock import Mock

from pfppo.lab import world
from pfppo.lab.world import DOMAINS, Task, body, draw_corpus, draw_problems, draw_task

import pytest

SPLITS = ("train", "validation", "test")
STEPS = [(v, step) for v, (steps, ends) in DOMAINS.items() for step in (*steps, *ends)]
BUGGY = [(variable, step) for variable, step in STEPS if step.wrong]
each_step = pytest.mark.parametrize("variable, step", STEPS, ids=[step.name for _, step in STEPS])
RNG = random.Random(7)
INPUTS = {  # others than those of the problems' tests
    "xs": [[RNG.randint(-6, 9) for _ in range(RNG.randint(0, 8))] for _ in range(100)],
    "s": ["".join(RNG.choices("aAeb  ", k=RNG.randint(0, 8))) for _ in range(100)],
}


def answers(source, inputs):
    """What `solve` of a source makes of each tuple of arguments; an exception is an answer too."""
    scope, known = {}, []
    exec(source, scope)
    for arguments in inputs:
        try:
            known.append(repr(scope["solve"](*arguments)))
        except Exception as error:
            known.append(repr(error))
    return known


def passes(problem, solution):
    scope = {}
    exec(problem.prompt + solution + "\n" + problem.test, scope)
    try:
        scope["check"](scope[problem.entry_point])
    except Exception:
        return False
    return True


@pytest.fixture(scope="module")
def many():
    return [problem for split in SPLITS for problem in draw_problems(5, split, 80)]


@pytest.fixture(scope="module")
def mutants(many):
    """[(step, whether it passes, whether it changes any answer)]: references with one wrong form"""
    seen = []
    for problem in many:
        right, wrong = problem.canonical_solution, {}
        takes_k, variable = ", k)" in problem.prompt, "xs" if "(xs" in problem.prompt else "s"
        inputs = [(x, 1 + i % 4) if takes_k else (x,) for i, x in enumerate(INPUTS[variable])]
        for step in (step for v, step in BUGGY if v == variable):
            for k, line in itertools.product("234k", (f"    {variable} = %s\n", "    return %s\n")):
                old, new = (line % form.replace("{k}", k) for form in (step.right[0], step.wrong))
                if old in right:
                    wrong[step.name] = right.replace(old, new)
        for name, solution in wrong.items():
            before, after = (answers(problem.prompt + s, inputs) for s in (right, solution))
            seen.append((name, passes(problem, solution), before != after))
    return seen


def test_references_pass_their_own_tests(many):
    assert [p.task_id for p in many if not passes(p, p.canonical_solution)] == []


def test_tests_catch_nearly_every_common_bug_that_changes_any_answer(mutants):
    seen = Counter(name for name, _, changed in mutants if changed)
    caught = Counter(name for name, passed, changed in mutants if changed and not passed)
    assert set(seen) == {step.name for _, step in BUGGY}
    assert {name for name in seen if caught[name] <= seen[name] / 2} == set()
    assert caught.total() >= 0.95 * seen.total()


def test_a_common_bug_that_passes_means_the_same_as_the_reference(mutants):
    passed = [changed for _, passed, changed in mutants if passed]
    assert len(passed) < 0.35 * len(mutants)  # as in: rotate, return the sum
    assert sum(passed) <= 0.01 * len(passed)


def test_a_body_that_returns_its_argument_or_a_constant_rarely_passes(many):
    for solution in ("    return xs\n", "    return 0\n", "    return []\n"):
        assert sum(passes(problem, solution) for problem in many) < 0.05 * len(many)


def test_a_problem_has_several_different_tests(many):
    for problem in many:
        asserts = [line for line in problem.test.split("\n") if "assert" in line]
        assert 4 <= len(asserts) <= 8 and len(set(asserts)) == len(asserts)


def test_prompts_differ_and_leave_out_those_already_taken(many):
    first = [problem.prompt for problem in many[:80]]
    assert len(set(first)) == len(first)
    again = next(draw_problems(5, "train", 1, taken=first[:1]))
    assert again.prompt == first[1] and again.task_id == "lab/train/0"


def test_problems_are_a_function_of_seed_and_split_named_by_split_and_place(many):
    state = random.getstate()
    assert list(draw_problems(5, "train", 10)) == many[:10]
    assert random.getstate() == state  # nothing is drawn from the global state
    assert next(draw_problems(6, "train", 1)).prompt != many[0].prompt != many[160].prompt
    assert [p.task_id for p in many] == [f"lab/{split}/{i}" for split in SPLITS for i in range(80)]


def test_splits_have_no_composition_and_no_program_in_common():
    rng, splits = random.Random(3), {}
    for split in SPLITS:
        for task in (draw_task(rng, split) for _ in range(1500)):
            names = " ".join(step.name for step in task.steps)
            for key in (task.variable + " " + names, program(task)):
                splits.setdefault(key, set()).add(split)
    assert [key for key, of in splits.items() if len(of) > 1] == []


def program(task):
    return body(task, [step.right[0] for step in task.steps])


def test_a_problem_is_of_the_split_that_was_asked_for_and_the_corpus_of_training(monkeypatch):
    draw = Mock(side_effect=draw_task)
    monkeypatch.setattr(world, "draw_task", draw)
    world.draw_problem(random.Random(0), "validation", "t")
    draw_corpus(0, 5)
    asked = [call.args[1] for call in draw.call_args_list]
    assert set(asked[:-5]) == {"validation"} and asked[-5:] == ["train"] * 5


def test_about_a_tenth_of_the_compositions_is_for_testing():
    rng, (steps, ends) = random.Random(3), DOMAINS["xs"]
    drawn = [(*rng.sample(steps, 2), rng.choice(ends)) for _ in range(1500)]
    splits = Counter(Task("xs", chosen, ("2", "2", "2")).split for chosen in drawn)
    assert 0.07 < splits["test"] / 1500 < 0.13 and 0.07 < splits["validation"] / 1500 < 0.13


XS, S, K = [3, -2, 3, 8, 0, -5, 4], " To be aEx ", 3
MEANING = {  # what the words ask for, worked out by hand for XS or S and K
    **{"evens": [-2, 8, 0, 4], "odds": [3, 3, -5], "multiples": [3, 3, 0]},
    **{"above": [8, 4], "at_most": [3, -2, 3, 0, -5], "add": [6, 1, 6, 11, 3, -2, 7]},
    **{"times": [9, -6, 9, 24, 0, -15, 12], "square": [9, 4, 9, 64, 0, 25, 16]},
    **{"negate": [-3, 2, -3, -8, 0, 5, -4], "modulo": [0, 1, 0, 2, 0, 1, 1]},
    **{"absolute": [3, 2, 3, 8, 0, 5, 4], "floor": [3, 0, 3, 8, 0, 0, 4]},
    **{"cap": [3, -2, 3, 3, 0, -5, 3], "double_evens": [3, -4, 3, 16, 0, -5, 8]},
    **{"ascending": [-5, -2, 0, 3, 3, 4, 8], "descending": [8, 4, 3, 3, 0, -2, -5]},
    **{"reverse": [4, -5, 0, 8, 3, -2, 3], "drop_first": [8, 0, -5, 4]},
    **{"take_first": [3, -2, 3], "take_last": [0, -5, 4], "every": [3, 8, 4]},
    **{"unique": [3, -2, 8, 0, -5, 4], "running": [3, 1, 4, 12, 12, 7, 11]},
    **{"differences": [-5, 5, 5, -8, -5, 9], "trim": [-2, 3, 8, 0, -5]},
    **{"rotate": [-2, 3, 8, 0, -5, 4, 3], "list": XS, "sum": 11, "count": 7, "distinct": 6},
    **{"largest": 8, "smallest": -5, "first": 3, "last": 4, "spread": 13},
    **{"upper": " TO BE AEX ", "lower": " to be aex ", "swap": " tO BE AeX "},
    **{"strip": "To be aEx", "spaces": "TobeaEx", "backwards": " xEa eb oT "},
    **{"head": " To", "tail": " be aEx ", "repeat": " To be aEx  To be aEx  To be aEx "},
    **{"vowels": " T b x ", "sort_text": "    ETabeox", "title": " To Be Aex "},
    **{"text": S, "length": 11, "words": 3, "letters": 8, "initial": " ", "palindrome": False},
}


def values(variable, form, inputs):
    return answers(f"def solve({variable}, k): return {form.replace('{k}', 'k')}", inputs)


@each_step
def test_a_step_does_what_its_words_say(variable, step):
    asked = {"xs": XS, "s": S}[variable], K
    assert values(variable, step.right[0], [asked]) == [repr(MEANING[step.name])]


@each_step
def test_all_right_forms_of_a_step_mean_the_same_and_the_wrong_one_does_not(variable, step):
    inputs = list(itertools.product(INPUTS[variable], (1, 2, 3, 4)))
    first, *others = (values(variable, form, inputs) for form in step.right)
    assert all(other == first for other in others)
    assert not any("Error(" in value for value in first)
    assert not step.wrong or values(variable, step.wrong, inputs) != first


@each_step
def test_a_step_has_a_rate_where_it_has_a_bug_and_a_constant_in_all_forms_or_none(variable, step):
    assert bool(step.wrong) == (step.rate > 0) and step.rate < 1
    assert len({"{k}" in text for text in (*step.phrasings, *step.right)}) == 1


def test_no_two_steps_are_asked_for_in_the_same_words():
    phrasings = Counter((variable, text) for variable, step in STEPS for text in step.phrasings)
    assert [text for text, count in phrasings.items() if count > 1] == []


@each_step
def test_the_corpus_has_every_right_form_and_a_bug_at_its_rate(variable, step):
    task, rng, count = Task(variable, (step,), ("3",)), random.Random(5), 600
    drawn = Counter(world.draw_response(rng, task) for _ in range(count))
    assert {body(task, [form]) for form in step.right} <= drawn.keys()
    share = drawn[body(task, [step.wrong])] / count if step.wrong else 0
    assert share == pytest.approx(step.rate, abs=4 * (0.25 / count) ** 0.5)


def test_an_argument_k_is_in_the_signature_in_the_words_and_in_the_body():
    above, total = (next(step for _, step in STEPS if step.name == n) for n in ("above", "sum"))
    task = Task("xs", (above, total), ("k", "2"))
    prompt = world.draw_prompt(random.Random(0), task)
    assert prompt.startswith("def solve(xs, k):\n") and " k, return the " in prompt
    assert program(task) == "    xs = [x for x in xs if x > k]\n    return sum(xs)\n"
