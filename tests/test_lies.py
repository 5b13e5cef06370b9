"""Programs that solve nothing do not pass: forged verdicts, and answers that lie about themselves.

They are the ones that a policy under pressure finds first.
"""

from pfppo.sandbox import Check

import pytest
from test_right_programs import Y
from test_sandbox import ADD, TEST_ADD, WRONG, check_of, judge

LINK = """
import gc, sys
values = sys.modules['pfppo.sandbox.values']
link = next(o for o in gc.get_objects() if isinstance(o, values.Link))
def say(text, table=''):
    kind, _, value = text.partition(' ')
    data = f'{kind}\\n{table}\\n{value}'.encode()
    link.sock.sendall(len(data).to_bytes(4, 'little') + data)
"""
EQUAL = "class E:\n    def __eq__(s, o): return True\n    __ne__ = lambda s, o: False\n"
SAID = (  # in place of an answer
    '["passed", ""]', 'passed ["passed", ""]', 'ok "passed"', 'ok [{"J": [0, "", ""]}, null]',
    'ok [7, null] ', 'ok [{"C": [-1, "x", ""]}, null]', 'ok [{"C": [5, "N", "="]}, null]',
    'ok [{"C": [5, "int", "__eq__ __index__ __abs__"]}, null]', 'ok [{"f": "exec"}, null]',
    'ok [{"T": "exec"}, null]', 'ok [{"T": "BaseException"}, null]', "raise 5", "ok [1, 7]",
    'raise [{"X": [[], [], [], null, ""]}, null]', "callback 7", 'callback [0, [1], {"d": []}]',
    
    'raise [{"X": [[["builtins", "SystemExit"]], [0], [], null, ""]}, null]',
    'ok [{"x": []}, null]',
    'raise [{"X": [[["", "SystemExit"]], [0], [], null, ""]}, null]', 'ok [{"F": [1, 0]}, null]',
    'ok [{"N": ["f8", [1000000000], "00"]}, null]', 'ok [{"N": ["O", [1], "00"]}, null]',
    'ok [{"L": 0}, null]', 'ok [1, [[1]]]',
    'ok [{"t": [], "s": []}, null]', 'ok [{"n": ["P", ["a b"], [1]]}, null]',
    'ok [{"C": [[1], "x", ""]}, null]', 'ok [{"C": [8, "a\\u0000b", ""]}, null]',
)  # fmt: skip
SENDS = "def add(x, y):\n    link.sock.sendall({!r})\n"
FORGED = {
    **{said: LINK + f"def add(x, y): say({said!r})\n" for said in SAID},
    "fields of what has none": LINK + "def add(x, y): say('ok [1, null]', '[[[1], \"a\", 5]]')\n",
    "frames ahead of time": LINK + "for _ in range(9): say('passed [0, null]')\n" + WRONG,
    "answers ahead of time": LINK + "for _ in range(9): say('ok [1, null]')\n" + WRONG,
    "no names": LINK + "say('ok [7, null]')\n",
    "other names": LINK + "say('ok [{\"d\": [\"add\", {\"T\": \"max\"}]}, null]')\n",
    "too long": LINK + SENDS.format(b"\xff\xff\xff\xff"),
    "too much": LINK + SENDS.format(b"\xff\xff\xff\xff") + "    while 1: say('x' * (1 << 20))\n",
    "all that fits": LINK + SENDS.format(b"\0\0\xff\x0f") + "    while 1: say('x' * (1 << 20))\n",
    "no text": LINK + SENDS.format(b"\4\0\0\0\xff\xff\xff\xff"),
    "trickle": "import time\n" + LINK + SENDS.format(b"\xff\0\0\0")
        + "    while 1: link.sock.sendall(b' '); time.sleep(0.2)",
    "equals everything": EQUAL + "def add(x, y): return E()",
    "lying int": EQUAL.replace("E:", "E(int):") + "def add(x, y): return E(9)",
    "not there": "def __getattr__(n): return lambda *a: 1\n",
    "patched builtins": "import builtins\nfor n in ('abs', 'len', 'exec', 'eval', 'all', 'type'):\n"
        "    setattr(builtins, n, lambda *a, **k: True)\n" + WRONG,
    "excepthook": "import sys, os, atexit\nsys.excepthook = lambda *a: os._exit(0)\n"
        "atexit.register(os._exit, 0)\n" + WRONG,
    "every descriptor": "import os\nfor d in range(64):\n    for t in 'passed', '[\"passed\"]':\n"
        "        try: os.write(d, t.encode() + b'\\n')\n        except OSError: pass\n" + WRONG,
    "frames": "import sys\nf = sys._getframe()\nwhile f:\n    f.f_globals.update(serve=print)\n"
        "    f = f.f_back\n" + WRONG,
    "closes its socket": "import os\ndef add(x, y): os.close(3)\n",
    "nested": "def add(x, y):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "itself": "def add(x, y):\n    a = []\n    a.append(a)\n    return a",
    "slow equality": "import decimal\ndef add(x, y): return decimal.Decimal('1e999999999')",
    "claims the test's error": "def add(x, y): raise AssertionError",
    "an error that exits": "class E(Exception):\n    def __str__(s): raise SystemExit(0)\n"
        "def add(x, y): raise E",
    "StopIteration": "def add(x, y): raise StopIteration",
    "exits in a thread": "import os, threading, time\n"
        "threading.Timer(0.1, os._exit, [0]).start()\ndef add(x, y): time.sleep(0.5)",
    "stops itself": "import ctypes\nctypes.CDLL(None)['raise'](19)\n" + WRONG,
    "segfault": "import ctypes\nctypes.string_at(0)\n" + ADD,
}  # fmt: skip


