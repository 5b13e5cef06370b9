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
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from pfppo.config import UserError
from pfppo.sandbox.judge import start_python

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
    """A keeper's process (judge.py) as its owner sees it."""

    def __init__(self, options):
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = start_python("judge", options, stdin=theirs)
        self.connection = Connection(ours.detach())
        self.given = collections.deque()  # indices of checks, in the order they were sent
        self.since = time.monotonic()  # when the first of `given` began

    def hello(self):
        try:
            hello = self.receive()
        except (EOFError, OSError):
            raise RuntimeError("the sandbox could not start; see standard error") from None
        self.folder = hello["folder"]
        return hello["layers"]

    def receive(self):
        return json.loads(self.connection.recv_bytes())

    def give(self, index, check):
        """Give a check, if there is room: for one under way, and one so that it need not wait. It
        reads the second when it is done with the first, so that one must fit into the socket."""
        data = json.dumps(dataclasses.astuple(check)).encode()
        if len(self.given) > 1 or self.given and len(data) > 1 << 16:
            return False
        if not self.given:
            self.since = time.monotonic()
        self.given.append(index)
        with contextlib.suppress(OSError):  # it died, as the next `receive` will say
            self.connection.send_bytes(data)
        return True

    def close(self):
        self.connection.close()  # so it ends by itself, whatever it does, and cleans up
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Sandbox:
    """A pool of `workers`. `run` may be called any number of times, from one thread at a time.
    Raises UserError where the machine grants too little, unless `allow_weak_isolation`."""

    without = ()  # layers not to use, for tests of the lesser modes

    def __init__(self, workers=2, timeout=3.0, memory_mb=512, allow_weak_isolation=False):
        self._options = {"timeout": timeout, "memory_mb": memory_mb, "without": self.without}
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._workers = [Worker(self._options) for _ in range(workers)]
        atexit.register(self.close)
        layers = [worker.hello() for worker in self._workers][0]
        self.mode = " + ".join([*layers, "limits"])
        if "seccomp" not in layers or len(layers) == 1:  # neither namespaces nor landlock
            self.mode = f"weak isolation: {self.mode}"
            if not allow_weak_isolation:
                self.close()
                raise UserError(
                    f"this machine grants the sandbox {self.mode}, not seccomp with namespaces or"
                    " landlock, so a program may do harm: --allow_weak_isolation runs it all the same"
                )

    def run(
        self, checks: Sequence[Check], progress: Callable[[int], None] | None = None
    ) -> list[Verdict]:
        """The verdicts of `checks`, in their order. Equal checks are executed once. `progress(k)`
        is called when k more are done."""
        copies, verdicts = collections.Counter(checks), {}
        with self._lock:
            try:
                for check, verdict in self._execute(list(copies)):
                    verdicts[check] = verdict
                    if progress:
                        progress(copies[check])
            except BaseException:  # what is under way belongs to no later run
                for worker in [worker for worker in self._workers if worker.given]:
                    self._replace(worker)
                raise
        return [verdicts[check] for check in checks]

    def _replace(self, worker):
        worker.close()
        new = Worker(self._options)
        new.hello()
        self._workers[self._workers.index(worker)] = new

    def _execute(self, checks):
        """Yields (check, verdict) as they come. What a dying worker held is given again; a check
        that it was under way with twice is a fail."""
        todo, blamed = collections.deque(range(len(checks))), collections.Counter()
        while todo or any(worker.given for worker in self._workers):
            for worker in self._workers:
                while todo and worker.give(todo[0], checks[todo[0]]):
                    todo.popleft()
            for worker in self._ready():
                try:
                    verdict = Verdict(*worker.receive())
                except (EOFError, OSError):
                    verdict = None
                if not self._workers:
                    raise RuntimeError("the sandbox was closed, with checks under way")
                if verdict and worker.given:
                    worker.since = time.monotonic()
                    yield checks[worker.given.popleft()], verdict
                    continue
                for index in list(worker.given)[:1]:
                    blamed[index] += 1
                    if blamed[index] == 2:
                        seconds = round(time.monotonic() - worker.since, 4)
                        worker.given.popleft()
                        yield checks[index], Verdict("exception", seconds, "its worker died of it")
                todo.extendleft(reversed(worker.given))
                self._replace(worker)

    def _ready(self):
        """The workers that have something to say, or died."""
        workers = {worker.connection: worker for worker in self._workers}
        try:
            return [workers[connection] for connection in wait(workers)]
        except (OSError, ValueError):  # closed meanwhile
            return list(workers.values())

    def close(self):
        """End every process. Safe to call twice, in a forked child of the caller, and while another
        thread is in `run`, which then raises."""
        if self._pid != os.getpid():
            return
        atexit.unregister(self.close)
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
