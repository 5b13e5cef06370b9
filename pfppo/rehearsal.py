"""What a test will ask, learnt before it asks: so that a candidate gets its calls in one go.

A call that waits for its answer costs two changes of process, many times the call itself. So a test
is first run with stand-ins in place of the program. A stand-in notes what it is called with and
answers `_Anything`, which says yes where the test asserts that it equals something, and remembers
what; the rehearsal ends where the test does anything else with an answer. What was noted is the
script: the requests that the test will make first, whatever the program is. They are sent ahead
(`TesterLink.request`), the test runs for good, and its calls find their answers on the way.

No verdict depends on a script: a request that is not the script's next one ends the attempt, and
the check is repeated with a fresh candidate and without a script. Nothing of the program takes part
in a rehearsal. A candidate can read what was sent ahead, so a call whose arguments would give away
the answer to an earlier one (`f(2) == 3`, then `f(3) == 5`) waits until that one is answered, and
so does any call where an earlier answer is not known. Not seen: an answer that could be computed
from later arguments (`f(2) == 3`, then `f([1, 2])`) by a program that knows this of the test.
"""

import contextlib
import dis
import itertools
import random
import re
import sys

from pfppo.remote import Remote

MOST = 512  # calls of a script


class _Anything:
    __hash__ = None

    def __init__(self, note):
        self._note = note

    def __eq__(self, other):
        self._note(other, sys._getframe(1))
        return True


class _End(BaseException):
    """The rehearsal is over; no test catches it."""


def _is_assert(frame, codes):
    """Is the `==` that `frame` is at all that an `assert` asks? Only of what is surely asserted can
    it be said that an answer has to equal it. Told by the bytecode that follows; not where a failed
    assert might be caught. codes: a cache, as `co_code` is a copy."""
    if frame.f_code not in codes:
        codes[frame.f_code] = frame.f_code.co_code
    code = codes[frame.f_code]
    names = (dis.opname[code[place]] for place in range(frame.f_lasti, len(code), 2))
    names = (name for name in names if name not in ("CACHE", "EXTENDED_ARG", "NOT_TAKEN"))
    compare, jump, error = itertools.islice(itertools.chain(names, [""] * 3), 3)
    failed = error in ("LOAD_ASSERTION_ERROR", "LOAD_COMMON_CONSTANT")
    caught = frame.f_code.co_exceptiontable
    return compare == "COMPARE_OP" and "IF_TRUE" in jump and failed and not caught


def draw_the_same():
    """Some tests draw their inputs."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def rehearse(link, test, space, names, checks):
    """The script of a test: [(which of the program's names is called, "" being what `check` is
    given; its arguments as in `TesterLink.message`; whether it has to wait for earlier answers)].

    test: code; space: what it sees; names: those of the program; checks: does it define check?
    """
    script, objects, codes = [], len(link.objects), {}

    def stand_in(name):
        def called(*args, **kwargs):
            arguments = link.arguments(args, kwargs)
            if len(link.objects) > objects or len(script) == MOST:
                raise _End  # a function among the arguments may want to be called back
            expected = []

            def note(other, frame):
                if not _is_assert(frame, codes):
                    raise _End
                expected.append(_clue(link, other))

            script.append((name, arguments, [*args, *kwargs.values()], expected))
            return _Anything(note)

        return called

    def refused(*_):
        raise _End

    link.ask = refused  # the reference's own functions may call the program
    with contextlib.suppress(Exception, SystemExit, _End):
        draw_the_same()
        space = {**space, **{name: stand_in(name) for name in names}}
        exec(test, space)
        if checks:
            script.clear()  # what the module itself asks has been asked
            draw_the_same()
            space["check"](stand_in(""))
    del link.ask
    return list(_with_waits(script))


def _parts(text):
    """The numbers, strings and empty containers that a packed value is made of, in any order."""
    tokens = re.finditer(r'("(?:[^"\\]|\\.)*+")(:?)|(-?\d[\d.e+-]*+)|\[\]', text)
    return frozenset(float(t[3]) if t[3] else t[0] for t in tokens if not t[2])  # but for tags


def _clue(link, value):
    """The parts of a value that the test expects: arguments that have them all give it away."""
    with contextlib.suppress(TypeError, ValueError):  # what cannot travel is in no argument
        return _parts(link.dumps(value))
    return frozenset()


def _with_waits(script):
    """A number among others says nothing, so it is given away only by an argument that is equal to
    it, or by arguments without another part."""
    clues, unknown = set(), False
    for name, arguments, values, expected in script:
        parts = _parts(arguments.removesuffix(', {"d": []}]'))
        numbers = {v for v in values if isinstance(v, (int, float))}
        wait = unknown or any(
            clue <= parts and (len(clue | parts) == 1 or not _is_number(clue) or clue <= numbers)
            for clue in clues
        )
        if wait:
            clues = set()
        clues.update(filter(None, expected))
        unknown = not expected
        yield name, arguments, wait


def _is_number(clue):
    return len(clue) == 1 and isinstance(next(iter(clue)), float)


def messages(link, script, remotes):
    """(request, has it to wait?) of a script, where `remotes` {name: proxy} are what it calls."""
    for name, arguments, wait in script:
        if type(remotes.get(name)) is not Remote:
            return
        yield link.message("call", remotes[name], arguments), wait
