"""Stop strings cut what runs on and leave the program of an answer as it is."""

from types import SimpleNamespace

from pfppo.problems import assemble, load_problems, load_stops
from pfppo.problems.messages import few_shot_prompts

import pytest
from ranks import refused
from test_extract import ANSWERS, CODEX
from test_problems import data

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
