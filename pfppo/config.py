"""A dataclass is the command line: one field, one option; the field's comment is its `--help`.

    @dataclass
    class Args(Machine):  # the options of a base class are taken as well
        # 1. Sample
        steps: int = 40  # PPO steps

    args = parse(Args)  # takes --steps 40

A comment on a line of its own heads a group in `--help`. Both `--a_b` and `--a-b` are taken. Kinds
of fields: int, float, str, bool (`--flag`, `--no_flag`), `Literal` (a list of choices), and numbers
with a range: `Count`, `Positive`, `Share`, ... below; `Strings`, several words. Everything that a
user can get wrong ends as one line on standard error and exit status 2 (`UserError`, printed by
`launch`, on rank 0 only; `fsdp.agreed` brings it there from the others), and so do Ctrl-C, with
status 130, and SIGTERM, with 143. Under torchrun the line stands above torchrun's own report, and
torchrun itself exits with 1.

A script that can resume writes its arguments into the folder that it makes. With `--resume`, those
of FOLDER/args.json are taken as if they stood in front of the command line: what is given there
again counts, and whether that may differ is the script's to say (run/folder.py).

Not covered: configuration files, sub-commands.
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import importlib.util
import inspect
import json
import os
import re
import signal
import sys
import textwrap
import time
import traceback
import typing
from pathlib import Path
from typing import Annotated

FOLDERS = ("run_dir", "out")  # the option that names what a script makes


class UserError(Exception):
    """Something the user can mend. The message is one line: option or file, found, expected."""


def divisors(number):
    """Those of a number, from 1 to itself."""
    return [d for d in range(1, number + 1) if number % d == 0]


def near(value, fitting):
    """The end of a message on a number that does not fit: up to three that do, those next to it."""
    some = sorted(sorted(fitting, key=lambda x: abs(x - value))[:3])
    return f": {', '.join(map(str, some))} {'do' if len(some) > 1 else 'does'}" if some else ""


def require(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def told_in(where):
    """A context in which the message of a UserError gets this beginning."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


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
Strings = list[str] | None  # None where the option is not given


def parts(text):
    """The parts of a comma-separated list, such as several folders of reward models."""
    return [part for part in map(str.strip, str(text).split(",")) if part]


def is_hub_id(path):
    """Whether a path that is no folder looks like owner/name on the Hugging Face Hub."""
    names = Path(path).parts
    looks = len(names) == 2 and names[0] not in (".", "..", "/", "~")
    return looks and not Path(names[0]).exists()


def model_folders(args):
    """[(option, path)] of the models that a command line names, reward models one by one."""
    policy, models = (getattr(args, name, "") for name in ("policy", "reward_model"))
    return [("policy", policy)] * bool(policy) + [("reward_model", path) for path in parts(models)]


def require_folder(path, option):
    """Raise UserError if there is no such folder."""
    require(not Path(path).is_file(), f"--{option} {path}: is a file, expected a model's folder")
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


def _with_names(comment):
    """A comment in which "name in TABLE", or "some of TABLE", says the names of that table."""

    def names(match):
        modules = [m for name, m in sys.modules.items() if name.startswith(f"{__package__}.")]
        tables = (getattr(module, match[2], None) for module in modules)
        table = next((table for table in tables if isinstance(table, dict)), None)
        return match[0] if table is None else (match[1] or "") + ", ".join(table)

    return re.sub(r"(?:name in |(some of ))([A-Z]{2,})\b", names, comment)


