"""The sandbox: right programs pass, every kind of end has its name, and what the pool survives.

What a candidate cannot forge or reach, and the modes, are in test_jail.py. Here is also what the
docstring of pfppo/sandbox says that it does not contain, and what fails though it is right.
"""

import contextlib
import gc
import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

from pfppo import sandbox as door
from pfppo.sandbox import OUTCOMES, Check, Sandbox

import pytest

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files at {DATA}")
ADD = "def add(x, y):\n    return x + y\n"
WRONG = "def add(x, y):\n    return x - y - 1\n"
TEST_ADD = (
    "def check(candidate):\n    assert candidate(0, 1) == 1\n    assert candidate(2, 3) == 5\n"
)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, timeout=1.0, memory_mb=256) as shared:
        yield shared


def judge(sandbox, program, test=TEST_ADD, entry_point=None, reference=""):
    entry_point = entry_point or ("add" if "def add" in program else "f")
    return sandbox.run([Check(program, test, entry_point, reference)])[0]


def check_of(lines):
    """A test: `lines` as the body of check(f)."""
    return "def check(f):\n" + textwrap.indent(lines, "    ")


# ---- ends ----------------------------------------------------------------------------------------

OUTCOME_OF = {
    "passed": [ADD],
    "wrong_answer": [WRONG, "def add(x, y): x + y", "def add(x, y): return [x + y]"],
    "syntax_error": ["def add(x, y) return x", ADD + "\0", "```python\n" + ADD + "```"],
    "exception": ["def add(x, y): return add(x, y)", "def add(x, y): return x / 0", "other = 1",
                  "n = input()\n" + ADD, "def add(x, y): return a", "import no_such\n" + ADD],
    "timeout": ["def add(x, y):\n    while 1: pass", "import time\ndef add(x, y): time.sleep(60)",
                "import re\ndef add(x, y): re.match(r'(a+)+$', 'a' * 45 + 'b')"],
    "memory": ["def add(x, y): return bytearray(1 << 30)"],
    "forbidden": ["import socket\nsocket.socket()\n" + ADD, "import os\nos.fork()\n" + ADD],
    "exit": ["quit()\n" + ADD, "import os\nos._exit(0)\n" + ADD,
             "def add(x, y): raise SystemExit(0)", "def add(x, y): raise KeyboardInterrupt"],
}  # fmt: skip
OUTCOME_OF = {program: outcome for outcome, programs in OUTCOME_OF.items() for program in programs}


def test_every_outcome_has_its_name(sandbox):
    verdicts = sandbox.run([Check(program, TEST_ADD, "add") for program in OUTCOME_OF])
    assert {p: v.outcome for p, v in zip(OUTCOME_OF, verdicts, strict=True)} == OUTCOME_OF
    assert {*OUTCOME_OF.values()} == {*OUTCOMES}
    assert all(v.passed == (v.outcome == "passed") and "\n" not in v.detail for v in verdicts)


BURN = "import time\nt = time.process_time()\nwhile time.process_time() - t < {}: pass\n"
SLEEP = "import time\ndef add(x, y):\n    time.sleep({})\n    return x + y\n"


def test_time_is_what_a_program_computes_and_sleeps(sandbox):
    """A right answer that comes late is a timeout; the sleeping ones are called twice."""
    programs = BURN.format(0.6) + ADD, BURN.format(1.5) + ADD, SLEEP.format(0.2), SLEEP.format(0.8)
    verdicts = sandbox.run([Check(program, TEST_ADD, "add") for program in programs])
    assert [v.outcome for v in verdicts] == ["passed", "timeout", "passed", "timeout"]


def test_a_sleep_in_small_drops_is_a_sleep(sandbox):
    drips = "def add(x, y):\n    end = time.time() + 2\n    while time.time() < end:\n"
    drips += "        sum(range(10_000))\n        time.sleep(0.03)\n    return x + y\n"
    assert judge(sandbox, "import time\n" + drips).outcome == "timeout"


