"""The candidate as a test sees it: proxies, and the link that asks on their behalf.

A call of a proxy goes to the candidate as plain data and its answer comes back as plain data of
exact types. What is not plain data (nodes, generators, closures) is a `Remote`: `==` is identity,
attributes, items, iteration and calls are questions. Waiting for an answer is where a check's
limits are kept: `check_limits` ends it (`Over`) by CPU, idleness, wall time or size.

Not here: the packed form of values (wire.py), starting the candidate, running the test and the
verdict (tester.py). It runs in the tester's process only; the candidate's holds none of it.
"""

import collections
import itertools
import threading
import time

from pfppo.sandbox.texts import BUILTIN_ERRORS
from pfppo.sandbox.wire import CHUNK, MAX_MESSAGE, Link


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


async def _awaited(coroutine):
    return coroutine._link.ask("await", coroutine)


class TesterLink(Link):
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
        self.asking = threading.RLock()
        sock.settimeout(min(timeout, 0.25))

    def _unpack(self, tagged):
        ((tag, content),) = tagged.items()
        if tag == "w":
            return _awaited(content)
        if tag == "n" and any(
            type(value) is Remote and name in self.refused
            for name, value in zip(*content[1:], strict=True)
        ):
            raise ValueError("a method for a field")
        return self.exception_class(content) if tag == "x" else super()._unpack(tagged)

    def exception_class(self, names):
        """The test's own class for an exception class of the program's, by the names of its bases:
        `except` can name it, and of what is raised here it catches nothing."""
        kind = BaseException
        for name in reversed(names):
            known = BUILTIN_ERRORS.get(name) or self.exceptions.get(name)
            kind = known or self.exceptions.setdefault(name, type(name, (kind,), {}))
        return kind

    def end(self, outcome, detail):
        """Raise `Over`, and go on raising this first one."""
        self.over = self.over or Over(outcome, detail)
        raise self.over

    def numbered(self, value):
        """As in `Link`; the candidate's own objects go back by their numbers, iterators as data."""
        kind = type(value)
        if kind is Remote:
            return {"y": value._number}
        if callable(value):
            return super().numbered(value)
        if hasattr(value, "__next__"):  # it may be endless
            return {"I": self.pack(list(itertools.islice(value, 1_000_000)))}
        raise TypeError(f"the test passes an argument of a kind that cannot travel: {kind}")

    def ask(self, operation, target, args=(), kwargs=None):
        """The candidate's answer to one of jail.py's OPERATIONS, or what it raised."""
        with self.asking:  # the test may have threads
            return self._ask(operation, target, args, kwargs or {})

    def _ask(self, operation, target, args, kwargs):
        if self.over:
            raise self.over
        self.calls += operation != "load"
        self.idle = self.idle[0], time.monotonic()  # it had nothing to do until now
        # operation NEWLINE [target, args, kwargs]
        self.send(f"{operation}\n{self.dumps([target, list(args), kwargs])}")
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
                if isinstance(error, StopIteration) and operation != "next":
                    error = RuntimeError("StopIteration")  # it would end a loop of the test's
            except MemoryError:
                self.end("memory", "the answer is too large")
            except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as problem:
                self.end("exception", f"unreadable answer: {type(problem).__name__}")
            except RecursionError:
                self.end("exception", "the answer is nested too deeply")
            except EOFError:
                self.end("memory", "the answer is too large")
            raise error

    def call_back(self, number, args, kwargs):
        """The candidate calls a function that the test passed to it."""
        try:
            self.send("ok\n" + self.dumps(self.objects[number](*args, **kwargs)))
        except Exception as error:
            kinds = [kind for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            self.send("raise\n" + self.dumps([kinds[0], [str(error)]]))

    def exception(self, kinds, args, text):
        """The exception to raise here for one raised there: the same class, if it is builtin."""
        if kinds[0] in ("SystemExit", "KeyboardInterrupt", "GeneratorExit"):
            self.end("exit", kinds[0])
        found = (self.exceptions.get(name) or BUILTIN_ERRORS.get(name) for name in kinds)
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
        """Send within the limits."""
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
        """The next bytes, within the limits of time and of size."""
        while True:
            self.check_limits()
            try:
                data = self.sock.recv(CHUNK)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            self.received += len(data)
            if self.received > 16 * MAX_MESSAGE:
                self.end("memory", "the answers are too large")
            return data or self.died()

    def died(self):
        """The candidate is gone, which is no verdict that it could have wished for."""
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
