"""Runs untrusted Python against trusted tests: checks in, verdicts out.

    with Sandbox(workers=2, timeout=3.0) as sandbox:
        verdicts = sandbox.run([Check(program, test, entry_point, reference), ...])

Three roles for each worker. The *tester* (tester.py, a clean process) runs the test. The *server*
(jail.py) forks *candidates*, jailed processes that hold the program and nothing else. The test sees
proxies in place of the program's names (remote.py): answers come back as plain data of exact types,
and the verdict is the tester's alone. This file is the caller's side: what a check and a verdict
are, and the pool of testers that gives work out and replaces what dies. It judges nothing itself.
A call is sent when the one before it has been answered: a candidate never sees what comes later.
Names: the entry point and the reference's classes are the candidate's; every other name that the
reference defines (helpers of the prompt, imports) runs here, from the reference.

Limits: `timeout` is CPU seconds, so a busy machine fails no honest program; a candidate that idles
for a second after `timeout` wall seconds, or takes ten times that, is ended as well. What the
machine grants is in `Sandbox.mode`; what each layer contains, and what not, in isolation.py.

Not contained: answers that are right for the tests' arguments alone (hard-coded); objects whose
methods answer what the test hopes to hear, where the test calls methods on what it got back; a
message to the next candidate in the inode numbers of the working directory. What fails: a program
that needs other processes; a test that passes objects of its own classes or arrays, or that uses
operators, `==` (identity here) or `isinstance` on objects of the program's.
"""

import atexit
import collections
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from pfppo.config import UserError
from pfppo.sandbox.tester import patience, start_python

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
    """A tester process as its owner sees it: what it has been given, and what it said last."""

    def __init__(self, options):
        self.process = start_python(
            "tester", options, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
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
        longest = patience(self._options["timeout"])
        remaining = len(checks)
        while remaining:
            if not self._workers:
                raise RuntimeError("the sandbox was closed, with checks under way")
            for worker in self._workers:
                while todo and len(worker.given) < 2:
                    index = todo.popleft()
                    worker.give(index, checks[index])
            for number, found in self._wait(longest):
                if not self._workers:
                    break
                worker = self._workers[number]
                for values in found or ():
                    yield worker.given.popleft(), Verdict(*values)
                    remaining -= 1
                    worker.since = time.monotonic()
                if found is None and worker.given:
                    index = worker.given[0]
                    blamed[index] += 1
                    seconds = round(time.monotonic() - worker.since, 4)
                    worker.process.kill()
                    ended = worker.process.wait() in (-signal.SIGPROF, -signal.SIGALRM)  # by itself
                    late = ended or seconds > longest
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
        if not self._workers:
            return []
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
