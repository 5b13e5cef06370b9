"""Gives verdicts: runs each test in a process of its own, against a program behind walls.

One clean process for each worker, the *keeper*, warm with what tests import. For each check it
takes the next candidate of a server (candidate.py) and forks a *judge*, which loads the program
there, runs the test here with stand-ins (proxy.py) for the program's names, says how that ended,
and ends: nothing that a test sets stays for the next. `==`, `abs`, `math.isclose`, numpy and the
test itself are never the candidate's. A test passes where it ran to its end; silence, end of file
or an unreadable answer is a fail. The keeper watches the clocks and reaps what dies.

Here a check is [program, test, entry point, reference] and a verdict [outcome, seconds, detail], as
JSON. Not here: the public classes, the pool and its repairs (__init__.py), what a candidate may do
(walls.py). No untrusted code runs here, and the keeper does not even read the program.
"""

import ast
import builtins
import collections
import contextlib
import dataclasses
import functools
import json
import marshal
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
import warnings
import zlib
from multiprocessing.connection import Connection

from pfppo.sandbox.candidate import Server, begin
from pfppo.sandbox.proxy import TRUSTED, JudgeLink, Remote
from pfppo.sandbox.walls import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, libc, open_to_others, sweep

WALL = 10  # a check ends after so many times its limit, however busy the machine is

# ---- what is read from the trusted texts ---------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """What can be said about a check from its trusted texts alone."""

    test: types.CodeType
    reference: types.CodeType | None
    entry_point: str
    base: str  # the program's name that must exist
    names: set  # the program's names that the test may see
    shared: set  # classes of the reference, other than what is tested, that the test deals in
    refused: frozenset  # methods of plain data that no class of the reference has
    checks: bool  # does the test define check(candidate)?
    seed: int  # of what the test draws


@functools.lru_cache(128)
def plan_of(test, entry_point, reference):
    """The `Plan` of a check's texts; SyntaxError where one of them is no Python."""
    code, trusted = compile(_bytes(test), "test", "exec"), ast.parse(_bytes(reference))
    base = (entry_point or "").split("(")[0].split(".")[0]
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    defined = {node.name: node for node in trusted.body if isinstance(node, kinds)}
    if reference:
        used = {name for name in _loaded(code) if name in defined} - {base}
        names = used if not base else set()  # nothing says what is tested: all that the test uses
    else:
        used, bound = _names(ast.parse(_bytes(test)))
        names = used - bound - set(dir(builtins))
    for name in (queue := [*used & defined.keys()]):  # what they use themselves
        queue += (_names(defined[name])[0] & defined.keys()) - {base, *queue}
    classes = {name for name in queue if isinstance(defined[name], ast.ClassDef)}
    functions = {part.co_name for part in code.co_consts if isinstance(part, types.CodeType)}
    return Plan(
        test=code,
        reference=compile(_bytes(reference), "reference", "exec") if reference else None,
        entry_point=entry_point,
        base=base,
        names=names | {base} - {""},
        shared=classes if base else set(),
        refused=frozenset(_DATA_METHODS - _attributes(trusted) if reference else ()),
        checks="check" in functions,
        seed=zlib.crc32(_bytes(test)),
    )


def _bytes(source):
    return source.encode("utf-8", "surrogatepass")  # in this form it may begin with a BOM


def _loaded(code):
    """All names in a code object and those within it."""
    parts = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*map(_loaded, parts))


def _names(tree):
    """(names that a tree reads, names that it binds)"""
    used, bound = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return used, bound


# An answer that is no string, but has a `startswith` that says yes, is what a test hopes to hear.
_DATA_METHODS = {
    name for kind in (str, bytes, int, float, list, tuple, dict, set) for name in dir(kind)
}


def _attributes(tree):
    """The attributes that a program's classes have: methods, class variables, what is assigned."""
    nodes = list(ast.walk(tree))
    stored = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    classes = [_names(node)[1] for node in nodes if isinstance(node, ast.ClassDef)]
    return {node.attr for node in stored}.union(*classes)