def own_reason(error):
    """`reason` of what a user's own function raised, with the line where it did: the last one that
    is neither in a library nor in this package."""
    libraries = (str(Path(__file__).parent), "site-packages")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in libraries)]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return reason(error) + place


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def _checked(kind, name, limits):
    def convert(text):
        value = kind(text)
        if value != value or value in (float("inf"), float("-inf")):  # no text is
            raise ValueError
        for limit in limits:
            require(limit.holds(value), f"--{name} {text}: expected {limit.expected}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in "invalid int value: 'x'"
    return convert


def parse(cls, argv=None):
    """Build `cls` from `argv` (default: the process's own), with --resume from what its folder says
    as well. Raises UserError; exits 0 on --help."""
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
        comment = _with_names(comment) + default
        option = {"default": field.default, "help": comment.replace("%", "%%")}
        if field.type is bool:
            option["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(field.type) is typing.Literal:
            option["choices"] = typing.get_args(field.type)
        elif field.type == Strings:
            option |= {"nargs": "+", "metavar": "str"}
        else:
            kind, *limits = typing.get_args(field.type) or [field.type]
            option["type"] = _checked(kind, name, limits)
            option["metavar"] = kind.__name__
            if kind is str and limits:
                option["help"] = f"{limits[0].expected}: {option['help']}"
        groups[title].add_argument(f"--{name}", **option)
    argv = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    args = cls(**vars(parser.parse_args(argv)))
    option, folder = folder_of(args)
    path = Path(folder, "args.json")
    if not (getattr(args, "resume", False) and folder):
        return args
    if not path.is_file():
        said = [f.name for f in fields.values() if getattr(args, f.name) != f.default]
        nothing = "there is no run to go on with (no args.json in it), and no other argument"
        begins = {*said} > {option, "resume"}
        require(begins, f"--{option} {folder}: {nothing} to begin one with")
        return args
    words = words_of(_read_arguments(path, fields))
    try:
        return cls(**vars(parser.parse_args([*words, *argv])))
    except UserError as error:  # what is given was read alone, so it is the file's
        raise UserError(f"--{option} {folder}: args.json: {error}") from error


def folder_of(args):
    """(option, folder) of what a script makes; ("", "") where it makes none, or has no name yet."""
    named = ((name, getattr(args, name, "")) for name in FOLDERS)
    return next(((name, folder) for name, folder in named if folder), ("", ""))


def _read_arguments(path, fields):
    """The arguments in an args.json, to go on with; {} where it cannot be read, which is told when
    the folder is claimed. Raises UserError on those that the script has not."""
    try:
        known = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
    others = ", ".join(known.keys() - fields.keys())
    whose = "it is of another script, or of another version: choose another name, or remove them"
    require(not others, f"{path}: options that are not known here ({others}): {whose} there")
    return known


def words_of(values):
    """{name: value} as a command line that `parse` reads."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        elif isinstance(value, list) and len(value) > 1:
            words += [f"--{name}", *value]
        elif value is not None:
            words.append(f"--{name}={value[0] if isinstance(value, list) else value}")
    return words


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
            module = _module_of(Path(place).resolve(), os.stat(place).st_mtime_ns)
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


@functools.cache
def _module_of(path, changed):
    """The module in a file, imported once for all options that name it; `changed` is when it was
    written, as one that has changed is another."""
    own = f"own_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(own, path)
    module = sys.modules[own] = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def launch(main, cls):
    """Parse, run `main(args)`, and turn what a user can mend into one line and exit status 2, and
    Ctrl-C and SIGTERM into one and 130 or 143."""
    args, status = None, 2
    signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            args = parse(cls)
            return main(args)
        except Exception:
            # The rank that this one waited for may have ended by a signal that came here too:
            time.sleep(0)  # Python calls its handler now
            raise
    except UserError as error:
        message = f"error: {error}"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        message = f"error: {error.filename or 'file system'}: {error.strerror}"
    except KeyboardInterrupt as error:
        name, status = error.args or ("Ctrl-C", 130)
        message = f"ended by {name}{_how_to_go_on(args)}"
    message = " ".join(message.split())
    if os.environ.get("RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _terminate(number, _):
    signal.signal(number, signal.SIG_DFL)  # a second one ends at once
    raise KeyboardInterrupt("SIGTERM", 128 + number)


def _how_to_go_on(args):
    option, folder = folder_of(args)
    begun = folder and Path(folder, "args.json").is_file()
    if begun and hasattr(args, "resume"):
        return f"; go on with --{option} {folder} --resume"
    return "; the same command starts it again"
