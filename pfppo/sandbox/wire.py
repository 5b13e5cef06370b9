"""Values on the wire between tester and candidate: JSON, frames, and numbers for the rest.

JSON, where an object {tag: content} stands for what JSON has not: tuples, sets, big ints, dates,
builtin types, ... Reading makes plain data of plain data and nothing else, so it is safe on
whatever a candidate sends. What is not plain data stays where it is and travels as a number
(`Link`).

Not here: what the numbers are asked (jail.py answers, remote.py asks), and any limit of time; the
size of one message is bounded here, how many may come is not. Standard library only; both sides,
the candidate's process too, hold this module, and neither trusts the other's copy.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import functools
import json

BIG = 4096  # bits from which an int travels in hex (decimal conversion is quadratic, and capped)
CHUNK = 1 << 16  # bytes to receive at once: more would be mapped and unmapped by each `recv`
MAX_MESSAGE = 16 << 20  # bytes; the objects made of a message may take thirty times as much
_ATOMS = frozenset((float, str, bool, type(None)))


def _flat(pairs):
    return [part for pair in pairs for part in pair]


def _pairs(flat):
    return list(zip(flat[::2], flat[1::2], strict=True))


_PACK = {  # exact type -> (tag, function to something simpler)
    tuple: ("t", list),
    dict: ("d", lambda v: _flat(v.items())),
    set: ("s", list),
    frozenset: ("S", list),
    bytes: ("b", bytes.hex),
    bytearray: ("B", bytearray.hex),
    complex: ("c", lambda v: [v.real, v.imag]),
    range: ("r", lambda v: [v.start, v.stop, v.step]),
    slice: ("l", lambda v: [v.start, v.stop, v.step]),
    fractions.Fraction: ("F", lambda v: [v.numerator, v.denominator]),
    decimal.Decimal: ("D", str),
    collections.deque: ("q", lambda v: [list(v), v.maxlen]),
    collections.Counter: ("C", lambda v: _flat(v.items())),
    collections.OrderedDict: ("O", lambda v: _flat(v.items())),
    collections.defaultdict: ("m", lambda v: [v.default_factory, _flat(v.items())]),
    datetime.date: ("date", datetime.date.isoformat),
    datetime.time: ("time", datetime.time.isoformat),
    datetime.datetime: ("datetime", datetime.datetime.isoformat),
    datetime.timedelta: ("timedelta", lambda v: [v.days, v.seconds, v.microseconds]),
    type({}.keys()): ("k", list),
    type({}.items()): ("j", _flat),
    type(...): ("e", lambda v: 0),
}
_UNPACK = {  # every entry makes plain data of plain data: safe on whatever a candidate sends
    "t": tuple,
    "d": lambda v: dict(_pairs(v)),
    "s": set,
    "S": frozenset,
    "b": bytes.fromhex,
    "B": bytearray.fromhex,
    "c": lambda v: complex(*v),
    "r": lambda v: range(*v),
    "l": lambda v: slice(*v),
    "F": lambda v: fractions.Fraction(*map(int, v)),  # of strings it might be long in the making
    "k": lambda v: dict.fromkeys(v).keys(),
    "j": lambda v: dict(_pairs(v)).items(),
    "D": decimal.Decimal,
    "q": lambda v: collections.deque(*v),
    "C": lambda v: collections.Counter(dict(_pairs(v))),
    "O": lambda v: collections.OrderedDict(_pairs(v)),
    "m": lambda v: collections.defaultdict(v[0] if isinstance(v[0], type) else None, _pairs(v[1])),
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "timedelta": lambda v: datetime.timedelta(*v),
    "e": lambda v: ...,
    "i": lambda v: int(v, 16),
    "T": lambda v: _builtin_type(v),
    "I": iter,
    "n": lambda v: _namedtuple(v[0], tuple(v[1]))(*v[2]),
}
_namedtuple = functools.lru_cache(64)(collections.namedtuple)


def _builtin_type(name):
    found = getattr(builtins, name)
    if not isinstance(found, type):
        raise ValueError(name)
    return found


class Link:
    """One end of the conversation between tester and candidate: frames and values.

    What is not plain data stays where it is and travels as a number: {"h": n} is "my object n",
    {"y": n} is "your object n". `proxy(n)` makes what stands for the other side's object n.
    """

    def __init__(self, sock, proxy):
        self.sock, self.proxy = sock, proxy
        self.loads = json.JSONDecoder(object_hook=self._unpack).decode
        self.objects, self.numbers = [], {}
        self.buffer = bytearray()

    def other(self, value):
        """The packed form of what is not exactly plain data: subclasses of it (int enums, numpy's
        scalars) become plain, the rest gets a number to ask by."""
        for base in (int, float, str):
            if isinstance(value, base):
                return self.pack(getattr(base, f"__{base.__name__}__")(value))
        for base in (tuple, list, set, frozenset, dict):
            if isinstance(value, base):
                return self.pack(base(value))
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.pack(value.item())
        return self.numbered(value)

    def numbered(self, value):
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)  # also keeps it alive, so that its id stays its own
        return {"h": number}

    def pack(self, value):
        """A value as JSON can hold it; exact types only, so that no subclass passes for data."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is int:
            return value if value.bit_length() < BIG else {"i": hex(value)}
        if kind is list:
            kinds = set(map(type, value))
            if kinds <= _ATOMS:
                return value
            if kinds == {int} and max(map(int.bit_length, value)) < BIG:
                return value
            return [self.pack(part) for part in value]
        if kind in _PACK:
            tag, simpler = _PACK[kind]
            return {tag: self.pack(simpler(value))}
        if kind is type and value.__module__ == "builtins" and hasattr(builtins, value.__name__):
            return {"T": value.__name__}
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            fields = [str(name) for name in kind._fields]
            return {"n": [kind.__name__, fields, self.pack(list(value))]}
        return self.other(value)

    def dumps(self, value):
        return json_dumps(self.pack(value))

    def _unpack(self, tagged):
        ((tag, content),) = tagged.items()
        if tag == "h":
            return self.proxy(int(content))
        if tag == "y":
            return self.objects[content]
        return _UNPACK[tag](content)

    def send(self, *texts):
        frames = [text.encode() for text in texts]
        self.write(b"".join(len(f).to_bytes(4, "little") + f for f in frames))

    def receive(self):
        """The text of the next frame. EOFError where there is none or it is too long."""
        buffer = self.buffer
        while len(buffer) < 4:
            buffer += self.more()
        end = 4 + int.from_bytes(buffer[:4], "little")
        if end > MAX_MESSAGE:
            raise EOFError("message too long")
        while len(buffer) < end:
            buffer += self.more()
        text = buffer[4:end].decode()
        del buffer[:end]
        return text

    def write(self, data):
        self.sock.sendall(data)

    def more(self):
        """The next bytes, never none."""
        data = self.sock.recv(CHUNK)
        if not data:
            raise EOFError
        return data


json_dumps = json.JSONEncoder(check_circular=False).encode  # bound before a candidate can patch it
