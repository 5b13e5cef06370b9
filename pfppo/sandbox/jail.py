"""The side of the sandbox that holds the candidate: a server that forks jailed processes.

A process of its own (started by tester.py) -> preloads modules -> enters what isolation the kernel
grants -> forks candidates ahead of time. A candidate compiles and runs one untrusted program and
then answers requests (call this, read that) over one socket. Nothing it says is believed: it cannot
give a verdict, only values, and the other end reads them as data.

The server's first message names the layers that it entered. Not here: what those layers are and
what they do not contain (isolation.py), how values travel (wire.py), any judgement (tester.py).
What it needs of pfppo it imports before isolation: afterwards the checkout may be out of reach.
Standard library only, Linux.
"""

import _thread
import contextlib
import gc
import importlib
import operator
import os
import signal
import socket
import sys
import time
import types

from pfppo.sandbox.isolation import PR_SET_PDEATHSIG, Isolation, LayerError, call
from pfppo.sandbox.wire import Link, json_dumps

# ---- the candidate -------------------------------------------------------------------------------


def _with_room(function):
    """A function that may recurse where the program may not: into deeply nested values."""

    def call(value):
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(min(limit + 8000, 2**31 - 1))
        try:
            return function(value)
        finally:
            sys.setrecursionlimit(limit)

    return call


class CandidateLink(Link):
    """The candidate's end: objects of any kind get a number."""

    def __init__(self, sock):
        super().__init__(sock, lambda number: Callback(self, number))
        self.loads, self.dumps = _with_room(self.loads), _with_room(self.dumps)
        self.running = _thread.RLock()

    def numbered(self, value):
        """As in `Link`; exception classes by the names of their bases, coroutines marked."""
        if type(value) is Callback:
            return {"y": value._number}
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"x": [base.__name__ for base in value.__mro__[:-1]]}
        number = super().numbered(value)
        return {"w": number} if isinstance(value, types.CoroutineType) else number


class Callback:
    """A function of the tester's (a lambda in an argument), as the candidate sees it."""

    def __init__(self, link, number):
        self._link, self._number = link, number

    def __call__(self, *args, **kwargs):
        link = self._link
        with link.running:
            link.send("callback\n" + link.dumps([self._number, args, kwargs]))
            while True:
                message = link.receive()
                kind, _, body = message.partition("\n")
                if kind in ("ok", "raise"):
                    break
                link.send(_answer(link, message))  # the function asks about its arguments
            value = link.loads(body)
        if kind == "raise":
            raise value[0](*value[1])
        return value


def _load(source, names):
    """Run the program as a module of its own; {name: value} for those of `names` that it has."""
    try:
        code = compile(source.encode("utf-8", "surrogatepass"), "candidate.py", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise SyntaxError(str(error)) from None
    module = types.ModuleType("candidate")
    module.__file__ = "candidate.py"
    sys.modules["candidate"] = module
    exec(code, module.__dict__)
    return {name: module.__dict__[name] for name in names if name in module.__dict__}


OPERATIONS = {
    "load": _load,
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "item": operator.getitem,
    "setitem": operator.setitem,
    "delattr": delattr,
    "delitem": operator.delitem,
    "bool": bool,
    "str": str,
    "repr": repr,
    "await": lambda coroutine: importlib.import_module("asyncio").run(coroutine),
}


def _answer(link, message):
    """Do what `operation NEWLINE [target, args, kwargs]` asks; the text of the answer."""
    name, _, body = message.partition("\n")
    target, args, kwargs = link.loads(body)
    try:
        value = OPERATIONS[name](target, *args, **kwargs)
        changed = "null"
        if name == "call":  # the test sees what the call did to its arguments
            after = link.dumps([args, kwargs])
            if not body.endswith(after[1:].replace('{"h": ', '{"y": ')):
                changed = after
        return f"ok\n[{link.dumps(value)}, {changed}]"
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__[:-1]]
        try:
            args = link.dumps(list(error.args))
        except BaseException:
            args = "[]"
        return "raise\n" + f"[{json_dumps(kinds)},{args},{json_dumps(_text(error))}]"


def _text(error):
    try:
        return str(error)[:300]
    except BaseException:
        return ""


