"""The sandbox: what passes, what must not, what a candidate cannot reach, what it survives.

The hostile programs are the ones a policy under pressure finds first; the project's larger set of
them, where its folder exists, runs here too.
"""

import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from pfppo.config import UserError
from pfppo.sandbox import OUTCOMES, Check, Sandbox

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


# ---- forgery -------------------------------------------------------------------------------------

LINK = (
    "import gc, sys\njail = sys.modules['pfppo.jail']\nlink = next(o for o in gc.get_objects() "
    + ("if isinstance(o, jail.Link))\n")
)
EQUAL = "class E:\n    def __eq__(s, o): return True\n    __ne__ = lambda s, o: False\n"
FORGED = {
    "equals everything": EQUAL + "def add(x, y):\n    return E()",
    "lying int": EQUAL.replace("E:", "E(int):") + "def add(x, y):\n    return E(9)",
    "not there": "def __getattr__(n): return lambda *a: 1\n",
    "patched builtins": "import builtins\nfor n in ('abs', 'len', 'exec', 'eval', 'all', 'type'):\n"
    "    setattr(builtins, n, lambda *a, **k: True)\n" + WRONG,
    "excepthook": "import sys, os, atexit\nsys.excepthook = lambda *a: os._exit(0)\n"
    "atexit.register(os._exit, 0)\n" + WRONG,
    "every descriptor": "import os\nfor d in range(64):\n"
    "    for t in ('passed', '[\"passed\", 0, \"\"]'):\n"
    "        try: os.write(d, t.encode() + b'\\n')\n        except OSError: pass\n" + WRONG,
    "frames ahead of time": LINK + "for _ in range(9): link.send('passed\\n[0, null]')\n" + WRONG,
    "verdict in place of an answer": LINK
    + 'def add(x, y):\n    link.send(\'["passed", 0, ""]\')\n',
    "frames": "import sys\nf = sys._getframe()\nwhile f:\n    f.f_globals.update(_answer=print)\n"
    "    f = f.f_back\n" + WRONG,
    "other's object": LINK + "def add(x, y):\n    link.send('ok\\n[{\"y\": 0}, null]')\n",
    "odd number": LINK + "def add(x, y):\n    link.send('ok\\n[{\"h\": -1}, null]')\n",
    "unknown tag": LINK + 'def add(x, y):\n    link.send(\'ok\\n[{"f": "exec"}, null]\')\n',
    "no type": LINK + 'def add(x, y):\n    link.send(\'ok\\n[{"T": "exec"}, null]\')\n',
    "odd error": LINK + "def add(x, y):\n    link.send('raise\\n[[], 1, {\"h\": 1}]')\n",
    "callback from nowhere": LINK + "def add(x, y):\n    link.send('callback\\n[0, [1]]')\n",
    "changes that fit nothing": LINK + "def add(x, y):\n    link.send('ok\\n[1, [[1], 2]]')\n",
    "too long": LINK + "def add(x, y):\n    link.write(b'\\xff' * 4)\n",
    "trickle": LINK
    + "import time\ndef add(x, y):\n    link.write(b'\\xff\\0\\0\\0')\n    while 1:\n"
    "        link.write(b' '); time.sleep(0.2)",
    "nested": "def add(x, y):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "itself": "def add(x, y):\n    a = []\n    a.append(a)\n    return a",
    "slow equality": "import decimal\ndef add(x, y):\n    return decimal.Decimal('1e999999999')",
    "claims the test's error": "def add(x, y):\n    raise AssertionError",
    "StopIteration": "def add(x, y):\n    raise StopIteration",
    "exits in a thread": "import os, threading, time\nthreading.Timer(0.1, os._exit, [0]).start()\n"
    "def add(x, y):\n    time.sleep(0.5)",
    "stops itself": "import ctypes\nctypes.CDLL(None)['raise'](19)\n" + WRONG,
    "segfault": "import ctypes\nctypes.string_at(0)\n" + ADD,
}


def test_forged_verdicts_do_not_pass(sandbox):
    assert judge(sandbox, LINK + ADD).passed  # the forgers do find their link
    verdicts = sandbox.run([Check(program, TEST_ADD, "add", ADD) for program in FORGED.values()])
    assert not [name for name, v in zip(FORGED, verdicts, strict=True) if v.passed]
    assert not [v for v in verdicts if "tester died" in v.detail]


