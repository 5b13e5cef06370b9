"""Untrusted code in, verdicts out.

    with Sandbox(workers=2, timeout=3.0) as sandbox:
        verdicts = sandbox.run([Check(program, test, entry_point, reference), ...])

For each check two processes are forked, by two servers of each worker. A *judge* (judge.py) runs
the test, a *candidate* (candidate.py) holds the program and nothing else, behind walls (walls.py).
The test sees stand-ins for the program's names (proxy.py): answers come back as plain data of exact
types (values.py), and the verdict is the judge's alone. This file is the door, and the caller's
side: checks, verdicts, the clocks, and a pool that loses no check and replaces what dies.

A call is sent when the one before it has been answered: a program never sees what comes later. The
entry point is the program's; every other name that the reference defines is the reference's, its
classes too: their instances travel with their fields, and no other object of the program's answers
for what they define. (Where a class is the entry point, so it is with those that the test uses.)
Without an entry point all that the reference binds is the program's, but for modules; without a
reference every name that nobody else defines is, but for modules of the library and numpy. Where a
reference is given, nothing answers for methods and items of plain data that its classes have not.
A test draws the same each time, and passes only if it has asked the program.

Limits: a program has `timeout` seconds, of CPU or asleep while nothing else goes on; more is a
`timeout`, however right the answers. Waiting for a core is not counted, up to ten times that. The
test has as many seconds of CPU, for itself and for what it does with the answers. A program may
allocate `memory_mb`, its test twice that. What the machine grants is in `Sandbox.mode`; what each
layer contains, and what not, in walls.py.

Not contained: answers that are right for the test's arguments alone (hard-coded); objects whose
methods or items answer what the test hopes to hear, where it asks them of the program's own classes
(or no reference says that it does not), and methods of the library's that no plain data has; a test
that executes what it is answered, or lets the program do so (`eval`); an assert in a function that
the test gives away, which the program may catch; a message to the next program in the numbers that
the kernel gives out (inodes, process ids).

What fails, though it is right: a program that needs other processes, locks on files, or the
standard input, files or environment that the test sets up (these, and what it prints, do not
cross); one that answers an object of another class than the reference's, a class within a
function, or the library's objects that answer as data does; a test that passes objects other than
plain data (data.py) and functions, copies what is none, or uses operators, `==` (identity here),
`isinstance` or `issubclass` on it, or derives from it; that looks into a function (its signature,
the name of its own), iterates asynchronously, sees how far an iterator is (long ones are read
ahead), expects StopIteration, reads a global that a call has set, or makes tens of thousands of
calls; that expects one list twice in a value, what the program's context manager suppresses, or of
exceptions of the program's what their class defines. Data crosses without what only its class
knows (methods of one that derives from a plain type, of the library's tuples and numpy's scalars,
attributes of OSError, a default factory, names of time zones), without the identity of nan, and
sets without their order.
"""

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
import tempfile
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor, as_completed

from pfppo.config import UserError
from pfppo.sandbox.judge import plan_of
from pfppo.sandbox.processes import Server, all_sleep, cpu_seconds
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


