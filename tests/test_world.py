"""The lab's world: problems that their own references pass and that common bugs fail.

Programs are run here by plain `exec`: all of them are our own.
"""

import random
from collections import Counter

from pfppo.lab import world
from pfppo.lab.world import DOMAINS, SPLITS, Task, body, draw_corpus, draw_problem, draw_problems, draw_prompt, draw_response, draw_task

import pytest

STEPS = [(v, step) for v, (steps, ends) in DOMAINS.items() for step in (*steps, *ends)]
NAMES = [step.name for _, step in STEPS]
BUGGY = [(variable, step) for variable, step in STEPS if step.wrong]
CONSTANTS = ("2", "3", "4", "k")


@pytest.fixture(scope="module")
def problems():
    return {split: draw_problems(5, split, 80) for split in SPLITS}


@pytest.fixture(scope="module")
def many(problems):
    return sum(problems.values(), [])


def passes(problem, solution):
    scope = {}
    exec(problem.prompt + solution + "\n" + problem.test, scope)
    try:
        scope["check"](scope[problem.entry_point])
    except Exception:
        return False
    return True


def mutants(problem):
    """(step's name, solution) with one right form replaced by the wrong one."""
    for variable, step in BUGGY:
        for k in CONSTANTS:
            right, wrong = (form.replace("{k}", k) for form in (step.right[0], step.wrong))
            for line in (f"    {variable} = %s\n", "    return %s\n"):
                if line % right in problem.canonical_solution:
                    solution = problem.canonical_solution.replace(line % right, line % wrong)
                    yield step.name, solution


def answers(problem, solution):
    """What a program makes of 100 inputs that are not those of the problem's tests."""
    rng, scope, found = random.Random(7), {}, []
    exec(problem.prompt + solution, scope)
    for _ in range(100):
        numbers = [rng.randint(-6, 9) for _ in range(rng.randint(0, 8))]
        letters = "".join(rng.choices("aAeb  ", k=rng.randint(0, 8)))
        value = numbers if problem.prompt.startswith("def solve(xs") else letters
        arguments = (value, rng.randint(1, 4)) if ", k)" in problem.prompt else (value,)
        try:
            found.append(repr(scope["solve"](*arguments)))
        except Exception as error:
            found.append(repr(error))
    return found


# ----------------------------------------------------------------------------------------- problems


def test_references_pass_their_own_tests(many):
    assert [p.task_id for p in many if not passes(p, p.canonical_solution)] == []


def test_tests_catch_nearly_every_common_bug_that_changes_any_answer(many):
    seen, caught = Counter(), Counter()
    for problem in many:
        for name, solution in dict(mutants(problem)).items():
            if answers(problem, solution) != answers(problem, problem.canonical_solution):
                seen[name] += 1
                caught[name] += not passes(problem, solution)
    assert set(seen) == {step.name for _, step in BUGGY}
    assert {name for name in seen if caught[name] <= seen[name] / 2} == set()
    assert caught.total() >= 0.95 * seen.total()


def test_a_common_bug_that_passes_means_the_same_as_the_reference(many):
    found = [
        (problem, solution, passes(problem, solution))
        for problem in many
        for solution in dict(mutants(problem)).values()
    ]
    same = [(problem, solution) for problem, solution, passed in found if passed]
    assert len(same) < 0.35 * len(found)  # as in: rotate, return the sum
    told = [s for p, s in same if answers(p, s) != answers(p, p.canonical_solution)]
    assert len(told) <= 0.01 * len(same)


def test_no_two_steps_mean_the_same_in_different_splits():
    rng = random.Random(3)
    canonical = {}
    for split in ("train", "validation", "test"):
        for _ in range(1500):
            task = world.draw_task(rng, split)
            program = world.body(task, [step.right[0] for step in task.steps])
            canonical.setdefault(program, set()).add(split)
    assert [program for program, splits in canonical.items() if len(splits) > 1] == []


def test_a_body_that_returns_its_argument_or_a_constant_rarely_passes(many):
    for solution in ("    return xs\n", "    return 0\n", "    return []\n"):
        assert sum(passes(problem, solution) for problem in many) < 0.05 * len(many)


def test_a_problem_has_several_tests_of_several_answers(many):
    for problem in many:
        asserts = [line for line in problem.test.split("\n") if "assert" in line]
        assert 4 <= len(asserts) <= 8 and len(set(asserts)) == len(asserts)


