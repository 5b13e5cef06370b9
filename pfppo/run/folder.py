"""The folder of a run: whose it is, what its files are, and whether all nodes see the same one.

    args.json             the arguments
    metrics.jsonl         one object per step
    samples.jsonl         one object per sample
    checkpoints/step_N/   complete state after N steps (checkpoint.py)
    policy/               the policy that was best on validation (export.py)

A folder belongs to the run whose arguments stand in it: another one's is refused before long work.
JSON files are replaced whole; JSONL files grow by whole steps, and on resume they are cut back to
the checkpoint's step.

Not covered: several runs in one folder.
"""

import dataclasses
import json
import os
import socket
import tempfile
import time
from pathlib import Path

from pfppo.config import UserError, reason, require
from pfppo.files import check_writable, write_json
from pfppo.fsdp import from_main, on_main
from pfppo.run.options import free_options

import torch.distributed as dist

VISIBLE = 10.0  # seconds that a network file system may take to show a new file


def claim(args, ranks, default, option="run_dir", files=None):
    """Name the folder of --`option` (default: the first of `default`, -2, ... that is free, or the
    last that is not, with --resume), and return its Path if it is free or holds this very run.

    files: the names that matter in it (None: all, so another folder's files are in the way). Raises
    UserError.
    """
    resume = getattr(args, "resume", False)
    folder = Path(from_main(getattr(args, option) or numbered(default, resume), ranks))
    setattr(args, option, str(folder))
    on_main(ranks, _check, folder, args, option, files)
    check_shared(folder, f"--{option} {folder}")
    return folder


def open_folder(folder, args, ranks):
    """Make the folder with its args.json, if it is not there yet. Raises UserError."""

    def make():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "args.json").exists():
                write_json(folder / "args.json", dataclasses.asdict(args))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from error

    on_main(ranks, make)


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
        known = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError) as error:
        why = "is not empty and holds no run (no readable args.json), choose another name"
        raise UserError(f"{what}: {why}") from error
    differ = [
        f"{name} {known.get(name)!r} there, {value!r} here"
        for name, value in dataclasses.asdict(args).items()
        if name not in {*free_options(args), option} and known.get(name) != value
    ]
    require(
        not differ,
        f"{what}: holds a run with other arguments ({'; '.join(differ)}): choose another name, or "
        "give --resume and the arguments of that run",
    )
    again = "holds a run with these arguments: give --resume to go on with it, or another name"
    require(args.resume, f"{what}: {again}")


def numbered(folder, last=False):
    """The first of folder, folder-2, folder-3, ... that does not exist; the `last` that does, if
    any does."""
    folders = [Path(folder)]
    while folders[-1].exists():
        folders.append(Path(f"{folder}-{len(folders) + 1}"))
    return folders[-2:][0] if last else folders[-1]


def check_shared(folder, what):
    """Raise UserError, on all ranks, unless `folder` is the same one on all nodes. A collective.

    It need not exist: the nearest of rank 0's parents that does is looked at. what: names it in the
    message, as "--run_dir runs/x".
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:  # nodes that torchrun runs on
        return
    places = (Path(folder).absolute(), *Path(folder).absolute().parents)
    box = [None]
    if dist.get_rank() == 0:
        level = next(level for level, path in enumerate(places) if path.exists())
        try:
            descriptor, token = tempfile.mkstemp(prefix=".shared-", dir=places[level])
            os.close(descriptor)
            box = [(level, os.path.basename(token))]
        except OSError as error:
            box = [f"{what}: cannot be written: {reason(error)}"]
    dist.broadcast_object_list(box, 0)
    require(not isinstance(box[0], str), box[0])
    level, name = box[0]
    token = places[min(level, len(places) - 1)] / name
    deadline = time.monotonic() + VISIBLE
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    views = [None] * dist.get_world_size()
    dist.all_gather_object(views, (seen, socket.gethostname(), str(token.parent)))
    if dist.get_rank() == 0:
        token.unlink()
    blind = [f"{place} of {host}" for seen, host, place in views if not seen]
    require(
        not blind,
        f"{what}: {blind and blind[0]} is another folder than {views[0][2]} of {views[0][1]}, "
        "expected a file system that all nodes share",
    )
