"""Plain data: the exact types that cross by value, and how each is written in simpler ones.

Not here: what is no plain data (values.py).
"""

import collections
import datetime
import decimal
import fractions
import operator
import types

ATOMS = frozenset((float, str, bool, type(None)))
SCALARS = ATOMS | {int}


def flat(mapping):
    return [part for pair in mapping.items() for part in pair]


def pairs(parts):
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _parts(*names):
    return lambda value: [getattr(value, name) for name in names]


def _spread(function):
    return lambda parts: function(*parts)


_TABLE = (  # exact type, tag, to something simpler, and back
    (tuple, "t", list, tuple),
    (dict, "d", flat, pairs),
    (set, "s", list, set),
    (frozenset, "S", list, frozenset),
    (bytes, "b", bytes.hex, bytes.fromhex),
    (bytearray, "B", bytearray.hex, bytearray.fromhex),
    (complex, "c", _parts("real", "imag"), _spread(complex)),
    (range, "r", _parts("start", "stop", "step"), _spread(range)),
    (slice, "l", _parts("start", "stop", "step"), _spread(slice)),
    (type({}.keys()), "k", list, lambda v: dict.fromkeys(v).keys()),
    (type({}.values()), "v", list, lambda v: dict(enumerate(v)).values()),
    (types.MappingProxyType, "p", lambda v: flat(dict(v)),
     lambda v: types.MappingProxyType(pairs(v))),
    (type({}.items()), "j", lambda v: flat(dict(v)), lambda v: pairs(v).items()),
    (type(...), "e", lambda v: 0, lambda v: ...),
    (fractions.Fraction, "F", _parts("numerator", "denominator"),
     lambda v: fractions.Fraction(*map(int, v))),  # of strings it might be long in the making
    (decimal.Decimal, "D", str, decimal.Decimal),
    (collections.deque, "q", lambda v: [list(v), v.maxlen], _spread(collections.deque)),
    (collections.Counter, "u", flat, lambda v: collections.Counter(pairs(v))),
    (collections.OrderedDict, "O", flat, lambda v: collections.OrderedDict(pairs(v))),
    (collections.defaultdict, "m", lambda v: [v.default_factory, flat(v)],
     lambda v: collections.defaultdict(v[0] if isinstance(v[0], type) else None, pairs(v[1]))),
    (datetime.date, "date", datetime.date.isoformat, datetime.date.fromisoformat),
    (datetime.time, "time", datetime.time.isoformat, datetime.time.fromisoformat),
    (datetime.datetime, "datetime", datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    (datetime.timedelta, "timedelta", _parts("days", "seconds", "microseconds"),
     _spread(datetime.timedelta)),
)  # fmt: skip
PACK = {kind: (tag, simpler) for kind, tag, simpler, _ in _TABLE}
UNPACK = {tag: back for _, tag, _, back in _TABLE} | {"i": lambda v: int(v, 16), "I": iter}
PLAIN = int, float, str, bool, list, *PACK
METHODS = {name for kind in PLAIN for name in dir(kind)}  # and attributes
TYPES = {kind.__name__: kind for kind in (*PLAIN, type(None))}


def is_array(value):
    numeric = type(value).__module__ == "numpy" and hasattr(value, "dtype")
    return numeric and value.shape != () and value.dtype.kind in "biufc"


def containers(values):
    """The mutable containers in data, in the order in which both ends count them."""
    queue = list(values)
    for part in queue:  # it grows
        if isinstance(part, (list, tuple, dict, collections.deque)):
            parts = part.values() if isinstance(part, dict) else part
            queue += [inner for inner in parts if type(inner) not in SCALARS]
    mutable = list, dict, set, bytearray, collections.deque
    return [part for part in queue if isinstance(part, mutable) or is_array(part)]


def unchanged(held, before):
    """Does a container hold the very objects that its copy holds?"""
    if is_array(held):
        return held.tobytes() == before.tobytes()
    if isinstance(held, (set, bytearray)) or len(held) != len(before):
        return held == before
    if isinstance(held, dict):
        if [*held] != [*before]:
            return False
        held, before = held.values(), before.values()
    return all(map(operator.is_, held, before))


def refill(held, contents):
    if isinstance(held, (list, bytearray)) or is_array(held):
        held[:] = contents
    else:
        held.clear()
        (held.extend if isinstance(held, collections.deque) else held.update)(contents)