def test_objects_cannot_say_what_the_test_hopes_to_hear(sandbox):
    yes = "class Y:\n    def __getattr__(s, n): return lambda *a: True\n    __abs__ = __sub__ = "
    yes += "__lt__ = __contains__ = lambda *a: s\n    def __iter__(s): return iter([])\ndef f(x):\n"
    yes = yes.replace("lambda *a: s\n", "lambda *a: True\n") + "    return Y()\n"
    reference = "def f(x):\n    return 'abc'"
    for question in "r.startswith('a')", "abs(r - 2) < 1e-6", "r < 3", "'a' in r", "r == r.lower()":
        test = f"def check(candidate):\n    r = candidate(1)\n    assert {question}"
        assert not judge(sandbox, yes, test, "f", reference).passed, question


def test_a_test_that_swallows_everything_passes_nothing_that_died(sandbox):
    test = "def check(candidate):\n    try:\n        candidate()\n    except:\n        pass"
    assert judge(sandbox, "def f():\n    raise SystemExit", test).outcome == "exit"
    assert judge(sandbox, "import os\ndef f():\n    os._exit(0)", test).outcome == "exit"
    assert judge(sandbox, "def f():\n    raise ValueError", test).passed


def test_endless_answers_end(sandbox):
    endless = "def f():\n    while True: yield 'x' * 1000"
    verdict = judge(sandbox, endless, "assert list(f()) == []")
    assert verdict.outcome in ("timeout", "memory") and verdict.seconds < 12


def test_a_test_that_never_calls_the_program_is_no_pass(sandbox):
    test = "def check(candidate):\n    assert g(1) == 1"
    assert not judge(
        sandbox, "def f(x): pass", test, "f", "def g(x): return x\ndef f(x): pass"
    ).passed


# ---- containment ---------------------------------------------------------------------------------

HELD = {  # each raises OSError, or the program passes
    "fork": "import ctypes\nif ctypes.CDLL(None).fork() < 0: raise OSError",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
    "unix socket": "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "ptrace": "import ctypes\nif ctypes.CDLL(None).ptrace(16, 1, 0, 0) < 0: raise OSError",
    "kill parent": "import os\nos.kill(os.getppid() or 1, 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "chmod": "import os\nopen('a', 'w')\nos.chmod('a', 0o777)",
    "read the password file": "open('/etc/passwd').read()",
    "read this test": f"open({__file__!r}).read()",
    "list the root's home": "import os\nos.listdir('/root')\nos.listdir('/home')",
    "write to the library": "import os\nopen(os.__file__ + 'x', 'w')",
    "write to shared memory": "open('/dev/shm/x', 'w')",
    "other processes": "import os\nos.listdir('/proc/1')",
    "outlive its parent": "import ctypes\n"
    "if ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) < 0: raise OSError",
    "memory beside the limit": "import os\nos.memfd_create('x')",
    "signals by fcntl": "import fcntl\nfcntl.fcntl(3, fcntl.F_SETOWN, 1)",
    "huge file": "f = open('a', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))",
}


def held_checks():
    code = "try:\n    {}\nexcept OSError: held = True\nelse: held = False\ndef add(x, y):\n"
    code += "    return x + y if held else None"
    return [Check(code.format(p.replace("\n", "\n    ")), TEST_ADD, "add") for p in HELD.values()]


def test_acts_that_are_refused(sandbox):
    verdicts = sandbox.run(held_checks())
    assert not [(n, v) for n, v in zip(HELD, verdicts, strict=True) if not v.passed]


def test_limits_cannot_be_raised(sandbox):
    program = """
import resource
for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
    try: resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)
    except ValueError: continue
    raise SystemExit
"""
    assert judge(sandbox, program + ADD).passed


def test_nothing_of_the_runner_is_visible(sandbox, monkeypatch):
    monkeypatch.setenv("PFPPO_SECRET", "topsecret")
    with Sandbox(workers=1) as other:
        program = "import os, sys\nassert 'PFPPO_SECRET' not in os.environ and len(sys.argv) == 1\n"
        program += "assert os.getpgid and set(os.environ) <= {'HOME', 'TMPDIR'}\n"
        program += "for d in range(4, 64):\n    try: os.fstat(d)\n    except OSError: continue\n"
        assert judge(other, program + "    raise SystemExit\n" + ADD).passed


