"""The jail: what a candidate cannot forge or reach, and the modes of machines that grant less.

The hostile programs are the ones a policy under pressure finds first; the project's larger set of
them, where its folder exists, runs here too.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from pfppo.config import UserError
from pfppo.sandbox import Check, Sandbox, walls

import pytest
from conftest import quick
from test_sandbox import ADD, TEST_ADD, WRONG, check_of, exists, judge, needs_data, processes, rows


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, timeout=1.0, memory_mb=256) as shared:
        yield shared


# ---- forgery -------------------------------------------------------------------------------------

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
    "a lock that others see": "import fcntl\nfcntl.flock(open('/dev/null'), fcntl.LOCK_SH)",
    "a lock of the older kind": "import fcntl, os\nfcntl.lockf(open(os.__file__), fcntl.LOCK_SH)",
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


@pytest.mark.parametrize("without", [(), ("namespaces",)])
def test_no_tree_is_too_deep_to_be_removed(without, monkeypatch):
    empty = "import os\nassert not os.listdir()\nopen('a', 'w').write('a')\n"
    monkeypatch.setattr(Sandbox, "without", without)
    with Sandbox(workers=1) as sandbox:
        for name, depth in ("a" * 250, 40), ("d", 1200):
            deep = f"import os\nfor _ in range({depth}):\n    os.mkdir({name!r})\n"
            deep += f"    os.chdir({name!r})\n"
            deep += "open('big', 'w').write('x' * 1000)\nos.mkdir('e', 0)\n"
            for program in (deep + ADD, empty + ADD, empty + "\n" + ADD):
                assert judge(sandbox, program).passed


def test_nothing_outlives_the_verdict():
    with Sandbox(workers=1) as one:
        judge(one, ADD)
        time.sleep(0.3)  # the next candidate is forked after the verdict
        pids = processes(one)
        stay = (
            "import threading, time\nfor _ in range(20):\n    threading.Thread(target=time.sleep, "
        )
        judge(one, stay + "args=[99]).start()\n" + WRONG)
        time.sleep(0.3)
        assert len(processes(one)) == len(pids)
        pids += processes(one)
    deadline = time.monotonic() + 10  # the kernel ends them when it gets round to it
    while any(map(exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pids and not any(map(exists, pids))


@pytest.mark.parametrize(
    "paths, directory",
    [
        (["/usr/lib", "/tmpfoo"], "/tmp"),
        (["/tmp/venv/lib"], "/var/tmp"),
        (["/tmp", "/var/tmp/a"], "/candidate"),
    ],
)
def test_the_working_directory_hides_no_library(paths, directory):
    assert walls.working_directory(paths) == directory


def test_a_virtual_environment_may_be_under_tmp():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        command = [sys.executable, "-m", "venv", "--without-pip", folder]
        subprocess.run(command, check=True)
        (site,) = pathlib.Path(folder).glob("lib/*/site-packages")
        (site / "own_module.py").write_text("one = 1\n")
        program = "import own_module, os\ndef f(x): return own_module.one + len(os.listdir())\n"
        code = f"import sys; sys.path.append({str(pathlib.Path(__file__).parents[1])!r})\n"
        code += "from pfppo.sandbox import Check, Sandbox\nwith Sandbox(workers=1) as sandbox:\n"
        code += (
            f"    print(sandbox.run([Check({program!r}, 'assert f(0) == 1', 'f')])[0].outcome)\n"
        )
        command = [f"{folder}/bin/python", "-c", code]
        assert subprocess.run(command, capture_output=True, text=True).stdout == "passed\n"


# ---- modes ---------------------------------------------------------------------------------------

MODES = {  # layers that are missing -> what the mode says
    ("namespaces",): "landlock + seccomp + limits",
    ("namespaces", "landlock"): "weak isolation: seccomp + limits",
    ("namespaces", "landlock", "seccomp"): "weak isolation: limits",
    ("seccomp",): "weak isolation: namespaces + landlock + limits",
}


@pytest.mark.parametrize("without", quick([("namespaces", "landlock")], MODES), ids="+".join)
def test_modes_work_and_say_so(without, monkeypatch):
    monkeypatch.setattr(Sandbox, "without", without)
    weak = MODES[without].startswith("weak")
    if weak:
        with pytest.raises(UserError, match="--allow_weak_isolation"):
            Sandbox(workers=1)
    with Sandbox(workers=1, timeout=0.5, allow_weak_isolation=weak) as lesser:
        assert lesser.mode == MODES[without]
        programs = [ADD, WRONG, FORGED["equals everything"], "def add(x, y):\n    while True: pass"]
        found = lesser.run([Check(program, TEST_ADD, "add") for program in programs])
        assert [v.outcome for v in found] == ["passed", "wrong_answer", "wrong_answer", "timeout"]
        fork = "import os\ndef add(x, y):\n    os.fork()\n    return x + y"
        assert not judge(lesser, fork).passed or without == ("seccomp",)
        held = {n for n, v in zip(HELD, lesser.run(held_checks()), strict=True) if v.passed}
        if not weak:
            assert held == HELD.keys()


@pytest.mark.parametrize("without", [(), ("namespaces",)], ids=["full", "lesser"])
def test_a_vanishing_temporary_folder_changes_no_verdict(without, monkeypatch, tmp_path):
    monkeypatch.setattr(Sandbox, "without", without)
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(private))
    monkeypatch.setattr(tempfile, "tempdir", None)
    write = "open('x', 'w').write('1')\nint(open('x').read())\n"
    checks = [Check(f"{write}{ADD if i % 2 else WRONG}\n# {i}", TEST_ADD, "add") for i in range(60)]
    with Sandbox(workers=2) as box:
        seen = []

        def progress(count):
            seen.append(count)
            if len(seen) % 20 == 0:
                shutil.rmtree(private, ignore_errors=True)

        verdicts = box.run(checks, progress)
    assert [v.outcome for v in verdicts] == ["wrong_answer", "passed"] * 30
    assert not private.exists() or not list(private.iterdir())


def test_root_s_private_temporary_folder_keeps_no_candidate_out(monkeypatch, tmp_path):
    monkeypatch.setattr(Sandbox, "without", ("namespaces", "landlock"))
    tmp_path.chmod(0o700)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with Sandbox(workers=1, allow_weak_isolation=True) as box:
        assert judge(box, ADD).passed


# ---- the project's hostile examples --------------------------------------------------------------

PREAMBLE = "from typing import *\nfrom collections import *\nfrom math import *\n"


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("file, seconds", [("hostile_examples", 1.6), ("hostile_examples_2", 3.0)])
def test_hostile_examples_get_their_verdicts(file, seconds):
    canary = pathlib.Path("/tmp/pf_canary")
    (canary / "home").mkdir(parents=True, exist_ok=True)
    files = [canary / "secret.txt", canary / "keep.txt", canary / "home" / "notes.txt"]
    for path in files:
        path.write_text("topsecret")
    files[0].chmod(0o600)
    examples, checks = rows(f"{file}.jsonl"), []
    for example in examples:
        preamble = PREAMBLE if example.get("format") == "leetcode" else ""
        reference = example.get("prompt", "") + example.get("canonical_solution", "")
        program, test = preamble + example["candidate"], example["test"]
        checks.append(Check(program, test, example["entry_point"], reference))
    with Sandbox(workers=2, timeout=seconds) as box:
        verdicts, pids = box.run(checks), processes(box)
        folders = [worker.folder for worker in box._workers]
    assert not any(map(exists, pids)) and not any(map(os.path.exists, folders))
    wrong = [
        (example["id"], verdict)
        for example, verdict in zip(examples, verdicts, strict=True)
        if verdict.passed != (example["expected"] == "pass") and example["id"] != "ok_subprocess"
    ]
    assert not wrong
    assert [path.read_text() for path in files] == ["topsecret"] * 3
    shutil.rmtree(canary)
