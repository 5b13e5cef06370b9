"""What crosses between a judge and a candidate: data by value, everything else by a number.

A message is KIND, TABLE and VALUE, a line each. VALUE is JSON, where an object {tag: content}
stands for what JSON has not: tuples, sets, big ints, dates, arrays, exceptions, ... Reading makes
plain data of plain data and nothing else, so it is safe on whatever a candidate sends. What is not
plain data stays where it is and travels as {side: [number, class, abilities]}, the same text from
either side. So does an instance of a class that both sides have, but its fields are in TABLE: nodes
that share nodes, or point at themselves, arrive as they were, and any number in one message.

Lists have no number: one that stands twice in a value arrives as two. There is no limit of size but
that of memory, which each process has, nor any of time. Not here: what the numbers are asked
(candidate.py answers, proxy.py asks). Standard library only, and numpy for its arrays; both sides
hold this module, and neither trusts the other's copy.
"""

import builtins
import collections
import datetime
import decimal
import enum
import fractions
import functools
import json
import sys

BIG = 4096  # bits from which an int travels in hex (decimal conversion is quadratic, and capped)
CHUNK = 1 << 16  # bytes to receive at once: more would be mapped and unmapped by each `recv`
BY_VALUE = "="  # in place of abilities: the fields are in the table
_ATOMS = frozenset((float, str, bool, type(None)))
json_dumps = json.JSONEncoder(check_circular=False).encode  # bound before a candidate can patch it


def _flat(mapping):
    return [part for pair in mapping.items() for part in pair]


def pairs(flat):
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _parts(*names):
    return lambda value: [getattr(value, name) for name in names]


