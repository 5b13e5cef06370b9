"""Right programs pass in the sandbox, whatever they are made of and whatever they answer with."""

from pfppo.sandbox import Check, Sandbox

import pytest
from test_sandbox import ADD, TEST_ADD, check_of

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
