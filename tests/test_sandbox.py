"""The sandbox: the verdict of every kind of program, honest ones first, and what the pool survives.

What a candidate cannot forge or reach, and the lesser modes, are in test_jail.py.
"""

import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

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


# ---- outcomes ------------------------------------------------------------------------------------

OUTCOME_OF = {
    ADD: "passed",
    WRONG: "wrong_answer",
    "def add(x, y):\n    x + y": "wrong_answer",
    "def add(x, y):\n    return [x + y]": "wrong_answer",
    "def add(x, y) return x": "syntax_error",
    ADD + "\0": "syntax_error",
    "```python\n" + ADD + "```": "syntax_error",
    "def add(x, y):\n    return add(x, y)": "exception",
    "def add(x, y):\n    return x / 0": "exception",
    "n = input()\n" + ADD: "exception",
    "def add(x, y):\n    return undefined": "exception",
    "other = 1": "exception",
    "import no_such_module\n" + ADD: "exception",
    "def add(x, y):\n    while True: pass": "timeout",
    "import time\ndef add(x, y):\n    time.sleep(60)": "timeout",
    "import re\ndef add(x, y):\n    re.match(r'(a+)+$', 'a' * 45 + 'b')": "timeout",
    "def add(x, y):\n    return bytearray(1 << 30)": "memory",
    "import socket\nsocket.socket()\n" + ADD: "forbidden",
    "import os\nos.fork()\n" + ADD: "forbidden",
    "quit()\n" + ADD: "exit",
    "import os\nos._exit(0)\n" + ADD: "exit",
    "def add(x, y):\n    raise SystemExit(0)": "exit",
    "def add(x, y):\n    raise KeyboardInterrupt": "exit",
}


def test_every_outcome_has_its_name(sandbox):
    verdicts = sandbox.run([Check(program, TEST_ADD, "add") for program in OUTCOME_OF])
    found = {p: v.outcome for p, v in zip(OUTCOME_OF, verdicts, strict=True)}
    assert found == OUTCOME_OF
    assert set(found.values()) == set(OUTCOMES)
    assert all(v.passed == (v.outcome == "passed") and "\n" not in v.detail for v in verdicts)


# ---- honest programs -----------------------------------------------------------------------------

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
    "slow": "import time\nt = time.process_time()\nwhile time.process_time() - t < 0.6: pass\n"
    + ADD,
    "numpy": "import numpy as np\ndef add(x, y):\n    return np.array([x, y]).sum()",
    "int enum": "import enum\nclass E(enum.IntEnum):\n    A = 1\n    B = 5\n"
    "def add(x, y):\n    return E(x + y)",
}


def test_honest_programs_pass(sandbox):
    verdicts = sandbox.run([Check(p, TEST_ADD, "add", ADD) for p in HONEST_ADD.values()])
    failed = {n: v for n, v in zip(HONEST_ADD, verdicts, strict=True) if not v.passed}
    assert not failed


ANSWERS = {  # expression of x -> what the test says of it
    "(x, [x], {x: (1,)}, {x}, frozenset([x]), b'a', 1.5, None, True, 2j, range(3))": "assert "
    "list(map(type, r)) == [int, list, dict, set, frozenset, bytes, float, type(None), bool, "
    "complex, range]; assert r[:3] == (1, [1], {1: (1,)})",
    "(float('nan'), float('inf'), -0.0)": "assert r[0] != r[0] and str(r) == '(nan, inf, -0.0)'",
    "3 ** 100_000 * x": "assert r == 3 ** 100_000 and type(r) is int",
    "'\\ud800' + '\\u20ac' * x": "assert r == '\\ud800\\u20ac'",
    "__import__('fractions').Fraction(x, 3)": "assert r * 3 == 1",
    "__import__('datetime').date(2020, 1, x)": "assert r.isoformat() == '2020-01-01'",
    "__import__('collections').Counter([x, x])": "assert r.most_common() == [(1, 2)]",
    "__import__('collections').namedtuple('P', 'a b')(x, 2)": "assert r == (1, 2) and r.b == 2",
    "type(x)": "assert r is int",
    "(v * 2 for v in range(x + 2))": "assert list(r) == [0, 2, 4]",
    "zip('ab', [x, 2])": "assert dict(r) == {'a': 1, 'b': 2}",
    "lambda y: [x, y]": "assert r(5) == [1, 5]",
    "__import__('re').match('a', 'a' * x)": "assert r.group() == 'a'",
    "list(range(300_000 * x))": "assert r == list(range(300_000))",
}