def test_prompts_differ_and_leave_out_those_already_taken(problems):
    first = [problem.prompt for problem in problems["train"]]
    assert len(set(first)) == len(first)
    more = draw_problems(5, "train", 10, taken=first)
    assert not {problem.prompt for problem in more} & set(first)


def test_problems_are_a_function_of_seed_and_split(problems):
    state = random.getstate()
    again = draw_problems(5, "test", 10)
    assert again == problems["test"][:10]
    assert random.getstate() == state  # nothing is drawn from the global state
    assert draw_problems(6, "test", 10) != again
    assert draw_problems(5, "validation", 10) != again


def test_a_problem_is_named_by_its_split_and_place(problems):
    for split in SPLITS:
        assert [p.task_id for p in problems[split]] == [f"lab/{split}/{i}" for i in range(80)]


# ------------------------------------------------------------------------------------------- splits


def test_splits_have_no_composition_in_common():
    rng = random.Random(1)
    found = {split: {draw_task(rng, split).composition for _ in range(400)} for split in SPLITS}
    for split, others in (("train", ("validation", "test")), ("validation", ("test",))):
        for other in others:
            assert not found[split] & found[other]


def test_the_split_of_a_task_depends_on_its_composition_alone():
    rng = random.Random(2)
    for _ in range(100):
        task = draw_task(rng, rng.choice(SPLITS))
        other = Task(task.variable, task.steps, ("k",) * len(task.steps))
        assert other.split == task.split


def test_a_problem_is_of_the_split_that_was_asked_for(problems, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pfppo.world.draw_task", lambda rng, split: asked.append(split) or draw_task(rng, split)
    )
    draw_problem(random.Random(0), "validation", "t")
    draw_corpus(0, 5)
    assert set(asked[:-5]) == {"validation"} and asked[-5:] == ["train"] * 5


def test_about_a_tenth_of_the_compositions_is_for_testing():
    rng = random.Random(3)
    splits = Counter()
    for _ in range(1500):
        steps, ends = DOMAINS["xs"]
        task = Task("xs", (*rng.sample(steps, 2), rng.choice(ends)), ("2", "2", "2"))
        splits[task.split] += 1
    assert 0.07 < splits["test"] / 1500 < 0.13 and 0.07 < splits["validation"] / 1500 < 0.13


# ------------------------------------------------------------------------------ steps and programs


XS, S, K = [3, -2, 3, 8, 0, -5, 4], " To be aEx ", 3
MEANING = {  # what the words ask for, worked out by hand for XS or S and K
    "evens": [-2, 8, 0, 4],
    "odds": [3, 3, -5],
    "above": [8, 4],
    "at_most": [3, -2, 3, 0, -5],
    "multiples": [3, 3, 0],
    "add": [6, 1, 6, 11, 3, -2, 7],
    "times": [9, -6, 9, 24, 0, -15, 12],
    "square": [9, 4, 9, 64, 0, 25, 16],
    "negate": [-3, 2, -3, -8, 0, 5, -4],
    "modulo": [0, 1, 0, 2, 0, 1, 1],
    "absolute": [3, 2, 3, 8, 0, 5, 4],
    "floor": [3, 0, 3, 8, 0, 0, 4],
    "cap": [3, -2, 3, 3, 0, -5, 3],
    "double_evens": [3, -4, 3, 16, 0, -5, 8],
    "ascending": [-5, -2, 0, 3, 3, 4, 8],
    "descending": [8, 4, 3, 3, 0, -2, -5],
    "reverse": [4, -5, 0, 8, 3, -2, 3],
    "drop_first": [8, 0, -5, 4],
    "take_first": [3, -2, 3],
    "take_last": [0, -5, 4],
    "every": [3, 8, 4],
    "unique": [3, -2, 8, 0, -5, 4],
    "running": [3, 1, 4, 12, 12, 7, 11],
    "differences": [-5, 5, 5, -8, -5, 9],
    "trim": [-2, 3, 8, 0, -5],
    "rotate": [-2, 3, 8, 0, -5, 4, 3],
    **{"list": XS, "sum": 11, "count": 7, "distinct": 6, "largest": 8, "smallest": -5},
    **{"first": 3, "last": 4, "spread": 13},
    **{"upper": " TO BE AEX ", "lower": " to be aex ", "swap": " tO BE AeX "},
    **{"strip": "To be aEx", "spaces": "TobeaEx", "backwards": " xEa eb oT "},
    **{"head": " To", "tail": " be aEx ", "repeat": " To be aEx  To be aEx  To be aEx "},
    **{"vowels": " T b x ", "sort_text": "    ETabeox", "title": " To Be Aex "},
    **{"text": S, "length": 11, "words": 3, "letters": 8, "initial": " ", "palindrome": False},
}