def serve(sock, directory):
    """A candidate's life: chdir, then answer requests until the server kills it."""
    link = CandidateLink(sock)
    sys.setrecursionlimit(1010)  # a program's own thousand, as in a process of its own
    message = link.receive()
    os.chdir(directory)
    while True:
        link.send(_answer(link, message))
        message = link.receive()


# ---- the server ----------------------------------------------------------------------------------

PRELOADED = (
    "__future__", "bisect", "collections", "copy", "dataclasses", "datetime", "enum", "functools",
    "heapq", "itertools", "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip


class Server:
    """Forks candidates; keeps one ready. One at a time is in use; ending it is kill and wait.

    Requests on `control`, one byte each: "n" end the current candidate, then hand over the next
    (answer: how the old one ended, with the new one's socket); "c" CPU seconds of the current one.
    """

    def __init__(self, control, isolation):
        self.control, self.isolation = control, isolation
        self.current, self.spare = None, None  # (pid, the tester's end of its socket)

    def fork(self):
        """Fork the spare candidate; the child confines itself, serves, and never returns."""
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid:
            theirs.close()
            self.spare = pid, ours
            return
        try:
            ours.close()
            self.isolation.confine(theirs)
            serve(socket.socket(fileno=3), self.isolation.directory)
        finally:
            os._exit(1)

    def end_current(self):
        """Kill, reap and clean up after the current candidate; how it had ended, for the tester."""
        if self.current is None:
            return {}
        pid, _ = self.current
        self.current = None
        os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        # Where the directory is gone this raises, and so ends the server: the check was not done
        # fairly, the tester starts another server and repeats it.
        os.chmod(self.isolation.directory, 0o700)
        if os.listdir(self.isolation.directory):
            self._sweep()
        return {
            "code": os.waitstatus_to_exitcode(status),
            "cpu": usage.ru_utime + usage.ru_stime,
        }

    def _sweep(self):
        """Empty the working directory, unreadable folders included. It goes down by single names,
        as the whole path may be longer than the kernel takes, and deeper than Python recurses."""
        os.chdir(self.isolation.directory)
        way, left = [], [os.listdir()]  # names of the folders above; names not yet seen in each
        while way or left[-1]:
            if not left[-1]:
                left.pop()
                os.chdir("..")
                os.rmdir(way.pop())
            elif os.path.isdir(name := left[-1].pop()) and not os.path.islink(name):
                os.chmod(name, 0o700)
                os.chdir(name)
                way.append(name)
                left.append(os.listdir())
            else:
                os.unlink(name)
        os.chdir("/")

    def run(self):
        """Serve requests until the tester closes its end."""
        self.fork()
        while request := self.control.recv(1):
            if request == b"n":
                ended = self.end_current()
                (pid, sock), self.spare = self.spare, None
                socket.send_fds(self.control, [json_dumps(ended).encode()], [sock.fileno()])
                sock.close()
                self.current = pid, None
                self.fork()
            elif request == b"c":
                clock = (~self.current[0] << 3) | 2  # the kernel's name for a process's CPU clock
                self.control.send(json_dumps(time.clock_gettime(clock)).encode())


def main(options):
    """The server's process. Descriptor 0 is the control socket."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    control = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)
    sys.stdout.reconfigure(errors="backslashreplace")
    directory = os.environ.get("TMPDIR", "/tmp")
    os.environ.clear()
    sys.argv = ["candidate.py"]
    os.register_at_fork = lambda **hooks: None  # they cost a tenth of a fork, and reseed `random`
    for name in PRELOADED + tuple(options["preload"]):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in {"random", "numpy.random"} & sys.modules.keys():
        sys.modules[name].seed(0)  # every candidate draws the same numbers
    isolation = Isolation({**options, "temporary": directory})
    try:
        layers = isolation.enter()
    except LayerError as error:
        control.send(json_dumps({"failed": error.args[0], "why": error.args[1]}).encode())
        return
    except Exception as error:
        control.send(json_dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        raise
    control.send(json_dumps({"layers": layers, "directory": isolation.directory}).encode())
    gc.collect()
    gc.freeze()
    Server(control, isolation).run()
