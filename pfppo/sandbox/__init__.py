"""Untrusted code in, verdicts out.

    with Sandbox(workers=2, timeout=3.0) as sandbox:
        verdicts = sandbox.run([Check(program, test, entry_point, reference), ...])

Three roles for each worker. A *judge* (judge.py) runs one test, in a process of its own that ends
with it. A *server* (candidate.py) forks *candidates*, confined processes that hold one program and
nothing else. The test sees stand-ins for the program's names (proxy.py): answers come back as plain
data of exact types (values.py), and the verdict is the judge's alone. This file is the caller's
side: what a check and a verdict are, and the pool of workers that gives work out, loses no check
and replaces what dies. It judges nothing itself. `Check, Sandbox, Verdict` are all that the rest
of pfppo uses of this folder.

A call is sent when the one before it has been answered: a program never sees what comes later. The
entry point is the program's; every other name that the reference defines is the reference's, its
classes with their methods too: their objects travel with their fields. Without an entry point all
that the test uses of the reference is the program's, and without a reference all names that nobody
else defines, but for modules of the library and numpy. A test draws the same each time.

Limits: a program has `timeout` seconds, of CPU or asleep while it is waited for; more is `timeout`,
however right the answer. Waiting for a core is not counted, up to ten times that. A test has as
many seconds of CPU, for itself and for what it does with the answers. A program may allocate
`memory_mb`, a test twice that. What the machine grants is in `Sandbox.mode`; what each layer
contains, and what not, in walls.py.

Not contained: answers that are right for the test's arguments alone (hard-coded); objects whose
methods answer what the test hopes to hear, where the test calls methods of the program's own
classes; a test that executes what it is answered (`eval`); an assert in a function that the test
gives away, which the program may catch; a message to the next program in the numbers that the
kernel gives out (inodes, process ids). What fails, though it is right: a program that needs other
processes, or standard input, files or environment that the test sets up (they do not cross); a test
that passes objects of its own classes or copies the program's, that uses operators, `==` (identity
here) or `isinstance` on objects of the program's own classes, that expects the same list twice in
one value, or a program's context manager to suppress what the test raised.
"""

import atexit
import collections
import contextlib
import dataclasses
import json
import marshal
import os
import queue
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from pfppo.config import UserError
from pfppo.sandbox.judge import plan_of
from pfppo.sandbox.walls import open_to_others

WALL = 10  # a check ends after so many times its limit, however busy the machine is
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


class Children:
    """The children of a server, candidates or judges. Without the layers in `without`, or refused.

    Closing the control socket ends a server: it kills and reaps its children first.
    """

    def __init__(self, module, options):
        self.without, self.ready = list(options["without"]), collections.deque()
        hello = {}
        while "layers" not in hello:
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.control.settimeout(60)
            own = {"without": self.without, "directory": f"{options['folder']}/{os.urandom(6).hex()}"}
            with theirs:
                self.process = start_python(module, options | own, theirs)
            try:
                hello = self._message({"layers", "failed"})
            except EOFError:
                raise RuntimeError("the sandbox did not start; see standard error") from None
            if "failed" in hello:
                self.close()
                self.without.append(hello["failed"])
        self.layers = hello["layers"]

    def _message(self, wanted):
        """The next message with one of `wanted` in it. Children that came before are `ready`."""
        while True:
            text, descriptors, *_ = socket.recv_fds(self.control, 1 << 12, 1)
            if not text:
                raise EOFError("it is gone")
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
        self.control.close()
        for sock, _ in self.ready:
            sock.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Worker:
    """Executes one check at a time, each with a fresh candidate and a fresh judge. Of both it
    believes the kernel only: their clocks, and how they ended."""

    def __init__(self, options, stop):
        self.options, self.stop, self.servers = options, stop, {}
        self.layers = self.children("candidate", "").layers
        self.children("judge", "")

    def children(self, module, text):
        """The children of a server with what `text` needs, which is started when first needed."""
        preload = ["numpy"] if "numpy" in text else []
        key = module, *preload
        if key not in self.servers:
            self.servers[key] = Children(module, self.options | {"preload": preload})
            self.options["without"] = self.servers[key].without
        return self.servers[key]

    def execute(self, check):
        """The Verdict of a check. One whose servers die is done again, with others, once."""
        start = time.monotonic()
        outcome, detail = self._plan_and_attempt(check)
        return Verdict(outcome, round(time.monotonic() - start, 4), detail)

    def _plan_and_attempt(self, check):
        try:
            plan = plan_of(check.test, check.entry_point, check.reference)
        except Exception as error:
            return "exception", f"the test or the reference does not compile: {error}"
        text = marshal.dumps((*plan, check.program))
        for _ in range(2):
            try:
                judges = self.children("judge", check.test + check.reference)
                return self._attempt(text, judges, self.children("candidate", check.program))
            except (OSError, EOFError, ValueError) as error:
                self.close()
                detail = f"the sandbox's servers failed: {error}"
        return "exception", detail

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
        if cpu > self.options["timeout"] and outcome in ("passed", "died"):
            return "timeout", f"{cpu:.1f} s of CPU"
        if outcome == "died":
            signalled = code < 0 and ("exception", f"died: {signal.Signals(-code).name}")
            return signalled or ("exit", f"exit status {code}")
        return outcome, detail

    def _await(self, verdict, judge_pid, program_pid):
        """(outcome, detail): what the judge says in the end, or why it cannot."""
        timeout, poll = self.options["timeout"], select.poll()
        poll.register(verdict, select.POLLIN)
        poll.register(self.stop, select.POLLIN)
        window = min(0.25, timeout / 4)
        last, asleep, deadline = 0.0, 0.0, time.monotonic() + WALL * timeout
        while not (events := poll.poll(1000 * window)):
            cpu = _cpu(program_pid)
            used = cpu + _cpu(judge_pid)
            if used - last < 0.01 * window and _sleeps(judge_pid) and _sleeps(program_pid):
                asleep += window
            last = used
            if cpu + asleep > timeout:
                return "timeout", f"{cpu:.1f} s of CPU, {asleep:.1f} s asleep"
            if time.monotonic() > deadline:
                return "timeout", f"{WALL * timeout:.1f} s of wall time"
        if events[0][0] == verdict.fileno():
            with contextlib.suppress(OSError, ValueError):
                return json.loads(verdict.recv(1 << 16).split(b"\n")[0])
        return "silence", ""

    def close(self):
        while self.servers:
            self.servers.popitem()[1].close()


