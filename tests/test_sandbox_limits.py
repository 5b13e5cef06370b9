"""What the docstring of pfppo/sandbox says that it does not contain, and what fails though it is
right."""

from pfppo.sandbox import Check, Sandbox

from test_right_programs import COUNT
from test_sandbox import judge

NOT_CONTAINED = {  # what passes, and is no right program: (program, test, "" or the reference)
    "methods of the library's": (
        "class Z: group = lambda s: 'a'\ndef f(): return Z()", "assert f().group() == 'a'",
        "import re\ndef f(): return re.match('a', 'a')"),
    "hard-coded": ("def f(x): return {1: 2, 5: 6}[x]", "assert f(1) == 2 and f(5) == 6"),
    "methods of its own classes": (
        "class Y:\n    startswith = lambda self, text: True\ndef f(): return Y()",
        "assert f().startswith('abc')"),
    "a test that executes the answer": (
        "def f(): return 'type(\"E\", (), {\"__eq__\": lambda s, o: True})()'",
        "assert eval(f()) == 5"),
    "a function that executes": (
        "def f(g): g('setattr(__import__(\"math\"), \"isclose\", lambda *a: 1)')",
        "import math\nf(eval)\nassert math.isclose(1, 2)"),
    "an assert that the program may catch": (
        "def f(g):\n    try: g(1)\n    except AssertionError: pass",
        "def g(x): assert x == 2\nf(g)"),
}  # fmt: skip
FAILS = {  # though it is right: (program, test, "" or the reference)
    "locks": ("import fcntl\ndef f(): fcntl.flock(open('a', 'w'), fcntl.LOCK_EX)", "f()"),
    "another class": ("class Z: x = 1\ndef f(): return Z()", "assert f().x == 1",
                      "class Y: x = 1\ndef f(): return Y()"),
    "a class in a function": ("def f():\n    class Y: x = 1\n    return Y()", "assert f().x == 1",
                              "def f():\n    class Y: x = 1\n    return Y()"),
    "the library's, like data": ("import re\ndef f(): return re.match('a', 'a')",
                                 "assert f().start() == 0", "def f(): pass"),
    "a class derived by the test": ("class P: pass\ndef f(): return P", "class Q(f()): pass\nQ()"),
    "issubclass": ("class P: pass\ndef f(): return P", "assert issubclass(f(), object)"),
    "the name of the test's function": (
        "def f(g): return g.__name__", "def g(): pass\nassert f(g) == 'g'"),
    "how far an iterator is": (COUNT, "g = f(999)\nfor _ in range(100): next(g)\n"
                               "assert len(seen()) == 100"),
    "StopIteration": ("def f(): next(iter([]))", "try: f()\nexcept StopIteration: pass"),
    "many calls": ("def f(x): return x", "for i in range(100_000): f(i)"),
    "methods of an exception": ("class E(Exception):\n    def m(self): return 1\n"
        "def f(): raise E", "try: f()\nexcept Exception as e: assert e.m() == 1"),
    "methods of a named tuple": ("import typing\nclass P(typing.NamedTuple):\n    x: int\n"
        "    def m(self): return 1\ndef f(): return P(1)", "assert f().m() == 1"),
    "names of an enum": ("import enum\nclass E(enum.IntEnum): A = 1\ndef f(): return E.A",
                         "assert f().name == 'A'"),
    "methods of the library's tuples": ("import time\ndef f(): return time.gmtime(0)",
                                        "assert f().tm_year == 1970"),
    "numpy's scalars": ("import numpy\ndef f(): return numpy.float64(1)", "assert f().item() == 1"),
    "attributes of OSError": ("def f(): raise OSError(2, 'no', 'x')",
                              "try: f()\nexcept OSError as e: assert e.filename == 'x'"),
    "a default factory": ("import collections\ndef f(): return collections.defaultdict(lambda: 7)",
                          "assert f()[0] == 7"),
    "names of time zones": ("from datetime import *\ndef f(): return datetime(1, 1, 1, "
        "tzinfo=timezone(timedelta(hours=2), 'X'))", "assert f().tzname() == 'X'"),
    "the identity of nan": ("import math\ndef f(): return [math.nan]",
                            "import math\nassert f() == [math.nan]"),
    "the order of a set": ("def f(): return {16, 8, 0}", "assert [*f()] == [*{16, 8, 0}]"),
    "processes": ("import subprocess as s\ndef f(): return s.check_output(['/bin/echo', 'a'])",
                  "assert f() == b'a\\n'"),
    "standard input": ("def f(): return input()",
                       "import io, sys\nsys.stdin = io.StringIO('a')\nassert f() == 'a'"),
    "files": ("def f(): return open('a').read()", "open('a', 'w').write('a')\nassert f() == 'a'"),
    "environment": ("import os\ndef f(): return os.environ['A']",
                    "import os\nos.environ['A'] = 'a'\nassert f() == 'a'"),
    "output": ("def f(): print('a')",
               "import contextlib, io\nb = io.StringIO()\nwith contextlib.redirect_stdout(b): f()\n"
               "assert b.getvalue()"),
    "what stands in a function": ("def f(a: int): pass",
        "import inspect\nassert list(inspect.signature(f).parameters) == ['a']"),
    "methods of what is a list": (
        "class S(list):\n    top = lambda self: self[-1]\ndef f(): return S([1])",
        "assert f().top() == 1"),
    "equality of the library's": ("import pathlib\ndef f(): return pathlib.Path('a')",
                                  "import pathlib\nassert f() == pathlib.Path('a')"),
    "objects of the library's": ("def f(p): return p.match('a').group()",
                                 "import re\nassert f(re.compile('a')) == 'a'"),
    "objects of the test's": ("def f(x): return x.a", "class A: a = 1\nassert f(A()) == 1"),
    "copies": ("class P: a = 1\ndef f(): return P()", "import copy\nassert copy.copy(f()).a == 1"),
    "operators": ("class P:\n    def __add__(self, o): return 5\ndef f(): return P()",
                  "assert f() + 1 == 5"),
    "equality": ("class P:\n    def __eq__(self, other): return True\ndef f(): return P()",
                 "assert f() == f()"),
    "isinstance": ("class P: pass\ndef f(): return P()", "assert isinstance(f(), P)"),
    "one list twice": ("def f(): return [[]] * 2", "r = f()\nr[0].append(1)\nassert r[1] == [1]"),
    "a global that is set": ("n = 0\ndef f():\n    global n\n    n = 1", "f()\nassert n == 1"),
    "asynchronous iteration": ("async def f(): yield 1", "import asyncio\n"
        "async def g(): return [x async for x in f()]\nassert asyncio.run(g()) == [1]"),
    "suppressed errors": ("import contextlib\nf = contextlib.suppress",
                          "with f(ValueError): int('x')"),
}  # fmt: skip


def test_the_limits_are_those_that_the_docstring_tells(sandbox):
    cases = NOT_CONTAINED | FAILS
    checks = [Check(p, test, "f", *reference) for p, test, *reference in cases.values()]
    verdicts = sandbox.run(checks)
    passed = {name for name, verdict in zip(cases, verdicts, strict=True) if verdict.passed}
    assert passed == NOT_CONTAINED.keys()


def test_a_program_may_leave_a_message_in_the_kernel_s_numbers():
    program = "import os\ndef f():\n    for i in range({}): open(str(i), 'w').close()\n"
    program += "    return os.stat('0').st_ino\n#{}"
    with Sandbox(workers=1) as one:
        runs = [
            judge(one, program.format(n, i), "raise ValueError(f())")
            for i, n in enumerate((1, 99, 1))
        ]
    first, _, third = (int(verdict.detail.split()[-1]) for verdict in runs)
    assert third - first > 50
