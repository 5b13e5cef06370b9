"""Runs untrusted Python against trusted tests. This is the trusted side; jail.py is the other.

    with Sandbox(workers=2, timeout=3.0) as sandbox:
        verdicts = sandbox.run([Check(program, test, entry_point, reference), ...])

Three roles for each worker. The *tester* (a clean process of this file) runs the test. The
*server* (jail.py) forks *candidates*, jailed processes that hold the program and nothing else. The
test sees proxies in place of the program's names: a call goes to the candidate as plain data and
its answer comes back as plain data of exact types, so `==`, `abs`, `math.isclose` and the test
itself are never the candidate's. The verdict is the tester's alone, after its own last assert;
silence, end of file or an unreadable answer is a fail. What is not plain data (nodes, generators,
closures) is a `Remote`: `==` is identity, attributes, items, iteration and calls are questions.
Names: the entry point and the reference's classes are the candidate's; every other name that the
reference defines (helpers of the prompt, imports) runs here, from the reference.

Limits: `timeout` is CPU seconds, so a busy machine fails no honest program; a candidate that idles
for a second after `timeout` wall seconds, or takes ten times that, is ended as well. What the
machine grants is in `Sandbox.mode`; what each layer contains, and what not, in jail.py.

Not contained: answers that are right for the tests' arguments alone (hard-coded); objects whose
methods answer what the test hopes to hear, where the test calls methods on what it got back; a
program that needs other processes fails. `==` on the program's own classes is identity here.
"""

import ast
import atexit
import builtins
import collections
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import random
import resource
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Sequence

from pfppo import jail

OUTCOMES = (
    "passed",
    "wrong_answer",  # the test's own assert, or the test could not go on with the answer
    "exception",  # the program raised, or its process died
    "syntax_error",
    "timeout",
    "memory",
    "forbidden",  # it raised the PermissionError of a refused act
    "exit",  # it ended itself
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One candidate and the tests it is held against."""

    program: str  # untrusted: the whole source of the candidate's module
    test: str  # trusted: defines check(candidate), or bare asserts that use the program's names
    entry_point: str  # what is tested: a function's name, or "Solution().method"
    reference: str = ""  # trusted: the names that the test may use; "": taken from the program


@dataclasses.dataclass(frozen=True)
class Verdict:
    outcome: str  # one of OUTCOMES
    seconds: float  # wall seconds the check took
    detail: str = ""  # one line for people

    @property
    def passed(self):
        return self.outcome == "passed"


# ---- the tester: a process of its own ------------------------------------------------------------


class Over(BaseException):
    """Ends a check: (outcome, detail). A test that swallows it has not passed either."""


class Remote:
    """An object of the candidate's. It answers questions; comparing it is never one of them."""

    __slots__ = ("_link", "_number")

    def __init__(self, link, number):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args, **kwargs):
        return self._link.ask("call", self, args, kwargs)

    def __getattr__(self, name):
        if name in self._link.refused or name.startswith("__") and name != "__name__":
            raise AttributeError(f"{name}, of an object that is not plain data")
        return self._link.ask("get", self, (name,))

    def __setattr__(self, name, value):
        self._link.ask("set", self, (name, value))

    def __iter__(self):
        iterator = self._link.ask("iter", self)
        return _RemoteIterator(iterator) if isinstance(iterator, Remote) else iter(iterator)

    def __next__(self):
        return self._link.ask("next", self)

    def __len__(self):
        return self._link.ask("len", self)

    def __bool__(self):
        return self._link.ask("bool", self)

    def __getitem__(self, key):
        return self._link.ask("item", self, (key,))

    def __setitem__(self, key, value):
        self._link.ask("setitem", self, (key, value))

    def __delattr__(self, name):
        self._link.ask("delattr", self, (name,))

    def __delitem__(self, key):
        self._link.ask("delitem", self, (key,))

    def __str__(self):
        return self._link.ask("str", self)

    def __repr__(self):
        return self._link.ask("repr", self)

    def __eq__(self, other):
        return type(other) is Remote and other._number == self._number

    def __hash__(self):
        return self._number

    def __reduce_ex__(self, protocol):
        raise TypeError("an object of the program's cannot be copied by the test")