def test_forged_verdicts_do_not_pass(sandbox):
    assert judge(sandbox, LINK + ADD).passed  # the forgers do find their link
    verdicts = sandbox.run([Check(program, TEST_ADD, "add", ADD) for program in FORGED.values()])
    assert not [name for name, v in zip(FORGED, verdicts, strict=True) if v.passed]
    for name, verdict in zip(FORGED, verdicts, strict=True):  # of the judges, only time ends any
        assert verdict.outcome == "timeout" or "the test ended with" not in verdict.detail, name
    # What no candidate's memory could hold is not waited for.
    told = {name: verdict.detail for name, verdict in zip(FORGED, verdicts, strict=True)}
    assert told["too long"] == told["too much"] == "the answer is too large"


@pytest.mark.parametrize("reference", ["", ADD])
def test_a_program_gives_the_test_no_name_that_it_did_not_ask_for(sandbox, reference):
    program = "import sys\ndef yes(*a, **k):\n    return 1\nadd = yes\n"
    for name in ("all", "abs", "isinstance", "__builtins__", "check", "helper"):
        program += f"sys._getframe(1).f_locals['names'].append('{name}')\n"
        if name != "__builtins__":
            program += f"{name} = yes\n"
    test = "def helper(x):\n    return x\ndef check(add):\n    assert isinstance(add(1, 2), int)\n"
    test += "    assert all([helper(abs(add(x, 1))) == x + 1 for x in range(3)])\n"
    assert judge(sandbox, ADD, test, "add", reference).passed
    assert judge(sandbox, program, test, "add", reference).outcome == "wrong_answer"


