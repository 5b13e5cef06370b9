"""The folder of a run: whose it is, what its files are, and whether all nodes see the same one.

    args.json             the arguments
    inputs.json           SHA-256 of the files that they name
    metrics.jsonl         one object per step
    samples.jsonl         one object per sample
    checkpoints/step_N/   complete state after N steps (checkpoint.py)
    policy/               the policy that was best on validation (export.py)

A folder belongs to the run whose arguments stand in it: another one's is refused before long work.
`--resume` reads them (config.parse), so the folder's name is enough to go on.
A file that has changed since is no other argument: it may be a function that was mended, or
problems that were. What was made of it stays, which is said.
JSON files are replaced whole; JSONL files grow by whole steps, and on resume they are cut back to
the checkpoint's step.

Not covered: several runs in one folder.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import tempfile
import time
from pathlib import Path

from pfppo.config import UserError, reason, require
from pfppo.files import check_writable, write_json
from pfppo.fsdp import from_main, gather_lists, on_main
from pfppo.run.options import free_options

VISIBLE = 10.0  # seconds that a network file system may take to show a new file


def claim(args, ranks, default, option="run_dir", files=None):
    """Name the folder of --`option` (default: `numbered`), and return its Path if it is free or
    holds this very run. files: the names that matter in it; None: all. Raises UserError."""
    resume = getattr(args, "resume", False)
    folder = Path(from_main(getattr(args, option) or numbered(default, resume), ranks))
    setattr(args, option, str(folder))
    on_main(ranks, _check, folder, args, option, files)
    check_shared(folder, f"--{option} {folder}", ranks)
    return folder


def open_folder(folder, args, ranks):
    """Make the folder, and let its args.json say what the run goes on with: of a run that is
    resumed no more differs than what is free to. Raises UserError."""

    def make():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "args.json", dataclasses.asdict(args))
            for path in _note_inputs(folder / "inputs.json", args):
                ranks.say(f"{path}: has changed since {folder} was begun: what it gave there stays")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from error

    on_main(ranks, make)


def _note_inputs(path, args):
    """Write the digests of the files that options name, of functions in files too. Returns those
    whose digest was another one."""
    found = {}
    for value in dataclasses.asdict(args).values():
        for place in (value, value.rpartition(":")[0]) if isinstance(value, str) else ():
            if os.path.isfile(place):  # False of what is too long for a name
                with open(place, "rb") as file:
                    found[place] = hashlib.file_digest(file, "sha256").hexdigest()
    known = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(path.read_text()))
    if found:
        write_json(path, found)
    return [place for place in found if known.get(place, found[place]) != found[place]]


def _check(folder, args, option, files):
    """Raise UserError where this folder cannot be used for a run with these arguments."""
    check_writable(folder, option)
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    names = names if files is None else names & set(files)
    if not names - {"args.json.tmp"}:  # that one is left by a start that was killed
        return
    what = f"--{option} {folder}"
    require(hasattr(args, "resume"), f"{what}: is not empty, choose another name")
    try:
        known = dict(json.loads((folder / "args.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        why = "is not empty and holds no run (no readable args.json), choose another name"
        raise UserError(f"{what}: {why}") from error
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    free = {*free_options(args), option}
    asked = {name: value for name, value in dataclasses.asdict(args).items() if name not in free}
    differ = differences(defaults | known, asked)  # it may be older than an option
    other = f"holds a run with other arguments ({differ}): choose another name, or give"
    require(not differ, f"{what}: {other} --resume and the arguments of that run, or none")
    again = "holds a run with these arguments: give --resume to go on with it, or another name"
    require(args.resume, f"{what}: {again}")


def differences(known, asked):
    """Which of the arguments that are asked for stand otherwise in a folder, as text."""
    pairs = ((name, known.get(name), value) for name, value in asked.items())
    return "; ".join(
        f"{name} {old!r} there, {new!r} here" for name, old, new in pairs if old != new
    )


def numbered(folder, last=False):
    """The first of folder, folder-2, folder-3, ... that does not exist; the `last` that does, if
    any does."""
    folders = [Path(folder)]
    while folders[-1].exists():
        folders.append(Path(f"{folder}-{len(folders) + 1}"))
    return folders[-2:][0] if last else folders[-1]


def check_shared(folder, what, ranks):
    """Raise UserError on all ranks unless `folder`, or the nearest of rank 0's parents that exists,
    is the same one on all nodes. what: its name in the message. A collective."""
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:  # nodes that torchrun runs on
        return
    places = (Path(folder).absolute(), *Path(folder).absolute().parents)

    def make_token():
        level = next(level for level, path in enumerate(places) if path.exists())
        try:
            descriptor, token = tempfile.mkstemp(prefix=".shared-", dir=places[level])
        except OSError as error:
            raise UserError(f"{what}: cannot be written: {reason(error)}") from error
        os.close(descriptor)
        return level, os.path.basename(token)

    level, name = on_main(ranks, make_token)
    token = places[min(level, len(places) - 1)] / name
    deadline = time.monotonic() + VISIBLE
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    views = gather_lists([(seen, f"{token.parent} of {socket.gethostname()}")], ranks)
    if ranks.is_main:
        token.unlink()
    blind = [place for seen, place in views if not seen]
    shared = f"is another folder than {views[0][1]}, expected a file system that all nodes share"
    require(not blind, f"{what}: {blind[:1] and blind[0]} {shared}")
