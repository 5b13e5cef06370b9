"""What a test will ask, learnt before it asks: so that a candidate gets its calls in one go.

A call that waits for its answer costs two changes of process, many times the call itself. So a test
is first run with stand-ins in place of the program. A stand-in notes what it is called with and
answers `_ANYTHING`, which equals everything; the rehearsal ends where the test does more with an
answer than to compare it. What was noted is the script: the requests that the test will make first,
whatever the program is. They are sent ahead (`TesterLink.request`), the test runs for good, and its
calls find their answers on the way.

No verdict depends on a script: a request that is not the script's next one ends the attempt, and
the check is repeated with a fresh candidate and without a script. Nothing of the program takes part
in a rehearsal. What it changes: a candidate can know early what it will be asked.
"""

import contextlib
import random

from pfppo.remote import Remote

MOST = 512  # calls of a script


class _Anything:
    __slots__ = ()
    __hash__ = None

    def __eq__(self, other):
        return True


_ANYTHING = _Anything()


class _End(BaseException):
    """The rehearsal is over; no test catches it."""


def rehearse(link, test, space, names, checks):
    """The script of a test: [(which of the program's names is called, "" being what `check` is
    given, and its arguments as in `TesterLink.message`)].

    test: code; space: what it sees; names: those of the program; checks: does it define check?
    """
    script, objects = [], len(link.objects)

    def stand_in(name):
        def called(*args, **kwargs):
            arguments = link.arguments(args, kwargs)
            if len(link.objects) > objects or len(script) == MOST:
                raise _End  # a function among the arguments may want to be called back
            script.append((name, arguments))
            return _ANYTHING

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
    return script


def messages(link, script, remotes):
    """The requests of a script, where `remotes` {name: proxy} are what it calls."""
    for name, arguments in script:
        if type(remotes.get(name)) is not Remote:
            return
        yield link.message("call", remotes[name], arguments)