YES = """
class Y:
    def __getattr__(s, n): return lambda *a: True
    __abs__ = __sub__ = __lt__ = __eq__ = __contains__ = lambda *a: True
    __float__ = lambda s: 5.0
    __index__ = __int__ = lambda s: 1
    __hash__ = lambda s: 0
    def __iter__(s): return iter([])
f = lambda x=1: Y()
"""
NODE = """
class Node:
    def __init__(self, val=0, next=None): self.val, self.next = val, next
    def show(self): return [self.val]
def build(v): return Node(v[0], build(v[1:])) if v else None
def same(a, b):
    while a and b:
        if a.val != b.val: return False
        a, b = a.next, b.next
    return not a and not b
def f(x): return x
"""
TURNED = "assert same(f(build([1, 2])), build([2, 1])) and same(f(build([3, 4])), build([4, 3]))"
SIZED = "class A:\n    k = 0\n    def __len__(s): {}\n    def __iter__(s):\n"
SIZED += "        while A.k < {}: A.k += 1; yield A.k - 1\ndef f(): return A()\n"
PRIMES = "r = f()\nassert len(r) == 3 and all(p in r for p in (2, 3, 5))"
MANAGER = (
    "class M:\n    def __enter__(s): return s\n    def __exit__(s, *a): {}\ndef f(): return M()\n"
)
FIVE, ABC = "def f(x=1): return 5", "def f(x=1): return 'abc'"
CATCH = "try:\n    f(1)\n    assert False\nexcept {}: pass"
EXITS = "def g(): raise {}\nassert f(g) == 1"
UNIT = "import unittest\nclass T(unittest.TestCase):\n    def test_f(s): s.assertEqual(f(1), 5)\n"
LIES = {  # name: (program that solves nothing, body of check(f) or a whole test, reference)
    **{f"says yes to {q}": (YES, f"assert {q}", ABC) for q in (
        "f().startswith('a')", "abs(f() - 2) < 1e-6", "f() < 3", "'a' in f()", "f() == f().lower()",
        "f() == 5", "not f() != 5", "round(f()) == 5", "[1, 2][f()] == 2", "{5: 1}[f()]",
        "f() in [5]", "__import__('cmath').isclose(f(), 5)", "__import__('numpy').all(f() == 5)")},
    "a field for a method": ("import collections\nP = collections.namedtuple('P', 'startswith')\n"
        "def f(): return P(lambda *a: True)", "assert f().startswith('a')", ABC),
    **{f"{kind} for a method": (
        "import collections\nP = collections.namedtuple('P', 'startswith')\n"
        f"def f(): return P({kind})", "assert f().startswith('a')", ABC)
       for kind in ("bool", "ValueError")},
    "a type for a method of nodes": (NODE + "def f(x): x.startswith = bool; return x",
        "assert f(Node(1)).startswith('a')", NODE),
    # Expected values are of the reference's classes, and what comes back is so too.
    "nodes that seem empty": ("class Node:\n    def __init__(s, *a): s.__dict__['s'] = 0\n"
        "    def __setattr__(s, n, v): s.__dict__['s'] = 1\n    @property\n    def next(s):\n"
        "        q, s.__dict__['s'] = s.__dict__['s'], 0\n        return s if q else None\n"
        "def f(x): return Node()", TURNED, NODE),
    "a subclass of nodes": (NODE + "class N(Node):\n    n = 0\n    @property\n    def next(s):\n"
        "        N.n += 1\n        return s if N.n % 3 else None\n    next = next.setter(print)\n"
        "def f(x): return N()", TURNED, NODE),
    "values that equal all": (NODE + EQUAL + "def f(x):\n    n = x\n"
        "    while n: n.val = E(); n = n.next\n    return x", TURNED, NODE),
    "a replaced helper": (NODE + "def same(a, b): return True", TURNED, NODE),
    "a field for a method of the class": (NODE + "def f(x): x.show = lambda: [2]; return x",
        "assert f(Node(1)).show() == [2]", NODE),
    "nodes without end": (NODE + "def f(x): x.next = x; return x",
        "n = f(Node(1))\nwhile n: n = n.next", NODE),
    # Objects are what they can do, and the same at each look.
    "length and items differ": (SIZED.format("return 3", 10**9), PRIMES, ""),
    "other items each time": (SIZED.format("A.k = -1; return 3", "A.k + 3"), PRIMES, ""),
    "another length each time": (
        SIZED.format("A.k -= 1; return 3 if A.k < 0 else 9", 9), PRIMES, ""),
    "an iterable that is no iterator": ("class R:\n    def __iter__(s): return iter([1])\nf = R",
        "import collections.abc\nassert isinstance(f(), collections.abc.Iterator)", ""),
    "endless": ("def f():\n    while True: yield 'x' * 1000", "assert list(f()) == []", ""),
    # Modules are the test's own, as far as it uses them as such.
    **{f"a module of its own, {n}": (lie + "def f(x): return [0.0]",
        f"assert {'' if 'from' in lie else 'np.'}allclose(f(1), [2.0])", "")
       for n, lie in enumerate((
           "class np:\n    allclose = lambda a, b: True\n",
           "import numpy as np\nnp.allclose = lambda a, b: True\n",
           "import numpy\nnumpy.allclose = lambda a, b: True\nfrom numpy import allclose\n"))},
    "the test's draws": ("import random\ndef f(x): return [random.random() for _ in x]",
        "import random\nx = [random.random()]\nassert f(x) == x", "def f(x): return x"),
    # Exceptions: the test's own end is its own.
    "an exiting class": ("class E(SystemExit): pass\ndef f(g): return g()", EXITS.format("E"), ""),
    "a class of the reference that exits": ("class E(SystemExit): pass\ndef f(g): return g()",
        EXITS.format("E"), "import builtins\nclass E(builtins.SystemExit): pass\ndef f(g): pass"),
    "a class of the test that exits": ("def f(g): return g()",
        "class E(SystemExit): pass\n" + EXITS.format("E"), ""),
    "a function that exits": ("def f(g): return g()", "import sys\nassert f(sys.exit) == 1", ""),
    "a class that interrupts": ("class E(KeyboardInterrupt): pass\ndef f(g): return g()",
        EXITS.format("E"), ""),
    "a test that is skipped": ("import unittest\ndef f(x): raise unittest.SkipTest",
        UNIT + "unittest.main()", ""),
    **{f"a class that catches all, {n}": (f"{lie}\ndef f(x): pass\n", CATCH.format(name), "")
       for n, (lie, name) in enumerate((
           ("Bad = Exception", "Bad"), ("Bad = BaseException", "Bad"),
           ("Bad = AssertionError", "Bad"),
           ("class Bad(AssertionError): pass\nBad.__name__ = 'AssertionError'", "Bad"),
           ("class A: Bad = BaseException", "A.Bad"), ("def f(x): return AssertionError", "f(1)"),
           ("class M(type):\n    __subclasscheck__ = __instancecheck__ = lambda *a: True\n"
            "class Bad(Exception, metaclass=M): pass", "Bad")))},
    "a caught crash": ("Bad = Exception\ndef f(x): raise TypeError", CATCH.format("Bad"), ""),
    "a manager that suppresses": (MANAGER.format("return True"), "with f(): assert False", ""),
    "a manager that replaces": (MANAGER.format("raise ValueError"),
        "try:\n    with f(): assert False\nexcept ValueError: pass", ""),
    "the end of a loop": ("def f(x): raise StopIteration",
        "assert all(map(lambda x: f(x) == x, [1])) and list(map(f, [1])) == []", ""),
    # A test passes where it has run to its end, and has asked.
    "never called": ("def f(x): pass", "assert g(1) == 1", "def g(x): return x\ndef f(x): pass"),
    "never awaited": ("def f(x): pass", "async def check(f): assert f(1) == 1", ""),
    "swallowed exit": ("def f(): raise SystemExit", "try: f()\nexcept: pass", ""),
    "swallowed death": ("import os\ndef f(): os._exit(0)", "try: f()\nexcept: pass", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def lies(sandbox):
    checks = []
    for program, test, reference in LIES.values():
        whole = "check(f)" in test or "unittest" in test
        checks.append(Check(program, test if whole else check_of(test), "f", reference))
    return dict(zip(LIES, sandbox.run(checks), strict=True))


@pytest.mark.parametrize("name", LIES)
def test_programs_that_solve_nothing_do_not_pass(lies, name):
    assert not lies[name].passed
    if "swallowed" in name:
        assert lies[name].outcome == "exit"


def liar(*methods, base="", name="Z"):
    """The head of a program whose objects have `methods`, "name(arguments): what they return"."""
    lines = [f"    def {m.replace('(', '(s, ', 1).replace(':', ': return', 1)}\n" for m in methods]
    return f"class {name}{base}:\n    n = 0\n" + "".join(lines)


SORTED = "def f(x): return sorted(x)\n"
SAME = "for x in ([3, 1, 2], [9, 8, 7, 6]):\n    r = f(x)\n    assert "
SORTS = (
    SAME + "len(r) == len(x) and sorted(r) == sorted(x) and all(r[i] == r[0] for i in range(2))",
    SAME + "sorted(r) == sorted(x) and [*r] == [0] * len(x)",
    SAME + "str(r) == 'a' and str(r) == 'b'",
    SAME + "sorted(r) == sorted(x) and 99 in r",
)
KEPT = "def f(x):\n    z = Z(); z.x = x\n    return z\n"
YIELDS = (
    "    def __iter__(s):\n        s.n += 1\n        return iter(s.x if s.n == 1 else [0] * 3)\n"
)
YS = Y + "def f(x): return Y(sorted(x))\ndef good(y): return y.ok()\n"
OKS = "f([2, 1]).ok()", "good(f([2, 1]))", "f([2, 1]).cached()", "f([2, 1]).once", "f([2, 1]).x"
NO_Y = "class {}:\n    cached = ok = lambda s: True\n    once, x = True, [1, 2]\n"
NO_Y += "def f(x): return {}()\n"
FIELDS = "class Y: pass\ndef f(x):\n    y = Y(); y.x = x; y.{} = {}\n    return y\n"
ALL_YES = liar("__getattr__(n): lambda *a: True") + "def f(*x): return Z()\n"
NUMPY = "import numpy as np\n"
SOLVES_NOTHING = {  # the reference says what answers are: (program, body of check(f), reference)
    **{f"a sequence that lies, {n} {m}": (head + KEPT, test, SORTED)
       for n, test in enumerate(SORTS)
       for m, head in enumerate((
           liar("__len__(): len(s.x)", "__iter__(): iter(s.x)", "__getitem__(i): 0"),
           liar("__len__(): len(s.x)", "__getitem__(i): 0") + YIELDS, liar() + YIELDS,
           liar("__str__(): setattr(s, 'n', s.n + 1) or ' ab'[s.n]", "__contains__(i): True",
                "__iter__(): iter(s.x)")))},
    "an iterator that begins again": (liar("__iter__(): s") + "    def __next__(s):\n"
        "        if s.n < len(s.x): s.n += 1; return s.x[s.n - 1]\n"
        "        s.n, s.x = 0, [0] * len(s.x); raise StopIteration\n" + KEPT, SORTS[1], SORTED),
    **{f"another class for {line}": (NO_Y.format("Z", "Z"), f"assert {line}", YS) for line in OKS},
    "another class for one that the test names": (NO_Y.format("Z", "Z"),
        "assert Y([]).ok() and f([2, 1]).ok()", YS),
    "the class without its data": (NO_Y.format("Y", "Y"), "assert f([2, 1]).ok()", YS),
    "in a list": (NO_Y.format("Z", "[Z()]"), "assert all(y.ok() for y in f([2, 1]))",
        Y + "def f(x): return [Y([x])]"),
    "of a method": ("class Z:\n    ok = lambda s: True\nclass S:\n    def f(s, x): return Z()\n"
        "f = S().f", "assert f([2, 1]).ok()",
        YS + "class S:\n    def f(s, x): return Y([1, 2])\nf = S().f"),
    **{f"a field for {name}": (FIELDS.format(name, value), f"assert f([2, 1]).{name}{call}", YS)
       for name, value, call in (("ok", "lambda: True", "()"), ("cached", "lambda: True", "()"),
                                 ("once", "True", ""), ("same", "lambda y: True", "(1)"))},
    **{f"a tuple's field for {name}{value}": (
        "from collections import namedtuple\nP = namedtuple('P', "
        f"'{name}')\ndef f(x): return P({value})", f"assert f([2, 1]).{name}{call}", YS)
       for name, value, call in (("ok", "lambda: True", "()"), ("ok", "object", "()"),
                                 ("once", "True", ""))},
    "a field of an exception of no class of the reference's": (
        "class E(Exception): pass\ndef f(x): e = E(); e.fatal = lambda: True; raise e",
        "try: f(1)\nexcept Exception as e: assert e.fatal()\nelse: assert False",
        Y + "def f(x): raise Bad"),
    "a field for an exception's method": (
        "class Bad(Exception): pass\ndef f(x): e = Bad(); e.fatal = lambda: True; raise e",
        "try: f(1)\nexcept Bad as e: assert e.fatal()\nelse: assert False",
        Y + "def f(x): raise Bad"),
    **{f"{kind}'s method": (ALL_YES, f"assert f(1).{method}()", f"{head}def f(x): return {kind}")
       for kind, method, head in (
           ("Decimal(x)", "is_nan", "from decimal import Decimal\n"),
           ("np.array(x)", "all", NUMPY),
           ("datetime(1, 1, x)", "weekday", "from datetime import *\n"),
           ("Fraction(x)", "is_integer", "from fractions import Fraction\n"),
           ("1j * x", "conjugate", ""),
           ("deque([x])", "popleft", "from collections import deque\n"),
           ("Counter([x])", "total", "from collections import Counter\n"),
           ("P(x)", "_asdict", "from collections import namedtuple\nP = namedtuple('P', 'x')\n"))},
}  # fmt: skip


def test_where_a_reference_says_what_answers_are_no_object_answers_in_their_place(sandbox):
    checks = [Check(p, check_of(lines), "f", r) for p, lines, r in SOLVES_NOTHING.values()]
    verdicts = dict(zip(SOLVES_NOTHING, sandbox.run(checks), strict=True))
    assert not [name for name, verdict in verdicts.items() if verdict.passed]
