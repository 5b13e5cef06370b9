"""What can be said about a check from its texts alone, before anything runs: its `Plan`.

Which names the test may see of the program, which of the reference's classes are the test's own
exceptions, which methods no honest answer has; and, without a reference, which of the program's
imports the test may have too. Texts are parsed and compiled here.

Not here: running any of it (tester.py). Of the untrusted program nothing but its import statements
is looked at, and only modules of a fixed, harmless list are imported for it.
"""

import ast
import builtins
import dataclasses
import functools
import importlib
import types

BUILTIN_ERRORS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException)
}


@dataclasses.dataclass
class Plan:
    """What can be said about a check from its trusted texts alone."""

    test: types.CodeType
    reference: types.CodeType | None
    base: str  # the program's name that must exist
    names: set  # the program's names that the test may see
    exceptions: list  # the reference's exception classes: they are the test's own
    refused: frozenset  # methods of plain data that no class of the reference has
    checks: bool  # does the test define check(candidate)?


def _bytes(source):
    return source.encode("utf-8", "surrogatepass")  # in this form it may begin with a BOM


@functools.lru_cache(1024)
def plan_of(test, entry_point, reference):
    """The `Plan` of a check's texts; SyntaxError where one of them is no Python."""
    code = compile(_bytes(test), "test", "exec")
    base = (entry_point or "").split("(")[0].split(".")[0]
    used, bound = (set(), set()) if reference and base else _names(ast.parse(_bytes(test)))
    names, exceptions, refused = {base} - {""}, [], set()
    if reference:
        reference_tree = ast.parse(_bytes(reference))
        refused = _DATA_METHODS - _attributes(reference_tree)
        for node in reference_tree.body:
            if isinstance(node, ast.ClassDef):
                bases = {part.id for part in node.bases if isinstance(part, ast.Name)}
                if bases & (BUILTIN_ERRORS.keys() | set(exceptions)):
                    exceptions.append(node.name)
                else:
                    names.add(node.name)
            elif isinstance(node, ast.FunctionDef) and not base and node.name in used:
                names.add(node.name)
    else:
        names |= used - bound - set(dir(builtins))
    functions = {part.co_name for part in code.co_consts if isinstance(part, types.CodeType)}
    return Plan(
        code,
        compile(_bytes(reference), "reference", "exec") if reference else None,
        base, names, exceptions, frozenset(refused), "check" in functions,
    )  # fmt: skip


def _names(tree):
    """(names that a test reads, names that it binds)"""
    used, bound = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return used, bound


# An answer that is no string, but has a `startswith` that says yes, is what a test hopes to hear.
_DATA_METHODS = {
    name for kind in (str, bytes, int, float, list, tuple, dict, set) for name in dir(kind)
}


def _attributes(tree):
    """The attributes that a program's classes have: methods, class variables, what is assigned."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef):
                    found.add(part.name)
                elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    found.add(part.id)
    return found


def imports_of(program, names):
    """{name: value} for `names` that the program imports from the standard library: tests that use
    `math` or `sqrt` so get this side's own."""
    found = {}
    for node in ast.walk(ast.parse(_bytes(program))):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for alias in node.names:
            module = alias.name if isinstance(node, ast.Import) else node.module or ""
            if module not in _HARMLESS:
                continue
            if alias.name == "*":
                values = vars(importlib.import_module(module))
                found.update({name: values[name] for name in names & values.keys()})
                continue
            name = alias.asname or alias.name
            if name in names and isinstance(node, ast.Import):
                found[name] = importlib.import_module(module)
            elif name in names and not alias.asname:  # `import ne as isclose` would be a lie
                found[name] = getattr(importlib.import_module(module), name, None)
    return found


_HARMLESS = (
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools",
    "heapq", "itertools", "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
