"""What crosses between a judge and a candidate: data by value, everything else by a number.

A message is KIND, TABLE and VALUE, a line each. VALUE is JSON, where an object {tag: content}
stands for what JSON has not: tuples, sets, big ints, dates, arrays, exceptions, ... Reading makes
plain data of plain data and nothing else, so it is safe on whatever a candidate sends. What is not
plain data stays where it is and travels as {side: [number, class, abilities]}, the same text from
either side. So does an instance of a class that both sides have, but its fields are in TABLE: nodes
that share nodes, or point at themselves, arrive as they were, and any number in one message.

Lists have no number: one that stands twice in a value arrives as two. But an answer says what is in
those of the arguments now, and may hold them. There is no limit but that of memory. Not here: plain
data (data.py), what the numbers are asked (candidate.py answers, proxy.py asks). Both sides hold
this module, and neither trusts the other's copy.
"""

import builtins
import collections
import enum
import functools
import json
import sys

from pfppo.sandbox.data import (
    ATOMS,
    PACK,
    PLAIN,
    TYPES,
    UNPACK,
    containers,
    flat,
    is_array,
    pairs,
    refill,
    unchanged,
)

BIG = 4096  # bits from which an int travels in hex (decimal conversion is quadratic, and capped)
CHUNK = 1 << 16  # bytes to receive at once: more would be mapped and unmapped by each `recv`
BY_VALUE = "="  # in place of abilities: the fields are in the table
json_dumps = json.JSONEncoder(check_circular=False).encode  # bound before a candidate can patch it


_namedtuple = functools.lru_cache(64)(collections.namedtuple)


def _fields(value):
    """[name, value, ...] of an instance, of its __dict__ and its slots."""
    state = object.__getstate__(value)
    fields, slots = state if isinstance(state, tuple) else (state, None)
    return flat((fields or {}) | (slots or {}))


def _text(error):
    """What an exception says whose class is known by name only."""
    return vars(error).get("_text") or BaseException.__str__(error)