class Sandbox:
    """A pool of `workers`. `run` may be called any number of times, from one thread at a time.
    Raises UserError where the machine grants too little, unless `allow_weak_isolation`."""

    without = ()  # layers not to use, for tests of the lesser modes

    def __init__(self, workers=2, timeout=3.0, memory_mb=512, allow_weak_isolation=False):
        temporary = tempfile.gettempdir()
        if os.geteuid() == 0 and not open_to_others(temporary):
            temporary = "/tmp"  # a private TMPDIR of root's: a candidate could not enter
        self._folder = tempfile.mkdtemp(prefix="pfppo-", dir=temporary)
        os.chmod(self._folder, 0o711)
        options = {"timeout": timeout, "memory_mb": memory_mb, "without": self.without}
        options["folder"] = self._folder
        self._pid, self._lock, self._closed = os.getpid(), threading.Lock(), False
        self._stop = socket.socketpair()  # one end becomes readable when all is to stop
        atexit.register(self.close)
        with ThreadPoolExecutor(workers) as pool:
            starts = [pool.submit(Worker, {**options}, self._stop[0]) for _ in range(workers)]
            self._workers = [start.result() for start in starts]
        layers = self._workers[0].layers
        self.mode = " + ".join([*layers, "limits"])
        if "seccomp" not in layers or len(layers) == 1:  # neither namespaces nor landlock
            self.mode = f"weak isolation: {self.mode}"
            if not allow_weak_isolation:
                self.close()
                raise UserError(
                    f"this machine grants the sandbox {self.mode}, not seccomp with namespaces or"
                    " landlock: a program may do harm; --allow_weak_isolation runs it all the same"
                )

    def run(
        self, checks: Sequence[Check], progress: Callable[[int], None] | None = None
    ) -> list[Verdict]:
        """The verdicts of `checks`, in their order. Equal checks are executed once. `progress(k)`
        is called when k more are done."""
        copies, verdicts, free = collections.Counter(checks), {}, queue.SimpleQueue()
        for worker in self._workers:
            free.put(worker)

        def execute(check):
            worker = free.get()
            try:
                return worker.execute(check)
            finally:
                free.put(worker)

        with self._lock, ThreadPoolExecutor(len(self._workers) or 1) as pool:
            try:
                futures = {pool.submit(execute, check): check for check in copies}
                for future in as_completed(futures):
                    verdicts[futures[future]] = future.result()
                    if self._closed:
                        raise RuntimeError("the sandbox was closed, with checks under way")
                    if progress:
                        progress(copies[futures[future]])
            except BaseException:  # what is under way belongs to no later run
                self._stop[1].send(b" ")
                pool.shutdown(cancel_futures=True)
                self._closed or self._stop[0].recv(1)
                raise
        return [verdicts[check] for check in checks]

    def close(self):
        """End every process. Safe to call twice, in a forked child of the caller, and while another
        thread is in `run`, which then raises."""
        if self._pid != os.getpid() or self._closed:
            return
        atexit.unregister(self.close)
        self._closed = True
        self._stop[1].send(b" ")
        with self._lock:
            for worker in self._workers:
                worker.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _cpu(pid):
    return time.clock_gettime((~pid << 3) | 2)  # the kernel's name for a process's CPU clock


def _sleeps(pid):
    """Does it wait, but for a core?"""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "R"


def start_python(module, options, control):
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
        command, env=environment, cwd="/", start_new_session=True, stdin=control
    )
