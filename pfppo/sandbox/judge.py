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
import gc
import importlib
import json
import os
import re
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
    for line in re.findall(r"^ *(?:import|from) +([\w., ]+)", f"{test}\n{reference}", re.M):
        for module in re.findall(r"\w+", line):
            if module in TRUSTED and module not in sys.modules:
                with contextlib.suppress(ImportError):
                    importlib.import_module(module)  # so that no judge need to
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


# ---- the keeper ----------------------------------------------------------------------------------


class Jail:
    """A server (candidate.py) and its next candidate. Without the layers in `without`, or refused."""

    def __init__(self, options, preload):
        self.without = list(options["without"])
        while True:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.settimeout(60)
            directory = f"{options['folder']}/{os.urandom(6).hex()}"
            own = {"without": self.without, "preload": preload, "directory": directory}
            self.process = start_python("candidate", options | own, stdin=theirs)
            theirs.close()
            self.control = ours
            hello = json.loads(ours.recv(1 << 16) or '{"error": "it died"}')
            if "layers" in hello:
                break
            self.close()
            if "error" in hello:
                raise RuntimeError(f"the candidates' server does not start: {hello['error']}")
            self.without.append(hello["failed"])
        self.layers, self.ready = hello["layers"], collections.deque()

    def _message(self, wanted):
        """The next message that has `wanted` in it. Candidates that came before it are `ready`."""
        while True:
            text, descriptors, *_ = socket.recv_fds(self.control, 1 << 12, 1)
            if not text:
                raise EOFError("the candidates' server is gone")
            message = json.loads(text)
            if descriptors:
                self.ready.append((socket.socket(fileno=descriptors[0]), message["pid"]))
            if wanted in message:
                return message

    def next(self):
        """The socket of the next candidate, its process id, and the same as its server knows it."""
        if not self.ready:
            self._message("pid")
        sock, inner = self.ready.popleft()
        about = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return sock, struct.unpack("3i", about)[0], inner

    def end(self, inner):
        """End a candidate; {"code": how it had ended, "cpu": seconds}."""
        self.control.send(str(inner).encode())
        return self._message("code")

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
        self.work = f"{self.folder}/test"
        os.environ.update(HOME=self.work, TMPDIR=self.work)
        tempfile.tempdir = None
        self.options, self.pool, self.jails = options | {"folder": self.folder}, pool, {}
        self.timeout = options["timeout"]
        pages = int(open("/proc/self/statm").read().split()[0])
        self.memory = (2 * options["memory_mb"] << 20) + pages * resource.getpagesize()

    def jail(self, preload):
        """The jail with a module loaded ahead of time, started when first asked for."""
        if preload not in self.jails:
            self.jails[preload] = Jail(self.options, (preload,) if preload else ())
            self.options["without"] = self.jails[preload].without
        return self.jails[preload]

    def check(self, program, test, entry_point, reference):
        """[outcome, seconds, detail]"""
        start = time.monotonic()
        try:
            plan = plan_of(test, entry_point, reference)
        except Exception as error:
            outcome, detail = "exception", f"the test or the reference does not compile: {error}"
        else:
            outcome, detail = self._attempt(plan, program)
        return outcome, round(time.monotonic() - start, 4), detail

    def _attempt(self, plan, program):
        jail = self.jail("numpy" if "numpy" in program else "")
        sock, program_pid, inner = jail.next()
        with sock:
            ours, theirs = os.pipe()
            gc.freeze()  # a collection in the judge touches nothing of what it shares
            pid = os.fork()
            if not pid:
                self._judge(JudgeLink(sock, theirs), plan, program)
            os.close(theirs)
            outcome, detail = self._await(ours, pid, program_pid)
            os.close(ours)
            if os.path.isdir(self.work) and os.listdir(self.work):
                sweep(self.work)
            ended = jail.end(inner)
        code, cpu = ended["code"], ended["cpu"]
        if cpu > self.timeout and outcome in ("passed", "died"):
            return "timeout", f"{cpu:.1f} s of CPU"
        if outcome != "died":
            return outcome, detail
        if code >= 0:
            return "exit", f"exit status {code}"
        return "exception", f"died: {signal.Signals(-code).name}"

    def _judge(self, link, plan, program):
        """The judge's life. It never returns."""
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_AS, (self.memory, self.memory))
            signal.setitimer(signal.ITIMER_PROF, self.timeout)  # the end, by the kernel's hand
            os.makedirs(self.work, exist_ok=True)
            os.chdir(self.work)
            link.end(*run_test(link, plan, program))
        except BaseException as error:
            link.end(*_outcome(link, error))

    def _await(self, verdict, pid, program_pid):
        """(outcome, detail): what the judge says in the end, or why it cannot."""
        poll = select.poll()
        poll.register(verdict, select.POLLIN)
        poll.register(self.pool, 0)  # its end is an event
        window, over = min(0.25, self.timeout / 4), None
        last, asleep, deadline = 0.0, 0.0, time.monotonic() + WALL * self.timeout
        while not over and not (events := poll.poll(1000 * window)):
            cpu, used = _cpu(program_pid), _cpu(program_pid) + _cpu(pid)
            if used - last < 0.01 * window and _sleeps(pid) and _sleeps(program_pid):
                asleep += window
            last = used
            if cpu + asleep > self.timeout:
                over = "timeout", f"{cpu:.1f} s of CPU, {asleep:.1f} s asleep"
            elif time.monotonic() > deadline:
                over = "timeout", f"{WALL * self.timeout:.1f} s of wall time"
        text = b""
        if not over and events[0][0] == verdict:
            text = os.read(verdict, 1 << 16)
        for kill in os.killpg, os.kill:  # the test may have started others
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if text or over:
            return over or json.loads(text.split(b"\n")[0])
        if (code := os.waitstatus_to_exitcode(status)) == -signal.SIGPROF:
            return "timeout", "the test took too long on the answers"
        return "exception", f"its judge died: {code}"

    def close(self):
        """End the servers, and reap what is left of them: this process inherits their children."""
        while self.jails:
            self.jails.popitem()[1].close()
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
    """The keeper's process. Checks come in and verdicts go out by the socket that is descriptor 0.
    It ends with its input, or with its parent."""
    pool = Connection(os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.argv = ["test.py"]
    warnings.simplefilter("ignore")  # of old escapes in tests and references
    sys.setrecursionlimit(10_000)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody reads this memory
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    parent, keeper = os.getppid(), Keeper(options, pool)
    try:
        hello = {"layers": keeper.jail("").layers, "folder": keeper.folder}
        pool.send_bytes(json.dumps(hello).encode())
        os.dup2(null, 2)  # what tests print there, and what is killed, is nobody's to read
        while os.getppid() == parent:
            if pool.poll(1):
                verdict = keeper.check(*json.loads(pool.recv_bytes()))
                pool.send_bytes(json.dumps(verdict).encode())
    except EOFError:
        pass
    finally:
        keeper.close()


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