class _RemoteIterator:
    def __init__(self, remote):
        self.remote = remote

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.remote)


class TesterLink(jail.Link):
    """The tester's end: asks, waits within the limits, and reads answers as data."""

    def __init__(self, sock, server, timeout):
        super().__init__(sock, lambda number: Remote(self, number))
        self.server, self.timeout = server, timeout
        self.start, self.own_start = time.monotonic(), time.process_time()
        self.over = None  # the first Over: no later answer changes it
        self.raised = None  # the last exception that came from the candidate
        self.refused = frozenset()  # attributes that the test may not ask for
        self.exceptions = {}  # name -> the reference's own exception class
        self.idle = (0.0, self.start)  # CPU seconds when last seen to move, and when that was
        self.received = self.calls = 0
        sock.settimeout(min(timeout, 0.25))

    def end(self, outcome, detail):
        self.over = self.over or Over(outcome, detail)
        raise self.over

    def other(self, value):
        kind = type(value)
        if kind is Remote:
            return {"y": value._number}
        if callable(value):
            return super().other(value)
        if hasattr(value, "__next__"):
            return {"I": self.pack(list(value))}
        raise TypeError(f"the test passes an argument of a kind that cannot travel: {kind}")

    def ask(self, operation, target, args=(), kwargs=None):
        if self.over:
            raise self.over
        self.calls += operation == "call"
        body = self.dumps([target, list(args), kwargs or {}])
        self.idle = self.idle[0], time.monotonic()  # it had nothing to do until now
        self.send(f"{operation}\n{body}")
        while True:
            try:
                kind, _, body = self.receive().partition("\n")
                answer = self.loads(body)
                if kind == "callback":
                    self.call_back(*answer)
                    continue
                if kind == "ok":
                    value, changed = answer
                    if changed:
                        for old, new in zip(args, changed[0], strict=True):
                            _assign(old, new)
                        for name, new in changed[1].items():
                            _assign(kwargs[name], new)
                    return value
                error = self.exception(*answer)
            except MemoryError:
                self.end("memory", "the answer is too large")
            except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as problem:
                self.end("exception", f"unreadable answer: {type(problem).__name__}")
            except RecursionError:
                self.end("exception", "the answer is nested too deeply")
            except EOFError:
                self.end("memory", "the answer is too large")
            raise error

    def call_back(self, number, args):
        """The candidate calls a function that the test passed to it."""
        try:
            self.send("ok\n" + self.dumps(self.objects[number](*args)))
        except Exception as error:
            kinds = [kind for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            self.send("raise\n" + self.dumps([kinds[0], [str(error)]]))

    def exception(self, kinds, args, text):
        """The exception to raise here for one raised there: the same class, if it is builtin."""
        if kinds[0] in ("SystemExit", "KeyboardInterrupt", "GeneratorExit"):
            self.end("exit", kinds[0])
        found = (self.exceptions.get(name) or _BUILTIN_ERRORS.get(name) for name in kinds)
        kind = next(filter(None, found), Exception)
        if not issubclass(kind, Exception):
            self.end("exception", f"{kinds[0]}: {text}")
        try:
            error = kind(*args)
        except TypeError:
            error = Exception(*args)
        self.raised = error, kinds[0], f"{kinds[0]}: {text}".rstrip(": ")
        return error

    def check_limits(self):
        """Called when the candidate is being waited for after `timeout` wall seconds."""
        now = time.monotonic()
        wall = now - self.start
        if wall < self.timeout:
            return
        if time.process_time() - self.own_start > 3 * self.timeout:
            self.end("timeout", "the test took too long on the answers")
        self.server.watch()
        try:
            cpu = self.server.cpu()
        except (OSError, ValueError):
            self.died()
        if cpu >= self.timeout:
            self.end("timeout", f"{cpu:.1f} s of CPU")
        if cpu > self.idle[0] + 0.01:
            self.idle = cpu, now
        elif wall > self.timeout + 1 and now - self.idle[1] > 1:
            self.end("timeout", f"idle for {wall:.1f} s")
        if wall > 10 * self.timeout:
            self.end("timeout", f"{wall:.1f} s of wall time")

    def write(self, data):
        data = memoryview(data)
        while data:
            try:
                data = data[self.sock.send(data) :]
            except TimeoutError:
                pass
            except OSError:
                self.died()
            self.check_limits()

    def more(self):
        while True:
            self.check_limits()
            try:
                data = self.sock.recv(1 << 18)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            self.received += len(data)
            if self.received > 16 * jail.MAX_MESSAGE:
                self.end("memory", "the answers are too large")
            return data or self.died()

    def died(self):
        self.over = self.over or Over("died", "")
        raise self.over


def _assign(old, new):
    """Make the test's own object equal to what the call left of its copy, in place."""
    kind = type(old)
    if kind is not type(new) or kind not in _MUTABLE:
        if kind is tuple and type(new) is tuple:
            for one, other in zip(old, new, strict=False):
                _assign(one, other)
        return
    if kind in (list, collections.deque) and len(old) == len(new):
        for index, value in enumerate(new):
            if type(value) in _MUTABLE and type(old[index]) is type(value):
                _assign(old[index], value)
            else:
                old[index] = value
    elif kind in (list, bytearray):
        old[:] = new
    else:
        old.clear()
        (old.extend if kind is collections.deque else old.update)(new)


_MUTABLE = (
    list, dict, set, bytearray, collections.deque, collections.Counter, collections.OrderedDict,
    collections.defaultdict,
)  # fmt: skip
_BUILTIN_ERRORS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException)
}