def test_answers_keep_value_and_type(sandbox):
    checks = [
        Check(
            f"def f(x):\n    return {p}",
            f"def check(candidate):\n    r = candidate(1)\n    {t}",
            "f",
        )
        for p, t in ANSWERS.items()
    ]
    verdicts = sandbox.run(checks)
    assert not {p: v for p, v in zip(ANSWERS, verdicts, strict=True) if not v.passed}


def test_mutated_arguments_are_seen(sandbox):
    program = "def f(x, d):\n    x[0].sort()\n    x.append(1)\n    d['k'] = {2}"
    test = """
def check(candidate):
    inner = [3, 1, 2]
    outer, d = [inner], {}
    candidate(outer, d=d)
    assert outer == [[1, 2, 3], 1] and d == {'k': {2}}
    assert sorted(inner) == [1, 2, 3]
"""
    assert judge(sandbox, program, test).passed
    assert not judge(sandbox, "def f(x, d): pass", test).passed


def test_functions_and_iterators_as_arguments(sandbox):
    program = "def f(g, xs):\n    return sorted(xs, key=g), list(map(g, [1, -2]))"
    test = "def check(c):\n    assert c(lambda v: -v, iter([1, 3])) == ([3, 1], [-1, 2])\n"
    assert judge(sandbox, program, test + "    assert c(abs, [-3, 2]) == ([2, -3], [1, 2])").passed


def test_exceptions_come_as_the_same_class(sandbox):
    test = """
def check(candidate):
    try:
        candidate(1)
    except ValueError as error:
        assert error.args == ("bad", 1)
    else:
        assert False
"""
    assert judge(sandbox, "def f(x):\n    raise ValueError('bad', x)", test).passed
    own = "class Bad(ValueError): pass\ndef f(x):\n    raise Bad('bad', x)"
    assert judge(sandbox, own, test).passed
    assert judge(sandbox, own, test.replace("except ValueError", "except Bad"), "f", own).passed
    assert judge(sandbox, "def f(x):\n    raise TypeError('bad', x)", test).outcome == "exception"
    assert judge(sandbox, "def f(x):\n    return x", test).outcome == "wrong_answer"


CATCHES = """
def check(candidate):
    for x in (1, 2):
        try:
            candidate(x)
            assert False, "no error"
        except Bad as error:
            assert x == 1 and error.args == (1,)
        except Worse:
            assert x == 2
"""


@pytest.mark.parametrize(
    "classes, raised, outcome",
    [
        ("class Bad(Exception): pass\nclass Worse(Exception): pass", "Bad Worse", "passed"),
        ("class Worse(Exception): pass\nclass Bad(Worse): pass", "Bad Worse", "passed"),
        ("class Base(ValueError): pass\nclass Bad(Base): pass\nclass Worse(Base): pass\n"
         "class Worst(Worse): pass", "Bad Worst", "passed"),
        ("Bad = ValueError\nWorse = TypeError", "Bad Worse", "passed"),
        ("Bad = ValueError\nWorse = TypeError", "Bad ValueError", "wrong_answer"),
        ("Bad, Worse = KeyError, Exception", "Bad None", "exception"),
        ("Bad, Worse = KeyError, AssertionError", "Bad None", "exception"),
        ("class Bad(Exception): pass\nWorse = Bad", "None None", "exception"),
    ],
)  # fmt: skip
def test_exceptions_of_the_program_can_be_named_by_a_test(sandbox, classes, raised, outcome):
    one, other = raised.split()
    program = f"{classes}\ndef f(x):\n    raise ({one} if x == 1 else {other})(x)\n"
    assert judge(sandbox, program, CATCHES).outcome == outcome


@pytest.mark.parametrize("name", ["Exception", "AssertionError", "BaseException"])
def test_a_class_that_catches_all_catches_nothing_raised_by_the_test(sandbox, name):
    test = CATCHES.replace("        except Worse:\n            assert x == 2\n", "")
    program = f"Bad = {name}\ndef f(x): pass\n"
    assert judge(sandbox, program, test).outcome == "wrong_answer"
    lies = f"class Bad({name}): pass\nBad.__name__ = '{name}'\ndef f(x): pass\n"
    assert judge(sandbox, lies, test).outcome == "wrong_answer"


