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
from pfppo.sandbox.data import METHODS
from pfppo.sandbox.proxy import METADATA, TRUSTED, JudgeLink, Remote
from pfppo.sandbox.walls import PR_SET_DUMPABLE, libc, sweep

_planning = threading.Lock()  # as no two threads may catch warnings


class Plan(typing.NamedTuple):
    """What can be said about a check from its trusted texts alone."""

    test: types.CodeType
    reference: types.CodeType | None
    entry_point: str
    base: str  # the program's name that must exist
    reads: set  # global names that the test reads and does not bind
    used: set  # what it uses of the reference's functions and classes, itself or through others
    members: dict  # class of the reference's, or "" -> attributes that its text defines and sets
    checks: bool  # does the test define check(candidate)?
    seed: int  # of what the test draws


@functools.lru_cache(128)
def plan_of(test, entry_point, reference):
    """The `Plan` of a check's texts; SyntaxError where one of them is no Python."""
    seed, base = zlib.crc32(_bytes(test)), (entry_point or "").split("(")[0].split(".")[0]
    with _planning, warnings.catch_warnings(action="ignore"):  # of old escapes
        code, trusted = (compile(_bytes(text), "test", "exec") for text in (test, reference))
        top, ref = (symtable.symtable(_bytes(text), "", "exec") for text in (test, reference))
        tree = ast.parse(_bytes(reference))
    checks = any(child.get_name() == "check" for child in top.get_children())
    reads = _reads(top) - {s.get_name() for s in top.get_symbols() if s.is_local()}
    scopes = {s.get_name(): s for s in ref.get_children() if s.get_type() in ("function", "class")}
    for name in (used := [*_reads(top) & scopes.keys() - {base}]):  # and what that uses itself
        used += _reads(scopes[name]) & scopes.keys() - {base, *used}
    members = _members(ref, tree)
    trusted = trusted if reference else None
    return Plan(code, trusted, entry_point, base, reads, {*used}, members, checks, seed)


def _bytes(source):
    return source.encode("utf-8", "surrogatepass")  # in this form it may begin with a BOM


def _scopes(table):
    return [table, *(scope for child in table.get_children() for scope in _scopes(child))]


def _reads(table):
    """The global names that are read in a scope and those within it."""
    symbols = (symbol for scope in _scopes(table) for symbol in scope.get_symbols())
    return {s.get_name() for s in symbols if s.is_global() and s.is_referenced()}


def _members(table, tree):
    """{outermost class: names that its body and the classes in it bind, and attributes that they
    set}; at "" the attributes that are set elsewhere."""
    members, tables, nodes = {"": set()}, [(table, "")], [(tree, "")]
    for table, owner in tables:  # it grows
        if table.get_type() == "class":
            owner = owner or table.get_name()
            bound = {s.get_name() for s in table.get_symbols() if s.is_local()}
            members[owner] = members.get(owner, set()) | bound
        tables += [(child, owner) for child in table.get_children()]
    for node, owner in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            members[owner].add(node.attr)
        if isinstance(node, ast.ClassDef):
            owner = owner or node.name
        nodes += [(child, owner) for child in ast.iter_child_nodes(node)]
    return members


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
        space, wanted = _space(plan, link)
    except BaseException as error:
        return "exception", f"the reference does not run: {_outcome(link, error)[1]}"
    try:
        answer = link.ask("load", program, [sorted(wanted), sorted(link.shared)])
    except Exception as error:
        return _outcome(link, error, "syntax_error" if isinstance(error, SyntaxError) else None)
    if type(answer) is not dict:
        return "exception", "unreadable answer: no names"
    names = {name: answer[name] for name in wanted & answer.keys()}  # and no `all` or `len`
    tested = [names[name] for name in names.keys() & (plan.reads | {plan.base})]
    if plan.base and plan.base not in names:
        return "exception", f"NameError: name '{plan.base}' is not defined"
    try:
        if not plan.reference:
            names |= trusted_names(program, wanted - {plan.base})
        for name in wanted:
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
    known = tested and not any(isinstance(value, Remote) for value in tested)  # it came by value
    if not known and not link.calls:
        return "wrong_answer", "the test never called the program"
    return "passed", ""


def _space(plan, link):
    """What a test sees besides the program: the reference's names, in a module of their own; and
    the names that are the program's. Without an entry point, these are all but modules."""
    module = sys.modules["reference"] = types.ModuleType("reference")  # dataclasses look for it
    space = module.__dict__
    names = {plan.base} if plan.base else set()
    if plan.reference:
        before = {*space, "__builtins__"}
        exec(plan.reference, space)
        bound = {n: value for n, value in space.items() if n not in before}
        names |= {n for n, v in bound.items() if not plan.base and type(v) is not types.ModuleType}
        _share(plan, link, {n: v for n, v in bound.items() if isinstance(v, type)})
    else:
        names |= plan.reads - {*dir(builtins)}
    space["__name__"] = "__main__"  # the test may be under its guard, or look there for itself
    sys.modules["__main__"] = module
    return space, names


def _share(plan, link, kinds):
    """Which of the reference's classes cross by value, and what the test may ask of all objects
    that do not: nothing that plain data or a class has that is not the program's to define."""
    kinds = {n: kind for n, kind in kinds.items() if kind.__module__ == "reference"}
    base = kinds.get(plan.base)
    tested = {kind.__name__ for kind in base.__mro__} if base else {plan.base}
    shared = kinds.keys() - tested if plan.base else set()
    if base and "." not in plan.entry_point:  # the class itself, with those that only it uses
        shared &= plan.used
    if not plan.base or base and "." not in plan.entry_point:
        tested = (kinds.keys() | plan.members.keys()) - shared
    else:
        tested &= kinds.keys()
    everything = set().union(*plan.members.values(), *map(_attributes, kinds.values()))
    own = plan.members[""].union(*(plan.members.get(name, ()) for name in tested))
    own = own.union(*(_attributes(kinds[name]) for name in tested & kinds.keys()))
    numpy = sys.modules.get("numpy")
    data = METHODS.union(*(map(dir, (numpy.ndarray, numpy.generic)) if numpy else ()))
    link.share({n: kinds[n] for n in shared if not issubclass(kinds[n], BaseException)})
    link.defined, link.foreign = own, everything - own
    link.refused = set() if "__getattr__" in own else (data | everything) - own - METADATA
    link.methods = link.refused - link.foreign


def _attributes(kind):
    """What a class or its metaclass has, and `object` has not."""
    says = kind.__str__ is not object.__str__ or kind.__repr__ is not object.__repr__
    return {*dir(kind), *dir(type(kind))} - {*dir(type)} | ({"__str__"} if says else set())


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
        link.longest = options["memory_mb"] << 20  # a candidate that owns no more can send no more
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