_PLAIN = (  # exact type, tag, to something simpler, and back
    (tuple, "t", list, tuple),
    (dict, "d", _flat, pairs),
    (set, "s", list, set),
    (frozenset, "S", list, frozenset),
    (bytes, "b", bytes.hex, bytes.fromhex),
    (bytearray, "B", bytearray.hex, bytearray.fromhex),
    (complex, "c", _parts("real", "imag"), lambda v: complex(*v)),
    (range, "r", _parts("start", "stop", "step"), lambda v: range(*v)),
    (slice, "l", _parts("start", "stop", "step"), lambda v: slice(*v)),
    (type({}.keys()), "k", list, lambda v: dict.fromkeys(v).keys()),
    (type({}.items()), "j", lambda v: _flat(dict(v)), lambda v: pairs(v).items()),
    (type(...), "e", lambda v: 0, lambda v: ...),
    (fractions.Fraction, "F", _parts("numerator", "denominator"),
     lambda v: fractions.Fraction(*map(int, v))),  # of strings it might be long in the making
    (decimal.Decimal, "D", str, decimal.Decimal),
    (collections.deque, "q", lambda v: [list(v), v.maxlen], lambda v: collections.deque(*v)),
    (collections.Counter, "u", _flat, lambda v: collections.Counter(pairs(v))),
    (collections.OrderedDict, "O", _flat, lambda v: collections.OrderedDict(pairs(v))),
    (collections.defaultdict, "m", lambda v: [v.default_factory, _flat(v)],
     lambda v: collections.defaultdict(v[0] if isinstance(v[0], type) else None, pairs(v[1]))),
    (datetime.date, "date", datetime.date.isoformat, datetime.date.fromisoformat),
    (datetime.time, "time", datetime.time.isoformat, datetime.time.fromisoformat),
    (datetime.datetime, "datetime", datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    (datetime.timedelta, "timedelta", _parts("days", "seconds", "microseconds"),
     lambda v: datetime.timedelta(*v)),
)  # fmt: skip
_PACK = {kind: (tag, simpler) for kind, tag, simpler, _ in _PLAIN}
_UNPACK = {tag: back for _, tag, _, back in _PLAIN} | {"i": lambda v: int(v, 16), "I": iter}
_namedtuple = functools.lru_cache(64)(collections.namedtuple)


def _fields(value):
    """{name: value} of an instance: what its __dict__ and its slots hold."""
    fields = dict(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if hasattr(value, name):
                fields[name] = getattr(value, name)
    return fields


class Link:
    """One end of a conversation: values, the numbers of objects, questions and answers.

    The two ends differ in how they `describe` what has no number yet, what makes a `stand_in` for
    an object of the other side, how an instance is `fill`ed, and what they `serve` when asked.
    """

    side = other = ""  # "J" for the judge's objects, "C" for the candidate's
    modules = ()  # names of this side's copy of the program
    error_root = BaseException  # an exception of which nothing else is known

    def __init__(self, sock):
        self.sock, self.buffer = sock, bytearray()
        self.own, self.others = {}, {}  # number -> object: kept, so that its id stays its own
        self.refs = {}  # id of an object that has a number -> its packed form
        self.shared, self.names = {}, {}  # name -> class that both sides have, and back
        self.errors = {}  # (module, name) -> class of exceptions made for one of the other side's
        self.table, self.tabled = [], set()  # instances whose fields this message must have
        self.readers = _UNPACK | {
            "x": self.error_class,
            "X": self._error,
            "E": lambda v: self.shared[v[0]][v[1]],
            "T": lambda v: self.shared.get(v) or _builtin_type(v),
            "n": self.named_tuple,
            "N": _array,
        }
        self.decode = json.JSONDecoder(object_hook=self.unpack).decode

    def share(self, classes):
        self.shared, self.names = classes, {kind: name for name, kind in classes.items()}

    # ---- to text

    def dumps(self, value):
        """TABLE and VALUE of a message."""
        self.table, self.tabled, rows = [], set(), []
        text = json_dumps(self.pack(value))
        for instance in self.table:  # which grows meanwhile
            rows.append([self.refs[id(instance)], *map(self.pack, _flat(_fields(instance)))])
        return f"{json_dumps(rows) if rows else ''}\n{text}"

    def pack(self, value):
        """A value as JSON can hold it; exact types only, so that no subclass passes for data."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is int:
            return value if value.bit_length() < BIG else {"i": hex(value)}
        if kind is list:
            kinds = set(map(type, value))
            if kinds <= _ATOMS or kinds == {int} and max(map(int.bit_length, value)) < BIG:
                return value
            return [self.pack(part) for part in value]
        if kind in _PACK:
            tag, simpler = _PACK[kind]
            return {tag: self.pack(simpler(value))}
        ref = self.refs.get(id(value))
        return self.refer(value, ref) if ref else self.pack_other(value, kind)

    def pack_other(self, value, kind):
        """The packed form of what is not exactly plain data. Subclasses of it become plain (int
        enums, numpy's scalars), but for those that both sides have."""
        name = self.names.get(kind)
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"x": self._lineage(value)}
        known = self.shared, vars(builtins)
        if isinstance(value, type) and any(k.get(value.__name__) is value for k in known):
            return {"T": value.__name__}
        if isinstance(value, BaseException):
            fields = vars(value) | ({"__cause__": value.__cause__} if value.__cause__ else {})
            return {"X": [self._lineage(kind), *map(self.pack, (list(value.args), _flat(fields)))]}
        if name and isinstance(value, enum.Enum):
            return {"E": [name, value.name]}
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            names = [str(field) for field in kind._fields]
            return {"n": [name or kind.__name__, names, self.pack(list(value))]}
        for base in (int, float, str, tuple, list, set, frozenset, dict):
            if isinstance(value, base):
                exact = getattr(base, f"__{base.__name__}__", base)  # past what a subclass says
                return self.pack(exact(value))
        if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.pack(value.item())
        if kind.__module__ == "numpy" and kind.__name__ == "ndarray" and value.dtype.kind in "biufc":
            return {"N": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
        about = (name, BY_VALUE) if name else self.describe(value)
        number = len(self.own)
        self.own[number] = value
        return self.refer(value, self.refs.setdefault(id(value), {self.side: [number, *about]}))

    def refer(self, value, ref):
        ((_, about),) = ref.items()
        if about[2] == BY_VALUE and id(value) not in self.tabled:
            self.tabled.add(id(value))
            self.table.append(value)
        return ref

    def _lineage(self, kind):
        """[[module, name], ...] of an exception class and its bases; "" for the program's own."""
        kinds = [base for base in kind.__mro__ if base is not object]
        return [["" if k.__module__ in self.modules else k.__module__, k.__name__] for k in kinds]

    # ---- from text

    def loads(self, text):
        """The value of TABLE and VALUE. Raises almost anything on what no `dumps` made."""
        table, _, value = text.partition("\n")
        for instance, *flat in self.decode(table) if table else ():
            self.fill(instance, pairs(flat))
        return self.decode(value)

    def unpack(self, tagged):
        ((tag, content),) = tagged.items()
        if tag == self.side:
            return self.own[content[0]]
        if tag != self.other:
            return self.readers[tag](content)
        number, name, abilities = content
        if number not in self.others:
            by_value = abilities == BY_VALUE
            value = object.__new__(self.shared[name]) if by_value else self.stand_in(name, abilities)
            self.others[number], self.refs[id(value)] = value, tagged
        return self.others[number]

    def error_class(self, lineage):
        """This side's exception class for one of the other's: the same, or made after its bases."""
        kind = self.error_root
        for module, name in reversed(lineage):
            known = self.errors.get((module, name)) or self.known_error(module, name)
            if known is None:
                known = type(name, (kind,), {"__module__": self.modules[0]})
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
        lineage, args, flat = content
        kind, fields = self.error_class(lineage), pairs(flat)
        try:
            error = kind.__new__(kind, *args)
            builtin = next(base for base in kind.__mro__ if base.__module__ == "builtins")
            builtin.__init__(error, *args)  # the classes' own may take other arguments
        except Exception:
            error = kind.__new__(kind)
        error.args, error.__cause__ = tuple(args), fields.pop("__cause__", None)
        vars(error).update(fields)
        return error

    def named_tuple(self, content):
        name, fields, values = content
        kind = self.shared.get(name)
        if getattr(kind, "_fields", None) != tuple(fields):
            kind = _namedtuple(name, tuple(fields))
        return kind(*values)

    # ---- questions and answers

    def converse(self, kind, *content):
        """Ask the other side; what it answers, or raises. It may ask back before it does."""
        self.send(kind, list(content))
        while True:
            answer, value = self.receive()
            if answer == "ok":
                return value
            if answer == "raise":
                raise self.arrived(value, kind)
            self.serve(answer, *value)

    def arrived(self, error, kind):
        return error

    def send(self, kind, value):
        text = f"{kind}\n{self.dumps(value)}".encode()
        self.sock.sendall(len(text).to_bytes(4, "little") + text)

    def receive(self):
        """(KIND, value) of the next message. EOFError at the end."""
        while not (end := self._whole()):
            data = self.sock.recv(CHUNK)
            if not data:
                raise EOFError
            self.buffer += data
        text = self.buffer[4:end].decode()
        del self.buffer[:end]
        kind, _, self.text = text.partition("\n")
        return kind, self.loads(self.text)

    def _whole(self):
        """Where the first message in the buffer ends; 0 if it is not whole."""
        end = 4 + int.from_bytes(self.buffer[:4], "little")
        return end if len(self.buffer) >= max(end, 5) else 0


def _builtin_type(name):
    kind = vars(builtins)[name]
    if not isinstance(kind, type) or issubclass(kind, BaseException):
        raise ValueError(name)
    return kind


def _array(content):
    import numpy

    dtype, shape, data = content
    if numpy.dtype(dtype).kind not in "biufc":
        raise ValueError(dtype)
    return numpy.ndarray(shape, dtype, bytes.fromhex(data)).copy()