def trusted_names(program, names):
    """{name: value} that a test without a reference does not take from the program: modules of
    TRUSTED, and what the program imports from them."""
    space = {}
    lines = [f"import {name}" for name in names if name in TRUSTED]
    lines += ["import numpy as np"] if "np" in names else []
    for node in ast.walk(ast.parse(_bytes(program))):
        if isinstance(node, ast.ImportFrom) and node.module in TRUSTED and not node.level:
            lines += [f"from {node.module} import {a.name}" for a in node.names if not a.asname]
    for line in lines:
        with contextlib.suppress(ImportError):
            exec(line, space)
    return {name: space[name] for name in names & space.keys()}


# ---- the judge -----------------------------------------------------------------------------------


def run_test(link, plan, program):
    """The heart: run the test here, with the program there; (outcome, detail)."""
    space = _space(plan, link)
    try:
        answer = link.ask("load", program, [sorted(plan.names), sorted(link.shared)])
    except Exception as error:
        return _outcome(link, error, "syntax_error" if isinstance(error, SyntaxError) else None)
    if type(answer) is not dict:
        return "exception", "unreadable answer: no names"
    names = {name: answer[name] for name in plan.names & answer.keys()}  # and no `all` or `len`
    if plan.base and plan.base not in names:
        return "exception", f"NameError: name '{plan.base}' is not defined"
    try:
        if not plan.reference:
            names |= trusted_names(program, plan.names - {plan.base})
        for name in plan.names:
            space.pop(name, None)
        space.update(names)
        seed = _shared_seeds(link, plan.seed)
        seed()
        with _own_end(link):
            exec(plan.test, space)
        if plan.checks:
            candidate = eval(plan.entry_point, space)
            seed()
            with _own_end(link):
                space["check"](candidate)
    except BaseException as error:
        return _outcome(link, error)
    if isinstance(names.get(plan.base), Remote) and not link.calls:  # what is no Remote is known
        return "wrong_answer", "the test never called the program"
    return "passed", ""


@contextlib.contextmanager
def _own_end(link):
    """A test may end itself, as `unittest.main` does. What a program raised is no such end, nor is
    a class of the reference that derives from SystemExit."""
    try:
        yield
    except SystemExit as error:
        own = type(error) is SystemExit and not any(error is other for other in link.raised)
        if not own or error.code not in (None, 0):
            raise AssertionError(f"the test ended with status {error.code}") from None


def _space(plan, link):
    """What a test sees besides the program: the reference's names, in a module of their own."""
    module = sys.modules["reference"] = types.ModuleType("reference")  # dataclasses look for it
    space = module.__dict__
    if plan.reference:
        exec(plan.reference, space)
    kinds = {name: space[name] for name in plan.shared if isinstance(space.get(name), type)}
    link.share({n: kind for n, kind in kinds.items() if not issubclass(kind, BaseException)})
    link.refused = plan.refused
    space["__name__"] = "__main__"  # the test may be under its guard, or look there for itself
    sys.modules["__main__"] = module
    return space


def _shared_seeds(link, seed):
    """From here on `random.seed` in a test seeds the program's generator too. Returns a function
    that makes the test's own draws the same each time, but not those that a program sees."""
    own = []
    for name in "random", "numpy.random":
        if module := sys.modules.get(name):
            own.append(module.seed)
            module.seed = functools.partial(_seed_both, link, name, module.seed)
    return lambda: [function(seed) for function in own]


def _seed_both(link, name, own, *args):
    own(*args)
    link.ask("seed", name, args)


def _outcome(link, error, outcome=None):
    detail = f"{type(error).__name__}: {error}".rstrip(": ")
    known = {MemoryError: "memory", PermissionError: "forbidden"}
    named = next((known[kind] for kind in known if isinstance(error, kind)), None)
    if any(error is other for other in link.raised):
        return outcome or named or "exception", detail
    return "memory" if named == "memory" else "wrong_answer", detail


def judge(sock, options):
    """A judge's life: one test, whose verdict is all that it says. It never returns."""
    link = JudgeLink(None, sock)
    try:
        _, descriptors, *_ = socket.recv_fds(sock, 1, 1)
        link.sock = socket.socket(fileno=descriptors[0])
        with sock.makefile("rb") as file:
            plan, program = marshal.load(file)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(open("/proc/self/statm").read().split()[0])
        memory = (2 * options["memory_mb"] << 20) + pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (memory, limits[1]))
        signal.setitimer(signal.ITIMER_PROF, options["timeout"])  # the end, by the kernel's hand
        os.chdir(options["directory"])
        link.end(*run_test(link, Plan(*plan), program))
    except BaseException as error:
        link.end(*_outcome(link, error))