@pytest.mark.slow
def test_a_busy_machine_fails_no_honest_program():
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    try:
        with Sandbox(workers=2, timeout=0.5) as busy:
            found = busy.run([Check(BURN.format(s) + ADD, TEST_ADD, "add") for s in (0.3, 0.31, 5)])
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert [v.outcome for v in found] == ["passed", "passed", "timeout"]


def test_no_check_goes_on_for_ever(sandbox, monkeypatch):
    monkeypatch.setattr(door, "WALL", 0.1)
    assert judge(sandbox, SLEEP.format(0.6)).outcome == "timeout"


@pytest.mark.parametrize(
    "answer, line, outcome",
    [
        ("range(10**12)", "sum(f())", "timeout"),
        ("10**6, 10**8", "pow(*f())", "timeout"),
        ("[i * (2**61 - 1) for i in range(100_000)]", "len({*f()})", "timeout"),
        ("10**11", "[0] * f()", "memory"),
    ],
)
def test_a_test_has_limits_for_what_it_does_with_the_answers(sandbox, answer, line, outcome):
    verdict = judge(sandbox, f"def f():\n    return {answer}\n", check_of(f"assert {line} == 1"))
    assert verdict.outcome == outcome and ("the test" in verdict.detail or outcome == "memory")


# ---- right programs ------------------------------------------------------------------------------

HONEST_ADD = {
    "prints": "print('x' * 5_000_000)\nprint('\\ud800')\n" + ADD,
    "main guard": ADD + "if __name__ == '__main__':\n    print(add(1, int(input())))\n",
    "crlf": ADD.replace("\n", "\r\n"),
    "tabs": ADD.replace("    ", "\t"),
    "byte-order mark": "\ufeff" + ADD,
    "future": "from __future__ import annotations\n" + ADD.replace("x, y", "x: Later, y: int"),
    "stdin": "import sys\nassert sys.stdin.read() == ''\n" + ADD,
    "closes stdout": "import sys\nsys.stdout.close()\n" + ADD,
    "own name for what the test uses": "def check(a):\n    return a\nlist = [1]\n" + ADD,
    "deep": "def d(n):\n    return n and 1 + d(n - 1)\nassert d(985) == 985\n" + ADD,
    "deeper": "import sys\nsys.setrecursionlimit(10**6)\ndef d(n):\n    return n and 1 + d(n - 1)\n"
    "assert d(50_000) == 50_000\n" + ADD,
    "dataclass": "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\n"
    "class P:\n    x: int\ndef add(x, y):\n    return P(x + y).x",
    "pickles its class": "import copy, pickle\nclass P:\n    def __init__(self, x): self.x = x\n"
    "def add(x, y):\n    return copy.deepcopy(pickle.loads(pickle.dumps(P(x + y)))).x",
    "threads": "from concurrent.futures import ThreadPoolExecutor\ndef add(x, y):\n"
    "    with ThreadPoolExecutor(8) as pool:\n        return sum(pool.map(int, [x, y]))",
    "asyncio": "import asyncio\nasync def g(x, y):\n    await asyncio.sleep(0)\n    return x + y\n"
    "def add(x, y):\n    return asyncio.run(g(x, y))",
    "files": "import os, tempfile\nassert os.listdir() == []\nopen('a', 'w').write('1')\n"
    "with tempfile.TemporaryDirectory() as d:\n    open(d + '/b', 'w').write('2')\n" + ADD,
    "numpy": "import numpy as np\ndef add(x, y):\n    return np.array([x, y]).sum()",
    "int enum": "import enum\nclass E(enum.IntEnum):\n    A = 1\n    B = 5\n"
    "def add(x, y):\n    return E(x + y)",
}


def test_honest_programs_pass(sandbox):
    verdicts = sandbox.run([Check(p, TEST_ADD, "add", ADD) for p in HONEST_ADD.values()])
    assert not {n: v for n, v in zip(HONEST_ADD, verdicts, strict=True) if not v.passed}