class Worker:
    """Executes one check at a time, each with a fresh candidate and a fresh judge. Of both it
    believes the kernel only: their clocks, and how they ended."""

    def __init__(self, options, stop):
        self.options, self.stop, self.servers, self.folder = options, stop, {}, None

    def start(self):
        """The layers of walls that this machine grants."""
        self._server("judge", "")
        return self._server("candidate", "").layers

    def _server(self, module, text):
        """The server whose children have what `text` needs, started when first needed."""
        preload = ["numpy", "numpy.random"] if "numpy" in text else []
        if not self.servers:
            temporary = tempfile.gettempdir()
            if os.geteuid() == 0 and not open_to_others(temporary):
                temporary = "/tmp"  # a private TMPDIR of root's: a candidate could not enter
            self.folder = self.options["folder"] = tempfile.mkdtemp(prefix="pfppo-", dir=temporary)
            os.chmod(self.folder, 0o711)
        if (key := (module, *preload)) not in self.servers:
            self.servers[key] = Server(module, self.options, preload)
        return self.servers[key]

    def execute(self, check, again=True):
        """The Verdict of a check. One whose servers die is done again, with others, once."""
        start = time.monotonic()
        try:
            outcome, detail = self._attempt(check)
        except (OSError, EOFError, ValueError) as error:
            self.close()
            if again:
                return self.execute(check, again=False)
            outcome, detail = "exception", f"the sandbox's servers failed: {error}"
        return Verdict(outcome, round(time.monotonic() - start, 4), detail)

    def _attempt(self, check):
        """(outcome, detail)"""
        try:
            plan = plan_of(check.test, check.entry_point, check.reference)
        except Exception as error:
            return "exception", f"the test or the reference does not compile: {error}"
        judges = self._server("judge", check.test + check.reference)
        candidates = self._server("candidate", check.program)
        sock, judge, judge_id = judges.next()
        theirs, program, program_id = candidates.next()
        with sock:
            with theirs:
                socket.send_fds(sock, [b" "], [theirs.fileno()])
            with contextlib.suppress(OSError):  # it died, as is seen below
                sock.sendall(marshal.dumps((*plan, check.program)))
            outcome, detail = self._await(sock, judge, program)
        judge_code, _ = judges.end(judge_id)
        code, cpu = candidates.end(program_id)
        if outcome == "silence":
            if judge_code == -signal.SIGKILL:
                raise EOFError("the judge was killed")
            late = judge_code == -signal.SIGPROF
            return ("timeout" if late else "exception"), f"the test ended with {judge_code}"
        if cpu > self.options["timeout"] and outcome in ("passed", "died"):
            return "timeout", f"{cpu:.1f} s of CPU"
        if outcome == "died":
            return ("exit" if code >= 0 else "exception"), f"the program ended with {code}"
        return outcome, detail

    def _await(self, sock, judge, program):
        """(outcome, detail) as the judge says it in the end, or why it may not go on."""
        timeout, poll = self.options["timeout"], select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(self.stop, select.POLLIN)
        start, window = time.monotonic(), min(0.1, timeout / 8)
        before = asleep = 0.0
        while not (events := poll.poll(1000 * window)):
            cpu, both = cpu_seconds(program), cpu_seconds(program, judge)
            if all_sleep(program, judge):
                asleep += max(0.0, window - (both - before))
            before = both
            if cpu + asleep > timeout or time.monotonic() - start > WALL * timeout:
                wall = time.monotonic() - start
                return "timeout", f"{cpu:.1f} s of CPU, {asleep:.1f} s asleep, in {wall:.1f} s"
        if events[0][0] == self.stop.fileno():
            return "exception", "stopped"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(sock.recv(1 << 12).split(b"\n")[0])
        return "silence", ""

    def close(self):
        while self.servers:
            self.servers.popitem()[1].close()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


class Sandbox:
    """A pool of `workers`. `run` may be called any number of times, from one thread at a time. It
    closes itself when nothing refers to it any more. Raises UserError where the machine grants too
    little, unless `allow_weak_isolation`."""

    without = ()  # layers not to use, for tests of the lesser modes

    def __init__(self, workers=2, timeout=3.0, memory_mb=512, allow_weak_isolation=False):
        options = {"timeout": timeout, "memory_mb": memory_mb, "without": self.without}
        self._lock = threading.Lock()
        self._stopped, self._stop = socket.socketpair()  # readable when all is to stop
        self._workers = [Worker({**options}, self._stopped) for _ in range(workers)]
        state = os.getpid(), self._stop, self._lock, self._workers
        self._end = weakref.finalize(self, _end, *state)
        self._free = queue.SimpleQueue()
        with ThreadPoolExecutor(workers) as pool:
            layers, *_ = pool.map(Worker.start, self._workers)
        for worker in self._workers:
            self._free.put(worker)
        self.mode = " + ".join([*layers, "limits"])
        if "seccomp" not in layers or len(layers) == 1:  # neither namespaces nor landlock
            self.mode = f"weak isolation: {self.mode}"
            if not allow_weak_isolation:
                self.close()
                raise UserError(
                    f"this machine grants the sandbox {self.mode}, not seccomp with namespaces or"
                    " landlock: a program may do harm; --allow_weak_isolation runs it all the same"
                )

    def run(self, checks, progress=None):
        """The verdicts of `checks`, in their order. Equal checks are executed once. `progress(k)`
        is called when k more are done."""
        copies, verdicts = collections.Counter(checks), {}
        if not self._end.alive:
            raise RuntimeError("the sandbox is closed")
        with self._lock, ThreadPoolExecutor(len(self._workers)) as pool:
            try:
                futures = {pool.submit(self._execute, check): check for check in copies}
                for future in as_completed(futures):
                    verdicts[futures[future]] = future.result()
                    if not self._end.alive:
                        raise RuntimeError("the sandbox was closed, with checks under way")
                    if progress:
                        progress(copies[futures[future]])
            except BaseException:  # what is under way belongs to no later run
                self._stop.send(b" ")
                pool.shutdown(cancel_futures=True)
                self._stopped.recv(1)
                raise
        return [verdicts[check] for check in checks]

    def _execute(self, check):
        worker = self._free.get()
        try:
            return worker.execute(check)
        finally:
            self._free.put(worker)

    def close(self):
        """End every process. Safe to call twice, in a forked child of the caller, and while another
        thread is in `run`, which then raises."""
        self._end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _end(pid, stop, lock, workers):
    """What is done once, at the end of a Sandbox or of the process that made it."""
    if pid == os.getpid():
        stop.send(b" ")
        with lock:
            for worker in workers:
                worker.close()
