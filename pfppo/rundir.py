"""The run directory's plain files, and whose it is.

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
from pathlib import Path

from pfppo import peers
from pfppo.config import UserError, require
from pfppo.fsdp import agreed

BEST = "best.json"  # in policy/: the step that it is from, and its pass rate on validation

# Arguments that may differ between a run and its continuation. `steps` may grow (the warm-up is a
# share of them), `eval_every` says how often the best policy is looked for, another device rounds
# differently; the others change no number.
FREE = (
    *("resume", "steps", "save_every", "eval_every", "keep", "workers", "device"),
    *("require_isolation", "gradient_checkpointing", "offload_ref", "offload_reward"),
    *("offload_optimizer", "shard_group_size", "grace_seconds", "export", "selfcheck", "plan"),
    *("device_memory", "world_size"),
)


def check_writable(folder, option):
    """Raise UserError if a folder of this name cannot be made or written into."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(there.is_dir(), f"--{option} {folder}: {there} is a file, expected a folder")
    require(
        os.access(there, os.W_OK | os.X_OK),
        f"--{option} {folder}: no permission to write into {there}",
    )


def check_run(args, ranks, option="run_dir", free=FREE, files=None):
    """The run directory as a Path, if it is free or holds this very run. Raises UserError.

    option: which argument names it; free: arguments that may differ; files: the names that matter
    in it (None: all, so another folder's files are in the way).
    """
    folder = Path(getattr(args, option))
    with agreed(ranks):
        if ranks.is_main:
            check_writable(folder, option)
            problem = _mismatch(folder, dataclasses.asdict(args), (*free, option), files)
            require(problem is None, f"--{option} {folder}: {problem}")
    peers.check_shared(folder, f"--{option} {folder}")
    return folder


def open_run(args, ranks, option="run_dir"):
    """Make the run directory with its args.json, if it is not there yet. Raises UserError."""
    folder = Path(getattr(args, option))
    with agreed(ranks):
        try:
            if ranks.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                if not (folder / "args.json").exists():
                    write_json(folder / "args.json", dataclasses.asdict(args))
        except OSError as error:
            raise UserError(f"--{option} {folder}: cannot be written: {error.strerror}") from error


def _mismatch(folder, args, free, files):
    """Why this folder cannot be used for a run with these arguments, or None."""
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    there = there if files is None else there & set(files)
    if not there - {"args.json.tmp"}:  # that one is left by a start that was killed
        return None
    try:
        there = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        return "is not empty and holds no run (no readable args.json), choose another name"
    differ = [
        f"{name} {there.get(name)!r} there, {value!r} here"
        for name, value in args.items()
        if name not in free and there.get(name) != value
    ]
    if differ:
        advice = "choose another name, or give --resume and the arguments of that run"
        return f"holds a run with other arguments ({'; '.join(differ)}): {advice}"
    if not args["resume"]:
        return "holds a run with these arguments: give --resume to go on with it, or another name"
    return None


def restarted():
    """Whether torchrun has started this process again after a failure (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def latest(folder):
    """Of the folder, folder-2, folder-3, ... the last one that exists; else the folder."""
    numbered = unused(folder)
    number = int(numbered.name.rpartition("-")[2]) if numbered != Path(folder) else 2
    return Path(folder) if number == 2 else Path(f"{folder}-{number - 1}")


def unused(folder):
    """The folder, or the first of folder-2, folder-3, ... that does not exist."""
    folder, number = Path(folder), 1
    candidate = folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def write_json(path, value):
    """Write a JSON file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def append_jsonl(path, rows):
    """Append objects to a JSONL file and flush them. Raises UserError where the disk is full."""
    try:
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def append_step(folder, metrics, records, ranks):
    """What a run directory keeps of one step: a line of metrics, and its samples."""
    if ranks.is_main:
        append_jsonl(folder / "metrics.jsonl", [metrics])
        append_jsonl(folder / "samples.jsonl", records)


def whole_lines(path):
    """The objects of a JSONL file, without a last line that was cut short; [] without a file.
    Raises UserError naming file and line."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: damaged, expected a JSON object") from error
    return rows


def last_steps(path, count):
    """The rows of the last `count` steps in a JSONL file, one list per step."""
    steps = {}
    for row in whole_lines(path):
        steps.setdefault(row["step"], []).append(row)
    return list(steps.values())[-count:]


def rewrite_jsonl(path, rows):
    """Make a JSONL file hold these rows and no others, if it is there."""
    if path.exists():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.rename(path)


def cut_jsonl(path, step):
    """Drop the rows after `step`, and a last line that was cut short."""
    rewrite_jsonl(path, [row for row in whole_lines(path) if row["step"] <= step])