@pytest.mark.parametrize(
    "loop", ["all(map(lambda x: c(x) == x, [1, 2]))", "list(map(c, [1])) == []"]
)
def test_a_program_cannot_end_a_loop_of_the_test(sandbox, loop):
    test = f"def check(c):\n    assert {loop}"
    assert not judge(sandbox, "def f(x):\n    raise StopIteration", test).passed


NEXT = "def f(x): return x + 1\n"
TEST_FORMS = {  # name: (test, right program; wrong is one that adds 2)
    "under a guard": ("if __name__ == '__main__':\n    assert f(1) == 2\n", NEXT),
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n"
        "        self.assertEqual(f(1), 2)\nif __name__ == '__main__':\n    unittest.main()\n",
        NEXT,
    ),
    "ends itself": ("import sys\nsys.exit(0 if f(1) == 2 else 1)\n", NEXT),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n"
        "    assert list(pool.map(f, range(50))) == list(range(1, 51))\n",
        NEXT,
    ),
    "int subclass": ("import enum\nclass E(enum.IntEnum):\n    A = 1\nassert f(E.A) == 2\n", NEXT),
    "callback": ("assert f(lambda *, x: x) == 2", "def f(g): return g(x=1) + 1\n"),
    "views": (
        "keys, items = f({1: 2})\nassert keys == {2} and list(keys) == [2] and items == {(2, 3)}\n",
        "def f(d):\n    d = {k + 1: v + 1 for k, v in d.items()}\n    return d.keys(), d.items()\n",
    ),
    "endless": (
        "import itertools\nassert f(itertools.count(7)) == 8\n",
        "def f(xs): return next(xs) + 1\n",
    ),
}


@pytest.mark.parametrize("form", TEST_FORMS)
@pytest.mark.parametrize("with_reference", [False, True])
def test_forms_of_tests(sandbox, form, with_reference):
    test, right = TEST_FORMS[form]
    reference, wrong = right if with_reference else "", right.replace("+ 1", "+ 2")
    assert judge(sandbox, right, test, "f", reference).passed
    assert judge(sandbox, wrong, test, "f", reference).outcome == "wrong_answer"


def test_answers_that_take_the_test_for_ever_end(sandbox):
    test = "def check(f):\n    assert sum(f(1)) == 1"
    start = time.monotonic()
    verdict = judge(sandbox, "def f(x):\n    return range(10**12)\n", test)
    assert verdict.outcome == "timeout" and time.monotonic() - start < 30
    assert judge(sandbox, "def f(x):\n    return [x]\n", test).passed


@pytest.mark.parametrize("reference", ["", "def f(x):\n    return str(x)\n"])
def test_a_builtin_type_may_be_the_answer(sandbox, reference):
    test = "def check(candidate):\n    assert candidate(1) == '1'"
    assert judge(sandbox, "f = str\n", test, "f", reference).passed
    assert judge(sandbox, "f = list\n", test, "f", reference).outcome == "wrong_answer"


@pytest.mark.parametrize("shape", ["[x]", "(x,)", "{'k': x}"])
def test_values_may_be_nested_deeper_than_a_program_recurses(sandbox, shape):
    program = f"def f(n, x):\n    for _ in range(n):\n        x = {shape}\n    return x\n"
    test = program.replace("def f", "def g") + "def check(f):\n"
    test += "    x = g(900, 1)\n    assert f(0, x) == x\n    assert f(900, 1) == x\n"
    assert judge(sandbox, program, test, "f").passed
    low = "import sys\nsys.setrecursionlimit(2**31 - 1)\n"
    assert judge(sandbox, low + program, test, "f").passed


def test_coroutines_are_awaited_by_the_test(sandbox):
    program = "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1\n"
    test = "import asyncio\nasync def both():\n    return await asyncio.gather(f(1), f(2))\n"
    test += "assert asyncio.run(f(1)) == 2\nassert asyncio.run(both()) == [2, 3]\n"
    assert judge(sandbox, program, test).passed
    assert judge(sandbox, program.replace("+ 1", "+ 2"), test).outcome == "wrong_answer"


NODES = """
class Node:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next
def build(values):
    return Node(values[0], build(values[1:])) if values else None
class Solution:
    def turn(self, head):
        last = None
        while head:
            head.next, last, head = last, head, head.next
        return last
"""