class Jail:
    """A server (jail.py) and its next candidate. Without the layers in `without`, or refused."""

    def __init__(self, options, preload=()):
        self.without = list(options["without"])
        while True:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.settimeout(60)
            sent = {**options, "without": self.without, "preload": preload}
            self.process = _python("pfppo.jail", sent, stdin=theirs, stdout=subprocess.DEVNULL)
            theirs.close()
            self.control = ours
            hello = json.loads(ours.recv(1 << 16) or '{"error": "it died"}')
            if "layers" in hello:
                break
            self.close()
            if "error" in hello:
                raise RuntimeError(f"the sandbox's jail does not start: {hello['error']}")
            self.without.append(hello["failed"])
        self.layers, self.directory = hello["layers"], hello["directory"]
        try:
            self.turn()
        except BaseException:
            self.close()
            raise

    def turn(self):
        """End the candidate in use; how it ended. The next one's socket is in `waiting`."""
        self.control.send(b"n")
        text, descriptors, *_ = socket.recv_fds(self.control, 1 << 16, 1)
        if not descriptors:
            raise EOFError("the server is gone")
        self.waiting = socket.socket(fileno=descriptors[0])
        return json.loads(text)

    def cpu(self):
        self.control.send(b"c")
        return json.loads(self.control.recv(64))

    def close(self):
        self.process.kill()
        self.process.wait()
        self.control.close()
        if "namespaces" not in getattr(self, "layers", ["namespaces"]):
            shutil.rmtree(self.directory, ignore_errors=True)


class Tester:
    """What a tester process does: one check after the other, each with a fresh candidate."""

    def __init__(self, options):
        self.options = options
        self.parent = os.getppid()
        self.jails = {}
        self.jail("")

    def jail(self, preload):
        """The jail with a module loaded ahead of time, started when first asked for."""
        if preload not in self.jails:
            self.jails[preload] = Jail(self.options, (preload,) if preload else ())
            self.jails[preload].watch = self.watch_parent
        return self.jails[preload]

    def watch_parent(self):
        if os.getppid() != self.parent:
            self.close()
            os._exit(0)

    def close(self):
        while self.jails:
            self.jails.popitem()[1].close()

    def judge(self, check):
        start = time.monotonic()
        signal.alarm(_longest(self.options["timeout"]) + 5)  # ends this process, should it hang
        for attempt in "first", "second":
            try:
                outcome, detail = self._attempt(check)
                break
            except (OSError, EOFError, ValueError) as error:  # the server is gone: not the verdict
                if attempt == "second":
                    outcome, detail = "exception", f"the jail failed: {error}"
                self.close()
        signal.alarm(0)
        return Verdict(outcome, round(time.monotonic() - start, 4), detail)

    def _attempt(self, check):
        server = self.jail("numpy" if "numpy" in check.program else "")
        with server.waiting as sock:
            link = TesterLink(sock, server, self.options["timeout"])
            try:
                outcome, detail = run_test(check, link)
            except Over:
                outcome, detail = "exception", ""
            if link.over:
                outcome, detail = link.over.args
            ended = server.turn()
        if outcome == "died":
            return self._cause_of_death(ended["code"], ended["cpu"])
        return outcome, detail

    def _cause_of_death(self, code, cpu):
        if cpu >= self.options["timeout"]:
            return "timeout", f"{cpu:.1f} s of CPU"
        if code >= 0:
            return "exit", f"exit status {code}"
        return "exception", f"died: {signal.Signals(-code).name}"


