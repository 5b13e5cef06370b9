"""A dataclass is the command line: one field, one option; the field's comment is its `--help`.

    @dataclass
    class Args(Machine):  # the options of a base class are taken as well
        # 1. Sample
        steps: int = 40  # PPO steps

    args = parse(Args)  # takes --steps 40

A comment on a line of its own heads a group in `--help`. Both `--a_b` and `--a-b` are taken. Kinds
of fields: int, float, str, bool (`--flag`, `--no_flag`), `Literal` (a list of choices), and numbers
with a range: `Count`, `Positive`, `Share`, ... below. Everything that a user can get wrong ends as
one line on standard error and exit status 2 (`UserError`, printed by `launch`, on rank 0 only;
`fsdp.agreed` brings it there from the others). Under torchrun the line stands above torchrun's own
report, and torchrun itself exits with 1.

Not covered: configuration files, sub-commands.
"""

import argparse
import dataclasses
import errno
import importlib.util
import inspect
import os
import re
import sys
import textwrap
import typing
from pathlib import Path
from typing import Annotated


class UserError(Exception):
    """Something the user can mend. The message is one line: option or file, found, expected."""


def require(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number must be: Annotated[int, Range("at least 1", lambda x: x >= 1)]."""

    expected: str
    holds: typing.Callable


Count = Annotated[int, Range("at least 1", lambda x: x >= 1)]
Natural = Annotated[int, Range("at least 0", lambda x: x >= 0)]
Seed = Annotated[int, Range("0 to 4294967295", lambda x: 0 <= x < 2**32)]
Positive = Annotated[float, Range("more than 0", lambda x: x > 0)]
NonNegative = Annotated[float, Range("at least 0", lambda x: x >= 0)]
Share = Annotated[float, Range("0 to 1", lambda x: 0 <= x <= 1)]


def is_hub_id(path):
    """Whether a path that is no folder looks like owner/name on the Hugging Face Hub."""
    parts = Path(path).parts
    looks = len(parts) == 2 and parts[0] not in (".", "..", "/", "~")
    return looks and not Path(parts[0]).exists()


def require_folder(path, option):
    """Raise UserError if there is no such folder."""
    require(Path(path).is_dir(), f"--{option} {path}: there is no such folder")


def reason(error):
    """What an exception says, in one line of at most 240 characters."""
    text = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return textwrap.shorten(text, 240, placeholder=" ...")


def described(cls):
    """{field name: (group, comment)} in the order of the source, own fields before inherited ones.
    A class's group is its docstring's first line, until a comment on a line of its own heads one.
    """
    found = {}
    for kind in cls.__mro__[:-1]:
        lines = inspect.getsource(kind).splitlines()
        has_own_doc = kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
        group = kind.__doc__.strip().splitlines()[0] if has_own_doc else "options"
        for line in lines:
            if heading := re.match(r"    # (.*)", line):
                group = heading[1]
            elif field := re.match(r'    (\w+):(?:"[^"]*"|[^#"])*(?:# *(.*))?', line):
                found.setdefault(field[1], (group, field[2] or ""))
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def _number(kind, name, limits):
    def convert(text):
        value = kind(text)
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError
        for limit in limits:
            require(limit.holds(value), f"--{name} {text}: expected {limit.expected}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in "invalid int value: 'x'"
    return convert


def parse(cls, argv=None):
    """Build `cls` from `argv` (default: the process's own). Raises UserError; exits 0 on --help."""
    description = (inspect.getmodule(cls).__doc__ or "").strip().split("\n\n")[0]
    parser = _Parser(
        usage="%(prog)s [--option value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fields, groups = {field.name: field for field in dataclasses.fields(cls)}, {}
    for name, (title, comment) in described(cls).items():
        if name not in fields:  # a line of a docstring
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        field = fields[name]
        default = "" if field.default in ("", None) else f" [{field.default}]"
        option = {"default": field.default, "help": (comment + default).replace("%", "%%")}
        if field.type is bool:
            option["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(field.type) is typing.Literal:
            option["choices"] = typing.get_args(field.type)
        else:
            kind, *limits = typing.get_args(field.type) or [field.type]
            option["type"] = kind if kind is str else _number(kind, name, limits)
            option["metavar"] = kind.__name__
        groups[title].add_argument(f"--{name}", **option)
    argv = sys.argv[1:] if argv is None else argv
    return cls(**vars(parser.parse_args([_underscored(word) for word in argv])))


def _underscored(word):
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = "--" + name[2:].replace("-", "_")
    return name.replace("--no_", "--no-", 1) + equals + value


def load_function(spec, option, table=()):
    """That of `table` {name: function}, of `package.module:function` or `path/to/file.py:function`.

    Modules are looked for in the working folder too, not only beside the script. Raises UserError
    naming `option` where there is no such name, file, module or function.
    """
    if spec in table:
        return table[spec]
    known = ", ".join([*table, "module:function or file.py:function"])
    require(":" in spec, f"--{option} {spec}: unknown, expected one of {known}")
    place, _, name = spec.rpartition(":")
    try:
        if place.endswith(".py"):
            require(Path(place).is_file(), f"--{option} {spec}: there is no file {place}")
            own = f"own_{Path(place).stem}"
            module_spec = importlib.util.spec_from_file_location(own, place)
            module = sys.modules[own] = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
        else:
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())
            module = importlib.import_module(place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"--{option} {spec}: cannot import {place}: {reason(error)}") from error
    function = getattr(module, name, None)
    require(callable(function), f"--{option} {spec}: {place} has no function {name!r}")
    return function


def launch(main, cls):
    """Parse, run `main(args)`, and turn what a user can mend into one line and exit status 2."""
    try:
        return main(parse(cls))
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        message = f"{error.filename or 'file system'}: {error.strerror}"
    except KeyboardInterrupt:
        sys.exit(130)
    message = " ".join(message.split())
    if os.environ.get("RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