ANSWERS = {  # expression of x -> what is true of it
    "(x, [x], {x: (1,)}, {x}, frozenset([x]), b'a', 1.5, None, True, 2j, range(3))":
        "list(map(type, r)) == [int, list, dict, set, frozenset, bytes, float, type(None), bool, "
        "complex, range] and r[:3] == (1, [1], {1: (1,)})",
    "(float('nan'), float('inf'), -0.0)": "r[0] != r[0] and str(r) == '(nan, inf, -0.0)'",
    "3 ** 100_000 * x": "r == 3 ** 100_000 and type(r) is int",
    "'\\ud800' + '\\u20ac' * x": "r == '\\ud800\\u20ac'",
    "__import__('fractions').Fraction(x, 3)": "r * 3 == 1",
    "__import__('datetime').date(2020, 1, x)": "r.isoformat() == '2020-01-01'",
    "__import__('collections').Counter([x, x])": "r.most_common() == [(1, 2)]",
    "__import__('collections').namedtuple('P', 'a b')(x, 2)": "r == (1, 2) and r.b == 2",
    "__import__('numpy').array([[x, 2.5]])": "r.tolist() == [[1, 2.5]] and r.dtype == float",
    "type(x)": "r is int",
    "[ValueError('a', x)]": "isinstance(r[0], ValueError) and r[0].args == ('a', 1)",
    "(v * 2 for v in range(x + 2))": "list(r) == [0, 2, 4]",
    "zip('ab', [x, 2])": "dict(r) == {'a': 1, 'b': 2}",
    "lambda y: [x, y]": "r(5) == [1, 5]",
    "__import__('re').match('a', 'a' * x)": "r.group() == 'a'",
    "list(range(2_000_000 * x))": "r == list(range(2_000_000))",
}  # fmt: skip
NODE = """
class Node:
    def __init__(self, val=0, next=None, kids=()):
        self.val, self.next, self.kids = val, next, list(kids)
def build(values):
    head = None
    for value in reversed(values): head = Node(value, head)
    return head
def values(node):
    found = []
    while node: found.append(node.val); node = node.next
    return found
"""
TURN = (
    "def f(x):\n    last = None\n    while x: x.next, last, x = last, x, x.next\n    return last\n"
)
POINT = """
import dataclasses, enum, typing
@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    def twice(self): return Point(2 * self.x)
class Color(enum.Enum): RED, BLUE = 1, 2
class Pair(typing.NamedTuple): a: int
class Slots:
    __slots__ = ('x', 'y')
    def __init__(self, x): self.x = x
"""
STACK = """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __bool__(self): return bool(self.items)
    size = property(lambda self: len(self.items))
kept = Stack()
def bump(): kept.push(1)
"""
BOX = """
class Box:
    def __init__(self): self.d = {}
    def __iter__(self): return iter(self.d)
    def __len__(self): return len(self.d)
    def __getitem__(self, k): return self.d[k]
    def __setitem__(self, k, v): self.d[k] = v
    def __delitem__(self, k): del self.d[k]
    def __contains__(self, k): return k in self.d
    def __enter__(self): self.d['in'] = 1; return self
    def __exit__(self, *_): self.d['out'] = 1
f = Box
"""
Y = """
import functools
class Y:
    def __init__(self, x): self.x = x
    @functools.lru_cache
    def cached(self): return self.x == sorted(self.x)
    @functools.cached_property
    def once(self): return self.x == sorted(self.x)
    def ok(self): return self.x == sorted(self.x)
    def same(self, other): return self.x == other.x
class Bad(Exception):
    def fatal(self): return False
"""
MAPPING = """
from collections.abc import MutableMapping
class D(MutableMapping):
    def __init__(self): self.d = {}
    def __getitem__(self, k): return self.d[k]
    def __setitem__(self, k, v): self.d[k] = v
    def __delitem__(self, k): del self.d[k]
    def __iter__(self): return iter(self.d)
    def __len__(self): return 9
    def __repr__(self): return 'D'
f = D
"""
LEFT = """
class f:
    def __init__(self, x): self.x = x
    def __iter__(self): return self
    def __len__(self): return len(self.x)
    def __next__(self):
        if not self.x: raise StopIteration
        return self.x.pop(0)
"""
COUNT = (
    "log = []\ndef f(n=3):\n    for i in range(n): log.append(i); yield i\ndef seen(): return log\n"
)
RIGHT = {  # name: (program, body of check(f), "" or the reference; without it: the program)
    **{f"answers {p}": (f"def f(x): return {p}", f"r = f(1)\nassert {t}", "")
       for p, t in ANSWERS.items()},
    # Arguments arrive and come back.
    "changed arguments": ("def f(x, d):\n    x[0].sort()\n    x.append(1)\n    d['k'] = {2}",
        "inner = [3, 1, 2]\nouter, d = [inner], {}\nf(outer, d=d)\n"
        "assert outer == [[1, 2, 3], 1] and d == {'k': {2}} and inner == [1, 2, 3]"),
    "rows that move": ("def f(a):\n    a.sort()\n    a[0][0] += 5\n    return a",
        "a, b = [2], [1]\nrows, kept = [a, b], [a, b]\nassert f(rows) is rows\n"
        "assert rows == [[6], [2]] and rows[0] is b and rows[1] is a and kept == [[2], [6]]"),
    "dicts that move": ("def f(a, d):\n    a.reverse()\n    d['k'] = a.pop()\n    return d",
        "a, b = {'n': [2]}, {'n': 1}\nrows, d = [a, b], {}\nassert f(rows, d=d) == {'k': a}\n"
        "assert rows == [b] and d['k'] is a"),
    "rows in new containers": ("def f(a): return {'x': (a[1], [a[0]])}",
        "a, b = [1], [2]\nr = f([a, b])\nassert r['x'][0] is b and r['x'][1][0] is a"),
    "changed, and then raised": ("def f(x):\n    x[0].append(1)\n    raise KeyError('k')",
        "x = [[]]\ntry: f(x)\nexcept KeyError: assert x == [[1]]\nelse: assert False"),
    "changed by the test's function": (
        "def f(fill, n):\n    d = {'a': [n]}\n    e = fill(d['a'], d)\n"
        "    return d, e is d['a'], fill",
        "def fill(x, d):\n    x.append(1); d['k'] = x\n    return x\n"
        "assert f(fill, 0) == ({'a': [0, 1], 'k': [0, 1]}, True, fill)"),
    "changed arrays": ("def f(a, d): a *= 2; d['x'][0] = 9", "import numpy as np\n"
        "a, b = np.arange(3), np.zeros((2, 2))\nf(a, {'x': b})\n"
        "assert a.tolist() == [0, 2, 4] and b.tolist() == [[9, 9], [0, 0]]"),
    "other containers": ("def f(*args):\n    for a in args: a.pop(); a.extend(list(a))",
        "from collections import deque\nd, b = deque([1, 2], 3), bytearray(b'ab')\n"
        "f(d, b)\nassert d == deque([1, 1], 3) and d.maxlen == 3 and b == b'aa'"),
    "a list in itself": ("def f(x): x.append(x)", "x = []\nf(x)\nassert x[0] is x"),
    "a field that the test changes": (STACK + "f = Stack", "s = f()\ns.items.append(3)\n"
        "assert s.size == 1 and s.items == [3] and s.pop() == 3 and s.items == []"),
    "an int that becomes a float": ("def f(x): x[0] = 1.0",
        "x = [1]\nf(x)\nassert str(x) == '[1.0]'"),
    "two lists that were one": ("def f(x): x[0].append(1)",
        "x = [[0]] * 2\nf(x)\nassert x[1] == [0, 1]"),
    "functions as arguments": ("def f(g, xs): return sorted(xs, key=g), list(map(g, [1, -2]))",
        "assert f(lambda v: -v, iter([1, 3])) == ([3, 1], [-1, 2])\n"
        "assert f(abs, [-3, 2]) == ([2, -3], [1, 2])"),
    "any keyword": ("def f(self, target): return target", "assert f(self=1, target=9) == 9"),
    "classes as arguments": ("def f(k): return k('3')", "assert f(int) == 3 and f(str) == '3'"),
    "arrays as arguments": ("def f(a): return (a * 2).sum()",
        "import numpy\nassert f(numpy.array([[1, 2], [3, 4]])) == 20"),
    "two million": ("def f(xs): return sum(xs)", "assert f([1] * 2_000_000) == 2_000_000"),
    "program and test call each other": ("def f(g, n): return n and g(n)",
        "def g(n): return f(g, n - 1) + 1\nassert f(g, 30) == 30"),
    # Instances of classes that the test deals in: by value, with the reference's methods.
    "nodes": (NODE + TURN, "assert values(f(build([1, 2, 3]))) == [3, 2, 1]"),
    "nodes of a class that the program has not": (TURN,
        "assert values(f(build([1, 2, 3]))) == [3, 2, 1]", NODE + TURN),
    "30,000 nodes": (NODE + TURN,
        "assert values(f(build(range(30_000)))) == [*range(30_000)][::-1]"),
    "nodes changed and given back": (NODE + TURN,
        "h = build([1, 2, 3])\nr = f(h)\nassert h.next is None and r.next.next is h"),
    "a cycle": (NODE + "def f(x):\n    seen = set()\n    while x and id(x) not in seen:\n"
        "        seen.add(id(x)); x = x.next\n    return bool(x)\n",
        "h = build([1, 2])\nassert not f(h)\nh.next.next = h\nassert f(h)"),
    "a shared node": (NODE + "def f():\n    end = Node(7)\n    return Node(1, kids=[end, end])",
        "r = f()\nassert r.kids[0] is r.kids[1] and isinstance(r, Node) and not Node().kids"),
    "equality and hash": (POINT + "def f(x): return {Point(x), Point(2)}",
        "assert f(1) == {Point(1), Point(2)} and Point(2) in f(3)"),
    "methods": (POINT + "def f(p): return Point(p.x + 1)",
        "assert f(Point(1)).twice() == Point(4)"),
    "enum": (POINT + "def f(c): return Color.BLUE if c is Color.RED else Color.RED",
        "assert f(Color.RED) == Color.BLUE and f(Color.BLUE) is Color.RED"),
    "named tuple": (POINT + "def f(p): return Pair(p.a + 1)", "assert f(Pair(1)) == Pair(2)"),
    "slots": (POINT + "def f(s):\n    s.y = s.x\n    return s", "assert f(Slots(3)).y == 3"),
    # Objects of the program's own can be asked, and can do what they can do.
    "a class": (STACK + "f = Stack", "s = f()\nassert not s and len(s) == 0\ns.push(1); s.push(2)\n"
        "assert s and s.size == 2 and s.items == [1, 2] and s.pop() == 2 and s.items == [1]", ""),
    "fields are read anew": (STACK + "def f(): return kept",
        "a = f()\nassert a.size == 0 and a.items == []\nbump()\nassert a.items == [1]", ""),
    "a container": (BOX, "b = f()\nb['a'] = 1\nassert 'a' in b and 'z' not in b and b['a'] == 1\n"
        "assert list(b) == ['a']\ndel b['a']\nassert len(b) == 0", ""),
    "a context manager": (BOX, "b = f()\nwith b as c:\n    assert c is b and list(b) == ['in']\n"
        "assert list(b) == ['in', 'out']", ""),
    "a generator": (COUNT, "import collections.abc, inspect\ng = f()\n"
        "assert inspect.isgenerator(g) and isinstance(g, collections.abc.Iterator)\n"
        "assert not callable(g) and not hasattr(g, '__len__') and iter(g) is g\n"
        "assert next(g) == 0 and seen() == [0]\n"
        "assert list(g) == [1, 2]", ""),
    "a long iterator": (COUNT, "assert sum(f(100_000)) == 50_000 * 99_999", ""),
    "an error at the end of one": ("def f():\n    yield from range(999)\n    raise ValueError",
        "n = 0\ntry:\n    for x in f(): n += 1\nexcept ValueError: pass\nassert n == 999", ""),
    "no iterator": ("class A:\n    def __getitem__(self, i): return [4, 5][i]\nf = A",
        "import collections.abc\na = f()\nassert not callable(a) and not hasattr(a, '__iter__')\n"
        "assert not isinstance(a, collections.abc.Iterable) and list(a) == [4, 5]", ""),
    "metadata": ("def f():\n    'doc'", "assert f.__name__ == 'f' and f.__doc__ == 'doc'; f()", ""),
    "nodes of its own": (NODE + "f = build", "node, total = f(range(10_000)), 0\n"
        "while node: total += node.val; node = node.next\nassert total == 49_995_000", ""),
    "coroutines": ("import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1",
        "import asyncio\nasync def both(): return await asyncio.gather(f(1), f(2))\n"
        "assert asyncio.run(f(1)) == 2 and asyncio.run(both()) == [2, 3]", ""),
    **{f"nested {shape}": (
        f"def f(n, x):\n    for _ in range(n): x = {shape}\n    return x\n{more}",
        f"x = 1\nfor _ in range(900): x = {shape}\nassert f(0, x) == x and f(900, 1) == x", "")
       for shape in ("[x]", "(x,)", "{'k': x}")
       for more in ("", "import sys\nsys.setrecursionlimit(2**31 - 1)")},
    # Subclasses of plain data are plain; other classes have what they inherit.
    **{f"a subclass of {base}": (f"import collections\nclass A({base}): __getattr__ = {base}.get\n"
        "def f(x): return A(a=x)", "assert f(1) == {'a': 1}", "")
       for base in ("dict", "collections.Counter", "collections.OrderedDict")},
    "a subclass in an exception": ("class A(dict): pass\ndef f(): raise ValueError(A(a=1))",
        "try: f()\nexcept ValueError as e: assert e.args == ({'a': 1},)", ""),
    "plain types": ("import collections as c\ndef f(x): return type(x), c.Counter, {1: 2}.values()",
        "import collections\na, b, c = f(None)\nassert a is type(None) and list(c) == [2]\n"
        "assert b is collections.Counter", ""),
    "a read-only mapping": ("import types\ndef f(x): return types.MappingProxyType({'a': x})",
        "assert f(1) == {'a': 1}", ""),
    "inherited methods": (MAPPING, "d = f()\nd['a'] = 1\nassert d.get('a') == 1 and len(d) == 9\n"
        "assert d.pop('a') == 1 and list(d) == [] and str(d) == 'D'"),
    "__getattr__": ("class f:\n    def __getattr__(self, n): return n.upper()",
        "assert f().title == 'TITLE'"),
    "an iterator with a length": (LEFT, "it = f([1, 2, 3])\nassert len(it) == 3 == next(it) + 2\n"
        "assert len(it) == 2 and list(it) == [2, 3]"),
    "an iterator with a length, no reference": (LEFT,
        "it = f([1, 2, 3])\nassert len(it) == 3 == next(it) + 2", ""),
    "an iterator that begins again": ("class f:\n    def __iter__(self): self.n = 0; return self\n"
        "    def __next__(self):\n        self.n += 1\n        if self.n > 2: raise StopIteration\n"
        "        return self.n\n", "it = f()\nassert list(it) == list(it) == [1, 2]"),
    "what a class has computed": (Y + "def f(x):\n    y = Y(x); y.once, y.cached()\n    return y",
        "assert f([1, 2]).once and f([1, 2]).cached()"),
    "a class that the test does not name": (POINT + "def f(x): return Point(x)",
        "import dataclasses\nassert dataclasses.asdict(f(1)) == {'x': 1}"),
    # What a test does.
    "draws": ("def f(xs): return sum(xs)", "import random\nfor _ in range(9):\n"
        "    xs = [random.random(), 1]\n    assert f(xs) == sum(xs)"),
    "names of the library": ("import math\nfrom math import *\ndef f(x): return x * math.pi",
        "assert math.isclose(f(2), 2 * pi)", ""),
    "a builtin type": ("f = str", "assert f(1) == '1'", "def f(x): return str(x)"),
    "a builtin type, no reference": ("f = str", "assert f(1) == '1'", ""),
    "prompt helpers": ("def encode(s): return s[::-1]\ndef f(s): return s[::-1]",
        "assert f(encode('ab')) == 'ab'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def verdicts():
    checks = []
    for program, lines, *reference in RIGHT.values():
        checks.append(Check(program, check_of(lines), "f", *(reference or [program])))
    with Sandbox(workers=2) as roomy:
        return dict(zip(RIGHT, roomy.run(checks), strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(verdicts, name):
    assert verdicts[name].passed, verdicts[name]


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


# ---- it survives ---------------------------------------------------------------------------------


def descendants(pid):
    with contextlib.suppress(OSError):
        lists = [p.read_text() for p in pathlib.Path(f"/proc/{pid}/task").glob("*/children")]
        children = [int(child) for child in " ".join(lists).split()]
        return children + [pid for child in children for pid in descendants(child)]
    return []


def processes(box):
    """The process ids of a sandbox, of its servers first."""
    own = [server.process.pid for worker in box._workers for server in worker.servers.values()]
    return own + [pid for server in own for pid in descendants(server)]


def exists(pid):
    """Zombies do as well."""
    return os.path.exists(f"/proc/{pid}")


def numbered(count, slow=0.0):
    """Programs of which the odd ones are wrong."""
    wait = f"import time\ntime.sleep({slow})\n" if slow else ""
    programs = [f"{wait}{(ADD, WRONG)[i % 2]}# {i}" for i in range(count)]
    return [Check(program, TEST_ADD, "add") for program in programs]


@pytest.mark.parametrize("victim", ["candidate", "judge", "inside"])  # servers; in its namespaces
def test_killed_processes_lose_no_verdict(victim, capfd):
    with Sandbox(workers=2) as shot:
        seen = []

        def progress(done):
            seen.append(done)
            if len(seen) == 5:
                module = "judge" if victim == "judge" else "candidate"
                pid = shot._workers[0].servers[module,].process.pid
                os.kill(descendants(pid)[0] if victim == "inside" else pid, signal.SIGKILL)

        verdicts = shot.run(numbered(40, slow=0.01), progress)
    assert [v.outcome for v in verdicts] == ["passed", "wrong_answer"] * 20
    assert sum(seen) == 40 and capfd.readouterr().err == ""


def test_interrupted_run_leaves_nothing_for_the_next(sandbox):
    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sandbox.run(numbered(20, slow=0.05), interrupt)
    assert [v.passed for v in sandbox.run(numbered(6))] == [True, False] * 3


def test_closing_leaves_nothing_and_ends_a_run_under_way(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    tmp_path.chmod(0o755)
    box, found = Sandbox(workers=2), []

    def work():
        found.extend(verdict.passed for verdict in box.run(numbered(4)))
        with pytest.raises(RuntimeError, match="closed"):
            box.run(numbered(4, slow=60))
        found.append("closed")

    thread = threading.Thread(target=work)
    thread.start()
    while len(found) < 4:
        time.sleep(0.1)
    pids = processes(box)
    box.close()
    box.close()
    thread.join()
    assert found == [True, False, True, False, "closed"]
    with pytest.raises(RuntimeError, match="closed"):
        box.run(numbered(1))
    assert len(pids) > 8 and not any(map(exists, pids)) and not list(tmp_path.iterdir())


def test_killed_owner_leaves_no_process_and_no_file(tmp_path):
    tmp_path.chmod(0o755)
    program = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parents[1])!r})
from pfppo.sandbox import Check, Sandbox
box = Sandbox(timeout=1.0)
print("ready", flush=True)
box.run([Check("def f():\\n    while True: pass", "f()", "f")])
print("done", flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    owners = {w: subprocess.Popen(command, env=environment, **pipes) for w in ("ready", "done")}
    pids = []
    for last_word, owner in owners.items():
        while owner.stdout.readline().decode().strip() != last_word:
            pass
        time.sleep(0.2)
        pids += descendants(owner.pid)
        owner.kill()
        owner.communicate()
    end = time.monotonic() + 10
    while any(map(exists, pids)) or list(tmp_path.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(pids) >= 8


def test_a_sandbox_that_nothing_refers_to_closes_itself():
    box = Sandbox(workers=1)
    pids, folder = processes(box), box._workers[0].folder
    assert judge(box, ADD).passed and len(pids) > 4
    child = os.fork()
    if not child:
        box.close()  # the parent's alone to close
        os._exit(0)
    os.waitpid(child, 0)
    assert judge(box, ADD + "#").passed
    del box
    gc.collect()
    assert not any(map(exists, pids)) and not os.path.exists(folder)


def test_equal_checks_run_once_and_progress_adds_up(sandbox):
    steps = []
    verdicts = sandbox.run([numbered(1)[0]] * 50 + numbered(3)[1:], steps.append)
    assert [v.passed for v in verdicts] == [True] * 50 + [False, True]
    assert sorted(steps) == [1, 1, 50] and sandbox.run([]) == []


# ---- the benchmarks' files -----------------------------------------------------------------------


def rows(name):
    with (gzip.open if name.endswith("gz") else open)(DATA / name, "rt") as file:
        return [json.loads(line) for line in file]


@needs_data
@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_references_pass_and_pass_does_not(sandbox, step):
    checks, empty = [], []
    for row in rows("HumanEval.jsonl.gz")[::step]:
        reference = row["prompt"] + row["canonical_solution"]
        checks.append(Check(reference, row["test"], row["entry_point"], reference))
        program = row["prompt"] + "    pass\n"
        empty.append(Check(program, row["test"], row["entry_point"], reference))
    verdicts = sandbox.run(checks + empty)
    assert [v.passed for v in verdicts] == [True] * len(checks) + [False] * len(empty)
    checks = []
    for row in rows("mbpp.jsonl.gz")[:: 2 * step]:
        if row["task_id"] != 123:  # it takes longer than the limit
            test = row["test_setup_code"] + "\n" + "\n".join(row["test_list"])
            checks.append(Check(row["code"], test, "", row["code"]))
    assert [v for v in sandbox.run(checks) if not v.passed] == []


@needs_data
@pytest.mark.slow
def test_leetcode_s_references_pass_but_those_that_take_long_or_need_what_is_not_here():
    checks = []
    for row in rows("LeetCodeDataset-v0.3.1-test.jsonl.gz"):
        reference = row["prompt"] + "\n" + row["completion"]
        checks.append(Check(reference, row["test"], row["entry_point"], reference))
    with Sandbox(workers=2) as box:
        failed = [verdict for verdict in box.run(checks) if not verdict.passed]
    failed = [v for v in failed if "No module named 'sortedcontainers'" not in v.detail]
    assert all(v.outcome == "timeout" for v in failed) and len(failed) <= 12


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


# ---- what the docstring says of its limits -------------------------------------------------------

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