# ---- the keeper ----------------------------------------------------------------------------------


class Children:
    """A server's children, as the keeper sees them. Without the layers in `without`, or refused."""

    def __init__(self, module, options, folder, preload):
        self.without, self.ready = list(options["without"]), collections.deque()
        while True:
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.control.settimeout(60)
            own = {"without": self.without, "preload": preload}
            own["directory"] = f"{folder}/{os.urandom(6).hex()}"
            with theirs:
                self.process = start_python(module, options | own, stdin=theirs)
            hello = self._message({"layers", "failed", "error"})
            if "layers" in hello:
                break
            self.close()
            if "error" in hello:
                raise RuntimeError(f"the sandbox's {module} does not start: {hello['error']}")
            self.without.append(hello["failed"])
        self.layers = hello["layers"]

    def _message(self, wanted):
        """The next message with one of `wanted` in it. Children that came before are `ready`."""
        while True:
            text, descriptors, *_ = socket.recv_fds(self.control, 1 << 12, 1)
            if not text:
                raise EOFError("a server is gone")
            message = json.loads(text)
            if descriptors:
                self.ready.append((socket.socket(fileno=descriptors[0]), message["pid"]))
            if wanted & message.keys():
                return message

    def next(self):
        """The socket of the next child, its process id, and the same as its server knows it."""
        if not self.ready:
            self._message({"pid"})
        sock, inner = self.ready.popleft()
        about = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return sock, struct.unpack("3i", about)[0], inner

    def end(self, inner):
        """End a child: (how it had ended, its CPU seconds)."""
        self.control.send(str(inner).encode())
        ended = self._message({"code"})
        return ended["code"], ended["cpu"]

    def close(self):
        self.process.kill()
        self.process.wait()
        self.control.close()


class Keeper:
    """What a worker's process does: one check after the other, each with a fresh candidate and a
    fresh judge. Of both it believes the kernel only: their clocks, and how they ended."""

    def __init__(self, options, pool):
        temporary = tempfile.gettempdir()
        if os.geteuid() == 0 and not open_to_others(temporary):
            temporary = "/tmp"  # a private TMPDIR of root's: a candidate could not enter
        self.folder = tempfile.mkdtemp(prefix="pfppo-", dir=temporary)
        os.chmod(self.folder, 0o711)
        self.options, self.pool, self.servers = options, pool, {}
        self.timeout = options["timeout"]

    def children(self, module, text):
        """The children of a server with what `text` needs, which is started when first needed."""
        preload = ["numpy"] if "numpy" in text else []
        key = module, *preload
        if key not in self.servers:
            self.servers[key] = Children(module, self.options, self.folder, preload)
            self.options["without"] = self.servers[key].without
        return self.servers[key]

    def check(self, program, test, entry_point, reference):
        """[outcome, seconds, detail]"""
        start = time.monotonic()
        try:
            plan = plan_of(test, entry_point, reference)
        except Exception as error:
            outcome, detail = "exception", f"the test or the reference does not compile: {error}"
        else:
            text = marshal.dumps((dataclasses.astuple(plan), program))
            judges = self.children("judge", test + reference)
            outcome, detail = self._attempt(text, judges, self.children("candidate", program))
        return outcome, round(time.monotonic() - start, 4), detail

    def _attempt(self, text, judges, candidates):
        sock, judge_pid, judge_id = judges.next()
        theirs, program_pid, program_id = candidates.next()
        with sock:
            with theirs:
                socket.send_fds(sock, [b" "], [theirs.fileno()])
            with contextlib.suppress(OSError):  # it died, as is seen below
                sock.sendall(text)
            outcome, detail = self._await(sock, judge_pid, program_pid)
        judge_code, _ = judges.end(judge_id)
        code, cpu = candidates.end(program_id)
        if outcome == "silence":
            if judge_code == -signal.SIGPROF:
                return "timeout", "the test took too long on the answers"
            return "exception", f"its judge died: {judge_code}"
        if cpu > self.timeout and outcome in ("passed", "died"):
            return "timeout", f"{cpu:.1f} s of CPU"
        if outcome == "died":
            signalled = code < 0 and ("exception", f"died: {signal.Signals(-code).name}")
            return signalled or ("exit", f"exit status {code}")
        return outcome, detail

    def _await(self, verdict, judge_pid, program_pid):
        """(outcome, detail): what the judge says in the end, or why it cannot."""
        poll = select.poll()
        poll.register(verdict, select.POLLIN)
        poll.register(self.pool, 0)  # its end is an event
        window = min(0.25, self.timeout / 4)
        last, asleep, deadline = 0.0, 0.0, time.monotonic() + WALL * self.timeout
        while not (events := poll.poll(1000 * window)):
            cpu = _cpu(program_pid)
            used = cpu + _cpu(judge_pid)
            if used - last < 0.01 * window and _sleeps(judge_pid) and _sleeps(program_pid):
                asleep += window
            last = used
            if cpu + asleep > self.timeout:
                return "timeout", f"{cpu:.1f} s of CPU, {asleep:.1f} s asleep"
            if time.monotonic() > deadline:
                return "timeout", f"{WALL * self.timeout:.1f} s of wall time"
        if events[0][0] == verdict.fileno():
            with contextlib.suppress(OSError, ValueError):
                return json.loads(verdict.recv(1 << 16).split(b"\n")[0])
        return "silence", ""

    def close(self):
        """End the servers, and reap what is left of them: this process inherits their children."""
        while self.servers:
            self.servers.popitem()[1].close()
        end = time.monotonic() + 2
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < end:
                os.waitpid(-1, os.WNOHANG)[0] or time.sleep(0.005)
        with contextlib.suppress(OSError):
            sweep(self.folder)
            os.rmdir(self.folder)