def run_test(check, link):
    """The heart: run the test here, with the program there; (outcome, detail)."""
    try:
        plan = _plan(check.test, check.entry_point, check.reference)
    except (SyntaxError, ValueError) as error:
        return "exception", f"the test or the reference does not compile: {error}"
    random.seed(0)  # some tests draw their inputs
    try:
        found = link.ask("load", check.program, (sorted(plan.names),))
    except Exception as error:
        outcome = "syntax_error" if isinstance(error, SyntaxError) else None
        return _outcome(link, error, outcome)
    sys.modules["reference"] = module = types.ModuleType(
        "reference"
    )  # dataclasses look for their module
    space = module.__dict__
    try:
        if plan.reference:
            exec(plan.reference, space)
        elif plan.names - {plan.base}:
            found.update(_imports(check.program, plan.names - {plan.base}))
        link.refused = plan.refused
        link.exceptions = {name: space[name] for name in plan.exceptions}
        for name in plan.names:
            space.pop(name, None)
        space.update(found)
        if plan.base and plan.base not in found:
            return "exception", f"NameError: name '{plan.base}' is not defined"
        exec(plan.test, space)
        if plan.checks:
            space["check"](eval(check.entry_point, space))
    except Exception as error:
        return _outcome(link, error)
    if plan.reference and not link.calls:
        return "wrong_answer", "the test never called the program"
    return "passed", ""


def _outcome(link, error, outcome=None):
    if link.raised and error is link.raised[0]:
        named = {"MemoryError": "memory", "PermissionError": "forbidden"}
        return outcome or named.get(link.raised[1], "exception"), link.raised[2][:300]
    return "wrong_answer", f"{type(error).__name__}: {error}".rstrip(": ")[:300]


@dataclasses.dataclass
class Plan:
    """What can be said about a check from its trusted texts alone."""

    test: types.CodeType
    reference: types.CodeType | None
    base: str  # the program's name that must exist
    names: set  # the program's names that the test may see
    exceptions: list  # the reference's exception classes: they are the test's own
    refused: frozenset  # methods of plain data that no class of the reference has
    checks: bool  # does the test define check(candidate)?


def _bytes(source):
    return source.encode("utf-8", "surrogatepass")  # in this form it may begin with a BOM


@functools.lru_cache(512)
def _plan(test, entry_point, reference):
    tree = ast.parse(_bytes(test))
    base = (entry_point or "").split("(")[0].split(".")[0]
    bound, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    names, exceptions, refused = {base} - {""}, [], set()
    if reference:
        reference_tree = ast.parse(_bytes(reference))
        refused = _DATA_METHODS - _attributes(reference_tree)
        for node in reference_tree.body:
            if isinstance(node, ast.ClassDef):
                bases = {part.id for part in node.bases if isinstance(part, ast.Name)}
                if bases & (_BUILTIN_ERRORS.keys() | set(exceptions)):
                    exceptions.append(node.name)
                else:
                    names.add(node.name)
            elif isinstance(node, ast.FunctionDef) and not base and node.name in used:
                names.add(node.name)
    else:
        names |= used - bound - set(dir(builtins))
    checks = any(isinstance(n, ast.FunctionDef) and n.name == "check" for n in tree.body)
    return Plan(
        compile(tree, "test", "exec"),
        compile(_bytes(reference), "reference", "exec") if reference else None,
        base, names, exceptions, frozenset(refused), checks,
    )  # fmt: skip