def test_candidates_find_nothing_of_each_other(sandbox):
    mess = "import os, builtins, math, sys\nos.mkdir('d', 0)\nopen('f{}', 'w').write('x' * 9999)\n"
    mess += "os.symlink('/', 'l') if 0 else None\nbuiltins.len = 7\nmath.sqrt = 4\n"
    mess += "sys.modules['heapq'] = None\n"
    clean = "import os, math, heapq\nassert os.listdir() == [] and math.sqrt(4) == 2 == len('ab')\n"
    checks = []
    for number in range(6):
        checks += [Check(mess.format(number) + WRONG, TEST_ADD, "add")]
        checks += [Check(clean + ADD + f"#{number}", TEST_ADD, "add")]
    assert all(verdict.passed for verdict in sandbox.run(checks)[1::2])


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


def test_nothing_outlives_the_verdict():
    with Sandbox(workers=1) as one:
        judge(one, ADD)
        time.sleep(0.3)  # the next candidate is forked after the verdict
        pids = descendants(one._workers[0].process.pid)
        stay = (
            "import threading, time\nfor _ in range(20):\n    threading.Thread(target=time.sleep, "
        )
        judge(one, stay + "args=[99]).start()\n" + WRONG)
        time.sleep(0.3)
        assert len(descendants(one._workers[0].process.pid)) == len(pids)
        pids += descendants(one._workers[0].process.pid)
    assert pids and not any(map(alive, pids))


# ---- it survives ---------------------------------------------------------------------------------


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


# ---- lesser modes --------------------------------------------------------------------------------

LESSER = [("namespaces",), ("namespaces", "landlock"), ("landlock", "namespaces", "seccomp")]


@pytest.mark.parametrize("without", LESSER, ids="+".join)
def test_lesser_modes_work_and_say_so(without, monkeypatch):
    monkeypatch.setattr(Sandbox, "without", without)
    with Sandbox(workers=2, timeout=1.0) as lesser:
        assert lesser.mode.endswith("only") and not any(layer in lesser.mode for layer in without)
        programs = [ADD, WRONG, FORGED["equals everything"], "def add(x, y):\n    while True: pass"]
        found = lesser.run([Check(program, TEST_ADD, "add") for program in programs])
        assert [v.outcome for v in found] == ["passed", "wrong_answer", "wrong_answer", "timeout"]
        fork = "import os\ndef add(x, y):\n    os.fork()\n    return x + y"
        assert not judge(lesser, fork).passed
        if "landlock" not in without:
            verdicts = lesser.run(held_checks())
            assert not [(n, v) for n, v in zip(HELD, verdicts, strict=True) if not v.passed]
    with pytest.raises(UserError, match="require_isolation"):
        Sandbox(workers=1, require_isolation=True)


def test_require_isolation_is_content_with_namespaces_and_seccomp(sandbox):
    if sandbox.mode.endswith("only"):
        pytest.skip(f"this machine grants {sandbox.mode}")
    Sandbox(workers=1, require_isolation=True).close()


# ---- the benchmarks' files -----------------------------------------------------------------------

PREAMBLE = "from typing import *\nfrom collections import *\nfrom math import *\n"


def rows(name):
    with (gzip.open if name.endswith("gz") else open)(DATA / name, "rt") as file:
        return [json.loads(line) for line in file]


@needs_data
def test_hostile_examples_get_their_verdicts():
    canary = pathlib.Path("/tmp/pf_canary")
    (canary / "home").mkdir(parents=True, exist_ok=True)
    files = [canary / "secret.txt", canary / "keep.txt", canary / "home" / "notes.txt"]
    for file in files:
        file.write_text("topsecret")
    files[0].chmod(0o600)
    examples = rows("hostile_examples.jsonl")
    checks = []
    for example in examples:
        preamble = PREAMBLE if "class Solution" in example["candidate"] else ""
        program = preamble + example["candidate"]
        checks.append(Check(program, example["test"], example["entry_point"]))
    with Sandbox(workers=2, timeout=1.6) as box:
        verdicts = box.run(checks)
    wrong = [
        (example["id"], verdict)
        for example, verdict in zip(examples, verdicts, strict=True)
        if verdict.passed != (example["expected"] == "pass") and example["id"] != "ok_subprocess"
    ]
    assert not wrong
    assert [file.read_text() for file in files] == ["topsecret"] * 3
    for file in files:
        file.unlink()


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
