"""The trusted process that gives verdicts: runs tests here, against a program that is in a jail.

One clean process (started by sandbox.py) for each worker. For each check it takes the next
candidate of a server (jail.py), loads the program there, runs the test here with proxies
(remote.py) in place of the program's names, and says how that ended. `==`, `abs`, `math.isclose`
and the test itself are never the candidate's. The verdict is given after the test's own last
assert; silence, end of file or an unreadable answer is a fail.

Here a check is [program, test, entry point, reference] and a verdict (outcome, seconds, detail):
lines of JSON. Not here: the public classes, the pool and its repairs (sandbox.py), what is read
from the texts (plan.py), what a candidate may do (isolation.py). No untrusted code runs here.
"""

import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import warnings

from pfppo.sandbox.isolation import PR_SET_DUMPABLE, libc
from pfppo.sandbox.remote import Over, Remote, TesterLink
from pfppo.sandbox.texts import BUILTIN_ERRORS, imports_of, plan_of


class Jail:
    """A server (jail.py) and its next candidate. Without the layers in `without`, or refused."""

    def __init__(self, options, preload=()):
        self.without = list(options["without"])
        while True:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.settimeout(60)
            sent = {**options, "without": self.without, "preload": preload}
            self.process = start_python("jail", sent, stdin=theirs, stdout=subprocess.DEVNULL)
            theirs.close()
            self.control = ours
            hello = json.loads(ours.recv(1 << 16) or '{"error": "it died"}')
            if "layers" in hello:
                break
            self.close()
            if "error" in hello:
                raise RuntimeError(f"the sandbox's jail does not start: {hello['error']}")
            self.without.append(hello["failed"])
        self.layers, self.directory = hello["layers"], hello["directory"]
        try:
            self.turn()
        except BaseException:
            self.close()
            raise

    def turn(self):
        """End the candidate in use; how it ended. The next one's socket is in `waiting`."""
        self.control.send(b"n")
        text, descriptors, *_ = socket.recv_fds(self.control, 1 << 16, 1)
        if not descriptors:
            raise EOFError("the server is gone")
        self.waiting = socket.socket(fileno=descriptors[0])
        return json.loads(text)

    def cpu(self):
        self.control.send(b"c")
        return json.loads(self.control.recv(64))

    def close(self):
        self.process.kill()
        self.process.wait()
        self.control.close()
        if "namespaces" not in getattr(self, "layers", ["namespaces"]):
            shutil.rmtree(self.directory, ignore_errors=True)


class Tester:
    """What a tester process does: one check after the other, each with a fresh candidate."""

    def __init__(self, options):
        self.options = options
        self.parent = os.getppid()
        self.jails = {}
        self.jail("")

    def jail(self, preload):
        """The jail with a module loaded ahead of time, started when first asked for."""
        if preload not in self.jails:
            self.jails[preload] = Jail(self.options, (preload,) if preload else ())
            self.jails[preload].watch = self.watch_parent
        return self.jails[preload]

    def watch_parent(self):
        if os.getppid() != self.parent:
            self.close()
            os._exit(0)

    def close(self):
        while self.jails:
            self.jails.popitem()[1].close()

    def judge(self, check):
        """(outcome, seconds, detail) of [program, test, entry point, reference]."""
        start = time.monotonic()
        # Either ends this process, should an answer make it compute or wait for ever.
        signal.setitimer(signal.ITIMER_PROF, 7 * self.options["timeout"] + 3)
        signal.alarm(patience(self.options["timeout"]) + 5)
        for attempt in "first", "second":
            try:
                outcome, detail = self._attempt(check)
                break
            except (OSError, EOFError, ValueError) as error:  # the server is gone: not the verdict
                if attempt == "second":
                    outcome, detail = "exception", f"the jail failed: {error}"
                self.close()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        return outcome, round(time.monotonic() - start, 4), detail

    def _attempt(self, check):
        server = self.jail("numpy" if "numpy" in check[0] else "")
        with server.waiting as sock:
            link = TesterLink(sock, server, self.options["timeout"])
            try:
                outcome, detail = run_test(link, *check)
            except Over:
                outcome, detail = "exception", ""
            if link.over:
                outcome, detail = link.over.args
            ended = server.turn()
        if outcome == "died":
            return self._cause_of_death(ended["code"], ended["cpu"])
        return outcome, detail

    def _cause_of_death(self, code, cpu):
        if cpu >= self.options["timeout"]:
            return "timeout", f"{cpu:.1f} s of CPU"
        if code >= 0:
            return "exit", f"exit status {code}"
        return "exception", f"died: {signal.Signals(-code).name}"