# An answer that is no string, but has a `startswith` that says yes, is what a test hopes to hear.
_DATA_METHODS = {
    name for kind in (str, bytes, int, float, list, tuple, dict, set) for name in dir(kind)
}


def _attributes(tree):
    """The attributes that a program's classes have: methods, class variables, what is assigned."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef):
                    found.add(part.name)
                elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    found.add(part.id)
    return found


def _imports(program, names):
    """{name: value} for `names` that the program imports from the standard library: tests that use
    `math` or `sqrt` so get this side's own."""
    found = {}
    for node in ast.walk(ast.parse(_bytes(program))):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for alias in node.names:
            module = alias.name if isinstance(node, ast.Import) else node.module or ""
            if module not in _HARMLESS:
                continue
            if alias.name == "*":
                values = vars(importlib.import_module(module))
                found.update({name: values[name] for name in names & values.keys()})
                continue
            name = alias.asname or alias.name
            if name in names and isinstance(node, ast.Import):
                found[name] = importlib.import_module(module)
            elif name in names and not alias.asname:  # `import ne as isclose` would be a lie
                found[name] = getattr(importlib.import_module(module), name, None)
    return found


_HARMLESS = (
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools",
    "heapq", "itertools", "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip


def tester_main(options):
    """The tester's process: checks come as JSON lines on stdin, verdicts go as JSON lines to
    stdout. It ends with its input, or with its parent."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    warnings.simplefilter("ignore")  # of old escapes in tests and references
    sys.setrecursionlimit(10_000)
    jail.libc.prctl(jail.PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody reads this memory
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, hard))  # whatever the answers are
    tester = Tester(options)
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    try:
        _write(answers, tester.jail("").layers)
        text = b""
        while True:
            tester.watch_parent()
            if not poll.poll(5000):
                continue
            data = os.read(requests, 1 << 20)
            if not data:
                return
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                verdict = tester.judge(Check(*json.loads(line)))
                _write(answers, dataclasses.astuple(verdict))
    finally:
        tester.close()


def _longest(timeout):
    """Wall seconds after which a check is given up from outside: its tester hangs."""
    return int(12 * timeout) + 30


def _write(descriptor, value):
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def _python(module, options, **descriptors):
    """A process that runs `module.main(options)` (tester_main for this module): a clean interpreter
    with nothing of this one's environment."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    name = "main" if module.endswith("jail") else "tester_main"
    code = (
        "import json, sys; sys.path.append(sys.argv[1]);"
        f"from {module} import {name} as main; del sys.path[-1]; main(json.loads(sys.argv[2]))"
    )
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    environment = {
        "PYTHONHASHSEED": "0",
        "LANG": "C.UTF-8",
        "MALLOC_ARENA_MAX": "1",  # each arena of a thread would reserve 64 MB of address space
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **kept,
    }
    command = [sys.executable, "-P", "-c", code, root, json.dumps(options)]
    return subprocess.Popen(
        command, env=environment, cwd="/", start_new_session=True, **descriptors
    )


# ---- the caller's process ------------------------------------------------------------------------


class Worker:
    """A tester process as its owner sees it: what it has been given, and what it said last."""

    def __init__(self, options):
        self.process = _python(
            "pfppo.sandbox", options, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        os.set_blocking(self.process.stdin.fileno(), False)
        self.given = collections.deque()  # indices of checks, in the order they were sent
        self.unsent, self.text = b"", b""
        self.since = time.monotonic()  # when the first of `given` began

    def give(self, index, check):
        if not self.given:
            self.since = time.monotonic()
        self.given.append(index)
        self.unsent += json.dumps(dataclasses.astuple(check)).encode() + b"\n"
        self.write()

    def write(self):
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self.unsent:
                self.unsent = self.unsent[self.process.stdin.write(self.unsent) or 0 :]

    def read(self):
        """What has arrived, as a list; None at the end of file."""
        data = self.process.stdout.read(1 << 16)
        if not data:
            return None
        *lines, self.text = (self.text + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self):
        self.process.stdin.close()  # the tester ends by itself when idle, and cleans up
        with contextlib.suppress(subprocess.TimeoutExpired):
            if not self.given:
                self.process.wait(2)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Sandbox:
    """A pool of `workers` testers. `run` may be called any number of times, from one thread at a
    time; `timeout` is seconds of CPU a check, `memory_mb` what a candidate may allocate."""

    without = ()  # layers not to use, for tests of the lesser modes

    def __init__(self, workers=2, timeout=3.0, memory_mb=512, require_isolation=False):
        self._options = {"timeout": timeout, "memory_mb": memory_mb, "without": self.without}
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._workers = [Worker(self._options) for _ in range(workers)]
        atexit.register(self.close)
        self.layers = [self._hello(worker) for worker in self._workers][0]
        full = {"namespaces", "seccomp"} <= set(self.layers)
        self.mode = " + ".join([*self.layers, "rlimits"]) + ("" if full else " only")
        if require_isolation and not full:
            self.close()
            from pfppo.config import UserError

            raise UserError(
                f"--require_isolation: this machine grants the sandbox {self.mode},"
                " not namespaces and seccomp"
            )

    def _hello(self, worker):
        found = worker.read()
        while found == []:
            found = worker.read()
        if found is None:
            raise RuntimeError("the sandbox could not start; its reason is on standard error")
        return found[0]

    def run(
        self, checks: Sequence[Check], progress: Callable[[int], None] | None = None
    ) -> list[Verdict]:
        """The verdicts of `checks`, in their order. Equal checks are executed once. `progress(k)`
        is called when k more are done."""
        copies = collections.Counter(checks)
        distinct = list(copies)
        with self._lock:
            done = {}
            try:
                for index, verdict in self._execute(distinct):
                    done[distinct[index]] = verdict
                    if progress:
                        progress(copies[distinct[index]])
            except BaseException:  # what is under way belongs to no later run
                self._workers = [self._replaced(worker) for worker in self._workers]
                raise
        return [done[check] for check in checks]

    def _replaced(self, worker):
        if worker.given:
            worker.process.kill()
            worker.close()
            worker = Worker(self._options)
            self._hello(worker)
        return worker

    def _execute(self, checks):
        """Yields (index, verdict) as they come. A worker holds two checks: one under way and one
        so that it need not wait. What a dying worker held is given again; a check that it was
        under way with twice is a fail."""
        todo = collections.deque(range(len(checks)))
        blamed = collections.Counter()
        longest = _longest(self._options["timeout"])
        remaining = len(checks)
        while remaining:
            for worker in self._workers:
                while todo and len(worker.given) < 2:
                    index = todo.popleft()
                    worker.give(index, checks[index])
            for number, found in self._wait(longest):
                worker = self._workers[number]
                for values in found or ():
                    yield worker.given.popleft(), Verdict(*values)
                    remaining -= 1
                    worker.since = time.monotonic()
                if found is None and worker.given:
                    index = worker.given[0]
                    blamed[index] += 1
                    seconds = round(time.monotonic() - worker.since, 4)
                    late = seconds > longest
                    if late or blamed[index] == 2:
                        worker.given.popleft()
                        outcome = "timeout" if late else "exception"
                        yield index, Verdict(outcome, seconds, "its tester died of the answers")
                        remaining -= 1
                    todo.extendleft(reversed(worker.given))
                if found is None:
                    worker.given.clear()
                    worker.close()
                    self._workers[number] = Worker(self._options)
                    self._hello(self._workers[number])

    def _wait(self, longest):
        """[(number of the worker, what it said)] of those that spoke, died or took too long."""
        with selectors.DefaultSelector() as selector:
            for number, worker in enumerate(self._workers):
                selector.register(worker.process.stdout, selectors.EVENT_READ, number)
                if worker.unsent:
                    selector.register(worker.process.stdin, selectors.EVENT_WRITE, number)
            ready = selector.select(1.0)
        for key, events in ready:
            if events == selectors.EVENT_WRITE:
                self._workers[key.data].write()
        for worker in self._workers:
            if worker.given and time.monotonic() - worker.since > longest:
                worker.process.kill()
        return [
            (k.data, self._workers[k.data].read()) for k, e in ready if e & selectors.EVENT_READ
        ]

    def close(self):
        """End every process. Safe to call twice, and in a forked child of the caller."""
        if self._pid != os.getpid():
            return
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.close()
        self._workers = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