class Link:
    """One end of a conversation: values, the numbers of objects, questions and answers.

    The two ends differ in how they `describe` what has no number yet, what makes a `stand_in` for
    an object of the other side, how an instance is `fill`ed, and what they `serve` when asked.
    """

    side = other = ""  # "J" for the judge's objects, "C" for the candidate's
    modules = ()  # names of this side's copy of the program
    error_root = BaseException  # what an exception is of which nothing else is known
    longest = float("inf")  # bytes of a message: one that says it is longer is not waited for

    def __init__(self, sock):
        self.sock, self.buffer = sock, bytearray()
        self.own, self.others = {}, {}  # number -> object: kept, so that its id stays its own
        self.refs = {}  # id of an object that has a number -> its packed form
        self.shared, self.names = {}, {}  # name -> class that both sides have, and back
        self.errors = {}  # (module, name) -> class of exceptions made for one of the other side's
        self.table, self.tabled = [], set()  # instances whose fields belong to this message; ids
        self.lent, self.kept = [], {}  # containers given as arguments; id -> packed, of those taken
        self.readers = UNPACK | {
            "x": self.error_class,
            "X": self._error,
            "E": lambda v: self.shared[v[0]][v[1]],
            "T": lambda v: self.shared.get(v) or TYPES.get(v) or _builtin_type(v),
            "n": self.named_tuple,
            "N": _array,
            "L": lambda k: self.lent[k],
        }
        self.decode = json.JSONDecoder(object_hook=self.unpack).decode

    def share(self, classes):
        self.shared, self.names = classes, {kind: name for name, kind in classes.items()}

    # ---- to text

    def dumps(self, value):
        """TABLE and VALUE of a message."""
        self.table, self.tabled = [], set()
        text = json_dumps(self.pack(value))
        # It grows while it is read.
        rows = [[self.refs[id(held)], *map(self.pack, _fields(held))] for held in self.table]
        return f"{json_dumps(rows) if rows else ''}\n{text}"

    def pack(self, value):
        """A value as JSON can hold it; exact types only, so that no subclass passes for data."""
        kind = type(value)
        if kind in ATOMS:
            return value
        if kind is int:
            return value if value.bit_length() < BIG else {"i": hex(value)}
        if id(value) in self.kept:
            return self.kept[id(value)]
        if kind is list:
            kinds = set(map(type, value))
            if kinds <= ATOMS or kinds == {int} and max(map(int.bit_length, value)) < BIG:
                return value
            return [self.pack(part) for part in value]
        if kind in PACK:
            tag, simpler = PACK[kind]
            return {tag: self.pack(simpler(value))}
        if id(value) not in self.refs:
            return self.pack_other(value, kind)
        if kind in self.names and id(value) not in self.tabled:
            self.tabled.add(id(value))
            self.table.append(value)
        return self.refs[id(value)]

    def pack_other(self, value, kind):
        """The packed form of what is not exactly plain data. Subclasses of it become plain (int
        enums, numpy's scalars), but for those that both sides have."""
        if isinstance(value, type):
            if issubclass(value, BaseException):
                return {"x": self._lineage(value)}
            known = self.shared, TYPES, vars(builtins)
            if any(names.get(value.__name__) is value for names in known):
                return {"T": value.__name__}
        if isinstance(value, BaseException):
            parts = list(value.args), flat(vars(value)), value.__cause__, str(value)
            return {"X": [self._lineage(kind), *map(self.pack, parts)]}
        name = self.names.get(kind)
        if name and isinstance(value, enum.Enum):
            return {"E": [name, value.name]}
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            fields = [str(field) for field in kind._fields]
            return {"n": [name or kind.__name__, fields, self.pack(list(value))]}
        base = next((base for base in kind.__mro__ if base in PLAIN), None)
        if base in PACK:
            tag, simpler = PACK[base]
            return {tag: self.pack(simpler(value))}
        if base:
            exact = {int: int.__int__, float: float.__float__, str: str.__str__}.get(base, base)
            return self.pack(exact(value))  # past what a subclass says
        if is_array(value):
            return {"N": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
        if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.pack(value.item())
        number = len(self.own)
        about = (name, BY_VALUE) if name else self.describe(value)
        self.own[number], self.refs[id(value)] = value, {self.side: [number, *about]}
        return self.pack(value)

    def _lineage(self, kind):
        """[[module, name], ...] of an exception class and its bases; "" for the program's own."""
        lineage = []
        for base in kind.__mro__[:-1]:
            own = base.__module__ in self.modules
            lineage.append(["" if own else base.__module__, base.__name__])
            if own:  # it may come back
                self.errors["", base.__name__] = base
        return lineage

    # ---- from text

    def loads(self, text):
        """The value of TABLE and VALUE. Raises almost anything on what no `dumps` made."""
        table, _, value = text.partition("\n")
        for instance, *fields in self.decode(table) if table else ():
            self.fill(instance, pairs(fields))
        return self.decode(value)

    def unpack(self, tagged):
        """The value of {tag: content}: an own object by its number, a stand-in, or data. Raises
        almost anything, as `loads`."""
        ((tag, content),) = tagged.items()
        if tag == self.side:
            return self.own[content[0]]
        if tag != self.other:
            return self.readers[tag](content)
        number, name, abilities = content
        if number not in self.others:
            if abilities == BY_VALUE:
                value = object.__new__(self.shared[name])
            else:
                value = self.stand_in(number, name, abilities)
            self.others[number], self.refs[id(value)] = value, tagged
        return self.others[number]

    def error_class(self, lineage):
        """This side's exception class for one of the other's: the same, or made after its bases."""
        kind = self.error_root
        for module, name in reversed(lineage):
            known = self.errors.get((module, name)) or self.known_error(module, name)
            if known is None:
                known = type(name, (kind,), {"__module__": self.modules[0], "__str__": _text})
                self.errors[module, name] = known
            kind = known
        return kind

    def known_error(self, module, name):
        """The exception class of that name in this side's program, or in a loaded module."""
        space = sys.modules.get(module or self.modules[0])
        kind = vars(space).get(name) if space else None
        fits = isinstance(kind, type) and issubclass(kind, BaseException)
        return kind if fits and (module or kind.__module__ in self.modules) else None

    def _error(self, content):
        lineage, args, fields, cause, text = content
        kind = self.error_class(lineage)
        try:
            error = kind.__new__(kind, *args)
            builtin = next(base for base in kind.__mro__ if base.__module__ == "builtins")
            builtin.__init__(error, *args)  # the classes' own may take other arguments
        except Exception:
            error = kind.__new__(kind)
        error.args, error.__cause__ = tuple(args), cause
        self.fill(error, pairs(fields))
        vars(error)["_text"] = text
        return error

    def named_tuple(self, content):
        name, fields, values = content
        kind = self.shared.get(name)
        if getattr(kind, "_fields", None) != tuple(fields):
            kind = _namedtuple(name, tuple(fields))
        return kind(*values)

    # ---- questions and answers

    def converse(self, kind, target, args, kwargs):
        """Ask the other side; what it answers, or raises. It may ask back before it does. Mutable
        arguments become what it made of them."""
        self.send(kind, [target, args, kwargs])
        lent = containers([*args, *kwargs.values()])
        while True:
            self.lent = lent
            answer, value = self.receive()
            if answer not in ("ok", "raise"):
                self.serve(answer, *value)
                continue
            value, changed = value
            for held, contents in zip(lent, changed, strict=True) if changed else ():
                if contents is not None:
                    refill(held, contents)
            if answer == "raise":
                raise self.arrived(value, kind)
            return value

    def respond(self, function, args, kwargs):
        """Send what a function returns or raises, and the contents of what it has changed of its
        mutable arguments."""
        lent = containers([*args, *kwargs.values()])
        before = [held.copy() for held in lent]
        try:
            answer, value = "ok", function(*args, **kwargs)
        except BaseException as error:
            answer, value = "raise", error
        try:
            both = zip(lent, before, strict=True)
            changed = [None if unchanged(*pair) else pair[0].copy() for pair in both]
            self.kept = {id(held): {"L": k} for k, held in enumerate(lent)}
            self.send(answer, [value, changed if any(c is not None for c in changed) else None])
        finally:
            self.kept = {}

    def arrived(self, error, kind):
        return error

    def send(self, kind, value):
        text = f"{kind}\n{self.dumps(value)}".encode()
        self.sock.sendall(len(text).to_bytes(4, "little") + text)

    def receive(self):
        """(KIND, value) of the next message. EOFError at the end."""
        while len(self.buffer) < (end := 4 + int.from_bytes(self.buffer[:4], "little")) or end == 4:
            if end > self.longest:
                raise MemoryError
            chunk = self.sock.recv(CHUNK)
            if not chunk:
                raise EOFError
            self.buffer += chunk
        text = self.buffer[4:end].decode()
        del self.buffer[:end]
        kind, _, text = text.partition("\n")
        return kind, self.loads(text)


def _builtin_type(name):
    kind = vars(builtins)[name]
    if not isinstance(kind, type) or issubclass(kind, BaseException):
        raise ValueError(name)
    return kind


def _array(content):
    import numpy

    dtype, shape, raw = content
    if numpy.dtype(dtype).kind not in "biufc":
        raise ValueError(dtype)
    return numpy.ndarray(shape, dtype, bytes.fromhex(raw)).copy()
