"""The program as a test sees it: stand-ins for its objects, and the link that asks for them.

A call goes to the candidate as data and its answer comes back as data of exact types (values.py).
What is not data is a `Remote`: it can do what the object's class can (be called, iterated, entered,
...) and no more; attributes, items and calls are questions, `==` is identity, and comparing it or
calculating with it asks nothing.

Not here: the packed form of values, the candidate's end, running the test and the verdict
(judge.py). It lives in the judge's process only; the candidate's holds none of it.
"""

import collections
import contextlib
import functools
import inspect
import itertools
import os
import threading
import types

from pfppo.sandbox.values import Link, json_dumps

TRUSTED = (  # modules whose names and exceptions a test may have of a program: this side's own
    "array", "asyncio", "base64", "binascii", "bisect", "calendar", "cmath", "collections", "copy",
    "csv", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "hashlib",
    "heapq", "io", "itertools", "json", "math", "numpy", "operator", "pickle", "queue", "random",
    "re", "statistics", "string", "struct", "textwrap", "time", "types", "typing", "uuid", "zlib",
)  # fmt: skip
PURE = {"get", "len", "items", "bool"}  # questions that change nothing
ANYBODY_S = {  # abilities of what is no plain data, and of no class: functions, generators, ...
    "__call__", "__next__", "__await__", "gi_frame", "__enter__", "__exit__",
}  # fmt: skip
METADATA = {"__name__", "__qualname__", "__dict__"}  # the only such names that are asked for


class Halt(Exception):
    """Stands for BaseException: what a program raises past `except Exception` ends the check."""


class Remote:
    """An object of the program's. Its class is made by `remote_class`."""

    __slots__ = ("_remote",)  # the link

    def __init__(self, link):
        object.__setattr__(self, "_remote", link)

    def __getattr__(self, name):
        link = self._remote
        if name.startswith("__") and name not in METADATA or name in link.refused:
            raise AttributeError(f"{name}, of an object that is not plain data")
        if name in link.fields.get(self, ()):
            return link.fields[self][name]
        value, rows = _ask("get")(self, name, link.ahead)
        link.ahead = min(2 * link.ahead, 1 << 14)  # so that a list of nodes is few questions
        for other, fields in rows:
            link.fields.setdefault(other, {}).update(fields)
        if isinstance(value, (list, dict, set)):
            link.borrowed.append((self, name, value, link.dumps(value)))
        if not rows:  # a property, which may do anything
            link.forget()
        return value

    def __reduce_ex__(self, protocol):
        raise TypeError("an object of the program's cannot be copied by the test")


def _ask(operation):
    return lambda self, /, *args, **kwargs: self._remote.ask(operation, self, args, kwargs)


def _text(operation):
    def say(self):
        """One text for ever, unless it is the tested class's to say."""
        link = self._remote
        if (self, operation) not in link.texts or link.may("__str__"):
            link.texts[self, operation] = _ask(operation)(self)
        return link.texts[self, operation]

    return say


def _iter(self):
    if _is_held(self):
        return iter(_held(self))
    plain = hasattr(self, "gi_frame") or not self._remote.may("__iter__")
    return self if plain and hasattr(self, "__next__") else _ask("iter")(self)


def _is_held(self):
    sized = hasattr(self, "__len__") and hasattr(self, "__iter__") and not hasattr(self, "__next__")
    return sized and self._remote.defined is None


def _held(self):
    """What is in an object that has a length, read at once and kept until the program next acts:
    else it might be something else each time that the test looks. (Where a reference says what
    has a length, the object does.)"""
    link = self._remote
    if self not in link.items:
        length, items = _ask("items")(self)
        if type(items) is not list or length != len(items):
            raise TypeError(f"an object of length {length} that holds other than {length} items")
        link.items[self] = items
    return link.items[self]


