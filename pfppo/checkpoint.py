"""Everything in a run directory, written so that it can be killed at any instant.

    args.json             the arguments
    metrics.jsonl         one object per step
    samples.jsonl         one object per sample
    checkpoints/step_N/   complete state after N steps: sharded weights and optimizers, state.json
    policy/               the policy that was best on validation, in Hugging Face form

A checkpoint is written under a temporary name, listed with the sizes of its files in
`manifest.json`, flushed, and renamed; so a folder named step_N is complete unless somebody damaged
it, and then the manifest tells, where a size has changed. There is no random state to save: every
draw of a run is a function of (seed, step), see data.py and sampler.py. On resume the JSONL files
are cut back to the checkpoint's step.

Nor does a checkpoint depend on the number of ranks: torch.distributed.checkpoint puts the slices of
any number together and cuts them anew. The numbers of a run resumed on other ranks are those of an
uninterrupted one up to the order of sums.

Not covered: saving while training goes on.
"""

import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path

from pfppo.config import UserError, reason, require
from pfppo.fsdp import agreed, from_main, full_state

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

BEST = "best.json"  # in policy/: the step that it is from, and its pass rate on validation

# Arguments that may differ between a run and its continuation. `steps` may grow (the warm-up is a
# share of them), `eval_every` says how often the best policy is looked for, another device rounds
# differently; the others change no number.
FREE = (
    *("resume", "steps", "save_every", "eval_every", "keep", "workers", "device"),
    *("require_isolation", "gradient_checkpointing"),
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


def rewrite_jsonl(path, rows):
    """Make a JSONL file hold these rows and no others, if it is there."""
    if path.exists():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.rename(path)


def cut_jsonl(path, step):
    """Drop the rows after `step`, and a last line that was cut short."""
    rewrite_jsonl(path, [row for row in whole_lines(path) if row["step"] <= step])


def _state(model, optimizer):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save(run, step, trained, state, ranks, keep):
    """Write checkpoints/step_N and remove all but the last `keep`. A collective.

    trained: {name: (sharded model, optimizer)}; state: a JSON-serialisable dict, equal on all
    ranks. Raises UserError if it cannot be written; earlier checkpoints are then untouched.
    """
    folder = run / "checkpoints"
    target, temporary = folder / f"step_{step}", folder / f"step_{step}.tmp"
    try:
        _on_main(lambda: _clear(temporary), ranks)
        for name, (model, optimizer) in trained.items():
            dcp.save(_state(model, optimizer), checkpoint_id=temporary / name)

        def finish():
            _seal(temporary, {"step": step, **state})
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            _sync(folder)
            for old in complete(run)[0][keep:]:
                shutil.rmtree(old)

        _on_main(finish, ranks)
    except (OSError, dcp.api.CheckpointException) as error:
        left = shutil.disk_usage(run).free // 2**20  # torch's own message is not about the disk
        shutil.rmtree(temporary, ignore_errors=True)
        last = (complete(run)[0] or ["none"])[0]
        raise UserError(
            f"{target}: cannot save with {left} MiB left on the disk ({_reason(error)}); "
            f"last complete one: {last}"
        ) from error


def _on_main(work, ranks):
    """Run `work` on rank 0; an OSError there is raised on all ranks. A collective."""
    failure = None
    if ranks.is_main:
        try:
            work()
        except OSError as error:
            failure = error
    failure = from_main(failure, ranks)
    if failure is not None:
        raise failure


def _clear(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _reason(error):
    inner = list(getattr(error, "failures", {}).values())
    error = inner[0][0] if inner else error
    return reason(error)


def _seal(folder, state):
    write_json(folder / "state.json", state)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_json(folder / "manifest.json", sizes)
    for inner in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        _sync(inner)


def _sync(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def complete(run):
    """(complete checkpoints, damaged ones), newest first."""
    folders = [
        path
        for path in (run / "checkpoints").glob("step_*")
        if path.name.removeprefix("step_").isdigit()
    ]
    folders.sort(key=lambda path: int(path.name.removeprefix("step_")), reverse=True)
    whole = [path for path in folders if _is_whole(path)]
    return whole, [path for path in folders if path not in whole]


def _is_whole(folder):
    try:
        sizes = json.loads((folder / "manifest.json").read_text())
        json.loads((folder / "state.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def load(run, trained, ranks):
    """Restore the newest complete checkpoint in place; returns its state, or None. A collective.

    Any number of ranks may have written it. Damaged checkpoints are named, skipped and removed, and
    the JSONL files cut back. Raises UserError where its slices cannot be read.
    """
    box = [None, []]
    if ranks.is_main:
        whole, damaged = complete(run)
        newer = [path for path in damaged if not whole or _number(path) > _number(whole[0])]
        box = [whole[0] if whole else None, newer]
    dist.broadcast_object_list(box, 0)
    newest, damaged = box
    for path in damaged:
        ranks.say(f"{path}: incomplete, falling back to {newest or 'the start of the run'}")
        if ranks.is_main:
            shutil.rmtree(path)
    state = json.loads((newest / "state.json").read_text()) if newest else None
    if newest:
        for name, (model, optimizer) in trained.items():
            loaded = _state(model, optimizer)
            try:
                dcp.load(loaded, checkpoint_id=newest / name)
            except dcp.api.CheckpointException as error:  # of any rank, on all of them
                raise UserError(
                    f"{newest}: damaged ({_reason(error)}); remove it to go on from the one before"
                ) from error
            set_state_dict(
                model,
                optimizer,
                model_state_dict=loaded["model"],
                optim_state_dict=loaded["optimizer"],
            )
    later = {}
    with agreed(ranks):
        if ranks.is_main:
            for name in ("metrics.jsonl", "samples.jsonl"):
                cut_jsonl(run / name, state["step"] if state else 0)
            policy, previous = run / "policy", run / "policy.old"
            if previous.exists() and not policy.exists():  # killed between the renames of `export`
                previous.rename(policy)
            if (policy / BEST).exists():
                later = json.loads((policy / BEST).read_text())
    later = from_main(later, ranks)
    if state and later.get("best_step", 0) > state["step"]:
        state |= later  # exported after the checkpoint was saved, and still the best there was
    return state


def _number(path):
    return int(path.name.removeprefix("step_"))


def export_best(sharded, run, config_source, tokenizer, ranks, state):
    """`export` to policy/, with a note of which step that was and how good. A collective."""

    def note(folder):
        write_json(folder / BEST, {name: state[name] for name in ("best", "best_step")})

    export(sharded, run / "policy", config_source, tokenizer, ranks, [note])


def export(sharded, folder, config_source, tokenizer, ranks, extra=()):
    """Write a sharded model in Hugging Face form, whole or not at all. A collective.

    config_source: the unsharded twin inside the wrapper, for `save_pretrained` and its config;
    extra: functions called with the temporary folder on rank 0, to write more files into it.
    """
    weights = full_state(sharded)
    failure = None
    if ranks.is_main:
        config_source = copy.deepcopy(config_source).float()  # the config names the weights' type
        folder = Path(folder)
        temporary = folder.with_name(folder.name + ".tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            config_source.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            for write in extra:
                write(temporary)
            previous = folder.with_name(folder.name + ".old")
            shutil.rmtree(previous, ignore_errors=True)
            if folder.exists():
                folder.rename(previous)
            temporary.rename(folder)
            shutil.rmtree(previous, ignore_errors=True)
        except Exception as error:  # safetensors has errors of its own for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            failure = f"{folder}: cannot be written: {_reason(error)}"
    box = [failure]
    dist.broadcast_object_list(box, 0)
    require(box[0] is None, box[0])