@pytest.mark.parametrize("variable, step", STEPS, ids=NAMES)
def test_a_step_does_what_its_words_say(variable, step):
    assert run(variable, step.right[0], {"xs": XS, "s": S}[variable], K) == MEANING[step.name]


def run(variable, expression, value, k):
    try:
        return eval(expression.replace("{k}", str(k)), {variable: value})
    except Exception as error:
        return repr(error)


def inputs(variable):
    rng = random.Random(4)
    if variable == "s":
        return ["", " ", "Abc", "level  to be ", "  aEiou x", "x y X", "hello world Abc"]
    return [[rng.randint(-6, 9) for _ in range(n)] for n in (0, 1, 2, 3, 5, 8, 8, 8)]


@pytest.mark.parametrize("variable, step", STEPS, ids=NAMES)
def test_all_right_forms_of_a_step_mean_the_same_and_the_wrong_one_does_not(variable, step):
    outputs = [
        [run(variable, form, value, k) for value in inputs(variable) for k in (1, 2, 3, 4)]
        for form in step.right
    ]
    assert all(other == outputs[0] for other in outputs)
    assert not any(isinstance(value, str) and "Error(" in value for value in outputs[0])
    if step.wrong:
        wrong = [run(variable, step.wrong, v, k) for v in inputs(variable) for k in (1, 2, 3, 4)]
        assert wrong != outputs[0]


@pytest.mark.parametrize("variable, step", STEPS, ids=NAMES)
def test_a_step_has_a_rate_where_it_has_a_bug_and_a_constant_in_all_forms_or_none(variable, step):
    assert bool(step.wrong) == (step.rate > 0) and step.rate < 1
    assert len({"{k}" in text for text in (*step.phrasings, *step.right)}) == 1


@pytest.mark.parametrize("variable", DOMAINS)
def test_no_two_steps_are_asked_for_in_the_same_words(variable):
    phrasings = Counter(p for v, step in STEPS if v == variable for p in step.phrasings)
    assert [text for text, count in phrasings.items() if count > 1] == []


@pytest.mark.parametrize("variable, step", BUGGY, ids=[step.name for _, step in BUGGY])
def test_the_corpus_has_a_bug_at_its_rate(variable, step):
    task, rng, count = Task(variable, (step,), ("2",)), random.Random(5), 600
    wrong = body(task, [step.wrong])
    share = sum(draw_response(rng, task) == wrong for _ in range(count)) / count
    assert share == pytest.approx(step.rate, abs=4 * (0.25 / count) ** 0.5)


def test_every_right_form_stands_in_the_corpus():
    rng = random.Random(6)
    for variable, step in STEPS:
        task = Task(variable, (step,), ("3",))
        drawn = {draw_response(rng, task) for _ in range(100)}
        assert {body(task, [form]) for form in step.right} <= drawn


def test_the_corpus_is_a_function_of_its_seed():
    assert draw_corpus(3, 20) == draw_corpus(3, 20) != draw_corpus(4, 20)


def test_every_pair_of_the_corpus_is_a_program():
    for prompt, response in draw_corpus(1, 200):
        compile(prompt + response, "corpus", "exec")


def test_an_argument_k_is_in_the_signature_in_the_words_and_in_the_body():
    above, total = (next(step for _, step in STEPS if step.name == n) for n in ("above", "sum"))
    task = Task("xs", (above, total), ("k", "2"))
    prompt = draw_prompt(random.Random(0), task)
    assert prompt.startswith("def solve(xs, k):\n") and " k, return the " in prompt
    expected = "    xs = [x for x in xs if x > k]\n    return sum(xs)\n"
    assert body(task, [above.right[0], total.right[0]]) == expected
