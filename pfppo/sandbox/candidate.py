"""The side of the sandbox that holds the candidate: a server that forks confined processes.

A process of its own -> preloads modules -> enters what walls the kernel grants, and says which ->
forks candidates ahead of time. A candidate compiles and runs one untrusted program and then answers
questions (call this, read that) over one socket. Nothing it says is believed: it cannot give a
verdict, only values, and the other end reads them as data. `Server` forks the judges as well.

Not here: the layers and what they do not contain (walls.py), how values travel (values.py), any
judgement (judge.py). Standard library only, Linux.
"""

import _thread
import contextlib
import functools
import gc
import importlib
import itertools
import operator
import os
import signal
import socket
import sys
import types

from pfppo.sandbox.values import Link, json_dumps
from pfppo.sandbox.walls import PR_SET_PDEATHSIG, Walls, call, sweep

ABILITIES = (  # what the test is told of an object's class: which of these it has
    "__call__", "__iter__", "__next__", "__len__", "__bool__", "__contains__", "__getitem__",
    "__setitem__", "__delitem__", "__enter__", "__exit__", "__await__", "gi_frame",
)  # fmt: skip
OPERATIONS = {
    "call": lambda function, /, *args, **kwargs: function(*args, **kwargs),
    "items": lambda held: [len(held), list(itertools.islice(held, len(held) + 1))],
    "enter": lambda manager: type(manager).__enter__(manager),
    "exit": lambda m, error: type(m).__exit__(m, error and type(error), error, None),
    "await": lambda coroutine: importlib.import_module("asyncio").run(coroutine),
    "seed": lambda module, *args: importlib.import_module(module).seed(*args),
    "set": setattr, "delattr": delattr, "iter": iter, "len": len, "bool": bool,
    "str": str, "repr": repr, "getitem": operator.getitem, "setitem": operator.setitem,
    "delitem": operator.delitem,
}  # fmt: skip


_SMALL = {int, float, str, bool, type(None)}


def _with_room(function):
    """A function that may recurse where the program may not: into deeply nested values."""

    def call(*args):
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(min(limit + 8000, 2**31 - 1))
        try:
            return function(*args)
        finally:
            sys.setrecursionlimit(limit)

    return call


@functools.lru_cache(256)
def _describe(kind):
    methods = {name: m for base in kind.__mro__[::-1] for name, m in vars(base).items()}
    return kind.__name__, " ".join(name for name in ABILITIES if methods.get(name) is not None)


class CandidateLink(Link):
    """The candidate's end: objects of any kind get a number, and questions get answers."""

    side, other, modules = "C", "J", ("candidate",)

    def __init__(self, sock):
        super().__init__(sock)
        self.loads, self.dumps = _with_room(self.loads), _with_room(self.dumps)
        self.running = _thread.RLock()
        self.late = {}  # id of an iterator -> what it raised while it was read ahead
        self.operations = OPERATIONS | {"load": self.load, "get": _get, "next": self.next_items}

    def stand_in(self, number, name, abilities):
        """A function of the test's (a lambda in an argument), as the program sees it."""

        def callback(*args, **kwargs):
            with self.running:
                return self.converse("callback", number, args, kwargs)

        return callback

    def describe(self, value):
        return _describe(type(value))

    def fill(self, instance, fields):
        for name, value in fields.items():
            object.__setattr__(instance, name, value)

    def load(self, source, names, shared):
        """Run the program as a module of its own; {name: value} for those of `names` that it has.
        The test has classes `shared` as well."""
        try:
            code = compile(source.encode("utf-8", "surrogatepass"), "candidate.py", "exec")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise SyntaxError(str(error)) from None
        module = sys.modules["candidate"] = types.ModuleType("candidate")
        module.__file__ = "candidate.py"
        space = module.__dict__
        exec(code, space)
        own = {name: kind for name in shared if isinstance(kind := space.get(name), type)}
        self.share({name: own.get(name) or type(name, (), {}) for name in shared})
        return {name: space[name] for name in names if name in space}

    def next_items(self, iterator, count):
        """Up to `count` next items, at least one; an error waits until they are taken."""
        if id(iterator) in self.late:
            raise self.late.pop(id(iterator))
        items = [next(iterator)]
        try:
            for _ in range(count - 1):
                items.append(next(iterator))
        except BaseException as error:
            self.late[id(iterator)] = error
        return items

    def serve(self, name, target, args, kwargs):
        """Answer a question."""
        try:
            self.respond(functools.partial(self.operations[name], target), args, kwargs)
        except BaseException as error:  # something in the answer cannot be packed
            try:
                self.send("raise", [error, None])
            except Exception:
                self.send("raise", [Exception(type(error).__name__), None])

    def live(self, directory):
        """Answer questions until the server ends this process."""
        sys.setrecursionlimit(1010)  # a program's own thousand, as in a process of its own
        while True:
            try:
                question, content = self.receive()
            except (MemoryError, RecursionError) as error:  # in reading what the test gives
                return self.send("raise", [error, None])
            if question == "load":
                os.chdir(directory)
            self.serve(question, *content)