def test_linked_lists_by_handle_with_and_without_a_reference(sandbox):
    test = """
solution = Solution()
def values(node):
    return [node.val] + values(node.next) if node else []
assert values(solution.turn(build([1, 2, 3]))) == [3, 2, 1]
"""
    assert judge(sandbox, NODES, test, "Solution().turn", NODES).passed
    assert judge(sandbox, NODES, test, "Solution().turn").passed
    wrong = NODES.replace("return last", "return head")
    assert not judge(sandbox, wrong, test, "Solution().turn", NODES).passed
    method = "def check(candidate):\n    assert candidate(build([1, 2])).next.val == 1"
    assert judge(sandbox, NODES, method, "Solution().turn", NODES).passed


def test_prompt_helpers_come_from_the_reference(sandbox):
    reference = "def encode(s):\n    return s[::-1]\ndef f(s):\n    return s[::-1]\n"
    lying = "def encode(s):\n    return s\ndef f(s):\n    return s\n"
    test = "def check(candidate):\n    assert candidate(encode('ab')) == 'ab'"
    assert judge(sandbox, reference, test, "f", reference).passed
    assert not judge(sandbox, lying, test, "f", reference).passed


def test_names_of_the_harmless_library_are_the_testers(sandbox):
    program = "import math\nfrom math import *\ndef f(x):\n    return x * math.pi"
    assert judge(sandbox, program, "assert math.isclose(f(2), 2 * pi)").passed
    lying = "class math:\n    isclose = lambda a, b: True\ndef f(x):\n    return 0"
    test = "import math\nassert math.isclose(f(2), 6.28, rel_tol=0.01)"
    assert not judge(sandbox, lying, test).passed
    assert not judge(
        sandbox, lying, test[12:], "f", "import math\ndef f(x):\n    return 2 * x"
    ).passed


# ---- it survives ---------------------------------------------------------------------------------


