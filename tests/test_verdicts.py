"""Verdicts of the sandbox are those of the test in one process: exceptions, forms of tests, order.

A program sees one call at a time, and nothing of the check before it.
"""

import random
import textwrap

from pfppo.sandbox import Check, Sandbox

import pytest
from test_right_programs import HONEST_ADD, RIGHT
from test_sandbox import ADD, OUTCOME_OF, TEST_ADD, check_of, judge, numbered

# ---- exceptions ----------------------------------------------------------------------------------

FUNDS = """
class NoFunds(Exception):
    def __init__(self, need, have):
        super().__init__(f'need {need}, have {have}')
        self.need = need
class Said(Exception):
    def __init__(self, word): self.word = word
    def __str__(self): return f'<{self.word}>'
class Worse(NoFunds): pass
"""
RAISED = {  # program, what it should raise, what is true of that
    "builtin": ("def f(): raise ValueError('bad', 1)", "ValueError", "e.args == ('bad', 1)"),
    "a subclass": ("class B(ValueError): pass\ndef f(): raise B('bad')", "ValueError", "e.args"),
    "an alias": ("B = ValueError\ndef f(): raise B('bad')", "B", "e.args == ('bad',)"),
    "attributes": (FUNDS + "def f(): raise NoFunds(5, 3)", "NoFunds",
                   "e.need == 5 and str(e) == 'need 5, have 3'"),
    "a base": (FUNDS + "def f(): raise Worse(5, 3)", "NoFunds", "e.need == 5"),
    "its text": (FUNDS + "def f(): raise Said('x')", "Exception", "str(e) == '<x>'"),
    "cause": ("def f():\n    try: 1 / 0\n    except Exception as e: raise KeyError(1) from e",
              "KeyError", "isinstance(e.__cause__, ZeroDivisionError)"),
    "json": ("import json\ndef f(): json.loads('{bad')", "json.JSONDecodeError", "e.pos == 1"),
    "statistics": ("import statistics\ndef f(): statistics.mean([])", "statistics.StatisticsError",
                   "isinstance(e, ValueError)"),
    "frozen": ("import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass P:\n    x: int\n"
               "def f(): P(1).x = 2", "dataclasses.FrozenInstanceError", "1"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.parametrize("with_reference", [False, True])
def test_exceptions_come_with_class_arguments_and_attributes(sandbox, name, with_reference):
    program, kind, that = RAISED[name]
    test = check_of(
        f"import dataclasses, json, statistics\ntry: f()\nexcept {kind} as e:\n    assert {that}\n"
        "else:\n    assert False"
    )
    head, reference = program[: program.index("def f")], program if with_reference else ""
    programs = program, head + "def f(): raise TypeError('bad')", head + "def f(): return 1"
    outcomes = [v.outcome for v in sandbox.run([Check(p, test, "f", reference) for p in programs])]
    other = "wrong_answer" if kind == "Exception" else "exception"  # it is caught, and not as said
    assert outcomes == ["passed", other, "wrong_answer"]


@pytest.mark.parametrize("kind", ["E", "LookupError", "Own"])
def test_an_error_of_the_test_s_goes_through_the_program(sandbox, kind):
    """E is the program's class, Own the test's; a program that knows it may catch it."""
    program = "class E(Exception): pass\ndef f(g, n):\n    for _ in range(n):\n        try: return "
    program += f"g()\n        except {kind if kind != 'Own' else 'E'}: pass\n    return g()\n"
    lines = "class Own(Exception): pass\ncalls = []\ndef g():\n    calls.append(1)\n"
    lines += f"    if len(calls) < 3: raise {kind}(len(calls))\n    return 'ok'\n"
    raised = f"try: f(g, 0)\nexcept {kind} as e: assert e.args == (1,)\nelse: assert False\n"
    assert judge(sandbox, program, check_of(lines + raised)).passed
    retried = check_of(lines + "assert f(g, 5) == 'ok' and len(calls) == 3")
    assert judge(sandbox, program, retried).passed == (kind != "Own")


# ---- tests ---------------------------------------------------------------------------------------

NEXT = "def f(x): return x + 1\n"
TEST_FORMS = {  # name: (test, right program; wrong is one that adds 2)
    "under a guard": ("if __name__ == '__main__':\n    assert f(1) == 2\n", NEXT),
    "unittest": ("import unittest\nclass T(unittest.TestCase):\n"
        "    def test_f(self): self.assertEqual(f(1), 2)\nunittest.main()\n", NEXT),
    "ends itself": ("import sys\nsys.exit(0 if f(1) == 2 else 1)\n", NEXT),
    "ends before its check": ("import sys\ndef check(f): assert f(1) == 2\nsys.exit()\n", NEXT),
    "catches all": ("while 1:\n    try:\n        if f(1) == 2: break\n    except: pass\n"
        "    assert f(1) == 2\n", NEXT),
    "threads": ("from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as p: assert [*p.map(f, range(50))] == [*range(1, 51)]", NEXT),
    "int subclass": ("import enum\nclass E(enum.IntEnum):\n    A = 1\nassert f(E.A) == 2\n", NEXT),
    "callback": ("assert f(lambda *, x: x) == 2", "def f(g): return g(x=1) + 1\n"),
    "views": ("k, i = f({1: 2})\nassert k == {2} and list(k) == [2] and i == {(2, 3)}\n",
        "def f(d):\n    d = {k + 1: v + 1 for k, v in d.items()}\n    return d.keys(), d.items()"),
    "endless": ("import itertools\nassert f(itertools.count(7)) == 8\n",
        "def f(xs): return next(xs) + 1\n"),
    "seeds": ("import random\nrandom.seed(7)\nx = random.random()\nrandom.seed(7)\n"
        "assert f() == x + 1\n", "import random\ndef f(): return random.random() + 1\n"),
    "seeds numpy": ("import numpy\nnumpy.random.seed(7)\nx = numpy.random.rand()\n"
        "numpy.random.seed(7)\nassert f() == x + 1\n",
        "import numpy\ndef f(): return numpy.random.rand() + 1\n"),
    "has a folder": ("import os\nopen('a', 'w').write('1')\nassert os.listdir() == ['a']\n"
        "assert os.getcwd() != '/' and f(1) == 2\n", NEXT),
}  # fmt: skip


@pytest.mark.parametrize("form", TEST_FORMS)
@pytest.mark.parametrize("with_reference", [False, True])
def test_forms_of_tests(sandbox, form, with_reference):
    test, right = TEST_FORMS[form]
    reference, wrong = right if with_reference else "", right.replace("+ 1", "+ 2")
    assert judge(sandbox, right, test, "f", reference).passed
    assert judge(sandbox, wrong, test, "f", reference).outcome == "wrong_answer"


def test_a_reference_that_does_not_run_is_told_as_such(sandbox):
    verdict = judge(sandbox, ADD, TEST_ADD, "add", "import no_such\n" + ADD)
    assert verdict.outcome == "exception" and "reference does not run" in verdict.detail


def test_without_an_entry_point_all_that_the_test_uses_is_the_program_s(sandbox):
    stack = "class Stack:\n    def top(self): return {}\ndef f(): return Stack()\n"
    checks = [Check(stack.format(n), "assert f().top() == 2", "", stack.format(2)) for n in (2, 3)]
    assert [verdict.passed for verdict in sandbox.run(checks)] == [True, False]


TWO = "assert f(2) == 4 and f(3) == 9"
BINDS = {  # ways in which a reference may say what `f` is, where no entry point does
    "lambda": "f = lambda x: x * x",
    "partial": "import functools\ndef g(k, x): return x ** k\nf = functools.partial(g, 2)",
    "alias": "def g(x): return x * x\nf = g",
    "method": "class S:\n    def f(self, x): return x * x\nf = S().f",
    "named tuple": "from collections import namedtuple\nf = namedtuple('P', 'x')",
    "import": "from math import factorial as f",
    "star": "from math import *\nf = lambda x: pow(x, 2)",
    "globals": "globals()['f'] = lambda x: x * x",
    "def": "def f(x): return x * x",
}
LINES = {"named tuple": "assert f(1).x == 1", "import": "assert f(3) == 6"}


@pytest.mark.parametrize("way", BINDS)
def test_without_an_entry_point_no_name_is_the_reference_s(sandbox, way):
    reference, lines = BINDS[way], LINES.get(way, TWO)
    tests = [lines] + [lines.replace("f(", g) for g in ("eval('f')(", "globals()['f'](")]
    programs = reference, "", "f = lambda x: [0]"
    for test in tests:
        checks = [Check(program, test, "", reference) for program in programs]
        assert [v.passed for v in sandbox.run(checks)] == [True, False, False]


def test_without_an_entry_point_the_test_must_have_asked_the_program(sandbox):
    reference = "import math\nLIMIT = 3\ndef f(x): return x\n"
    tests = {"assert 1 == 1": False, "f": False, "assert math.pi > 3": False, "f(1)": True,
             "assert LIMIT == 3": True}  # fmt: skip
    verdicts = sandbox.run([Check(reference, test, "", reference) for test in tests])
    assert [verdict.passed for verdict in verdicts] == [*tests.values()]


def test_descriptors_carry_nothing_to_the_next_program():
    program = "import fcntl, os\nflags = fcntl.fcntl(0, fcntl.F_GETFL)\n"
    program += "fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)\n"
    program += "def f(): return flags & (os.O_NONBLOCK | os.O_APPEND)\n#"
    with Sandbox(workers=1) as one:
        runs = [judge(one, program + str(i), check_of("assert f() == 0")) for i in range(3)]
    assert all(verdict.passed for verdict in runs)


SETS = {  # what a test may leave behind, and a test that would feel it
    "precision": ("import decimal\ndecimal.getcontext().prec = 3",
                  "import decimal\nassert decimal.Decimal(1) / 3 != decimal.Decimal('0.333')"),
    "recursion": ("import sys\nsys.setrecursionlimit(60)",
                  "import sys\nassert sys.getrecursionlimit() > 900"),
    "a patched module": ("import math\nmath.sqrt = None", "import math\nassert math.sqrt(4) == 2"),
    "a builtin": ("import builtins\nbuiltins.abs = None", "assert abs(-1) == 1"),
    "random state": ("import random\nrandom.seed(1)",
                     "import random\nassert random.random() != random.Random(1).random()"),
    "files": ("open('left', 'w').write('x')", "import os\nassert os.listdir() == []"),
    "environment": ("import os\nos.environ['X'] = '1'", "import os\nassert 'X' not in os.environ"),
    "memory": ("big = [bytes(1 << 20) for _ in range(300)]", "big = bytes(300 << 20)"),
}  # fmt: skip
LEAVES_AND_FEELS = [
    Check(NEXT, f"{text}\nassert f(1) == 2", "f") for pair in SETS.values() for text in pair
]


def test_nothing_of_a_test_stays_for_the_next():
    with Sandbox(workers=1, memory_mb=256) as one:
        outcomes = [verdict.outcome for verdict in one.run(LEAVES_AND_FEELS)]
    assert outcomes == ["passed"] * 2 * len(SETS)


def mixed_checks(count):
    """`count` checks of every kind; the last two draw, and say what."""
    checks = [Check(p, TEST_ADD, "add") for p, o in OUTCOME_OF.items() if o != "timeout"]
    checks += LEAVES_AND_FEELS + [Check(p, TEST_ADD, "add", ADD) for p in HONEST_ADD.values()]
    for test, right in TEST_FORMS.values():
        checks += [Check(p, test, "f") for p in (right, right.replace("+ 1", "+ 2"))]
    for program, lines, *reference in RIGHT.values():
        checks.append(Check(program, check_of(lines), "f", *(reference or [program])))
    checks += numbered(max(0, count - len(checks) - 2))
    draws = "import random\ndef f(): return random.random()\n#"
    told = "import random\nraise ValueError(f(), random.random())"
    return checks[: count - 2] + [Check(draws + str(i), told, "f") for i in range(2)]


@pytest.mark.parametrize("count", [50, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [1, 2])
def test_verdicts_do_not_depend_on_the_order(workers, count):
    checks = mixed_checks(count)
    with Sandbox(workers=workers) as box:
        first = [(v.outcome, v.detail) for v in box.run(checks)]
        for seed in 1, 2:
            order = random.Random(seed).sample(range(len(checks)), len(checks))
            again = dict(zip(order, box.run([checks[i] for i in order]), strict=True))
            assert [(again[i].outcome, again[i].detail) for i in range(len(checks))] == first
    assert first[-1] == first[-2] and "ValueError" in first[-1][1]  # it draws the same each time


# ---- a call is sent when the one before it has been answered -------------------------------------

PEEKS = {  # ways to look for calls that are still to come; each ends with `seen`, bytes
    "the link's buffer": "frame = sys._getframe()\n"
        "while not hasattr(frame.f_locals.get('self'), 'buffer'): frame = frame.f_back\n"
        "seen = bytes(frame.f_locals['self'].buffer)\n",
    "the input descriptor": "seen = b''\nfor descriptor in range(10):\n"
        "    try: seen += socket.socket(fileno=os.dup(descriptor)).recv(1 << 16, PEEK)\n"
        "    except OSError: pass\n",
    "the input descriptor, after a while": "time.sleep(0.1)\nseen = b''\n"
        "try: seen = socket.socket(fileno=os.dup(3)).recv(1 << 16, PEEK)\nexcept OSError: pass\n",
    "how much waits there": "size = bytearray(4)\nfcntl.ioctl(3, 0x541B, size)\n"
        "seen = bytes(int.from_bytes(size, 'little'))\n",
}  # fmt: skip
PEEKS = {way: textwrap.indent(lines, "    ") for way, lines in PEEKS.items()}
HEAD = "import fcntl, os, re, socket, sys, time\nPEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT\n"
RIGHT_NEXT = "def f(x):\n    return {2: 3, 3: 5, 5: 7}[x if type(x) is int else x[0]]\n"


@pytest.mark.parametrize("way", PEEKS)
@pytest.mark.parametrize(
    "lines",
    [
        "assert f(2) == 3; assert f(3) == 5; assert f(5) == 7",
        "assert f([2]) == 3; assert f([3]) == 5; assert f([5]) == 7",
        "r = [f(2), f(3), f(5)]; assert r == [3, 5, 7]",
        "a = f(2); assert a == 9 or a == 3; b = f(3); assert b == 5; assert f(5) == 7",
    ],
)
def test_a_program_that_looks_for_later_calls_finds_none(sandbox, way, lines):
    """It answers call k with what call k + 1 shows, and knows the last answer."""
    head = HEAD + "def f(x):\n" + PEEKS[way]
    answers = "    found = re.search(rb'\\[\\[?(\\d+)\\]', seen)\n"
    answers += "    return int(found[1]) if found else 7\n"
    assert not judge(sandbox, head + answers, check_of(lines), "f", RIGHT_NEXT).passed
    # The right program, which complains where it sees something.
    complains = "    if seen: raise ValueError(seen)\n" + RIGHT_NEXT.partition("\n")[2]
    verdict = judge(sandbox, head + complains, check_of(lines), "f", RIGHT_NEXT)
    assert verdict.passed, verdict


def test_an_answer_is_not_computed_from_the_arguments_of_a_later_call(sandbox):
    program = HEAD + "def f(x):\n" + PEEKS["the link's buffer"]
    program += "    ahead = re.search(rb'\\[\\[([0-9, ]+)\\]', seen)\n"
    program += "    return sum(map(int, ahead[1].split(b','))) if ahead else 0\n"
    assert not judge(sandbox, program, check_of("assert f(2) == 3\nassert f([1, 2]) == 0")).passed


def test_an_answer_that_is_sent_twice_answers_nothing_later(sandbox):
    """A program may write answers ahead, but it cannot know what they answer."""
    frame = "b''.join(len(t).to_bytes(4, 'little') + t for t in [b'ok\\n\\n[3, null]'] * 3)"
    program = f"import os\ndef f(x):\n    os.write(3, {frame})\n    return 3\n"
    test = check_of("assert f(2) == 3\nassert f(3) == 5\nassert f(5) == 7")
    assert not judge(sandbox, program, test, "f", RIGHT_NEXT).passed
    assert judge(
        sandbox, program, check_of("assert f(2) == f(3) == 3")
    ).passed  # it does write them


# A test's verdict is that of the same test in one process, whatever it does with its arguments.
TESTS = {
    "an argument used again after the program may have changed it":
        "xs = [2, 1]\nassert f(xs) == 3 and f(xs + [1]) == 4\nxs.append(f(xs))\nassert f(xs) == 6",
    "an expected exception":
        "assert f([1]) == 1\ntry: f(None)\nexcept TypeError: pass\nelse: assert False\n"
        "assert f([2]) == 2",
    "random inputs":
        "import random\nfor _ in range(100):\n"
        "    xs = [random.randint(0, 9) for _ in range(4)]\n    assert f(xs) == sum(xs)",
    "state of the test's own":
        "seen = [1]\nassert f(seen) == 1\nseen.append(1)\nassert f(seen) == 2 == len(seen)",
    "large arguments":
        "for n in (10, 20_000, 10, 100_000, 20_000, 7): assert f([1] * n) == n",
    "many calls": "for i in range(1000): assert f([i, 1]) == i + 1",
}  # fmt: skip
SUMS = "def f(xs):\n    return sum(xs)\n"
PROGRAMS = (  # wrong ones first: nothing of them is left for the right one
    "def f(xs):\n    return sum(xs) if len(xs) != 1 else 0\n",
    "def f(xs, calls=[]):\n    calls.append(1)\n    return sum(xs) + (len(calls) > 2)\n",
    "def f(xs):\n    total = sum(xs)\n    xs.clear()\n    return total\n",
    "def f(xs):\n    xs.sort()\n    return sum(xs)\n",
    SUMS,
)


def directly(program, test):
    """What the test says in this process."""
    space = {}
    exec(program, space)
    exec(test, space)
    try:
        space["check"](space["f"])
        return True
    except Exception:
        return False


@pytest.mark.parametrize("name", TESTS)
def test_verdicts_are_those_of_the_test_in_one_process(sandbox, name):
    test = check_of(TESTS[name])
    found = [v.passed for v in sandbox.run([Check(p, test, "f", SUMS) for p in PROGRAMS])]
    assert found == [directly(program, test) for program in PROGRAMS] and found[-1]
