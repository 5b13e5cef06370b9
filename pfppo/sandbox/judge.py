"""Gives verdicts: runs one test in a process of its own, against a program behind walls.

A judge is forked by a server that is warm with what tests import. It gets the check's `Plan`, the
program and the socket of a candidate; it loads the program there, runs the test here with stand-ins
(proxy.py) for the program's names, says how that ended, and ends: nothing that a test sets stays
for the next. `==`, `abs`, `math.isclose`, numpy and the test itself are never the candidate's. A
test passes where it ran to its end; an end of file or an unreadable answer is a fail.

`plan_of` runs in the caller's process, which compiles each test once. Not here: most clocks, and
what is done with a judge that says nothing (__init__.py); what a candidate may do (walls.py).
"""

import ast
import builtins
import contextlib
import functools
import marshal
import os
import resource
import signal
import socket
import symtable
import sys
import threading
import types
import typing
import warnings
import zlib

from pfppo.sandbox.candidate import Server
from pfppo.sandbox.proxy import TRUSTED, JudgeLink, Remote
from pfppo.sandbox.walls import PR_SET_DUMPABLE, libc, sweep

# An answer that is no string, but has a `startswith` that says yes, is what a test hopes to hear.
_DATA_METHODS = {m for kind in (str, bytes, int, float, list, tuple, dict, set) for m in dir(kind)}
_planning = threading.Lock()  # as no two threads may catch warnings


class Plan(typing.NamedTuple):
    """What can be said about a check from its trusted texts alone."""

    test: types.CodeType
    reference: types.CodeType | None
    entry_point: str
    base: str  # the program's name that must exist
    names: set  # the program's names that the test may see
    shared: set  # classes of the reference, other than what is tested, that the test deals in
    refused: set  # methods of plain data that no class of the reference has
    checks: bool  # does the test define check(candidate)?
    seed: int  # of what the test draws


@functools.lru_cache(128)
def plan_of(test, entry_point, reference):
    """The `Plan` of a check's texts; SyntaxError where one of them is no Python."""
    seed, base = zlib.crc32(_bytes(test)), (entry_point or "").split("(")[0].split(".")[0]
    with _planning, warnings.catch_warnings(action="ignore"):  # of old escapes
        code, trusted = (compile(_bytes(text), "test", "exec") for text in (test, reference))
        top, ref = (symtable.symtable(_bytes(text), "", "exec") for text in (test, reference))
        nodes = list(ast.walk(ast.parse(_bytes(reference))))
    checks = any(child.get_name() == "check" for child in top.get_children())
    if not reference:
        bound = {s.get_name() for s in top.get_symbols() if s.is_local()}
        names = _reads(top) - bound - {*dir(builtins)} | {base} - {""}
        return Plan(code, None, entry_point, base, names, set(), set(), checks, seed)
    scopes = {s.get_name(): s for s in ref.get_children() if s.get_type() in ("function", "class")}
    used = _reads(top) & scopes.keys() - {base}
    for name in (queue := [*used]):  # and what that uses itself
        queue += _reads(scopes[name]) & scopes.keys() - {base, *queue}
    classes = [scope for scope in _scopes(ref) if scope.get_type() == "class"]
    has = {s.get_name() for scope in classes for s in scope.get_symbols() if s.is_local()}
    has |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    # Where nothing says what is tested, it is all that the test uses.
    names, shared = ({base}, {*queue} & {c.get_name() for c in classes}) if base else (used, set())
    refused = _DATA_METHODS - has
    return Plan(code, trusted, entry_point, base, names, shared, refused, checks, seed)


def _bytes(source):
    return source.encode("utf-8", "surrogatepass")  # in this form it may begin with a BOM


def _scopes(table):
    return [table, *(scope for child in table.get_children() for scope in _scopes(child))]


def _reads(table):
    """The global names that are read in a scope and those within it."""
    symbols = (symbol for scope in _scopes(table) for symbol in scope.get_symbols())
    return {s.get_name() for s in symbols if s.is_global() and s.is_referenced()}


def trusted_names(program, names):
    """{name: value} that a test without a reference does not take from the program: modules of
    TRUSTED, and what the program imports from them."""
    space = {}
    lines = [f"import {name}" for name in names & {*TRUSTED}]
    lines += ["import numpy as np"] if "np" in names else []
    for node in ast.walk(ast.parse(_bytes(program))):
        if isinstance(node, ast.ImportFrom) and node.module in TRUSTED and not node.level:
            lines += [f"from {node.module} import {a.name}" for a in node.names if not a.asname]
    for line in lines:
        with contextlib.suppress(ImportError):
            exec(line, space)
    return {name: space[name] for name in names & space.keys()}