def _cpu(pid):
    return time.clock_gettime((~pid << 3) | 2)  # the kernel's name for a process's CPU clock


def _sleeps(pid):
    """Does it wait, but for a core?"""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "R"


def main(options):
    """The process of a keeper, or of its judges' server: what it is given has a `directory`."""
    warnings.simplefilter("ignore")  # of old escapes in tests and references
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody reads this memory
    if "directory" in options:
        control = begin(options, "test.py")
        sys.setrecursionlimit(10_000)
        os.mkdir(options["directory"])
        os.environ.update(HOME=options["directory"], TMPDIR=options["directory"])
        control.send(b'{"layers": []}')
        return Server(control, options["directory"], lambda sock: judge(sock, options)).run()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    parent, pool = os.getppid(), Connection(os.dup(0))
    keeper = Keeper(options, pool)
    try:
        layers = keeper.children("candidate", "").layers
        keeper.children("judge", "")
        pool.send_bytes(json.dumps({"layers": layers, "folder": keeper.folder}).encode())
        null = os.open("/dev/null", os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)  # what is killed says nothing that anybody should read
        while os.getppid() == parent:
            if pool.poll(1):
                verdict = keeper.check(*json.loads(pool.recv_bytes()))
                pool.send_bytes(json.dumps(verdict).encode())
    except EOFError:
        pass
    finally:
        keeper.close()
    return None


def start_python(module, options, **descriptors):
    """A process that runs `pfppo.sandbox.MODULE.main(options)`: a clean interpreter with nothing of
    this one's environment. An empty package stands for pfppo.sandbox, whose own `__init__` would
    load the rooms of this side into a candidate's process. All of the module's imports happen
    before `main`: then the path is gone."""
    code = (
        "import json, os, sys, types; os.register_at_fork = lambda **hooks: None;"  # costs each fork
        "name = 'pfppo.sandbox'; package = types.ModuleType(name);"
        "package.__path__ = [sys.argv[1]]; sys.modules[name] = package;"
        f"from pfppo.sandbox.{module} import main; package.__path__ = [];"
        "main(json.loads(sys.argv[2]))"
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
    command = [sys.executable, "-P", "-c", code, os.path.dirname(__file__), json.dumps(options)]
    return subprocess.Popen(
        command, env=environment, cwd="/", start_new_session=True, **descriptors
    )