def run_test(link, program, test, entry_point, reference):
    """The heart: run the test here, with the program there; (outcome, detail)."""
    try:
        plan = plan_of(test, entry_point, reference)
    except (SyntaxError, ValueError) as error:
        return "exception", f"the test or the reference does not compile: {error}"
    try:
        found = link.ask("load", program, (sorted(plan.names),))
        if type(found) is not dict:
            return "exception", "unreadable answer: no names"
        found = {name: found[name] for name in plan.names & found.keys()}  # and no `all` or `len`
    except Exception as error:
        outcome = "syntax_error" if isinstance(error, SyntaxError) else None
        return _outcome(link, error, outcome)
    try:
        space = _space(plan)
        if not plan.reference and plan.names - {plan.base}:
            found.update(imports_of(program, plan.names - {plan.base}))
        link.refused = plan.refused
        link.exceptions.update({name: space[name] for name in plan.exceptions})
        for name, kind in found.items():
            if isinstance(kind, type) and issubclass(kind, BaseException):
                if kind in BUILTIN_ERRORS.values():  # `E = Exception` catches nothing raised here
                    found[name] = type(name, (kind,), {})
                link.exceptions[kind.__name__] = found[name]
        for name in plan.names:
            space.pop(name, None)
        space.update(found)
        if plan.base and plan.base not in found:
            return "exception", f"NameError: name '{plan.base}' is not defined"
        space["__name__"] = "__main__"  # the test may be under its guard, or look there for itself
        sys.modules["__main__"] = sys.modules["reference"]
        _draw_the_same()
        exec(plan.test, space)
        if plan.checks:
            candidate = eval(entry_point, space)
            _draw_the_same()
            space["check"](candidate)
    except SystemExit as error:  # the test's own
        if error.code not in (None, 0):
            return "wrong_answer", f"the test ended with status {error.code}"
    except Exception as error:
        return _outcome(link, error)
    if type(found.get(plan.base)) is Remote and not link.calls:  # what is no Remote answers here
        return "wrong_answer", "the test never called the program"
    return "passed", ""


def _draw_the_same():
    """Some tests draw their inputs."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def _space(plan):
    """What a test sees besides the program: the reference's names, in a module of their own."""
    module = sys.modules["reference"] = types.ModuleType("reference")  # dataclasses look for it
    if plan.reference:
        exec(plan.reference, module.__dict__)
    return module.__dict__


def _outcome(link, error, outcome=None):
    if link.raised and error is link.raised[0]:
        named = {"MemoryError": "memory", "PermissionError": "forbidden"}
        return outcome or named.get(link.raised[1], "exception"), link.raised[2][:300]
    return "wrong_answer", f"{type(error).__name__}: {error}".rstrip(": ")[:300]


def main(options):
    """The tester's process: checks come as JSON lines on stdin, verdicts go as JSON lines to
    stdout. It ends with its input, or with its parent."""
    requests, answers = os.dup(0), os.dup(1)
    sys.argv = ["test.py"]
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    warnings.simplefilter("ignore")  # of old escapes in tests and references
    sys.setrecursionlimit(10_000)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody reads this memory
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, hard))  # whatever the answers are
    tester = Tester(options)
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    try:
        _write(answers, tester.jail("").layers)
        text = b""
        while True:
            tester.watch_parent()
            if not poll.poll(5000):
                continue
            data = os.read(requests, 1 << 20)
            if not data:
                return
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                _write(answers, tester.judge(json.loads(line)))
    finally:
        tester.close()


def patience(timeout):
    """Wall seconds after which a check is given up from outside: its tester hangs."""
    return int(12 * timeout) + 30


def _write(descriptor, value):
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def start_python(module, options, **descriptors):
    """A process that runs `pfppo.sandbox.MODULE.main(options)`: a clean interpreter with nothing of
    this one's environment. An empty package stands for pfppo.sandbox, whose own `__init__` would
    load the rooms of this side into a candidate's process. All of the module's imports happen
    before `main`: then the path is gone."""
    code = (
        "import json, sys, types; name = 'pfppo.sandbox'; package = types.ModuleType(name);"
        "package.__path__ = [sys.argv[1]]; sys.modules[name] = package;"
        f"from pfppo.sandbox.{module} import main; package.__path__ = [];"
        "main(json.loads(sys.argv[2]))"
    )
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    environment = {
        "PYTHONHASHSEED": "0",
        "LANG": "C.UTF-8",
        "MALLOC_ARENA_MAX": "1",  # each arena of a thread would reserve 64 MB of address space
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **kept,
    }
    command = [sys.executable, "-P", "-c", code, os.path.dirname(__file__), json.dumps(options)]
    return subprocess.Popen(
        command, env=environment, cwd="/", start_new_session=True, **descriptors
    )