def run_test(link, plan, program):
    """The heart: run the test here, with the program there; (outcome, detail)."""
    try:
        space = _space(plan, link)
    except BaseException as error:
        return "exception", f"the reference does not run: {_outcome(link, error)[1]}"
    try:
        answer = link.ask("load", program, [sorted(plan.names), sorted(link.shared)])
    except Exception as error:
        return _outcome(link, error, "syntax_error" if isinstance(error, SyntaxError) else None)
    if type(answer) is not dict:
        return "exception", "unreadable answer: no names"
    names = {name: answer[name] for name in plan.names & answer.keys()}  # and no `all` or `len`
    if plan.base and plan.base not in names:
        return "exception", f"NameError: name '{plan.base}' is not defined"
    try:
        if not plan.reference:
            names |= trusted_names(program, plan.names - {plan.base})
        for name in plan.names:
            space.pop(name, None)
        space.update(names)
        seed = _shared_seeds(link, plan.seed)
        steps = [lambda: exec(plan.test, space)]
        if plan.checks:
            steps.append(lambda: space["check"](eval(plan.entry_point, space)))
        for step in steps:
            seed()
            try:
                step()
            except SystemExit as error:  # the test's own end, as by `unittest.main`
                own = type(error) is SystemExit and not link.has_raised(error)
                if not own or error.code not in (None, 0):
                    return "wrong_answer", f"the test ended with status {error.code}"
    except BaseException as error:
        return _outcome(link, error)
    if isinstance(names.get(plan.base), Remote) and not link.calls:  # what is no Remote is known
        return "wrong_answer", "the test never called the program"
    return "passed", ""


def _space(plan, link):
    """What a test sees besides the program: the reference's names, in a module of their own."""
    module = sys.modules["reference"] = types.ModuleType("reference")  # dataclasses look for it
    space = module.__dict__
    if plan.reference:
        exec(plan.reference, space)
    kinds = {name: space[name] for name in plan.shared if isinstance(space.get(name), type)}
    link.share({n: kind for n, kind in kinds.items() if not issubclass(kind, BaseException)})
    link.refused = plan.refused
    space["__name__"] = "__main__"  # the test may be under its guard, or look there for itself
    sys.modules["__main__"] = module
    return space


def _shared_seeds(link, seed):
    """From here on `random.seed` in a test seeds the program's generator too. Returns a function
    that makes the test's own draws the same each time, but not those that a program sees."""
    own = []
    for name in "random", "numpy.random":
        if module := sys.modules.get(name):
            own.append(module.seed)
            module.seed = functools.partial(_seed_both, link, name, module.seed)
    return lambda: [function(seed) for function in own]


def _seed_both(link, name, own, *args):
    own(*args)
    link.ask("seed", name, args)


def _outcome(link, error, outcome=None):
    detail = f"{type(error).__name__}: {error}".rstrip(": ")
    memory, forbidden = isinstance(error, MemoryError), isinstance(error, PermissionError)
    if link.has_raised(error):
        label = "memory" if memory else "forbidden" if forbidden else "exception"
        return outcome or label, detail
    return "memory" if memory else "wrong_answer", detail


def judge(sock, options):
    """A judge's life: one test, whose verdict is all that it says. It never returns."""
    link = JudgeLink(None, sock)
    try:
        _, descriptors, *_ = socket.recv_fds(sock, 1, 1)
        link.sock = socket.socket(fileno=descriptors[0])
        with sock.makefile("rb") as file:
            *plan, program = marshal.load(file)
        pages = int(open("/proc/self/statm").read().split()[0])
        memory = (2 * options["memory_mb"] << 20) + pages * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (memory if most < 0 else min(memory, most), most))
        signal.setitimer(signal.ITIMER_PROF, options["timeout"])  # the end, by the kernel's hand
        os.chdir(options["directory"])
        link.end(*run_test(link, Plan(*plan), program))
    except BaseException as error:
        link.end(*_outcome(link, error))


def main(options):
    """The process of the judges' server."""
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody reads this memory
    server, directory = Server(options), options["directory"]
    sys.argv = ["test.py"]
    sys.setrecursionlimit(10_000)
    warnings.simplefilter("ignore")  # of old escapes in tests and references
    os.makedirs(directory)
    server.say({"layers": []})
    server.run(directory, lambda sock: judge(sock, options))
    with contextlib.suppress(OSError):
        sweep(options["folder"])  # which it shares with a candidates' server that ends as well
        os.rmdir(options["folder"])