def descendants(pid):
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parents[int(entry)] = int(file.read().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def alive(pid):
    """Does the process exist, and not only as an entry that its parent has yet to read?"""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def numbered(count, slow=0.0):
    """Programs of which the odd ones are wrong."""
    wait = f"import time\ntime.sleep({slow})\n" if slow else ""
    programs = [f"{wait}{(ADD, WRONG)[i % 2]}# {i}" for i in range(count)]
    return [Check(program, TEST_ADD, "add") for program in programs]


def test_killed_workers_lose_no_verdict():
    with Sandbox(workers=2) as shot:
        seen = []

        def progress(done):
            seen.append(done)
            if len(seen) in (5, 15, 25):  # a tester, a server, and what holds its name space
                victims = [worker.process.pid for worker in shot._workers]
                victims += descendants(victims[0])[: len(seen) // 10]
                os.kill(victims[-1 if len(seen) > 5 else 0], signal.SIGKILL)

        verdicts = shot.run(numbered(40, slow=0.01), progress)
    assert [v.outcome for v in verdicts] == ["passed", "wrong_answer"] * 20
    assert sum(seen) == 40


def test_interrupted_run_leaves_nothing_for_the_next(sandbox):
    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sandbox.run(numbered(20, slow=0.05), interrupt)
    assert [v.passed for v in sandbox.run(numbered(6))] == [True, False] * 3


def test_killed_owner_leaves_no_process():
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
    for last_word in "ready", "done":
        owner = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        while owner.stdout.readline().decode().strip() != last_word:
            pass
        time.sleep(0.2)
        pids = descendants(owner.pid)
        owner.kill()
        owner.wait()
        end = time.monotonic() + 10
        while any(map(alive, pids)):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert len(pids) >= 4
        owner.stdin.close()
        owner.stdout.close()


def test_equal_checks_run_once_and_progress_adds_up(sandbox):
    sleepy = Check("import time\ntime.sleep(0.3)\n" + ADD, TEST_ADD, "add")
    steps, start = [], time.monotonic()
    verdicts = sandbox.run([sleepy] * 50 + numbered(2), steps.append)
    assert [v.passed for v in verdicts] == [True] * 51 + [False]
    assert sum(steps) == 52 and time.monotonic() - start < 3
    assert sandbox.run([]) == []


def test_a_busy_machine_fails_no_honest_program():
    burn = "import time\nt = time.process_time()\nwhile time.process_time() - t < {}: pass\n"
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    try:
        with Sandbox(workers=2, timeout=0.5) as busy:
            found = busy.run([Check(burn.format(s) + ADD, TEST_ADD, "add") for s in (0.3, 0.31, 5)])
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert [v.outcome for v in found] == ["passed", "passed", "timeout"]


def test_from_a_thread_and_beside_another(sandbox):
    found = []

    def work():
        with Sandbox(workers=1) as own:
            found.extend(own.run(numbered(4)))

    thread = threading.Thread(target=work)
    thread.start()
    mine = sandbox.run(numbered(4))
    thread.join()
    assert [v.passed for v in found] == [v.passed for v in mine] == [True, False] * 2


def test_closing_twice_is_closing_once():
    box = Sandbox(workers=1)
    box.close()
    box.close()


# ---- the benchmarks' files -----------------------------------------------------------------------


def rows(name):
    with (gzip.open if name.endswith("gz") else open)(DATA / name, "rt") as file:
        return [json.loads(line) for line in file]


@needs_data
def test_humaneval_references_pass_and_pass_does_not(sandbox):
    checks, empty = [], []
    for row in rows("HumanEval.jsonl.gz"):
        reference = row["prompt"] + row["canonical_solution"]
        checks.append(Check(reference, row["test"], row["entry_point"], reference))
        program = row["prompt"] + "    pass\n"
        empty.append(Check(program, row["test"], row["entry_point"], reference))
    assert sum(v.passed for v in sandbox.run(checks)) == 164
    assert sum(v.passed for v in sandbox.run(empty)) == 0


@needs_data
def test_mbpp_references_pass(sandbox):
    checks = []
    for row in rows("mbpp.jsonl.gz")[:100] + rows("mbpp.jsonl.gz")[360:370]:
        if row["task_id"] != 123:  # it takes longer than the limit
            test = row["test_setup_code"] + "\n" + "\n".join(row["test_list"])
            checks.append(Check(row["code"], test, "", row["code"]))
    assert [v for v in sandbox.run(checks) if not v.passed] == []


# ---- a call is sent when the one before it has been answered -------------------------------------

PEEKS = {  # ways to look for calls that are still to come; each ends with `seen`, bytes
    "the link's buffer": """
    frame = sys._getframe()
    while "link" not in frame.f_locals:
        frame = frame.f_back
    seen = bytes(frame.f_locals["link"].buffer)
""",
    "the input descriptor": """
    seen = b""
    for descriptor in range(10):
        try:
            end = socket.socket(fileno=os.dup(descriptor))
            seen += end.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            pass
""",
    "the input descriptor, after a while": """
    time.sleep(0.1)
    seen = b""
    try:
        seen = socket.socket(fileno=os.dup(3)).recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        pass
""",
    "how much waits there": """
    size = bytearray(4)
    fcntl.ioctl(3, 0x541B, size)
    seen = bytes(int.from_bytes(size, "little"))
""",
}
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
    test = "def check(f):\n" + "".join(f"    {line}\n" for line in lines.split("; "))
    head = "import fcntl, os, re, socket, sys, time\ndef f(x):" + PEEKS[way]
    answers = "    found = re.search(rb'\\[\\[?(\\d+)\\]', seen)\n"
    answers += "    return int(found[1]) if found else 7\n"
    assert not judge(sandbox, head + answers, test, "f", RIGHT_NEXT).passed
    # The right program, which complains where it sees something.
    complains = "    if seen: raise ValueError(seen)\n" + RIGHT_NEXT.partition("\n")[2]
    verdict = judge(sandbox, head + complains, test, "f", RIGHT_NEXT)
    assert verdict.passed, verdict


def test_an_answer_is_not_computed_from_the_arguments_of_a_later_call(sandbox):
    program = "import fcntl, os, re, socket, sys, time\ndef f(x):" + PEEKS["the link's buffer"]
    program += "    ahead = re.search(rb'\\[\\[([0-9, ]+)\\]', seen)\n"
    program += "    return sum(map(int, ahead[1].split(b','))) if ahead else 0\n"
    test = "def check(f):\n    assert f(2) == 3\n    assert f([1, 2]) == 0"
    assert not judge(sandbox, program, test, "f").passed


def test_an_answer_that_is_sent_twice_answers_nothing_later(sandbox):
    """A program may write answers ahead, but it cannot know what they answer."""
    frame = "b''.join(len(t).to_bytes(4, 'little') + t for t in [b'ok\\n[3, null]'] * 3)"
    program = f"import os\ndef f(x):\n    os.write(3, {frame})\n    return 3\n"
    test = "def check(f):\n    assert f(2) == 3\n    assert f(3) == 5\n    assert f(5) == 7"
    assert not judge(sandbox, program, test, "f", RIGHT_NEXT).passed


# A test's verdict is that of the same test in one process, whatever it does with its arguments.
TESTS = {
    "an argument used again after the program may have changed it": (
        "def check(f):\n    xs = [2, 1]\n    assert f(xs) == 3\n    assert f(xs + [1]) == 4\n"
        "    xs.append(f(xs))\n    assert f(xs) == 6"
    ),
    "an expected exception": (
        "def check(f):\n    assert f([1]) == 1\n    try:\n        f(None)\n"
        "    except TypeError:\n        pass\n    else:\n        assert False\n"
        "    assert f([2]) == 2"
    ),
    "random inputs": (
        "import random\nlast = [random.random() for _ in range(3)]\ndef check(f):\n"
        "    for _ in range(100):\n        xs = [random.randint(0, 9) for _ in range(4)]\n"
        "        assert f(xs) == sum(xs)"
    ),
    "state of the test's own": (
        "seen = []\ndef check(f):\n    seen.append(1)\n    assert f(seen) == 1\n"
        "    seen.append(1)\n    assert f(seen) == 2\n    assert len(seen) == 2"
    ),
    "large arguments": (
        "def check(f):\n    for n in (10, 20_000, 10, 100_000, 20_000, 7):\n"
        "        assert f([1] * n) == n"
    ),
    "many calls": "def check(f):\n    for i in range(1000):\n        assert f([i, 1]) == i + 1",
}
SUMS = "def f(xs):\n    return sum(xs)\n"
PROGRAMS = {  # wrong ones first: nothing of them is left for the right ones
    "wrong": "def f(xs):\n    return sum(xs) if len(xs) != 1 else 0\n",
    "late": "def f(xs, calls=[]):\n    calls.append(1)\n    return sum(xs) + (len(calls) > 2)\n",
    "clears": "def f(xs):\n    total = sum(xs)\n    xs.clear()\n    return total\n",
    "sorts": "def f(xs):\n    xs.sort()\n    return sum(xs)\n",
    "right": SUMS,
}


@pytest.mark.parametrize("name", TESTS)
def test_verdicts_are_those_of_the_test_in_one_process(sandbox, name):
    found = sandbox.run([Check(program, TESTS[name], "f", SUMS) for program in PROGRAMS.values()])
    expected = [directly(program, TESTS[name]) for program in PROGRAMS.values()]
    assert [verdict.passed for verdict in found] == expected and expected[-1]


def directly(program, test):
    """What the test says in this process."""
    space = {}
    random.seed(0)
    exec(program, space)
    exec(test, space)
    random.seed(0)
    try:
        space["check"](space["f"])
        return True
    except Exception:
        return False


# ---- what it does not do -------------------------------------------------------------------------


@pytest.mark.xfail(strict=True, reason="a candidate may start no process")
def test_honest_subprocess(sandbox):
    program = "import subprocess\ndef add(x, y):\n    return int(subprocess.run(['/bin/echo', "
    assert judge(sandbox, program + "str(x + y)], capture_output=True).stdout)").passed


@pytest.mark.xfail(strict=True, reason="objects of the program's own classes compare by identity")
def test_equality_of_own_classes(sandbox):
    program = "class P:\n    def __eq__(self, other): return True\ndef f():\n    return P()"
    assert judge(sandbox, program, "def check(candidate):\n    assert candidate() == P()").passed


@pytest.mark.xfail(strict=True, reason="without a reference any method may be what is tested")
def test_lying_methods_without_a_reference(sandbox):
    program = "class Y:\n    startswith = lambda self, text: True\ndef f():\n    return Y()"
    test = "def check(candidate):\n    assert candidate().startswith('abc')"
    assert not judge(sandbox, program, test).passed


@pytest.mark.xfail(strict=True, reason="answers for the tests' arguments alone are right answers")
def test_hard_coded_answers(sandbox):
    program = "def add(x, y):\n    return {(0, 1): 1, (2, 3): 5}[x, y]"
    assert not judge(sandbox, program).passed