def _get(target, name, ahead):
    """[attribute, [[object, fields], ...]]: with a field come others of its object, and those of up
    to `ahead` objects that they lead to."""
    value, queue, seen, rows = getattr(target, name), [target], {id(target)}, []
    for node in itertools.islice(queue, ahead if name in _node_fields(target) else 0):  # it grows
        rows.append([node, fields := _node_fields(node)])
        new = [v for v in fields.values() if type(v) not in _SMALL and id(v) not in seen]
        queue += new
        seen.update(map(id, new))
    return [value, rows]


def _node_fields(value):
    """{name: value} of what a node has: small data, and other objects of the program's."""
    kind = type(value)
    if kind.__module__ != "candidate" or kind.__getattribute__ is not object.__getattribute__:
        return {}
    items = getattr(value, "__dict__", {}).items()
    small = {n: v for n, v in items if type(v) in _SMALL or type(v).__module__ == "candidate"}
    return {n: v for n, v in small.items() if not hasattr(kind, n)}


PRELOADED = (
    "__future__", "bisect", "collections", "copy", "dataclasses", "datetime", "enum", "functools",
    "heapq", "itertools", "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip


class Server:
    """Forks candidates, or judges; keeps one ready beside the one in use. Ending one is kill, wait,
    and emptying the folder that they work in.

    A child sends its process id and the other end of its socket over `births` itself, so that the
    kernel names it there as its owner sees it. A request on `control` is the id of one to end, the
    reply how it had ended.
    """

    def __init__(self, options):
        self.control, self.births = (socket.socket(fileno=os.dup(number)) for number in (0, 1))
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        for stream in sys.stdout, sys.stderr:
            stream.reconfigure(errors="backslashreplace")
        os.environ.clear()
        for module in PRELOADED + tuple(options["preload"]):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)

    def say(self, value):
        self.control.send(json_dumps(value).encode())

    def run(self, directory, live):
        """Serve until the other end closes. A child's life is `live(its socket)`."""
        os.environ.update(HOME=directory, TMPDIR=directory)
        os.dup2(0, 2)  # what is killed from here on says nothing that anybody should read
        gc.collect()
        gc.freeze()
        children = {self._fork(live), self._fork(live)}
        while request := self.control.recv(16):
            children.remove(int(request))
            self.say(self._end(int(request), directory))
            children.add(self._fork(live))
        for pid in children:
            self._end(pid, directory)

    def _fork(self, live):
        if pid := os.fork():
            return pid
        try:
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            os.setpgid(0, 0)
            ours, theirs = socket.socketpair()
            socket.send_fds(self.births, [str(os.getpid()).encode()], [theirs.fileno()])
            theirs.close()
            live(ours)
        finally:
            os._exit(1)

    def _end(self, pid, directory):
        for kill in os.killpg, os.kill:  # a judge may have children
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        # Where the directory is gone this raises, and so ends the server: the check was not done
        # fairly, and is repeated with another server.
        os.chmod(directory, 0o700)
        if os.listdir(directory):
            sweep(directory)
        return [os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]


def main(options):
    """The process of the candidates' server."""
    server, walls = Server(options), Walls(options)
    sys.argv = sys.orig_argv = ["candidate.py"]
    for module in "random", "numpy.random":
        if module in sys.modules:
            sys.modules[module].seed(0)  # every candidate draws the same numbers
    try:
        layers = walls.enter()
    except (OSError, KeyError, AttributeError):
        if not walls.entering:
            raise
        return server.say({"refused": walls.entering})
    server.say({"layers": layers})

    def live(sock):
        walls.confine(sock)
        CandidateLink(socket.socket(fileno=3)).live(walls.directory)

    return server.run(walls.directory, live)