def _next(self):
    """The next item. A long iteration is read ahead, by a quarter of what it has had."""
    link = self._remote
    ahead, taken = link.queues.get(self, (collections.deque(), 0))
    if self in link.ended:
        raise StopIteration
    if not ahead:
        try:
            ahead += _ask("next")(self, max(1, taken // 4) if taken > 64 else 1)
        except StopIteration:
            if not link.may("__next__"):
                link.ended.add(self)
            raise
    link.queues[self] = ahead, taken + 1
    return ahead.popleft()


def _exit(self, kind, error, traceback):
    """The program's manager learns how its block ended; but an error of the test's, it neither
    suppresses nor replaces."""
    try:
        _ask("exit")(self, error)
    except Exception:
        if error is None:
            raise


async def _awaited(remote):
    return _ask("await")(remote)


ABILITIES = {  # of an object, if its class has the method: the candidate says so
    "__call__": _ask("call"),
    "__iter__": _iter,
    "__next__": _next,
    "__len__": lambda self: len(_held(self)) if _is_held(self) else _ask("len")(self),
    "__contains__": lambda self, item: any(item is part or item == part for part in self),
    "__exit__": _exit,
    "__await__": lambda self: _awaited(self).__await__(),
    "gi_frame": None,
    **{f"__{name}__": _ask(name) for name in ("bool", "getitem", "setitem", "delitem", "enter")},
}


@functools.lru_cache(256)
def remote_class(name, abilities):
    able = {method: ABILITIES[method] for method in abilities.split() if method in ABILITIES}
    if "gi_frame" in able:  # a generator, to `isinstance` as well
        able["__class__"] = property(lambda self: types.GeneratorType)
    able |= {"__setattr__": _ask("set"), "__delattr__": _ask("delattr")}
    able |= {"__str__": _text("str"), "__repr__": _text("repr")}
    able["__doc__"] = property(lambda self: _ask("get")(self, "__doc__", 1)[0])
    return type(name, (Remote,), {"__slots__": (), **able})


class JudgeLink(Link):
    """The judge's end: asks, and reads answers as data. What cannot be read ends the check."""

    side, other, modules = "J", "C", ("reference", "__main__")
    error_root = Halt

    def __init__(self, sock, verdict):
        super().__init__(sock)
        self.verdict = verdict  # a socket
        self.raised = []  # exceptions that came from the candidate
        self.refused = set()  # names that the test may not ask of the program's objects
        self.foreign, self.methods = set(), set()  # of the reference's classes; of plain data alone
        self.defined = None  # what a reference says that the program's classes may define
        self.calls, self.queues = 0, {}  # questions; what was read ahead of iterators
        self.ended, self.texts = set(), {}  # iterators; (object, operation): what it said
        self.forget()
        self.borrowed = []  # (object, field, container, its text), read since the last question
        self.asking = threading.RLock()  # the test may have threads
        self.readers["x"] = self._error_value

    def forget(self, operation="call"):
        """What is known of the program's objects is so until the program next acts."""
        if operation not in PURE:
            self.fields, self.items = {}, {}
            self.ahead = 1  # objects whose fields come with a field that is asked for

    def end(self, outcome, detail=""):
        """Give the verdict and end this process: nothing of the test can hold it back."""
        said = [outcome, " ".join(str(detail).split())[:300]]
        try:
            self.verdict.sendall(json_dumps(said).encode() + b"\n")
        finally:
            os._exit(0)

    def has_raised(self, error):
        return any(error is other for other in self.raised)

    # ---- questions

    def ask(self, operation, target, args=(), kwargs=None):
        """The candidate's answer to one of candidate.py's OPERATIONS, or what it raised."""
        args, kwargs = list(args), kwargs or {}
        with self.asking:
            self.calls += operation not in ("load", "seed")
            self.give_back()
            try:
                self.forget(operation)
                return self.converse(operation, target, args, kwargs)
            finally:
                self.forget(operation)

    def give_back(self):
        """Set the fields whose containers the test has changed."""
        borrowed, self.borrowed = self.borrowed, []
        for target, name, value, text in borrowed:
            if self.dumps(value) != text:
                with contextlib.suppress(Exception):
                    self.converse("set", target, [name, value], {})
                self.forget()

    def send(self, kind, value):
        try:
            super().send(kind, value)
        except OSError:
            self.end("died")  # which is no verdict that it could have wished for

    def receive(self):
        """As `Link.receive`; what cannot be read ends the check, and not with a pass."""
        try:
            return super().receive()
        except MemoryError:
            self.end("memory", "the answer is too large")
        except RecursionError:
            self.end("exception", "the answer is nested too deeply")
        except (EOFError, OSError):
            self.end("died")
        except Exception as error:
            self.end("exception", f"unreadable answer: {type(error).__name__}")

    def serve(self, kind, number, args, kwargs):
        """The candidate calls a function that the test gave to it."""
        self.respond(lambda *args, **kwargs: self.own[number](*args, **kwargs), args, kwargs)

    def arrived(self, error, kind):
        """What to raise here for what was raised there."""
        name = type(error).__name__
        if isinstance(error, Halt):
            exits = {"SystemExit", "KeyboardInterrupt", "GeneratorExit"}
            exits &= {base.__name__ for base in type(error).__mro__}
            self.end("exit" if exits else "exception", f"{name}: {error}")
        if isinstance(error, (StopIteration, StopAsyncIteration)) and kind != "next":
            error = RuntimeError(name)  # it would end a loop of the test's
        self.raised.append(error)
        return error

    # ---- what stands for the program's objects

    def unpack(self, tagged):
        value = super().unpack(tagged)
        awaitable = isinstance(value, Remote) and hasattr(value, "__await__")
        return _awaited(value) if awaitable else value

    def may(self, name):
        """Is it the program's to define, in classes of its own?"""
        return self.defined is None or name in self.defined

    def stand_in(self, number, name, abilities):
        able = [a for a in abilities.split() if a in ANYBODY_S or self.may(a)]
        if "__next__" in able and "__iter__" in abilities and "__iter__" not in able:
            able.append("__iter__")
        return remote_class(name, " ".join(able))(self)

    def describe(self, value):
        if callable(value):
            return "function", "__call__"
        kind = type(value).__name__
        raise TypeError(f"the test passes an argument of a kind that cannot travel: {kind}")

    def pack_other(self, value, kind):
        if hasattr(kind, "__next__"):  # it may be endless
            return {"I": self.pack(list(itertools.islice(value, 1_000_000)))}
        return super().pack_other(value, kind)

    def fill(self, instance, fields):
        """Give an object of a shared class its fields; none may stand for a method."""
        kind = type(instance)
        self._check_fields(fields, self.methods if kind in self.names else self.refused)
        for name, value in fields.items():
            holds = _place(kind, name)
            if holds == "method" or kind not in self.names and not issubclass(kind, Exception):
                raise ValueError(f"a field in place of {name}")
            if holds == "field":
                object.__setattr__(instance, name, value)

    def named_tuple(self, content):
        value, fields = super().named_tuple(content), dict(zip(*content[1:], strict=True))
        if type(value) not in self.names and self.foreign & fields.keys():
            raise ValueError("a tuple in place of an object of the reference's")
        self._check_fields(fields, self.refused)
        return value

    def _check_fields(self, fields, methods):
        for name in methods & fields.keys():
            if isinstance(fields[name], Remote) or callable(fields[name]):
                raise ValueError(f"an object in place of the method {name}")

    def known_error(self, module, name):
        known = not module or module.split(".")[0].strip("_") in ("builtins", *TRUSTED)
        kind = super().known_error(module, name) if known else None
        return kind if kind and issubclass(kind, Exception) else None

    def _error_value(self, lineage):
        """A class of exceptions that the test gets by a name of the program's. `except` with it
        catches what the program raises, and nothing that the test does: `E = Exception`."""
        kind, key = self.error_class(lineage), tuple(lineage[0])
        own = kind.__module__ in self.modules
        return kind if own else self.errors.setdefault(key, type(kind.__name__, (kind,), {}))


@functools.lru_cache(1024)
def _place(kind, name):
    """What a class has under the name of a field: a "method", or what is "computed" but once."""
    if name.startswith("__") and name != "__notes__":
        return "computed"
    held = inspect.getattr_static(kind, name, None)
    if isinstance(held, functools.cached_property):
        return "computed"
    reads, writes = hasattr(type(held), "__get__"), hasattr(type(held), "__set__")
    method = callable(held) or isinstance(held, property) or reads and not writes
    return "method" if method else "field"
