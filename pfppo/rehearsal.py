"""What a test will ask, learnt before it asks: so that a candidate gets its calls in one go.

A call that waits for its answer costs two changes of process, many times the call itself. So a test
is first run with stand-ins in place of the program. A stand-in notes what it is called with and
answers `_Anything`, which equals everything and remembers what it was compared with; the rehearsal
ends where the test does more with an answer than to compare it. What was noted is the script: the
requests that the test will make first, whatever the program is. They are sent ahead
(`TesterLink.request`), the test runs for good, and its calls find their answers on the way.

No verdict depends on a script: a request that is not the script's next one ends the attempt, and
the check is repeated with a fresh candidate and without a script. Nothing of the program takes part
in a rehearsal. A candidate can read what was sent ahead, so a call whose arguments would give away
the answer to an earlier one (`f(2) == 3`, then `f(3) == 5`) waits until that one is answered.
"""

import contextlib
import random

from pfppo.remote import Remote

MOST = 512  # calls of a script


class _Anything:
    __hash__ = None

    def __init__(self, expected):
        self._expected = expected

    def __eq__(self, other):
        self._expected.append(other)
        return True


class _End(BaseException):
    """The rehearsal is over; no test catches it."""


def rehearse(link, test, space, names, checks):
    """The script of a test: [(which of the program's names is called, "" being what `check` is
    given; its arguments as in `TesterLink.message`; whether it has to wait for earlier answers)].

    test: code; space: what it sees; names: those of the program; checks: does it define check?
    """
    script, objects = [], len(link.objects)

    def stand_in(name):
        def called(*args, **kwargs):
            arguments = link.arguments(args, kwargs)
            if len(link.objects) > objects or len(script) == MOST:
                raise _End  # a function among the arguments may want to be called back
            expected = []
            script.append((name, arguments, [*args, *kwargs.values()], expected))
            return _Anything(expected)

        return called

    def refused(*_):
        raise _End

    link.ask = refused  # the reference's own functions may call the program
    with contextlib.suppress(Exception, SystemExit, _End):
        random.seed(0)
        space = {**space, **{name: stand_in(name) for name in names}}
        exec(test, space)
        if checks:
            script.clear()  # what the module itself asks has been asked
            random.seed(0)
            space["check"](stand_in(""))
    del link.ask
    return list(_with_waits(link, script))


def _with_waits(link, script):
    """What is expected is given away by a later argument that is equal to it or, if it is more than
    a number, holds it."""
    numbers, texts = set(), set()
    for name, arguments, values, expected in script:
        wait = any(text in arguments for text in texts)
        wait = wait or any(isinstance(v, (int, float)) and v in numbers for v in values)
        if wait:
            numbers, texts = set(), set()
        for value in expected:
            if isinstance(value, (int, float)):
                numbers.add(value)
            elif value is not None:
                with contextlib.suppress(TypeError):  # what cannot travel is in no argument
                    several = isinstance(value, (tuple, set, frozenset))
                    texts.add(link.dumps(list(value) if several else value))
        yield name, arguments, wait


def messages(link, script, remotes):
    """(request, has it to wait?) of a script, where `remotes` {name: proxy} are what it calls."""
    for name, arguments, wait in script:
        if type(remotes.get(name)) is not Remote:
            return
        yield link.message("call", remotes[name], arguments), wait
